"""Files of rows: what they hold, and that whatever happens on the way no row is lost or doubled."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
from collections_of_images import CLASSES, json_rows, small_model, write_pictures

import backbones
from backbones.cli import main
from backbones.errors import ConfigError, DataError, UnsupportedError
from backbones.inference import FORMATS, embed, predict, save_predictions

COUNT = 61


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paths = write_pictures(folder, COUNT)
    paths[7].write_bytes(paths[7].read_bytes()[:50])
    return folder


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    backbones.save_checkpoint(model, path, classes=CLASSES)
    return path


@pytest.fixture(scope="module")
def whole(checkpoint, photos, tmp_path_factory):
    """The rows of a run that nothing disturbs."""
    path = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    save_predictions(photos, checkpoint, path, top_k=2, batch_size=4, threads=1)
    return path.read_bytes()


def test_csv(model, photos, tmp_path):
    rows = list(predict(photos, model, top_k=2, classes=CLASSES))
    path = tmp_path / "rows.csv"
    summary = save_predictions(photos, model, path, top_k=2, classes=CLASSES, include_index=True)
    assert summary.complete
    assert (summary.images, summary.bad, summary.missing) == (COUNT, 1, 0)
    with path.open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert list(table[0])[:4] == ["path", "class_1", "index_1", "probability_1"]
    for row, cells in zip(rows, table, strict=True):
        assert cells["path"] == row.path
        assert cells["error"] == (row.error or "")
        for i, one in enumerate(row.predictions, start=1):
            assert cells[f"class_{i}"] == one.name
            assert int(cells[f"index_{i}"]) == one.index
            assert float(cells[f"probability_{i}"]) == pytest.approx(one.probability, rel=1e-5)
    one = tmp_path / "one.csv"
    save_predictions(photos, model, one, top_k=1)
    assert one.read_text().splitlines()[0] == "path,class,probability,error"
    with pytest.raises(UnsupportedError, match=r"embeddings; name the output \.npz"):
        save_predictions(photos, model, path, features=True)


def test_json_lines_and_parquet(model, photos, tmp_path):
    rows = [row.as_dict() for row in predict(photos, model, top_k=3)]
    save_predictions(photos, model, tmp_path / "rows.jsonl", top_k=3)
    assert json_rows(tmp_path / "rows.jsonl") == rows
    save_predictions(photos, model, tmp_path / "rows.parquet", top_k=3)
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [one["path"] for one in table] == [one["path"] for one in rows]
    for found, row in zip(table, rows):
        assert found["error"] == row.get("error")
        assert found["class"] == [one["class"] for one in row.get("predictions", [])]
        assert found["index"] == [one["index"] for one in row.get("predictions", [])]


def test_embeddings(model, photos, tmp_path):
    rows = list(embed(photos, model))
    expected = np.stack([row.embedding for row in rows if row.error is None])
    save_predictions(photos, model, tmp_path / "e.npz", features=True)
    with np.load(tmp_path / "e.npz") as found:
        assert np.array_equal(found["embeddings"], expected)
        assert found["embeddings"].dtype == np.float32
        assert list(found["paths"]) == [row.path for row in rows if row.error is None]
        assert list(found["bad_paths"]) == [rows[7].path]
        assert "cut short" in found["errors"][0]
    save_predictions(photos, model, tmp_path / "e.parquet", features=True)
    table = pyarrow.parquet.read_table(tmp_path / "e.parquet")["embedding"].to_pylist()
    assert table[7] is None
    assert np.allclose(np.array([one for one in table if one]), expected)


def test_predictions_as_arrays(model, photos, tmp_path):
    save_predictions(photos, model, tmp_path / "p.npz", top_k=2, classes=CLASSES)
    with np.load(tmp_path / "p.npz") as found:
        assert found["indices"].shape == found["probabilities"].shape == (COUNT - 1, 2)
        assert [CLASSES[i] for i in found["indices"][:, 0]] == list(found["classes"][:, 0])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("features", [False, True])
def test_parts_join_to_the_same_file(model, photos, tmp_path, suffix, features, monkeypatch):
    if features and suffix == ".csv":
        pytest.skip("has no place for embeddings")
    one, several = tmp_path / f"one{suffix}", tmp_path / f"several{suffix}"
    save_predictions(photos, model, one, features=features, batch_size=4)
    monkeypatch.setattr("backbones.inference.journal._ROWS", 8)
    save_predictions(photos, model, several, features=features, batch_size=4)
    if suffix == ".npz":
        with np.load(one) as a, np.load(several) as b:
            assert set(a) == set(b)
            for name in a:
                assert np.array_equal(a[name], b[name]), name
    elif suffix == ".parquet":
        read = pyarrow.parquet.read_table
        assert read(one).equals(read(several))
    else:
        assert one.read_bytes() == several.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [one.name, several.name]


# Writes a part for every batch, takes its time for it, and waits after the part that is named.
SLOWLY = """
import sys, time
from backbones.cli import main
from backbones.inference import journal
journal._ROWS = 4
write = journal.Journal.flush
parts = 0
def flush(self):
    global parts
    time.sleep(0.03)
    write(self)
    print("part", flush=True)
    parts += 1
    if parts == int(sys.argv[1]):
        time.sleep(float(sys.argv[2]))
