"""Print the lowest versions that setup.cfg allows, as constraints for pip.

python tests/lower_bounds.py > lower.txt
pip install --constraint lower.txt ".[test]"
"""

import configparser
import pathlib
import re


def lower_bounds(path):
    """The lowest version of each requirement, a dict by name.

    Args:
        path: path of a setup.cfg.

    Raises:
        ValueError: if a requirement has no lower bound, or two that differ.
    """
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(pathlib.Path(path).read_text(encoding="utf-8"))
    lines = config["options"]["install_requires"].splitlines()
    for extra in config["options.extras_require"].values():
        lines += extra.splitlines()
    bounds = {}
    for line in filter(None, (line.split("#")[0].strip() for line in lines)):
        found = re.match(r"([\w.-]+)(?:\[[\w,]+\])?(?:[>=]=([\w.]+))?", line)
        name, version = found.groups()
        if name == config["metadata"]["name"]:
            continue
        if version is None or bounds.setdefault(name, version) != version:
            raise ValueError(f"expected one lower bound of each name. Received: {line!r}.")
    return bounds


if __name__ == "__main__":
    root = pathlib.Path(__file__).parent.parent
    for requirement, version in sorted(lower_bounds(root / "setup.cfg").items()):
        print(f"{requirement}=={version}")
