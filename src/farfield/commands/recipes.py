"""``farfield recipes``: which attentions there are."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["recipe_rows", "recipes_command"]

_COLUMNS = ("name", "title", "dims", "causal", "arXiv")
_WIDE = 130
"""Columns of a terminal from which on the list has room for the proofs."""
_DETAILS = ("title", "near", "far", "merge", "cost", "dims", "causal", "citation", "departures", "proof", "status")


def recipe_rows() -> list[dict[str, Any]]:
    """All about every recipe: what the list shows, what stands in full under a name, and what ``--json`` prints."""
    from farfield import recipes

    rows = []
    for name in recipes.names():
        recipe = recipes.get(name)
        rows.append(
            {
                "name": recipe.name,
                "title": recipe.title,
                "near": recipe.near,
                "far": recipe.far,
                "merge": recipe.merge,
                "cost": recipe.cost,
                "dims": list(recipe.dims),
                "causal": recipe.causal,
                "status": recipe.status,
                "citation": recipe.citation,
                "departures": recipe.departures,
                "proof": recipe.proof,
                "options": recipes.options(name),
            }
        )
    return rows


def recipes_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help="Show these in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with options, departures and proofs.")] = False,
) -> None:
    """List the attentions, or show some of them in full: parts, cost, citation, departures, proof and options."""
    from farfield import recipes

    for name in names or ():
        recipes.get(name)  # an unknown one is an error that names the known ones
    rows = [row for row in recipe_rows() if not names or row["name"] in names]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    if names:
        for row in rows:
            console.print(_details(row))
    else:
        console.print(_listing(rows, proofs=console.width >= _WIDE))
        console.print(
            "farfield recipes NAME shows parts, cost, citation, departures from the paper, options and proof of one.",
            style="dim",
        )


def _shown(row: dict[str, Any]) -> dict[str, str]:
    paper = re.search(r"arXiv (\S+)", row["citation"])
    dims = ", ".join(f"{d}-D" for d in row["dims"])
    more = {"dims": dims, "causal": "yes" if row["causal"] else "no", "arXiv": paper[1] if paper else "-"}
    return {name: str(value) for name, value in {**row, **more}.items()}


def _listing(rows: list[dict[str, Any]], proofs: bool) -> Table:
    """One line for each, as far as the terminal is wide enough; on request with what the proof shows, in words."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Attention recipes", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = (*_COLUMNS, *(("proof",) if proofs else ()))
    for column in columns:
        table.add_column(column, no_wrap=column not in ("title", "proof"))
    for row in rows:
        shown = _shown(row)
        shown["proof"] = row["proof"].partition("::test_")[2].replace("_", " ")
        table.add_row(*(escape(shown[column]) for column in columns))
    return table


def _details(row: dict[str, Any]) -> Table:
    """Everything about one recipe, a line for each property and option."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=row["name"], title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    shown = _shown(row)
    for name in _DETAILS:
        if shown[name]:
            table.add_row(name, escape(shown[name]))
    for name, default in row["options"].items():
        table.add_row(f"option {name}", escape(repr(default)))
    return table
