"""Everything far in one cell, compiled: see :mod:`farfield.ops.expansion`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from farfield.ops.compiled.build import check, library
from farfield.ops.compiled.tiles import pointer

__all__ = ["Expansion", "expand"]


class Expansion(ctypes.Structure):
    """``struct Expansion`` of the library."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "key", "value", "centres", "bias", "own", "shown", "out", "lse")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "shared", "length", "dim", "number", "block", "threads")
        ),
        ("scale", ctypes.c_float),
    )


def expand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centres: Tensor,
    bias: Tensor,
    own: Tensor,
    shown: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, N, D] and lse [B, H, N] for the centres ``own`` [B, H, N]; float32 on the CPU.

    ``query`` is [B, H, N, D], ``key`` and ``value`` [B, Hkv, N, D], ``centres`` [H, C, D], ``bias`` [H], ``shown``
    [B, N] bool. D is a multiple of the width that the library works in (32 numbers serve everywhere).
    """
    query, key, value, centres, bias, own, shown = (
        x.contiguous() for x in (query, key, value, centres, bias, own, shown)
    )
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3])
    call = Expansion(
        query=pointer(query), key=pointer(key), value=pointer(value), centres=pointer(centres), bias=pointer(bias),
        own=pointer(own), shown=pointer(shown), out=pointer(out), lse=pointer(lse), batch=query.shape[0],
        heads=query.shape[1], shared=key.shape[1], length=query.shape[2], dim=query.shape[3], number=centres.shape[1],
        block=block, threads=torch.get_num_threads(), scale=scale,
    )  # fmt: skip
    check(library().farfield_expand(ctypes.byref(call)))
    return out, lse
