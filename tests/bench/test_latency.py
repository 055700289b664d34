"""Measured latencies."""

import itertools
import time

import pytest
import torch

from backbones.bench import compare_latency, measure
from backbones.errors import ConfigError

QUICK = {"warmup_s": 0.01, "seconds": 0.1}


def test_times_are_those_of_the_function():
    latency = measure(time.sleep, 0.004, **QUICK)
    assert 4 <= latency.median_ms <= latency.p90_ms
    assert latency.median_ms < 40
    assert latency.runs >= 10


def test_the_slower_of_two_is_told():
    pauses = {"short": lambda _: time.sleep(0.002), "long": lambda _: time.sleep(0.02)}
    found = compare_latency(pauses, None, **QUICK)
    assert found["short"].median_ms < found["long"].median_ms


def test_candidates_take_turns_after_warm_up(monkeypatch):
    clock = itertools.count(step=0.01)  # a hundredth of a second from look to look
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls = []
    candidates = {name: lambda _, name=name: calls.append(name) for name in "ab"}
    found = compare_latency(candidates, None, warmup_s=0, seconds=0)
    runs = [(name, len(list(run))) for name, run in itertools.groupby(calls)]
    assert [name for name, _ in runs] == list("ab" * 3)  # warm-up, then two turns each
    assert [count for _, count in runs[:2]] == [2, 2]
    counted = found["a"].runs // 2
    assert counted >= 5
    assert all(count > counted + 1 for _, count in runs[2:])  # others settle the caches first


def test_threads_are_set_meanwhile_only():
    before = torch.get_num_threads()
    seen = set()
    other = before + 1
    latency = measure(lambda _: seen.add(torch.get_num_threads()), None, threads=other, **QUICK)
    assert seen == {other}
    assert latency.threads == other
    assert torch.get_num_threads() == before


def test_no_gradients_are_recorded():
    weight = torch.ones(2, requires_grad=True)
    graphs = []
    measure(lambda x: graphs.append((x * weight).requires_grad), torch.ones(2), **QUICK)
    assert not any(graphs)


def test_nothing_to_measure_and_no_threads():
    with pytest.raises(ConfigError, match="no candidates"):
        compare_latency({}, None)
    with pytest.raises(ConfigError, match="threads"):
        measure(print, None, threads=0)
