"""The fast engines, torch and compiled: tiles of queries over runs of keys, as custom operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farfield.ops.arithmetic import arithmetic
from farfield.ops.customop import differentiable_once, one_by_one
from farfield.ops.state import AttentionState
from farfield.ops.tiles import Dropout, Lists, Store, compute_dtype
from farfield.ops.window.plan import Plan, check_bounds, check_fit, window_plan

__all__ = ["Window", "attend_window", "window"]


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(2, index)


def _plan(
    query: Tensor,
    cu_seqlens: Tensor | None,
    grid: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
) -> Plan:
    bounds = None
    if cu_seqlens is not None:
        bounds = tuple(cu_seqlens.tolist())
        check_bounds(bounds, grid[0])
    axes, order = tuple(int(n) for n in grid), tuple(bool(c) for c in causal)
    # Here too, since a compiled caller does not know the segments.
    check_fit(axes, bounds, tuple(size), tuple(dilation), order)
    return window_plan(axes, tuple(size), tuple(stride), tuple(dilation), order, bounds, query.device)


def _tiles(x: Tensor, plan: Plan, kv_heads: int) -> Tensor:
    """[B, Hq, N, D] to [B * Hkv, r, U, M, D]."""
    batch, heads = x.shape[:2]
    laid = _take(x, plan.query_token)
    return laid.reshape(batch * kv_heads, heads // kv_heads, plan.units, plan.rows, *x.shape[3:])


def _gradient_tiles(x: Tensor, plan: Plan, kv_heads: int) -> Tensor:
    """As :func:`_tiles`, with 0 at places that hold no token of their own, so that no token counts twice."""
    laid = _take(x, plan.query_token)
    if plan.spare is not None:
        laid = laid.index_fill(2, plan.spare, 0.0)
    return laid.reshape(x.shape[0] * kv_heads, x.shape[1] // kv_heads, plan.units, plan.rows, *x.shape[3:])


def _tokens(x: Tensor, plan: Plan, like: Tensor) -> Tensor:
    """The inverse of :func:`_tiles`, for a query-like tensor."""
    flat = x.reshape(*like.shape[:2], plan.units * plan.rows, *x.shape[4:])
    return _take(flat, plan.query_place)


def _lists(key: Tensor, value: Tensor, key_mask: Tensor | None, plan: Plan) -> Lists:
    groups, dim = key.shape[0] * key.shape[1], key.shape[3]

    def rows(x: Tensor) -> Tensor:
        return _take(x, plan.key_token).reshape(groups, -1, plan.width, dim).contiguous()

    hidden = None if plan.outside is None else plan.outside[None]
    if key_mask is not None:
        places = key_mask if plan.key_token is None else key_mask.index_select(1, plan.key_token)
        masked = ~places.view(len(places), -1, plan.width)[:, plan.table].flatten(2)
        hidden = masked if hidden is None else hidden | masked
    bias = None
    if hidden is not None:
        bias = torch.zeros(hidden.shape, dtype=compute_dtype(key.dtype), device=key.device)
        bias.masked_fill_(hidden, float("-inf"))
    store = Store(rows(key), rows(value), plan.table)
    return Lists((store,), key_bias=bias, row_bias=plan.row_bias, row_class=plan.row_class)


def _dropout(seed: Tensor | None, rate: float) -> Dropout | None:
    return None if seed is None else Dropout(rate, int(seed.item()))


@torch.library.custom_op("farfield::window", mutates_args=())
def window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    grid: list[int],
    size: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    scale: float,
    dropout: float,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, N, D] and lse [B, Hq, N]; see :func:`farfield.ops.window.window_attention`."""
    plan = _plan(query, cu_seqlens, grid, size, stride, dilation, causal)
    out, lse = arithmetic(engine, query, dropout > 0).attend(
        _tiles(query, plan, key.shape[1]),
        _lists(key, value, key_mask, plan),
        batch=query.shape[0],
        scale=scale,
        dropout=_dropout(seed, dropout),
    )
    return _tokens(out, plan, query).contiguous(), _tokens(lse, plan, query).contiguous()


@window.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=compute_dtype(query.dtype))


@torch.library.custom_op("farfield::window_backward", mutates_args=())
def window_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    grid: list[int],
    size: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    scale: float,
    dropout: float,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    plan = _plan(query, cu_seqlens, grid, size, stride, dilation, causal)
    kv_heads = key.shape[1]
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - grad_lse
    # A query that sees nothing has a constant output, whatever gradient arrives at its log-sum-exp.
    delta = delta.masked_fill(lse == float("-inf"), 0.0)
    grads = arithmetic(engine, query, dropout > 0).attend_backward(
        _gradient_tiles(grad_out, plan, kv_heads),
        _gradient_tiles(delta, plan, kv_heads),
        _tiles(query, plan, kv_heads),
        _tiles(lse, plan, kv_heads),
        _lists(key, value, key_mask, plan),
        batch=query.shape[0],
        scale=scale,
        dropout=_dropout(seed, dropout),
    )

    def tokens(rows: Tensor | None, like: Tensor) -> Tensor:
        assert rows is not None
        flat = rows.reshape(*like.shape[:2], -1, like.shape[3])
        return _take(flat, plan.key_place).to(like.dtype).contiguous()

    return _tokens(grads.query, plan, query).contiguous(), tokens(grads.keys[0], key), tokens(grads.values[0], value)


@window_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


window.register_vmap(one_by_one(window))
window_backward.register_vmap(one_by_one(window_backward))


class Window(torch.autograd.Function):
    """The gradient of ``farfield::window``, differentiable once; composes with torch.func and torch.compile."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        settings: tuple[Any, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of ``farfield::window``."""
        return window(query, key, value, key_mask, cu_seqlens, seed, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps every tensor: the backward pass repeats the scores."""
        settings, *tensors = inputs
        ctx.settings = settings
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        """One gradient (or None) per argument of :meth:`forward`."""
        saved = ctx.saved_tensors
        grads = differentiable_once(
            lambda: window_backward(grad_out, grad_lse, *saved, *ctx.settings), (grad_out, grad_lse, *saved[2:5]),
            'With impl="reference" it is to any order, in O(N²).',
        )  # fmt: skip
        return None, *grads, None, None, None


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, ...],
    window_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    dropout: float,
    engine: str,
) -> AttentionState:
    """The operator of :func:`farfield.ops.window.window_attention`, on checked arguments."""
    seed = torch.randint(1 << 62, (1,)) if dropout > 0 else None
    settings = (list(grid), list(window_size), list(stride), list(dilation), list(causal), scale, dropout, engine)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if torch.compiler.is_compiling() and not wanted:
        # Dynamo cannot trace an autograd function that has nothing to differentiate. Eagerly requires_grad does not
        # tell: inside vmap it is False for inputs that are differentiated outside.
        return AttentionState(*window(query, key, value, key_mask, cu_seqlens, seed, *settings))
    # torch.compile refuses one tensor in two places of an autograd function.
    key = key.view_as(key) if key is query else key
    value = value.view_as(value) if value is query or value is key else value
    out, lse = Window.apply(settings, query, key, value, key_mask, cu_seqlens, seed)
    return AttentionState(out, lse)
