"""``farfield show``: who sees whom, and with what weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from farfield.commands.options import recipe_options

if TYPE_CHECKING:
    from farfield.explain.pattern import Pattern
    from farfield.explain.show import Image

__all__ = ["show_command"]

_MOST_WEIGHTS = 2048
"""Tokens up to which weights are drawn: they are float64 [N, N], several times over."""


class _Weights(NamedTuple):
    """[N, N] weights of exact and of multipole attention, and in words: of which vectors, and with which settings."""

    exact: Image
    effective: Image
    source: str
    settings: str


def show_command(
    attention: Annotated[str, typer.Argument(metavar="NAME", help="A recipe, see `farfield recipes`.")] = "fma",
    n: Annotated[int, typer.Option("--n", min=1, help="Tokens of a sequence.")] = 512,
    grid: Annotated[
        str | None, typer.Option(metavar="HxW", help="An image, such as 32x32, instead of a sequence.")
    ] = None,
    block: Annotated[int | None, typer.Option(min=1, help="Leaf block. (default: 16; 4 for a grid)")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Summaries per group. (default: 4; 2 for a grid)")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="Another option of the recipe; repeatable."),
    ] = None,
    causal: Annotated[
        bool | None, typer.Option("--causal/--no-causal", help="Hide later tokens. (default: causal; not for a grid)")
    ] = None,
    layer: Annotated[int, typer.Option(min=0, help="Index of the layer, for recipes that alternate.")] = 0,
    query: Annotated[
        list[int] | None, typer.Option("--query", help="A query (its index, row-major) to draw alone; repeatable.")
    ] = None,
    vectors: Annotated[str, typer.Option(help="Queries and keys for the weights: smooth or random.")] = "smooth",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the vectors.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG, SVG or PDF file to write.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw in the terminal.")] = False,
) -> None:
    """Draw which tokens a query sees exactly, which through a summary, and of which level.

    For fma over a sequence, also the weights that the operator applies, without the level bias unless --option bias=X
    gives one; a file has those of exact softmax attention beside them. A grid is drawn as images of what single queries
    see. Without --out the picture is drawn in the terminal.
    """
    from rich.console import Console

    from farfield import recipes
    from farfield.explain.pattern import pattern

    shape = _grid(grid) if grid is not None else (n,)
    flat = len(shape) == 1
    hidden = flat and recipes.get(attention).causal if causal is None else causal
    known = recipes.options(attention)
    options: dict[str, Any] = {"block": 16 if flat else 4, "rank": 4 if flat else 2}
    options = {name: value for name, value in options.items() if name in known}
    options |= {name: value for name, value in (("block", block), ("rank", rank)) if value is not None}
    options |= recipe_options(option or [])
    if out is not None and out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw to {out}; give a name that ends in .png, .svg or .pdf")
    seen = pattern(attention, shape, hidden, layer=layer, **options)
    drawn = _weights(seen, options, vectors, seed) if attention == "fma" and flat and n <= _MOST_WEIGHTS else None
    console = Console(highlight=False)
    if terminal or out is None:
        _draw_here(console, seen, query or [], drawn)
        if attention == "fma" and flat and drawn is None:
            console.print(f"weights are drawn up to {_MOST_WEIGHTS:,} tokens")
    if out is not None:
        _draw_file(seen, query or [], drawn, out)
        console.print(f"drawn to {out}", soft_wrap=True)


def _grid(text: str) -> tuple[int, ...]:
    """(32, 48) from ``32x48``."""
    pieces = text.lower().split("x")
    if len(pieces) != 2 or not all(piece.strip().isdecimal() and int(piece) > 0 for piece in pieces):
        raise ValueError(f"{text!r} is not an image's size; write it like 32x32")
    return tuple(int(piece) for piece in pieces)


def _default_queries(shape: tuple[int, ...]) -> list[int]:
    """The middle, a third of the way, and a corner."""
    height, width = shape
    return [height // 2 * width + width // 2, height // 3 * width + width // 4, width - 1]


def _draw_here(console: Any, seen: Pattern, queries: list[int], drawn: _Weights | None) -> None:
    from rich.markup import escape

    from farfield.explain.show import (
        check_queries,
        describe,
        terminal_legend,
        terminal_picture,
        terminal_weights,
        weights_legend,
    )

    check_queries(queries, seen.tokens)
    width = max(8, min(64, console.width - 2))
    size = "x".join(str(n) for n in seen.grid)
    console.print(
        f"[bold]{escape(seen.name)}[/bold], {size} tokens{', causal' if seen.causal else ''}: {describe(seen)}"
    )
    if len(seen.grid) == 2:
        for query in queries or _default_queries(seen.grid)[:1]:
            console.print(f"what the query at row {query // seen.grid[1]}, column {query % seen.grid[1]} sees:")
            console.print(terminal_picture(seen, width, query))
    else:
        console.print("rows are queries, columns are keys")
        console.print(terminal_picture(seen, width))
    console.print(terminal_legend(seen))
    if drawn is not None:
        console.print(f"[bold]effective weights[/bold]: {escape(drawn.source)}; {escape(drawn.settings)}")
        console.print(terminal_weights(seen, drawn.effective, width))
        console.print(weights_legend())


def _draw_file(seen: Pattern, queries: list[int], drawn: _Weights | None, out: Path) -> None:
    import io

    from matplotlib import rc_context

    from farfield.explain import show
    from farfield.training.files import write_atomically

    if len(seen.grid) == 2:
        figure = show.grid_figure(seen, queries or _default_queries(seen.grid))
    elif drawn is not None:
        if len(queries) > 1:
            raise ValueError(f"--query {queries}: the picture of a sequence draws the row of one query; give one")
        row = queries[0] if queries else None
        figure = show.weights_figure(seen, drawn.exact, drawn.effective, drawn.source, row, drawn.settings)
    else:
        show.check_queries(queries, seen.tokens)
        figure = show.pattern_figure([seen])
    buffer = io.BytesIO()
    with rc_context(show.STYLE):
        figure.savefig(buffer, format=out.suffix[1:].lower())
    write_atomically(out, buffer.getvalue())


def _weights(seen: Pattern, options: dict[str, Any], vectors: str, seed: int) -> _Weights:
    """The weights of a fresh fma layer's operator over example vectors.

    The level bias is left out unless an option gives one: a fresh layer starts so far below 0 that its far field would
    be empty on any picture, and every trained layer has its own.

    Raises:
        ValueError: for options that change nothing that is drawn here, or do not fit the length.
    """
    import torch

    import farfield as ff
    from farfield import recipes
    from farfield.explain import show
    from farfield.far.pyramid import Pyramid
    from farfield.near.blocks import Blocks

    if options.get("rotate", Pyramid.rope) != Pyramid.rope:
        raise ValueError(
            f"rotate={options['rotate']!r} cannot be drawn: the example vectors carry no rotary embedding; leave it out"
        )
    q, k = show.example_vectors(vectors, seen.grid, seed=seed)
    layer = recipes.build("fma", q.shape[1], 1, causal=seen.causal, **options)
    near, far = layer.near_spec, layer.far_spec
    assert isinstance(near, Blocks) and isinstance(far, Pyramid)
    built: Any = layer.far
    if far.grid is not None and far.grid != seen.grid:
        raise ValueError(f"grid={far.grid} cannot be drawn over {seen.tokens:,} tokens; give --n {far.grid[0]}")
    levels = len(seen.cells)
    if "bias" not in options:
        bias, said = None, f"level bias 0 (a fresh layer starts at {far.bias:g})"
    elif far.bias is None:
        bias, said = None, "no level bias"
    else:
        bias = torch.full((max(levels, 1), 1), float(far.bias), dtype=torch.float64)
        said = f"level bias {far.bias:g}"
    weights = ff.effective_weights(
        torch.from_numpy(q)[None, None],
        torch.from_numpy(k)[None, None],
        causal=seen.causal,
        block=near.block,
        rank=far.rank,
        levels=levels,
        sinks=far.sinks,
        count_bias=far.count_bias,
        query_rank=far.query_rank,
        summary=built.summary(),
        level_bias=bias,
    )
    settings = [
        f"{name} {value}" for name, value in options.items() if name not in ("bias", "grid", "rotate", "summary")
    ]
    settings.append(f"summary {far.summary}" + ("" if far.summary == "mean" else " (untrained: averages)"))
    return _Weights(
        show.exact_weights(q, k, seen.causal),
        weights[0, 0].detach().numpy(),
        f"{vectors} queries and keys, seed {seed}",
        ", ".join([*settings, said]),
    )
