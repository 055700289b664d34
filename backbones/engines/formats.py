"""What a format is: a typed config, and what converts to it and runs it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.engines.preparation import Preprocessed
from backbones.engines.runners import Runner, explained
from backbones.files import new_bundle, new_file, new_folder

__all__ = ["Conversion", "Format", "FormatConfig", "Notes", "traced"]

Notes = Mapping[str, Any]
_AXES = {"batch": 0, "height": 2, "width": 3}
_CALIBRATION_BATCH = 8


@dataclass(frozen=True)
class FormatConfig:
    """Options of one target format."""


@dataclass(frozen=True)
class Conversion:
    """What is converted: a model in eval mode on the CPU, and all that the file must know.

    `example` is an input; `dynamic` names the dimensions that stay free; `raw` means uint8 images
    (B, H, W, C); `outputs` names the outputs; `calibration` are images for int8, normalized
    (N, C, H, W) also where the file has the preprocessing in it, and `agreement` the share of them
    whose class int8 shall keep (0: no matter).
    """

    model: nn.Module
    example: Tensor
    dynamic: tuple[str, ...] = ("batch",)
    raw: bool = False
    outputs: tuple[str, ...] = ("logits",)
    precision: str = "fp32"
    calibration: Tensor | None = None
    agreement: float = 0.0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> dict[int, str]:
        """The free dimensions of the input: their position and name."""
        positions = {"batch": 0, "height": 1, "width": 2} if self.raw else _AXES
        return {positions[name]: name for name in self.dynamic}

    def parts(self) -> tuple["Conversion", "Conversion"]:
        """Return a `raw` conversion as two, the preprocessing and the model on normalized images.

        In int8 they are converted one by one and joined: the matrices that resize have to be exact,
        and it is the model that normalized images calibrate.
        """
        whole = self.model
        assert isinstance(whole, Preprocessed)
        alone = whole.alone()
        with torch.no_grad():
            normalized = alone(self.example)
        before = dataclasses.replace(
            self, model=alone, outputs=("normalized",), precision="fp32", calibration=None
        )
        free = tuple(name for name in self.dynamic if name == "batch")
        return before, dataclasses.replace(
            self, model=whole.model, example=normalized, dynamic=free, raw=False
        )

    @property
    def calibration_batch(self) -> int:
        """The number of images of a calibration batch: the file's, where it is fixed."""
        return _CALIBRATION_BATCH if "batch" in self.dynamic else len(self.example)

    def calibration_batches(self, images: Tensor) -> Iterator[Tensor]:
        """Yield images (N, C, H, W) in whole batches; the last is filled up with the first ones."""
        size = self.calibration_batch
        missing = -len(images) % size
        filled = torch.cat((images, images[torch.arange(missing) % len(images)]))
        for batch in filled.split(size):
            yield batch.contiguous()


@dataclass(frozen=True)
class Format:
    """A format of files; `targets.FORMATS` lists them all."""

    name: str
    suffix: str
    config_class: type[FormatConfig]
    convert: Callable[[Conversion, Any, Path], Notes | None]
    """(conversion, config, path) -> writes the file, and others beside it where it needs them;
    notes are what the report should tell besides."""
    open: Callable[..., Runner]
    """(path, threads=None) -> the file, ready to run."""
    precisions: tuple[str, ...] = ("fp32",)
    """The first is that of files for which none is asked for."""
    dynamic: tuple[str, ...] = ("batch", "height", "width")
    dynamic_raw: tuple[str, ...] | None = None
    """Those of `dynamic` that may stay free where files take photographs; None for all."""
    folder: bool = False
    """What is written is a folder: one that stands for a file and has its suffix, or a page."""
    page: bool = False
    """A page for people: a folder without suffix, which takes photographs as decoded."""
    computes_half: bool = True
    """Whether a model is handed over in half precision; else the converter gets it in float32 and
    makes of it what the format has: weights in half precision, or computation too."""
    read_back: Callable[[Path, Conversion], Notes] | None = None
    """(path, conversion) -> what was found in the file, for formats whose engine does not run on
    this system: the file is read back instead of run, and ``not_run`` tells people so. It raises
    `ExportError` where the file is not what it should be. None: the engine runs here."""

    def place(self, path: Path) -> AbstractContextManager[Path]:
        """Give the path to write to; it appears at `path` when the block ends without error."""
        if self.page:
            return new_folder(path)
        return new_bundle(path) if self.folder else new_file(path)


def traced(conversion: Conversion, dims: Mapping[str, Any] | None = None) -> Any:
    """Return the model as ``torch.export`` records it, free dimensions as asked for.

    `dims` has what ``torch.export`` shall know of them, by name, for formats that need bounds.
    """
    known = dims or {}
    shapes: dict[int, Any] = {
        axis: known.get(name, torch.export.Dim.DYNAMIC) for axis, name in conversion.axes.items()
    }
    with explained("torch.export cannot record the model"), torch.no_grad():
        return torch.export.export(
            conversion.model,
            (conversion.example,),
            dynamic_shapes=(shapes or None,),
            # What cannot be decided for all sizes is checked when the program runs, unless their
            # bounds are known: then it has to hold for all of them.
            prefer_deferred_runtime_asserts_over_guards=not {"height", "width"} & known.keys(),
        )
