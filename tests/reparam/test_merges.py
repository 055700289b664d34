"""One row for every merge of every family: how often it is made, and that it is made at all.

A row names a rule, the places it applies to and how many they are. Skipping the rule at these
places must change the model: its modules, entries, numbers or operators, or (for merges of values
alone) its outputs. A merge that got lost, or that was never made, fails its row.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from types import ModuleType
from typing import Any

import pytest
import torch
from randomized import randomize
from tiers import families_in_manifest
from torch import nn
from torch.overrides import TorchFunctionMode

import backbones
from backbones import merge
from backbones.registry import registry


@dataclass(frozen=True)
class Row:
    """A merge: `target` (module:attribute) is made `count` times where `where` matches.

    The place is the name, in the model, of any of the arguments. `skipped` tells what a skipped
    call returns: the index of the argument that stays in place. `depths` makes a large model small.
    """

    model: str
    what: str
    target: str
    where: str
    count: int
    skipped: int | None = None
    depths: tuple[int, ...] | None = None


Few = partial(Row, depths=(1, 1, 2, 1))

NEXT, PREVIOUS = "backbones.merge:norm_into_next", "backbones.merge:norm_into_previous"
SCALE, FACTOR = "backbones.merge:scale_into_previous", "backbones.merge:factor_into_outputs"
SHIFT_NEXT, SHIFT = "backbones.merge:shift_into_next", "backbones.merge:shift_into_previous"
KEYS, VALUES = "backbones.merge:drop_softmax_bias", "backbones.merge:uniform_bias_into_next"
OF_PARAMETERS = "backbones.merge:function_into_parameter"
MAP_NORM, STACK = "backbones.merge:map_norm_into_next", "backbones.merge:stack_linear_layers"
SHARES = "backbones.families.spanet:SpectralMixer.reparameterize"
CENTER = "backbones.merge:center_outputs"
POINTS = "backbones.families.smpnet:PointConv.merged"
BRANCHES = "backbones.layers.branched_conv:BranchedConv.merged"
IDENTITY = "backbones.layers.residual_conv:ResidualConv.merged"

ROWS = [
    # AFFNet
    Row("affnet_et", "norms after convolutions", PREVIOUS, r"", 56, 1),
    Row("affnet_et", "norm into the projection", NEXT, r"^stages\.\d\.norm$", 3, 0),
    Row(
        "affnet_et",
        "projection into the fusion",
        "backbones.merge:linear_into_next",
        r"proj\.conv$",
        3,
        0,
    ),
    Row("affnet_et", "complex numbers into real convolutions", OF_PARAMETERS, r"", 36, 0),
    # ConvNeXt
    Row("convnext_atto", "block norm into fc1", NEXT, r"blocks\.\d+\.norm$", 12, 0),
    Row("convnext_atto", "layer scale into fc2", SCALE, r"mlp\.fc2$", 12),
    Row("convnext_atto", "downsampling norm into its 2x2", NEXT, r"downsample\.0$", 3, 0),
    Row("convnext_atto", "final norm into the head", NEXT, r"head\.norm$", 1, 0),
    Row("convnextv2_atto", "offset of GRN into fc2", SHIFT_NEXT, r"", 12),
    Row(
        "convnext_tiny_k3_par1_4",
        "partial into a full kernel",
        "backbones.families.convnext.model:PartialConv.merged",
        r"conv_dw$",
        18,
        0,
    ),
    Row(
        "convnext_dcls_tiny",
        "points into a dense kernel",
        "backbones.families.convnext.dcls:kernel_from_points",
        r"",
        18,
    ),
    # AttNet
    Row("attnet_t1", "norms of stem and downsampling", PREVIOUS, r"conv$", 5, 1),
    Row("attnet_t1", "norm1 into both projections", NEXT, r"norm1$", 20, 0),
    Row("attnet_t1", "norm2 into fc1", NEXT, r"norm2$", 20, 0),
    Row("attnet_t1", "root mean square norm into fc2", NEXT, r"mlp\.norm$", 20, 0),
    Row("attnet_t1", "final norm into the head", NEXT, r"head\.norm$", 1, 0),
    Row("attnet_t1", "layer scales", SCALE, r"(proj|fc2)$", 40),
    Row(
        "attnet_t1",
        "mean of the kernels",
        "backbones.merge:mean_as_output",
        r"kernel_gen$",
        20,
        0,
    ),
    Row(
        "attnet_t1",
        "share of the mean",
        "backbones.merge:function_into_parameter",
        r"",
        20,
        0,
    ),
    # InceptionNeXt
    Row("inception_next_atto", "stem norm", PREVIOUS, r"stem\.0$", 1, 1),
    Row("inception_next_atto", "downsampling norm into its 2x2", NEXT, r"downsample\.0$", 3, 0),
    Row("inception_next_atto", "block norm into fc1", NEXT, r"blocks\.\d+\.norm$", 12, 0),
    Row("inception_next_atto", "layer scale into fc2", SCALE, r"mlp\.fc2$", 12),
    Row("inception_next_atto", "head norm into fc2", NEXT, r"head\.norm$", 1, 0),
    # UniRepLKNet
    Row("unireplknet_a", "dilated branches", BRANCHES, r"conv_dw$", 10, 0),
    Row("unireplknet_a", "block norm into the kernel", PREVIOUS, r"blocks\.\d+\.norm$", 12, 1),
    Row("unireplknet_a", "offset of GRN into fc2", SHIFT_NEXT, r"", 12),
    Row("unireplknet_a", "norm after fc2", PREVIOUS, r"mlp\.fc2$", 12, 1),
    Row("unireplknet_a", "layer scale into fc2", SCALE, r"mlp\.fc2$", 12),
    Row("unireplknet_a", "final norm into the head", NEXT, r"head\.norm$", 1, 0),
    Row("unireplknet_a", "stem and downsampling centered", CENTER, r"(stem|downsample)\.\d$", 5),
    # HorNet
    Row("hornet_tiny_7x7", "norm1 into proj_in", NEXT, r"norm1$", 25, 0),
    Row("hornet_tiny_7x7", "norm2 into fc1", NEXT, r"norm2$", 25, 0),
    Row("hornet_tiny_7x7", "downsampling norm into its 2x2", NEXT, r"downsample\.0$", 3, 0),
    Row("hornet_tiny_7x7", "final norm into the head", NEXT, r"head\.norm$", 1, 0),
    Row("hornet_tiny_7x7", "1/3 into the 7x7", FACTOR, r"mixer$", 25, 1),
    Row(
        "hornet_tiny_gf",
        "1/3 into the norm after the filter",
        "backbones.merge:factor_into_norm",
        r"post_norm$",
        20,
        1,
    ),
    Row("hornet_tiny_7x7", "layer scale into proj_out", SCALE, r"proj_out$", 25),
    Row("hornet_tiny_7x7", "layer scale into fc2", SCALE, r"mlp\.fc2$", 25),
    # CPUBone
    Row("cpubone_b0", "norms after convolutions", PREVIOUS, r"conv(\.1)?$", 20, 1),
    Row("cpubone_b0", "group norm into the MLP", NEXT, r"main\.0$", 7, 0),
    Row("cpubone_b0", "norm of the reduction into qkv", NEXT, r"conv_proj\.norm$", 7, 0),
    Row("cpubone_b0", "scale into the queries", FACTOR, r"pwise$", 7, 1),
    Row("cpubone_b0", "bias of keys", KEYS, r"pwise$", 7),
    Row("cpubone_b0", "bias of values", VALUES, r"pwise$", 7),
    # LSNet
    Row("lsnet_t", "norms after convolutions", PREVIOUS, r"conv$", 91, 1),
    Row("lsnet_t", "3x3, 1x1 and identity", BRANCHES, r"mixer$", 10, 0),
    Row("lsnet_t", "norm of the 7x7 into the next 1x1", NEXT, r"lkp\.conv_dw\.norm$", 5, 0),
    Row("lsnet_t", "norm of the depthwise downsampling", NEXT, r"downsample\.0\.norm$", 3, 0),
    Row("lsnet_t", "norm into the head", NEXT, r"head\.norm$", 1, 0),
    Row("lsnet_t", "scale into the queries", FACTOR, r"q_dw\.conv$", 5, 1),
    Row("lsnet_t", "bias of keys", KEYS, r"qkv\.conv$", 5),
    Row(
        "lsnet_t_distill",
        "two heads into one",
        "backbones.merge:average_linear_layers",
        r"head\.fc$",
        1,
    ),
    # OverLoCK
    Row("overlock_xt", "norms after convolutions", PREVIOUS, r"", 178, 1),
    Row("overlock_xt", "dilated branches", BRANCHES, r"", 17, 0),
    Row("overlock_xt", "norm before proj", NEXT, r"proj\.norm$", 8, 0),
    Row("overlock_xt", "norm2 into fc1", NEXT, r"norm2$", 8, 0),
    Row("overlock_xt", "residual 3x3", IDENTITY, r"", 42, 0),
    Row("overlock_xt", "offset of GRN into fc2", SHIFT_NEXT, r"", 17),
    Row("overlock_xt", "offsets of layer scales", SHIFT, r"", 28),
    Row("overlock_xt", "context scales", SCALE, r"(fc2|context\.conv)$", 7),
    Row("overlock_xt", "offsets of context scales", "backbones.merge:shift_together", r"", 7),
    Row("overlock_xt", "scale into the queries", FACTOR, r"query\.conv$", 8, 1),
    # SpaRTAN
    Row("spartan_t", "norms after convolutions", PREVIOUS, r"", 65, 1),
    Row(
        "spartan_t",
        "rotation into the 3x3",
        "backbones.merge:rotation_into_next",
        r"channel\.conv\.conv$",
        20,
        1,
    ),
    Row(
        "spartan_t",
        "theta and proj",
        "backbones.merge:stack_linear_layers",
        r"channel\.proj$",
        20,
        0,
    ),
    Row("spartan_t", "norm1 into proj_in", NEXT, r"norm1$", 20, 0),
    Row("spartan_t", "contrast", "backbones.merge:split_contrast", r"proj_in$", 20, 0),
    Row("spartan_t", "layer scales into proj_out", SCALE, r"proj_out$", 40),
    # SMPNet
    Row("smpnet_tiny", "norms after convolutions", PREVIOUS, r"", 94, 1),
    Row("smpnet_tiny", "norm into conv1", NEXT, r"mixer\.norm$", 14, 0),
    Row("smpnet_tiny", "norm into fc1", NEXT, r"mlp\.norm$", 14, 0),
    Row("smpnet_tiny", "points into a dense kernel", POINTS, r"large\.conv$", 14, 0),
    Row("smpnet_tiny", "5x5 into the large kernel", BRANCHES, r"conv_dw$", 14, 0),
    Row("smpnet_tiny", "norm before pooling into the head", MAP_NORM, r"head\.norm$", 1, 0),
    # SPANet
    Row("spanet_small", "norm1 into proj_in", NEXT, r"norm1$", 24, 0),
    Row("spanet_small", "norm2 into fc1", NEXT, r"norm2$", 24, 0),
    Row("spanet_small", "norm before pooling into the head", MAP_NORM, r"head\.norm$", 1, 0),
    Row("spanet_small", "shares of the context", SHARES, r"", 24),
    # MogaNet
    Row("moganet_xtiny", "stem and downsampling norms", PREVIOUS, r"(stem|sample)\.\d$", 5, 1),
    Row("moganet_xtiny", "norm1 into proj_1", NEXT, r"norm1$", 18, 0),
    Row("moganet_xtiny", "norm2 into fc1", NEXT, r"norm2$", 18, 0),
    Row("moganet_xtiny", "final norm into the head", NEXT, r"head\.norm$", 1, 0),
    Row("moganet_xtiny", "contrast", "backbones.merge:split_contrast", r"proj_1$", 18, 0),
    Row(
        "moganet_xtiny",
        "inner shortcut",
        "backbones.merge:norm_into_shortcut",
        r"norm1$",
        18,
    ),
    Row(
        "moganet_xtiny",
        "biases of the depthwise convolutions",
        "backbones.merge:biases_into_next",
        r"value\.proj$",
        18,
    ),
    Row(
        "moganet_xtiny",
        "contrast behind fc2",
        "backbones.merge:contrast_into_next",
        r"mlp\.fc2$",
        18,
    ),
    Row("moganet_xtiny", "fc2 and decompose", STACK, r"fc2$", 18, 0),
    Row("moganet_xtiny", "layer scales", SCALE, r"(proj_2|fc2)$", 36),
    # GLNet
    Few("glnet_4g", "stem and downsampling norms", PREVIOUS, r"(stem|sample)\.\d$", 5, 1),
    Few("glnet_4g", "identity into the positional 3x3", IDENTITY, r"pos_conv$", 5, 0),
    Few("glnet_4g", "identity into the 3x3 of the MLP", IDENTITY, r"mlp\.conv_dw$", 5, 0),
    Few("glnet_4g", "norm1 into qkv", NEXT, r"norm1$", 2, 0),
    Few("glnet_4g", "norm2 into fc1", NEXT, r"norm2$", 5, 0),
    Few("glnet_4g", "scale into the queries", FACTOR, r"qkv$", 5, 1),
    Few("glnet_4g", "bias of keys", KEYS, r"qkv$", 5),
    Few("glnet_4g", "bias of values", VALUES, r"qkv$", 5),
    Few("glnet_4g", "bias of dispatched slots into conv2", SHIFT, r"conv2$", 3),
    Few("glnet_4g", "bias of the 5x5 into conv2", SHIFT_NEXT, r"conv2$", 3),
    Few("glnet_4g", "norm before pooling into the head", MAP_NORM, r"head\.norm$", 1, 0),
    Few("glnet_4g_tklb", "norm into both classifiers", MAP_NORM, r"head\.norm$", 1, 0),
    Few("glnet_4g_tklb", "1/2 into the classifier of tokens", FACTOR, r"token_fc$", 1, 1),
    Few("glnet_stl", "norm of the stem", PREVIOUS, r"stem\.0$", 1, 1),
    Few("glnet_stl", "downsampling norm into its 2x2", NEXT, r"downsample\.0$", 3, 0),
    Few(
        "glnet_stl_paramslot",
        "scale and length of learned slots",
        "backbones.merge:scale_into_directions",
        r"",
        4,
    ),
    Few("glnet_16g", "layer scales", SCALE, r"(attn\.proj|conv2|mlp\.fc2)$", 13),
    # PatchConvNet
    Row("patchconvnet_s60", "block norm into conv_pw", NEXT, r"blocks\.\d+\.norm$", 60, 0),
    Row("patchconvnet_s60", "layer scale into conv_pwl", SCALE, r"conv_pwl$", 60),
    Row("patchconvnet_s60", "norm1 into q, k and v", NEXT, r"pool\.norm1$", 1, 0),
    Row("patchconvnet_s60", "scale into the query", FACTOR, r"pool\.q$", 1, 1),
    Row("patchconvnet_s60", "key of the token", "backbones.merge:norm_of_constant", r"", 1, 1),
    Row(
        "patchconvnet_s60",
        "constant query",
        "backbones.merge:constant_query_into_keys",
        r"pool\.k$",
        1,
    ),
    Row("patchconvnet_s60", "values", "backbones.merge:linear_into_next", r"pool\.v$", 1),
    Row("patchconvnet_s60", "bias into the token", "backbones.merge:shift_together", r"", 1),
    Row("patchconvnet_s60", "layer scales of the token", SCALE, r"(pool\.proj|mlp\.fc2)$", 2),
    Row("patchconvnet_s60", "norm2 into fc1", NEXT, r"pool\.norm2$", 1, 0),
    Row("patchconvnet_s60", "final norm into the head", NEXT, r"head\.norm$", 1, 0),
    Row("patchconvnet_s60_multi", "final norm into the head", NEXT, r"head\.norm$", 1, 0),
    Row(
        "patchconvnet_s60_multi",
        "constant queries",
        "backbones.merge:constant_query_into_keys",
        r"pool\.k$",
        1,
    ),
    Row("patchconvnet_s60_multi", "values", "backbones.merge:linear_into_next", r"pool\.v$", 1),
    # RedNet
    Row("rednet26", "norms after convolutions", PREVIOUS, r"conv$", 31, 1),
    Row("rednet26", "bias of conv2 into the shortcut's", SHIFT, r"downsample\.conv$", 4),
    # TransNeXt
    Row("transnext_micro", "norm1 into what reads the map", NEXT, r"norm1$", 21, 0),
    Row("transnext_micro", "norm2 into fc1", NEXT, r"norm2$", 21, 0),
    Row("transnext_micro", "norm of the pooled map", NEXT, r"attn\.norm$", 19, 0),
    Row("transnext_micro", "queries, keys and values", STACK, r"\.q$", 19, 0),
    Row("transnext_micro", "and what is pooled", STACK, r"\.sr$", 19, 0),
    Row("transnext_micro", "softplus of the temperature", OF_PARAMETERS, r"", 21, 0),
    Row("transnext_micro", "offset of biases of all positions", KEYS, r"cpb\.fc2$", 2),
    Row("transnext_micro", "bias of values of all positions", VALUES, r"qkv$", 2),
    Row("transnext_micro", "norm before pooling into the head", MAP_NORM, r"head\.norm$", 1, 0),
    # UniFormer
    Row("uniformer_xxs", "norms of the stem", PREVIOUS, r"stem\.\d$", 2, 1),
    Row("uniformer_xxs", "identity into the positional 3x3", IDENTITY, r"pos_conv$", 17, 0),
    Row("uniformer_xxs", "norm1 into conv1 or qkv", NEXT, r"norm1$", 17, 0),
    Row("uniformer_xxs", "norm2 into fc1", NEXT, r"norm2$", 17, 0),
    Row("uniformer_xxs", "bias of the 5x5 into conv2", SHIFT_NEXT, r"conv2$", 7),
    Row("uniformer_xxs", "scale into the queries", FACTOR, r"qkv$", 10, 1),
    Row("uniformer_xxs", "bias of keys", KEYS, r"qkv$", 10),
    Row("uniformer_xxs", "bias of values", VALUES, r"qkv$", 10),
    Row("uniformer_xxs", "norm before pooling into the head", MAP_NORM, r"head\.norm$", 1, 0),
    Row("uniformer_small_plus", "downsampling norms", PREVIOUS, r"(stem|sample)\.\d$", 5, 1),
    Row("uniformer_small_tl", "norm into both classifiers", MAP_NORM, r"head\.norm$", 1, 0),
    Row("uniformer_small_tl", "1/2 into the classifier of tokens", FACTOR, r"token_fc$", 1, 1),
    Row("uniformer_base_ls", "layer scales", SCALE, r"(attn\.proj|mlp\.fc2)$", 54),
]


class Calls(TorchFunctionMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=2)  # rows of one model follow each other; all of them take gigabytes
def _made(name: str, depths: tuple[int, ...] | None) -> nn.Module:
    fewer = {} if depths is None else {"depths": depths}
    return randomize(
        backbones.create_model(name, num_classes=5, dtype=torch.float64, **fewer)
    ).eval()


def make(name: str, depths: tuple[int, ...] | None = None) -> nn.Module:
    return copy.deepcopy(_made(name, depths))


@cache
def _measured(name: str, depths: tuple[int, ...] | None) -> tuple[Any, ...]:
    """What the deploy form measures, which is the same for all rows of a model."""
    return measure(backbones.reparameterize(make(name, depths), inplace=True, verify=False))


@torch.no_grad()
def measure(model: nn.Module) -> tuple[Any, ...]:
    """Modules, entries, numbers that are not zero, operators; and the outputs."""
    kinds = Counter(type(m).__name__ for m in model.modules() if not isinstance(m, nn.Identity))
    entries = sorted((k, tuple(v.shape)) for k, v in model.state_dict().items())
    numbers = sum(int(value.count_nonzero()) for value in model.state_dict().values())
    side = model.feature_info[-1]["reduction"]
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    with Calls() as calls:
        try:
            outputs = model(x)
        except (RuntimeError, TypeError, AttributeError) as error:  # a part is missing
            outputs = torch.full((1,), float("nan"))
            kinds[f"fails: {error}"] += 1
    scales = [getattr(module, "scale", None) for module in model.modules()]
    scales = [scale for scale in scales if not isinstance(scale, torch.Tensor)]  # an entry
    return kinds, entries, numbers, scales, calls.count, outputs


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    a, b = one[-1], other[-1]
    return one[:-1] == other[:-1] and bool(
        a.shape == b.shape and (a - b).abs().max() < 1e-8 * a.abs().max()
    )


def matches(row: Row, names: dict[int, str], args: tuple[Any, ...]) -> bool:
    return any(re.search(row.where, names.get(id(arg), "")) for arg in args)


def reparameterized(rows: Sequence[Row], skip: bool) -> tuple[Any, dict[Row, int]]:
    """Re-parameterize the model of the rows; return it, and how often each row's merge was made.

    If `skip`, the rules are skipped at the rows' places.
    """
    model = make(rows[0].model, rows[0].depths)
    alive = [*model.named_modules()]  # or else a new layer may get the number of one that went
    names = {id(module): name for name, module in alive if name}
    made = dict.fromkeys(rows, 0)

    def watched(original: Any, rows: list[Row]) -> Any:
        def rule(*args: Any, **options: Any) -> Any:
            before = Counter() if merge_counter is None else Counter(merge_counter)
            met = [row for row in rows if matches(row, names, args)]
            if skip and met:
                return None if met[0].skipped is None else args[met[0].skipped]
            result = original(*args, **options)
            changed = merge_counter is not None and Counter(merge_counter) != before
            for row in met:
                made[row] += changed or row.target.endswith("kernel_from_points")
            return result

        return rule

    with pytest.MonkeyPatch.context() as patch, merge.recorded() as merge_counter:
        for target in {row.target: None for row in rows}:
            owner, attribute = owner_of(target)
            original = getattr(owner, attribute)
            rule = watched(original, [row for row in rows if row.target == target])
            patch.setattr(owner, attribute, rule)
            if owner is merge:  # its own modules call each other's rules, not the package's
                for module in merge_modules():
                    if attribute in vars(module):
                        patch.setattr(module, attribute, rule)
        try:
            for _, child in model.named_children():
                walk(child)
        except (AttributeError, RuntimeError, TypeError):
            if not skip:
                raise
    return model, made


def owner_of(target: str) -> tuple[Any, str]:
    """Return the module or class that holds a rule, and the rule's name there."""
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, attribute


