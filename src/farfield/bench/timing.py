"""Clocks and forecasts: one call timed, several in turn, and what the next size will cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

__all__ = ["ahead", "in_turns", "seconds", "wait"]

K = TypeVar("K", bound=Hashable)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def in_turns(
    calls: Mapping[K, Callable[[], float]],
    turns: Mapping[K, int],
    *,
    on_turn: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[K, list[float]]:
    """Every call once, then every call again, so that a machine that slows down slows all of them.

    Args:
        calls: name -> a call that returns its own seconds.
        turns: how often each is called.
        on_turn: told the number of every turn that is done.
        should_stop: asked between calls; true ends the last turn early.

    Returns:
        The seconds of every call, in order.
    """
    times: dict[K, list[float]] = {name: [] for name in calls}
    for turn in range(max(turns.values(), default=0)):
        for name, call in calls.items():
            if should_stop is not None and should_stop():
                return times
            if turn < turns[name]:
                times[name].append(call())
        if on_turn is not None:
            on_turn(turn + 1)
    return times


def ahead(points: Sequence[tuple[int, float]], size: int) -> float:
    """The value at ``size`` from (size, value) of smaller ones: the last growth goes on, within linear and quadratic.

    Quadratic from a single point, 0 from none.
    """
    if not points:
        return 0.0
    at, value = points[-1]
    power = 2.0
    if len(points) > 1 and points[-2][0] < at:
        before, less = points[-2]
        power = math.log(max(value, 1e-9) / max(less, 1e-9)) / math.log(at / before)
    return value * (size / at) ** min(2.0, max(1.0, power))
