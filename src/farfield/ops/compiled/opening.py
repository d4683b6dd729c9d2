"""One query to a row over opened pages, choice and attention in one call: a step of decoding, compiled."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from farfield.ops.compiled.build import check, library
from farfield.ops.compiled.tiles import pointer

__all__ = ["Opening", "open_rows"]


class Opening(ctypes.Structure):
    """``struct Opening`` of the library."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "leader", "keys", "values", "cells", "pages", "out", "lse")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "rows", "shared", "dim", "bounds", "room", "cell_room", "page_room", "visible", "cell", "page", "beam",
                "open", "sinks", "count", "threads",
            )
        ),
        ("scale", ctypes.c_float),
    )  # fmt: skip


def open_rows(
    query: Tensor,
    leader: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
    pages: Tensor | None,
    *,
    visible: int,
    cell: int,
    page: int,
    beam: int,
    open: int,
    sinks: int,
    bounds: bool,
    count_bias: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the tokens of the pages that its leader opens among the cells of one level.

    Args:
        query, leader: [B, Hq, D] float32 on the CPU, as all others.
        keys, values: [B, Hkv, room, D] tokens.
        cells, pages: [B, Hkv, room, D or 2 D] what is scored; pages None where cells are the pages.
        visible: cells that may be chosen, from the first on.
        cell, page: tokens of each.
        beam, open, sinks, bounds, count_bias, scale: as in :func:`farfield.opened_attention`; ``bounds``: the last axis
            of what is scored has the halves for positive and negative channels.

    Returns:
        [B, Hq, D] outputs and [B, Hq] lse; 0 and -inf where no token is seen.
    """
    query, leader = query.contiguous(), leader.contiguous()
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1])
    opening = Opening(
        query=pointer(query), leader=pointer(leader), keys=pointer(keys), values=pointer(values), cells=pointer(cells),
        pages=pointer(pages), out=pointer(out), lse=pointer(lse), rows=lse.numel(),
        shared=keys.shape[0] * keys.shape[1], dim=query.shape[-1], bounds=bounds, room=keys.shape[2],
        cell_room=cells.shape[2],
        page_room=0 if pages is None else pages.shape[2], visible=visible, cell=cell, page=page, beam=beam, open=open,
        sinks=sinks, count=count_bias, threads=torch.get_num_threads(), scale=scale,
    )  # fmt: skip
    check(library().farfield_open(ctypes.byref(opening)))
    return out, lse
