"""Prints the lowest versions that pyproject.toml declares, a requirement a line, for pip.

    python scripts/lowest_versions.py onnx > lowest.txt    # the core and the extra onnx

Python 3.10 needs tomli, which pytest brings there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main() -> None:
    """Read pyproject.toml and print the core's requirements and those of the extras named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", help="names of optional dependencies")
    extras = parser.parse_args().extras
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    for requirement in requirements:
        name, floor = requirement.split(">=")  # every requirement is a name and its lowest version
        print(f"{name}=={floor}")


if __name__ == "__main__":
    main()
