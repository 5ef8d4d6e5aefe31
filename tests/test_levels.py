"""Definition 2: levels, clocks and the order by update frequency."""

import json
import math
from fractions import Fraction

import pytest

from nestlearn.levels import EVERY_READ, FROZEN, Clock, Level, order_by_frequency


def test_frequency_is_updates_per_unit_of_time():
    assert Level("memory", 64).frequency == Fraction(1, 64)
    assert Level("attention", EVERY_READ).frequency == math.inf
    assert Level("embedding", FROZEN).frequency == 0
    assert Level("a", 2).faster_than(Level("b", 3))
    assert not Level("a", 3).faster_than(Level("b", 3))


@pytest.mark.parametrize("period", [-1, 1.5, True, "4", -math.inf, math.nan])
def test_bad_period(period):
    with pytest.raises(ValueError, match="period of level 'm'"):
        Level("m", period)


def test_bad_unit():
    with pytest.raises(ValueError, match="'token' or 'step', got 'batch'"):
        Level("m", 1, "batch")
    with pytest.raises(ValueError, match="unit of a clock"):
        Clock(unit="batch")


def test_clock_is_due_at_multiples_of_the_period():
    clock = Clock(unit="step")
    level = Level("slow", 4, "step")
    due = []
    for _ in range(12):
        clock = clock.advance()
        if clock.due(level):
            due.append(clock.time)
    assert due == [4, 8, 12]
    assert clock.updates(level) == 3
    assert not Clock(unit="step").due(level)


def test_until_due_never_jumps_over_an_update():
    level = Level("slow", 5, "token")
    for time in range(11):
        clock = Clock(unit="token", time=time)
        reached = clock.advance(clock.until_due(level))
        assert reached.due(level)
        assert reached.updates(level) == clock.updates(level) + 1


def test_clock_of_timeless_parts():
    clock = Clock(unit="token", time=7)
    attention, frozen = Level("attention", EVERY_READ, "step"), Level("embedding", FROZEN, "step")
    assert clock.due(attention)
    assert clock.until_due(attention) == 0
    assert clock.updates(attention) == math.inf
    assert not clock.due(frozen)
    assert clock.until_due(frozen) == math.inf
    assert clock.updates(frozen) == 0


def test_clock_survives_json_and_never_runs_back():
    clock = Clock(unit="token", time=3).advance(10**12)
    assert Clock.from_dict(json.loads(json.dumps(clock.to_dict()))) == clock
    with pytest.raises(ValueError, match="only runs forward"):
        clock.advance(-1)
    with pytest.raises(ValueError, match="'unit' and 'time'"):
        Clock.from_dict({"time": 3})
    with pytest.raises(ValueError, match="at least 0"):
        Clock(unit="token", time=-1)


def test_clock_refuses_the_other_unit_and_says_how_to_convert():
    with pytest.raises(ValueError, match=r"counts steps but this clock counts tokens.*in_tokens"):
        Clock(unit="token").due(Level("cms", 4, "step"))


def test_order_fastest_first_and_level_indices():
    parts = [
        Level("embedding", FROZEN),
        Level("cms.slow", 2048),
        Level("memory", 64),
        Level("attention", EVERY_READ),
        Level("projection", 64),
        Level("cms.fast", 512),
    ]
    order = order_by_frequency(parts)
    assert {part.name: i for part, i in order.items()} == {
        "attention": 0,
        "memory": 1,
        "projection": 1,
        "cms.fast": 2,
        "cms.slow": 3,
        "embedding": 4,
    }
    assert [part.name for part in order][:3] == ["attention", "memory", "projection"]


def test_equal_frequency_is_ordered_by_what_needs_what():
    # Momentum moves the weights, so the weights at t need the momentum at t; Adam's two moments need neither.
    parts = [Level("weights", 1, "step"), Level("first", 1, "step"), Level("second", 1, "step")]
    order = order_by_frequency(parts, {"weights": ["first", "second"]})
    assert {part.name: i for part, i in order.items()} == {"first": 0, "second": 0, "weights": 1}


def test_frequency_outranks_dependence():
    parts = [Level("fast", 1), Level("slow", 8)]
    assert list(order_by_frequency(parts, {"fast": ["slow"]})) == parts


def test_dependence_passes_through_other_frequencies():
    parts = [Level("c", 2), Level("b", 4), Level("a", 2)]
    order = order_by_frequency(parts, {"c": ["b"], "b": ["a"]})
    assert {part.name: i for part, i in order.items()} == {"a": 0, "c": 1, "b": 2}


def test_units_never_mix_until_converted():
    memory, cms, frozen = Level("memory", 64, "token"), Level("cms", 4, "step"), Level("bias", FROZEN, "step")
    with pytest.raises(ValueError, match=r"'memory' counts tokens and level 'cms' counts optimizer steps.*in_tokens"):
        order_by_frequency([memory, cms])
    with pytest.raises(ValueError, match="no common frequency"):
        memory.faster_than(cms)
    assert list(order_by_frequency([frozen, memory])) == [memory, frozen]
    assert cms.in_tokens(1024) == Level("cms", 4096, "token")
    assert list(order_by_frequency([cms.in_tokens(1024), memory])) == [memory, cms.in_tokens(1024)]
    assert frozen.in_tokens(1024).period == FROZEN
    with pytest.raises(ValueError, match="tokens_per_step"):
        cms.in_tokens(0)


def test_order_errors_name_the_parts():
    a, b = Level("a", 1), Level("b", 1)
    with pytest.raises(ValueError, match="more than once: a"):
        order_by_frequency([a, Level("a", 2)])
    with pytest.raises(ValueError, match="do not exist: c"):
        order_by_frequency([a, b], {"a": ["c"]})
    with pytest.raises(ValueError, match="do not exist: c"):
        order_by_frequency([a, b], {"c": ["a"]})
    with pytest.raises(ValueError, match="needs its own state"):
        order_by_frequency([a, b], {"a": ["b"], "b": ["a"]})
    assert order_by_frequency([]) == {}
