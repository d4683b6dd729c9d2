"""``farfield simulate``: how many tiles a window touches, before anybody writes or buys a kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farfield.commands.options import lengths

if TYPE_CHECKING:
    from farfield.bench.simulate import Simulation

__all__ = ["simulate_command"]


def simulate_command(
    window: Annotated[str, typer.Option(metavar="W[xW..]", help="Keys of a window per axis.")],
    grid: Annotated[
        str, typer.Option(metavar="N[xN..]", help="A sequence, image or volume: 4096, 256x256, 30x48x80.")
    ] = "4096",
    stride: Annotated[
        list[str] | None,
        typer.Option(metavar="S[xS..]", help="Queries that share a window; repeatable, one row each. (default: 1)"),
    ] = None,
    dilation: Annotated[str, typer.Option(metavar="D[xD..]", help="A window holds every D-th token.")] = "1",
    causal: Annotated[bool, typer.Option("--causal", help="Hide later tokens, on every axis.")] = False,
    query_tile: Annotated[
        str | None, typer.Option(metavar="T[xT..]", help="Queries of a tile. (default: 128, 16x16, 4x8x8)")
    ] = None,
    key_tile: Annotated[
        str | None, typer.Option(metavar="T[xT..]", help="Keys of a tile. (default: 128, 16x8, 2x8x8)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG, SVG or PDF file: the tiles of the first row drawn.")
    ] = None,
) -> None:
    """Count the tiles that a window touches: the best speed-up of a tiled kernel over a dense one, and what masks cost.

    Tokens are taken to lie tile by tile (as kernels for images permute them), so tiles are boxes of the grid. Nothing
    is run: the numbers are exact counts, an upper bound on any measured speed-up with these tiles.
    """
    from farfield.bench.simulate import simulate

    if out is not None and out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw to {out}; give a name that ends in .png, .svg or .pdf")
    axes = lengths(grid, "--grid")
    rows = [
        simulate(
            axes,
            _sizes(window, "--window"),
            stride=_sizes(one, "--stride"),
            dilation=_sizes(dilation, "--dilation"),
            causal=causal,
            query_tile=None if query_tile is None else _sizes(query_tile, "--query-tile"),
            key_tile=None if key_tile is None else _sizes(key_tile, "--key-tile"),
        )
        for one in stride or ["1"]
    ]
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        _table(rows)
    if out is not None:
        _draw(rows[0], out)
        if not as_json:
            typer.echo(f"drawn to {out}")


def _sizes(text: str, option: str) -> int | tuple[int, ...]:
    """One number for all axes, or one per axis."""
    sides = lengths(text, option)
    return sides[0] if len(sides) == 1 else sides


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _table(rows: list[Simulation]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    title = (
        f"grid {_by(first.grid)}, window {_by(first.window)}, dilation {_by(first.dilation)}"
        f"{', causal' if any(first.causal) else ''}; tiles of {_by(first.query_tile)} queries and "
        f"{_by(first.key_tile)} keys; no tiling can exceed {first.bound:.2f}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("stride", "tile pairs", "of dense", "with a mask", "useful scores", "speed-up at best"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            _by(row.stride),
            f"{row.touched:,}",
            f"{row.touched / row.dense:.1%}",
            f"{row.masked / row.touched:.1%}",
            f"{row.useful:.1%}",
            f"{row.speedup:.2f}",
        )
    Console().print(table)


def _draw(row: Simulation, out: Path) -> None:
    import io

    from matplotlib import rc_context
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from farfield.bench.simulate import tile_map
    from farfield.explain.show import STYLE
    from farfield.training.files import write_atomically

    tiles = tile_map(row)
    colours = ("#f2f0ec", "#e0a458", "#2f6690")
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 6.8), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(tiles, cmap=ListedColormap(colours), vmin=0, vmax=2, interpolation="nearest", aspect="auto")
        axes.set_xlabel("tiles of keys")
        axes.set_ylabel("tiles of queries")
        axes.set_title(
            f"{_by(row.grid)}, window {_by(row.window)}, stride {_by(row.stride)}: {row.speedup:.2f} of {row.bound:.2f}"
        )
        names = ("untouched", "needs a mask", "wholly visible")
        handles = [Patch(facecolor=c, edgecolor="#888888", label=n) for c, n in zip(colours, names, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=out.suffix[1:].lower())
    write_atomically(out, buffer.getvalue())
