"""Everything far in one cell, and the tokens kept out of it, compiled: see :mod:`farfield.ops.expansion`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from farfield.ops.compiled.build import check, library, why_not
from farfield.ops.compiled.tiles import pointer
from farfield.ops.memory import empty, zeros

__all__ = ["Advance", "Expansion", "ExpansionStep", "StepPart", "advance", "expand", "expand_backward", "step", "takes"]

WIDTH = 32
"""Rows have a multiple of it."""


def takes(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether the engine is there for rows [.., D] of this device, in arithmetic of this dtype."""
    fits = rows.device.type == "cpu" and dtype == torch.float32 and rows.shape[-1] % WIDTH == 0
    return fits and why_not() is None


class Expansion(ctypes.Structure):
    """``struct Expansion`` of the library."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "query", "key", "value", "centres", "bias", "own", "read", "shown", "out", "lse", "grad_out",
                "grad_lse", "grad_query", "grad_key", "grad_value",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "shared", "length", "dim", "number", "block", "open", "parts", "threads")
        ),
        ("scale", ctypes.c_float),
    )  # fmt: skip


class Advance(ctypes.Structure):
    """``struct Advance`` of the library."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("key", "value", "read", "centres", "of_lse", "of_key", "of_rows", "kept", "scores")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "batch", "heads", "shared", "room", "before", "dim", "number", "block", "open", "sinks", "first",
                "last", "places", "threads",
            )
        ),
        ("scale", ctypes.c_float),
    )  # fmt: skip


class ExpansionStep(ctypes.Structure):
    """``struct ExpansionStep`` of the library."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "query", "centres", "bias", "place", "of_lse", "of_key", "of_rows", "kept", "keys", "values", "read",
                "out", "lse",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "all", "number", "dim", "places", "at", "open", "shared", "room")
        ),
        ("scale", ctypes.c_float),
    )  # fmt: skip


class StepPart(NamedTuple):
    """An expansion of some heads, for :func:`step`. Float32 on the CPU.

    Attributes:
        centres, bias: [H, C, D], [H].
        heads: [H] which of all heads these are.
        moments: [B, H, R, C], [.., D] and [.., D + 1, D] of a cache.
        kept: [B, H, R, C, open] rows of keys and values, negative for none, or None where no tokens are kept.
        keys, values: [B, Hkv, N, D], not read where none are kept.
        read: [H] the key head of each.
    """

    centres: Tensor
    bias: Tensor
    heads: Tensor
    moments: tuple[Tensor, Tensor, Tensor]
    kept: Tensor | None
    keys: Tensor
    values: Tensor
    read: Tensor


class _Prepared:
    """A call as the library takes it; holds on to the tensors whose addresses it contains."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        centres: Tensor,
        bias: Tensor,
        own: Tensor,
        shown: Tensor,
        block: int,
        open: int,
        scale: float,
    ) -> None:
        given = (query, key, value, centres, bias)
        for x in given:
            if x.dtype != torch.float32 or x.device.type != "cpu":
                raise TypeError(
                    f"the compiled expansion was given {x.dtype} on {x.device}, it reads float32 on the CPU"
                )
        self.kept = [x.contiguous() for x in (*given, own, shown)]
        names = ("query", "key", "value", "centres", "bias", "own", "shown")
        self.call = Expansion(
            **{name: pointer(x) for name, x in zip(names, self.kept, strict=True)}, batch=query.shape[0],
            heads=query.shape[1], shared=key.shape[1], length=query.shape[2], dim=query.shape[3],
            number=centres.shape[1], block=block, open=open, parts=1,
            threads=torch.get_num_threads(), scale=scale,
        )  # fmt: skip


