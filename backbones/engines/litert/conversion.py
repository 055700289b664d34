"""From PyTorch to a LiteRT file, by LiteRT's own converter and quantizer."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from backbones.engines.formats import Conversion, FormatConfig, Notes, traced
from backbones.engines.litert.flatbuffers import describe
from backbones.engines.litert.quantization import Int8, in_half
from backbones.engines.litert.runner import LiteRtRunner
from backbones.engines.quantization import OPERATORS, to_target
from backbones.engines.rewrites import rewrite_for_graphs, split_large_kernels
from backbones.engines.runners import explained
from backbones.errors import ConfigError, UnsupportedError
from backbones.optional import optional_import

__all__ = ["INPUT_LAYOUTS", "LiteRtConfig", "to_litert"]

INPUT_LAYOUTS = ("nhwc", "nchw")


@dataclass(frozen=True)
class LiteRtConfig(FormatConfig):
    """LiteRT by litert-torch.

    `input_layout` is the order of the file's input: ``nhwc``, as programs for phones have images,
    or ``nchw``. A file is for one number of images: that of ``batch_size=``, or else `images`, in
    which case our runner cuts and fills other numbers.
    """

    input_layout: str = "nhwc"
    images: int = 1

    def __post_init__(self) -> None:
        if self.input_layout not in INPUT_LAYOUTS:
            raise ConfigError(
                f"no layout {self.input_layout!r}; there are {', '.join(INPUT_LAYOUTS)}"
            )
        if type(self.images) is not int or self.images < 1:
            raise ConfigError(f"no file for {self.images!r} images; give 1 or more")


class _ChannelsLast(nn.Module):
    """A model that takes images as (B, H, W, C)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x.permute(0, 3, 1, 2))


def to_litert(conversion: Conversion, config: LiteRtConfig, path: Path) -> Notes:
    """Write a LiteRT file with the signature ``input`` to the names of the outputs.

    fp16 keeps the weights of convolutions and linear layers in that type and computes in the type
    that the device prefers. int8 quantizes convolutions, linear layers and products, weights a
    channel; the file's input and outputs stay float32.
    """
    if conversion.raw and config.input_layout == "nchw":
        raise ConfigError("decoded images are (B, H, W, C); leave input_layout out or preprocess")
    if conversion.raw and conversion.precision == "int8":
        raise UnsupportedError(
            f"{path.name}: int8 files of LiteRT take normalized images; leave preprocess out, or"
            " write OUT.onnx or OUT.xml"
        )
    free = "batch" in conversion.dynamic
    images = config.images if free else len(conversion.example)
    example = conversion.example[:1].expand(images, -1, -1, -1).contiguous()
    rewritten = split_large_kernels(rewrite_for_graphs(conversion.model))
    fixed = dataclasses.replace(conversion, model=rewritten, example=example, dynamic=())
    channels_last = config.input_layout == "nhwc" and not conversion.raw
    content = _converted(fixed, channels_last, path.name)
    layout = "nhwc" if channels_last or conversion.raw else "nchw"
    facts = {**conversion.metadata, "input_layout": layout, "free_batch": free}

    def write(content: bytes) -> None:
        with explained(f"{path.name}: its description cannot be written", OSError):
            path.write_bytes(describe(content, conversion.outputs, facts))

    notes: Notes = {"images_a_call": images, "input_layout": layout}
    if conversion.precision == "fp16":
        with explained(f"{path.name}: its weights cannot be kept in fp16"):
            content = in_half(content)
    if conversion.precision != "int8":
        write(content)
        return notes
    with explained(f"{path.name}: the LiteRT quantizer cannot quantize it"):
        # Recorded for batches of its own: images one by one take several times as long.
        example = example[:1].expand(conversion.calibration_batch, -1, -1, -1).contiguous()
        recorded = dataclasses.replace(fixed, example=example)
        program = traced(recorded).module()
        quantizer = Int8(content, fixed, program, channels_last)
        held = to_target(
            recorded,
            program,
            lambda plan: write(quantizer.quantized(plan)),
            lambda: LiteRtRunner(path),
            rounded=OPERATORS,
            kinds=1,
        )
    return {**notes, **held}


def _converted(conversion: Conversion, channels_last: bool, name: str) -> bytes:
    """Return the file of a model in float32, as the converter writes it."""
    model, x = conversion.model, conversion.example
    if channels_last:
        model, x = _ChannelsLast(model).eval(), x.permute(0, 2, 3, 1).contiguous()
    with _quiet(), explained(f"{name}: LiteRT's converter failed"):
        litert_torch = optional_import("litert_torch", "litert")
        converted = litert_torch.convert(model, (x,))
        return converted.model_content()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter from printing its steps, which go to the standard output."""
    name = "LITERT_TORCH_SHOW_PROGRESS"
    before = os.environ.get(name)
    os.environ[name] = "n"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
