"""What a file gives, beside what its model gives."""

import torch

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
