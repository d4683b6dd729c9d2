"""The settings that a conversion chooses from."""

from __future__ import annotations

from collections.abc import Sequence

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


def _pages(rank: int, share: int, beam: int, opens: Sequence[int], page: int = 4) -> list[Pyramid]:
    """Cells first, then pages under the best of them."""
    return [setting(rank, share, open, beam=beam, page=page) for open in opens]


MENU: tuple[Pyramid | None, ...] = (
    None,
    *_pages(2, 4, 8, (8, 16)),
    *_pages(2, 4, 16, (16, 32)),
    *_pages(2, 4, 32, (16, 32, 64)),
    *_pages(2, 4, 64, (64, 128)),
    *_pages(2, 4, 8, (8,), page=8),
    *_pages(2, 4, 16, (16,), page=8),
    *_pages(2, 4, 32, (16, 32), page=8),
    *_pages(2, 4, 64, (64,), page=8),
    *_pages(4, 4, 64, (32, 64)),
    *_pages(4, 4, 128, (128,)),
    *_pages(1, 4, 16, (16, 32)),
    *_pages(2, 2, 32, (32, 64)),
    *_pages(2, 1, 32, (64,)),
    *(setting(2, 4, n) for n in (16, 32)),
    *(setting(4, 4, n) for n in (32, 64, 128)),
    *(setting(8, 4, n) for n in (32, 64, 256)),
    *(setting(4, 2, n) for n in (16, 32)),
    setting(8, 2, 64),
    *(setting(2, 1, n) for n in (8, 16)),
    setting(4, 1, 32),
    setting(8, 1, 256),
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
