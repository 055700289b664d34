"""What is particular to AttNet: kernels from strips of the map, parts that a checkpoint decides."""

from __future__ import annotations

import logging

import pytest
import torch
from golden import FOLDER, Golden, fill
from randomized import randomize

import backbones
from backbones.errors import CheckpointError, InputSizeError
from backbones.families.attnet import AttentiveConv, RmsNorm2d, strip_means
from backbones.reparameterization import relative_difference

PARAMETERS = {
    "attnet_xxs": 2853556,
    "attnet_xs": 5554902,
    "attnet_s": 7681316,
    "attnet_t1": 13714900,
    "attnet_t2": 27010782,
    "attnet_t3": 49175682,
    "attnet_t4": 87320214,
}
SMALL = {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 24], "num_classes": 5}
# What the authors' comments on parameter counts suggest for released files.
WITH_NORM = {"mlp_norm": True}
WITH_BOTH = {"mlp_norm": True, "ls_init_value": 1e-6}
FORMS = [{}, WITH_NORM, {"ls_init_value": 1e-6}, WITH_BOTH]


def small(name="attnet_xxs", seed=0, **arguments):
    model = backbones.create_model(name, dtype=torch.float64, **SMALL, **arguments)
    return randomize(model, seed).eval()


def forms(model):
    """Whether the blocks have norms in their MLPs and layer scales."""
    names = [name for name, _ in model.named_parameters()]
    return tuple(any(n.endswith(end) for n in names) for end in ("mlp.norm.weight", "gamma1"))


def images(height=40, width=64):
    return fill("input", (2, 3, height, width))


# What is built.


