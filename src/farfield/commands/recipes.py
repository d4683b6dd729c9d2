"""``farfield recipes``: which attentions there are."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

__all__ = ["recipe_rows", "recipes_command"]

_COLUMNS = ("name", "near", "far", "merge", "cost", "causal", "status", "arXiv")


def recipe_rows() -> list[dict[str, Any]]:
    """What the table shows of each recipe, and what ``--json`` adds: title, dimensions, proof and options."""
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
                "proof": recipe.proof,
                "options": recipes.options(name),
            }
        )
    return rows


def recipes_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with options and proofs.")] = False,
) -> None:
    """List the attentions: near field, far field, merge, cost and status of each."""
    rows = recipe_rows()
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Attention recipes", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), leading=1)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column not in ("near", "far", "cost"))
    for row in rows:
        paper = re.search(r"arXiv (\S+)", row["citation"])
        shown = {**row, "causal": "yes" if row["causal"] else "no", "arXiv": paper and paper[1]}
        table.add_row(*(escape(str(shown[column] or "-")) for column in _COLUMNS))
    Console().print(table)
    Console().print("--json adds citations, options, dimensions and the test that proves each.", style="dim")
