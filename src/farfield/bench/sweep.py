"""Attentions side by side, case by case: time, memory, share of the machine's ceiling and error, interleaved.

A *case* is a grid, a dtype and a mode. Within a case everything is warmed up one after the other, and then timed turn
by turn, with a matrix product of the machine among them, so that what slows the machine slows all of them and the
ceiling too. A row is one attention in one case; what is refused or too large gives a row with the reason.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farfield.bench.case import Case, Inputs
from farfield.bench.ceilings import MatrixProduct, memory_rate, rates
from farfield.bench.memory import PeakMemory, available_bytes, is_out_of_memory
from farfield.bench.model import Rates, Work, floor
from farfield.bench.subjects import Built, Refused, Subject
from farfield.bench.timing import ahead, in_turns, seconds

__all__ = ["EXACT_LENGTH", "MODE_NAMES", "Prediction", "Row", "Settings", "Sweep", "Watcher", "plan", "sweep"]

FORMAT = "farfield-bench/1"
EXACT_LENGTH = 4096
"""Tokens up to which the output is compared with exact attention."""
MODE_NAMES = {"forward": "forward", "backward": "forward + backward", "decode": "decode"}
"""Modes in words."""
_MEMORY_SHARE = 0.7
_LONG = 1.0
"""Seconds from which a call is timed three times at most."""
_VERY_LONG = 5.0
"""Seconds from which a call is timed once."""
_SHORT = 0.02
"""A turn of a short call repeats it until about this many seconds, so that the median rests on more."""
_MOST_REPEATS = 20
_PRODUCT = ("", 0)
"""The matrix product among the calls of a case."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        cases: grids and dtypes, in order.
        modes: some of :data:`farfield.bench.model.MODES`.
        repeats: turns of every attention in a case; calls over a second get three at most, over five seconds one.
        limit: seconds of a call from which an attention goes no further to longer cases of the same kind.
    """

    cases: tuple[Case, ...]
    modes: tuple[str, ...] = ("forward", "backward")
    repeats: int = 5
    limit: float = 20.0


@dataclass(frozen=True)
class Row:
    """One attention in one case and mode.

    Attributes:
        label, level, engine: what; see :class:`farfield.bench.subjects.Subject` and ``Built``.
        case, mode: where.
        seconds: median; None where it was not measured.
        low, high: quartiles of the times.
        repeats: timed calls.
        memory: how far memory rose in a call, bytes; None where unmeasured.
        flops, bytes: useful ones by the cost model; None where it does not know.
        floor: least time by the cost model, at the rates of this case.
        ceiling: FLOPs per second of the matrix product in this case.
        error: norm of (output - exact attention) over the norm of exact attention.
        error_from: how the error was obtained, or why there is none.
        reason: why nothing was measured, or None.
    """

    label: str
    level: str
    engine: str | None
    case: Case
    mode: str
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    repeats: int = 0
    memory: int | None = None
    flops: float | None = None
    bytes: float | None = None
    floor: float | None = None
    ceiling: float | None = None
    error: float | None = None
    error_from: str = ""
    reason: str | None = None

    @property
    def share(self) -> float | None:
        """Useful FLOPs per second over those of a matrix product in the same case."""
        if self.seconds is None or self.flops is None or self.ceiling is None:
            return None
        return self.flops / self.seconds / self.ceiling

    @property
    def over_floor(self) -> float | None:
        """Measured time over predicted least time."""
        return None if self.seconds is None or not self.floor else self.seconds / self.floor

    @property
    def spread(self) -> float | None:
        """Half the distance of the quartiles, relative to the median."""
        if self.seconds is None or self.low is None or self.high is None:
            return None
        return (self.high - self.low) / 2 / self.seconds

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """The inverse of ``dataclasses.asdict`` through JSON.

        Raises:
            KeyError, TypeError: for anything else.
        """
        case = dict(values["case"])
        known = {f.name for f in dataclasses.fields(cls)}
        rest = {name: value for name, value in values.items() if name in known}
        return cls(**{**rest, "case": Case(**{**case, "grid": tuple(case["grid"])})})


@dataclass(frozen=True)
class Prediction:
    """What the cost model says of one attention in one case and mode; None in all three where it does not know."""

    label: str
    case: Case
    mode: str
    flops: float | None
    bytes: float | None
    floor: float | None
    bound: str | None
    reason: str | None = None


@dataclass
class Sweep:
    """The result of :func:`sweep`: rows in order of measuring, the rate of memory, and whether it was cut short."""

    rows: list[Row] = field(default_factory=list)
    memory_rate: float | None = None
    interrupted: bool = False


class Watcher:
    """What a display may listen to; does nothing by itself."""

    def on_case(self, case: Case, mode: str, number: int, total: int) -> None:
        """A case begins: the ``number``-th of ``total``."""

    def on_subject(self, label: str) -> None:
        """An attention is being prepared and warmed up."""

    def on_turn(self, turn: int, turns: int) -> None:
        """A turn of the case is done."""

    def on_rows(self, rows: Sequence[Row], reused: bool) -> None:
        """A case is finished, or was found finished."""


def plan(subjects: Sequence[Subject], settings: Settings) -> list[Prediction]:
    """The cost model's prediction for everything, without running any attention; measures the machine's two rates."""
    found: list[Prediction] = []
    by_place = {(c.dtype, c.device): rates(c.dtype, c.device) for c in settings.cases}
    for case, mode in _places(settings):
        for subject in subjects:
            reason, work = _refusal(subject, case, mode), None
            if reason is None:
                try:
                    work = _work(subject, case, mode)
                except (ValueError, TypeError) as error:
                    reason = str(error)
            if work is None:
                found.append(Prediction(subject.label, case, mode, None, None, None, None, reason))
                continue
            flops, moved = work.flops(case, mode), work.bytes(case, mode)
            least = floor(flops, moved, by_place[case.dtype, case.device])
            found.append(Prediction(subject.label, case, mode, flops, moved, least.seconds, least.bound))
    return found


def sweep(
    subjects: Sequence[Subject],
    settings: Settings,
    *,
    finished: Iterable[Row] = (),
    watcher: Watcher | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Sweep:
    """Measures every attention in every case.

    Args:
        subjects: what to measure.
        settings: on what.
        finished: rows of an earlier run with the same settings; a case that has one for every attention is kept.
        watcher: told what happens.
        should_stop: asked between calls; true ends the run with the finished cases.

    Returns:
        The rows. A case that was under way when stopped is not among them.

    An exception from a peer becomes the reason of its row, as do refusals and lack of memory of farfield's own; other
    errors of farfield's own are raised.
    """
    watcher, stop = watcher or Watcher(), should_stop or (lambda: False)
    known = {(row.label, row.case, row.mode): row for row in finished}
    result = Sweep()
    history = _History(settings.limit)
    places = _places(settings)
    products: dict[tuple[str, str], MatrixProduct] = {}
    for number, (case, mode) in enumerate(places, 1):
        old = [known.get((s.label, case, mode)) for s in subjects]
        if all(row is not None for row in old):
            rows = [row for row in old if row is not None]
            result.rows += rows
            history.add(rows)
            watcher.on_rows(rows, True)
            continue
        if stop():
            result.interrupted = True
            break
        watcher.on_case(case, mode, number, len(places))
        if result.memory_rate is None:
            result.memory_rate = memory_rate(case.device)
        place = case.dtype, case.device
        if place not in products:
            products[place] = MatrixProduct(*place)
        measured = _one_case(
            subjects, case, mode, settings, history, products[place], result.memory_rate, watcher, stop
        )
        if measured is None:
            result.interrupted = True
            break
        history.add(measured)
        result.rows += measured
        watcher.on_rows(measured, False)
    return result


def _places(settings: Settings) -> list[tuple[Case, str]]:
    return [(case, mode) for case in settings.cases for mode in settings.modes]


def _work(subject: Subject, case: Case, mode: str) -> Work | None:
    return subject.decode_work(case) if mode == "decode" and subject.decode is not None else subject.work(case)


def _prepare(subject: Subject, case: Case, mode: str) -> tuple[Work | None, Built]:
    """What the cost model knows, and something ready to run; what the settings of a case rule out is refused."""
    make = subject.decode if mode == "decode" and subject.decode is not None else subject.make
    try:
        return _work(subject, case, mode), make(case)
    except (ValueError, TypeError) as error:
        raise Refused(_first_line(error)) from error


def _refusal(subject: Subject, case: Case, mode: str) -> str | None:
    if subject.why_not is not None:
        return subject.why_not
    if mode == "decode" and subject.decode is None:
        return subject.why_no_decode
    if mode == "decode" and case.dims > 1:
        return "tokens are decoded one by one in 1-D only"
    return subject.modes(case, mode)


class _History:
    """What longer cases are forecast from: time and memory of the shorter ones, by attention and kind of case."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._times: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
        self._memory: dict[tuple[Any, ...], list[tuple[int, float]]] = {}

    @staticmethod
    def _kind(label: str, case: Case, mode: str) -> tuple[Any, ...]:
        return label, mode, case.dims, case.dtype, case.causal

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            key = self._kind(row.label, row.case, row.mode)
            if row.seconds is not None:
                self._times.setdefault(key, []).append((row.case.tokens, row.seconds))
            if row.memory:
                self._memory.setdefault(key, []).append((row.case.tokens, float(row.memory)))

    def refuse(self, subject: Subject, case: Case, mode: str) -> str | None:
        """Why a case must not be tried, or None."""
        key = self._kind(subject.label, case, mode)
        call = ahead([p for p in self._times.get(key, []) if p[0] < case.tokens], case.tokens)
        if call > self._limit:
            return f"a call would take about {call:,.0f} s, over the limit of {self._limit:g} s"
        memory = ahead([p for p in self._memory.get(key, []) if p[0] < case.tokens], case.tokens)
        if subject.scores and mode != "decode":
            memory = max(memory, 2.0 * case.batch * case.heads * case.tokens**2 * max(case.size, 4))
        free = available_bytes(case.device)
        if free is not None and memory > _MEMORY_SHARE * free:
            return f"it would need about {memory / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} are free"
        return None


