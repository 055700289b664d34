"""Settings that must stand before anything is imported, and what most tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported
# Two processes of one thread each beat one of two on the many small tests; two of two collapse.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

import logging

import pytest
import torch

import backbones  # noqa: F401  (registers the models)

logging.getLogger("timm").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
