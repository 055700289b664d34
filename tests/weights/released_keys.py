"""The names and shapes that a released file must hold, from everything but our own renames.

Authors' layout: from a golden of the variant. Where there is none, from its siblings' goldens, with
names carried over to the variant's own number of blocks and widths. timm's and transformers'
layouts: from those packages' classes. mmpretrain's: from the authors', by its converter's rules.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import timm
import torch
from golden import FOLDER, Golden
from torch import Tensor

from backbones.registry import registry
from backbones.weights import map_checkpoint

Shapes = dict[str, tuple[int, ...]]
# Our block's number, their name, the numbers in it, and where their shape has ones that ours lacks.
Example = tuple[int, str, list[int], "tuple[bool, ...] | None"]
# Variants that timm has with further norms only; without them they are the paper's.
TIMM_WITH_NORMS = {
    "cpubone_b0": "cpubone_b0_bfrobust",
    "cpubone_b1": "cpubone_b1_bfrobust",
    "cpubone_b2pt5": "cpubone_b2pt5_dwnorm",
}
# The authors' names of the final layers, auxiliary ones included.
FINAL = {
    "attnet": ("head.",),
    "affnet": ("classifier.",),
    "convnext": ("head.",),
    "inception_next": ("head.fc2.",),
    "cpubone": ("head.op_list.3.",),
    "lsnet": ("head.l.", "head_dist.l."),
    "unireplknet": ("head.",),
    "hornet": ("head.",),
    "smpnet": ("head.",),
    "spanet": ("head.",),
    "spartan": ("linear.",),
    "glnet": ("head.", "tklb_aux_head."),
    "moganet": ("head.",),
    "overlock": ("head.4.", "aux_head.2."),
    "patchconvnet": ("head.weight", "head.bias"),  # of one class token
    "rednet": ("head.fc.",),
    "transnext": ("head.",),
    "uniformer": ("head.", "aux_head.", "head_cls."),
}
# Arguments that decide the authors' names.
NAMED_BY = {
    "glnet": ("overlap",),
    "moganet": ("silu_twice",),
    "patchconvnet": ("token_per_class",),
    "uniformer": ("embeddings",),
}
# Whose authors number blocks through, over what are stages here.
COUNTED_THROUGH = ("patchconvnet",)
MANY = 4000  # entries
COUNTERS = "num_batches_tracked"
# What the authors call as we do, of variants without a golden.
NAMED_ALIKE = re.compile(r"\.init_slots$")
# What our models have another entry for, or none.
DERIVED = (".dwconv.P", ".filter", ".kernel_coord")
SHARED_POSITIONS = re.compile(r"^(stages\.\d+)\.positions$")


def released(
    variant: str, layout: str, classes: int, *, lacks: tuple[str, ...] = (), merged: bool = False
) -> dict[str, Tensor]:
    """Return tensors without values, as a file of that layout and so many outputs must hold them.

    Positions of learned spacings, which are compared when loaded, are zeros.

    Args:
        variant: what the file is for.
        layout: an entry's.
        classes: outputs of the classifier; 0 for none.
        lacks: an entry's.
        merged: OverLoCK's authors' re-parameterized form.
    """
    shapes = {
        "authors": _authors,
        "mmpretrain": _mmpretrain,
        "openmixup": _openmixup,
        "timm": _timm,
        "transformers": _transformers,
    }[layout](variant, classes, "head" in lacks)
    if merged:
        shapes = golden_shapes(f"{variant}_reparam") or merge_branches(shapes)
    return {key: _tensor(key, shape) for key, shape in shapes.items()}


def _tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    if key.endswith(".dwconv.P"):
        return torch.zeros(shape)
    integer = key.endswith((COUNTERS, "_idxs"))
    return torch.empty(shape, device="meta", dtype=torch.int64 if integer else torch.float32)


def _authors(variant: str, classes: int, headless: bool) -> Shapes:
    theirs = FINAL[registry.variants[variant].family]
    shapes = {}
    for key, shape in (golden_shapes(variant) or from_siblings(variant)).items():
        final = key.startswith(theirs)
        if (headless and key.startswith(("norm.", "head."))) or (final and not classes):
            continue
        shapes[key] = (classes, *shape[1:]) if final else shape
    return shapes


def _mmpretrain(variant: str, classes: int, headless: bool) -> Shapes:
    shapes = {}
    for key, shape in _authors(variant, classes, headless).items():
        if key.startswith("head."):
            key = f"head.fc.{key.removeprefix('head.')}"
        else:
            key = f"backbone.{key}".replace("backbone.norm.", "backbone.norm3.")
            key = key.replace(".gnconv.pws.", ".gnconv.projs.")
            key = re.sub(r"\.(gamma\d)$", r".\1.weight", key)
        shapes[key] = shape
    return shapes


def _openmixup(variant: str, classes: int, headless: bool) -> Shapes:
    """OpenMixup's names, which are those of its goldens; else the authors' with its prefixes."""
    shapes = _authors(variant, classes, headless)
    if any(key.startswith("backbone.") for key in shapes):
        return shapes
    return {
        re.sub(r"^(?!head)", "backbone.", re.sub(r"^head\.", "head.fc.", key)): shape
        for key, shape in shapes.items()
    }


def _timm(variant: str, classes: int, headless: bool) -> Shapes:
    shapes = {}
    for key, (shape, final) in _timm_shapes(variant).items():
        if (headless and key.startswith("head.")) or (final and not classes):
            continue
        shapes[key] = (classes, *shape[1:]) if final else shape
    return shapes


@cache
def _timm_shapes(variant: str) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Return the shapes of timm's class, and whether each is of the classifier."""
    name = TIMM_WITH_NORMS.get(variant, variant)
    plain = {"local_mbconv_norm": "proj"} if name != variant else {}
    with torch.device("meta"):
        model = timm.create_model(name, **plain)
    final = f"{model.pretrained_cfg['classifier']}."
    return {k: (tuple(v.shape), k.startswith(final)) for k, v in model.state_dict().items()}


