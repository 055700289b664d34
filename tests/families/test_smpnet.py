"""What is particular to SMPNet: its points, their radii in training, its files."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, Golden, assert_feature, fill
from randomized import randomize
from torch import nn

import backbones
from backbones.errors import CheckpointError, ConfigError
from backbones.families.smpnet import kernel_from_points
from backbones.train.trainer import Trainer

PARAMETERS = {"smpnet_tiny": (26705248, 28747336), "smpnet_base": (79546520, 85386344)}
SMALL = {"depths": [1, 2, 1, 1], "dims": [8, 16, 24, 32], "num_classes": 5}


def small(**arguments):
    arguments = {"kernel_sizes": [7, 5, 5, 5], **SMALL, **arguments}
    return randomize(backbones.create_model("smpnet_tiny", **arguments)).eval()


def points(count=20):
    radius = torch.rand(count, dtype=torch.float64) + 0.05
    radius[:2] = torch.tensor([1e-3, 1.0])
    weight = torch.randn(3, count, dtype=torch.float64)
    return weight, torch.randn(count, 2, dtype=torch.float64), radius


def test_parameter_counts():
    assert set(PARAMETERS) == set(backbones.list_models(family="smpnet"))
    for name, counts in PARAMETERS.items():
        for deploy, count in enumerate(counts):
            model = backbones.create_model(name, device="meta")
            model = backbones.reparameterize(model.eval(), verify=False) if deploy else model
            assert sum(p.numel() for p in model.parameters()) == count, (name, deploy)


@pytest.mark.parametrize("size", [3, 13])
def test_kernel_is_the_sum_of_its_tents(size):
    weight, positions, radius = points()
    expected = torch.zeros(3, 1, size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            x, y = -1 + 2 * j / (size - 1), 1 - 2 * i / (size - 1)
            cell = torch.tensor([x, y], dtype=torch.float64)
            distance = (positions - cell).abs().sum(1)
            expected[:, 0, i, j] = weight @ (1 - distance / radius).clamp(min=0)
    torch.testing.assert_close(kernel_from_points(weight, positions, radius, size), expected)


def test_a_point_to_the_right_and_above_and_one_that_reaches_in():
    positions = torch.tensor([[1.0, 0.5], [-1.5, 0.0]])
    kernel = kernel_from_points(torch.ones(1, 2), positions, torch.tensor([0.1, 1.0]), 5)
    assert kernel[0, 0].nonzero().tolist() == [[1, 4], [2, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_types_round_only_the_finished_kernel(dtype):
    half = [one.to(dtype) for one in points()]
    expected = kernel_from_points(*(one.float() for one in half), 31).to(dtype)
    torch.testing.assert_close(kernel_from_points(*half, 31), expected, rtol=0, atol=0)


def test_kernel_gradients():
    inputs = [one.requires_grad_() for one in points(6)]
    assert torch.autograd.gradcheck(lambda *all: kernel_from_points(*all, 5), inputs)


@torch.no_grad()
def test_dense_maps_are_batch_norms_of_the_stages():
    golden = Golden(FOLDER / "smpnet_tiny_tame.json.gz")
    model = backbones.create_model("smpnet_tiny", dtype=torch.float64).eval()
    backbones.load_checkpoint(model, golden.checkpoint())
    maps = model.forward_intermediates(golden.input_tensor(), intermediates_only=True)
    extra = {k: fill(k, tuple(shape)) for k, shape in golden.content["dense_extra_keys"].items()}
    dense = [f for f in golden.features if f["name"].startswith("dense.")]
    names = ("running_mean", "running_var", "weight", "bias")
    for i, (map_, expected) in enumerate(zip(maps, dense, strict=True)):
        norm = [extra[f"stages.{i}.norm.{name}"] for name in names]
        assert_feature(F.batch_norm(map_, *norm), expected, expected["name"])


# Training.


def test_radii_are_clamped_in_place_so_that_cached_kernels_follow():
    model = small()
    conv = model.stages[0].blocks[0].mixer.conv_dw.large.conv
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        conv.radius[:3] = torch.tensor([-0.5, 1e-5, 7.0])
        before = model(x)
        model.clamp_parameters()
        assert conv.radius[:3].tolist() == pytest.approx([1e-3, 1e-3, 1.0])
        twin = copy.deepcopy(model)
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=0)
        assert not torch.allclose(model(x), before)


def test_the_trainer_clamps_what_optimizer_steps_carry_too_far(monkeypatch):
    """Also the positions of ConvNeXt-DCLS."""
    model = small().train()
    dcls = backbones.create_model("convnext_dcls_tiny", **SMALL).train()
    both = nn.ModuleList([model, dcls])
    optimizer = torch.optim.SGD(both.parameters(), lr=0.0)
    conv = model.stages[0].blocks[0].mixer.conv_dw.large.conv

    def far():
        with torch.no_grad():
            conv.radius.fill_(-1.0)
            dcls.stages[0].positions.fill_(100.0)

    monkeypatch.setattr(optimizer, "step", far)
    task = argparse.Namespace(get_trainable_module=lambda: both, update_ema=lambda step: None)
    config = argparse.Namespace(grad_accum_steps=1, dist_bn="", sync_bn=False, clip_grad=None)
    config.clip_mode = "norm"
    group = argparse.Namespace(distributed=False, size=1, mean=lambda value: value)
    batches = [(torch.zeros(1), torch.zeros(1))]
    trainer = Trainer(config, group, task, optimizer, None, batches, None)
    loss = model(torch.randn(2, 3, 64, 64)).square().mean()
    monkeypatch.setattr(trainer, "_forward", lambda images, targets: loss)
    trainer.train(0)
    assert conv.radius.unique().tolist() == pytest.approx([1e-3])
    assert dcls.stages[0].positions.unique().tolist() == [8.0]


def test_positions_and_radii_have_no_weight_decay():
    model = small()
    spared = model.no_weight_decay()
    assert sum(name.endswith(".positions") for name in spared) == 5
    assert all(p.ndim == 1 for name, p in model.named_parameters() if name.endswith(".radius"))


# The head, arguments and files.


@torch.no_grad()
@pytest.mark.parametrize(("pool", "folds"), [("avg", True), ("", True), ("max", False)])
def test_the_last_norm_is_folded_across_averages_only(pool, folds):
    model = small(global_pool=pool).double()
    merged = backbones.reparameterize(model, verify=False)
    assert isinstance(merged.head.norm, nn.Identity) == folds
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [[31, 28, 27, 13], 3])
def test_impossible_kernels_are_refused(sizes):
    with pytest.raises(ConfigError, match="must be odd and at least 5"):
        backbones.create_model("smpnet_tiny", kernel_sizes=sizes, device="meta")


@torch.no_grad()
def test_the_average_in_a_checkpoint_of_training_is_loaded(tmp_path):
    shapes = Golden(FOLDER / "smpnet_tiny_tame.json.gz").state_dict
    weights, average = ({k: torch.full(v["shape"], at) for k, v in shapes.items()} for at in (1, 2))
    for entries in (weights, average):
        for key in [key for key in entries if not key.endswith("num_batches_tracked")]:
            entries[key] = entries[key].float()
    content = {"epoch": 299, "arch": "SMPConv_T", "state_dict": weights, "state_dict_ema": average}
    path = tmp_path / "model_best.pth.tar"
    torch.save({**content, "args": argparse.Namespace(lr=4e-3)}, path)
    model = backbones.create_model("smpnet_tiny")
    report = backbones.load_checkpoint(model, path)
    assert (report.layout, report.wrapper) == ("authors", "state_dict_ema")
    assert all((value == 2).all() for value in model.state_dict().values())


def test_files_of_other_kernels_are_refused():
    model = small()
    with pytest.raises(CheckpointError, match="create the variant that the file was made for"):
        backbones.load_checkpoint(small(kernel_sizes=[9, 5, 5, 5]), model.state_dict())
