"""What one attention layer costs, by length: time forward, time forward and backward, peak memory.

The attentions are measured in one run, length by length and turn by turn, so that a machine that slows down slows all
of them. Lengths double from 1,024. An attention leaves the run when its next length would not fit in time or memory,
and the reason is kept: a curve that ends says why it ends.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from farfield.bench.memory import PeakMemory, available_bytes, is_out_of_memory
from farfield.bench.timing import ahead, in_turns, seconds

FIRST_LENGTH = 1024
_OVERSHOOT = 2.0
"""A call may be predicted to take this many times the limit: that is about the last length shown, not a hard wall."""
_MEMORY_SHARE = 0.7
"""Part of the available memory that a projection may fill."""
_LONG = 0.4
"""Seconds from which a call is timed once only, after the warm-up."""
_TURN = 1.4
"""A turn is a forward and backward call and a forward call on top."""


@dataclass(frozen=True)
class CostPoint:
    """One attention at one length. Times are medians in seconds; memory is the rise over the idle process in bytes."""

    attention: str
    length: int
    forward: float
    both: float
    memory: int | None
    repeats: int


@dataclass
class Cost:
    """The result of :func:`measure`.

    Attributes:
        points: every measured length of every attention, in the order of measuring.
        stopped: per attention, why no longer length was tried.
        seconds: wall time of the whole stage.
        dim, heads: width of the layer.
        interrupted: True when the stage was cut short by the user.
    """

    dim: int
    heads: int
    points: list[CostPoint] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False

    def of(self, attention: str) -> list[CostPoint]:
        """The points of one attention by rising length."""
        return sorted((p for p in self.points if p.attention == attention), key=lambda p: p.length)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cost:
        """The inverse of ``dataclasses.asdict`` through JSON."""
        return cls(**{**values, "points": [CostPoint(**point) for point in values["points"]]})


@dataclass
class _Candidate:
    """One attention still in the run, and (length, seconds) and (length, bytes) of what it has run."""

    name: str
    layer: nn.Module
    calls: list[tuple[int, float]] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)


def measure(
    layers: Mapping[str, Callable[[], nn.Module]],
    *,
    dim: int,
    heads: int,
    budget: float = 45.0,
    call_limit: float = 4.0,
    memory_limit: int | None = None,
    first: int = FIRST_LENGTH,
    longest: int = 1 << 20,
    factor: int = 2,
    repeats: int = 3,
    device: torch.device | str = "cpu",
    on_point: Callable[[CostPoint], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Cost:
    """Measures one layer of every attention over growing lengths.

    Inputs are one sequence [1, N, dim] in float32; forward is timed without gradients, forward+backward with gradients
    of the input and of all parameters. The first call of a length warms up and gives the memory; a warm-up longer than
    0.4 s is followed by one timed repeat only.

    Args:
        layers: name -> function that builds a fresh layer, called as ``layer(x)``.
        dim: width of the input.
        heads: heads of the layer, kept for the report.
        budget: seconds for the whole stage; a length that is predicted not to fit is not begun.
        call_limit: seconds of a forward+backward call from which an attention goes no further.
        memory_limit: bytes that a call may need; None takes 70 percent of what is available when the length begins.
        first: the shortest length.
        longest: no length above this one.
        factor: of one length to the one before.
        repeats: timed repeats per length.
        device: where to measure.
        on_point: called after every measured point.
        should_stop: asked before every length; true ends the stage with what is measured, marked interrupted.

    Returns:
        The points, and why each attention stopped; a layer that refuses a length stops there with its own words.

    Complexity:
        bounded by ``budget`` plus one predicted length.
    """
    device = torch.device(device)
    cost = Cost(dim, heads)
    # The first steps of a process load code, for which no layer should pay.
    rows = torch.ones(1, first, dim, device=device)
    _both(nn.Linear(dim, dim).to(device), rows, rows, device)
    began = time.perf_counter()
    alive = [_Candidate(name, build().to(device)) for name, build in layers.items()]
    length = first
    while alive and length <= longest:
        if should_stop is not None and should_stop():
            cost.interrupted = True
            break
        left = budget - (time.perf_counter() - began)
        for candidate in sorted(alive, key=lambda c: ahead(c.calls, length)):  # cheap ones first: they go furthest
            call = ahead(candidate.calls, length)
            needed = _TURN * call * (2 if call > _LONG else 1 + repeats)
            reason = _refuse(candidate, length, call_limit, memory_limit, device)
            if reason is None and needed > left and candidate.calls:
                reason = f"{length:,} would not fit in the {budget:g} s for all measurements"
            if reason is None:
                left -= needed
            else:
                cost.stopped[candidate.name] = reason
                alive.remove(candidate)
        for point in _one_length(alive, length, dim, repeats, device, cost.stopped):
            cost.points.append(point)
            if on_point is not None:
                on_point(point)
        alive = [c for c in alive if c.name not in cost.stopped]
        length *= factor
    for candidate in alive:
        cost.stopped[candidate.name] = (
            "interrupted" if cost.interrupted else f"no longer length than {longest:,} was asked for"
        )
    cost.seconds = time.perf_counter() - began
    return cost


def _refuse(
    candidate: _Candidate,
    length: int,
    call_limit: float,
    memory_limit: int | None,
    device: torch.device,
) -> str | None:
    """Why ``candidate`` must not try ``length``, or None."""
    if not candidate.calls:
        return None
    (before, last), call = candidate.calls[-1], ahead(candidate.calls, length)
    if last > call_limit:
        return f"forward and backward took {last:.1f} s at {before:,}, over the limit of {call_limit:g} s"
    if call > _OVERSHOOT * call_limit:
        return f"forward and backward at {length:,} would take about {call:.0f} s, over the limit of {call_limit:g} s"
    if candidate.memory:
        free = available_bytes(device)
        room = memory_limit if memory_limit is not None else None if free is None else int(_MEMORY_SHARE * free)
        need = ahead(candidate.memory, length)
        if room is not None and need > room:
            wanted, allowed = need / 2**30, room / 2**30
            return f"{length:,} would need about {wanted:.1f} GiB of memory, over the {allowed:.1f} that may be used"
    return None


def _one_length(
    alive: list[_Candidate], length: int, dim: int, repeats: int, device: torch.device, stopped: dict[str, str]
) -> list[CostPoint]:
    """Warm-up with memory for each, then interleaved timed repeats."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(1, length, dim, generator=generator).to(device)
    grad = torch.randn(1, length, dim, generator=generator).to(device)
    turns: dict[str, int] = {}
    memory: dict[str, int | None] = {}
    for candidate in alive:
        try:
            with PeakMemory(device) as peak:
                warm = _both(candidate.layer, x, grad, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            stopped[candidate.name] = f"{length:,} ran out of memory"
            continue
        except ValueError as error:  # a layer that is made for another length
            stopped[candidate.name] = f"{length:,} is refused: {error}"
            continue
        memory[candidate.name] = peak.raised
        turns[candidate.name] = 1 if warm > _LONG else repeats
    calls: dict[tuple[str, bool], Callable[[], float]] = {}
    for candidate in alive:
        if candidate.name in turns:
            calls[candidate.name, False] = partial(_forward, candidate.layer, x, device)
            calls[candidate.name, True] = partial(_both, candidate.layer, x, grad, device)
    times = in_turns(calls, {key: turns[key[0]] for key in calls})
    points = []
    for candidate in alive:
        name = candidate.name
        if name not in turns:
            continue
        f, b = statistics.median(times[name, False]), statistics.median(times[name, True])
        candidate.calls.append((length, b))
        raised = memory[name]
        if raised is not None:
            candidate.memory.append((length, raised))
        points.append(CostPoint(name, length, f, b, raised, len(times[name, True])))
    return points


def _forward(layer: nn.Module, x: Tensor, device: torch.device) -> float:
    layer.eval()
    with torch.no_grad():
        return seconds(lambda: layer(x), device)


def _both(layer: nn.Module, x: Tensor, grad: Tensor, device: torch.device) -> float:
    layer.train()
    layer.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_(True)
    return seconds(lambda: layer(leaf).backward(grad), device)
