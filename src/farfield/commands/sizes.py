"""``farfield sizes``: parameters and FLOPs of the vision models, before anything is trained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from farfield.commands.options import lengths, recipe_options

if TYPE_CHECKING:
    from farfield.bench.sizes import SizeRow

__all__ = ["sizes_command"]


def sizes_command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SIZE]...", help="Only these sizes. (default: all)")
    ] = None,
    attention: Annotated[
        str, typer.Option(metavar="NAME", help="A recipe for images or video, see `farfield recipes`.")
    ] = "fma2d",
    image_size: Annotated[
        str, typer.Option(metavar="[TxH]xW", help="224, 360x480 (height x width), or 16x112x112 (with frames).")
    ] = "224",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the recipe; repeatable.")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Classes of the head.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print parameters and FLOPs of every named size of the vision models with this attention.

    Models are counted by shapes: nothing is computed, and an image may be as large as you like. A multiply-add is 2
    FLOPs; attention counts its useful pairs.
    """
    from farfield.bench.sizes import count_sizes
    from farfield.models.vision import SIZES

    grid = lengths(image_size, "--image-size")
    grid = grid * 2 if len(grid) == 1 else grid
    rows = count_sizes(
        attention, grid, sizes=tuple(names or SIZES), options=recipe_options(option or []), outputs=classes
    )
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in rows], indent=2))
        return
    _table(rows, attention, grid, classes)


def _table(rows: list[SizeRow], attention: str, grid: tuple[int, ...], classes: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from farfield.bench.sweep_report import flops_in_words
    from farfield.data.examples import size_in_words

    table = Table(
        title=f"{attention}, one input of {size_in_words(grid)}, {classes:,} class{'es' * (classes != 1)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("size", no_wrap=True)
    for column in ("widths", "blocks", "tokens", "parameters", "FLOPs", "attention's"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.size,
            "/".join(map(str, row.widths)),
            "/".join(map(str, row.depths)),
            size_in_words(row.tokens),
            f"{row.count.parameters:,}",
            flops_in_words(row.count.flops),
            flops_in_words(row.count.attention),
        )
    console = Console(highlight=False)
    console.print(table)
    if any(row.count.flops is None for row in rows):
        console.print("–: not known to the cost model; what opened cells read depends on the image.", style="dim")
