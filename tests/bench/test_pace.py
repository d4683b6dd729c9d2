"""Seconds per step: what is timed, in which order, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from farfield.bench.pace import Pace, keep_paces, kept_paces, measure_paces, paced_steps
from farfield.models.language import LanguageConfig, LanguageModel
from farfield.training.loop import TrainConfig, Trainer


def trainers(order: list[str]) -> dict[str, object]:
    def build(name: str) -> Trainer:
        model = LanguageModel(LanguageConfig("dense", dim=8, depth=1, num_heads=2, context=16), seed=0)
        trainer = Trainer(model, np.zeros(64, dtype=np.uint8), TrainConfig(context=16, steps=4))
        run = trainer.run
        trainer.run = lambda **named: (order.append(name), run(**named))[1]  # type: ignore[method-assign]
        return trainer

    return {name: lambda name=name: build(name) for name in ("a", "b")}


def test_steps_are_taken_in_turn_and_the_first_is_not_counted() -> None:
    order: list[str] = []
    turns: list[tuple[int, int]] = []
    paces = measure_paces(trainers(order), turns=3, on_turn=lambda *turn: turns.append(turn))  # type: ignore[arg-type]
    assert order == ["a", "b"] * 4 and turns == [(1, 3), (2, 3), (3, 3)]
    assert paces is not None and all(len(p.seconds) == 3 and min(p.seconds) > 0 for p in paces.values())


@pytest.mark.parametrize("after", [0, 1, 5])
def test_what_is_stopped_gives_nothing(after: int) -> None:
    order: list[str] = []
    assert measure_paces(trainers(order), turns=3, should_stop=lambda: len(order) >= after) is None  # type: ignore[arg-type]


def test_a_slow_turn_does_not_count() -> None:
    assert Pace((1.0, 2.0, 90.0)).median == 2.0
    assert [paced_steps(budget, Pace((0.5, 0.5, 7.0))) for budget in (0.1, 3.0, 3.2, 3.3)] == [1, 6, 6, 7]


def test_what_is_kept_belongs_to_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "pace.json"
    keys = {"a-n16-b1": {"dim": 8}, "b-n16-b1": {"dim": 8}}
    assert kept_paces(path, keys) is None
    paces = {name: Pace((0.5, 0.25)) for name in keys}
    keep_paces(path, paces, keys)
    assert kept_paces(path, keys) == paces
    assert kept_paces(path, {"b-n16-b1": {"dim": 8}}) == {"b-n16-b1": Pace((0.5, 0.25))}
    with pytest.raises(ValueError, match=r"measured a-n16-b1 with {'dim': 8}, now asked for is {'dim': 9}; delete it"):
        kept_paces(path, {"a-n16-b1": {"dim": 9}})
    with pytest.raises(ValueError, match="not of c-n16-b1, and only what was measured in turn compares"):
        kept_paces(path, {"c-n16-b1": {}})
    for text in ("{}", '{"format": "farfield-study-pace/1", "cells": {"a": {"key": {}, "seconds": [0.0]}}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="does not hold seconds per step of farfield study"):
            kept_paces(path, keys)
