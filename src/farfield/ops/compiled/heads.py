"""A step of decoding in which every head opens cells in its own way, compiled: one call for all heads of a layer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from farfield.ops.compiled.build import check, library
from farfield.ops.compiled.tiles import pointer

__all__ = ["Step", "step_heads"]


class Step(ctypes.Structure):
    """``struct Step`` of the library."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "queries", "keys", "values", "chosen")),
        ("banks", ctypes.POINTER(ctypes.c_void_p)),
        ("bank_of", ctypes.POINTER(ctypes.c_int64)),
        ("bank_room", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("table", "out", "lse")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "batch", "heads", "shared", "dim", "ring", "room", "width", "at", "block", "sinks", "threads",
            )
        ),
        ("scale", ctypes.c_float),
    )  # fmt: skip


def step_heads(
    query: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    chosen: Tensor,
    banks: Sequence[Tensor],
    table: Tensor,
    *,
    at: int,
    block: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of the token at position ``at``, which the caches hold already. Float32 on the CPU.

    Args:
        query: [B, Hq, D].
        queries: [B, Hq, S, D], that of position i at place i % S.
        keys, values: [B, Hkv, room, D].
        chosen: [B, Hq, 1 + pages] int64, read where the choice of this run of queries is there, otherwise written: one
            more than the number of the run, and the pages, negative where there are fewer.
        banks: [B, n, room, D or 2 D] each, what choices score.
        table: [Hq, 14] int64, for every head: its key head; bank of its cells (-1: the keys) and which of the bank's
            heads; the same of its pages; tokens of a cell and of a page; beam, open, share, beam_share, recent; whether
            it chooses by bounds; whether log(count) is added. ``open`` 0: nothing is opened, -1:
            every token is seen.
        at, block, sinks, scale: of the step.

    Returns:
        [B, Hq, D] outputs and [B, Hq] lse.
    """
    query = query.contiguous()
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1])
    number = len(banks)
    step = Step(
        query=pointer(query), queries=pointer(queries), keys=pointer(keys), values=pointer(values),
        chosen=pointer(chosen), width=chosen.shape[2],
        banks=(ctypes.c_void_p * number)(*(pointer(x) for x in banks)),
        bank_of=(ctypes.c_int64 * number)(*(x.shape[1] for x in banks)),
        bank_room=(ctypes.c_int64 * number)(*(x.shape[2] for x in banks)), table=pointer(table), out=pointer(out),
        lse=pointer(lse), batch=query.shape[0], heads=query.shape[1], shared=keys.shape[1], dim=query.shape[2],
        ring=queries.shape[2], room=keys.shape[2], at=at, block=block, sinks=sinks, threads=torch.get_num_threads(),
        scale=scale,
    )  # fmt: skip
    check(library().farfield_step(ctypes.byref(step)))
    return out, lse
