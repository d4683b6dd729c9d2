"""``farfield eval``: a pretrained model, converted or not, on text: perplexity, keys read, time, state, passkeys."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from farfield.commands.options import device_option

if TYPE_CHECKING:
    from rich.console import Console

    from farfield.interop.transformers.decoding import Decoding
    from farfield.interop.transformers.evaluate import Cost, Passkey, Result
    from farfield.interop.transformers.pretrained import Pretrained

__all__ = ["eval_command"]

_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


class _Row(NamedTuple):
    """One text at one length: results and costs, original first where there is one."""

    text: str
    length: int
    results: list[Result]
    costs: list[Cost | None]


def eval_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder of Transformers, or a GGUF file of a Llama.")
    ],
    text: Annotated[list[Path], typer.Option("--text", help="Text to predict, plain or .xz; repeatable.")],
    against: Annotated[
        Path | None, typer.Option(metavar="ORIGINAL", help="Measure this model beside it, window by window.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,N", help="Tokens of context; Nx3 for another number of windows than --windows.")
    ] = "2048,8192",
    windows: Annotated[int, typer.Option(min=1, help="Windows of each length, from the start of each text.")] = 3,
    passkey: Annotated[
        bool, typer.Option("--passkey", help="Also hide keys of five digits in the first text.")
    ] = False,
    trials: Annotated[
        int, typer.Option(min=1, help="Keys for each length and depth, each in another stretch of the text.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the keys.")] = 0,
    decode: Annotated[
        int, typer.Option(metavar="N", min=0, help="Also go on for N tokens, one by one, from each length.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw perplexity by length: PNG, SVG or PDF file.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")] = None,
) -> None:
    """Perplexity by context length, keys read, seconds and state size, of a model and of the original side by side.

    All tokens of a window but the first are scored. Keys read and state are counted from the settings; seconds are
    measured here, both models in turn.
    """
    from rich.console import Console

    from farfield.interop.transformers import texts
    from farfield.interop.transformers.decoding import WARM
    from farfield.interop.transformers.decoding import decode as go_on
    from farfield.interop.transformers.evaluate import Result, cost_of, measure
    from farfield.interop.transformers.evaluate import passkey as hide
    from farfield.interop.transformers.pretrained import read

    wanted = _lengths(lengths, windows)
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw to {plot}; give a name that ends in .png, .svg or .pdf")
    if plot is not None and not plot.parent.is_dir():
        raise ValueError(f"cannot draw to {plot}: there is no folder {plot.parent}")
    place = device_option(device)
    contents = {path: texts.read_text(path) for path in text}
    models: list[Pretrained] = [read(path, place) for path in ([against] if against else []) + [model]]
    names = ["original", "converted"] if against else ["model"]
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    rows = []
    for path, content in contents.items():
        for length, number in wanted:
            # One division into tokens for both: the perplexities are of the same tokens.
            spans = texts.windows(models[-1].tokenizer, content, length, number, str(path))
            if len(spans) < number:
                errors.print(f"{path} has {len(spans)} of {number} windows of {length:,} tokens", soft_wrap=True)
            results = [Result() for _ in models]
            for ids in spans:
                original = None
                for pretrained, result in zip(models, results, strict=True):
                    original = measure(pretrained.model, ids, result, original)
            rows.append(_Row(path.name, length, results, [cost_of(p.model, length) for p in models]))
            if not as_json:
                errors.print(_line(rows[-1]), soft_wrap=True)
    keys = []
    if passkey:
        filler = next(iter(contents.values()))
        for length, _ in wanted:
            keys.append([hide(p.model, p.tokenizer, filler, length, _DEPTHS, trials, seed) for p in models])
    steps = []
    if decode:
        path, content = next(iter(contents.items()))
        for length, _ in wanted:
            (ids,) = texts.windows(models[-1].tokenizer, content, length + WARM + decode, 1, str(path))
            steps.append(go_on([p.model for p in models], ids, decode))
    if as_json:
        typer.echo(json.dumps(_report(names, rows, keys, steps), indent=1))
    else:
        _print(console, names, rows, keys)
        _print_steps(console, names, steps)
    if plot is not None:
        _draw(names, rows, plot)
        errors.print(f"drawn to {plot}", soft_wrap=True)


def _lengths(text: str, windows: int) -> list[tuple[int, int]]:
    """[(2048, 3), (8192, 1)] from ``2048,8192x1`` and 3 windows."""
    found = []
    for piece in text.split(","):
        length, times, number = piece.strip().partition("x")
        if not length.isdecimal() or int(length) < 2 or (times and not (number.isdecimal() and int(number))):
            raise ValueError(f"{piece.strip()!r} is no length; write tokens like 2048, or 2048x3 for three windows")
        found.append((int(length), int(number) if times else windows))
    return found


def _line(row: _Row) -> str:
    return f"{row.text}, {row.length:,}: " + ", ".join(f"{r.perplexity:.3f}" for r in row.results)


def _report(
    names: list[str], rows: list[_Row], keys: list[list[list[Passkey]]], steps: list[list[Decoding]]
) -> dict[str, Any]:
    def entry(result: Result, cost: Cost | None) -> dict[str, Any]:
        return {
            "perplexity": result.perplexity,
            "losses": result.losses,
            "divergence": result.divergence,
            "keys": None if cost is None else cost.keys,
            "state_bytes": None if cost is None else cost.state,
            "seconds": result.seconds,
            "attention_seconds": result.attention,
        }

    return {
        "texts": [
            {
                "text": row.text,
                "length": row.length,
                "windows": row.results[0].windows,
                **{n: entry(r, c) for n, r, c in zip(names, row.results, row.costs, strict=True)},
            }
            for row in rows
        ],
        "passkey": [
            {name: [key._asdict() for key in found] for name, found in zip(names, at_length, strict=True)}
            for at_length in keys
        ],
        "decoding": [
            {name: asdict(found) for name, found in zip(names, at_length, strict=True)} for at_length in steps
        ],
    }


def _print(console: Console, names: list[str], rows: list[_Row], keys: list[list[list[Passkey]]]) -> None:
    from rich.table import Table

    both = len(names) > 1
    table = Table(title="perplexity, keys read, seconds (in attention), state")
    for column in ("text", "tokens", "windows"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for heading in ("perplexity", "keys read", "seconds", "in attention", "state"):
        for name in names:
            table.add_column(f"{heading}\n{name}" if both else heading, justify="right")
        if both and heading == "perplexity":
            table.add_column("change", justify="right")
            table.add_column("divergence,\nnats per token", justify="right")
    for row in rows:
        cells = [row.text, f"{row.length:,}", str(row.results[0].windows)]
        cells += [f"{r.perplexity:.3f}" for r in row.results]
        if both:
            cells.append(f"{row.results[1].perplexity / row.results[0].perplexity - 1:+.2%}")
            cells.append(f"{row.results[1].divergence:.4f}")
        cells += ["–" if c is None else f"{c.keys:.1%}" for c in row.costs]
        cells += [f"{r.seconds:.2f}" for r in row.results] + [f"{r.attention:.2f}" for r in row.results]
        cells += ["–" if c is None else f"{c.state / 1e6:.1f} MB" for c in row.costs]
        table.add_row(*cells)
    console.print(table)
    if not keys:
        return
    hidden = Table(title="passkey: digits right (whole keys right), nats per token")
    for column in ("tokens", "depth", *names):
        hidden.add_column(column, justify="right")
    for at_length in keys:
        for found in zip(*at_length, strict=True):
            hidden.add_row(
                f"{found[0].length:,}",
                f"{found[0].depth:.0%}",
                *(f"{k.digits:.0%} ({k.keys:.0%}), {k.nats:.2f}" for k in found),
            )
    console.print(hidden)


def _print_steps(console: Console, names: list[str], steps: list[list[Decoding]]) -> None:
    from rich.table import Table

    if not steps:
        return
    table = Table(title="decoding token by token, models in turn: milliseconds per token (least, most), bytes of state")
    for column in ("after tokens", *names, "state" if len(names) == 1 else "states"):
        table.add_column(column, justify="right")
    for at_length in steps:
        times = [f"{1e3 * d.median:.1f} ({1e3 * min(d.seconds):.1f}, {1e3 * max(d.seconds):.1f})" for d in at_length]
        states = ", ".join(f"{d.state / 1e6:.1f} MB" for d in at_length)
        table.add_row(f"{at_length[0].length:,}", *times, states)
    console.print(table)


def _draw(names: list[str], rows: list[_Row], path: Path) -> None:
    """Perplexity by context length, a colour for each text and a line style for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, text in enumerate(dict.fromkeys(row.text for row in rows)):
        of_text = sorted((row for row in rows if row.text == text), key=lambda row: row.length)
        for model, name in enumerate(names):
            axes.plot(
                [row.length for row in of_text],
                [row.results[model].perplexity for row in of_text],
                color=f"C{colour}",
                linestyle="--" if model + 1 < len(names) else "-",
                marker="o",
                label=f"{text}, {name}",
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("perplexity")
    axes.legend(frameon=False)
    figure.savefig(path)
