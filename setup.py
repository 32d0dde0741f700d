"""What setup.cfg can't say: which packages there are, and the description's addresses."""

import pathlib
import re
import shutil

from setuptools import find_packages, setup

REPOSITORY = "https://github.com/dmtrl-keras/dmtrl_keras"
PICTURES = (".gif", ".jpg", ".jpeg", ".png", ".svg", ".webp")


def absolute(text):
    """Markdown whose relative pictures and links are those of the main branch.

    A package index shows the description without the files beside it.
    """

    def address(match):
        before, path = match.groups()
        kind = "raw" if path.lower().endswith(PICTURES) else "blob"
        return f"{before}{REPOSITORY}/{kind}/main/{path}"

    relative = re.compile(r'(\]\(|src="|href=")(?![a-z]+:|#)(?:\./)?([^)"\s]+)')
    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    # Every other part is a code block.
    parts[::2] = [relative.sub(address, part) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    root = pathlib.Path(__file__).parent
    # A build in a checkout would take along what an older one left, modules that have
    # moved since among them.
    shutil.rmtree(root / "build" / "lib", ignore_errors=True)
    # One name in a wheel, while `python -m applications.mnist` runs from a checkout.
    beside = {
        "dmtrl_keras.applications": "applications",
        "dmtrl_keras.tuning": "tuning",
        "dmtrl_keras.tuning.comparison": "tuning/comparison",
    }
    setup(
        packages=[*find_packages(include=["dmtrl_keras", "dmtrl_keras.*"]), *beside],
        package_dir=beside,
        long_description=absolute((root / "README.md").read_text(encoding="utf-8")),
    )
