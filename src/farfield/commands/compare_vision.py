"""``farfield compare`` pointed at images or fields."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from farfield.commands.display import Told, display
from farfield.commands.errors import FAILED, INTERRUPTED
from farfield.commands.interrupt import Interruption
from farfield.commands.options import probe

if TYPE_CHECKING:
    from rich.console import Console

    from farfield.bench.vision import VisionOutcome, VisionSettings
    from farfield.data.examples import VisionData

__all__ = ["compare_images_or_fields", "parse_size"]

_MOST_NAMED = 5
"""Examples that could not be read, named on the screen; the report names more."""


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from ``224`` or ``360x480``.

    Raises:
        ValueError: for anything else.
    """
    pieces = text.lower().split("x")
    if len(pieces) > 2 or not all(piece.strip().isdecimal() and int(piece) > 0 for piece in pieces):
        raise ValueError(f"{text!r} is not a size; write it like 224 or 360x480 (height x width)")
    numbers = [int(piece) for piece in pieces]
    return numbers[0], numbers[-1]


def open_data(
    kind: str,
    paths: Sequence[Path],
    *,
    size: str | None,
    test_sizes: str | None,
    variables: str | None,
    frames: int | None,
    ahead: int | None,
    fill: bool,
    transpose: bool,
) -> VisionData:
    """The data set that the options describe.

    Raises:
        ValueError: for options that this kind of data does not have.
    """
    from farfield.data.grids import open_grids
    from farfield.data.images import open_images

    wanted = None if size is None else parse_size(size)
    if kind == "images":
        of_fields = {
            "--variables": variables, "--frames": frames, "--ahead": ahead, "--fill": fill, "--transpose": transpose,
        }  # fmt: skip
        for name, value in of_fields.items():
            if value:
                raise ValueError(
                    f"{name} is for fields; {paths[0]} holds images, for which --image-size and --test-sizes are"
                )
        further = [parse_size(piece) for piece in (test_sizes or "").split(",") if piece.strip()]
        return open_images(paths, size=wanted, test_sizes=further)
    if test_sizes is not None:
        raise ValueError("--test-sizes is for images; fields are tested on the grids that their file holds")
    names = [piece.strip() for piece in (variables or "").split(",") if piece.strip()]
    return open_grids(
        paths,
        variables=names,
        frames=1 if frames is None else frames,
        ahead=ahead,
        fill=fill,
        transpose=transpose,
        size=wanted,
    )


def compare_images_or_fields(
    settings: VisionSettings, data: VisionData, given: Sequence[str], folder: Path, *, resume: bool
) -> None:
    """Runs the comparison with its display, prints the answer and writes the report.

    Args:
        settings: what to compare.
        data: the images or fields.
        given: what stood on the command line about the data: paths and options.
        folder: of the report.
        resume: keep the finished runs in it.
    """
    from rich.console import Console
    from rich.markup import escape

    from farfield.bench.vision import compare_vision
    from farfield.bench.vision_report import write_vision

    console = Console(highlight=False)
    _print_data(console, data)
    screen = display(console, _told(settings, data))
    with Interruption() as stop, screen:
        try:
            outcome = compare_vision(
                settings,
                data,
                folder,
                resume=resume,
                watcher=screen,
                should_stop=stop,
                before_first_run=lambda: probe(folder),
            )
        except KeyboardInterrupt:
            screen.close()
            console.print(
                f"stopped at once; finished runs are in {folder / 'runs'}, --resume goes on with them", soft_wrap=True
            )
            raise typer.Exit(INTERRUPTED) from None
    outcome.command = command_line(given, settings, data, folder)
    # The answer first: whatever happens to the files, the training was not for nothing.
    _print_outcome(console, outcome, folder)
    report = write_vision(outcome, folder)
    console.print(f"report: {escape(str(report))}", soft_wrap=True)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not outcome.runs:
        raise typer.Exit(FAILED)


def command_line(given: Sequence[str], settings: VisionSettings, data: VisionData, folder: Path) -> str:
    """Every setting spelled out, so that later defaults change nothing."""
    config = settings.model_config(settings.attentions[0], data)
    words = ["farfield", "compare", *given, "--attention", ",".join(settings.attentions)]
    words += ["--steps", str(settings.steps)] if settings.steps is not None else ["--budget", f"{settings.seconds:g}"]
    patch = "x".join(map(str, config.patches))
    for name, value in (
        ("seeds", settings.seeds),
        ("seed", settings.first_seed),
        ("size", settings.size),
        ("widths", ",".join(map(str, config.widths))),
        ("depths", ",".join(map(str, config.depths))),
        ("head-dim", config.head_dim),
        ("patch", patch),
        ("position", config.position),
        ("batch", settings.batch_of(data.task)),
        ("lr", f"{settings.train_config(data, settings.first_seed).lr:g}"),
        ("examples", settings.examples),
        ("workers", settings.workers_of(data.task)),
        ("device", settings.device),
    ):
        words += [f"--{name}", str(value)]
    for name, value in settings.options.items():
        said = value if isinstance(value, str) else json.dumps(value)
        plain = name in ("block", "rank") and isinstance(value, int)
        words += [f"--{name}", said] if plain else ["--option", f"{name}={said}"]
    words += ["--latent"] if settings.latent else []
    words += ["--no-cost"] if settings.cost_seconds is None else ["--cost-budget", f"{settings.cost_seconds:g}"]
    return shlex.join([*words, "--out", str(folder)])


