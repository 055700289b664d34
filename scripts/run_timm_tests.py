"""Runs timm's own model tests over our names.

    python scripts/run_timm_tests.py            # variants up to 10 M, the smallest of each family
    python scripts/run_timm_tests.py --all      # every variant
    python scripts/run_timm_tests.py -k atto    # further arguments go to pytest

timm's wheel holds no tests, so the source distribution of the installed version is downloaded with
pip (kept in --cache); nothing of it is copied into this repository. Left out are timm's TorchScript
tests (PyTorch deprecates TorchScript), those that download pretrained files, and those that name
models of timm's. The plugin beside this file checks that every model tested is of our classes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import timm

HERE = Path(__file__).resolve().parent


def fetch_tests(cache: Path) -> Path:
    """Return the folder with timm's tests for the installed version, downloading it once."""
    version = timm.__version__
    folder = cache / f"timm-{version}" / "tests"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "timm", "--dest", str(cache), f"timm=={version}"]
    subprocess.run(command, check=True)
    with tarfile.open(cache / f"timm-{version}.tar.gz") as archive:
        members = [m for m in archive.getmembers() if m.name.startswith(f"timm-{version}/tests/")]
        # Python knows filters from 3.10.12 and 3.11.4 on.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(cache, members=members, **safe)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every variant, whatever its size")
    default_cache = Path(tempfile.gettempdir()) / "backbones-timm-tests"
    parser.add_argument(
        "--cache", type=Path, default=default_cache, help="where the tests are kept"
    )
    args, rest = parser.parse_known_args()
    folder = fetch_tests(args.cache)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE), str(HERE.parent / "tests"), environment.get("PYTHONPATH")])
    )
    environment["OMP_NUM_THREADS"] = "1"  # two processes of one thread each
    environment["BACKBONES_TIMM_TESTS_ALL"] = "1" if args.all else ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "timm_tests_plugin", "-c", os.devnull]
    command += ["--rootdir", str(folder), "-W", "ignore", "-n", "2", str(folder / "test_models.py")]
    command += rest
    return subprocess.run(command, env=environment, cwd=folder.parent).returncode


if __name__ == "__main__":
    sys.exit(main())
