"""Accuracy against latency, and budgets."""

import csv
import functools
import json
import math

import pytest
from PIL import Image

import backbones
from backbones.bench import (
    ParetoRow,
    front_as_dict,
    parse_budget,
    within,
    write_front,
)
from backbones.bench.machine import examine
from backbones.bench.measuring import measure_in_turns
from backbones.bench.pareto import mark_front, sweep
from backbones.cli import main
from backbones.errors import ConfigError, MissingDependencyError, UnknownModelError
from backbones.manifest import load_manifest


def row(model, top1, ms, **facts):
    facts = {"p90_ms": ms, "spread": 0.02, "engine": "eager", **facts}
    return ParetoRow(model, top1=top1, median_ms=ms, **facts)


ROWS = [
    row("slow_and_good", 83.0, 30.0),
    row("beaten", 79.0, 12.0),
    row("quick", 75.0, 5.0),
    row("middle", 80.0, 10.0, p90_ms=11.0),
    row("twin", 80.0, 10.0),
    row("unknown", None, 1.0),
    ParetoRow("broken", top1=90.0, reason="its process died"),
    row("given_up", 90.0, 90.0, stopped=True, reason="given up"),
]


@pytest.fixture
def scripted_front(scripted, monkeypatch):
    """Return `front` with workers that follow a script."""

    def run(script, models, **options):
        command = scripted(script)
        turns = functools.partial(measure_in_turns, command=command)
        monkeypatch.setattr(sweep, "measure_in_turns", turns)
        monkeypatch.setattr(sweep, "examine", functools.partial(examine, command=command))
        return sweep.front(models, **{"engine": "published", "threads": 1, **options})

    return run


def test_the_front_is_what_no_other_model_beats():
    marked = mark_front([*ROWS, row("no_quicker", 80.0, 11.0), row("no_better", 74.0, 5.0)])
    names = [r.model for r in marked]
    assert names[:4] == ["unknown", "quick", "no_better", "middle"]
    assert names[-1] == "broken"
    on_front = {r.model for r in marked if r.on_front}
    assert on_front == {"quick", "middle", "twin", "slow_and_good"}


@pytest.mark.parametrize(
    ("text", "ms"),
    [("10ms", 10), ("10", 10), ("0.01s", 10), (" 2.5 MS ", 2.5), ("1s", 1000), ("1e-1s", 100)],
)
def test_budgets_are_read(text, ms):
    assert math.isclose(parse_budget(text), ms)


