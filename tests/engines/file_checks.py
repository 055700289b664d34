"""What a file gives, beside what its model gives."""

import pytest
import torch

INT8_SUFFIXES = [".onnx", ".xml", pytest.param(".pte", marks=pytest.mark.slow)]  # lowering is slow
_PACKAGES = {
    ".onnx": ["onnx", "onnxruntime"],
    ".xml": ["onnx", "openvino", "nncf"],
    ".pte": ["executorch"],
}
SIZE = (3, 64, 64)


def images(count=3, size=SIZE, seed=4):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


def error_of(model, runner, x):
    """Return the largest difference over the largest magnitude."""
    expected, found = outputs(model, x), runner(x)
    assert found.shape == expected.shape
    return float((expected - found).abs().max() / expected.abs().max())


def skip_without_packages(suffix):
    """Skip the test where files of a suffix cannot be written or run here."""
    for package in _PACKAGES.get(suffix, ()):
        pytest.importorskip(package)