def merge_modules() -> list[ModuleType]:
    names = (info.name for info in pkgutil.iter_modules(merge.__path__, "backbones.merge."))
    return [importlib.import_module(name) for name in names]


def walk(module: nn.Module) -> None:
    if hasattr(module, "reparameterize"):
        module.reparameterize()
    for child in list(module.children()):
        walk(child)


@cache
def _made_merges(name: str, depths: tuple[int, ...] | None) -> dict[Row, int]:
    """How often the merges of a model's rows are made, all counted at once."""
    rows = [row for row in ROWS if (row.model, row.depths) == (name, depths)]
    return reparameterized(rows, skip=False)[1]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}: {row.what}")
def test_every_merge_is_made(row):
    assert _made_merges(row.model, row.depths)[row] == row.count
    skipped, _ = reparameterized([row], skip=True)
    assert not same(_measured(row.model, row.depths), measure(skipped))


@dataclass(frozen=True)
class LeftOut:
    """What looks like a merge and is none: `left` are entries that must still be there."""

    model: str
    what: str
    reason: str
    left: str
    count: int


ZEROS = "zeros around the padded input would have to be shifted too; scaling divides by a factor"
SHARED = (
    "channels share a kernel; through the layer before, a ReLU passes no negative factor and the"
    " kernels' own input would be divided by it, zero or not"
)
COSTS = "the merged form costs more operations than the parts"

