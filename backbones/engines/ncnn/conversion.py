"""From PyTorch to ncnn's two files, by ncnn's own converter pnnx."""

import re
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from backbones.engines.formats import Conversion, FormatConfig
from backbones.engines.ncnn.spelling import Respelled
from backbones.engines.preparation import contiguous_copy
from backbones.engines.rewrites import rewrite_for_graphs
from backbones.engines.runners import explained
from backbones.engines.verification import as_list
from backbones.errors import ExportError, UnsupportedError
from backbones.families.spartan import ChannelMixer
from backbones.files import write_json
from backbones.optional import optional_import

__all__ = ["NcnnConfig", "beside", "to_ncnn"]

_PRODUCTS = "pnnxparam pnnxbin pnnxpy pnnxonnx ncnnparam ncnnbin ncnnpy".split()
_KNOWN = re.compile(r"[A-Za-z0-9]+")  # an operation of ncnn; of PyTorch it would have a dot


@dataclass(frozen=True)
class NcnnConfig(FormatConfig):
    """ncnn by pnnx: ``<name>.ncnn.param``, the weights ``.bin``, and a description ``.json``."""


def beside(path: Path, suffix: str) -> Path:
    """Return the place of another file that belongs to ``<name>.param`` or ``<name>.ncnn.param``.

    The suffix ``.bin`` alone would be that of OpenVINO's weights.
    """
    name = path.name.removesuffix(".param").removesuffix(".ncnn")
    return path.with_name(f"{name}.ncnn{suffix}")


def to_ncnn(conversion: Conversion, config: NcnnConfig, path: Path) -> None:
    """Write the graph and, beside it, the weights and a description of what goes in and comes out.

    A file takes one image, ``in0`` (C, H, W), and gives ``out0``, ``out1``, ... In fp16 the weights
    of convolutions and linear layers are stored in that type.

    Raises:
        UnsupportedError: preprocessing in the file, which takes no decoded images.
        ExportError: pnnx failed, or left operations that ncnn does not have.
    """
    if conversion.raw:
        raise UnsupportedError(
            f"{path.name}: ncnn takes no decoded images; leave preprocess out: the description"
            " beside the file has the values for ncnn's substract_mean_normalize"
        )
    with TemporaryDirectory(dir=path.parent) as folder:
        graph, weights = _converted(conversion, Path(folder), path.name)
        unknown = sorted({one for one in _operations(graph) if not _KNOWN.fullmatch(one)})
        if unknown:
            raise ExportError(
                f"{path.name}: ncnn has no operation for {', '.join(unknown)} in"
                f" {type(conversion.model).__name__}; export it to another format"
            )
        graph.replace(path)
        weights.replace(beside(path, ".bin"))
    facts = {**conversion.metadata, "free_batch": "batch" in conversion.dynamic}
    facts["batch"] = len(conversion.example)
    write_json(beside(path, ".json"), {**facts, **_ends(conversion)})


def _ends(conversion: Conversion) -> dict[str, Any]:
    """Return the blobs of the input and the outputs, and how 8-bit pixels are normalized."""
    mean, std = (conversion.metadata["input"][name] for name in ("mean", "std"))
    return {
        "blobs": {"input": "in0", "outputs": [f"out{i}" for i in range(len(conversion.outputs))]},
        "mean_vals": [255 * value for value in mean],
        "norm_vals": [1 / (255 * value) for value in std],
    }


def _converted(conversion: Conversion, folder: Path, name: str) -> tuple[Path, Path]:
    """Return the graph and the weights that pnnx writes to a folder."""
    pnnx = optional_import("pnnx", "ncnn")
    folder = folder.resolve()  # pnnx runs there, and is told paths
    files = {product: folder / f"{product}.out" for product in _PRODUCTS}
    program = folder / "traced.pt"
    with explained(f"{name}: PyTorch cannot trace the model"):
        shape = _trace(conversion, program)
    command = [
        pnnx.EXEC_PATH,
        str(program),
        f"inputshape=[{shape}]f32",
        f"fp16={int(conversion.precision == 'fp16')}",
        *(f"{product}={file}" for product, file in files.items()),
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    graph, weights = files["ncnnparam"], files["ncnnbin"]
    if done.returncode or not graph.is_file() or not weights.is_file():
        words = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise ExportError(f"{name}: pnnx failed (exit status {done.returncode}): {words[0]}")
    return graph, weights


class _AsTuple(nn.Module):
    """A model whose outputs are a tuple: of a list pnnx makes an operation of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(as_list(self.model(x)))


def _trace(conversion: Conversion, file: Path) -> str:
    """Save the model as TorchScript for one image; return the input's shape as pnnx spells it."""
    # ncnn has norms over channels, but does not choose channels by numbers.
    model = rewrite_for_graphs(conversion.model, decompose=[ChannelMixer])
    model = _AsTuple(contiguous_copy(model)).eval()
    x = conversion.example[:1].contiguous()
    with torch.no_grad(), warnings.catch_warnings(), Respelled():
        warnings.simplefilter("ignore")  # that a trace is for one size, and deprecated
        torch.jit.trace(model, x, check_trace=False).save(str(file))
    return ",".join(str(size) for size in x.shape)


def _operations(graph: Path) -> list[str]:
    """Return the operations of a graph in order."""
    return [line.split()[0] for line in graph.read_text(encoding="utf-8").splitlines()[2:] if line]
