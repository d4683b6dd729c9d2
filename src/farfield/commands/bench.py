"""``farfield bench``: any recipe beside others and beside peers, on this machine."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.commands.errors import FAILED, INTERRUPTED
from farfield.commands.interrupt import Interruption
from farfield.commands.options import device_option, probe, recipe_options, words

if TYPE_CHECKING:
    from rich.console import Console

    from farfield.bench.case import Case
    from farfield.bench.subjects import Subject
    from farfield.bench.sweep import Row, Settings, Watcher

__all__ = ["bench_command"]


def bench_command(
    attention: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME[:OPTION=VALUE,...]]...",
            help="Recipes with options, such as fma:block=32,impl=torch. Default: fma window.",
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(metavar="NAME,NAME", help="Peers, with options as above; all or none."),
    ] = "sdpa",
    lengths: Annotated[str, typer.Option(metavar="N,N", help="Tokens, or grids: 1k,4096,64x64.")] = "1k,4k",
    dims: Annotated[str, typer.Option(metavar="D,D", help="Axes of the grids made from numbers of tokens.")] = "1",
    dtypes: Annotated[str, typer.Option(metavar="TYPE,TYPE", help="float32, bfloat16, ...")] = "float32",
    mode: Annotated[
        str, typer.Option(metavar="MODE,MODE", help="forward, backward (forward and backward), decode.")
    ] = "forward,backward",
    causal: Annotated[
        bool | None, typer.Option("--causal/--no-causal", help="Hide later tokens. (default: in 1-D)")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels per head.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of every case.")] = 5,
    limit: Annotated[str, typer.Option(metavar="TIME", help="A call predicted to take longer is left out.")] = "20s",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print FLOPs, bytes and least time by the cost model; run no attention.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the results. (default: runs/bench-DATE-TIME)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the finished cases in --out.")] = False,
) -> None:
    """Time, memory, share of the machine's ceiling and error of attentions and peers, interleaved in one run.

    Writes DIR/bench.html, DIR/results.json and PNG plots. What cannot run is left out with the reason. Ctrl-C reports
    the finished cases and exits with 130; --resume makes what is missing.
    """
    if resume and out is None:
        raise ValueError("--resume needs the folder to go on with; add --out DIR")
    from rich.console import Console
    from rich.markup import escape

    from farfield.bench import subjects as catalogue
    from farfield.bench.machine import describe_machine
    from farfield.bench.sweep import Settings, Sweep, sweep
    from farfield.bench.sweep_report import read_rows, save, write
    from farfield.commands.options import duration

    chosen = _subjects(attention or ["fma", "window"], peers)
    place = device_option(device)
    settings = Settings(
        cases=tuple(_cases(lengths, dims, dtypes, causal, batch, heads, head_dim, place)),
        modes=_modes(mode),
        repeats=repeats,
        limit=duration(limit),
    )
    console = Console(highlight=False)
    if plan:
        _print_plan(console, chosen, settings)
        return
    machine = describe_machine(place)
    folder = out if out is not None else Path("runs") / time.strftime("bench-%Y%m%d-%H%M%S")
    key = {
        "attentions": catalogue.names(chosen),
        "repeats": settings.repeats,
        "limit": settings.limit,
        "machine": {name: machine[name] for name in ("processor", "threads", "device", "torch", "farfield")},
    }
    finished = read_rows(folder, key) if resume else _must_be_new(folder)
    probe(folder)
    command = _command_line(chosen, settings, folder)
    so_far = Sweep(interrupted=True)
    display = _display(console)

    def keep(rows: Sequence[Row]) -> None:
        so_far.rows += rows
        save(so_far, key, machine, command, folder)

    display.keep = keep
    with Interruption() as stop, display:
        try:
            result = sweep(chosen, settings, finished=finished, watcher=display, should_stop=stop)
        except KeyboardInterrupt:
            console.print(
                f"stopped at once; finished cases are in {folder}, --resume goes on with them", soft_wrap=True
            )
            raise typer.Exit(INTERRUPTED) from None
    page = write(result, key, machine, command, folder)
    console.print(f"report: {escape(str(page))}", soft_wrap=True)
    if result.interrupted:
        console.print(
            f"interrupted; the same command with --resume --out {escape(str(folder))} makes what is missing",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED)
    if not any(row.seconds is not None for row in result.rows):
        raise typer.Exit(FAILED)


def _subjects(recipes: Sequence[str], peers: str) -> list[Subject]:
    """Recipes, then peers, each name once."""
    from farfield.bench import peers as other
    from farfield.bench.subjects import names, recipe, split_label

    chosen = []
    for entry in recipes:
        name, options = split_label(entry)
        chosen.append(recipe(name, recipe_options(options), entry.strip()))
    asked = _entries(peers)
    if [entry.lower() for entry in asked] == ["all"]:
        asked = other.names()
    if [entry.lower() for entry in asked] != ["none"]:
        for entry in asked:
            name, options = split_label(entry)
            chosen.append(other.peer(name, recipe_options(options), entry))
    names(chosen)
    return chosen


def _entries(text: str) -> list[str]:
    """Peers apart: in ``sdpa,natten:window=9,stride=2`` there are two, a piece with = alone goes on with options."""
    entries: list[str] = []
    for piece in words(text):
        if entries and "=" in piece and ":" not in piece:
            entries[-1] += f",{piece}"
        else:
            entries.append(piece)
    return entries


def _cases(
    lengths: str,
    dims: str,
    dtypes: str,
    causal: bool | None,
    batch: int,
    heads: int,
    head_dim: int,
    device: str,
) -> list[Case]:
    """Every grid in every dtype, the shorter first within a number of axes."""
    from farfield.bench.case import Case, dtype_of, grid_of, parse_length

    axes = []
    for word in words(dims):
        if word not in ("1", "2", "3"):
            raise ValueError(f"--dims {dims}: {word!r} is not a number of axes; 1, 2 and 3 would be accepted")
        axes.append(int(word))
    asked = [parse_length(word) for word in words(lengths)]
    grids = [grid for grid in asked if len(grid) > 1]
    grids += [grid_of(grid[0], d) for d in axes for grid in asked if len(grid) == 1]
    kinds = [dtype_of(word) for word in words(dtypes)]
    for name, several in (("lengths", grids), ("dtypes", kinds)):
        if not several:
            raise ValueError(f"--{name} is empty; give at least one")
    if causal and any(len(grid) > 1 for grid in grids):
        raise ValueError("--causal: an order of tokens exists in 1-D only; leave it out, or measure 1-D alone")
    unique = sorted(dict.fromkeys(grids), key=lambda grid: (len(grid), _product(grid)))
    return [
        Case(grid, kind, len(grid) == 1 if causal is None else causal, batch, heads, head_dim, device)
        for kind in dict.fromkeys(kinds)
        for grid in unique
    ]


def _product(grid: tuple[int, ...]) -> int:
    import math

    return math.prod(grid)


def _modes(text: str) -> tuple[str, ...]:
    from farfield.bench.model import MODES

    asked = words(text)
    unknown = [word for word in asked if word not in MODES]
    if unknown or not asked:
        raise ValueError(f"--mode {text}: {', '.join(MODES)} would be accepted (backward is forward and backward)")
    return tuple(dict.fromkeys(asked))


def _must_be_new(folder: Path) -> list[Row]:
    from farfield.bench.sweep_report import RESULTS_FILE

    if (folder / RESULTS_FILE).exists():
        raise ValueError(f"{folder} holds results already; add --resume to keep them, or give another --out")
    return []


def _command_line(subjects: Sequence[Subject], settings: Settings, folder: Path) -> str:
    """The command that measures the same again."""
    case = settings.cases[0]
    grids = dict.fromkeys("x".join(map(str, c.grid)) for c in settings.cases)
    said = ["farfield", "bench", *(s.label for s in subjects if not s.peer)]
    said += ["--peers", ",".join(s.label for s in subjects if s.peer) or "none", "--lengths", ",".join(grids)]
    said += ["--dtypes", ",".join(dict.fromkeys(c.dtype for c in settings.cases)), "--mode", ",".join(settings.modes)]
    orders = {(c.dims == 1, c.causal) for c in settings.cases}
    if orders - {(True, True), (False, False)}:
        said += ["--causal" if case.causal else "--no-causal"]
    said += ["--batch", str(case.batch), "--heads", str(case.heads), "--head-dim", str(case.head_dim)]
    said += ["--repeats", str(settings.repeats), "--limit", f"{settings.limit:g}", "--device", case.device]
    return shlex.join([*said, "--out", str(folder)])


def _print_plan(console: Console, subjects: Sequence[Subject], settings: Settings) -> None:
    from rich.markup import escape

    from farfield.bench.sweep import MODE_NAMES, plan
    from farfield.bench.sweep_report import left_out, plan_table

    predictions = plan(subjects, settings)
    for case in settings.cases:
        for mode in settings.modes:
            console.print(f"[bold]{case.name}, {MODE_NAMES[mode]}[/bold]", soft_wrap=True)
            own = [p for p in predictions if (p.case, p.mode) == (case, mode)]
            if any(p.reason is None for p in own):
                console.print(plan_table(own))
            for reason, labels in left_out(own).items():
                console.print(f"  {escape(', '.join(labels))} left out: {escape(reason)}", soft_wrap=True)
    console.print(
        "FLOP: useful ones, 4·D per pair of a query and what it sees, 14·D forward and backward. Floor: the least time "
        "at this machine's rates of matrix products and copies, which were measured just now. No attention was run.",
        style="dim",
    )


def _display(console: Console) -> Any:
    """A watcher and context manager: a bar on a terminal, lines elsewhere."""
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from farfield.bench.sweep import MODE_NAMES, Watcher
    from farfield.bench.sweep_report import groups, left_out, result_table, title

    base: type[Watcher] = Watcher
    live = console.is_terminal

    class Shown(base):  # type: ignore[misc, valid-type]
        keep: Any = None

        def __init__(self) -> None:
            self.place = ""
            self.said: set[tuple[str, str]] = set()
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True,
                disable=not live,
            )  # fmt: skip
            self.task: Any = None

        def __enter__(self) -> Shown:
            return self

        def __exit__(self, *_: object) -> None:
            self.bar.stop()

        def _say(self, words: str) -> None:
            self.bar.update(self.task, description=f"{self.place}: {escape(words)}")

        def on_case(self, case: Case, mode: str, number: int, total: int) -> None:
            self.place = f"{case.name}, {MODE_NAMES[mode]}"
            if self.task is None:
                self.task = self.bar.add_task(self.place, total=total)
                self.bar.start()
            self.bar.update(self.task, completed=number - 1, total=total)
            if not live:
                console.print(f"case {number} of {total}: {self.place}", soft_wrap=True)

        def on_subject(self, label: str) -> None:
            self._say(f"{label}, warming up")

        def on_turn(self, turn: int, turns: int) -> None:
            self._say(f"turn {turn} of {turns}")

        def on_rows(self, rows: Sequence[Row], reused: bool) -> None:
            self.keep(rows)
            for case, mode, several in groups(rows):
                found = " (found finished)" if reused else ""
                console.print(f"[bold]{escape(title(case, mode, several))}[/bold]{found}", soft_wrap=True)
                if any(row.reason is None for row in several):
                    console.print(result_table(several, console.width))
                for reason, labels in left_out(several).items():
                    new = [label for label in labels if (label, reason) not in self.said]
                    self.said.update((label, reason) for label in new)
                    if new:  # the same reason again would only hide the others
                        console.print(f"  {escape(', '.join(new))} left out: {escape(reason)}", soft_wrap=True)

    return Shown()
