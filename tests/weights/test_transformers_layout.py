"""Checkpoints of transformers' ConvNeXt classes compute in ours what they compute there."""

from __future__ import annotations

import pytest
import torch
from golden import fill

import backbones
from backbones.errors import CheckpointError

transformers = pytest.importorskip("transformers")

SMALL = {"depths": [1, 2, 3, 1], "dims": [16, 24, 32, 48], "num_classes": 7}
# (our variant, their version): V1 with linear layers, V2 with them and with 1x1 convolutions.
MODELS = [("convnext_tiny", ""), ("convnextv2_tiny", "V2"), ("convnextv2_atto", "V2")]


def theirs(version: str, part: str = "ForImageClassification"):
    """A small float64 model of transformers, every entry filled by its name."""
    config = getattr(transformers, f"ConvNext{version}Config")(
        depths=SMALL["depths"],
        hidden_sizes=SMALL["dims"],
        num_labels=SMALL["num_classes"],
        layer_norm_eps=1e-6,  # the authors'; transformers ends with 1e-12
    )
    model = getattr(transformers, f"ConvNext{version}{part}")(config).double().eval()
    model.load_state_dict({k: fill(k, tuple(v.shape)) for k, v in model.state_dict().items()})
    return model


@pytest.mark.parametrize(("name", "version"), MODELS)
@torch.no_grad()
def test_logits_agree(name, version):
    their_model = theirs(version)
    model = backbones.create_model(name, **SMALL, dtype=torch.float64).eval()
    report = backbones.load_checkpoint(model, their_model.state_dict())
    assert (report.layout, report.prefix) == ("transformers", "")
    assert report.loaded == len(model.state_dict()) == len(their_model.state_dict())
    assert not report.ignored and not report.dropped
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected = their_model(x).logits
    error = (model(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-12, f"differs by {error:.1e} of the largest logit"


@pytest.mark.parametrize(("name", "version"), MODELS)
@torch.no_grad()
def test_trunk_without_classifier(name, version):
    """ConvNextModel's own names have no prefix, and its file has no classifier."""
    trunk = theirs(version, "Model")
    features = backbones.create_model(
        name, **SMALL, dtype=torch.float64, features_only=True, out_indices=(3,)
    ).eval()
    assert backbones.load_checkpoint(features, trunk.state_dict()).layout == "transformers"
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = trunk(x).last_hidden_state
    torch.testing.assert_close(features(x)[0], expected, rtol=1e-11, atol=1e-11)
    whole = backbones.create_model(name, **SMALL)
    with pytest.raises(CheckpointError, match="'head.fc.weight'"):
        backbones.load_checkpoint(whole, trunk.state_dict())


def test_file_of_the_other_version_is_refused():
    first = backbones.create_model("convnext_tiny", **SMALL)
    with pytest.raises(CheckpointError, match=r"'transformers'.*gamma"):
        backbones.load_checkpoint(first, theirs("V2").state_dict())
