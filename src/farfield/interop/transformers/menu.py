"""The settings that a conversion chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farfield.far import Pyramid
from farfield.interop.transformers.keys import context, expansion_keys, keys_of, near_keys

__all__ = ["BLOCK", "KEEPS", "MENU", "RECENT", "SINKS", "Keeps", "Setting", "keys_of_setting", "menu_for", "setting"]

BLOCK, SINKS, RECENT = 64, 4, 32

KEEPS = (16, 32, 64, 128, 192, 320)
"""Tokens that a centre of an expansion keeps out of it."""


@dataclass(frozen=True)
class Keeps:
    """A far field that is an expansion alone: about ``number`` centres, each of which keeps ``open`` tokens out of it.

    :class:`farfield.far.Expansion` is the same of some heads, with their centres.
    """

    number: int
    open: int

    def __post_init__(self) -> None:
        for name, value, least in (("number", self.number, 1), ("open", self.open, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Keeps({name}={value!r}): an integer >= {least} would be accepted")


Setting = Pyramid | Keeps | None
"""What a head can be given as its far field, and what a calibration measures; None: nothing. (To see all tokens exactly
needs no measurement: see :mod:`farfield.interop.transformers.convert`.)"""


def setting(
    rank: int, share: int, open: int, *, beam: int | None = None, page: int | None = None,
    beam_share: int | None = None, recent: int = 0,
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
            recent=recent,
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
    *_pages(64, 4, 1, {8: (16,)}),
    *_pages(32, 4, 1, {32: (64,), 64: (128,)}),
    *_pages(32, 8, 1, {32: (32,), 64: (96,)}),
    *_pages(64, 4, 1, {8: (16,)}, 1, 0),
    *_pages(32, 4, 1, {16: (32,), 32: (64,), 64: (128,)}, 1, 0),
)
"""For blocks of 64 and contexts of thousands of tokens. None: near field and sinks alone."""


def menu_for(length: int, centres: Sequence[int] = ()) -> tuple[Setting, ...]:
    """The settings that make sense at a context of ``length`` tokens: those that read less than exact attention.

    Args:
        length: tokens of the context.
        centres: numbers of centres of expansions that are offered with tokens kept out of them.
    """
    most = context(length)
    kept = [Keeps(number, open) for number in centres for open in KEEPS]
    return tuple(p for p in (*MENU, *kept) if p is None or keys_of_setting(p, length, BLOCK, SINKS) < most)


def keys_of_setting(setting: Setting, length: int, block: int, sinks: int, dim: int = 0, bounds: int = 1) -> float:
    """Mean keys that a causal query of a head reads, near field and sinks among them; see :func:`keys_of`.

    ``dim`` is the width of a head, which counts where vectors are counted (``bounds=2``).
    """
    near = near_keys(length, block, sinks)
    if setting is None:
        return near
    if isinstance(setting, Keeps):
        return near + expansion_keys(
            setting.number, dim, bounds, open=setting.open, length=length, block=block, sinks=sinks
        )
    return near + keys_of(setting, length, block, bounds)
