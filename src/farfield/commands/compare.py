"""``farfield compare``: which attention for my text, images or fields, on my machine?"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.commands.display import Told, display
from farfield.commands.errors import FAILED, INTERRUPTED
from farfield.commands.interrupt import Interruption
from farfield.commands.options import device_option, duration, duration_option, in_words, probe, recipe_options

if TYPE_CHECKING:
    from rich.console import Console

    from farfield.bench.compare import Outcome, Settings

__all__ = ["compare_command"]

_DEFAULT_BUDGET = 60.0
_TEXT_ONLY = ("context", "dim", "depth", "heads", "eval_tokens")
_VISION_ONLY = (
    "size", "image_size", "test_sizes", "variables", "frames", "ahead", "fill", "transpose", "latent", "widths",
    "depths", "head_dim", "patch", "position", "examples", "workers",
)  # fmt: skip
_KINDS = ("auto", "text", "images", "fields")


def compare_command(
    ctx: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="Text: files, folders, globs. Images: a folder with one folder per class, or .npz. Fields: .npz, .nc. "
            "Default: Python's standard library.",
        ),
    ] = None,
    attention: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Recipes, see `farfield recipes`.")
    ] = "dense,window,fma",
    kind: Annotated[str, typer.Option(metavar="KIND", help="What PATH holds: auto, text, images or fields.")] = "auto",
    context: Annotated[int, typer.Option(min=1, help="Text: bytes seen at once.")] = 4096,
    budget: Annotated[
        float | None,
        typer.Option(parser=duration_option, metavar="TIME", help="Training time of each run: 60s, 2m. (default: 60s)"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Equal steps instead of equal time.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per attention; several give the spread.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the report. (default: runs/compare-DATE-TIME)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the finished runs in --out, make the others.")] = False,
    dim: Annotated[int, typer.Option(min=1, help="Text: width of the model.")] = 128,
    depth: Annotated[int, typer.Option(min=1, help="Text: layers.")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Text: attention heads.")] = 4,
    block: Annotated[
        int | None,
        typer.Option(
            min=1, help="Leaf block (per axis), for the recipes that have one. (default: text 64, images and fields 4)"
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Summaries per group (per axis), for the recipes that have them. (default: 8; 2; in 3-D 1)"
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="Another option, for the recipes that have it; of images and fields also position_bias=OCTAVES, "
            "where all attentions take it. Repeatable.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples per step. (default: text 1, images by class 32, others 8)")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    eval_tokens: Annotated[int, typer.Option(min=1, help="Text: held-out bytes to predict.")] = 98304,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")] = None,
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Measure one layer by length, too.")] = True,
    cost_budget: Annotated[str, typer.Option(metavar="TIME", help="Time for measuring one layer by length.")] = "45s",
    size: Annotated[
        str, typer.Option(metavar="NAME", help="Images, fields: tiny, small, base, vit-tiny, vit-small, vit-base.")
    ] = "tiny",
    image_size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Images: size to train at. Single fields, --fill: size of the crops."),
    ] = None,
    test_sizes: Annotated[str | None, typer.Option(metavar="HxW,HxW", help="Images: further sizes to test at.")] = None,
    variables: Annotated[str | None, typer.Option(metavar="NAME,NAME", help="Fields: which arrays.")] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Fields in time: frames read, and predicted without --ahead; above 1 in 3-D. (default: 1)"
        ),
    ] = None,
    ahead: Annotated[
        int | None,
        typer.Option(
            min=1, help="Fields in time: next frames to predict, such as 1 with --frames 12. (default: --frames)"
        ),
    ] = None,
    fill: Annotated[
        bool,
        typer.Option("--fill", help="Fields with missing cells: fill holes in the frames of one variable."),
    ] = False,
    transpose: Annotated[
        bool, typer.Option("--transpose", help="Square pairs: exchange the axes of training examples at random.")
    ] = False,
    latent: Annotated[
        bool, typer.Option("--latent", help="Fields: the backbone works on the grid of training at every test size.")
    ] = False,
    widths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Images, fields: instead of those of --size.")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Images, fields: instead of those of --size.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Images, fields: instead of that of --size.")] = None,
    patch: Annotated[
        str | None, typer.Option(metavar="N", help="Images, fields: pixels of a token, such as 4 or 1x4x4.")
    ] = None,
    position: Annotated[
        str | None, typer.Option(metavar="NAME", help="Images, fields: none, conv, waves or table.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Images, fields: held-out examples to test on at most.")] = 1000,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Images, fields: processes that read ahead. (default: images 1, fields 0)")
    ] = None,
) -> None:
    """Train the same small model once per attention, and say which suits this text, these images or these fields.

    What PATH holds decides: text is predicted byte by byte; of a folder of images by class, or an .npz file of encoded
    images with labels or masks, the classes; of pairs, series and single fields in .npz or .nc files, the output, what
    comes next, what is hidden. Images that cannot be read are named and left out.

    Whole files of text are held out where there are several. Exact copies of a file are left out, near copies are not:
    text that repeats with small changes can stand on both sides.

    Writes DIR/report.html (plots, numbers, answer; one file that needs no network), DIR/results.json and
    DIR/runs/*.json. Ctrl-C reports what is finished and exits with 130; --resume makes what is missing.
    """
    if steps is not None and budget is not None:
        raise ValueError(f"--budget {in_words(budget)} and --steps {steps} exclude each other; give one of them")
    if resume and out is None:
        raise ValueError("--resume needs the folder to go on with; add --out DIR")
    kind = _kind(kind, paths or [])
    _refuse_foreign(ctx, kind)
    folder = out if out is not None else Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    if kind != "text":
        from farfield.bench.vision import VisionSettings
        from farfield.commands.compare_vision import compare_images_or_fields, open_data

        given = [Path(path) for path in paths or []]
        data = open_data(
            kind, given, size=image_size, test_sizes=test_sizes, variables=variables, frames=frames, ahead=ahead,
            fill=fill, transpose=transpose,
        )  # fmt: skip
        small = data.dims == 2
        defaults = {"block": 4, "rank": 2 if small else 1}
        asked = {name: value for name, value in (("block", block), ("rank", rank)) if value is not None}
        vision = VisionSettings(
            attentions=tuple(name.strip() for name in attention.split(",") if name.strip()),
            size=size,
            seconds=None if steps is not None else budget if budget is not None else _DEFAULT_BUDGET,
            steps=steps,
            seeds=seeds,
            first_seed=seed,
            widths=_numbers("widths", widths, ","),
            depths=_numbers("depths", depths, ","),
            head_dim=head_dim,
            patch=_patch(patch),
            position=position,
            options={**defaults, **asked, **recipe_options(option or [])},
            latent=latent,
            batch=batch,
            lr=lr,
            examples=examples,
            workers=workers,
            device=device_option(device),
            cost_seconds=duration(cost_budget) if cost else None,
        )
        about: list[str] = [*(paths or []), "--kind", kind]
        for name, value in (
            ("image-size", image_size), ("test-sizes", test_sizes), ("variables", variables), ("frames", frames),
            ("ahead", ahead),
        ):  # fmt: skip
            about += [] if value is None else [f"--{name}", str(value)]
        about += [f"--{name}" for name, said in (("fill", fill), ("transpose", transpose)) if said]
        compare_images_or_fields(vision, data, about, folder, resume=resume)
        return
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
        options={"block": block or 64, "rank": rank or 8, **recipe_options(option or [])},
        batch=batch or 1,
        lr=lr,
        eval_tokens=eval_tokens,
        device=device_option(device),
        cost_seconds=duration(cost_budget) if cost else None,
    )
    settings.validate()
    corpus = collect(paths)
    console = Console(highlight=False)
    screen = display(console, _told(settings))
    with Interruption() as stop, screen:
        try:
            outcome = compare(
                settings,
                corpus,
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
    outcome.command = _command_line(paths or [], settings, folder)
    # The answer first: whatever happens to the files, the training was not for nothing.
    _print_outcome(console, outcome, folder)
    report = write(outcome, folder)
    console.print(f"report: {escape(str(report))}", soft_wrap=True)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not outcome.runs:
        raise typer.Exit(FAILED)


def _kind(kind: str, paths: Sequence[str]) -> str:
    if kind not in _KINDS:
        raise ValueError(f"--kind {kind!r} is not known; give one of {', '.join(_KINDS)}")
    if kind == "auto":
        from farfield.data.kinds import kind_of

        return kind_of(paths)
    if kind != "text" and not paths:
        raise ValueError(f"--kind {kind} needs a PATH")
    missing = [path for path in paths if kind != "text" and not Path(path).exists()]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {missing[0]}")
    return kind


def _refuse_foreign(ctx: typer.Context, kind: str) -> None:
    """An option of another kind of data does nothing, and what does nothing should not be taken."""
    names = _VISION_ONLY if kind == "text" else _TEXT_ONLY
    sources = {name: ctx.get_parameter_source(name) for name in names}
    # By name: typer may bring its own copy of click, and so another class of the same values.
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        option = "--" + given[0].replace("_", "-")
        whose = "images and fields" if kind == "text" else "text"
        raise ValueError(f"{option} is for {whose}; PATH holds {kind} (--kind says otherwise)")


def _numbers(name: str, text: str | None, between: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    pieces = text.lower().split(between)
    if not all(piece.strip().isdecimal() and int(piece) > 0 for piece in pieces):
        raise ValueError(f"--{name} {text!r}: write whole numbers with {between!r} between them")
    return tuple(int(piece) for piece in pieces)


def _patch(text: str | None) -> int | tuple[int, ...] | None:
    sides = _numbers("patch", text, "x")
    return sides[0] if sides is not None and len(sides) == 1 else sides


def _told(settings: Settings) -> Told:
    def row(run: Any) -> tuple[str, ...]:
        from farfield.bench.tables import bytes_in_words

        speed = run.tokens / run.seconds if run.seconds > 0 else 0.0
        return (f"{run.bits:.3f}", f"{run.steps:,}", f"{speed:,.0f}", bytes_in_words(run.peak_bytes))

    def bits(step: Any) -> float:
        value: float = step.train_bits
        return value

    return Told(
        title=f"farfield compare: context {settings.context:,}, {settings.budget_in_words}",
        seeds=settings.seeds,
        columns=("held-out bits/byte", "steps", "tokens/s", "peak memory"),
        row=row,
        result=lambda run: f"{run.bits:.3f} held-out bits per byte",
        loss=bits,
        loss_name="train bits/byte",
        rate=lambda speed: f"{speed:,.0f}",
        rate_name="tokens/s",
        tested="held-out window",
        costed="one layer of",
        cost_heading="cost of one layer by length",
    )


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
