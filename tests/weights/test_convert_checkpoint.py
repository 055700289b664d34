"""The script that converts what the safe reader refuses, in a process of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from torch import nn

from backbones.errors import UnsafeCheckpointError
from backbones.weights import read_checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"
spec = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
assert spec is not None and spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
TRUST = "--i-trust-this-file"
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2).half()}


class Code:
    """Unpickles to a call of `eval`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (self.text,)


def convert(*arguments: object) -> int:
    return script.main([str(argument) for argument in arguments])


def blocked(path: Path, **content: object) -> Path:
    torch.save(content, path)
    with pytest.raises(UnsafeCheckpointError):
        read_checkpoint(path)
    return path


def test_from_the_command_line(tmp_path: Path) -> None:
    """As the refusal advises; with averages, by-catch and provenance."""
    average = {key: value + 1 for key, value in STATE.items()}
    source = blocked(
        tmp_path / "old.pth",
        model=STATE,
        model_ema=average,
        best=np.float64(81.5),
        optimizer={"lr": np.float32(0.1), "state": {0: {"exp_avg": torch.ones(9)}}},
    )
    target = tmp_path / "new.safetensors"
    command = [sys.executable, str(SCRIPT), TRUST, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (0, f"{target}: 2 tensors of {source}\n"), done.stderr
    checkpoint = read_checkpoint(target)
    assert checkpoint.tensors.keys() == average.keys()
    for key, value in average.items():
        assert checkpoint.tensors[key].dtype == value.dtype
        assert torch.equal(checkpoint.tensors[key], value)
    assert checkpoint.metadata["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert checkpoint.metadata["converted_from"] == "old.pth"
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata()["format"] == "pt"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    assert {path.name for path in tmp_path.iterdir()} == {"old.pth", "new.safetensors"}


def test_nothing_is_run_without_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mark = tmp_path / "mark"
    source = blocked(tmp_path / "old.pth", model=STATE, x=Code(f"open({str(mark)!r}, 'w')"))
    assert convert(source, tmp_path / "new.safetensors") == 2
    message = capsys.readouterr().err
    assert "builtins.eval" in message and TRUST in message
    assert list(tmp_path.iterdir()) == [source]


def test_safe_files_need_no_flag_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "run_child", lambda *_: pytest.fail("ran"))
    shared = torch.arange(6.0)
    tensors = {"a": shared.view(2, 3).t(), "b": shared[2:]}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "old.pth")
    for flag in ([], [TRUST]):
        assert convert(*flag, tmp_path / "old.pth", tmp_path / "new.safetensors") == 0
        converted = read_checkpoint(tmp_path / "new.safetensors").tensors
        assert all(torch.equal(converted[key], value) for key, value in tensors.items())


PROBE = """
[open(FOLDER + '/environment', 'w').write(repr(dict(__import__('os').environ))),
 open(FOLDER + '/place', 'w').write(__import__('os').getcwd()),
 open(FOLDER + '/process', 'w').write(str(__import__('os').getpid())),
 open(FOLDER + '/network', 'w').write(str(
     __import__('socket').socket().connect_ex(('127.0.0.1', PORT)))),
 __import__('subprocess').Popen(['sleep', '300']).pid and 0][-1]
"""


@pytest.mark.timeout(120)
def test_what_the_process_is_kept_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It runs elsewhere, sees no secrets and no network, and leaves no process behind."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = PROBE.replace("FOLDER", repr(str(tmp_path)))
        text = text.replace("PORT", str(server.getsockname()[1]))
        source = blocked(tmp_path / "old.pth", model=STATE, x=Code(text.replace("\n", "")))
        assert convert(TRUST, source, tmp_path / "new.safetensors") == 0
    environment = (tmp_path / "environment").read_text()
    assert "secret" not in environment and "PYTHONPATH" not in environment
    place, process = (tmp_path / "place").read_text(), (tmp_path / "process").read_text()
    assert place.startswith(str(tmp_path / ".convert-")) and not Path(place).exists()
    assert int(process) != os.getpid()
    # Its whole session was ended, the `sleep` in it too.
    assert not sessions_of(int(process))
    reached = (tmp_path / "network").read_text() == "0"
    assert reached == ("could not be cut off the network" in capsys.readouterr().err)


def sessions_of(leader: int) -> list[str]:
    """Processes still alive in a session."""
    alive = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, facts = (folder / "stat").read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, session = facts.split()[:4]
        if int(session) == leader and state != "Z":
            alive.append(name)
    return alive


def test_whole_models_and_classes_of_ones_own(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "theirs.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.a = torch.nn.Linear(3, 2)\n"
    )
    sys.path.insert(0, str(code))
    try:
        import theirs  # type: ignore[import-not-found]

        model = theirs.Net()
        source = blocked(tmp_path / "old.pth", model=model, epoch=1)
    finally:
        sys.path.remove(str(code))
        sys.modules.pop("theirs", None)
    target = tmp_path / "new.safetensors"
    assert convert(TRUST, source, target) == 2  # where the class is has to be said
    assert not target.exists()
    assert convert(TRUST, "--import-from", code, source, target) == 0
    assert torch.equal(read_checkpoint(target).tensors["a.weight"], model.a.weight)


def in_a_plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": STATE, "x": np.float64(1)}, 2))


def in_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


@pytest.mark.slow
@pytest.mark.parametrize("write", [in_a_plain_pickle, in_torchscript])
def test_other_formats(tmp_path: Path, write) -> None:
    write(tmp_path / "old.pth")
    assert convert(TRUST, tmp_path / "old.pth", tmp_path / "new.safetensors") == 0
    assert len(read_checkpoint(tmp_path / "new.safetensors").tensors) == 2


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = tmp_path / "good.safetensors"
    torch.save(STATE, good)
    before = good.read_bytes()
    for source, target, message in [
        (good, tmp_path / "new.pth", "ending in .safetensors"),
        (good, tmp_path / "none" / "new.safetensors", "existing folder"),
        (good, good, "the file to be converted"),
        (tmp_path / "none.pth", tmp_path / "new.safetensors", "no such file"),
    ]:
        assert convert(source, target) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        convert(good)
    assert caught.value.code == 2
    assert good.read_bytes() == before
    assert list(tmp_path.iterdir()) == [good]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("1/0", 2, "ZeroDivisionError"),
        ("__import__('os').kill(__import__('os').getpid(), 9)", 2, "exit code -9"),
        ("__import__('time').sleep(300)", 1, "took over 5 s"),
        # A process that writes what it likes in place of the tensors gains nothing.
        (
            "[open('result.pth', 'wb').write(b'PK' + bytes(99)), __import__('os')._exit(0)]",
            2,
            "neither safetensors nor",
        ),
    ],
)
def test_bad_files_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str, code: int, message: str
) -> None:
    source = blocked(tmp_path / "old.pth", model=STATE, x=Code(text))
    target = tmp_path / "new.safetensors"
    target.write_bytes(b"older")
    assert convert(TRUST, "--timeout", 5 if code == 1 else 600, source, target) == code
    error = capsys.readouterr().err
    assert message in error and str(source) in error and "result.pth:" not in error
    assert target.read_bytes() == b"older"
    assert {path.name for path in tmp_path.iterdir()} == {"old.pth", "new.safetensors"}


def test_a_full_disk_is_no_fault_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A write that fails ends with 1 and leaves nothing."""
    torch.save({"a": torch.ones(1 << 16)}, tmp_path / "old.pth")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        assert convert(tmp_path / "old.pth", tmp_path / "new.safetensors") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be written" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"old.pth"}
