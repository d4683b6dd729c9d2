"""Scores of listed cells and the largest of every row, compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from farfield.ops.compiled import build
from farfield.ops.compiled.build import check, library

__all__ = ["score", "top", "why_not"]


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
