"""Where engine files are kept between processes: one folder for each model, by its content."""

import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.files import write_json

__all__ = ["content_key", "processor", "read_choice", "versions", "write_choice"]

VERSIONS = (
    "torch timm onnx onnxscript onnxruntime openvino nncf executorch torchao numpy"
    " coremltools litert-torch litert-converter ai-edge-litert ai-edge-quantizer ncnn pnnx"
).split()
# Of x86, then of Arm, by the names that Linux shows.
_INSTRUCTIONS = (
    "amx_tile amx_int8 amx_bf16 avx512_fp16 avx512_bf16 avx512_vnni avx_vnni avx512f avx2"
    " sve i8mm bf16 asimddp asimdhp"
).split()


def content_key(model: nn.Module, size: Sequence[int], images: Tensor | None = None) -> str:
    """Return a digest of all that a file depends on: weights, structure, code and versions."""
    digest = hashlib.sha256()
    facts = {
        "structure": repr(model),
        "config": repr(getattr(model, "config", None)),
        "settings": _settings(model),
        "size": list(size),
        "versions": versions(VERSIONS),
        "machine": platform.machine(),
        "code": _code_digest(model, Path(__file__).parents[1]),
        "classes": _sources(model),
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_content_of(tensor))
    if images is not None:
        digest.update(_content_of(images))
    return digest.hexdigest()[:32]


def _settings(model: nn.Module) -> list[tuple[str, str, str]]:
    """Return the plain values that modules hold, such as a norm's epsilon, whatever they print."""
    return [
        (name, key, repr(value))
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if key != "training" and isinstance(value, str | int | float | tuple)
    ]


def _content_of(tensor: Tensor) -> Any:
    """Return a tensor's values as a buffer of bytes."""
    values = tensor.detach().cpu().contiguous().flatten()
    return values.view(torch.uint8).numpy() if len(values) else b""


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of packages, as far as they are installed."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# What makes a file and remembers what was chosen, beside the forward methods of the model's family.
_MAKERS = "ops layers merge reparameterization stages.py skeleton.py engines".split()


def _code_digest(model: nn.Module, package: Path) -> str:
    """Return a digest of the code that decides what a model's file holds."""
    modules = {type(module).__module__ for module in model.modules()}
    families = {name.split(".")[2] for name in modules if name.startswith("backbones.families.")}
    digest = hashlib.sha256()
    for place in (*_MAKERS, *(f"families/{family}" for family in sorted(families))):
        path = package / place
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            digest.update(str(file.relative_to(package)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _sources(model: nn.Module) -> dict[str, str]:
    """Return the code of the classes that a user's model is made of, by name.

    The packages' own are known by their versions.
    """
    found = {}
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__.partition(".")[0] in ("torch", "timm", "backbones", "torchvision"):
            continue
        name = f"{kind.__module__}.{kind.__qualname__}"
        try:
            found[name] = inspect.getsource(kind)
        except (OSError, TypeError):  # typed into a session: never to be taken for another's
            found[name] = secrets.token_hex(16)
    return found


def processor() -> str:
    """Return the name of the processor and which instructions for low precision it has.

    As far as the system tells; machines of one name differ in what they let through.
    """
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        first = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
        flags = set(first[1].split()) if first else set()
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = found[1].strip() if found else platform.machine()
        special = [flag for flag in _INSTRUCTIONS if flag in flags]
        return f"{name} ({', '.join(special)})" if special else name
    return platform.processor() or platform.machine() or "unknown processor"


def read_choice(folder: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was chosen before for the same request on this kind of processor."""
    path = _choice_path(folder, request)
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def write_choice(folder: Path, request: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
    """Remember a choice."""
    write_json(_choice_path(folder, request), choice)


def _choice_path(folder: Path, request: Mapping[str, Any]) -> Path:
    """Return the file that remembers what was chosen for a request."""
    text = json.dumps({**request, "processor": processor()}, sort_keys=True)
    return folder / f"choice-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
