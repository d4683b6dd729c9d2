"""Values on the command line: durations and options of recipes."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

__all__ = ["device_option", "duration", "duration_option", "in_words", "lengths", "probe", "recipe_options", "words"]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smh]\s*)+")
_PIECE = re.compile(r"(\d+(?:\.\d+)?)([smh])")


def duration(text: str) -> float:
    """Seconds from ``90``, ``60s``, ``2m``, ``1.5h`` or ``1h30m``.

    Raises:
        ValueError: If the text is none of these, or not positive.
    """
    cleaned = text.strip().lower()
    seconds = math.nan
    if re.fullmatch(r"\d+(?:\.\d+)?", cleaned):
        seconds = float(cleaned)
    elif _DURATION.fullmatch(cleaned):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PIECE.findall(cleaned))
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is not a duration; write it like 90, 60s, 2m, 1.5h or 1h30m")
    return seconds


def duration_option(text: str | float) -> float:
    """`duration` as a parser for typer, which shows the message of this error only."""
    if isinstance(text, float):
        return text  # typer passes defaults through the parser as well
    try:
        return duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def in_words(seconds: float) -> str:
    """A duration for people: ``45s``, ``2m05s``, ``1h02m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def recipe_options(settings: Sequence[str]) -> dict[str, Any]:
    """Options from ``["block=32", "summary=mean"]``; values that read as JSON become it (lists as tuples), others text.

    Raises:
        ValueError: If one is not of the form NAME=VALUE, or a name comes twice.
    """
    from farfield.models.language import tuples

    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(f"{setting!r} is not an option of a recipe; write NAME=VALUE, such as block=64")
        if name in options:
            raise ValueError(f"option {name!r} is given twice: {options[name]!r} and {value!r}")
        try:
            options[name] = tuples(json.loads(value))
        except json.JSONDecodeError:
            options[name] = value
    return options


def lengths(text: str, option: str) -> tuple[int, ...]:
    """(30, 48, 80) from ``30x48x80``, given to this option.

    Raises:
        ValueError: for anything but one to three positive numbers.
    """
    pieces = text.lower().split("x")
    if not 1 <= len(pieces) <= 3 or not all(p.strip().isdecimal() and int(p) > 0 for p in pieces):
        raise ValueError(f"{option} {text!r}: write one to three positive numbers, such as 128, 16x8 or 4x8x8")
    return tuple(int(p) for p in pieces)


def words(text: str) -> list[str]:
    """``a, b=[1,2]`` as ["a", "b=[1,2]"]: pieces between commas that stand in no brackets, without empty ones."""
    return [piece.strip() for piece in re.split(r",(?![^\[]*\])", text) if piece.strip()]


def device_option(name: str | None) -> str:
    """A device that works; by default cuda where there is one, otherwise cpu.

    Raises:
        ValueError: when tensors cannot be made there.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {name!r}: {str(error).splitlines()[0]}") from error
    return name


def probe(folder: Path) -> None:
    """Makes a folder and tries to write there: better known before the first run than after it.

    Raises:
        ValueError: when that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}; give another --out") from error
