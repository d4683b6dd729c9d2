"""The public function of windowed attention: checks, then one engine."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, overload

import torch
from torch import Tensor

from farfield.geometry import per_axis
from farfield.ops.state import AttentionState
from farfield.ops.window import reference
from farfield.ops.window.plan import check_bounds, check_fit
from farfield.ops.window.torch import attend_window

__all__ = ["ENGINES", "check_rule", "window_attention"]

ENGINES = ("reference", "torch", "compiled")


def check_rule(
    window: int | Sequence[int], stride: int | Sequence[int], dilation: int | Sequence[int], dims: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Window, stride and dilation per axis.

    Raises:
        ValueError: repeating what was given, for a wrong number of entries, a value below 1, a stride above its window.
    """
    sizes, strides = per_axis(window, dims, "window"), per_axis(stride, dims, "stride")
    if any(s > w for s, w in zip(strides, sizes, strict=True)):
        raise ValueError(
            f"stride={stride!r} exceeds window={window!r}: queries between two windows would see neither; "
            f"give a stride of 1 (sliding) to the window (blocked)"
        )
    return sizes, strides, per_axis(dilation, dims, "dilation")


@overload
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | Sequence[int],
    grid: Sequence[int] | None = ...,
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    causal: bool | Sequence[bool] = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_lse: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | Sequence[int],
    grid: Sequence[int] | None = ...,
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    causal: bool | Sequence[bool] = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_lse: Literal[True],
    impl: str | None = ...,
) -> AttentionState: ...


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | Sequence[int],
    grid: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | AttentionState:
    """Softmax attention of every query over a window of keys, in one, two or three dimensions.

    A window that is not causal holds exactly `window` keys for every query: at the borders it stops moving. A causal
    one holds the query and the `window - 1` tokens before it, as far as they exist. An even window has one more key
    before its query than after it. With a `stride` of s, s neighbouring queries share one window; stride = window is
    blocked attention. With a `dilation` of d a window holds every d-th token. A window longer than its axis is the
    whole axis (dilation 1), so short inputs need no special care.

    Args:
        query: `[B, Hq, N, D]`; float32, float64, bfloat16 or float16. Tokens row-major in the grid.
        key: `[B, Hkv, N, D]`, same dtype; Hkv divides Hq.
        value: `[B, Hkv, N, D]`.
        window: keys per axis; one integer or one per axis.
        grid: lengths of the axes with product N. Default `(N,)`.
        stride: 1 to window, one integer or one per axis.
        dilation: one integer or one per axis. A dilated window on an axis that is not causal must fit:
            window * dilation up to the length of the axis.
        causal: one bool, or one per axis.
        key_mask: bool `[B, N]`, True = visible. The window does not move to make up for hidden keys,
            which may hold anything, NaN too.
        cu_seqlens: integer `[S + 1]` bounds of packed segments from 0 to N, each its own sequence; 1-D. With a key_mask
            too, cu_seqlens wins and the mask is not read.
        scale: factor on the scores. Default D ** -0.5.
        dropout: rate in [0, 1) for the normalised weights, from torch's default generator. Pass 0 in evaluation.
        return_lse: return an attention state instead of the output alone.
        impl: "compiled" (CPU; built by a C++ compiler on first use), "torch" (any device), "reference" (dense mask,
            O(N²)), None: the fastest that can run the call.

    Returns:
        `[B, Hq, N, D]`, or with return_lse the state (out, lse), differentiable in both. A query that sees nothing
        gives 0 and -inf, with zero gradients. The torch engine is differentiable once, the reference any number of
        times; both compose with torch.func and torch.compile.

    Raises:
        ValueError, TypeError: with what was given and what would be accepted.

    Complexity: O(N window) time, O(N) memory, forward and backward. Causal-safe with `causal=True`. Under autocast,
    float inputs are cast to its dtype first. Accumulation is float32 (float64 for float64).

    Source: neighborhood attention, arXiv 2204.07143; dilation, arXiv 2209.15001; stride, arXiv 2504.16922.
    """
    query, key, value = _inputs(query, key, value)
    tokens = query.shape[2]
    axes = (tokens,) if grid is None else tuple(grid)
    if not 1 <= len(axes) <= 3 or (grid is not None and prod(axes) != tokens):
        raise ValueError(f"grid={axes} must hold 1 to 3 lengths with product N={tokens}")
    dims = len(axes)
    sizes, strides, dilations = check_rule(window, stride, dilation, dims)
    order = (causal,) * dims if isinstance(causal, bool) else tuple(bool(c) for c in causal)
    if len(order) != dims:
        raise ValueError(f"causal={causal!r}: give one bool, or {dims} for a {dims}-D grid")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout!r}: a rate in [0, 1) would be accepted")
    bounds = None
    if cu_seqlens is not None:
        bounds = _segments(cu_seqlens, tokens, dims)
        key_mask = None
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (query.shape[0], tokens)):
        raise ValueError(
            f"key_mask must be bool [B, N] = {[query.shape[0], tokens]} (True = visible), "
            f"got {key_mask.dtype} {list(key_mask.shape)}"
        )
    if cu_seqlens is None or bounds is not None:
        check_fit(axes, bounds, sizes, dilations, order)
    if key_mask is not None:
        # A weight of 0 does not keep a NaN out of a sum: what is hidden must hold nothing.
        hidden = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    factor = float(query.shape[3] ** -0.5 if scale is None else scale)
    if impl == "reference":
        if dropout:
            raise ValueError(f"impl='reference' has no dropout, got dropout={dropout!r}; impl='torch' has")
        if cu_seqlens is not None and bounds is None:
            raise ValueError("impl='reference' reads cu_seqlens on the host and cannot be compiled with it")
        state = reference.attend(
            query, key, value, grid=axes, window=sizes, stride=strides, dilation=dilations, causal=order,
            key_mask=key_mask, bounds=bounds, scale=factor,
        )  # fmt: skip
    elif impl in (None, "torch", "compiled"):
        state = attend_window(
            query, key, value, grid=axes, window_size=sizes, stride=strides, dilation=dilations, causal=order,
            key_mask=key_mask, cu_seqlens=cu_seqlens, scale=factor, dropout=float(dropout), engine=impl or "",
        )  # fmt: skip
    else:
        raise ValueError(f"impl={impl!r} is not an engine: {', '.join(ENGINES)} or None would be accepted")
    return state if return_lse else state.out


def _inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}: [B, H, N, D] is needed")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {x.dtype}: float32, float64, bfloat16 or float16 would be accepted")
    if key.shape != value.shape:
        raise ValueError(f"key {list(key.shape)} and value {list(value.shape)} must have one shape, [B, Hkv, N, D]")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} must share B, N and D (self-attention)")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads, key {key.shape[1]}: Hq must be a multiple of Hkv")
    if query.shape[2] == 0:
        raise ValueError(f"query has shape {list(query.shape)}: N >= 1 is needed")
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value have dtypes {query.dtype}, {key.dtype}, {value.dtype}: give one for all")
    return query, key, value


def _segments(cu_seqlens: Tensor, tokens: int, dims: int) -> tuple[int, ...] | None:
    """The bounds on the host; None under tracing, where the operator reads and checks them, and the fit to them."""
    if dims != 1:
        raise ValueError(f"cu_seqlens packs 1-D sequences, the grid has {dims} axes; pass images as a batch")
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens={cu_seqlens!r}: an int32 or int64 tensor [S + 1] would be accepted")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if torch.compiler.is_compiling():
        return None
    bounds = tuple(cu_seqlens.tolist())
    check_bounds(bounds, tokens)
    return bounds
