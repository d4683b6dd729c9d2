"""Attention of tiles of queries over given lists of keys, as a custom operator with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farfield.ops.arithmetic import arithmetic
from farfield.ops.compiled import tiles as compiled
from farfield.ops.state import AttentionState, state_from_scores
from farfield.ops.tiles import Lists, Store, compute_dtype

__all__ = ["attend_lists"]


def _lists(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    tables: list[Tensor],
    key_bias: Tensor | None,
    head_bias: Tensor | None,
    native: bool,
) -> Lists:
    """The lists for an engine; one that is not ``native`` knows no absent rows and no shared keys."""
    keys, values = [x.contiguous() for x in keys], [x.contiguous() for x in values]
    if not native:
        keys, values, (tables, key_bias) = _spread(query, keys), _spread(query, values), _hide(keys, tables, key_bias)
    stores = tuple(Store(k, v, t) for k, v, t in zip(keys, values, tables, strict=True))
    return Lists(stores, key_bias=key_bias, head_bias=head_bias)


def _spread(query: Tensor, stores: list[Tensor]) -> list[Tensor]:
    """Keys or values repeated for every group of queries."""
    return [x.repeat_interleave(len(query) // len(x), 0) if len(query) > len(x) else x for x in stores]


def _hide(keys: list[Tensor], tables: list[Tensor], key_bias: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Tables that name real rows only, and the bias that hides the absent ones."""
    absent = [(t < 0).repeat_interleave(k.shape[2], -1) for k, t in zip(keys, tables, strict=True)]
    wide = max((t.dim() for t in tables), default=2)
    hidden = torch.cat([x if x.dim() == wide else x.expand(*_groups(tables), -1, -1) for x in absent], -1)
    if not bool(hidden.any()):
        return tables, key_bias
    hidden = hidden if hidden.dim() == 3 else hidden[None]
    wanted = compute_dtype(keys[0].dtype)
    bias = torch.zeros(hidden.shape, dtype=wanted, device=hidden.device) if key_bias is None else key_bias
    if len(bias) not in (1, len(hidden)) and len(hidden) > 1:
        bias = bias.repeat_interleave(len(hidden) // len(bias), 0)
    return [t.clamp(min=0) for t in tables], bias.masked_fill(hidden, -torch.inf)


def _groups(tables: list[Tensor]) -> tuple[int, ...]:
    return tuple(t.shape[0] for t in tables if t.dim() == 3)[:1]


@torch.library.custom_op("farfield::listed", mutates_args=())
def listed(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    tables: list[Tensor],
    key_bias: Tensor | None,
    head_bias: Tensor | None,
    batch: int,
    scale: float,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """Output [G, r, U, M, D] and lse [G, r, U, M]; the arguments of :func:`attend_lists`."""
    module = arithmetic(engine, query)
    lists = _lists(query, keys, values, tables, key_bias, head_bias, native=module is compiled)
    return module.attend(query.contiguous(), lists, batch=batch, scale=scale)


@listed.register_fake
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        query.shape[:-1], dtype=compute_dtype(query.dtype)
    )


@torch.library.custom_op("farfield::listed_backward", mutates_args=())
def listed_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    tables: list[Tensor],
    key_bias: Tensor | None,
    head_bias: Tensor | None,
    batch: int,
    scale: float,
    engine: str,
) -> list[Tensor]:
    """Gradients of the query, of all keys, of all values and of head_bias (empty where there is none)."""
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - grad_lse
    delta = delta.masked_fill(lse == float("-inf"), 0.0)
    module = arithmetic(engine, query)
    # Groups that share keys would add to one place at once: each gets its own.
    own = _spread(query, keys), _spread(query, values)
    lists = _lists(query, *own, tables, key_bias, head_bias, native=module is compiled)
    grads = module.attend_backward(
        grad_out.contiguous(), delta, query.contiguous(), lse, lists, batch=batch, scale=scale
    )
    sides = [*zip(grads.keys, keys, strict=True), *zip(grads.values, values, strict=True)]
    found = [grad.unflatten(0, (len(like), -1)).sum(1).to(like.dtype) for grad, like in sides if grad is not None]
    return [grads.query, *found, query.new_empty(0) if grads.head_bias is None else grads.head_bias]


