"""``farfield doctor``: what an issue report needs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

__all__ = ["doctor_command"]


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, devices, and which engines and peers can run here, or why not: paste it into an issue."""
    from farfield.bench.doctor import examine

    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    # Plain lines, which survive being pasted anywhere.
    for heading, lines in _sections(facts):
        typer.echo(heading)
        width = max((len(name) for name, _ in lines), default=0)
        for name, said in lines:
            typer.echo(f"  {name:<{width}}  {said}")


def _sections(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings, each with names and what is said of them."""
    versions = facts["versions"]
    machine = {name.replace("_", " "): value for name, value in facts["machine"].items()}
    free = machine.pop("free memory")
    machine["free memory"] = "unknown" if free is None else f"{free / 2**30:.1f} GiB"
    missing = ", ".join(name for name, version in versions.items() if version is None)
    return [
        ("versions", [(name, version) for name, version in versions.items() if version is not None]
            + [("not installed", missing or "none")]),
        ("machine", [(name, str(value)) for name, value in machine.items()]),
        ("devices", [(device["name"], device["description"]) for device in facts["devices"]]),
        ("environment", list(facts["environment"].items()) or [("nothing set", "that matters here")]),
        ("engines of multipole attention", [line for row in facts["engines"] for line in _engine_lines(row)]),
        ("peers of farfield bench", [(name, "here" if why is None else why) for name, why in facts["peers"].items()]),
    ]  # fmt: skip


def _engine_lines(row: dict[str, Any]) -> list[tuple[str, str]]:
    """One line for the dtypes in which an engine runs, and one for every reason why it does not."""
    name = f"{row['engine']} on {row['device']}"
    lines = [(name, f"runs in {', '.join(row['dtypes'])}")] if row["dtypes"] else []
    by_reason: dict[str, list[str]] = {}
    for dtype, reason in row["why_not"].items():
        by_reason.setdefault(reason.replace(f"torch.{dtype}", "of that dtype"), []).append(dtype)
    for reason, dtypes in by_reason.items():
        lines.append(
            (name, f"not in {', '.join(dtypes)}: {reason}" if lines or len(by_reason) > 1 else f"no: {reason}")
        )
    return lines
