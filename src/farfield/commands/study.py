"""``farfield study``: what do options, context and batch change?"""

from __future__ import annotations

import json
import re
import shlex
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.commands.errors import FAILED, INTERRUPTED
from farfield.commands.interrupt import Interruption
from farfield.commands.options import device_option, duration_option, probe

if TYPE_CHECKING:
    from farfield.bench.study import Study
    from farfield.commands.display import Told

__all__ = ["study_command"]


def study_command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]...", help="Files, folders, globs. Default: Python's standard library."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="JSON or TOML with settings; options here go before it.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=RECIPE[:NAME=VALUE...]", help="An attention and its options; repeatable."),
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(metavar="N,N", help="Bytes seen at once, such as 2048,4096. (default: 2048)")
    ] = None,
    batches: Annotated[str | None, typer.Option(metavar="N,N", help="Sequences per step. (default: 1)")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="Such as 0,1,2. (default: 0)")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="next: predict the next byte. masked: hidden ones, from both sides. (default: next)"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            parser=duration_option,
            metavar="TIME",
            help="Or training time of each run, as steps at a pace that is measured first, all variants in turn.",
        ),
    ] = None,
    pace_only: Annotated[
        bool, typer.Option("--pace-only", help="Measure the time of a step of every variant, in turn, and stop there.")
    ] = False,
    tokens: Annotated[int | None, typer.Option(min=1, help="Or bytes that each run reads.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Width of the model. (default: 128)")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers. (default: 4)")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads. (default: 4)")] = None,
    ramp: Annotated[
        str | None,
        typer.Option(metavar="NxB:STEPS,...", help="Before the budget, such as 512x2:600: steps on shorter windows."),
    ] = None,
    ramps: Annotated[
        Path | None,
        typer.Option(help="Where states after the ramp are kept, for several studies. (default: DIR/ramps)"),
    ] = None,
    shift: Annotated[
        bool | None,
        typer.Option("--shift/--no-shift", help="Every position also reads the token before it. (default: no-shift)"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    embedding_lr: Annotated[
        float | None, typer.Option(help="Rate of embeddings over that of the rest. (default: 1)")
    ] = None,
    eval_tokens: Annotated[int | None, typer.Option(min=1, help="Held-out bytes to read. (default: 98304)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the processor. (default: torch's)")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of runs and results. (default: runs/study-DATE-TIME)")
    ] = None,
) -> None:
    """Train one small language model for every variant, context, batch and seed, with equal steps, time or bytes.

    Equal time is so many steps as fit into it at a pace that is measured beforehand, one step of every variant after
    the other, and kept in DIR/pace.json. Every finished run is kept in DIR/runs and not made again: the same command
    goes on where it was stopped. A run of the same name with other settings is refused. Writes DIR/study.json,
    DIR/table.md and DIR/study.png.
    """
    import torch
    from rich.console import Console
    from rich.markup import escape

    from farfield.bench.study import study, study_paces
    from farfield.bench.study_report import markdown, pace_table, rows_of, write
    from farfield.commands.display import display
    from farfield.data.text import collect

    if threads is not None:
        torch.set_num_threads(threads)
    numbers = {"contexts": contexts, "batches": batches, "seeds": seeds}
    given: dict[str, Any] = {name: _numbers(text, name) for name, text in numbers.items() if text is not None}
    if ramp is not None:
        given["ramp"] = _ramp(ramp)
    given |= {
        name: value
        for name, value in {
            "variants": variant, "task": task, "dim": dim, "depth": depth, "heads": heads, "lr": lr,
            "embedding_lr": embedding_lr,
            "shift": shift, "eval_tokens": eval_tokens, "device": device,
        }.items()
        if value is not None
    }  # fmt: skip
    budgets = {"steps": steps, "seconds": budget, "tokens": tokens}
    asked = {name: value for name, value in budgets.items() if value is not None}
    plan = _plan(config, given, asked)
    corpus = collect(paths)
    folder = out if out is not None else Path("runs") / time.strftime("study-%Y%m%d-%H%M%S")
    console = Console(highlight=False)
    screen = display(console, _told(plan))
    if pace_only:
        probe(folder)
        with Interruption() as stop, screen:
            paces = study_paces(plan, corpus, folder, watcher=screen, should_stop=stop)
        if paces is None:
            raise typer.Exit(INTERRUPTED)
        print(pace_table(plan, paces), end="")
        return
    with Interruption() as stop, screen:
        outcome = study(
            plan, corpus, folder, watcher=screen, should_stop=stop, before_first_run=lambda: probe(folder), ramps=ramps
        )  # fmt: skip
    words = ["farfield", "study", *(paths or []), *(["--config", str(config)] if config is not None else [])]
    for name, value in (given | asked).items():
        flag = "--budget" if name == "seconds" else "--variant" if name == "variants" else f"--{name.replace('_', '-')}"
        if name == "ramp":
            words += ["--ramp", str(ramp)]
        elif name == "shift":
            words += ["--shift" if value else "--no-shift"]
        elif name == "variants":
            words += [word for text in value for word in (flag, text)]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    words += ["--ramps", str(ramps)] if ramps is not None else []
    words += ["--threads", str(torch.get_num_threads()), "--out", str(folder)]
    print(markdown(rows_of(outcome.runs), plan.unit), end="")
    written = write(outcome, folder, shlex.join(words))
    for note in outcome.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    for failure in outcome.failures:
        console.print(f"[red]{escape(failure.attention)}, seed {failure.seed}:[/red] {escape(failure.reason)}")
    console.print(f"written: {', '.join(escape(str(path)) for path in written)}", soft_wrap=True)
    if outcome.interrupted:
        console.print(f"interrupted; the same command with --out {escape(str(folder))} goes on", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    if not outcome.runs:
        raise typer.Exit(FAILED)


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} {text!r}: whole numbers between commas would be accepted") from None


def _ramp(text: str) -> list[list[int]]:
    try:
        stages = [re.fullmatch(r"(\d+)x(\d+):(\d+)", piece).groups() for piece in text.split(",")]  # type: ignore[union-attr]
    except AttributeError:
        raise ValueError(
            f"--ramp {text!r}: CONTEXTxBATCH:STEPS between commas, such as 256x4:300,1024x1:100, would be accepted"
        ) from None
    return [[int(number) for number in stage] for stage in stages]


def _plan(config: Path | None, given: dict[str, Any], budgets: dict[str, Any]) -> Study:
    """The file's settings under those of the command line; a budget given there takes the place of the file's."""
    from farfield.bench.study import Study

    values: dict[str, Any] = {}
    if config is not None:
        try:
            text = config.read_text()
            values = tomllib.loads(text) if config.suffix == ".toml" else json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"cannot read {config}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{config} holds no settings by name")
        # What a study is for is for its readers.
        values.pop("about", None)
    if budgets:
        values = {name: value for name, value in values.items() if name not in ("steps", "seconds", "tokens")}
    values = values | given | budgets
    values["device"] = device_option(values.get("device"))
    return Study.from_dict(values)


def _told(plan: Study) -> Told:
    from farfield.bench.tables import bytes_in_words
    from farfield.commands.display import Told

    def row(run: Any) -> tuple[str, ...]:
        speed = run.tokens / run.seconds if run.seconds > 0 else 0.0
        return (f"{run.bits:.4f}", f"{run.steps:,}", f"{speed:,.0f}", bytes_in_words(run.peak_bytes))

    def bits(step: Any) -> float:
        value: float = step.train_bits
        return value

    return Told(
        title=f"farfield study: {len(plan.plan)} runs, {plan.budget_in_words}",
        seeds=len(plan.seeds),
        columns=(f"held-out {plan.unit}", "steps", "tokens/s", "peak memory"),
        row=row,
        result=lambda run: f"{run.bits:.4f} held-out {plan.unit}",
        loss=bits,
        loss_name=f"train {plan.unit}",
        rate=lambda speed: f"{speed:,.0f}",
        rate_name="tokens/s",
        tested="held-out window",
        costed="",
        cost_heading="",
    )
