"""What an engine is: how it starts a model, and the callable that it gives, images to outputs."""

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones.engines.preparation import random_input
from backbones.engines.verification import as_list
from backbones.errors import (
    BackbonesError,
    ConfigError,
    ExportError,
    InputSizeError,
    UnsupportedError,
    WeightsUnavailableError,
    first_line,
)
from backbones.files import write_json

__all__ = [
    "Deployment",
    "Engine",
    "FixedBatchRunner",
    "Runner",
    "existing",
    "explained",
    "filled",
    "notes_on",
    "own_facts",
]

Shape = Sequence[int | str | None]  # a number is fixed, anything else is free


class Runner(ABC):
    """A model in an engine; may be called from several threads.

    Attributes:
        engine: the engine's name.
        precision: what it computes in: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        rest: in int8, what the rest computes in, if the engine has a choice: ``fp32`` or ``bf16``.
        layout: memory layout of its convolutions; ``engine`` where the engine chooses.
        threads: threads of one call.
        shape: sizes of the input's dimensions; those that are no numbers are free.
        metadata: what `export` wrote into the file: name, license, classes, input, ...; else empty.
        report: what `deploy` tried and chose, where the runner comes from it.
        raw: True where the input is uint8 images (B, H, W, C) as decoded, which the file itself
            resizes and normalizes; False for normalized images (B, C, H, W).
    """

    engine = ""
    layout = "engine"
    rest = ""

    def __init__(
        self,
        what: object,
        shape: Shape,
        *,
        threads: int | None = None,
        raw: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        self.what = what
        self.shape = tuple(shape)
        self.threads = threads or torch.get_num_threads()
        self.raw = raw
        self.metadata = metadata or {}
        self.precision: str = self.metadata.get("precision", "fp32")
        self.report: Any = None

    @abstractmethod
    def infer(self, x: Tensor) -> Tensor | Sequence[Tensor]:
        """Compute the outputs for an input that was checked: contiguous, on the CPU."""

    def other_sizes(self, height: int, width: int) -> Sequence[tuple[int, int]]:
        """Return heights and widths at which a file that leaves them free is compared, too."""
        return [(height + 32, width + 64)]

    def __call__(self, x: Tensor | np.ndarray) -> Any:
        """Map a batch of images to the model's outputs.

        Args:
            x: tensor or array; floating images (B, C, H, W), or uint8 (B, H, W, C) if `raw`.

        Returns:
            A tensor for a tensor and an array for an array; a list of them where the model has
            several outputs.

        Raises:
            InputSizeError: a shape that the file does not take.
            ConfigError: values of another type than the file takes.
        """
        given = x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
        if len(given.shape) != len(self.shape) or any(
            isinstance(size, int) and size != is_ for size, is_ in zip(self.shape, given.shape)
        ):
            wanted = ", ".join(str(size) for size in self.shape)
            raise InputSizeError(
                f"{self.what} takes inputs of shape ({wanted}), got {tuple(given.shape)}"
            )
        if self.raw != (given.dtype == torch.uint8):
            wanted = "uint8 images" if self.raw else "normalized floating-point images"
            raise ConfigError(f"{self.what} takes {wanted}, got {given.dtype}")
        with torch.inference_mode():
            given = given.detach().cpu()
            result = self.infer((given if self.raw else given.float()).contiguous())
        outputs = as_list(result)
        converted = outputs if isinstance(x, Tensor) else [output.numpy() for output in outputs]
        return converted[0] if isinstance(result, Tensor) or len(outputs) == 1 else converted


class FixedBatchRunner(Runner):
    """A file for one number of images, run as often as a call needs; calls take turns.

    `images` is that number.
    """

    def __init__(self, what: object, shape: Shape, images: int, **options: Any) -> None:
        super().__init__(what, shape, **options)
        self.images = images
        self._turn = threading.Lock()

    @abstractmethod
    def run(self, x: Tensor) -> Sequence[Tensor]:
        """Compute the outputs for just so many images."""

    def infer(self, x: Tensor) -> Sequence[Tensor]:
        """Run the file, as often as it takes for this number of images."""
        with self._turn:
            parts = [self.run(filled(part, self.images)) for part in x.split(self.images)]
        return [torch.cat(outputs)[: len(x)] for outputs in zip(*parts)]


def filled(x: Tensor, images: int) -> Tensor:
    """Return fewer images than a file takes filled up with the last."""
    missing = images - len(x)
    return torch.cat((x, x[-1:].expand(missing, *x.shape[1:]))) if missing else x


def own_facts(facts: dict[str, Any] | None, path: Path) -> dict[str, Any]:
    """Return what a file says of itself; refuse a file of another program, which says nothing."""
    if facts is None:
        raise ExportError(
            f"{path}: another program wrote it, and it does not say what it takes; export the model"
            " by this package"
        )
    return facts


def existing(path: str | PathLike[str]) -> Path:
    """Return the path of an exported file, or raise :class:`WeightsUnavailableError`."""
    path = Path(path)
    if not path.is_file():
        raise WeightsUnavailableError(f"{path}: no such file; export the model first")
    return path


@contextmanager
def explained(what: str, *through: type[Exception]) -> Iterator[None]:
    """Raise :class:`ExportError` ``<what>: <message>`` for whatever an engine or converter raises.

    Their errors have no common public class. Ours pass `through`, and those named.
    """
    passing: tuple[type[Exception], ...] = (BackbonesError, *through)
    try:
        yield
    except passing:
        raise
    except Exception as error:
        raise ExportError(f"{what}: {first_line(error)}") from error


@dataclass(frozen=True)
class Deployment:
    """What an engine starts: a re-parameterized model in eval mode on the CPU, for which inputs.

    `source` gives the model, and is called only where no file of an earlier time will do. `folder`
    is where files stay; `images` are real ones, normalized (N, C, H, W), `labels` their classes
    (N,) where known, and `agreement` the share of them whose class int8 shall keep; `export` writes
    a file; `streams` calls are made side by side, each with `threads`.
    """

    source: Callable[[], nn.Module]
    size: tuple[int, ...]
    batch_size: int
    precision: str
    threads: int
    folder: Path
    export: Callable[..., Any]
    images: Tensor | None = None
    labels: Tensor | None = None
    agreement: float = 0.0
    streams: int = 1

    @property
    def model(self) -> nn.Module:
        """What `source` gives."""
        return self.source()

    @property
    def example(self) -> Tensor:
        """An input of the size that is measured, (B, C, H, W)."""
        return random_input((self.batch_size, *self.size))

    def exported(self, name: str, precision: str, format: Any = None) -> Path:
        """Return the path of the model's file of this name, which is written if it is new."""
        quantized = precision == "int8"
        path = self.folder / (f"{self.agreement:g}-{name}" if quantized else name)
        if not path.exists():
            report = self.export(
                self.model,
                path,
                format=format,
                input_size=self.size,
                precision=precision,
                merge=False,  # it is re-parameterized
                calibration=self.images if quantized else None,
                agreement=self.agreement,
            )
            write_json(_notes_of(path), dict(report.notes))
        return path


def notes_on(runner: Runner) -> dict[str, Any]:
    """Return what `export` noted on the file that a deployment made for a runner, if anything, and
    the runner's `rest`, if it has one."""
    path = getattr(runner, "path", None)
    noted = None if path is None else _notes_of(path)
    notes = json.loads(noted.read_text(encoding="utf-8")) if noted and noted.is_file() else {}
    return {**notes, "rest": runner.rest} if runner.rest else notes


def _notes_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.notes.json")


@dataclass(frozen=True)
class Engine:
    """What it computes in, the packages it needs, how it starts; `slow`: that takes minutes."""

    name: str
    open: Callable[[Deployment], Runner]
    precisions: tuple[str, ...]
    packages: tuple[str, ...] = field(default=())
    extra: str = ""
    slow: bool = False

    @property
    def installed(self) -> bool:
        """Whether the packages are there; they are not imported for it."""
        return all(find_spec(name) for name in self.packages)

    def start(self, deployment: Deployment) -> Runner:
        """Start a model, or refuse a precision that the engine does not compute in."""
        if deployment.precision not in self.precisions:
            raise UnsupportedError(
                f"engine {self.name!r} has no precision {deployment.precision!r}; it has"
                f" {', '.join(self.precisions)}"
            )
        return self.open(deployment)
