"""What a training step costs: all variants in turn, in one process, before anything is trained.

Equal time by the clock of each run would favour whatever ran while the machine was idle, and no later run could repeat
it. Here one step of every variant is timed, then one step of every variant again; a run gets as many steps as its
budget divided by its median. That can be repeated from the record, and what else the machine does meanwhile slows all
variants alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from farfield.bench.runs import read_json
from farfield.bench.timing import in_turns
from farfield.training.files import write_json
from farfield.training.loop import Trainer

__all__ = ["PACE_FORMAT", "TURNS", "Pace", "keep_paces", "kept_paces", "measure_paces", "paced_steps"]

PACE_FORMAT = "farfield-study-pace/1"
TURNS = 7
"""Timed steps of each variant, after one that is not counted."""

K = TypeVar("K", bound=str)


@dataclass(frozen=True)
class Pace:
    """Seconds per training step of one cell.

    Attributes:
        seconds: of each timed step, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def paced_steps(budget: float, pace: Pace) -> int:
    """Steps that fit into ``budget`` seconds, to the nearest; at least one."""
    return max(1, round(budget / pace.median))


def measure_paces(
    trainers: Mapping[K, Callable[[], Trainer]],
    *,
    turns: int = TURNS,
    should_stop: Callable[[], bool] | None = None,
    on_turn: Callable[[int, int], None] | None = None,
) -> dict[K, Pace] | None:
    """Steps of every trainer in turn.

    Args:
        trainers: name -> what builds a trainer; its configuration must allow ``turns + 1`` steps. All are held at once.
        turns: timed steps of each.
        should_stop: asked between steps.
        on_turn: told how many turns of how many are done.

    Returns:
        The paces; None where it was stopped.
    """
    stop = should_stop or (lambda: False)
    calls = {name: _one_step(build()) for name, build in trainers.items()}
    for call in calls.values():  # tables, memory pages and compiled code are there from the first timed step on
        if stop():
            return None
        call()
    times = in_turns(
        calls,
        dict.fromkeys(calls, turns),
        on_turn=None if on_turn is None else lambda turn: on_turn(turn, turns),
        should_stop=stop,
    )
    if any(len(measured) < turns for measured in times.values()):
        return None
    return {name: Pace(tuple(measured)) for name, measured in times.items()}


def _one_step(trainer: Trainer) -> Callable[[], float]:
    def call() -> float:
        before, wanted = trainer.seconds, trainer.step + 1
        trainer.run(should_stop=lambda: trainer.step >= wanted)
        return trainer.seconds - before

    return call


def keep_paces(path: Path, paces: Mapping[str, Pace], keys: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes what was measured, beside the settings that it was measured with.

    Raises:
        OSError: when that fails.
    """
    cells = {
        name: {"key": dict(keys[name]), "median": pace.median, "seconds": list(pace.seconds)}
        for name, pace in paces.items()
    }
    write_json(path, {"format": PACE_FORMAT, "cells": cells})


def kept_paces(path: Path, keys: Mapping[str, Mapping[str, Any]]) -> dict[str, Pace] | None:
    """What `keep_paces` wrote for these cells; None where there is no such file.

    Raises:
        ValueError: when the file is another, or misses a cell, or was measured with other settings.
    """
    if not path.exists():
        return None
    advice = "delete it, and the runs that it gave their steps, or give another --out"
    values = read_json(path)
    try:
        if values.get("format") != PACE_FORMAT:
            raise ValueError("another format")
        cells = {
            name: (cell["key"], Pace(tuple(map(float, cell["seconds"])))) for name, cell in values["cells"].items()
        }
        if not all(pace.seconds and min(pace.seconds) > 0 for _, pace in cells.values()):
            raise ValueError("steps without seconds")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold seconds per step of farfield study ({error}); {advice}") from error
    missing = [name for name in keys if name not in cells]
    if missing:
        raise ValueError(
            f"{path} has the seconds per step of {', '.join(cells) or 'nothing'}, not of {', '.join(missing)}, and "
            f"only what was measured in turn compares; {advice}"
        )
    for name, key in keys.items():
        if cells[name][0] != key:
            raise ValueError(f"{path} measured {name} with {cells[name][0]}, now asked for is {dict(key)}; {advice}")
    return {name: cells[name][1] for name in keys}
