"""Other libraries train one step on our backbones, by the doors that they have for timm's."""

from __future__ import annotations

import pytest
import torch
from tiers import smallest_of_each_family
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import backbones
from backbones.registry import registry

FAMILIES = pytest.mark.parametrize("name", smallest_of_each_family())


def timm_name(name: str) -> str:
    return registry.variants[name].timm_name or name


def step_and_check(model: nn.Module, loss: torch.Tensor) -> None:
    """One optimizer step changes the model and leaves every value finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = next(model.parameters()).detach().clone()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert not torch.equal(next(model.parameters()), before)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@FAMILIES
def test_segmentation_models_pytorch(name):
    import segmentation_models_pytorch as smp

    encoder = f"tu-{timm_name(name)}"
    reductions = backbones.create_model(name, device="meta").feature_info
    if reductions[0]["reduction"] >= 8:  # its decoders need a map of stride 4
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            smp.Unet(encoder, encoder_weights=None, classes=2)(torch.randn(2, 3, 64, 64))
        return
    model = smp.Unet(encoder, encoder_weights=None, classes=2)
    output = model(torch.randn(2, 3, 64, 64))
    assert output.shape == (2, 2, 64, 64)
    step_and_check(model, output.square().mean())


class Pyramid(nn.Module):
    """The last three maps of a backbone, through a feature pyramid."""

    def __init__(self, name: str, channels: int = 32) -> None:
        super().__init__()
        self.body = backbones.create_model(name, features_only=True, out_indices=(1, 2, 3))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels)
        self.out_channels = channels

    def forward(self, x):
        return self.fpn({str(i): map_ for i, map_ in enumerate(self.body(x))})


@FAMILIES
def test_torchvision_detection(name):
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    model = RetinaNet(
        Pyramid(name), num_classes=3, anchor_generator=anchors, min_size=128, max_size=160
    )
    images = [torch.rand(3, 128, 160), torch.rand(3, 128, 128)]
    boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}] * 2
    step_and_check(model, sum(model(images, targets).values()))
    with torch.no_grad():
        found = model.eval()(images)
    assert len(found) == 2
    assert found[0]["boxes"].shape[-1] == 4


@FAMILIES
def test_transformers_timm_backbone(name):
    import transformers

    config = transformers.TimmBackboneConfig(
        backbone=timm_name(name), use_pretrained_backbone=False, out_indices=(1, 2, 3)
    )
    model = transformers.TimmBackbone(config)
    maps = model(torch.randn(2, 3, 128, 128)).feature_maps
    assert [m.shape[1] for m in maps] == model.channels
    step_and_check(model, sum(m.square().mean() for m in maps))