def _one_case(
    subjects: Sequence[Subject],
    case: Case,
    mode: str,
    settings: Settings,
    history: _History,
    product: MatrixProduct,
    memory_rate: float,
    watcher: Watcher,
    stop: Callable[[], bool],
) -> list[Row] | None:
    """The rows of one case; None when stopped."""
    if "torch._dynamo" in sys.modules:
        # Every case is compiled anew: after eight kinds of inputs to one function dynamo would compile no more.
        torch._dynamo.reset()
    inputs = Inputs.of(case)
    device = torch.device(case.device)
    exact = _exact(case, inputs) if case.tokens <= EXACT_LENGTH and mode != "decode" else None
    rows: dict[str, Row] = {}
    calls: dict[tuple[str, int], Callable[[], float]] = {}
    turns: dict[tuple[str, int], int] = {}
    for subject in subjects:
        if stop():
            return None
        watcher.on_subject(subject.label)
        row = Row(subject.label, subject.level, None, case, mode)
        try:
            reason = _refusal(subject, case, mode) or history.refuse(subject, case, mode)
            if reason is not None:
                raise Refused(reason)
            work, built = _prepare(subject, case, mode)
            call = _call(subject, built, case, mode, inputs)
            row, warm = _warm_up(row, subject, built, case, mode, inputs, exact, call, device)
        except Exception as error:
            reason = _reason(error, subject)
            if reason is None:
                raise
            rows[subject.label] = dataclasses.replace(row, reason=reason)
            continue
        if work is not None:
            row = dataclasses.replace(row, flops=work.flops(case, mode), bytes=work.bytes(case, mode))
        rows[subject.label] = row
        inner = max(1, min(_MOST_REPEATS, int(_SHORT / max(warm, 1e-6))))
        most = 1 if warm > _VERY_LONG else 3 if warm > _LONG else settings.repeats
        for k in range(inner):
            # Repeats of a short call stand side by side in a turn.
            calls[subject.label, k] = partial(seconds, call, device)
            turns[subject.label, k] = min(most, settings.repeats)
    if not calls:
        return list(rows.values())
    last = max(turns.values())
    calls[_PRODUCT], turns[_PRODUCT] = product.time, last
    times = in_turns(calls, turns, on_turn=lambda turn: watcher.on_turn(turn, last), should_stop=stop)
    if stop():
        return None
    at = Rates(product.rate(times.pop(_PRODUCT)), memory_rate)
    for label, row in rows.items():
        own = [t for (name, _), several in times.items() if name == label for t in several]
        if own:
            rows[label] = _timed(row, own, at)
    return list(rows.values())


