"""Short runs on small images."""

import pytest
from patterns import short_run, write_patterns

from backbones import train


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_patterns(tmp_path_factory.mktemp("patterns"))


@pytest.fixture
def options(images, tmp_path):
    return short_run(images, tmp_path / "output")


@pytest.fixture(scope="session")
def plain_losses(images, tmp_path_factory):
    """Losses of a short run without further options."""
    report = train.run(**short_run(images, tmp_path_factory.mktemp("plain")))
    return [epoch.train_loss for epoch in report.epochs]


@pytest.fixture
def fit(options):
    """Run with further options and return the report."""
    return lambda **more: train.run(**{**options, **more})