journal.Journal.flush = flush
sys.exit(main(sys.argv[3:]))
"""


def start_slowly(checkpoint, photos, output, *options, wait_after=0, seconds=60):
    argv = [
        "predict",
        checkpoint,
        photos,
        "--output",
        output,
        "--top-k",
        2,
        "-b",
        4,
        "--threads",
        1,
        *options,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(wait_after), str(seconds), *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Where the tests run in the background, shells have set it to be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def kill_and_resume(checkpoint, photos, output, kills, seed):
    """Kill a run at random moments, go on with it, and return how many rows were done each time."""
    chance, options, done = random.Random(seed), [], []
    for _ in range(kills):
        run = start_slowly(checkpoint, photos, output, *options, wait_after=4)
        for _ in range(chance.randrange(1, 4)):
            run.stdout.readline()
        time.sleep(chance.random() * 0.05)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        if output.exists():
            break
        options = ["--resume"]
        spans = [
            path.stem.split("-") for path in output.with_name(output.name + ".partial").glob("0*")
        ]
        done.append(sum(int(end) - int(first) for first, end in spans))
    return done


def test_killed_and_resumed(checkpoint, photos, whole, tmp_path):
    output = tmp_path / "rows.jsonl"
    done = kill_and_resume(checkpoint, photos, output, 3, seed=0)
    assert done == sorted(done)
    assert 0 < done[0] < COUNT
    assert not output.exists()
    part = min(output.with_name("rows.jsonl.partial").glob("0*"))
    assert json_rows(part) == [
        json.loads(line) for line in whole.splitlines()[: len(json_rows(part))]
    ]
    with pytest.raises(ConfigError, match="--resume goes on"):
        save_predictions(photos, checkpoint, output, top_k=2, batch_size=4, threads=1)
    summary = save_predictions(
        photos, checkpoint, output, top_k=2, batch_size=4, threads=1, resume=True
    )
    assert summary.images == COUNT - done[-1]
    assert output.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    summary = save_predictions(photos, checkpoint, output, top_k=2, resume=True)
    assert "nothing was left to do" in str(summary)
    assert output.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 8))
def test_killed_many_times(checkpoint, photos, whole, tmp_path, seed):
    output = tmp_path / "rows.jsonl"
    kill_and_resume(checkpoint, photos, output, 3, seed)
    if not output.exists():
        save_predictions(photos, checkpoint, output, top_k=2, batch_size=4, threads=1, resume=True)
    assert output.read_bytes() == whole


def test_interrupted(checkpoint, photos, whole, tmp_path):
    output = tmp_path / "rows.jsonl"
    run = start_slowly(checkpoint, photos, output, wait_after=3, seconds=5)
    while len(list(output.with_name("rows.jsonl.partial").glob("0*"))) < 3:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    text = run.communicate(timeout=120)[0]
    assert run.returncode == 130, text
    assert "rows.jsonl.partial holds what is done; --resume goes on" in text
    assert "Traceback" not in text
    assert main(["predict", str(checkpoint), str(photos), "--output", str(output), "--top-k", "2",
                 "-b", "4", "--threads", "1", "--resume"]) == 0  # fmt: skip
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 3}, {"model": "other"}, {"source": "fewer"}, {"features": True}, {"reduce": True}],
)
def test_rows_of_something_else_are_refused(checkpoint, photos, tmp_path, changes):
    output = tmp_path / "rows.jsonl"
    run = {"source": photos, "model": checkpoint, "top_k": 2, **changes}
    if changes.get("model"):
        run["model"] = small_model(depths=[1, 1, 2, 1])
    if changes.get("source"):
        run["source"] = photos / "ant"
    save_predictions(photos, checkpoint, output, top_k=2, batch_size=4, threads=1, share=(0, 2))
    with pytest.raises(ConfigError, match="rows of something else"):
        save_predictions(**run, output=output, batch_size=4, threads=1, resume=True)
    assert not output.exists()


def test_a_full_disk_leaves_whole_rows(checkpoint, photos, whole, tmp_path, monkeypatch):
    output, calls = tmp_path / "rows.jsonl", []
    monkeypatch.setattr("backbones.inference.journal._ROWS", 8)
    from backbones.inference.formats import FORMATS as formats

    write = formats[".jsonl"].write

    def full(self, path, rows):
        calls.append(path)
        if len(calls) == 3:
            path.write_text("half")
            raise OSError(28, "No space left on device")
        write(self, path, rows)

    monkeypatch.setattr(formats[".jsonl"], "write", full)
    with pytest.raises(OSError, match="No space"):
        save_predictions(photos, checkpoint, output, top_k=2, batch_size=4, threads=1)
    monkeypatch.undo()
    assert not output.exists()
    save_predictions(photos, checkpoint, output, top_k=2, batch_size=4, threads=1, resume=True)
    assert output.read_bytes() == whole


def test_two_processes_give_the_file_of_one(checkpoint, photos, whole, tmp_path):
    output = tmp_path / "rows.jsonl"
    argv = [checkpoint, photos, "--output", output, "--top-k", 2, "-b", 4, "--threads", 1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "backbones",
         "predict", *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_lost_share_is_run_again(checkpoint, photos, whole, tmp_path):
    output, common = tmp_path / "rows.jsonl", {"top_k": 2, "batch_size": 4, "threads": 1}
    for share in ((2, 3), (0, 3)):
        summary = save_predictions(photos, checkpoint, output, share=share, **common)
        assert not summary.complete
        assert "--resume" in str(summary)
    assert summary.missing == COUNT - summary.images * 2 or 0 < summary.missing < COUNT
    assert not output.exists()
    summary = save_predictions(photos, checkpoint, output, resume=True, **common)
    assert summary.complete
    assert summary.images < COUNT / 2
    assert output.read_bytes() == whole


def test_a_dataset_of_parts(checkpoint, photos, whole, tmp_path):
    output = tmp_path / "rows.jsonl"
    for share in ((0, 2), (1, 2)):
        save_predictions(
            photos, checkpoint, output, share=share, parts=True, top_k=2, batch_size=4, threads=1
        )
    assert output.is_dir()
    assert b"".join(path.read_bytes() for path in sorted(output.iterdir())) == whole


def test_bad_outputs(checkpoint, photos, tmp_path):
    for name, error, message in (
        ("rows.cvs", UnsupportedError, r"did you mean '\.csv'"),
        ("no/rows.csv", DataError, "no such folder"),
    ):
        with pytest.raises(error, match=message):
            save_predictions(photos, checkpoint, tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        save_predictions(photos, checkpoint, tmp_path / "folder.csv")
    bad = tmp_path / "bad"
    for path in write_pictures(bad, 3):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 3 images"):
        save_predictions(bad, checkpoint, tmp_path / "rows.csv")
    assert not (tmp_path / "rows.csv").exists()
    with pytest.raises(ConfigError, match="3 names of classes"):
        save_predictions(photos, checkpoint, tmp_path / "rows.csv", classes=["a", "b", "c"])
    with pytest.raises(ConfigError, match="length is known"):
        save_predictions((path for path in photos.iterdir()), checkpoint, tmp_path / "rows.csv")
    with pytest.raises(DataError):
        save_predictions(photos, checkpoint, tmp_path / "rows.csv", strict=True, batch_size=COUNT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "folder.csv"]