@listed_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    tables: list[Tensor],
    key_bias: Tensor | None,
    head_bias: Tensor | None,
    *settings: Any,
) -> list[Tensor]:
    some = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, *keys, *values)]
    return [*some, query.new_empty(0) if head_bias is None else torch.empty_like(head_bias)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, values, tables, key_bias, head_bias, *ctx.settings = inputs
    ctx.number = len(keys)
    ctx.save_for_backward(*output, query, *keys, *values, *tables, key_bias, head_bias)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    n = ctx.number
    out, lse, query, *rest = ctx.saved_tensors
    keys, values, tables, (key_bias, head_bias) = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
    grads = listed_backward(
        grad_out, grad_lse, out, lse, query, keys, values, tables, key_bias, head_bias, *ctx.settings
    )
    of_head = None if head_bias is None else grads[-1]
    return grads[0], grads[1 : n + 1], grads[n + 1 : 2 * n + 1], [None] * n, None, of_head, None, None, None


listed.register_autograd(_backward, setup_context=_setup)


def attend_lists(
    query: Tensor,
    stores: list[Store],
    key_bias: Tensor | None = None,
    head_bias: Tensor | None = None,
    *,
    batch: int,
    scale: float,
    impl: str | None = None,
) -> AttentionState:
    """Softmax attention of units of queries over lists of keys, one list for every group and unit.

    Args:
        query: [G, r, U, M, D], G = batch * key heads, r query heads to a key head, U units of M queries.
        stores: see :class:`farfield.ops.tiles.Store`; here a negative row of a table is absent, and there may be fewer
            groups of keys than G, each for G / G' neighbouring groups of queries.
        key_bias: [1, batch or G, U, K] added to the scores of all queries of a unit; -inf hides a key. None: none.
        head_bias: [G / batch, r, K] added to the scores of a query head, or None. Differentiable.
        batch: B.
        scale: factor of the scores.
        impl: "compiled", "torch", "reference" (differentiable to any order, gathers all keys), None: the fastest.

    Returns:
        The state, out [G, r, U, M, D] and lse [G, r, U, M]; a query that reads nothing gets 0 and -inf.
        Differentiable in query, keys, values and head_bias.
    """
    if impl == "reference":
        return _reference(query, stores, key_bias, head_bias, batch, scale)
    settings = (batch, scale, impl or "")
    keys, values, tables = ([getattr(s, name) for s in stores] for name in ("keys", "values", "table"))
    return AttentionState(*listed(query, keys, values, tables, key_bias, head_bias, *settings))


def _reference(
    query: Tensor, stores: list[Store], key_bias: Tensor | None, head_bias: Tensor | None, batch: int, scale: float
) -> AttentionState:
    groups, repeat, units, _, dim = query.shape
    sides = [s.keys for s in stores], [s.values for s in stores]
    tables, key_bias = _hide(sides[0], [s.table for s in stores], key_bias)
    stores = [Store(*parts) for parts in zip(*(_spread(query, side) for side in sides), tables, strict=True)]
    everything = slice(0, groups), slice(0, units)
    rows: list[list[Tensor]] = [[], []]
    for store in stores:
        index = store.index(*everything)
        for side, x in zip(rows, (store.keys, store.values), strict=True):
            side.append(x.flatten(0, 1).index_select(0, index).reshape(groups, 1, units, store.width, dim))
    keys, values = (torch.cat(side, 3).expand(-1, repeat, -1, -1, -1) for side in rows)
    wide = compute_dtype(query.dtype)
    scores = query.to(wide) * scale @ keys.to(wide).mT
    if key_bias is not None:
        bias = key_bias.repeat_interleave(groups // key_bias.shape[0], 0) if len(key_bias) != 1 else key_bias
        scores = scores + bias[:, None, :, None].to(wide)
    if head_bias is not None:
        scores = scores + head_bias.repeat(batch, 1, 1)[:, :, None, None].to(wide)
    return state_from_scores(scores, values)
