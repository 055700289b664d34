"""A pytest plugin that points timm's model tests at our models; see run_timm_tests.py."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import timm
from timm.models import split_model_name_tag

import backbones
from backbones.registry import registry
from backbones.skeleton import StagedBackbone

LIMIT = 10e6  # parameters, of other variants than the smallest of their family
# timm's tests for these need TorchScript or a download.
LEFT_OUT = ("torchscript", "pretrained", "inference")
MUST_RUN = (
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
)

_list_models, _create_model = timm.list_models, timm.create_model


def _parameters(name: str) -> int:
    variant = registry.find(name)
    assert variant is not None
    model = registry.classes[variant.family](**variant.arguments, device="meta")
    return sum(p.numel() for p in model.parameters())


def _names() -> list[str]:
    """Return the variants to test, as timm knows them."""
    sizes = {name: _parameters(name) for name in registry.variants}
    families = {variant.family for variant in registry.variants.values()}
    chosen = {
        min((name for name in sizes if registry.variants[name].family == family), key=sizes.get)
        for family in families
    }
    if os.environ.get("BACKBONES_TIMM_TESTS_ALL"):
        chosen = set(sizes)
    chosen.update(name for name, size in sizes.items() if size <= LIMIT)
    return [registry.variants[name].timm_name or name for name in chosen]


OURS = {*_names()}


def list_models(*args, module="", **kwargs):
    names = _list_models(*args, module="backbones", **kwargs)
    return [name for name in names if split_model_name_tag(name)[0] in OURS]


def create_model(name, *args, **kwargs):
    model = _create_model(name, *args, **kwargs)
    body = getattr(model, "model", model)
    assert isinstance(body, StagedBackbone), f"{name} is a {type(body)}, not ours"
    return model


timm.list_models = list_models
timm.create_model = create_model


def pytest_configure(config):
    for (
        marker
    ) in "base cfg cfg_nonstd torchscript features fxforward fxbackward forward backward".split():
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
        ours = isinstance(name, str) and split_model_name_tag(name)[0] in OURS
        chosen = ours and not any(word in item.name.partition("[")[0] for word in LEFT_OUT)
        (kept if chosen else dropped).append(item)
    counts = Counter(item.originalname for item in kept)
    for test in MUST_RUN:
        if counts[test] < len(OURS):
            raise pytest.UsageError(f"{test} covers {counts[test]} of our {len(OURS)} names")
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_report_header(config):
    return (
        f"timm {timm.__version__} tests over {len(OURS)} names of backbones {backbones.__version__}"
    )