def test_parameter_counts():
    assert set(PARAMETERS) == set(backbones.list_models(family="attnet"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize(
    ("name", "millions"), [("attnet_xxs", 2.86), ("attnet_xs", 5.56), ("attnet_s", 7.69)]
)
def test_with_norms_small_models_have_as_many_as_the_authors_state(name, millions):
    model = backbones.create_model(name, device="meta", mlp_norm=True)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


# The kernels.


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (2, 3), (1, 1), (14, 11)])
def test_strips_are_rows_of_positions_on_every_path(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    flat, count = x.flatten(2), size[0] * size[1]
    runs = [flat[..., i * count // 9 : -(-(i + 1) * count // 9)].mean(-1) for i in range(9)]
    expected = torch.stack(runs, -1)
    assert torch.allclose(strip_means(x, 9), expected, atol=1e-13)
    torch.compiler.reset()
    recorded = torch.compile(strip_means, backend="eager", fullgraph=True)
    assert torch.allclose(recorded(x, 9), expected, atol=1e-13)


def test_strips_are_exported_for_any_size():
    model = small()
    sides = {n: torch.export.Dim(name, min=2, max=20) for n, name in ((2, "h"), (3, "w"))}
    shapes = {"x": {axis: 32 * side for axis, side in sides.items()}}
    x = images(64, 96)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    for other in (x, images(96, 64), images(128, 160)):
        assert relative_difference(model(other), program.module()(other)) < 1e-12


def test_sums_over_strips_do_not_overflow_in_half_precision():
    x = torch.full((1, 1, 64, 64), 1000.0, dtype=torch.float16)
    torch.compiler.reset()
    for function in (strip_means, torch.compile(strip_means, backend="eager")):
        assert torch.equal(function(x, 9), torch.full((1, 1, 9), 1000.0, dtype=torch.float16))


def test_half_of_each_kernels_mean_is_taken_off_at_first():
    mixer = AttentiveConv(4).double()
    assert not mixer.difference.any()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    kernels = mixer.kernels(x)
    mixer.difference.data.fill_(-1000.0)
    whole = mixer.kernels(x)
    expected = whole - 0.5 * whole.mean((2, 3), keepdim=True)
    assert torch.allclose(kernels, expected, atol=1e-14)


def test_squares_of_a_product_do_not_overflow_in_half_precision():
    norm = RmsNorm2d(4)
    x = torch.full((1, 4, 2, 2), 1000.0)
    assert torch.allclose(norm.half()(x.half()).float(), norm.float()(x), rtol=1e-3)


# A model follows its checkpoint.


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("own", FORMS, ids=str)
@pytest.mark.parametrize("theirs", FORMS, ids=str)
def test_a_model_has_the_parts_that_its_checkpoint_has(own, theirs, deploy, caplog):
    source = small(**theirs)
    model = small(**own, seed=1)
    if deploy:
        model = backbones.reparameterize(model, verify=False)
    with caplog.at_level(logging.WARNING, logger="backbones"):
        report = backbones.load_checkpoint(model, source.state_dict())
    assert relative_difference(source(images()), model(images())) < 1e-10
    assert deploy or forms(model) == forms(source)
    same = model.state_dict().keys() == small(**own, deploy=deploy).state_dict().keys()
    assert bool(report.followed) == bool(caplog.records) == (own != theirs)
    assert report.assumed == ()
    if own != theirs:
        assert deploy or not same
        assert all(told in str(report) for told in report.followed)
        assert all(told in caplog.text for told in report.followed)
    # What it has become is known to all that ask.
    assert model.mlp_norm == model.arguments["mlp_norm"] == theirs.get("mlp_norm", False)
    assert model.config["arguments"]["mlp_norm"] == model.mlp_norm
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def released(with_norms, with_scales):
    """A file of XXS by the authors' names, with the parts that it may have."""
    golden = Golden(FOLDER / "attnet_xxs@32x32.json.gz")
    tensors = golden.checkpoint()
    for key in list(tensors):
        block, _, part = key.rpartition(".channel_mixer.")
        if with_norms and part == "dwconv.bias":
            name = f"{block}.channel_mixer.norm_layer.weight"
            tensors[name] = fill(name, tuple(tensors[key].shape))
        if with_scales and part == "fc2.bias":
            for name in (f"{block}.layer_scale_1.gamma", f"{block}.layer_scale_2.gamma"):
                tensors[name] = fill(name, tuple(tensors[key].shape))
    return tensors


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("with_scales", [False, True])
def test_files_of_the_authors_with_other_parts(with_norms, with_scales, tmp_path):
    tensors = released(with_norms, with_scales)
    path = tmp_path / "AttNet_XXS_299_78.0.pth"
    torch.save({"model": tensors, "epoch": 299}, path)
    arguments = {"mlp_norm": with_norms, "ls_init_value": 1e-6 if with_scales else None}
    expected = backbones.create_model("attnet_xxs", dtype=torch.float64, **arguments).eval()
    report = backbones.load_checkpoint(expected, tensors)
    assert report.layout == "authors" and not report.followed
    x = images(32, 64)
    read = backbones.load_model(path, "attnet_xxs", dtype=torch.float64)
    merged = backbones.create_model(
        "attnet_xxs", checkpoint_path=path, deploy=True, dtype=torch.float64
    )
    for model in (read, merged):
        assert relative_difference(expected(x), model(x)) < 1e-10
    features = backbones.create_model("attnet_xxs", features_only=True, out_indices=(0, 2))
    backbones.load_checkpoint(features.double().eval(), path)
    maps = expected.forward_intermediates(x, indices=(0, 2), intermediates_only=True)
    for found, wanted in zip(features(x), maps, strict=True):
        assert relative_difference(wanted, found) < 1e-12
    again = backbones.save_checkpoint(read, tmp_path / "mine.safetensors")
    assert relative_difference(expected(x), backbones.load_model(again).double()(x)) < 1e-5


def test_a_file_that_does_not_fit_changes_no_part():
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for change in (lambda t: t.pop("head.fc.bias"), lambda t: t["head.fc.bias"].fill_(torch.nan)):
        tensors = small(**WITH_BOTH, seed=1).state_dict()
        change(tensors)
        with pytest.raises(CheckpointError, match=r"head\.fc\.bias"):
            backbones.load_checkpoint(model, tensors)
        assert forms(model) == (False, False) and not model.mlp_norm
        assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())


def test_a_part_in_some_blocks_only_is_refused():
    tensors = small(**WITH_NORM).state_dict()
    del tensors["stages.2.blocks.0.mlp.norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing \(1\).*2\.blocks\.0\.mlp\.norm"):
        backbones.load_checkpoint(small(), tensors)


def test_the_merged_form_shows_no_norm(tmp_path):
    """Its weights are those of a model without: what the file says decides, or is asked for."""
    merged = backbones.reparameterize(small(**WITH_NORM), verify=False)
    other = backbones.reparameterize(small(), verify=False)
    assert merged.state_dict().keys() == other.state_dict().keys()
    path = backbones.save_checkpoint(merged, tmp_path / "merged.safetensors")
    with pytest.raises(CheckpointError, match="create the model with mlp_norm=True"):
        backbones.load_checkpoint(other, path)
    assert (
        relative_difference(
            merged(images()), backbones.load_model(path, dtype=torch.float64)(images())
        )
        < 1e-10
    )
    assert backbones.load_checkpoint(other, merged.state_dict()).assumed == ("mlp_norm=False",)
    with pytest.raises(CheckpointError, match="deploy=True"):
        backbones.load_checkpoint(small(**WITH_NORM), path)


def test_bad_input_is_refused():
    with pytest.raises(InputSizeError, match="at least 32"):
        small()(images(31, 64))
    file = Golden(FOLDER / "attnet_xxs.json.gz").checkpoint()
    with pytest.raises(CheckpointError, match="create the variant"):
        backbones.load_checkpoint(backbones.create_model("attnet_xs"), file)
    merged = backbones.reparameterize(small(), verify=False).state_dict()
    with pytest.raises(CheckpointError, match=r"missing \(\d+\)"):
        backbones.load_checkpoint(small(), merged)