def _transformers(variant: str, classes: int, headless: bool) -> Shapes:
    assert not headless
    transformers = pytest.importorskip("transformers")
    arguments = registry.variants[variant].arguments
    version = "V2" if arguments.get("use_grn") else ""
    config = getattr(transformers, f"ConvNext{version}Config")(
        hidden_sizes=list(arguments["dims"]), depths=list(arguments["depths"]), num_labels=classes
    )
    with torch.device("meta"):
        model = getattr(transformers, f"ConvNext{version}ForImageClassification")(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@cache
def golden_shapes(name: str) -> Shapes | None:
    """Return the authors' names and shapes as a golden has them; None without one."""
    for pattern in (f"{name}.json.gz", f"{name}_tame.json.gz", f"{name}@*.json.gz"):
        for path in sorted(FOLDER.glob(pattern)):
            entries = Golden(path).state_dict
            return {key: tuple(value["shape"]) for key, value in entries.items()}
    return None


def merge_branches(shapes: Shapes) -> Shapes:
    """Return what OverLoCK's authors leave of a training form: one kernel with a bias a block."""
    merged = {}
    for key, shape in shapes.items():
        if re.search(r"\.(?:dil_conv|dil_bn)_k\d+_\d+\.|\.origin_bn\.", key):
            continue
        merged[key] = shape
        if key.endswith(".lk_origin.weight"):
            merged[key.replace("weight", "bias")] = shape[:1]
    return merged


@cache
def _own_model(variant: str) -> torch.nn.Module:
    """Our model with 1000 classes and its auxiliary head, where the authors' has one."""
    found = registry.variants[variant]
    model_class = registry.classes[found.family]
    has_one = found.family == "overlock" or found.arguments.get("prune_tokens")
    auxiliary = {"aux_head": True} if has_one else {}
    return model_class(**found.arguments, **auxiliary, device="meta")


@cache
def _pairs(variant: str) -> list[tuple[str, str, tuple[int, ...], torch.Size]]:
    """Return (our name, theirs, their shape, our shape) of a variant that has a golden."""
    shapes = golden_shapes(variant) or {}
    file = {k: _tensor(k, shape) for k, shape in shapes.items() if not k.endswith(COUNTERS)}
    mapped = map_checkpoint(file, _own_model(variant))
    # What is mapped stays in order; positions become another entry, of another name.
    ours = {k: v for k, v in mapped.tensors.items() if not SHARED_POSITIONS.match(k)}
    theirs = {k: v for k, v in file.items() if not k.endswith(DERIVED)}
    pairs = []
    for (our, given), (their, taken) in zip(ours.items(), theirs.items(), strict=True):
        assert given is taken or given.shape != taken.shape
        pairs.append((our, their, shapes[their], given.shape))
    return pairs


def siblings(variant: str) -> list[str]:
    """Return the family's other variants that have goldens, but for the few of most entries.

    Their names are those of the same source, and of the same parts.
    """

    def source(name: str) -> tuple[str, list[object]]:
        found = registry.variants[name]
        decisive = NAMED_BY.get(found.family, ())
        return found.family, [found.arguments.get(argument) for argument in decisive]

    names = [name for name in registry.variants if source(name) == source(variant)]
    sizes = {name: len(golden_shapes(name) or ()) for name in names if name != variant}
    return [name for name, size in sizes.items() if 0 < size < MANY]


@cache
def from_siblings(variant: str) -> Shapes:
    """Return the authors' names and shapes of a variant, without its golden if it has one."""
    examples: dict[tuple[str, int], list[Example]] = {}
    for sibling in siblings(variant):
        for ours, theirs, shape, own_shape in _pairs(sibling):
            ones = tuple(n == 1 for n in shape) if shape != tuple(own_shape) else None
            name, block = _open(ours, sibling)
            example = (block, re.sub(r"\d+", "#", theirs), _numbers(theirs), ones)
            examples.setdefault((name, len(own_shape)), []).append(example)
    shapes: Shapes = {}
    own = _own_model(variant).state_dict()
    shared = {key: tensor for key, tensor in own.items() if SHARED_POSITIONS.match(key)}
    for key, tensor in own.items():
        if key in shared:
            continue
        if NAMED_ALIKE.search(key):
            shapes[key] = tuple(tensor.shape)
            continue
        counter = key.endswith(COUNTERS)  # named like the mean beside it
        like, rank = (key.replace(COUNTERS, "running_mean"), 1) if counter else (key, tensor.ndim)
        name, block = _open(like, variant)
        theirs, ones = _carried_over(examples[name, rank], block)
        shape = list(tensor.shape)
        if ones is not None and not counter:
            shape = [n for n in shape if n != 1]
            shape = [1 if one else shape.pop(0) for one in ones]
        shapes[theirs.replace("running_mean", COUNTERS) if counter else theirs] = tuple(shape)
    for key, tensor in shared.items():  # the authors repeat them in every block of the stage
        stage = key.removesuffix(".positions")
        two, width, points = tensor.shape
        for weight in [k for k in shapes if re.fullmatch(rf"{stage}\.\d+\.dwconv\.weight", k)]:
            shapes[weight.replace(".weight", ".P")] = (two, width, 1, points)
    for key in list(shapes):  # SPANet's filters, one beside each convolution of a share
        if found := re.fullmatch(r"(network\.(\d)\.\d+\.token_mixer)\.pws\.(\d)\.weight", key):
            side = 56 >> int(found[2]) // 2
            shapes[f"{found[1]}.sps.{found[3]}.filter"] = (1, side, side)
    return shapes


def _carried_over(examples: list[Example], block: int) -> tuple[str, tuple[bool, ...] | None]:
    """Return the authors' name of an entry of ours, and where their shape has ones.

    Of several kinds of block in one stage those at the same place are alike.
    """
    examples = [example for example in examples if example[0] == block] or examples
    _, template, _, ones = examples[0]
    assert {(t, o is None) for _, t, _, o in examples} == {(template, ones is None)}, template
    numbers = []
    for place in range(template.count("#")):
        # A number of theirs is always the same, or is the block's, or that of one of its halves.
        seen = {theirs[place] for _, _, theirs, _ in examples}
        follows = [
            factor * block + more
            for factor, more in ((1, 0), (2, 0), (2, 1))
            if all(theirs[place] == factor * at + more for at, _, theirs, _ in examples)
        ]
        assert len(seen) == 1 or follows, (template, place)
        numbers.append(str(seen.pop() if len(seen) == 1 else follows[0]))
    parts = template.split("#")
    return "".join(a + b for a, b in zip(parts, [*numbers, ""], strict=True)), ones


def _open(key: str, variant: str) -> tuple[str, int]:
    """Return one of our names with its block's number left open, and the number."""
    found = re.search(r"(?<=\.blocks\.)\d+(?=\.)|(?<=^stages\.\d\.)\d+(?=\.)", key)
    if found is None:
        return key, -1
    number, start = int(found[0]), key[: found.start()]
    of = registry.variants[variant]
    if of.family in COUNTED_THROUGH:
        stage = int(start.split(".")[1])
        number, start = number + sum(of.arguments["depths"][:stage]), "stages.#.blocks."
    return f"{start}#{key[found.end() :]}", number


def _numbers(key: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", key)]
