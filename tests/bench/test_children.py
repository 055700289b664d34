"""Child processes: what they say, how they take turns, how they end."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from backbones.bench.child import Child, ChildError
from backbones.bench.measuring import ROUNDS, STOPPED, Measurement, measure_in_turns


def jobs(*names):
    common = {"do": "load", "threads": 1, "engine": "eager", "input_size": [3, 32, 32]}
    return {name: {**common, "model": {"name": name}} for name in names}


def measured(command, *names, **options):
    return measure_in_turns(
        jobs(*names),
        **{"threads": 1, "seconds": 0.01, "limit_s": 20.0, "command": command, **options},
    )


def events(path):
    return [line.split() for line in path.read_text().splitlines()]


def is_gone(pid, within_s=5.0):
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            os.kill(int(pid), 0)
            # Not ours to reap where its parent was killed; a zombie runs no more.
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_what_libraries_print_does_not_disturb_the_answers(scripted, tmp_path):
    found = measured(scripted({"a": {"ms": 2.0}}), "a")["a"]
    assert found.reason is None
    assert found.turns == [[2.0, 2.02, 2.0]] * ROUNDS
    assert found.peak_mib == 7.0


def test_candidates_take_turns_one_at_a_time(scripted, tmp_path):
    log = tmp_path / "log"
    part = {"log": str(log), "sleep": 0.01}
    measured(scripted({"a": part, "b": part}), "a", "b")
    turns = [event for event in events(log) if event[1] in ("begins", "ends")]
    assert [(name, word) for name, word, *_ in turns] == [
        ("a", "begins"),
        ("a", "ends"),
        ("b", "begins"),
        ("b", "ends"),
    ] * ROUNDS
    assert len({pid for _, _, pid, _ in turns}) == 2
    times = [float(at) for *_, at in turns]
    assert times == sorted(times)


def test_a_child_that_dies_is_quoted_and_the_others_go_on(scripted):
    script = {"a": {"does": "die"}, "b": {"does": "die later"}, "c": {"does": "refuse"}}
    found = measured(scripted(script), "a", "b", "c", "d")
    assert "SIGABRT" in found["a"].reason
    assert "the reason of its death" in found["a"].reason
    assert "exit code 1" in found["b"].reason
    assert "the reason of its later death" in found["b"].reason
    assert "written to the descriptor" in found["b"].reason  # what it printed is quoted, too
    assert found["b"].times is None  # a part of the rounds compares with nothing
    assert found["c"].reason == "this engine cannot do that"
    assert found["c"].kind == "UnsupportedError"
    assert len(found["d"].turns) == ROUNDS


def test_a_child_that_hangs_is_given_up_with_all_that_it_started(scripted, tmp_path):
    log = tmp_path / "log"
    script = {"a": {"does": "hang", "log": str(log)}}
    found = measured(scripted(script), "a", "b", limit_s=1.0)
    assert "did not answer within 1 s" in found["a"].reason
    assert len(found["b"].turns) == ROUNDS
    (_, _, pid, _), (_, spawned, *_) = events(log)
    assert is_gone(pid)
    assert is_gone(spawned.removeprefix("spawned-"))


def test_an_interruption_ends_every_child(scripted, tmp_path):
    log = tmp_path / "log"
    script = {"a": {"log": str(log)}, "b": {"does": "hang", "log": str(log)}}

    def interrupt():
        while not log.exists() or "spawned" not in log.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # Processes that were started in the background, as those of pytest-xdist, ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            measured(scripted(script), "a", "b")
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    pids = {event[2] for event in events(log)}
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)


def test_a_child_leaves_when_its_parent_is_gone(scripted):
    child = Child("a", threads=1, limit_s=20.0, command=scripted({}))
    child.request(jobs("a")["a"])
    child.process.stdin.close()
    assert child.process.wait(10) == 0
    child.close()


def test_a_program_that_is_not_there():
    with pytest.raises(ChildError, match="nowhere cannot be started"):
        Child("a", threads=1, command=["/nowhere"])


def test_a_candidate_may_be_stopped_after_its_warm_up(scripted):
    found = measured(
        scripted({"slow": {"ms": 90.0}}),
        "slow",
        "quick",
        stop=lambda facts: "too slow" if facts["warmup_ms"] > 50 else None,
    )
    assert (found["slow"].reason, found["slow"].kind) == ("too slow", STOPPED)
    assert found["slow"].turns == []
    assert len(found["quick"].turns) == ROUNDS


def test_children_are_told_threads_and_stay_off_the_network(scripted, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    found = measured(scripted({}), "a", threads=3)["a"]
    assert found.facts["environment"]["OMP_NUM_THREADS"] == "3"
    assert found.facts["environment"]["MKL_NUM_THREADS"] == "3"
    assert found.facts["offline"] == "1"


def test_threads_that_were_not_granted_are_told(scripted):
    facts = {"threads": 1, "engine_threads": 2, "cpus": 2}
    found = measured(scripted({"a": {"facts": facts}}), "a", "b", threads=4)
    problems = "\n".join(found["a"].problems("a", 4))
    assert "PyTorch uses 1" in problems
    assert "its engine uses 2" in problems
    assert "only 2 CPUs" in problems
    assert [line for line in found["a"].problems("a", 1) if "PyTorch" in line] == []


def test_a_process_that_spins_while_others_measure_is_told(scripted):
    found = measured(scripted({"a": {"spins": 0.9}, "b": {"spins": 0.1}}), "a", "b")
    assert ["0.9 processors busy" in line for line in found["a"].problems("a", 1)] == [True]
    assert found["b"].problems("b", 1) == []


def test_rough_figures_are_told():
    assert Measurement(turns=[[10.0, 10.5, 11.0]]).problems("a", 1) == []
    (line,) = Measurement(turns=[[10.0, 13.0, 16.0]]).problems("a", 1)
    assert "calls spread by 23%" in line


def test_progress_grows_to_the_end(scripted):
    shares = []
    measured(scripted({}), "a", "b", progress=lambda share, what: shares.append(share))
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.9 < shares[-1] < 1