@torch.library.custom_op("farfield::expand", mutates_args=())
def expand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centres: Tensor,
    bias: Tensor,
    own: Tensor,
    shown: Tensor,
    block: int,
    open: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, N, D] and lse [B, H, N] for the centres ``own`` [B, H, N]; float32 on the CPU.

    ``query`` is [B, H, N, D], ``key`` and ``value`` [B, Hkv, N, D], ``centres`` [H, C, D], ``bias`` [H], ``shown``
    [B, N] bool; every centre keeps ``open`` tokens out of its cell, as :func:`farfield.ops.expansion.sift` says. D is a
    multiple of the width that the library works in (32 numbers serve everywhere).
    """
    prepared = _Prepared(query, key, value, centres, bias, own, shown, block, open, scale)
    out, lse = empty(query.shape, torch.float32), query.new_empty(query.shape[:3])
    prepared.call.out, prepared.call.lse = pointer(out), pointer(lse)
    check(library().farfield_expand(ctypes.byref(prepared.call)))
    return out, lse


@expand.register_fake
def _(query: Tensor, *args: object, **more: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3])


@torch.library.custom_op("farfield::expand_backward", mutates_args=())
def expand_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centres: Tensor,
    bias: Tensor,
    own: Tensor,
    shown: Tensor,
    block: int,
    open: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from those of what :func:`expand` gave; ``lse`` is its own."""
    prepared = _Prepared(query, key, value, centres, bias, own, shown, block, open, scale)
    of_out, of_lse, lse = (x.contiguous() for x in (grad_out, grad_lse, lse))
    # So many tasks that threads have work for equal times; how many does not hang on the threads, so that sums repeat.
    parts = min(centres.shape[1], max(1, 8 // (query.shape[0] * query.shape[1])))
    of_query = zeros(query.shape, torch.float32)
    of_key, of_value = (zeros((parts, *query.shape), torch.float32) for _ in range(2))
    call = prepared.call
    call.lse, call.parts = pointer(lse), parts
    call.grad_out, call.grad_lse = pointer(of_out), pointer(of_lse)
    call.grad_query, call.grad_key, call.grad_value = pointer(of_query), pointer(of_key), pointer(of_value)
    check(library().farfield_expand_backward(ctypes.byref(call)))
    shared = (key.shape[1], -1)
    key_side, value_side = (x.sum(0).unflatten(1, shared).sum(2) for x in (of_key, of_value))
    return of_query, key_side, value_side


@expand_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    *args: object, **more: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def advance(
    moments: tuple[Tensor, Tensor, Tensor],
    kept: Tensor | None,
    scores: Tensor | None,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    centres: Tensor,
    scale: float,
    *,
    block: int,
    sinks: int,
    before: int,
    first: int,
    last: int,
) -> None:
    """Adds blocks ``first`` to ``last``, the last left out, to what a cache has before block ``first``, in place.

    Float32 on the CPU: ``moments`` [B, H, R, C], [.., D] and [.., D + 1, D]; ``kept`` and ``scores`` [B, H, R, C, open]
    or None. ``key`` and ``value`` [B, Hkv, N, D] have token i of these blocks in row i - ``before``, and in front of it
    those that are kept; ``read`` [H] says which key head is whose. Place b % R has what is before block b, for the last
    R of them.
    """
    key, value = _rows(key), _rows(value)
    if key.stride() != value.stride():
        key, value = key.contiguous(), value.contiguous()
    centres = centres.contiguous()
    places = [x for x in (*moments, kept, scores) if x is not None]
    if not all(x.is_contiguous() for x in places):
        raise ValueError(f"a cache of strides {[x.stride() for x in places]}; contiguous tensors are advanced in place")
    call = Advance(
        key=key.data_ptr(), value=value.data_ptr(), read=pointer(read), centres=pointer(centres),
        of_lse=pointer(moments[0]), of_key=pointer(moments[1]), of_rows=pointer(moments[2]), kept=pointer(kept),
        scores=pointer(scores), batch=key.shape[0], heads=len(centres), shared=key.shape[1],
        room=key.stride(1) // key.shape[3], before=before, dim=key.shape[3], number=centres.shape[1], block=block,
        open=0 if kept is None else kept.shape[-1], sinks=sinks, first=first, last=last, places=moments[0].shape[2],
        threads=torch.get_num_threads(), scale=scale,
    )  # fmt: skip
    check(library().farfield_advance(ctypes.byref(call)))


def _rows(x: Tensor) -> Tensor:
    """[B, H, N, D] as a part of [B, H, room, D] that lies in one piece: what it is already, or a copy."""
    width = x.shape[3]
    lies = x.stride(3) == 1 and x.stride(2) == width and x.stride(1) % width == 0
    return x if lies and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def step(query: Tensor, out: Tensor, lse: Tensor, parts: Sequence[StepPart], place: int, scale: float) -> None:
    """Merges what one query [B, H, D] of every head has of its expansion into its state, in place; in one call.

    Args:
        query: [B, H, D] of all heads; float32 on the CPU, as everything.
        out, lse: [B, H, D] and [B, H], contiguous: what was seen already.
        parts: no head in two of them.
        place: of the caches, which has what the queries see.
        scale: factor of the scores.
    """
    query = query.contiguous()
    if not (out.is_contiguous() and lse.is_contiguous() and query.dtype == out.dtype == lse.dtype == torch.float32):
        raise TypeError("the compiled step of expansions writes contiguous float32 tensors")
    calls, held = [], []
    for part in parts:
        keys, values = part.keys, part.values
        lasting = (part.centres, part.bias, *part.moments)
        if not all(x.dtype == torch.float32 and x.is_contiguous() for x in lasting):
            raise TypeError("the compiled step of expansions reads contiguous float32 centres, biases and sums")
        if part.kept is not None and not part.kept.is_contiguous():
            raise TypeError(f"the compiled step of expansions reads contiguous lists, got strides {part.kept.stride()}")
        if part.kept is not None:
            keys, values = keys.contiguous(), values.contiguous()
            held += [keys, values]
            if not keys.dtype == values.dtype == torch.float32:
                raise TypeError(f"the compiled step of expansions reads float32, got {keys.dtype} and {values.dtype}")
        calls.append(
            ExpansionStep(
                query=query.data_ptr(), centres=part.centres.data_ptr(), bias=part.bias.data_ptr(),
                place=part.heads.data_ptr(), of_lse=part.moments[0].data_ptr(), of_key=part.moments[1].data_ptr(),
                of_rows=part.moments[2].data_ptr(), kept=None if part.kept is None else part.kept.data_ptr(),
                keys=keys.data_ptr(), values=values.data_ptr(), read=part.read.data_ptr(), out=out.data_ptr(),
                lse=lse.data_ptr(), batch=query.shape[0], heads=len(part.heads), all=query.shape[1],
                number=part.centres.shape[1], dim=query.shape[2], places=part.moments[0].shape[2], at=place,
                open=0 if part.kept is None else part.kept.shape[-1], shared=keys.shape[1], room=keys.shape[2],
                scale=scale,
            )
        )  # fmt: skip
    number = len(calls)
    check(library().farfield_step_expansions((ExpansionStep * number)(*calls), number, torch.get_num_threads()))
