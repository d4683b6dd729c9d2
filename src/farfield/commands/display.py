"""What a comparison shows while it runs: live on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farfield.commands.options import in_words

if TYPE_CHECKING:
    from rich.console import Console

    from farfield.bench.cost import CostPoint
    from farfield.bench.runs import Failure, Watcher
    from farfield.training.loop import Progress as Step

__all__ = ["Told", "display"]

_PLAIN_PARTS = 4
"""Without a terminal a line is printed whenever another quarter of a run is done."""


@dataclass(frozen=True)
class Told:
    """The words and numbers of one kind of comparison.

    Attributes:
        title: over the table.
        seeds: runs per attention.
        columns: headings of the table after the attention.
        row: the cells of a finished run under them.
        result: what a finished run reached, in words.
        loss, loss_name: of a step.
        rate, rate_name: of tokens per second, in the unit that people count.
        tested: what is read when a run is evaluated.
        costed: what the cost stage measures, before an attention's name.
        cost_heading: of the cost stage.
    """

    title: str
    seeds: int
    columns: tuple[str, ...]
    row: Callable[[Any], tuple[str, ...]]
    result: Callable[[Any], str]
    loss: Callable[[Any], float]
    loss_name: str
    rate: Callable[[float], str]
    rate_name: str
    tested: str
    costed: str
    cost_heading: str


class _State:
    """What both displays show."""

    def __init__(self, told: Told) -> None:
        self.told = told
        self.heading = ""
        self.fraction = 0.0
        self.loss: float | None = None
        self.line = ""

    def begin(self, attention: str, seed: int, number: int, total: int) -> None:
        self.heading = f"run {number} of {total}: {attention}" + (f", seed {seed}" if self.told.seeds > 1 else "")
        self.fraction, self.loss, self.line = 0.0, None, "warming up"

    def step(self, progress: Step, fraction: float) -> None:
        # A running mean: single batches differ far more than steps do.
        loss = self.told.loss(progress)
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self.fraction = fraction
        speed = progress.tokens / progress.seconds if progress.seconds > 0 else 0.0
        left = in_words(progress.seconds * (1 - fraction) / fraction) if fraction > 0 else "?"
        self.line = (
            f"step {progress.step:,}  {in_words(progress.seconds)}  {self.loss:.3f} {self.told.loss_name}  "
            f"{self.told.rate(speed)} {self.told.rate_name}  {left} left"
        )


def display(console: Console, told: Told) -> Any:
    """A watcher and context manager: live on a terminal, lines elsewhere."""
    from farfield.bench.runs import Watcher

    return _live(console, told, Watcher) if console.is_terminal else _plain(console, told, Watcher)


def _plain(console: Console, told: Told, base: type[Watcher]) -> Any:
    class Plain(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.state = _State(told)
            self.parts = 0

        def __enter__(self) -> Plain:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            pass

        def on_pace(self, place: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"seconds per step measured at {place}, {total} turns", soft_wrap=True)

        def on_begin(self, attention: str, seed: int, number: int, total: int) -> None:
            self.state.begin(attention, seed, number, total)
            self.parts = 0
            console.print(self.state.heading)

        def on_step(self, progress: Step, fraction: float) -> None:
            self.state.step(progress, fraction)
            if int(fraction * _PLAIN_PARTS) > self.parts:
                self.parts = int(fraction * _PLAIN_PARTS)
                console.print(f"  {self.state.line}", soft_wrap=True)

        def on_run(self, run: Any, reused: bool) -> None:
            how = "found finished" if reused else f"{run.steps:,} steps in {in_words(run.seconds)}"
            console.print(f"  {run.attention}, seed {run.seed}: {told.result(run)} ({how})", soft_wrap=True)

        def on_failure(self, failure: Failure) -> None:
            console.print(
                f"  {failure.attention}, seed {failure.seed}, gave no result: {failure.reason}", soft_wrap=True
            )

        def on_bad(self, name: str, reason: str) -> None:
            console.print(f"  left out: {name}: {reason}", soft_wrap=True, markup=False)

        def on_cost(self, point: CostPoint) -> None:
            console.print(
                f"  {told.costed} {point.attention} at {point.length:,}: forward {point.forward:.4f} s, "
                f"with backward {point.both:.4f} s",
                soft_wrap=True,
            )

    return Plain()


def _live(console: Console, told: Told, base: type[Watcher]) -> Any:
    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.spinner import Spinner
    from rich.table import Table
    from rich.text import Text

    class Shown(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.state = _State(told)
            self.rows: list[tuple[str, ...]] = []
            self.spinner = Spinner("dots")
            self.live: Live | None = None

        def __enter__(self) -> Shown:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def close(self) -> None:
            if self.live is not None:
                self.live.stop()
                self.live = None

        def __rich__(self) -> Group:
            table = Table(title=told.title, title_justify="left", title_style="bold")
            for name in ("attention", *told.columns):
                table.add_column(name, justify="left" if name == "attention" else "right", no_wrap=True)
            for row in self.rows:
                table.add_row(*row)
            head = Table.grid(padding=(0, 1))
            head.add_row(self.spinner, Text(self.state.heading, style="bold"))
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(total=1.0, completed=self.state.fraction, width=30), Text(self.state.line))
            return Group(table, head, bar) if self.rows else Group(head, bar)

        def _start(self) -> None:
            # Only now: an error in the settings must leave nothing but its own line on the screen.
            if self.live is None:
                self.live = Live(self, console=console, refresh_per_second=8, transient=True)
                self.live.start()

        def on_pace(self, place: str, done: int, total: int) -> None:
            self.state.heading, self.state.fraction = f"measuring seconds per step: {place}", done / total
            self.state.line = f"turn {done} of {total}"
            self._start()

        def on_begin(self, attention: str, seed: int, number: int, total: int) -> None:
            self.state.begin(attention, seed, number, total)
            self._start()

        def on_step(self, progress: Step, fraction: float) -> None:
            self.state.step(progress, fraction)

        def on_window(self, done: int, total: int) -> None:
            self.state.line = f"reading {told.tested} {done:,} of {total:,}"
            self.state.fraction = done / total

        def on_run(self, run: Any, reused: bool) -> None:
            name = (
                run.attention
                + (f", seed {run.seed}" if told.seeds > 1 else "")
                + (" (found finished)" if reused else "")
            )
            self.rows.append((name, *told.row(run)))
            self._start()

        def on_failure(self, failure: Failure) -> None:
            self.rows.append(
                (f"{failure.attention}, seed {failure.seed}: {failure.reason}", *("–",) * len(told.columns))
            )

        def on_cost(self, point: CostPoint) -> None:
            self.state.heading = told.cost_heading
            self.state.fraction = 1.0
            self.state.line = f"{point.attention} at {point.length:,}: {point.both:.3f} s forward and backward"

    return Shown()
