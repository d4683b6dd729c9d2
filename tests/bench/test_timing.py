from __future__ import annotations

import pytest
import torch

from farfield.bench.timing import ahead, in_turns, seconds


def test_calls_take_turns() -> None:
    order: list[str] = []

    def call(name: str, value: float) -> float:
        order.append(name)
        return value

    turns: list[int] = []
    times = in_turns({"a": lambda: call("a", 1.0), "b": lambda: call("b", 2.0)}, {"a": 3, "b": 1}, on_turn=turns.append)
    assert "".join(order) == "abaa"
    assert times == {"a": [1.0, 1.0, 1.0], "b": [2.0]}
    assert turns == [1, 2, 3]


def test_stopping_keeps_what_is_timed() -> None:
    done: list[int] = []
    calls = {name: lambda: float(done.append(1) or 1) for name in "ab"}
    times = in_turns(calls, {"a": 5, "b": 5}, should_stop=lambda: len(done) >= 3)
    assert times == {"a": [1.0, 1.0], "b": [1.0]}


def test_forecasts() -> None:
    assert ahead([], 100) == 0.0
    assert ahead([(10, 1.0)], 20) == 4.0
    assert ahead([(10, 1.0), (20, 2.0)], 40) == pytest.approx(4.0)
    assert ahead([(10, 1.0), (20, 8.0)], 40) == pytest.approx(32.0)  # never above quadratic
    assert ahead([(10, 1.0), (20, 1.0)], 40) == pytest.approx(2.0)  # never below linear
    assert ahead([(10, 1.0), (10, 2.0)], 20) == pytest.approx(8.0)


def test_seconds() -> None:
    assert 0 <= seconds(lambda: None, torch.device("cpu")) < 1
