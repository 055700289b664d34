"""What is particular to AFFNet: options that no weight shows, filters that depend on the input."""

from __future__ import annotations

import pytest
import torch
from golden import FOLDER, Golden, assert_feature, fill

import backbones
from backbones.errors import CheckpointError, ConfigError, InputSizeError
from backbones.families.affnet import AdaptiveFilter, PixelNorm

PARAMETERS = {"affnet_et": 1436264, "affnet_t": 2654232, "affnet": 5568696}
OTHERS = {"act_layer": "relu", "norm_layer": "pixel", "threshold": 0.02}
SMALL = {"depths": [1, 1, 1, 1, 1], "dims": [8, 8, 16, 24, 32], "stem_dim": 8, "num_classes": 3}


def golden_model(name, **arguments):
    golden = Golden(FOLDER / f"{name}.json.gz")
    model = backbones.create_model(golden.variant, dtype=torch.float64, **arguments).eval()
    report = backbones.load_checkpoint(model, golden.checkpoint())
    return golden, model, report


def filled(module):
    module.double().eval()
    with torch.no_grad():
        for key, value in module.state_dict().items():
            value.copy_(fill(key, tuple(value.shape)))
    return module


def test_parameter_counts():
    assert set(PARAMETERS) == set(backbones.list_models(family="affnet"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize("size", [(7, 7), (8, 6), (1, 2), (16, 13)])
@torch.no_grad()
def test_filter_is_its_formula_before_and_after_merging(size):
    """With matrices of complex numbers, though the activation takes their parts."""
    mixer = filled(AdaptiveFilter(24, "silu", 0.01))
    x = torch.randn(2, 24, *size, dtype=torch.float64)
    spectrum = torch.fft.rfft2(x, norm="ortho")
    numbers = spectrum.unflatten(1, (8, 3))

    def layer(z, weight, bias):
        z = torch.einsum("bgihw,gio->bgohw", z, torch.complex(*weight))
        return z + torch.complex(*bias)[..., None, None]

    def of_parts(function, z, *options):
        return torch.complex(function(z.real, *options), function(z.imag, *options))

    mask = of_parts(torch.nn.functional.silu, layer(numbers, mixer.w1, mixer.b1))
    mask = layer(mask, mixer.w2, mixer.b2)
    mask = of_parts(torch.nn.functional.softshrink, mask, 0.01).flatten(1, 2)
    expected = torch.fft.irfft2(mask * spectrum, s=size, norm="ortho") + x
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-11)
    mixer.reparameterize()
    assert mixer.w1.shape == (48, 6, 1, 1)
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_norm_of_pixels_adds_eps_to_the_deviation():
    norm = filled(PixelNorm(6, eps=0.1))
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    rows = x.movedim(1, -1)
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / (rows.square().mean(-1, keepdim=True).sqrt() + 0.1)
    expected = (rows * norm.weight + norm.bias).movedim(-1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("output_stride", [8, 16])
@torch.no_grad()
def test_dilated_forms_are_the_authors(output_stride):
    """Only the depthwise convolutions in front of stages are dilated."""
    arguments = {"output_stride": output_stride, "features_only": True}
    golden, model, _ = golden_model("affnet_et@256x256", **arguments)
    expected = golden.content["output_stride"][str(output_stride)]
    stages = [f for f in expected if f["name"].startswith("stage.")]
    for map_, wanted in zip(model(golden.input_tensor()), stages, strict=True):
        assert_feature(map_, wanted, wanted["name"])


@torch.no_grad()
def test_what_no_weight_shows_changes_the_outputs():
    """The authors' files load into any form; the report names what was assumed."""
    golden, model, report = golden_model("affnet_et@192x256")
    assert report.assumed == ("act_layer=silu", "norm_layer=group", "threshold=0.01")
    x = golden.input_tensor()[:, :, :64, :96]
    expected = model(x)
    for name, value in OTHERS.items():
        _, other, _ = golden_model("affnet_et@192x256", **{name: value})
        outputs = other(x)
        assert 0.001 < (outputs - expected).abs().max() / expected.abs().max() < 2, name
        merged = backbones.reparameterize(other, verify=False)(x)
        assert (merged - outputs).abs().max() < 1e-9 * outputs.abs().max(), name


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_our_files_of_another_form_are_refused(tmp_path, name, deploy):
    options = {**SMALL, "deploy": deploy}
    model = backbones.create_model("affnet_et", **options, **{name: OTHERS[name]}).eval()
    path = backbones.save_checkpoint(model, tmp_path / "mine.safetensors")
    receiver = backbones.create_model("affnet_et", **options).eval()
    with pytest.raises(CheckpointError, match=f"create the model with {name}={OTHERS[name]}"):
        backbones.load_checkpoint(receiver, path)
    assert getattr(backbones.load_model(path), name) == OTHERS[name]


def test_files_with_prelu_are_refused():
    golden = Golden(FOLDER / "affnet_et@192x256.json.gz")
    tensors = golden.checkpoint()
    tensors["layer_3.1.global_rep.0.filter.act.weight"] = torch.full((1,), 0.25)
    with pytest.raises(CheckpointError, match=r"filter\.act\.weight' is the slope of a PReLU"):
        backbones.load_checkpoint(backbones.create_model("affnet_et"), tensors)


def test_encoders_of_dense_models_load():
    """The authors' segmentation files: another prefix, no classifier, no expansion."""
    golden = Golden(FOLDER / "affnet_et.json.gz")
    theirs = {
        f"encoder.{key}": value
        for key, value in golden.checkpoint().items()
        if not key.startswith(("classifier.", "conv_1x1_exp."))
    }
    model = backbones.create_model("affnet_et", features_only=True)
    report = backbones.load_checkpoint(model, theirs)
    assert (report.layout, report.prefix, report.missing) == ("authors", "encoder.", ())


def test_bad_input_is_refused():
    for arguments, word in (
        ({"act_layer": "prelu"}, "act_layer"),
        ({"norm_layer": "batch"}, "norm_layer"),
        ({"dims": [32, 48, 64, 100, 144]}, "multiples of 8"),
    ):
        with pytest.raises(ConfigError, match=word):
            backbones.create_model("affnet_et", device="meta", **arguments)
    model = backbones.create_model("affnet_et", **SMALL).eval()
    with pytest.raises(InputSizeError, match="at least 32"):
        model(torch.zeros(1, 3, 64, 31))
    golden = Golden(FOLDER / "affnet_et.json.gz").checkpoint()
    with pytest.raises(CheckpointError, match="create the variant"):
        backbones.load_checkpoint(backbones.create_model("affnet_t"), golden)
    merged = backbones.reparameterize(model, verify=False).state_dict()
    with pytest.raises(CheckpointError, match=r"missing \(\d+\)"):
        backbones.load_checkpoint(model, merged)


def test_pixels_are_not_normalized():
    cfg = backbones.create_model("affnet_et", device="meta").pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types_agree_with_float64(dtype):
    golden, model, _ = golden_model("affnet_et@192x256")
    x = golden.input_tensor()[:, :, :96, :128]
    expected = model(x)
    found = model.to(dtype)(x.to(dtype)).double()
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