@pytest.mark.parametrize("text", ["", "ms", "0", "-1ms", "10us", "1.2.3", "10 ms or so", "nan"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ConfigError, match="write 10ms, 10 or 0.01s"):
        parse_budget(text)


def test_the_most_accurate_within_the_budget():
    choice = within(ROWS, 12.0)
    assert choice.best.model == "middle"
    assert [r.model for r in choice.others] == ["twin", "beaten", "quick"]
    assert choice.doubts == ()
    assert "within 12 ms: middle, 80 % top-1, 10.00 ms (eager)" in str(choice)
    assert within(ROWS, 30.0).best.model == "slow_and_good"  # what takes just as long is within
    assert within(ROWS, 500.0).best.model == "slow_and_good"  # not what was given up


def test_a_budget_that_nothing_keeps():
    choice = within(ROWS, 4.0)
    assert choice.best is None
    assert "no model answers within 4 ms here; the fastest is quick" in str(choice)
    assert "none with a published top-1 was measured" in str(within([], 4.0))


def test_doubts_about_a_choice():
    assert "p90 11.00 ms" in within(ROWS, 10.5).doubts[0]
    noisy = [row("a", 80.0, 9.0, spread=0.3), row("b", 85.0, 10.5, spread=0.2), row("c", 70.0, 9.9)]
    doubts = "\n".join(within(noisy, 10.0).doubts)
    assert "whether a keeps within 10 ms" in doubts
    assert "whether b keeps within 10 ms" in doubts  # better, and only just missed it
    assert "whether c" not in doubts
    assert within([row("a", 80.0, 5.0, spread=0.3)], 10.0).doubts == ()  # far from the limit


def test_models_that_patterns_and_names_stand_for():
    everything = sweep._expand(None)
    manifest = load_manifest()
    assert set(everything) == {
        name
        for name in backbones.list_models()
        if manifest.find(name) is not None and manifest.find(name).top1 is not None
    }
    assert sweep._expand(["lsnet_*"]) == backbones.list_models("lsnet_*")
    tagged = sweep._expand(["convnext_tiny.*_in22k_ft*"])
    assert tagged
    assert set(tagged) <= set(manifest.entries)
    assert sweep._expand(["resnet18", "lsnet_t", "resnet18"]) == ["resnet18", "lsnet_t"]
    with pytest.raises(UnknownModelError, match="no model matches 'lsmet_"):
        sweep._expand(["lsmet_*"])
    with pytest.raises(ConfigError, match="list of names"):
        sweep._expand("lsnet_t")
    with pytest.raises(ConfigError, match="no models to measure"):
        sweep._expand([])


def test_models_are_measured_the_cheapest_first_at_the_size_of_their_top1(scripted_front, tmp_path):
    log = str(tmp_path / "log")
    script = {
        "convnext_atto": {"ms": 9.0, "log": log},
        "cpubone_nano": {"ms": 3.0, "log": log},
        "convnext_tiny.fb_in22k_ft_in1k_384": {"ms": 50.0, "log": log},
        "resnet18": {"ms": 4.0, "facts": {"input_size": [3, 224, 224]}},
    }
    front = scripted_front(script, list(script))
    starts = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    order = list(dict.fromkeys(starts))
    assert order == ["cpubone_nano", "convnext_atto", "convnext_tiny.fb_in22k_ft_in1k_384"]
    rows = {r.model: r for r in front.rows}
    assert [r.model for r in front.rows] == ["cpubone_nano", "resnet18", *order[1:]]
    entry = load_manifest().find("convnext_tiny", "fb_in22k_ft_in1k_384")
    large = rows[order[2]]
    assert (large.top1, large.tag) == (entry.top1, entry.tag)
    assert large.input_size == large.top1_input_size == (3, 384, 384)
    assert rows["resnet18"].top1 is None
    assert not rows["resnet18"].on_front
    assert front.complete
    assert "another size" not in str(front)


def test_a_size_that_the_top1_is_not_of_is_told(scripted_front):
    front = scripted_front({}, ["cpubone_nano"], input_size=(3, 64, 64))
    assert front.rows[0].input_size == (3, 64, 64)
    assert "top-1 is published for another size than was measured" in str(front)


def test_hopeless_models_are_given_up(scripted_front, tmp_path):
    log = tmp_path / "log"
    script = {
        "cpubone_nano": {"ms": 31.0, "log": str(log)},
        "convnext_atto": {"ms": 29.0},
    }
    front = scripted_front(script, list(script), budget_ms=10.0)
    by_name = {r.model: r for r in front.rows}
    assert by_name["cpubone_nano"].stopped
    assert "begins" not in log.read_text()
    assert not by_name["convnext_atto"].stopped
    assert ">31.00" in str(front)
    assert within(front.rows, 40.0).best.model == "convnext_atto"


def test_commands_whose_budget_nothing_keeps_fail(scripted_front, capsys):
    scripted_front({"cpubone_nano": {"ms": 50.0}}, ["cpubone_nano"])  # the scripted workers stay
    argv = ["bench", "cpubone_nano", "--engine", "published", "--threads", "1", "--budget"]
    assert main([*argv, "60ms"]) == 0
    assert "within 60 ms: cpubone_nano" in capsys.readouterr().out
    assert main([*argv, "10ms"]) == 1
    captured = capsys.readouterr()
    assert "cpubone_nano: given up: a call takes 50 ms even in warm-up" in captured.out
    assert "no model answers within 10 ms" in captured.err
    assert main([*argv, "40ms", "--json"]) == 1
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["choice"]["best"] is None
    assert "no model answers within 40 ms here; the fastest is cpubone_nano" in captured.err
    assert facts["rows"][0]["median_ms"] == 50.0


def test_an_interrupted_command_prints_what_it_has(scripted_front, capsys, monkeypatch):
    models = ["cpubone_nano", "convnext_atto"]
    scripted_front({}, models[:1])
    asked = []

    def interrupt(bar, share, what):
        asked.append(share)
        if share > 0.75:
            raise KeyboardInterrupt

    monkeypatch.setattr("backbones.cli.progress.Bar.show", interrupt)
    argv = ["bench", "--front", *models, "--engine", "published", "--threads", "1"]
    assert main(argv) == 130
    shown = capsys.readouterr().out
    assert "| cpubone_nano" in shown
    assert "incomplete: interrupted before convnext_atto" in shown


def test_a_model_that_fails_is_told_and_the_rest_go_on(scripted_front):
    front = scripted_front({"cpubone_nano": {"does": "die"}}, ["cpubone_nano", "convnext_atto"])
    assert [r.measured for r in front.rows] == [True, False]
    assert "cpubone_nano: its process died" in str(front)


def test_an_interruption_keeps_what_was_measured(scripted_front, tmp_path):
    def interrupt(share, what):
        if share > 0.75:
            raise KeyboardInterrupt

    models = ["cpubone_nano", "convnext_atto"]
    front = scripted_front({}, models, progress=interrupt)
    assert not front.complete
    assert [r.model for r in front.rows] == ["cpubone_nano"]
    assert front.rows[0].measured
    assert front.left_out == ("convnext_atto",)
    assert "incomplete: interrupted before convnext_atto" in str(front)

    def at_once(share, what):
        if share > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scripted_front({}, models, progress=at_once)


def test_bad_options_are_refused_before_anything_is_measured():
    with pytest.raises(UnknownModelError, match="did you mean 'lsnet_t'"):
        sweep.front(["lsnet_tt"], engine="published")
    with pytest.raises(ConfigError, match="no engine 'onnxruntme'; did you mean 'onnxruntime'"):
        sweep.front(["lsnet_t"], engine="onnxruntme")
    with pytest.raises(ConfigError, match="the published form is fp32"):
        sweep.front(["lsnet_t"], engine="published", precision="bf16")
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        sweep.front(["lsnet_t"], engine="published", threads=0)


def test_files(scripted_front, tmp_path):
    script = {"cpubone_nano": {"ms": 3.0}, "convnext_atto": {"ms": 9.0}}
    front = scripted_front(script, list(script))
    choice = within(front.rows, 5.0)
    folder = tmp_path / "new" / "front"
    files = write_front(front, folder, choice)
    assert sorted(path.name for path in folder.iterdir()) == sorted(file.name for file in files)
    assert [file.name for file in files] == ["front.json", "front.csv", "front.png"]
    facts = json.loads(files[0].read_text())
    assert facts == json.loads(json.dumps(front_as_dict(front, choice)))
    assert facts["choice"]["best"]["model"] == "cpubone_nano"
    assert facts["machine"]["matmul_gmacs"] == {"fp32": 100.0}
    with files[1].open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [(r["model"], float(r["median_ms"]), r["input_size"]) for r in table] == [
        ("cpubone_nano", 3.0, "3x224x224"),
        ("convnext_atto", 9.0, "3x224x224"),
    ]
    with Image.open(files[2]) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors(256)) > 20


def test_a_file_that_cannot_be_written_leaves_the_old_one(scripted_front, tmp_path, monkeypatch):
    front = scripted_front({}, ["cpubone_nano"])
    write_front(front, tmp_path)
    before = (tmp_path / "front.json").read_text()

    def fails(front, path, choice):
        path.write_bytes(b"half a pict")
        raise OSError("no space left")

    monkeypatch.setattr("backbones.bench.pareto.files.draw_front", fails)
    with pytest.raises(OSError, match="no space"):
        write_front(front, tmp_path)
    assert (tmp_path / "front.json").read_text() == before
    assert not (tmp_path / "front.png").exists()
    assert not list(tmp_path.glob(".*"))

    def lacks(front, path, choice):
        raise MissingDependencyError("matplotlib")

    monkeypatch.setattr("backbones.bench.pareto.files.draw_front", lacks)
    assert [file.name for file in write_front(front, tmp_path)] == ["front.json", "front.csv"]
