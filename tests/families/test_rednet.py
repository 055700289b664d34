"""What is particular to RedNet: two stems, odd sizes, products of activations."""

from __future__ import annotations

import pytest
import torch
from damping import damp
from golden import FOLDER, Golden, assert_feature, fill

import backbones
from backbones.errors import CheckpointError, ConfigError, InputSizeError
from backbones.families.rednet import Involution

PARAMETERS = {
    "rednet26": 9233166,
    "rednet38": 12386986,
    "rednet50": 15540806,
    "rednet101": 25652950,
    "rednet152": 33984582,
    "rednet50_dense": 15541526,
}
SMALL = {"depths": [1, 1, 1, 1], "dims": [64, 64, 128, 64], "num_classes": 3}


def test_parameter_counts():
    assert set(PARAMETERS) == set(backbones.list_models(family="rednet"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize("name", ["rednet50_dense", "rednet50"])
@torch.no_grad()
def test_dense_form(name):
    """What the authors' code for detection returns, in both forms."""
    golden = Golden(FOLDER / "rednet50_dense_tame@192x256.json.gz")
    stem = {"stem_kernel_size": 7} if name == "rednet50" else {}
    model = backbones.create_model(name, features_only=True, dtype=torch.float64, **stem).eval()
    report = backbones.load_checkpoint(model, golden.checkpoint())
    assert report.layout == "authors"
    assert not report.missing
    assert not report.ignored
    for form in (model, backbones.reparameterize(model)):
        maps = form(golden.input_tensor())
        for feature_map, expected in zip(maps, golden.content["features"], strict=True):
            assert_feature(feature_map, expected, expected["name"])


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize(("own", "given"), [(3, 7), (7, 3)])
def test_a_file_of_the_other_stem_is_refused_by_name(tmp_path, own, given, deploy):
    other = backbones.create_model("rednet26", **SMALL, stem_kernel_size=given)
    path = backbones.save_checkpoint(other, tmp_path / "mine.safetensors")
    arguments = {**SMALL, "stem_kernel_size": own, "deploy": deploy}
    model = backbones.create_model("rednet26", **arguments).eval()
    with pytest.raises(CheckpointError, match=f"with stem_kernel_size={given}"):
        backbones.load_checkpoint(model, path)
    with pytest.raises(CheckpointError, match=f"with stem_kernel_size={given}"):
        backbones.create_model("rednet26", **arguments, checkpoint_path=path)
    assert backbones.load_model(path).stem_kernel_size == given


@torch.no_grad()
def test_odd_sizes_take_the_mean_of_the_positions_there_are():
    """Our own definition; the authors' code computes nothing at these sizes."""
    model = Involution(16, 3, stride=2).double().eval()
    x = torch.randn(1, 16, 5, 7, dtype=torch.float64)
    kernels = model.predict(model.reduce(model.pool(x)))
    assert kernels.shape == (1, 9, 3, 4)
    corner, edge = x[..., 4:, 6:], x[..., 4:, 2:4].mean((2, 3), keepdim=True)
    for place, mean in ((3, corner), (1, edge)):
        expected = model.predict(model.reduce(mean))[..., 0, 0]
        assert torch.allclose(kernels[..., 2, place], expected, rtol=0, atol=1e-12)
    out = model(x)
    assert out.shape == (1, 16, 3, 4)
    # The last position stands for x[4, 6], whose neighbors below and right lie outside.
    taps = kernels[0, :, 2, 3].view(3, 3)[:2, :2]
    expected = (x[0, :, 3:5, 5:7] * taps).sum((1, 2))
    assert torch.allclose(out[0, :, 2, 3], expected, rtol=0, atol=1e-12)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="multiples of 64"):
        backbones.create_model("rednet26", device="meta", dims=[256, 512, 1000, 2048])
    for size in (4, 0):
        with pytest.raises(ConfigError, match="must be odd"):
            backbones.create_model("rednet26", device="meta", stem_kernel_size=size)
    model = backbones.create_model("rednet26", **SMALL).eval()
    with pytest.raises(InputSizeError, match="at least 32"):
        model(torch.zeros(1, 3, 64, 31))
    deeper = backbones.create_model("rednet38").state_dict()
    with pytest.raises(CheckpointError, match="create the variant"):
        backbones.load_checkpoint(backbones.create_model("rednet26"), deeper)
    merged = backbones.reparameterize(model, verify=False).state_dict()
    with pytest.raises(CheckpointError, match=r"missing \(\d+\)"):
        backbones.load_checkpoint(model, merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_close_in_half_types(dtype):
    model = backbones.create_model("rednet26", dtype=torch.float64).eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(fill(key, tuple(value.shape)))
    damp(model, "rednet26")
    x = fill("input", (1, 3, 96, 64))
    expected = model(x)
    error = (model.to(dtype)(x.to(dtype)).double() - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps
