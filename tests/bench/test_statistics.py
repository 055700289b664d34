"""When two candidates can be told apart."""

import pytest

from backbones.bench.report import verdict_on
from backbones.bench.statistics import Times, _sign_test, certain, too_noisy


def times(*medians, width=0.02):
    """Turns of three calls around their medians."""
    return Times([[m * (1 - width), m, m * (1 + width)] for m in medians])


FLAT = times(*[10.0] * 12)


def test_figures():
    found = Times([[1.0, 2.0, 3.0], [4.0, 5.0]])
    assert (found.median, found.turn_medians) == (3.0, [2.0, 4.5])
    assert found.p90 == pytest.approx(4.6)
    assert found.spread == pytest.approx(2 / 3)


def test_a_small_but_steady_difference_is_certain():
    assert certain(FLAT, times(*[10.5] * 12))
    assert certain(times(*[10.5] * 12), FLAT)
    assert too_noisy("a", FLAT, "b", times(*[10.5] * 12)) is None


def test_drift_that_falls_on_both_does_not_matter():
    load = [10, 10.4, 10.8, 11.2, 11.6, 12, 12, 11.6, 11.2, 10.8, 10.4, 10]
    assert certain(times(*load), times(*[1.04 * ms for ms in load]))


def test_turns_that_go_either_way_are_not():
    other = times(*[9.9, 10.3] * 6)
    assert not certain(FLAT, other)
    assert "the faster one won only 6 of 12 rounds" in too_noisy("a", FLAT, "b", other)


@pytest.mark.parametrize(("wins", "sure"), [(12, True), (10, True), (9, False)])
def test_how_many_rounds_must_be_won(wins, sure):
    assert certain(FLAT, times(*[11.0] * wins, *[9.0] * (12 - wins))) is sure


@pytest.mark.parametrize(("wins", "sure"), [(32, True), (30, False)])
def test_many_rounds_do_not_make_up_for_a_share_that_is_lost(wins, sure):
    flat = times(*[10.0] * 40)
    assert certain(flat, times(*[11.0] * wins, *[9.0] * (40 - wins))) is sure


@pytest.mark.parametrize(("rounds", "sure"), [(5, False), (6, True)])
def test_few_rounds_prove_nothing(rounds, sure):
    assert certain(times(*[10.0] * rounds), times(*[11.0] * rounds)) is sure


def test_equal_candidates_cannot_be_told_apart():
    assert not certain(FLAT, FLAT)


def test_a_wide_spread_needs_a_wider_difference():
    wide = {"width": 0.25}
    assert not certain(times(*[10.0] * 12, **wide), times(*[11.0] * 12, **wide))
    assert certain(times(*[10.0] * 12, **wide), times(*[16.0] * 12, **wide))


def test_sign_test_of_a_coin():
    assert _sign_test(6, 6) == 2 / 64
    assert _sign_test(5, 5) == 2 / 32
    assert _sign_test(1, 6) == _sign_test(5, 6) == 14 / 64
    assert _sign_test(3, 6) == _sign_test(0, 0) == 1


def test_verdicts():
    slow = times(*[20.0] * 12)
    text, sure = verdict_on({"slow": slow, "flat": FLAT})
    assert (text, sure) == ("flat is the fastest, 2.00 times as fast as slow", True)
    text, sure = verdict_on({"slow": slow, "flat": FLAT, "same": times(*[9.9, 10.3] * 6)})
    assert "too noisy to tell flat from same" in text
    assert sure is False
    assert verdict_on({"flat": FLAT}) == ("only flat was measured", None)
    assert verdict_on({}) == ("nothing could be measured", None)
