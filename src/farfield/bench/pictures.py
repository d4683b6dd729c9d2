"""Who sees whom under the attentions of a comparison: the tables that its report draws."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from farfield.explain.pattern import Pattern, pattern

if TYPE_CHECKING:
    from farfield.bench.compare import Settings

_BLOCKS = 16
_TOKENS = 1024


def picture_length(settings: Settings) -> int:
    """Tokens that are drawn: 16 blocks, and 1,024 at most where a block is not larger than that."""
    block = settings.options.get("block", 64)
    size = block if isinstance(block, int) else int(block[0])
    return min(settings.context, max(2 * size, min(_BLOCKS * size, _TOKENS)))


def pictures(settings: Settings) -> tuple[list[Pattern], list[str]]:
    """The picture of every attention, two where its layers alternate, and a note for each that has none.

    A recipe may be made of parts that :mod:`farfield.explain.pattern` does not know. That must not cost anybody the
    numbers of a comparison.
    """
    length = picture_length(settings)
    found: list[Pattern] = []
    notes: list[str] = []
    for name in settings.attentions:
        try:
            first, second = (pattern(name, length, True, layer=i, **settings.recipe_options(name)) for i in (0, 1))
        except (ValueError, TypeError) as error:
            notes.append(f"There is no picture of who sees whom under {name}: {error}")
            continue
        if settings.depth < 2 or np.array_equal(first.codes, second.codes):
            found.append(first)
        else:
            found += [dataclasses.replace(p, name=f"{name}, layer {i}") for i, p in ((1, first), (2, second))]
    return found, notes
