"""PyTorch's own formats: the program of ``torch.export``, and AOTInductor's compiled package."""

import importlib
import json
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.engines.formats import Conversion, Format, FormatConfig, traced
from backbones.engines.preparation import DTYPES
from backbones.engines.runners import Runner, existing
from backbones.engines.timing import torch_threads
from backbones.errors import ExportError, first_line

__all__ = ["AOTI", "PT2", "AotiConfig", "AotiRunner", "Pt2Config", "Pt2Runner"]

METADATA = "backbones.json"


@dataclass(frozen=True)
class Pt2Config(FormatConfig):
    """A program of ``torch.export``."""


@dataclass(frozen=True)
class AotiConfig(FormatConfig):
    """A package of AOTInductor, compiled for the processor of this machine."""


def _to_pt2(conversion: Conversion, config: Pt2Config, path: Path) -> None:
    """Write the program, with metadata as the extra file ``backbones.json``."""
    facts = json.dumps({**conversion.metadata, "shape": _shape_of(conversion)}, allow_nan=False)
    # PyTorch wants its own suffix, whatever the user's is.
    between = path.with_name("program.pt2")
    torch.export.save(traced(conversion), between, extra_files={METADATA: facts})
    between.replace(path)


def _to_aoti(conversion: Conversion, config: AotiConfig, path: Path) -> None:
    """Compile the model and write the package, with metadata in the library."""
    facts = json.dumps({**conversion.metadata, "shape": _shape_of(conversion)}, allow_nan=False)
    between = path.with_name("package.pt2")
    try:
        with torch.no_grad():
            _inductor().aoti_compile_and_package(
                traced(conversion),
                package_path=str(between),
                inductor_configs={"aot_inductor.metadata": {"backbones": facts}, "freezing": True},
            )
    except ExportError:
        raise
    except Exception as error:  # whatever the compiler's many stages raise
        raise ExportError(f"{path.name}: AOTInductor failed: {first_line(error)}") from error
    between.replace(path)


def _inductor() -> Any:
    """Return the module that PyTorch documents for AOTInductor, in spite of its underscore."""
    return importlib.import_module("torch._inductor")


def _shape_of(conversion: Conversion) -> list[int | str]:
    """Return the sizes of the input's dimensions; free ones by name."""
    axes = conversion.axes
    return [axes.get(i, size) for i, size in enumerate(conversion.example.shape)]


class Pt2Runner(Runner):
    """A program of ``torch.export``, run by PyTorch.

    Args:
        path: the file.
        threads: threads of one call; None for PyTorch's number.

    Raises:
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        ExportError: it is no program of `export`.
    """

    engine = "pt2"

    def __init__(self, path: str | PathLike[str], *, threads: int | None = None) -> None:
        self.path = existing(path)
        found = {METADATA: ""}
        try:
            self._run = torch.export.load(self.path, extra_files=found).module()
            facts = json.loads(found[METADATA])
        except (RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ExportError(
                f"{self.path}: cannot be loaded as a program of torch.export that this package"
                f" wrote: {first_line(error)}"
            ) from error
        shape, raw = facts["shape"], facts["preprocess"]
        super().__init__(self.path, shape, threads=threads, raw=raw, metadata=facts)

    def infer(self, x: Tensor) -> Tensor | Sequence[Tensor]:
        """Run the program."""
        with torch_threads(self.threads):
            return self._run(x)


class AotiRunner(Runner):
    """A package of AOTInductor; calls of several threads take turns.

    Args:
        path: the file.
        threads: threads of one call; None for PyTorch's number.

    Raises:
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        ExportError: it is no package of `export`, or was compiled for another processor.
    """

    engine = "aoti"

    def __init__(self, path: str | PathLike[str], *, threads: int | None = None) -> None:
        self.path = existing(path)
        try:
            self._run = _inductor().aoti_load_package(str(self.path))
            facts = json.loads(self._run.loader.get_metadata()["backbones"])
        except Exception as error:  # the loader's errors have no common public class
            raise ExportError(
                f"{self.path}: cannot be loaded as a package of AOTInductor that this package"
                f" wrote for this kind of processor: {first_line(error)}"
            ) from error
        shape, raw = facts["shape"], facts["preprocess"]
        super().__init__(self.path, shape, threads=threads, raw=raw, metadata=facts)
        self._turn = threading.Lock()

    def infer(self, x: Tensor) -> Tensor | Sequence[Tensor]:
        """Run the package."""
        with self._turn, torch_threads(self.threads):
            return self._run(x)


PT2 = Format("pt2", ".pt2", Pt2Config, _to_pt2, Pt2Runner, tuple(DTYPES))
AOTI = Format("aoti", ".aoti", AotiConfig, _to_aoti, AotiRunner, tuple(DTYPES))
