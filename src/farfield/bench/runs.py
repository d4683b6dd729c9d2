"""The runs of a comparison, whatever is trained: made in turn, saved one by one when finished, found again.

A run's file is written when the run is finished and never before, so a folder holds finished runs only, whatever
happens.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from farfield.bench.cost import CostPoint
from farfield.bench.memory import is_out_of_memory
from farfield.training.files import write_json
from farfield.training.loop import Progress

__all__ = [
    "MACHINE",
    "Failure",
    "Made",
    "Run",
    "Stopped",
    "Watcher",
    "check_folder",
    "make_runs",
    "mixed_machines",
    "read_json",
    "run_file",
    "thin",
]

MACHINE = ("processor", "cores", "threads", "torch")
"""What of a machine is kept with each run: numbers of equal seeds differ a little between these."""
_CURVE_POINTS = 240


class Run(Protocol):
    """One finished run, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def attention(self) -> str:
        """Name of the recipe."""
        ...

    @property
    def seed(self) -> int:
        """Of parameters and data order."""
        ...

    @property
    def key(self) -> Mapping[str, Any]:
        """The settings that decide its numbers."""
        ...

    @property
    def machine(self) -> Mapping[str, Any]:
        """What made it."""
        ...


R = TypeVar("R", bound=Run)


@dataclass(frozen=True)
class Failure:
    """A run that could not be finished, and why."""

    attention: str
    seed: int
    reason: str


class Watcher:
    """What a display may listen to; does nothing by itself."""

    def on_pace(self, place: str, done: int, total: int) -> None:
        """Of the turns that measure the seconds per step at ``place``, so many are done."""

    def on_begin(self, attention: str, seed: int, number: int, total: int) -> None:
        """A run begins: the ``number``-th of ``total``."""

    def on_step(self, progress: Progress, fraction: float) -> None:
        """A step is done; ``fraction`` of the run's budget is spent."""

    def on_window(self, done: int, total: int) -> None:
        """A held-out window, or a batch of held-out examples, is read."""

    def on_run(self, run: Any, reused: bool) -> None:
        """A run is finished, or was found finished."""

    def on_failure(self, failure: Failure) -> None:
        """A run could not be finished."""

    def on_bad(self, name: str, reason: str) -> None:
        """An example cannot be read and is left out."""

    def on_cost(self, point: CostPoint) -> None:
        """One attention's layer was measured at one length."""


class Stopped(Exception):
    """The user asked to stop in the middle of a run."""


class Made(Protocol):
    """Where :func:`make_runs` puts what it made."""

    runs: list[Any]
    failures: list[Failure]
    interrupted: bool
    unfinished: tuple[str, int] | None


def run_file(folder: Path, attention: str, seed: int) -> Path:
    """Where a run's numbers lie."""
    return folder / "runs" / f"{attention}-seed{seed}.json"


def make_runs(
    plan: Sequence[tuple[str, int]],
    finished: Mapping[tuple[str, int], R],
    made: Made,
    folder: Path,
    *,
    one_run: Callable[[str, int], R],
    warm_up: Callable[[str], None],
    run_format: str,
    machine: Mapping[str, Any],
    watcher: Watcher,
    stop: Callable[[], bool],
) -> None:
    """Makes every run of the plan that is not finished, and saves each.

    Runs that diverge or run out of memory become failures, the others go on. A run under way when ``stop`` says so is
    left out (``one_run`` raises :class:`Stopped`).

    Raises:
        OSError: when a run cannot be saved.
    """
    warm: set[str] = set()
    for number, (attention, seed) in enumerate(plan, 1):
        if (attention, seed) in finished:
            made.runs.append(finished[attention, seed])
            watcher.on_run(finished[attention, seed], True)
            continue
        if stop():
            made.interrupted = True
            break
        watcher.on_begin(attention, seed, number, len(plan))
        try:
            if attention not in warm:
                warm_up(attention)
                warm.add(attention)
            run = dataclasses.replace(
                one_run(attention, seed), machine={name: machine[name] for name in MACHINE}
            )  # fmt: skip
        except Stopped:
            made.interrupted = True
            made.unfinished = (attention, seed)
            break
        except (FloatingPointError, RuntimeError, MemoryError) as error:
            if not isinstance(error, FloatingPointError) and not is_out_of_memory(error):
                raise
            reason = str(error) if isinstance(error, FloatingPointError) else "ran out of memory"
            made.failures.append(Failure(attention, seed, reason.splitlines()[0]))
            watcher.on_failure(made.failures[-1])
            continue
        write_json(run_file(folder, attention, seed), {"format": run_format, **dataclasses.asdict(run)})
        made.runs.append(run)
        watcher.on_run(run, False)


