"""From PyTorch to a Core ML package, by Core ML's own converter."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones.engines.coreml.facts import INPUT, LABEL, describe, labels_of
from backbones.engines.coreml.tools import quiet_tools
from backbones.engines.formats import Conversion, FormatConfig, Notes, traced
from backbones.engines.preparation import Preprocessed, contiguous_copy, resize_matrix
from backbones.engines.rewrites import rewrite_for_graphs
from backbones.engines.runners import explained
from backbones.engines.verification import run_model
from backbones.errors import ConfigError, UnsupportedError

__all__ = ["COREML_TARGETS", "CoreMlConfig", "to_coreml"]

# Core ML's programs came with the first, computation in fp16 on all of a device's units too.
COREML_TARGETS = {
    "iOS15": "macOS12",
    "iOS16": "macOS13",
    "iOS17": "macOS14",
    "iOS18": "macOS15",
    "iOS26": "macOS26",
}
_PROBABILITIES = "probabilities"
_COLORS = {1: "GRAYSCALE", 3: "RGB"}


@dataclass(frozen=True)
class CoreMlConfig(FormatConfig):
    """Core ML by coremltools, for systems from `target` on (a key of `COREML_TARGETS`).

    A package is for one number of images: that of ``batch_size=``, or else `images`, in which case
    our runner cuts and fills other numbers. With ``preprocess=True`` its input is an image.
    """

    target: str = "iOS16"
    images: int = 1

    def __post_init__(self) -> None:
        if self.target not in COREML_TARGETS:
            raise ConfigError(f"no target {self.target!r}; there are {', '.join(COREML_TARGETS)}")
        if type(self.images) is not int or self.images < 1:
            raise ConfigError(f"no package for {self.images!r} images; give 1 or more")


class _OfImages(nn.Module):
    """A model with its preprocessing, for images (B, C, H, W) of one size in 0 to 255.

    The matrices that resize are computed beforehand, in float32: in fp16 the places of pixels would
    not be exact. Where nothing is resized there are none.
    """

    rows: Tensor | None
    columns: Tensor | None
    scale: Tensor
    shift: Tensor

    def __init__(self, of_any_size: Preprocessed, height: int, width: int) -> None:
        super().__init__()
        for name, size, resized, out in zip(
            ("rows", "columns"),
            (height, width),
            of_any_size.resized(height, width),
            (of_any_size.height, of_any_size.width),
        ):
            matrix = resize_matrix(size, resized, out, of_any_size.filter, of_any_size.scale)
            if size == resized == out:
                setattr(self, name, None)  # no buffer: torch.export fails for those that are None
            else:
                self.register_buffer(name, matrix)
        self.register_buffer("scale", of_any_size.scale)
        self.register_buffer("shift", of_any_size.shift)
        self.model = of_any_size.model

    def forward(self, x: Tensor) -> Any:
        if self.columns is not None:
            x = (x @ self.columns.transpose(0, 1)).clamp(0, 255)
        if self.rows is not None:
            x = (self.rows @ x).clamp(0, 255)
        return self.model(x * self.scale + self.shift)


class _Classifier(nn.Module):
    """A classifier that gives logits and probabilities, (B, classes) each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x)
        return logits, logits.softmax(1)


def to_coreml(conversion: Conversion, config: CoreMlConfig, path: Path) -> Notes:
    """Write a package whose ``input`` is an image, of `raw` conversions, or an array (B, C, H, W).

    Outputs are float32 arrays; a classifier whose classes are known also gives ``classLabel`` and
    the probabilities by label. fp16 keeps weights and computes in that type.
    """
    free = "batch" in conversion.dynamic
    count = config.images if free else len(conversion.example)
    channels, height, width = conversion.metadata["input"]["input_size"]
    if conversion.raw and (count > 1 or channels not in _COLORS):
        raise UnsupportedError(
            f"{path.name}: an image of Core ML is one of 1 or 3 channels, not {count} of"
            f" {channels}; leave preprocess out"
        )
    labels = labels_of(conversion, count)
    logits = len(run_model(conversion.model, conversion.example[:1])[0]) if labels else 0
    if labels and len(labels) != logits:
        raise ConfigError(f"{path.name}: there are {len(labels)} class names for {logits} logits")
    facts = {
        **conversion.metadata,
        "free_batch": free,
        "images": count,
        "minimum_target": config.target,
    }
    example = torch.zeros(count, channels, height, width)
    fixed = dataclasses.replace(conversion, example=example, dynamic=(), raw=False)
    model = rewrite_for_graphs(conversion.model)
    if conversion.raw:
        assert isinstance(model, Preprocessed)
        model = _OfImages(model, height, width)
    model = contiguous_copy(model if labels is None else _Classifier(model))
    program = _plain(traced(dataclasses.replace(fixed, model=model.eval())))
    with quiet_tools() as tools, explained(f"{path.name}: Core ML's converter failed"):
        half = conversion.precision == "fp16"
        options = {
            "minimum_deployment_target": tools.target[config.target],
            "compute_precision": tools.precision.FLOAT16 if half else tools.precision.FLOAT32,
        }
        names = [*conversion.outputs, *([] if labels is None else [_PROBABILITIES])]
        package = tools.convert(
            program,
            inputs=[_input(tools, conversion.raw, example.shape)],
            outputs=[tools.TensorType(name=name, dtype=np.float32) for name in names],
            # A classifier takes a second step.
            convert_to="mlprogram" if labels is None else "milinternal",
            skip_model_load=True,
            **options,
        )
        if labels is not None:
            package = _classifier(tools, package, labels, options)
        describe(package, facts)
    with quiet_tools(), explained(f"{path.name}: it cannot be written", OSError):
        package.save(str(path))
        # Notes for debuggers of ExecuTorch, who did not make it.
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    kind = "image" if conversion.raw else "array"
    return {"images_a_call": count, "input": kind, "minimum_target": config.target}


def _classifier(tools: Any, program: Any, labels: list[str], options: dict[str, Any]) -> Any:
    """Return the package of a program that gives logits and probabilities, with its labels.

    Asked for both at once, names of outputs and labels, coremltools fails.
    """
    program.functions["main"].set_output_types(None)
    return tools.convert(
        program,
        classifier_config=tools.ClassifierConfig(
            labels, predicted_feature_name=LABEL, predicted_probabilities_output=_PROBABILITIES
        ),
        convert_to="mlprogram",
        skip_model_load=True,
        pass_pipeline=tools.PassPipeline.EMPTY,  # it went through all passes before
        **options,
    )


def _input(tools: Any, raw: bool, shape: Sequence[int]) -> Any:
    if not raw:
        return tools.TensorType(name=INPUT, shape=tuple(shape))
    layout = getattr(tools.colorlayout, _COLORS[shape[1]])
    return tools.ImageType(name=INPUT, shape=tuple(shape), color_layout=layout)


def _plain(program: Any) -> Any:
    """Return a recorded program in the operations that the converter knows, without aliases."""
    program = program.run_decompositions({})
    for module in program.graph_module.modules():
        for node in [*module.graph.nodes]:
            if node.target in (torch.ops.aten.alias.default, torch.ops.aten.alias_copy.default):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
            elif node.target == torch.ops.aten.scalar_tensor.default:
                # The converter takes the type from the number alone.
                value, is_float = node.args[0], node.meta["val"].is_floating_point()
                node.args = (float(value) if is_float else value,)
    return program
