"""Quantization-aware training: a model that rounds as its int8 file will, by NNCF."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from backbones.engines import equalize
from backbones.errors import UnsupportedError
from backbones.optional import optional_import, quiet_nncf
from backbones.reparameterization import reparameterize
from backbones.skeleton import StagedBackbone

__all__ = ["deploy_form", "rounding_twin", "weights_of_twin"]

BATCHES = 8  # that the ranges of values are of
LAYERS = "conv1d conv2d linear matmul mm bmm baddbmm scaled_dot_product_attention".split()
# As in files, rounded values may pass through what only moves or chooses them, and all else is
# computed in float32.
MOVES = (
    "reshape view transpose permute flatten unflatten squeeze unsqueeze cat split chunk unbind"
    " __getitem__ narrow expand contiguous pad roll relu relu_ max_pool2d"
).split()
_HOOKS = "__nncf_hooks."


def deploy_form(model: nn.Module) -> nn.Module:
    """Return the re-parameterized form of a model, which may be trained: the one that int8 files
    compute. UnsupportedError for models of timm that have none."""
    merged = reparameterize(model.eval())
    if not isinstance(merged, StagedBackbone):
        raise UnsupportedError(
            f"qat trains the re-parameterized form, and {type(model).__name__} is a model of timm"
            " that this package has no such form of"
        )
    merged.deploy_trainable = True
    return merged


def rounding_twin(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Return a copy of a re-parameterized model that rounds what layers read to 256 values.

    First the model's channels are scaled as for a file, in place. Weights have a scale for each
    channel, activations a range for each value. Both are found on the first batches (B, C, H, W)
    and stay; gradients pass through the rounding.

    Raises:
        MissingDependencyError: NNCF is not installed.
    """
    images = list(itertools.islice(batches, BATCHES))
    equalize(model.eval(), images, norms=False)
    twin = copy.deepcopy(model)
    with quiet_nncf() as nncf, torch.no_grad():
        exact = {*_functions(copy.deepcopy(twin), images[0])}.difference(LAYERS, MOVES)
        twin = nncf.quantize(
            twin,
            nncf.Dataset(images),
            subset_size=len(images),
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(types=sorted(exact), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.DISABLE, disable_bias_correction=True
            ),
        )
        for name, value in twin.named_parameters():
            if name.startswith(_HOOKS):
                value.requires_grad_(False)
        twin(images[0])  # the first call compiles what rounds, with many words
    return twin


def weights_of_twin(twin: nn.Module) -> dict[str, Any]:
    """Return the state of the model that a twin is of."""
    state = twin.state_dict().items()
    return {name: value for name, value in state if not name.startswith(_HOOKS)}


def _functions(model: nn.Module, images: Tensor) -> Iterator[str]:
    """Yield the names of the functions of PyTorch that a model calls."""
    graph = optional_import("nncf.torch.function_hook", "openvino").build_graph(model, images)
    for _, facts in graph.nodes(data=True):
        if name := getattr(facts["meta"], "func_name", None):
            yield name
