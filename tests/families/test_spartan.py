"""What is particular to SpaRTAN: other widths, rotations and the strongest channel."""

from __future__ import annotations

import pytest
import torch
from golden import FOLDER, Golden, assert_feature, assert_logits, fill

import backbones
from backbones.errors import CheckpointError, ConfigError
from backbones.families.spartan import ChannelMixer

CUSTOM = {"depths": [1, 2, 3, 1], "dims": [24, 48, 96, 160], "expand_ratios": [8, 6, 4, 4]}


@pytest.fixture(scope="module")
def custom():
    return Golden(FOLDER / "spartan_custom.json.gz")


@pytest.fixture
def custom_file(custom, tmp_path):
    """The custom checkpoint as training code leaves it: wrapped and prefixed."""
    path = tmp_path / "checkpoint.pth"
    tensors = {f"module.{key}": value for key, value in custom.checkpoint().items()}
    torch.save({"epoch": 3, "model": tensors}, path)
    return path


def test_parameter_count():
    assert backbones.list_models(family="spartan") == ["spartan_t"]
    model = backbones.create_model("spartan_t", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 3820296


@torch.no_grad()
def test_a_model_of_other_depths_and_widths_computes_what_the_authors_does(custom, custom_file):
    arguments = {**CUSTOM, "checkpoint_path": custom_file, "dtype": torch.float64}
    model = backbones.create_model("spartan_t", **arguments).eval()
    assert sum(p.numel() for p in model.parameters()) == custom.params
    assert_logits(model(custom.input_tensor()), custom)
    pyramid = backbones.create_model("spartan_t", **arguments, features_only=True).eval()
    for map_, expected in zip(pyramid(custom.input_tensor()), custom.stages(), strict=True):
        assert_feature(map_, expected, expected["name"])


def test_a_checkpoint_whose_groups_break_the_half_rule_is_refused(custom, tmp_path):
    tensors = custom.checkpoint()
    key = "layers.0.smixer.h_conv.conv.weight"  # dense in the first half of the stages
    tensors[key] = tensors[key][:, :1].clone()
    torch.save(tensors, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"conv_h\.conv\.weight"):
        backbones.create_model("spartan_t", **CUSTOM, checkpoint_path=tmp_path / "odd.pth")


@torch.no_grad()
def test_rotation_is_a_complex_product_of_adjacent_channels():
    mixer = ChannelMixer(8, 16, groups=8).double()
    mixer.rotation.copy_(fill("rotation", (8, 2)))
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    pairs = torch.complex(x[:, 0::2], x[:, 1::2])
    turned = pairs * torch.view_as_complex(mixer.rotation).view(1, -1, 1, 1)
    expected = torch.stack((turned.real, turned.imag), dim=2).flatten(1, 2)
    assert (mixer.rotate(x) - expected).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_ties_go_to_the_first_channel(dtype):
    """Equal inputs in two channels: the token of the first is added, as a written-out loop does."""
    mixer = ChannelMixer(8, 16, groups=8).double().eval()
    for key, value in mixer.state_dict().items():
        if value.is_floating_point():
            value.copy_(fill(key, tuple(value.shape)))
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64).to(dtype).double()
    x[:, 2] = x[:, 6] = x.max() + 1
    seen = []
    mixer.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    mixer.to(dtype)(x.to(dtype))
    mixer.double()
    token = mixer.proj(x) * mixer.act(mixer.theta(x))
    expected = mixer.rotate(token + token[:, 2:3])
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    assert (seen[0] - expected).abs().max() < tolerance * expected.abs().max()
    assert (mixer.rotate(token + token[:, 6:7]) - expected).abs().max() > 0.1


def test_drop_path_never_reaches_its_rate():
    model = backbones.create_model("spartan_t", drop_path_rate=0.1, device="meta")
    rates = [rate for stage in model.drop_path_rates() for rate in stage]
    assert rates == pytest.approx([0.1 * b / 20 for b in range(20)])
    assert model.stages[3].blocks[1].drop_path.drop_prob == pytest.approx(0.095)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"dims": [36, 64, 128, 256]}, "dims"), ({"expand_ratios": [4, 3, 2, 2]}, "expand_ratios")],
)
def test_widths_that_cannot_be_built(arguments, word):
    with pytest.raises(ConfigError, match=word):
        backbones.create_model("spartan_t", device="meta", **arguments)
