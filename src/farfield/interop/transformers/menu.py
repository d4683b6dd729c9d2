"""The settings that a conversion chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from farfield.far import Pyramid
from farfield.interop.transformers.keys import context, keys_of, near_keys

__all__ = ["BLOCK", "MENU", "SHORT", "SINKS", "menu_for", "setting"]

BLOCK, SINKS = 64, 16


def setting(rank: int, share: int, open: int, *, beam: int | None = None, page: int | None = None) -> Pyramid:
    """One entry: cells of one level chosen by their bounds, everything that stays closed dropped."""
    return Pyramid(
        rank, summary="mean", bias=None, sinks=SINKS, levels=1, open=open, beam=beam, page=page, share=share,
        rest="drop", choose="bounds",
    )  # fmt: skip


def _pages(cell: int, page: int, share: int, opens: Mapping[int, Sequence[int]]) -> list[Pyramid]:
    """Cells first, as many as a key of ``opens`` says, then pages under the best of them."""
    return [
        setting(BLOCK // cell, share, open, beam=beam, page=page) for beam, numbers in opens.items() for open in numbers
    ]


def _cells(cell: int, share: int, opens: Sequence[int]) -> list[Pyramid]:
    """Whole cells."""
    return [setting(BLOCK // cell, share, open) for open in opens]


MENU: tuple[Pyramid | None, ...] = (
    None,
    *_pages(64, 4, 4, {4: (8, 16), 8: (16, 32), 16: (32, 64)}),
    *_pages(32, 4, 4, {8: (16,), 16: (32, 64), 32: (32, 64, 96), 64: (64, 128, 192)}),
    *_pages(32, 8, 4, {16: (16,), 32: (32, 64), 64: (64, 128)}),
    *_pages(32, 2, 4, {16: (32,), 32: (64, 128)}),
    *_pages(16, 4, 4, {64: (64, 128)}),
    *_pages(64, 4, 2, {4: (8,), 8: (16, 32), 16: (64,)}),
    *_pages(32, 4, 2, {16: (32,), 32: (64, 96), 64: (128,)}),
    *_pages(32, 8, 2, {32: (32, 64), 64: (128,)}),
    *_pages(16, 4, 2, {64: (64, 128)}),
    *_pages(32, 4, 1, {32: (64,), 64: (128,)}),
    *_pages(32, 8, 1, {32: (64,)}),
    *_cells(32, 4, (16, 32)),
    *_cells(16, 4, (64, 128)),
    *_cells(8, 4, (64, 256)),
    *_cells(32, 2, (8, 16)),
    *_cells(16, 2, (16, 32)),
    *_cells(8, 2, (32,)),
    *_cells(16, 1, (16,)),
    *_cells(8, 1, (256,)),
)
"""For blocks of 64 and contexts of thousands of tokens. None: near field and sinks alone."""

SHORT: tuple[Pyramid, ...] = (
    *(setting(8, 4, n) for n in (12, 16, 24, 40, 48)),
    *(setting(16, 4, n) for n in (24, 48, 96)),
    *(setting(4, 4, n) for n in (8, 12, 16, 24)),
    *(setting(8, 2, n) for n in (24, 40)),
    setting(2, 4, 8),
    setting(2, 4, 12),
)
"""Whole cells, few of them: where the context is short, scoring all cells costs little, and steps between matter."""

_SHORT = 4096
"""Tokens up to which they are offered."""


def menu_for(length: int) -> tuple[Pyramid | None, ...]:
    """The settings that make sense at a context of ``length`` tokens: those that read less than exact attention."""
    offered = (*MENU, *(SHORT if length <= _SHORT else ()))
    most = context(length) - near_keys(length, BLOCK, SINKS)
    return tuple(p for p in offered if p is None or keys_of(p, length, BLOCK) < most)
