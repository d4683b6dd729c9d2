"""``farfield train``: one model, trained to a checkpoint."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.commands.errors import INTERRUPTED
from farfield.commands.interrupt import Interruption
from farfield.commands.options import duration_option, in_words, recipe_options

if TYPE_CHECKING:
    from farfield.training.checkpoint import Checkpoint
    from farfield.training.loop import Progress as Step
    from farfield.training.loop import Trainer

__all__ = ["train_command"]

_RESULT_FILE = "evaluation.json"
_SAVE_EVERY = 60.0  # seconds; a crash costs at most that much training


def train_command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]...", help="Files, folders, globs. Default: Python's standard library."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint.")] = Path("runs/train"),
    attention: Annotated[str | None, typer.Option(help="A recipe, see `farfield recipes`. (default: fma)")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="An option of the recipe; repeatable.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Bytes seen at once. (default: 4096)")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps to take.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(parser=duration_option, metavar="TIME", help="Training time: 60s, 2m, 1h. (default: 60s)"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the checkpoint in --out.")] = False,
    dim: Annotated[int | None, typer.Option(help="Width. (default: 128)")] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks. (default: 4)")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads. (default: 4)")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per step. (default: 1)")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of parameters and data order. (default: 0)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")] = None,
) -> None:
    """Train one byte-level language model to a checkpoint: DIR/config.json and DIR/checkpoint.safetensors.

    Ctrl-C finishes the step, saves, and exits with 130; --resume goes on exactly there. When resuming, everything but
    --steps and --budget is taken from the checkpoint.
    """
    import torch
    from rich.console import Console

    from farfield.data.text import collect
    from farfield.models.language import LanguageConfig, LanguageModel
    from farfield.training import checkpoint
    from farfield.training.evaluate import evaluate
    from farfield.training.files import write_json
    from farfield.training.loop import TrainConfig, Trainer

    console = Console(highlight=False)
    asked_model = _given(
        attention=attention,
        options=recipe_options(option) if option else None,
        dim=dim,
        depth=depth,
        num_heads=heads,
        context=context,
    )
    asked_train = _given(context=context, batch=batch, lr=lr, seed=seed)
    saved: Checkpoint | None = None
    if resume:
        if not checkpoint.exists(out):
            raise ValueError(f"{out} holds no checkpoint to resume; leave out --resume to start one there")
        saved = checkpoint.load(out)
        _refuse_changes(saved, asked_model, asked_train)
        model_config = saved.model
        end = _given(steps=steps, seconds=budget) or _given(steps=saved.train.steps, seconds=saved.train.seconds)
        train_config = dataclasses.replace(saved.train, **{"steps": None, "seconds": None, **end})
        recorded = saved.info.get("paths")
        sources = [os.path.abspath(path) for path in paths] if paths else recorded
    else:
        if checkpoint.exists(out):
            raise ValueError(f"{out} already holds a checkpoint; add --resume to go on with it, or give another --out")
        model_config = LanguageConfig(**{"attention": "fma", **asked_model})
        train_config = TrainConfig(
            **asked_train, **(_given(steps=steps, seconds=budget) or {"seconds": duration_option("60s")})
        )
        sources = [os.path.abspath(path) for path in paths] if paths else None

    corpus = collect(sources)
    if saved is not None and corpus.fingerprint != saved.info.get("fingerprint"):
        raise ValueError(
            f"the text in {corpus.source} is not the one that {out} was trained on; give the same files, or start "
            "another run with another --out"
        )
    split = corpus.split(train_config.context)
    try:
        model = LanguageModel(model_config, seed=train_config.seed).to(_device(device))
    except TypeError as error:  # an option that the recipe does not take
        raise ValueError(str(error)) from error
    trainer = Trainer(model, split.train, train_config)
    if saved is not None:
        saved.restore(trainer)
    info = {"paths": sources, "fingerprint": corpus.fingerprint, "torch": torch.__version__}

    console.print(
        f"{model_config.attention}: {model.parameter_count():,} parameters, context {train_config.context:,}, "
        f"{len(split.train):,} bytes to train on, {len(split.valid):,} held out ({corpus.source})",
        soft_wrap=True,
    )
    if saved is not None:
        console.print(f"resuming after step {trainer.step:,} ({in_words(trainer.seconds)} of training)")
    with Interruption() as interruption:
        # Saved before the first step too: a folder that cannot be written is better known now than after an hour.
        checkpoint.save(out, trainer, info)
        _run(trainer, console, interruption, save=lambda: checkpoint.save(out, trainer, info))
        checkpoint.save(out, trainer, info)
    if interruption.requested and not trainer.done:
        console.print(f"stopped after step {trainer.step:,}; go on with: farfield train --resume --out {out}")
        raise typer.Exit(INTERRUPTED)

    with console.status("reading the held-out text"):
        result = evaluate(model, split.valid, train_config.context)
    write_json(out / _RESULT_FILE, {"step": trainer.step, "seconds": trainer.seconds, **dataclasses.asdict(result)})
    console.print(
        f"{trainer.step:,} steps in {in_words(trainer.seconds)}; held-out text: {result.bits:.3f} bits per byte "
        f"over {result.tokens:,} bytes; checkpoint in {out}",
        soft_wrap=True,
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refuse_changes(saved: Checkpoint, model: dict[str, Any], train: dict[str, Any]) -> None:
    """A resumed run must be the same run."""
    differences = []
    for was, asked in ((saved.model, model), (saved.train, train)):
        for name, value in asked.items():
            if getattr(was, name) != value:
                differences.append(f"{name} {value!r} (was {getattr(was, name)!r})")
    if differences:
        raise ValueError(
            f"cannot resume {saved.folder} with another {', '.join(dict.fromkeys(differences))}; leave these out, or "
            "start another run with another --out"
        )


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def _run(trainer: Trainer, console: Any, interruption: Interruption, save: Callable[[], None]) -> None:
    """Train with a live line on a terminal and a line now and then elsewhere, saving every minute."""
    from rich.progress import BarColumn, Progress, TextColumn

    live = Progress(
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.fields[bits]:.3f} bits/byte  {task.fields[speed]:,.0f} bytes/s  {task.fields[left]} left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    began, saved_at, printed = trainer.seconds, time.monotonic(), trainer.fraction
    tokens_before = trainer.history[-1].tokens if trainer.history else 0
    bits = 0.0
    task = live.add_task("", total=1.0, step=trainer.step, bits=8.0, speed=0.0, left="?")

    def report(progress: Step) -> None:
        nonlocal saved_at, printed, bits
        # A running mean: single windows of text differ far more than steps do.
        bits = progress.train_bits if bits == 0.0 else 0.95 * bits + 0.05 * progress.train_bits
        spent, fraction = progress.seconds - began, trainer.fraction
        speed = (progress.tokens - tokens_before) / spent if spent > 0 else 0.0
        left = in_words(progress.seconds * (1 - fraction) / fraction) if fraction > 0 else "?"
        live.update(task, completed=fraction, step=f"{progress.step:,}", bits=bits, speed=speed, left=left)
        if live.disable and (fraction >= printed + 0.1 or trainer.done):
            printed = fraction
            console.print(f"step {progress.step:,}  {bits:.3f} bits/byte  {speed:,.0f} bytes/s  {left} left")
        if time.monotonic() - saved_at > _SAVE_EVERY:
            save()
            saved_at = time.monotonic()

    with live:
        trainer.run(on_progress=report, should_stop=interruption)
