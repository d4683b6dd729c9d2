"""Windows of token ids from text files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield.data.text import read_bytes

__all__ = ["apart", "first_token", "read_text", "repeating", "room", "spread", "windows"]

_CHARACTERS = 6
"""Characters per token to begin with; where they are too few, more are read."""


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, plain or .xz.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it cannot be read as text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}")
    try:
        # As a file that is opened as text: ends of lines of other systems are "\n".
        return read_bytes(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (plain or .xz): {error}") from error


def first_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if any."""
    begin = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a").input_ids
    return [begin] if begin is not None and ids and ids[0] == begin else []


def windows(tokenizer: Any, text: str, length: int, number: int, name: str = "the text") -> list[Tensor]:
    """Consecutive windows of ``length`` token ids from the start of a text, at most ``number``.

    Each begins with the tokenizer's first token, where it has one.

    Raises:
        ValueError: for a text with less than one window.
    """
    begin = first_token(tokenizer)
    inside = length - len(begin)
    ids = _ids(tokenizer, text, inside * number)
    found = [torch.tensor(begin + ids[i * inside : (i + 1) * inside]) for i in range(min(number, len(ids) // inside))]
    if not found:
        raise ValueError(f"{name} has {len(ids):,} tokens: {inside:,} are needed for one window")
    return found


def spread(tokenizer: Any, text: str, length: int, number: int, seed: int, name: str = "the text") -> list[Tensor]:
    """``number`` windows of ``length`` token ids from places spread over a text, drawn by ``seed``.

    Raises:
        ValueError: for a text with less than one window.
    """
    draw = random.Random(seed)
    taken = []
    part = len(text) // number
    for i in range(number):
        # Room behind the place for a window, as far as the text has it.
        last = max(i * part, min((i + 1) * part, len(text) - 2 * _CHARACTERS * length))
        start = draw.randint(i * part, last)
        # From the next line on: no word is cut.
        start = max(text.find("\n", start) + 1, 0) if start else 0
        try:
            taken += windows(tokenizer, text[start:], length, 1, name)
        except ValueError:
            taken += windows(tokenizer, text[i * part :], length, 1, name)
    return taken


def repeating(ids: Tensor, generator: torch.Generator, tail: float = 0.25, span: int = 32) -> tuple[Tensor, int]:
    """A window whose end repeats what stood far before: spans of it, each from a place drawn in the part that stays.

    Args:
        ids: [N] token ids.
        generator: draws the places.
        tail: share of the window that repeats.
        span: tokens repeated in one piece.

    Returns:
        [N] token ids, and where the repetitions begin.
    """
    start = len(ids) - round(tail * len(ids))
    places = torch.randint(0, max(1, start - span), (-(-(len(ids) - start) // span),), generator=generator)
    spans = torch.cat([ids[place : place + span] for place in places.tolist()] or [ids[:0]])
    return torch.cat([ids[:start], spans])[: len(ids)], start


def room(tokenizer: Any, text: str, length: int) -> int:
    """How many windows of ``length`` tokens :func:`spread` can take from different places of a text; at least 1.

    Estimated from the first 100,000 characters, with a quarter to spare.
    """
    sample = text[:100_000]
    tokens = len(tokenizer(sample, add_special_tokens=False, verbose=False).input_ids) * len(text) / max(len(sample), 1)
    return max(1, int(tokens / (1.25 * length)))


def apart(text: str, length: int, number: int) -> tuple[str, str]:
    """A text in two: its beginning, and its end to judge by.

    The end is a tenth, or what ``number`` windows of ``length`` tokens need, but at most a half.
    """
    needed = 2 * _CHARACTERS * length * number
    cut = len(text) - min(max(len(text) // 10, needed), len(text) // 2)
    # From the next line on: no word is cut.
    cut = text.find("\n", cut) + 1 or cut
    return text[:cut], text[cut:]


def _ids(tokenizer: Any, text: str, needed: int) -> list[int]:
    """At least ``needed`` ids of the start of a text, or all that it has."""
    characters = _CHARACTERS * needed + 1000
    while True:
        ids: list[int] = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids
        # The last word may be cut, so a few of its tokens do not count.
        if len(ids) >= needed + 16 or characters >= len(text):
            return ids
        characters *= 2