def _told(settings: VisionSettings, data: VisionData) -> Told:
    from farfield.bench.tables import bytes_in_words
    from farfield.data.examples import size_in_words
    from farfield.training.metrics import METRICS

    metric = METRICS[data.task]
    pixels = 1
    for n in data.train.grid:
        pixels *= n

    def rate(tokens: float) -> str:
        return f"{tokens / pixels:,.1f}"

    def loss(step: Any) -> float:
        value: float = step.loss
        return value

    def row(run: Any) -> tuple[str, ...]:
        speed = run.images / run.seconds if run.seconds > 0 else 0.0
        return (metric.say(run.score), f"{run.steps:,}", f"{speed:,.1f}", bytes_in_words(run.peak_bytes))

    return Told(
        title=f"farfield compare: {size_in_words(data.train.grid)}, {settings.budget_in_words}",
        seeds=settings.seeds,
        columns=(f"held-out {metric.name}", "steps", "images/s", "peak memory"),
        row=row,
        result=lambda run: f"{metric.say(run.score)} {metric.name}",
        loss=loss,
        loss_name="train loss",
        rate=rate,
        rate_name="images/s",
        tested="held-out example",
        costed="the model of",
        cost_heading="cost of the model by resolution",
    )


def _print_data(console: Console, data: VisionData) -> None:
    from rich.markup import escape

    from farfield.data.examples import size_in_words

    tests = ", ".join(f"{len(source):,} of {name}" for name, source in data.tests.items())
    kinds = {
        "classify": "classes",
        "segment": "classes of pixels",
        "operator": f"channel{'s' * (data.outputs != 1)} to predict",
    }[data.task]
    console.print(
        f"{len(data.train):,} examples of {size_in_words(data.train.grid)} to train on, {tests} held out; "
        f"{data.outputs} {kinds} ({escape(data.source)})",
        soft_wrap=True,
    )
    for line in data.skipped[:_MOST_NAMED]:
        console.print(f"[yellow]left out:[/yellow] {escape(line)}", soft_wrap=True)
    if len(data.skipped) > _MOST_NAMED:
        console.print(f"[yellow]left out:[/yellow] {len(data.skipped) - _MOST_NAMED:,} more files")


def _print_outcome(console: Console, outcome: VisionOutcome, folder: Path) -> None:
    from rich.markup import escape
    from rich.panel import Panel
    from rich.text import Text

    from farfield.bench.tables import cost_table
    from farfield.bench.vision_tables import (
        headings,
        resolution_rows,
        rows_of_vision,
        vision_table,
        yardstick_rows,
    )
    from farfield.bench.vision_verdict import ranked_vision, verdict_of_vision

    verdict = verdict_of_vision(outcome)
    console.print()
    if outcome.runs:
        summaries = ranked_vision(outcome)
        console.print("[bold]held-out examples[/bold]" + (" (interrupted)" if outcome.interrupted else ""))
        console.print(
            vision_table(headings(outcome, narrow=True), rows_of_vision(outcome, summaries), yardstick_rows(outcome))
        )
        heads, rows = resolution_rows(outcome, summaries)
        if len(heads) > 2:
            console.print("[bold]by resolution[/bold]")
            console.print(vision_table(heads, rows))
    if outcome.cost is not None and outcome.cost.points:
        console.print("[bold]the whole model by pixels of one example, forward and backward: time, then memory[/bold]")
        console.print(cost_table(outcome.cost, "time"))
        if any(point.memory is not None for point in outcome.cost.points):
            console.print(cost_table(outcome.cost, "memory"))
    lines = Text(verdict.headline, style="bold")
    for detail in verdict.details:
        lines.append(f"\n{detail}", style="not bold")
    console.print(Panel(lines, title="answer", title_align="left", border_style="blue"))
    for warning in (*verdict.warnings, *outcome.notes):
        console.print(f"[yellow]note:[/yellow] {escape(warning)}", soft_wrap=True)
    bad = outcome.bad
    for line in bad[:_MOST_NAMED]:
        console.print(f"[yellow]could not be read:[/yellow] {escape(line)}", soft_wrap=True)
    if len(bad) > _MOST_NAMED:
        console.print(f"[yellow]could not be read:[/yellow] {len(bad) - _MOST_NAMED:,} more; the report names them")
    for failure in outcome.failures:
        console.print(
            f"[red]{escape(failure.attention)}, seed {failure.seed}, gave no result:[/red] {escape(failure.reason)}"
        )
    if outcome.interrupted:
        console.print(
            f"interrupted; the same command with --resume --out {escape(str(folder))} makes what is missing",
            soft_wrap=True,
        )