def _timed(row: Row, times: list[float], at: Rates) -> Row:
    low, middle, high = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0], times[0], times[0])
    )
    least = None if row.flops is None or row.bytes is None else floor(row.flops, row.bytes, at).seconds
    return dataclasses.replace(
        row, seconds=middle, low=low, high=high, repeats=len(times), floor=least, ceiling=at.matrix
    )


def _call(subject: Subject, built: Built, case: Case, mode: str, inputs: Inputs) -> Callable[[], Tensor]:
    """One call as it is timed: the output of the forward pass."""
    given = _given(subject, built, mode, inputs)
    if mode != "backward":

        def forward() -> Tensor:
            with torch.no_grad():
                return built.run(*given)

        return forward
    leaves = tuple(x.detach().clone().requires_grad_(True) for x in given)
    wanted = (*leaves, *(p for p in built.parameters if p.requires_grad))

    def both() -> Tensor:
        out = built.run(*leaves)
        # Random numbers in whichever order the output's own layout has them.
        torch.autograd.grad(out, wanted, inputs.grad.view(out.shape), allow_unused=True)
        return out

    return both


def _given(subject: Subject, built: Built, mode: str, inputs: Inputs) -> tuple[Tensor, ...]:
    if subject.level == "layer":
        return (built.into(inputs.x),)
    query = inputs.q[:, :, -1:] if mode == "decode" else inputs.q
    return tuple(built.into(x) for x in (query, inputs.k, inputs.v))


