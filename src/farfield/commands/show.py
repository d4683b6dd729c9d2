"""``farfield show``: who sees whom, and with what weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.commands.options import recipe_options

if TYPE_CHECKING:
    from farfield.explain.pattern import Pattern

__all__ = ["show_command"]

_MOST_WEIGHTS = 2048
"""Tokens up to which weights are drawn: they are float64 [N, N], several times over."""


def show_command(
    attention: Annotated[str, typer.Argument(metavar="NAME", help="A recipe, see `farfield recipes`.")] = "fma",
    n: Annotated[int, typer.Option("--n", min=1, help="Tokens of a sequence.")] = 512,
    grid: Annotated[
        str | None, typer.Option(metavar="HxW", help="An image, such as 32x32, instead of a sequence.")
    ] = None,
    block: Annotated[int | None, typer.Option(min=1, help="Leaf block. [default: 16; 4 for a grid]")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Summaries per group. [default: 4; 2 for a grid]")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="Another option of the recipe; repeatable."),
    ] = None,
    causal: Annotated[
        bool | None, typer.Option("--causal/--no-causal", help="Hide later tokens. [default: causal; not for a grid]")
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

    For fma the file shows the weights that the operator applies beside those of exact softmax attention, too. For a
    grid it shows what single queries see, as images. Without --out the picture is drawn in the terminal.
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
    try:
        seen = pattern(attention, shape, hidden, layer=layer, **options)
    except TypeError as error:  # an option that the recipe does not take
        raise ValueError(str(error)) from error
    console = Console(highlight=False)
    if terminal or out is None:
        _draw_here(console, seen, query or [])
    if out is not None:
        _draw_file(seen, query or [], options, vectors, seed, out)
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


def _draw_here(console: Any, seen: Pattern, queries: list[int]) -> None:
    from rich.markup import escape

    from farfield.explain.show import check_queries, describe, terminal_legend, terminal_picture

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


def _draw_file(seen: Pattern, queries: list[int], options: dict[str, Any], vectors: str, seed: int, out: Path) -> None:
    import io

    from matplotlib import rc_context

    from farfield.explain import show
    from farfield.training.files import write_atomically

    if len(seen.grid) == 2:
        figure = show.grid_figure(seen, queries or _default_queries(seen.grid))
    elif seen.name == "fma" and seen.tokens <= _MOST_WEIGHTS:
        if len(queries) > 1:
            raise ValueError(f"--query {queries}: the picture of a sequence draws the row of one query; give one")
        figure = _weights(seen, queries, options, vectors, seed)
    else:
        show.check_queries(queries, seen.tokens)
        figure = show.pattern_figure([seen])
    buffer = io.BytesIO()
    with rc_context(show.STYLE):
        figure.savefig(buffer, format=out.suffix[1:].lower())
    write_atomically(out, buffer.getvalue())


def _weights(seen: Pattern, queries: list[int], options: dict[str, Any], vectors: str, seed: int) -> Any:
    """Pattern and weights of the multipole operator with mean summaries, which need no training."""
    import torch

    import farfield as ff
    from farfield.explain import show

    q, k = show.example_vectors(vectors, seen.grid, seed=seed)
    accepted = {name: value for name, value in options.items() if name in ("block", "rank", "levels", "sinks")}
    weights = ff.effective_weights(
        torch.from_numpy(q)[None, None], torch.from_numpy(k)[None, None], causal=seen.causal, **accepted
    )
    exact = show.exact_weights(q, k, seen.causal)
    source = f"{vectors} queries and keys, seed {seed}"
    return show.weights_figure(seen, exact, weights[0, 0].numpy(), source, queries[0] if queries else None)
