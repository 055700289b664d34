"""A package read back, where no system runs it: operations, weights, and what it says of itself."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from backbones.engines.coreml.conversion import COREML_TARGETS
from backbones.engines.coreml.facts import INPUT, LABEL, PROBABILITIES, facts_of, labels_of
from backbones.engines.coreml.tools import quiet_tools
from backbones.engines.formats import Conversion, Notes
from backbones.engines.rewrites import rewrite_for_graphs
from backbones.engines.runners import explained
from backbones.errors import ExportError
from backbones.optional import optional_import

__all__ = ["read_package"]


def read_package(path: Path, conversion: Conversion) -> Notes:
    """Read a package back and compare what can be compared without running it.

    Its operations are ones that Core ML defines, its weights are all there, finite and in the
    precision asked for, and its inputs, outputs, labels and facts are those of the model.

    Raises:
        ExportError: something is not as it should be; the message says what.
    """
    with quiet_tools() as tools, explained(f"{path.name}: it cannot be read back"):
        loading = optional_import("coremltools.converters.mil.frontend.milproto.load", "coreml")
        package = tools.models.MLModel(str(path), skip_model_load=True)
        spec = package.get_spec()
        # It fails for operations and types that Core ML does not define.
        program = loading.load(spec, spec.specificationVersion, package.weights_dir)
    operations = [*program.functions["main"].operations]
    kinds = Counter(one.op_type for one in operations)
    count = _check_weights(operations, conversion, path)
    facts = _checked_facts(spec.description, conversion, path)
    _check_labels(operations, conversion, facts["images"], path)
    target, computed = facts["minimum_target"], sum(kinds.values()) - kinds["const"]
    return {
        "operations": computed,
        "weights": count,
        "not_run": (
            f"Core ML files run on macOS only; read back and checked: {computed} operations,"
            f" {count} weights, for {target} ({COREML_TARGETS[target]}) and later"
        ),
    }


def _check_weights(operations: list[Any], conversion: Conversion, path: Path) -> int:
    """Return the number of weights in a program; refuse those that are not what they should be.

    Norms and scales may have become part of other weights, and equal arrays one, so that the
    model's kernels and matrices are counted, each once, and there must be as many at least.
    """
    constants = [np.asarray(one.outputs[0].val) for one in operations if one.op_type == "const"]
    arrays = [array for array in constants if array.dtype.kind == "f"]
    wanted = np.float16 if conversion.precision == "fp16" else np.float32
    for array in arrays:
        # What lies outside of a window is masked by minus infinity, in some models.
        if np.isnan(array).any() or np.isposinf(array).any():
            raise ExportError(f"{path.name}: weights {array.shape} in it are not finite")
        if array.ndim > 1 and array.dtype != wanted:
            raise ExportError(
                f"{path.name}: weights {array.shape} in it are {array.dtype}, not"
                f" {np.dtype(wanted).name}"
            )
    found, matrices = sum(array.size for array in arrays), {}
    for parameter in rewrite_for_graphs(conversion.model).parameters():
        if parameter.ndim > 1:
            matrices[parameter.detach().contiguous().numpy().tobytes()] = parameter.numel()
    if found < (expected := sum(matrices.values())):
        raise ExportError(f"{path.name}: there are {found} weights in it, less than {expected}")
    return found


def _checked_facts(description: Any, conversion: Conversion, path: Path) -> dict[str, Any]:
    """Return what a package says of itself; refuse ends or facts that are not the model's."""
    facts = facts_of(description)
    if facts is None:
        raise ExportError(f"{path.name}: it does not say what it holds")
    labels = labels_of(conversion, facts["images"])
    channels, height, width = conversion.metadata["input"]["input_size"]
    ends = [one.name for one in description.output]
    kind = description.input[0].type
    if conversion.raw:
        colors = {"GRAYSCALE": 1, "RGB": 3}
        space = kind.imageType.ColorSpace.Name(kind.imageType.colorSpace)
        size = (colors.get(space), kind.imageType.height, kind.imageType.width)
    else:
        size = tuple(kind.multiArrayType.shape)
    known = json.loads(json.dumps(dict(conversion.metadata)))
    compared = {
        "inputs": ([one.name for one in description.input], [INPUT]),
        "input size": (
            size,
            (channels, height, width)
            if conversion.raw
            else (facts["images"], channels, height, width),
        ),
        "outputs": (
            ends,
            [*([] if labels is None else [LABEL, PROBABILITIES]), *conversion.outputs],
        ),
        "facts": ({key: facts.get(key) for key in known}, known),
    }
    for what, (found, expected) in compared.items():
        if found != expected:
            raise ExportError(f"{path.name}: its {what} are {found}, not {expected}")
    return facts


def _check_labels(operations: list[Any], conversion: Conversion, count: int, path: Path) -> None:
    """Refuse labels that are not the model's classes in their order."""
    found = [
        str(label)
        for one in operations
        if one.op_type == "classify"
        for label in one.inputs["classes"].val
    ]
    if found != (labels_of(conversion, count) or []):
        raise ExportError(f"{path.name}: its labels are not the model's classes")
