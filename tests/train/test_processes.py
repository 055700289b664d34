"""Runs as real processes: torchrun, Ctrl-C, and timm's way of loading our models in a script."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from train_runs import history

import backbones
from backbones import train
from backbones.train import launch

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

SMALL_AS_TEXT = {"depths": "[1,1,1,1]", "dims": "[8,16,24,32]"}


def arguments(options):
    """Write options as timm's command line has them."""
    result = []
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            flag = flag if value else flag.replace("--", "--no-", 1)
            result.append(flag)
        elif isinstance(value, dict):
            result += [flag, *(f"{k}={v}" for k, v in value.items())]
        elif isinstance(value, (tuple, list)):
            result += [flag, *map(str, value)]
        else:
            result += [flag, str(value)]
    return result


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def torchrun(processes, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), *map(str, argv)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False
    )


def test_two_processes_give_the_losses_of_one(images, tmp_path):
    common = {
        "data_dir": str(images),
        "model": "convnext_atto",
        "pretrained": False,
        "recipe": "none",
        "img_size": 32,
        "epochs": 2,
        "lr": 1e-3,
        "warmup_epochs": 0,
        "no_aug": True,
        "clip_grad": 1.0,
        "output": str(tmp_path),
        "device": "cpu",
    }
    one = train.run(**common, batch_size=16, experiment="one")
    done = torchrun(2, SCRIPT, *arguments({**common, "batch_size": 8, "experiment": "two"}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch 2/2") == 1  # one process speaks for both
    assert len(list(tmp_path.glob("two*"))) == 1
    ours, theirs = history(one.folder), history(tmp_path / "two")
    for key in ("train_loss", "eval_loss", "eval_top1"):
        found = [float(row[key]) for row in theirs]
        assert found == pytest.approx([float(row[key]) for row in ours], abs=1e-5), key
    # Without the exchange of gradients they are not equal.
    half = train.run(**common, batch_size=8, experiment="half")
    assert abs(half.epochs[-1].train_loss - one.epochs[-1].train_loss) > 1e-4


@pytest.mark.slow
def test_two_processes_with_batchnorm_average_and_resume(options, tmp_path):
    common = {**options, "model": "inception_next_atto", "model_kwargs": SMALL_AS_TEXT}
    common |= {"batch_size": 8, "model_ema": True, "device": "cpu"}
    done = torchrun(2, SCRIPT, *arguments(common))
    assert done.returncode == 0, done.stdout + done.stderr
    last = tmp_path / "output" / "run" / "last.pth.tar"
    done = torchrun(2, SCRIPT, "--resume", last, "--epochs", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["epoch"] for row in history(last.parent)] == ["0", "1", "2"]


def test_ctrl_c_leaves_a_checkpoint_that_goes_on(options, tmp_path):
    plain = {
        **options,
        "epochs": 40,
        "model_kwargs": {"depths": "[1,1,1,1]", "dims": "[8,16,24,32]"},
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "backbones", "train", *arguments(plain)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # A shell that runs tests in the background has them, and their children, ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in worker.stdout:
        if "epoch 2/40" in line:
            worker.send_signal(signal.SIGINT)
            break
    out, err = worker.communicate(timeout=60)
    assert worker.returncode == 130, out + err
    assert "Traceback" not in err
    place, epoch = re.search(r"--resume (\S+) goes on with epoch (\d+)", out).groups()
    done = subprocess.run(
        [sys.executable, "-m", "backbones", "train", "--resume", place, "--epochs", epoch],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output" / "run"
    assert [int(row["epoch"]) for row in history(folder)] == list(range(int(epoch)))
    assert "\r" not in done.stderr  # no bar where no terminal is


def test_any_script_runs_with_our_models_in_timm(tmp_path, capsys):
    """A stand-in for timm's own scripts, which its packages do not contain."""
    (tmp_path / "helper.py").write_text("WORD = 'beside'\n")
    script = tmp_path / "standin.py"
    script.write_text(
        textwrap.dedent("""
        import argparse, sys, timm
        from helper import WORD
        parser = argparse.ArgumentParser()
        parser.add_argument("--model")
        options = parser.parse_args()
        assert __name__ == "__main__" and sys.argv[0].endswith("standin.py")
        print(WORD, sum(p.numel() for p in timm.create_model(options.model).parameters()))
        sys.exit(3)
        """)
    )
    command = [sys.executable, "-m", "backbones.train.launch", str(script), "--model", "lsnet_t"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.split() == ["beside", str(backbones.model_info("lsnet_t").params)]
    assert launch.main([str(tmp_path / "nothing.py")]) == 2
    assert "no such script" in capsys.readouterr().err
    without = [sys.executable, str(script), "--model", "lsnet_t"]
    done = subprocess.run(without, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 1