LEFT_OUT = [
    LeftOut("affnet_et", "norm1 and norm2", "they are shortcuts, too", r"\.norm[12]\.(w|b)", 36),
    LeftOut("affnet_et", "shortcut of a filter into b2", "rounding grows", r"filter\.b2$", 9),
    LeftOut("affnet_et", "1x1 before a 1x1", "a stage's output", r"0\.blocks\.0\.conv_pwl.*w", 1),
    LeftOut("convnext_atto", "centered stem", "measured: not faster", r"stem\.1\.bias", 1),
    LeftOut("convnext_atto", "norm of the stem", "its output is the residual", r"stem\.1\.w", 1),
    LeftOut("convnext_tiny_k3", "3x3 kernels into 7x7", COSTS, r"conv_dw\.weight$", 18),
    LeftOut(
        "attnet_t1",
        "value_proj and proj",
        "kernels differ by image",
        r"mixer\.(value_)?proj\.w",
        40,
    ),
    LeftOut("attnet_t1", "bias of value_proj", ZEROS, r"value_proj\.bias$", 20),
    LeftOut("attnet_t1", "gate half of fc1 and its 3x3", COSTS, r"(fc1|conv_dw)\.weight$", 40),
    LeftOut("attnet_t1", "share of the mean", "it differs by channel", r"difference$", 20),
    LeftOut("inception_next_atto", "branches into 11x11", COSTS, r"dwconv_(hw|w|h)\.weight$", 36),
    LeftOut(
        "unireplknet_a", "norm of stem and downsampling", ZEROS, r"(stem|sample)\.\d\.bias", 10
    ),
    LeftOut("unireplknet_a", "SE and GRN factors", "they differ by image", r"(se\.|grn\.w)", 60),
    LeftOut("hornet_tiny_gf", "norm before the filter", ZEROS, r"pre_norm\.(weight|bias)$", 40),
    LeftOut("cpubone_b0", "group norm before the reduction", ZEROS, r"total\.0\.0\.main\.0\.", 14),
    LeftOut("cpubone_b0", "2x2 kernels into 3x3, or with qkv", COSTS, r"conv_proj.*weight$", 7),
    LeftOut("cpubone_b0", "norm of the head", "an activation follows", r"classifier\.norm", 2),
    LeftOut("lsnet_t", "norm after aggregation", "weights are shared", r"mixer\.norm\.", 25),
    LeftOut("lsnet_t", "depthwise and 1x1 downsampling", COSTS, r"downsample.*weight$", 6),
    LeftOut("lsnet_t", "gathered biases", "they depend on the size", r"attention_biases$", 5),
    LeftOut("overlock_xt", "norm before the large kernel", ZEROS, r"blocks\.\d+\.norm\.", 18),
    LeftOut("overlock_xt", "norm1 and GRN of the fusion", ZEROS, r"(norm1|fusion\.4)\.", 32),
    LeftOut("overlock_xt", "layer scale on the identity", "the branch has none", r"ls2?\.w", 13),
    LeftOut("spartan_t", "norm2", "it takes part in the argmax", r"norm2\.", 40),
    LeftOut("spartan_t", "two dilated convolutions", ZEROS, r"conv_l.*weight$", 40),
    LeftOut("smpnet_tiny", "1x1 into the large kernel", COSTS, r"mixer\.conv.*weight$", 42),
    LeftOut("smpnet_tiny", "bias of conv1 through the kernel", ZEROS, r"conv1\.conv\.bias$", 14),
    LeftOut("spanet_small", "1x7 and 7x1 into 7x7", ZEROS, r"conv_[wh]\.weight$", 48),
    LeftOut("spanet_small", "proj_in into the 1x7", ZEROS, r"proj_in\.(weight|bias)$", 48),
    LeftOut("spanet_small", "context into proj_out", "a product is between", r"pws\.0\.w", 24),
    LeftOut("spanet_small", "factors of shortcuts", "a norm reads the sum", r"res_scale\d$", 32),
    LeftOut("moganet_xtiny", "norm before the downsampling", ZEROS, r"sample\.0\.(w|b)", 6),
    LeftOut("moganet_xtiny", "dilated kernels into 5x5", ZEROS, r"conv_dw[12]\.weight$", 36),
    LeftOut("moganet_xtiny", "other biases of the 5x5", ZEROS, r"conv_dw0\.bias$", 18),
    LeftOut("moganet_xtiny", "bias of fc1", ZEROS, r"mlp\.fc1\.bias$", 18),
    LeftOut("moganet_xtiny", "gate and value", "their inputs differ", r"(gate|proj)\.weight$", 36),
    LeftOut("glnet_4g", "norm1 of slot blocks", "slots are made of it", r"norm1\.(w|b)", 34),
    LeftOut("glnet_4g", "scale of pooled slots", "they differ by image", r"slot_scale$", 17),
    LeftOut("glnet_4g", "bias of conv1 through the 5x5", ZEROS, r"conv1\.bias$", 17),
    LeftOut("glnet_4g", "1x1, 5x5 and 1x1", COSTS, r"\d\.(conv\d|conv_dw)\.weight$", 51),
    LeftOut("glnet_4g", "bias of fc1 through the 3x3", ZEROS, r"mlp\.fc1\.bias$", 30),
    LeftOut(
        "patchconvnet_s60",
        "biases of conv_pw and conv_dw",
        "an activation follows",
        r"conv_(pw|dw)\.bias$",
        120,
    ),
    LeftOut("patchconvnet_s60", "SE factors", "they differ by image", r"se\.fc\d\.", 240),
    LeftOut("rednet26", "norm after an involution", SHARED, r"(stem\.2|blocks\.\d+\.norm)\.w", 9),
    LeftOut("rednet26", "pool and 1x1 into a strided 2x2", COSTS, r"reduce\.conv\.weight$", 9),
    LeftOut("transnext_micro", "norm before the downsampling", ZEROS, r"sample\.0\.(w|b)", 6),
    LeftOut("transnext_micro", "norm after it", "its output is residual", r"sample\.2\.(w|b)", 6),
    LeftOut("transnext_micro", "centered stem", "channels are last here", r"stem\.1\.(w|b)", 2),
    LeftOut("transnext_micro", "bias of keys", "keys are scaled to length one", r"qkv\.bias$", 21),
    LeftOut("transnext_micro", "bias of values", "windows sum to any", r"kv_pool\.bias$", 19),
    LeftOut("transnext_micro", "offset of biases", "windows have none", r"cpb\.fc2\.bias$", 21),
    LeftOut("transnext_micro", "bias of fc1", ZEROS, r"mlp\.fc1\.bias$", 21),
    LeftOut("transnext_micro", "biases of a size", "they depend on it", r"cpb\.fc\d\.weight$", 42),
    LeftOut("uniformer_xxs", "norm of a patch embedding", ZEROS, r"sample\.1\.(w|b)", 6),
    LeftOut("uniformer_xxs", "bias of conv1 through the 5x5", ZEROS, r"conv1\.bias$", 7),
    LeftOut("uniformer_xxs", "1x1, 5x5 and 1x1", COSTS, r"(conv\d|conv_dw)\.weight$", 21),
    LeftOut("uniformer_xxs", "constant class token", COSTS, r"cls_token$", 1),
]


@pytest.mark.parametrize("row", LEFT_OUT, ids=lambda row: f"{row.model}: {row.what}")
def test_what_is_no_merge_is_left_alone(row):
    merged = backbones.reparameterize(make(row.model), verify=False)
    left = [key for key in merged.state_dict() if re.search(row.left, key)]
    assert len(left) == row.count, left


@pytest.mark.parametrize("table", [ROWS, LEFT_OUT], ids=["made", "left out"])
def test_the_tables_name_every_family_of_the_manifest(table):
    assert {registry.find(row.model).family for row in table} >= set(families_in_manifest())
