"""The built site: its links, and the public names in its reference."""

import html.parser
import importlib
import posixpath
import types
import urllib.parse

import pytest

import dmtrl_keras

pytestmark = pytest.mark.browser

MODULES = [
    "dmtrl_keras",
    "dmtrl_keras.balancing",
    "dmtrl_keras.canonical_correlation",
    "dmtrl_keras.conversion",
    "dmtrl_keras.decomposition",
    "dmtrl_keras.distribution",
    "dmtrl_keras.layers",
    "dmtrl_keras.losses",
    "dmtrl_keras.metrics",
    "dmtrl_keras.callbacks",
    "dmtrl_keras.optimizers",
    "dmtrl_keras.parameterizations",
    "dmtrl_keras.regularizers",
    "dmtrl_keras.tensor_normal",
    "dmtrl_keras.testing",
]


class _Anchors(html.parser.HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get("id"), attributes.get("name")} - {None}
        for attribute in ("href", "src"):
            if attributes.get(attribute):
                self.links.append(attributes[attribute])


@pytest.fixture(scope="module")
def read(site):
    """All pages of the site by their path."""
    return {
        page.relative_to(site).as_posix(): _Anchors(page.read_text())
        for page in site.rglob("*.html")
    }


def test_links(site, read):
    """Every internal link leads to a file, and to an anchor that is there."""
    assert len(read) > 30
    base = "https://dmtrl-keras.github.io/dmtrl_keras/"
    broken = []
    for path, page in read.items():
        for link in page.links:
            # Pages' own addresses, as in the README.
            url = link.removeprefix(base) if link.startswith(base) else None
            parts = urllib.parse.urlsplit(link if url is None else f"/{url}")
            if parts.scheme or parts.netloc:
                continue
            target = urllib.parse.unquote(parts.path)
            if target.startswith("/"):
                # `404.html` is shown anywhere, so that its links are absolute.
                target = target.removeprefix("/dmtrl_keras").lstrip("/")
            else:
                target = posixpath.normpath(
                    posixpath.join(posixpath.dirname(path), target) if target else path
                )
            file = site / target
            if file.is_dir():
                target = posixpath.join(target, "index.html")
                file = file / "index.html"
            anchor = urllib.parse.unquote(parts.fragment)
            known = read.get(posixpath.normpath(target))
            if not file.exists():
                broken.append((path, link))
            elif anchor and known is not None and anchor not in known.ids:
                broken.append((path, link))
    assert broken == []


def public_names(module):
    """The public names of a module: `__all__`, or what it defines itself."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


@pytest.mark.parametrize("name", MODULES)
def test_public_names(name, read):
    """Every public name is in the reference, under the module that it is public in."""
    module = importlib.import_module(name)
    page = "top" if name == "dmtrl_keras" else name.rpartition(".")[2]
    ids = read[f"api/{page}/index.html"].ids
    names = public_names(module)
    assert names
    for public in names:
        if isinstance(getattr(module, public), types.ModuleType):
            # A page of its own.
            assert f"api/{public}/index.html" in read
        elif public != "__version__":
            assert f"{name}.{public}" in ids


def test_modules():
    """No public module has been forgotten."""
    modules = {
        f"dmtrl_keras.{name}"
        for name in dmtrl_keras.__all__
        if isinstance(getattr(dmtrl_keras, name), types.ModuleType)
    }
    assert modules <= set(MODULES)


def test_readme_links(read):
    """The README's links into the site lead somewhere."""
    import pathlib
    import re

    base = "https://dmtrl-keras.github.io/dmtrl_keras/"
    readme = pathlib.Path(__file__).parent.parent.parent / "README.md"
    targets = re.findall(re.escape(base) + r"([^)>\s]*)", readme.read_text())
    assert len(targets) > 10
    for target in targets:
        path, _, anchor = target.partition("#")
        page = read[f"{path}index.html"]
        assert not anchor or anchor in page.ids, target
