"""Settings that must stand before anything is imported, and what most tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported
# Two processes of one thread each beat one of two on the many small tests; two of two collapse.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

import ctypes
import gc
import logging
import sys
from pathlib import Path

import pytest
import torch

import backbones  # noqa: F401  (registers the models)

logging.getLogger("timm").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


_memory = {"after": 0.0}  # GB that this process kept when it last gave memory back


@pytest.fixture(autouse=True)
def _memory_goes_back():
    """Give back what large models took: the C library keeps it, many GB in each worker."""
    yield
    if _resident() > _memory["after"] + 1:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # glibc's alone
        _memory["after"] = _resident()


def _resident() -> float:
    """GB of memory that this process holds; 0 where Linux does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
