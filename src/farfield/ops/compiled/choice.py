"""The choice of cells compiled: scores of listed cells, the largest of every row, and whole descents."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farfield.ops.compiled import build
from farfield.ops.compiled.build import check, library

__all__ = ["Descent", "Level", "Rung", "descend", "score", "top", "why_not"]


class Rung(ctypes.Structure):
    """``struct Rung`` of the library."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "bias", "own", "children")),
        *((name, ctypes.c_int64) for name in ("cells", "biases", "places", "below", "take")),
    )


class Descent(ctypes.Structure):
    """``struct Descent`` of the library."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("groups", "shared", "units", "each", "dim", "finer_dim", "rungs", "widest", "width", "threads")
        ),
        ("rung", ctypes.POINTER(Rung)),
        *((name, ctypes.c_void_p) for name in ("query", "finer", "seen", "block", "opened")),
    )


@dataclass(frozen=True)
class Level:
    """A level of a descent.

    Attributes:
        keys: [G', cells, D] float32.
        bias: [G' or 1, cells].
        own: [blocks, places] cells that a block sees on this level beside the opened ones' children, or None.
        children: [cells, n] of the next level, or None on the last.
        take: how many cells are opened.
    """

    keys: Tensor
    bias: Tensor
    own: Tensor | None
    children: Tensor | None
    take: int


def why_not() -> str | None:
    """None where the library is built, otherwise the reason; builds it on first use."""
    return build.why_not()


def top(scores: Tensor, count: int) -> Tensor:
    """See :func:`farfield.ops.opened.choose.top`; float32 on the CPU."""
    scores = scores.contiguous()
    index = torch.empty(*scores.shape[:-1], count, dtype=torch.int64)
    rows = index.numel() // max(count, 1)
    check(
        library().farfield_top(
            scores.data_ptr(), rows, scores.shape[-1], count, index.data_ptr(), torch.get_num_threads()
        )
    )
    return index


def score(query: Tensor, keys: Tensor, bias: Tensor, number: Tensor) -> Tensor:
    """[G, U, n] query . key + bias of cells ``number`` [G or 1, U, n], -inf where it is negative; float32 on the CPU.

    ``query`` is [G, U, D], ``keys`` [G', cells, D], ``bias`` [G' or 1, cells], where G' divides G.
    """
    query, keys, bias, number = (x.contiguous() for x in (query, keys, bias, number))
    (groups, units, dim), places = query.shape, number.shape[2]
    scores = torch.empty(groups, units, places)
    check(
        library().farfield_score(
            *(x.data_ptr() for x in (query, keys, bias, number, scores)),
            groups, units, places, keys.shape[1], dim, len(number), len(keys), len(bias), torch.get_num_threads(),
        )
    )  # fmt: skip
    return scores


def descend(query: Tensor, finer: Tensor, levels: Sequence[Level], seen: Tensor, block: Tensor) -> Tensor:
    """[G, U n, k] what is opened on the last level; see :func:`farfield.ops.opened.choose.descend`. Float32 on the CPU.

    ``query`` [G, U, D] is as wide as the keys of all levels but the last, ``finer`` [G, U n, D'] as those of the last
    (the same where there is one level); ``seen`` [blocks, cells of the first level] bool, ``block`` [U].
    """
    query, finer, seen, block = (x.contiguous() for x in (query, finer, seen, block))
    kept: list[Tensor] = []

    def pointer(x: Tensor | None) -> int | None:
        if x is None:
            return None
        kept.append(x.contiguous())
        return kept[-1].data_ptr()

    rungs = (Rung * len(levels))()
    width = widest = seen.shape[1]
    for rung, level in zip(rungs, levels, strict=True):
        width += 0 if level.own is None else level.own.shape[1]
        widest = max(widest, width)
        take = min(level.take, width)
        below = 1 if level.children is None else level.children.shape[1]
        rung.keys, rung.bias = pointer(level.keys), pointer(level.bias.float())
        rung.own, rung.children = pointer(level.own), pointer(level.children)
        rung.cells, rung.biases, rung.below, rung.take = level.keys.shape[1], len(level.bias), below, take
        rung.places = 0 if level.own is None else level.own.shape[1]
        width = take * below
    opened = torch.empty(*finer.shape[:2], width, dtype=torch.int64)
    call = Descent(
        groups=query.shape[0], shared=len(levels[0].keys), units=query.shape[1], each=finer.shape[1] // query.shape[1],
        dim=query.shape[2], finer_dim=finer.shape[2], rungs=len(levels), widest=max(widest, width), width=width,
        threads=torch.get_num_threads(), rung=rungs, query=query.data_ptr(), finer=finer.data_ptr(),
        seen=seen.data_ptr(), block=block.data_ptr(), opened=opened.data_ptr(),
    )  # fmt: skip
    check(library().farfield_descend(ctypes.byref(call)))
    return opened
