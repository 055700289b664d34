"""Settings that must stand before anything is imported, and what most tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "2")

import logging

import pytest
import torch

import backbones  # noqa: F401  (registers the models)

logging.getLogger("timm").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
