"""What is particular to SPANet: stored filters, their place at other sizes, and the shortcuts."""

from __future__ import annotations

import pytest
import torch
from golden import FOLDER, Golden
from randomized import randomize

import backbones
from backbones.errors import CheckpointError, ConfigError
from backbones.families.spanet import Block, SpectralMixer
from backbones.weights import map_checkpoint


@pytest.fixture(scope="module")
def released():
    """A checkpoint in the authors' layout, with the filters that their constructor computes."""
    return Golden(FOLDER / "spanet_small.json.gz").checkpoint()


@pytest.fixture(scope="module")
def model():
    return backbones.create_model("spanet_small", device="meta")


def test_parameter_counts_are_the_published_ones_without_filters():
    filters = {
        "spanet_small": (28659780, 4),
        "spanet_medium": (41768978, 6),
        "spanet_mediumx": (54878176, 8),
        "spanet_base": (75938194, 6),
        "spanet_basex": (99827680, 8),
    }
    assert set(backbones.list_models(family="spanet")) == set(filters)
    for name, (published, depth) in filters.items():
        stored = 3 * depth * (56**2 + 28**2 + 3 * 14**2 + 7**2)
        assert backbones.model_info(name).params == published - stored, name


def test_stored_filters_are_left_out(model, released):
    bare = {key: value for key, value in released.items() if not key.endswith(".filter")}
    assert len(released) - len(bare) == 72
    found, expected = map_checkpoint(released, model), map_checkpoint(bare, model)
    assert found.tensors.keys() == expected.tensors.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda filter_: filter_.roll((1, 0), (1, 2)),  # what detection does to odd sizes
        lambda filter_: torch.where(filter_ == filter_.max(), filter_ + 0.05, filter_),
        lambda filter_: torch.where((filter_ - 1 / 3).abs() < 1e-6, filter_.min(), filter_),
    ],
    ids=["displaced", "another factor", "nothing on the edge"],
)
def test_filters_of_other_values_are_refused(model, released, change):
    key = "network.6.3.token_mixer.sps.1.filter"
    with pytest.raises(CheckpointError, match=r"remove its entries that end with \.filter"):
        map_checkpoint({**released, key: change(released[key])}, model)


@pytest.mark.parametrize(("stage", "dim"), [(0, 64), (3, 20)])
@pytest.mark.parametrize("size", [(7, 7), (9, 14), (2, 3), (1, 1)])
@torch.no_grad()
def test_the_mixer_is_the_paper_s_with_filters_centered_at_every_size(stage, dim, size):
    """Against transforms, chunks of torch.chunk, and the three values written out."""
    radius = (2, 2, 1, 1)[stage]
    mixer = randomize(SpectralMixer(dim, radius).double()).eval()
    x = torch.randn(2, dim, *size, dtype=torch.float64)
    z = mixer.conv_h(mixer.conv_w(mixer.proj_in(x)))
    center = torch.tensor(size) // 2
    rows, columns = (torch.arange(side) - middle for side, middle in zip(size, center, strict=True))
    distance = (rows.unsqueeze(1) ** 2 + columns**2).sqrt()
    context = torch.zeros_like(z)
    for low, share, conv in zip((0.7, 0.8, 0.9), z.chunk(3, dim=1), mixer.pws, strict=True):
        filter_ = torch.full(size, 1 - low, dtype=torch.float64)
        filter_[distance == radius] = 1 / 3
        filter_[distance < radius] = low
        filter_ = torch.fft.ifftshift(filter_)
        context += conv(torch.fft.ifft2(torch.fft.fft2(share) * filter_).real)
    expected = mixer.proj_out(z * context)
    assert (mixer(x) - expected).abs().max() < 1e-6 * expected.abs().max()  # rounded constants
    mixer.reparameterize()
    assert (mixer(x) - expected).abs().max() < 1e-6 * expected.abs().max()


@torch.no_grad()
def test_factors_are_on_the_shortcut_of_the_last_two_stages():
    model = backbones.create_model("spanet_small", depths=[1, 1, 1, 1], device="meta")
    scaled = [stage.blocks[0].res_scale1 is not None for stage in model.stages]
    assert scaled == [False, False, True, True]
    block = Block(8, radius=1, scaled=True, drop_path=0.0).eval()
    for part in (block.token_mixer.proj_out, block.mlp.fc2):
        part.weight.zero_()
        part.bias.zero_()
    block.res_scale1.fill_(3)
    block.res_scale2.fill_(5)
    x = torch.randn(1, 8, 4, 4)
    assert torch.allclose(block(x), 15 * x)


def test_only_the_mlp_and_the_classifier_begin_at_the_authors_normal():
    model = backbones.create_model("spanet_small", depths=[1, 1, 1, 1])
    block = model.stages[0].blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.fc1.bias.abs().max() == 0
    bound = block.token_mixer.proj_in.in_channels**-0.5  # PyTorch's own
    assert 0.9 * bound < block.token_mixer.proj_in.weight.abs().max() <= bound
    assert block.token_mixer.proj_in.bias.abs().max() > 0


@pytest.mark.parametrize("dims", [[64, 128, 320, 4], [2, 4, 8, 16]])
def test_channels_that_make_no_three_shares(dims):
    with pytest.raises(ConfigError, match="three shares"):
        backbones.create_model("spanet_small", dims=dims, device="meta")
