"""PyTorch's own formats: the program of ``torch.export``, and AOTInductor's compiled package."""

import importlib
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.engines.formats import Conversion, Format, FormatConfig, traced
from backbones.engines.preparation import DTYPES
from backbones.engines.runners import Runner, existing, explained
from backbones.engines.timing import torch_threads

__all__ = ["AOTI", "PT2", "AotiConfig", "Pt2Config"]

METADATA = "backbones.json"


@dataclass(frozen=True)
class Pt2Config(FormatConfig):
    """A program of ``torch.export``."""


@dataclass(frozen=True)
class AotiConfig(FormatConfig):
    """A package of AOTInductor, compiled for the processor of this machine."""


def _to_pt2(conversion: Conversion, config: Pt2Config, path: Path) -> None:
    """Write the program, with metadata as the extra file ``backbones.json``."""
    # PyTorch wants its own suffix, whatever the user's is.
    between = path.with_name("program.pt2")
    torch.export.save(traced(conversion), between, extra_files={METADATA: _facts(conversion)})
    between.replace(path)


def _to_aoti(conversion: Conversion, config: AotiConfig, path: Path) -> None:
    """Compile the model and write the package, with metadata in the library."""
    between = path.with_name("package.pt2")
    metadata = {"backbones": _facts(conversion)}
    with explained(f"{path.name}: AOTInductor failed"), torch.no_grad():
        _inductor().aoti_compile_and_package(
            traced(conversion),
            package_path=str(between),
            inductor_configs={"aot_inductor.metadata": metadata, "freezing": True},
        )
    between.replace(path)


def _inductor() -> Any:
    """Return the module that PyTorch documents for AOTInductor, in spite of its underscore."""
    return importlib.import_module("torch._inductor")


def _facts(conversion: Conversion) -> str:
    """Return the metadata and the sizes of the input's dimensions, free ones by name, as JSON."""
    axes = conversion.axes
    shape = [axes.get(i, size) for i, size in enumerate(conversion.example.shape)]
    return json.dumps({**conversion.metadata, "shape": shape}, allow_nan=False)


class _ProgramRunner(Runner):
    """A program that PyTorch runs; calls take turns where it may be run by one thread at a time."""

    def __init__(
        self,
        engine: str,
        path: Path,
        threads: int | None,
        program: Callable[[Tensor], Any],
        facts: dict[str, Any],
        turn: AbstractContextManager[Any],
    ) -> None:
        shape, raw = facts["shape"], facts["preprocess"]
        super().__init__(path, shape, threads=threads, raw=raw, metadata=facts)
        self.engine, self.path = engine, path
        self._program, self._turn = program, turn

    def infer(self, x: Tensor) -> Tensor | Sequence[Tensor]:
        """Run the program."""
        with self._turn, torch_threads(self.threads):
            return self._program(x)


def _open_pt2(path: str | PathLike[str], *, threads: int | None = None) -> Runner:
    """Open a program that `export` wrote, by `torch.export`."""
    path, found = existing(path), {METADATA: ""}
    with explained(
        f"{path}: cannot be loaded as a program of torch.export that this package wrote"
    ):
        program = torch.export.load(path, extra_files=found).module()
        facts = json.loads(found[METADATA])
    return _ProgramRunner("pt2", path, threads, program, facts, nullcontext())


def _open_aoti(path: str | PathLike[str], *, threads: int | None = None) -> Runner:
    """Open a package that `export` wrote, for a processor like this one, by AOTInductor."""
    path = existing(path)
    with explained(
        f"{path}: cannot be loaded as a package of AOTInductor that this package wrote for this"
        " kind of processor"
    ):
        program = _inductor().aoti_load_package(str(path))
        facts = json.loads(program.loader.get_metadata()["backbones"])
    return _ProgramRunner("aoti", path, threads, program, facts, threading.Lock())


PT2 = Format("pt2", ".pt2", Pt2Config, _to_pt2, _open_pt2, tuple(DTYPES))
AOTI = Format("aoti", ".aoti", AotiConfig, _to_aoti, _open_aoti, tuple(DTYPES))
