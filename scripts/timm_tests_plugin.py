"""A pytest plugin that points timm's model tests at our models; see run_timm_tests.py."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import timm
from tiers import by_size
from timm.models import split_model_name_tag

import backbones
from backbones.registry import registry
from backbones.skeleton import StagedBackbone

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


OURS = {
    registry.variants[choice.values[0]].timm_name or choice.values[0]
    for choice in by_size()  # what our own tests take by default
    if os.environ.get("BACKBONES_TIMM_TESTS_ALL") or not choice.marks
}


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