def _warm_up(
    row: Row,
    subject: Subject,
    built: Built,
    case: Case,
    mode: str,
    inputs: Inputs,
    exact: Tensor | None,
    call: Callable[[], Tensor],
    device: torch.device,
) -> tuple[Row, float]:
    """One call that counts for nothing, one for the memory, and the error; returns the row and the second's seconds."""
    held: list[Tensor] = []
    seconds(lambda: held.append(call().detach()), device)
    error, how = _error(built, case, mode, held.pop(), exact)
    with PeakMemory(device) as peak:
        warm = seconds(call, device)
    row = dataclasses.replace(row, engine=built.engine, memory=peak.raised, error=error, error_from=how)
    return row, warm


def _exact(case: Case, inputs: Inputs) -> Tensor:
    """[B, H, N, D] exact attention in float64."""
    q, k, v = inputs.q.double(), inputs.k.double(), inputs.v.double()
    return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)


def _error(built: Built, case: Case, mode: str, out: Tensor, exact: Tensor | None) -> tuple[float | None, str]:
    if built.back is None:
        return None, built.why_no_error or "not comparable"
    if mode == "decode":
        return None, "not computed in decoding"
    if exact is None:
        return None, f"not computed above {EXACT_LENGTH:,} tokens"
    distance = (built.back(out).double() - exact).norm() / exact.norm()
    value = float(distance)
    how = f"relative RMS to float64 dense attention, N {case.tokens:,}"
    return (value, how) if math.isfinite(value) else (None, "the output is not finite")


def _reason(error: Exception, subject: Subject) -> str | None:
    """The reason of a row without numbers, or None for an error that must be seen."""
    if isinstance(error, Refused):
        return str(error)
    if is_out_of_memory(error):
        return "ran out of memory"
    if subject.peer:
        return f"{type(error).__name__}: {_first_line(error)}"
    return _first_line(error) if isinstance(error, ValueError | NotImplementedError) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
