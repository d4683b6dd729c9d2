"""Attention of tiles, compiled: what :mod:`farfield.ops.tiles` does in torch, with the same arguments."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from farfield.ops.compiled import build
from farfield.ops.compiled.build import check, library
from farfield.ops.memory import empty, zeros
from farfield.ops.tiles import Dropout, Gradients, Lists

__all__ = ["DTYPES", "attend", "attend_backward", "delta", "pointer", "why_not"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Storage that the library reads and writes, by its number there; it computes in float32."""


def why_not(device: torch.device, dtype: torch.dtype, dropout: bool) -> str | None:
    """None where the library can run a call on such tensors, otherwise the reason; builds it on first use."""
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device}; 'torch' would be accepted"
    if dtype not in DTYPES:
        return f"it computes in float32, the tensors are {dtype}; 'torch' would be accepted"
    if dropout:
        return "it has no dropout; 'torch' has"
    return build.why_not()


class Store(ctypes.Structure):
    """``struct Store`` of the library."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "grad_keys", "grad_values", "table")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "places", "dtype", "tables", "shared")),
    )


class Call(ctypes.Structure):
    """``struct Call`` of the library."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("groups", "repeat", "units", "queries", "dim", "batch", "list")),
        ("stores", ctypes.POINTER(Store)),
        ("number", ctypes.c_int64),
        ("query", ctypes.c_void_p),
        ("key_bias", ctypes.c_void_p),
        ("biases", ctypes.c_int64),
        ("head_bias", ctypes.c_void_p),
        ("row_bias", ctypes.c_void_p),
        ("classes", ctypes.c_int64),
        ("biased", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("row_class", "out", "lse", "grad_out", "delta", "grad_query", "grad_head")
        ),
        ("dtype", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def pointer(x: Tensor | None) -> int | None:
    """Address of a contiguous tensor's first element, or None."""
    if x is None:
        return None
    assert x.is_contiguous()
    return x.data_ptr()


@lru_cache(maxsize=64)
def _classes(row_class: tuple[int, ...]) -> Tensor:
    return torch.tensor(row_class, dtype=torch.int64)


class _Prepared:
    """A call as the library takes it; holds on to the tensors whose addresses it contains."""

    def __init__(self, query: Tensor, lists: Lists, batch: int, scale: float) -> None:
        query = query.contiguous()
        groups, repeat, units, rows, dim = query.shape
        self.stores = (Store * len(lists.stores))()
        self.kept: list[Tensor | None] = [query]
        wanted = [(b, torch.float32) for b in (lists.key_bias, lists.head_bias, lists.row_bias)]
        for x, dtype in (*wanted, *((store.table, torch.int64) for store in lists.stores)):
            if x is not None and x.dtype != dtype:
                raise TypeError(f"the compiled engine was given a table or bias of {x.dtype}, it reads {dtype}")
        for into, store in zip(self.stores, lists.stores, strict=True):
            into.keys, into.values = self.keep(store.keys), self.keep(store.values)
            into.table = self.keep(store.table)
            into.shared, into.rows, into.width, _ = store.keys.shape
            into.places, into.dtype = store.table.shape[-1], DTYPES[store.keys.dtype]
            into.tables = store.table.shape[0] if store.table.dim() == 3 else 1
        key_bias = None if lists.key_bias is None else lists.key_bias.contiguous()
        self.call = Call(
            groups=groups, repeat=repeat, units=units, queries=rows, dim=dim, batch=batch, list=lists.width,
            stores=self.stores, number=len(lists.stores), query=self.keep(query), key_bias=self.keep(key_bias),
            biases=1 if key_bias is None else key_bias.shape[0], head_bias=self.keep(lists.head_bias),
            dtype=DTYPES[query.dtype], threads=torch.get_num_threads(), scale=scale,
        )  # fmt: skip
        if lists.row_bias is not None:
            self.call.row_bias = self.keep(lists.row_bias)
            self.call.classes, _, self.call.biased = lists.row_bias.shape
            if lists.row_class:
                self.call.row_class = self.keep(_classes(lists.row_class))

    def keep(self, x: Tensor | None) -> int | None:
        """Address of ``x``, which stays alive as long as the call."""
        self.kept.append(x)
        return pointer(x)


def attend(
    query: Tensor, lists: Lists, *, batch: int, scale: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`farfield.ops.tiles.attend`; float32, bfloat16 or float16, without dropout."""
    assert dropout is None
    prepared = _Prepared(query, lists, batch, scale)
    out = empty(query.shape, query.dtype)
    lse = empty(query.shape[:-1], torch.float32)
    prepared.call.out, prepared.call.lse = pointer(out), pointer(lse)
    check(library().farfield_attend(ctypes.byref(prepared.call)))
    return out, lse


def attend_backward(
    grad_out: Tensor,
    delta: Tensor,
    query: Tensor,
    lse: Tensor,
    lists: Lists,
    *,
    batch: int,
    scale: float,
    dropout: Dropout | None = None,
    shared: tuple[int, ...] | None = None,
) -> Gradients:
    """See :func:`farfield.ops.tiles.attend_backward`; float32, bfloat16 or float16, without dropout."""
    assert dropout is None
    prepared = _Prepared(query, lists, batch, scale)
    owner = shared or tuple(range(len(lists.stores)))
    keys: list[Tensor | None] = []
    values: list[Tensor | None] = []
    for i, store in enumerate(lists.stores):
        keys.append(zeros(store.keys.shape, torch.float32) if owner[i] == i else None)
        values.append(zeros(store.values.shape, torch.float32) if owner[i] == i else None)
        prepared.stores[i].grad_keys, prepared.stores[i].grad_values = (
            pointer(keys[owner[i]]),
            pointer(values[owner[i]]),
        )
    grad_query = empty(query.shape, query.dtype)
    grad_head = None if lists.head_bias is None else torch.zeros_like(lists.head_bias)
    call = prepared.call
    # A merged softmax may have been computed elsewhere, in another precision or layout.
    call.grad_out = prepared.keep(grad_out.to(query.dtype).contiguous())
    call.delta = prepared.keep(delta.float().contiguous())
    call.lse = prepared.keep(lse.float().contiguous())
    call.grad_query, call.grad_head = pointer(grad_query), pointer(grad_head)
    check(library().farfield_attend_backward(ctypes.byref(call)))
    return Gradients(grad_query, keys, values, grad_head)


def delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> Tensor:
    """[..] rowsum(grad_out * out) - grad_lse in float32, of [.., D] and [..]."""
    rows = empty(grad_lse.shape, torch.float32)
    a, b, less = grad_out.to(out.dtype).contiguous(), out.contiguous(), grad_lse.float().contiguous()
    check(
        library().farfield_delta(
            pointer(a), pointer(b), pointer(less), pointer(rows), rows.numel(), out.shape[-1], DTYPES[out.dtype],
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return rows
