"""Convert a checkpoint that the safe reader refuses into a safetensors file.

    python scripts/convert_checkpoint.py old.pth new.safetensors
    python scripts/convert_checkpoint.py --i-trust-this-file old.pth new.safetensors

Some checkpoints can only be read by running code that they bring along or name: whole models,
NumPy values, classes of a training script. The package never does that. This script does, for a
file whose origin you trust, and keeps nothing of it but the tensors: the file is unpickled in a
process of its own, without your environment variables and, where the system lets it, without a
network; what that process wrote is then read with the safe reader and written anew. It can still
do whatever your user may do on this machine. Files that load safely need no flag and run nothing.

Exit codes: 0 converted; 1 the job failed; 2 wrong usage or bad input. On failure nothing is left.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbones.weights import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
# What Python itself and PyTorch's libraries may need to start.
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "OMP_NUM_THREADS")
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
RESULT = "result.pth"
MAX_DEPTH = 8
MAX_OUTPUT = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", type=Path, help="the checkpoint to convert")
    parser.add_argument("target", metavar="OUT.safetensors", type=Path, help="the file to write")
    parser.add_argument(
        "--i-trust-this-file",
        action="store_true",
        help="run the code that IN asks for, in a separate process",
    )
    parser.add_argument(
        "--import-from",
        metavar="FOLDER",
        type=Path,
        action="append",
        default=[],
        help="where the classes are that IN names; may be given several times",
    )
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds the process may take; default: 600"
    )
    options = parser.parse_args(argv)
    try:
        return convert(options)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.code


class Problem(Exception):
    """Something that ends the conversion, with the exit code it ends with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def convert(options: argparse.Namespace) -> int:
    """Convert `options.source` to `options.target`."""
    from backbones.errors import BackbonesError, CheckpointError
    from backbones.weights import read_checkpoint

    source, target = options.source, options.target
    if target.suffix != ".safetensors" or target.is_dir() or not target.parent.is_dir():
        raise Problem(f"{target}: give a name ending in .safetensors in an existing folder", 2)
    if target.exists() and source.exists() and target.samefile(source):
        raise Problem(f"{target}: is the file to be converted; give another name", 2)
    try:
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent.resolve()) as name:
            folder = Path(name)
            try:
                checkpoint = read_checkpoint(source)
            except CheckpointError as error:
                if not options.i_trust_this_file:
                    raise Problem(
                        f"{error}\n(only with --i-trust-this-file is its code run)", 2
                    ) from error
                run_child(options, folder)
                checkpoint = read_result(folder / RESULT, source)
            count = write(checkpoint.tensors, source, folder / "out.safetensors")
            read_checkpoint(folder / "out.safetensors")
            os.replace(folder / "out.safetensors", target)
    except BackbonesError as error:
        raise Problem(str(error), 2) from error
    except OSError as error:
        raise Problem(f"{target}: cannot be written ({error})", 1) from error
    print(f"{target}: {count} tensors of {source}")
    return 0


def read_result(path: Path, source: Path) -> Checkpoint:
    """Read what the process left, as safely as any other file."""
    from backbones.errors import CheckpointError
    from backbones.weights import read_checkpoint

    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), str(source))) from error


def write(tensors: Mapping[str, Any], source: Path, path: Path) -> int:
    """Write tensors, with the digest of the file they come from; flushed to the disk."""
    import safetensors.torch
    import torch

    with source.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    metadata = {"format": "pt", "converted_from": source.name, "sha256": digest.hexdigest()}
    # The format knows neither shared memory nor strides, so each is copied.
    plain = {
        key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    path.touch()
    mode = path.stat().st_mode  # what the user's umask gives; save_file makes it private
    try:
        safetensors.torch.save_file(plain, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    return len(plain)


def run_child(options: argparse.Namespace, folder: Path) -> None:
    """Have the file unpickled in another process, which leaves its tensors in `folder`."""
    environment = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ}
    environment |= {"HOME": str(folder), "TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", str(Path(__file__).resolve()), "--in-child"]
    command += [str(options.source.resolve()), str(folder)]
    command += [str(path.resolve()) for path in options.import_from]
    # A file, no pipe: what the process started may hold that open for as long as it likes.
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            code = child.wait(options.timeout)
        except subprocess.TimeoutExpired as error:
            raise Problem(
                f"{options.source}: took over {options.timeout:g} s; stopped", 1
            ) from error
        finally:
            # Whatever it started in its session goes with it.
            with contextlib.suppress(ProcessLookupError, AttributeError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.wait()
        output.seek(0)
        notes = output.read(MAX_OUTPUT).decode(errors="replace").strip().splitlines()
    notes = ["".join(c for c in line if c.isprintable())[:500] for line in notes]
    for line in notes:
        if line.startswith("note: "):
            print(line, file=sys.stderr)
    if code or not (folder / RESULT).is_file():
        reason = notes[-1] if notes else f"exit code {code}"
        raise Problem(f"{options.source}: cannot be converted: {reason}", 2)


def in_child(source: str, folder: str, *import_from: str) -> int:
    """Unpickle a file, with whatever it runs, and write its tensors."""
    cut_network()
    sys.path[:0] = import_from
    import torch

    try:
        content: Any = torch.load(source, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, RuntimeError) as error:
        with open(source, "rb") as stream:
            if stream.read(1) != b"\x80" or "magic number" not in str(error):
                raise
            stream.seek(0)
            content = pickle.load(stream, encoding="latin1")
    torch.save(only_tensors(content), os.path.join(folder, RESULT))
    return 0


def only_tensors(content: Any, depth: int = 0) -> Any:
    """Return the tensors in a checkpoint's nested mappings; None for everything else."""
    import torch

    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if isinstance(content, torch.Tensor):
        return content.detach().as_subclass(torch.Tensor).clone()
    if not isinstance(content, Mapping) or depth > MAX_DEPTH:
        return None
    kept = {key: only_tensors(value, depth + 1) for key, value in content.items()}
    # Averages are kept by their decay, a number.
    names = (str, float)
    return {
        key: value for key, value in kept.items() if isinstance(key, names) and value is not None
    }


def cut_network() -> None:
    """Leave the network behind, where the system allows a process to do so."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None) if sys.platform == "linux" else None
    if unshare is None or (unshare(CLONE_NEWNET) and unshare(CLONE_NEWUSER | CLONE_NEWNET)):
        print("note: the process could not be cut off the network", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-child"]:
        try:
            sys.exit(in_child(*sys.argv[2:]))
        except Exception as error:  # of the file's own code; the parent shows the line
            sys.exit(f"{type(error).__name__}: {error}")
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
