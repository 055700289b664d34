"""All formats and engines, in one table each."""

from os import PathLike
from pathlib import Path

from backbones.engines import coreml, executorch, litert, ncnn, onnx, openvino, pytorch, web
from backbones.engines.formats import Format, FormatConfig
from backbones.engines.runners import Engine, Runner
from backbones.errors import UnsupportedError, nearest

__all__ = [
    "ENGINES",
    "FORMATS",
    "available_engines",
    "available_formats",
    "file_suffixes",
    "find_engine",
    "find_format",
    "open_exported",
]

FORMATS = {
    format.name: format
    for format in (
        onnx.FORMAT,
        openvino.FORMAT,
        pytorch.PT2,
        pytorch.AOTI,
        executorch.FORMAT,
        litert.FORMAT,
        ncnn.FORMAT,
        coreml.FORMAT,
        web.FORMAT,
    )
}
ENGINES = {
    engine.name: engine
    for engine in (
        # Those that start soonest come first: `auto` has only so much time.
        onnx.ENGINE,
        openvino.ENGINE,
        pytorch.EAGER,
        ncnn.ENGINE,
        litert.ENGINE,
        executorch.ENGINE,
        pytorch.COMPILE,
    )
}


def available_formats() -> list[str]:
    """Return the names of the formats that `export` can write."""
    return sorted(FORMATS)


def file_suffixes() -> list[str]:
    """Return the suffixes of the files that can be opened."""
    return [FORMATS[name].suffix for name in available_formats() if FORMATS[name].suffix]


def open_exported(path: str | PathLike[str], *, threads: int | None = None) -> Runner:
    """Open an exported file in the engine for its format, which the suffix names.

    Args:
        path: the file.
        threads: threads of one call; None for PyTorch's number.

    Raises:
        UnsupportedError: no format has this suffix.
        BackbonesError: the engine is not installed or cannot load the file.
    """
    path = Path(path)
    return find_format(None, path)[0].open(path, threads=threads)


def find_format(wanted: str | FormatConfig | None, path: Path) -> tuple[Format, FormatConfig]:
    """Return the format asked for by name or config, or else by the path's suffix."""
    available = ", ".join(available_formats())
    if isinstance(wanted, FormatConfig):
        for format in FORMATS.values():
            if type(wanted) is format.config_class:
                return format, wanted
        raise UnsupportedError(f"no format takes {type(wanted).__name__}; available: {available}")
    if wanted is None:
        by_suffix = {one.suffix: one.name for one in FORMATS.values() if one.suffix}
        if path.suffix not in by_suffix:
            raise UnsupportedError(
                f"{path}: the suffix names no format; use {', '.join(file_suffixes())}, or pass"
                f" format=... (available: {available})"
            )
        wanted = by_suffix[path.suffix]
    if wanted not in FORMATS:
        raise UnsupportedError(
            f"no format {wanted!r}{nearest(wanted, FORMATS)}; available: {available}"
        )
    return FORMATS[wanted], FORMATS[wanted].config_class()


def available_engines() -> list[str]:
    """Return the names of the engines whose packages are installed."""
    return [engine.name for engine in ENGINES.values() if engine.installed]


def find_engine(name: str) -> Engine:
    """Return an engine by name."""
    if name not in ENGINES:
        raise UnsupportedError(
            f"no engine {name!r}{nearest(name, ENGINES)}; there are {', '.join(ENGINES)}"
        )
    return ENGINES[name]
