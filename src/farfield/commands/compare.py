"""``farfield compare``: which attention for my text, on my machine?"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.commands.errors import FAILED, INTERRUPTED
from farfield.commands.interrupt import Interruption
from farfield.commands.options import device_option, duration, duration_option, in_words, probe, recipe_options

if TYPE_CHECKING:
    from rich.console import Console

    from farfield.bench.compare import Failure, Outcome, RunResult, Settings, Watcher
    from farfield.bench.cost import CostPoint
    from farfield.training.loop import Progress as Step

__all__ = ["compare_command"]

_DEFAULT_BUDGET = 60.0
_PLAIN_PARTS = 4
"""Without a terminal a line is printed whenever another quarter of a run is done."""


def compare_command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]...", help="Files, folders, globs. Default: Python's standard library."),
    ] = None,
    attention: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Recipes, see `farfield recipes`.")
    ] = "dense,window,fma",
    context: Annotated[int, typer.Option(min=1, help="Bytes seen at once.")] = 4096,
    budget: Annotated[
        float | None,
        typer.Option(parser=duration_option, metavar="TIME", help="Training time of each run: 60s, 2m. [default: 60s]"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Equal steps instead of equal time.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per attention; several give the spread.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the report. [default: runs/compare-DATE-TIME]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the finished runs in --out, make the others.")] = False,
    dim: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 128,
    depth: Annotated[int, typer.Option(min=1, help="Layers.")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 4,
    block: Annotated[int, typer.Option(min=1, help="Leaf block, for the recipes that have one.")] = 64,
    rank: Annotated[int, typer.Option(min=1, help="Summaries per group, for the recipes that have them.")] = 8,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="NAME=VALUE", help="Another option, for the recipes that have it; repeatable."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    eval_tokens: Annotated[int, typer.Option(min=1, help="Held-out bytes to predict.")] = 98304,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: cuda where there is one]")] = None,
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Measure one layer by length, too.")] = True,
    cost_budget: Annotated[str, typer.Option(metavar="TIME", help="Time for measuring one layer by length.")] = "45s",
) -> None:
    """Train the same small language model once per attention, and say which suits this text.

    Whole files are held out where there are several. Exact copies of a file are left out, near copies are not: text
    that repeats with small changes can stand on both sides.

    Writes DIR/report.html (plots, numbers, answer; one file that needs no network), DIR/results.json and
    DIR/runs/*.json. Ctrl-C reports what is finished and exits with 130; --resume makes what is missing.
    """
    if steps is not None and budget is not None:
        raise ValueError(f"--budget {in_words(budget)} and --steps {steps} exclude each other; give one of them")
    if resume and out is None:
        raise ValueError("--resume needs the folder to go on with; add --out DIR")
    from rich.console import Console
    from rich.markup import escape

    from farfield.bench.compare import Settings, compare
    from farfield.bench.report import write
    from farfield.data.text import collect

    names = tuple(name.strip() for name in attention.split(",") if name.strip())
    settings = Settings(
        attentions=names,
        context=context,
        seconds=None if steps is not None else budget if budget is not None else _DEFAULT_BUDGET,
        steps=steps,
        seeds=seeds,
        first_seed=seed,
        dim=dim,
        depth=depth,
        heads=heads,
        options={"block": block, "rank": rank, **recipe_options(option or [])},
        batch=batch,
        lr=lr,
        eval_tokens=eval_tokens,
        device=device_option(device),
        cost_seconds=duration(cost_budget) if cost else None,
    )
    settings.validate()
    corpus = collect(paths)
    folder = out if out is not None else Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    console = Console(highlight=False)
    display = _display(console, settings)
    with Interruption() as stop, display:
        try:
            outcome = compare(
                settings,
                corpus,
                folder,
                resume=resume,
                watcher=display,
                should_stop=stop,
                before_first_run=lambda: probe(folder),
            )
        except KeyboardInterrupt:
            display.close()
            console.print(
                f"stopped at once; finished runs are in {folder / 'runs'}, --resume goes on with them", soft_wrap=True
            )
            raise typer.Exit(INTERRUPTED) from None
    outcome.command = _command_line(paths or [], settings, folder)
    # The answer first: whatever happens to the files, the training was not for nothing.
    _print_outcome(console, outcome, folder)
    report = write(outcome, folder)
    console.print(f"report: {escape(str(report))}", soft_wrap=True)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not outcome.runs:
        raise typer.Exit(FAILED)


def _command_line(paths: Sequence[str], settings: Settings, folder: Path) -> str:
    """Every setting spelled out, so that later defaults change nothing."""
    words = ["farfield", "compare", *paths, "--attention", ",".join(settings.attentions)]
    words += ["--context", str(settings.context)]
    words += ["--steps", str(settings.steps)] if settings.steps is not None else ["--budget", f"{settings.seconds:g}"]
    for name, value in (
        ("seeds", settings.seeds),
        ("seed", settings.first_seed),
        ("dim", settings.dim),
        ("depth", settings.depth),
        ("heads", settings.heads),
        ("batch", settings.batch),
        ("eval-tokens", settings.eval_tokens),
        ("device", settings.device),
    ):
        words += [f"--{name}", str(value)]
    if settings.lr is not None:
        words += ["--lr", f"{settings.lr:g}"]
    for name, value in settings.options.items():
        said = value if isinstance(value, str) else json.dumps(value)  # as `recipe_options` reads it
        plain = name in ("block", "rank") and isinstance(value, int)
        words += [f"--{name}", said] if plain else ["--option", f"{name}={said}"]
    words += ["--no-cost"] if settings.cost_seconds is None else ["--cost-budget", f"{settings.cost_seconds:g}"]
    return shlex.join([*words, "--out", str(folder)])


def _print_outcome(console: Console, outcome: Outcome, folder: Path) -> None:
    from rich.markup import escape
    from rich.panel import Panel
    from rich.text import Text

    from farfield.bench.tables import cost_table, position_table, result_table
    from farfield.bench.verdict import verdict_of

    verdict = verdict_of(outcome)
    console.print()
    if outcome.runs:
        console.print("[bold]held-out text[/bold]" + (" (interrupted)" if outcome.interrupted else ""))
        console.print(result_table(outcome))
        console.print("[bold]bits per byte by position in the context[/bold]")
        console.print(position_table(outcome))
    if outcome.cost is not None and outcome.cost.points:
        console.print("[bold]one attention layer by length, forward and backward: time, then memory[/bold]")
        console.print(cost_table(outcome.cost, "time"))
        if any(point.memory is not None for point in outcome.cost.points):
            console.print(cost_table(outcome.cost, "memory"))
    lines = Text(verdict.headline, style="bold")
    for detail in verdict.details:
        lines.append(f"\n{detail}", style="not bold")
    console.print(Panel(lines, title="answer", title_align="left", border_style="blue"))
    for warning in (*verdict.warnings, *outcome.notes):
        console.print(f"[yellow]note:[/yellow] {escape(warning)}")
    for failure in outcome.failures:
        console.print(
            f"[red]{escape(failure.attention)}, seed {failure.seed}, gave no result:[/red] {escape(failure.reason)}"
        )
    if outcome.interrupted:
        console.print(
            f"interrupted; the same command with --resume --out {escape(str(folder))} makes what is missing",
            soft_wrap=True,
        )


class _State:
    """What both displays show."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.heading = ""
        self.fraction = 0.0
        self.bits: float | None = None
        self.line = ""

    def begin(self, attention: str, seed: int, number: int, total: int) -> None:
        self.heading = f"run {number} of {total}: {attention}" + (f", seed {seed}" if self.settings.seeds > 1 else "")
        self.fraction, self.bits, self.line = 0.0, None, "warming up"

    def step(self, progress: Step, fraction: float) -> None:
        # A running mean: single windows of text differ far more than steps do.
        self.bits = progress.train_bits if self.bits is None else 0.95 * self.bits + 0.05 * progress.train_bits
        self.fraction = fraction
        speed = progress.tokens / progress.seconds if progress.seconds > 0 else 0.0
        left = in_words(progress.seconds * (1 - fraction) / fraction) if fraction > 0 else "?"
        self.line = (
            f"step {progress.step:,}  {in_words(progress.seconds)}  {self.bits:.3f} train bits/byte  "
            f"{speed:,.0f} tokens/s  {left} left"
        )


def _display(console: Console, settings: Settings) -> Any:
    """A watcher and context manager: live on a terminal, lines elsewhere."""
    from farfield.bench.compare import Watcher

    return _live(console, settings, Watcher) if console.is_terminal else _plain(console, settings, Watcher)


def _plain(console: Console, settings: Settings, base: type[Watcher]) -> Any:
    class Plain(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.state = _State(settings)
            self.parts = 0

        def __enter__(self) -> Plain:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            pass

        def on_begin(self, attention: str, seed: int, number: int, total: int) -> None:
            self.state.begin(attention, seed, number, total)
            self.parts = 0
            console.print(self.state.heading)

        def on_step(self, progress: Step, fraction: float) -> None:
            self.state.step(progress, fraction)
            if int(fraction * _PLAIN_PARTS) > self.parts:
                self.parts = int(fraction * _PLAIN_PARTS)
                console.print(f"  {self.state.line}", soft_wrap=True)

        def on_run(self, run: RunResult, reused: bool) -> None:
            how = "found finished" if reused else f"{run.steps:,} steps in {in_words(run.seconds)}"
            console.print(
                f"  {run.attention}, seed {run.seed}: {run.bits:.3f} held-out bits per byte ({how})", soft_wrap=True
            )

        def on_failure(self, failure: Failure) -> None:
            console.print(
                f"  {failure.attention}, seed {failure.seed}, gave no result: {failure.reason}", soft_wrap=True
            )

        def on_cost(self, point: CostPoint) -> None:
            console.print(
                f"  one layer of {point.attention} at {point.length:,}: forward {point.forward:.4f} s, "
                f"with backward {point.both:.4f} s",
                soft_wrap=True,
            )

    return Plain()


def _live(console: Console, settings: Settings, base: type[Watcher]) -> Any:
    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.spinner import Spinner
    from rich.table import Table
    from rich.text import Text

    class Shown(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.state = _State(settings)
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
            table = Table(title=f"farfield compare: context {settings.context:,}, {settings.budget_in_words}",
                          title_justify="left", title_style="bold")  # fmt: skip
            for name in ("attention", "held-out bits/byte", "steps", "tokens/s", "peak memory"):
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

        def on_begin(self, attention: str, seed: int, number: int, total: int) -> None:
            self.state.begin(attention, seed, number, total)
            self._start()

        def on_step(self, progress: Step, fraction: float) -> None:
            self.state.step(progress, fraction)

        def on_window(self, done: int, total: int) -> None:
            self.state.line = f"reading held-out window {done} of {total}"
            self.state.fraction = done / total

        def on_run(self, run: RunResult, reused: bool) -> None:
            from farfield.bench.tables import bytes_in_words

            name = (
                run.attention
                + (f", seed {run.seed}" if settings.seeds > 1 else "")
                + (" (found finished)" if reused else "")
            )
            speed = run.tokens / run.seconds if run.seconds > 0 else 0.0
            self.rows.append(
                (name, f"{run.bits:.3f}", f"{run.steps:,}", f"{speed:,.0f}", bytes_in_words(run.peak_bytes))
            )
            self._start()

        def on_failure(self, failure: Failure) -> None:
            self.rows.append((f"{failure.attention}, seed {failure.seed}: {failure.reason}", "–", "–", "–", "–"))

        def on_cost(self, point: CostPoint) -> None:
            self.state.heading = "cost of one layer by length"
            self.state.fraction = 1.0
            self.state.line = f"{point.attention} at {point.length:,}: {point.both:.3f} s forward and backward"

    return Shown()
