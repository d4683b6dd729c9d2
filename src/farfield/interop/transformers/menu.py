"""The settings that a conversion chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from farfield.far import Pyramid
from farfield.interop.transformers.keys import context, keys_of, near_keys

__all__ = ["BLOCK", "MENU", "SHORT", "SINKS", "menu_for", "setting"]

BLOCK, SINKS, RECENT = 64, 4, 32


def setting(
    rank: int, share: int, open: int, *, beam: int | None = None, page: int | None = None, beam_share: int | None = None,
    recent: int = 0,
) -> Pyramid:  # fmt: skip
    """One entry: cells of one level chosen by their bounds, everything that stays closed dropped."""
    return Pyramid(
        rank, summary="mean", bias=None, sinks=SINKS, levels=1, open=open, beam=beam, page=page, share=share,
        beam_share=beam_share, recent=recent, rest="drop", choose="bounds",
    )  # fmt: skip


def _pages(
    cell: int, page: int, share: int, opens: Mapping[int, Sequence[int]], beam_share: int = 16, recent: int = RECENT
) -> list[Pyramid]:
    """Cells first, as many as a key of ``opens`` says, then pages under the best of them."""
    return [
        setting(
            BLOCK // cell, share, open, beam=beam, page=page, beam_share=max(share, beam_share),
            recent=recent if share > 1 else 0,
        )
        for beam, numbers in opens.items() for open in numbers
    ]  # fmt: skip


MENU: tuple[Pyramid | None, ...] = (
    None,
    *_pages(64, 1, 64, {4: (16,)}),
    *_pages(32, 1, 64, {16: (64,), 64: (640,)}),
    *_pages(8, 1, 64, {32: (128,), 128: (384, 512)}),
    *_pages(64, 1, 32, {4: (16,), 8: (64,)}),
    *_pages(32, 1, 32, {16: (64,), 32: (256,), 64: (256, 384, 640)}),
    *_pages(16, 1, 32, {64: (128, 256), 128: (384, 640)}),
    *_pages(8, 1, 32, {64: (256,), 128: (384, 512)}),
    *_pages(4, 1, 32, {256: (512,)}),
    *_pages(64, 1, 16, {16: (128,)}, 32),
    *_pages(32, 1, 16, {16: (64,), 32: (128, 256), 64: (384, 512, 640)}, 32),
    *_pages(16, 1, 16, {32: (64,), 64: (128, 256), 128: (384, 640)}, 32),
    *_pages(8, 1, 16, {128: (256, 384)}, 32),
    *_pages(32, 1, 8, {64: (512,)}),
    *_pages(32, 2, 16, {64: (256,)}),
    *_pages(8, 2, 16, {64: (64, 128)}, 32),
    *_pages(64, 2, 8, {4: (16,), 8: (64,)}),
    *_pages(32, 2, 8, {16: (32,), 64: (192,)}),
    *_pages(16, 2, 8, {64: (64, 128)}),
    *_pages(32, 4, 8, {96: (256,)}),
    *_pages(64, 4, 4, {4: (8,), 16: (64,)}),
    *_pages(32, 4, 4, {32: (64,), 64: (128, 192), 96: (256,)}),
    *_pages(64, 4, 2, {4: (16,)}),
    *_pages(32, 4, 2, {32: (32, 64), 64: (128,), 96: (256,)}),
    *_pages(16, 4, 2, {32: (32,), 64: (96,), 128: (192,)}),
    *_pages(64, 8, 2, {8: (16,), 32: (64,)}),
    *_pages(32, 8, 2, {32: (48,), 64: (96, 128)}),
    *_pages(32, 4, 1, {96: (256,)}),
    *_pages(32, 8, 1, {64: (96,)}),
    *_pages(64, 4, 1, {8: (16,)}, 1),
    *_pages(32, 4, 1, {16: (32,), 32: (64,), 64: (128,)}, 1),
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