def check_folder(
    folder: Path,
    plan: Sequence[tuple[str, int]],
    *,
    key_of: Callable[[str, int], Mapping[str, Any]],
    read: Callable[[Mapping[str, Any]], R],
    run_format: str,
    results_format: str,
    resume: bool,
) -> dict[tuple[str, int], R]:
    """What ``folder`` holds already. Writes nothing.

    Returns:
        The finished runs that belong to the plan; empty without ``resume``.

    Raises:
        ValueError: when the folder is a file, holds runs with other settings, damaged or foreign files under the names
            that would be written, or, without ``resume``, any finished run.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give --out a new or an earlier folder of farfield compare")
    results = folder / "results.json"
    if results.exists() and read_json(results).get("format") != results_format:
        raise ValueError(
            f"{results} is not from farfield compare of such data and would be overwritten; give another --out"
        )
    found: dict[tuple[str, int], R] = {}
    for path in sorted((folder / "runs").glob("*.json")):
        values = read_json(path)
        try:
            if values.get("format") != run_format:
                raise ValueError("another format")
            run = read(values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a finished run of farfield compare ({error}); delete it or give another --out"
            ) from error
        wanted = key_of(run.attention, run.seed)
        ignored = set() if resume else {"processor", "threads"}
        different = [
            f"{name} {_show(run.key.get(name))} there, {_show(wanted.get(name))} now"
            for name in dict.fromkeys([*wanted, *run.key])
            if name not in ignored and run.key.get(name) != wanted.get(name)
        ]
        if different:
            verb = "cannot resume" if resume else "will not overwrite"
            raise ValueError(
                f"{verb} {folder}: {path.name} has other settings ({'; '.join(different)}); give another --out"
            )
        found[run.attention, run.seed] = run
    if found and not resume:
        raise ValueError(
            f"{folder} holds {len(found)} finished run{'s' * (len(found) != 1)} with these settings; add --resume to "
            "keep them and make what is missing, or give another --out"
        )
    return {place: found[place] for place in plan if place in found}


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one for JSON of another kind.

    Raises:
        ValueError: when it cannot be read.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}); delete it or give another --out") from error
    return values if isinstance(values, dict) else {}


def mixed_machines(runs: Sequence[Run]) -> list[str]:
    """A note when the runs were made by different machines, numbers of threads, or versions of torch."""
    known = [run.machine for run in runs if run.machine]
    mixed = []
    for name in MACHINE:
        values = sorted({str(machine.get(name)) for machine in known})
        if len(values) > 1:
            mixed.append(f"{name} {' and '.join(values)}")
    if not mixed:
        return []
    return [
        f"The runs were not all made alike ({'; '.join(mixed)}): times do not compare, and bits may differ a little."
    ]


def thin(history: Sequence[Progress], points: int = _CURVE_POINTS) -> list[tuple[int, float, float]]:
    """(step, seconds, mean bits) over at most ``points`` equal runs of steps."""
    size = max(1, math.ceil(len(history) / points))
    groups = [history[i : i + size] for i in range(0, len(history), size)]
    return [(g[-1].step, g[-1].seconds, float(np.mean([p.train_bits for p in g]))) for g in groups]
