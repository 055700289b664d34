"""Settings that must stand before anything is imported, and what most tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported
# Two processes of one thread each beat one of two on the many small tests; two of two collapse.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

import ctypes
import gc
import logging
import sys

import pytest
import torch

import backbones  # noqa: F401  (registers the models)

logging.getLogger("timm").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _memory_goes_back():
    """Give back what a module's models took: the C library keeps it, several GB in each worker."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # glibc's alone
