"""The torch engine: multipole attention on any device, forward and backward, in memory linear in N.

Tokens are brought into block order, the pyramid of summaries is built once, and every leaf block attends to one list
of keys, its neighbours' tokens, the sinks and the cells of its interaction lists, through :mod:`farfield.ops.tiles`.
The backward pass repeats the scores chunk by chunk and sends the gradients of the cells down the pyramid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from farfield.geometry import Geometry
from farfield.ops.multipole import pyramid
from farfield.ops.multipole.engines import Request
from farfield.ops.multipole.plan import Plan, Table, make_plan, packing
from farfield.ops.multipole.settings import Result, Settings, Tensors
from farfield.ops.multipole.summary import Summaries, Summary, check_levels, unpack
from farfield.ops.tiles import Dropout, Gradients, Lists, Store, attend, attend_backward, compute_dtype


def why_not(request: Request) -> str | None:
    """None: this engine runs everything."""
    return None


@dataclass(frozen=True)
class Kernels:
    """The arithmetic that an engine is made of.

    Attributes:
        attend, attend_backward: as in :mod:`farfield.ops.tiles`.
        up: (summary, key, value, valid, counts, layout, levels) -> keys and values of the cells of all levels,
            [B * Hkv, groups of all levels, P, D] each.
        down: (summary, key, value, valid, counts, layout, cells, gradients, grad_key, grad_value) -> one gradient per
            tensor of the summary; adds those of the tokens to the last two arguments. ``cells`` is what ``up``
            returned, ``gradients`` theirs, which may be overwritten.
        delta: (grad_out, out, grad_lse) -> rowsum(grad_out * out) - grad_lse.
    """

    attend: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., Gradients]
    up: Callable[..., tuple[Tensor, Tensor]]
    down: Callable[..., list[Tensor]]
    delta: Callable[[Tensor, Tensor, Tensor], Tensor]


def join(levels: tuple[Tensor, ...], like: Tensor, cells: int) -> Tensor:
    """Levels [B, H, groups, P, D] as one tensor [B * H, groups of all levels, P, D]."""
    groups, dim = like.shape[0] * like.shape[1], like.shape[-1]
    if not levels:
        return like.new_zeros(groups, 0, cells, dim)
    return torch.cat([x.reshape(groups, -1, *x.shape[3:]) for x in levels], 1)


def split(joined: tuple[Tensor, Tensor], layout: Geometry, levels: int, heads: int) -> Summaries:
    """The inverse of :func:`join` for keys and values."""
    sizes = [layout.group_total(level) for level in range(1, levels + 1)]
    sides = (x.unflatten(0, (-1, heads)).split(sizes, 2) if sizes else () for x in joined)
    return Summaries(*sides)


def _up(
    summary: Summary, key: Tensor, value: Tensor, valid: Tensor, counts: pyramid.Counts, layout: Geometry, levels: int
) -> tuple[Tensor, Tensor]:
    made = pyramid.up(summary, key, value, valid, counts, layout, levels)
    p = layout.cells_per_group
    return join(made.keys, key, p), join(made.values, value, p)


def _down(
    summary: Summary,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    counts: pyramid.Counts,
    layout: Geometry,
    cells: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    grad_key: Tensor,
    grad_value: Tensor,
) -> list[Tensor]:
    levels, heads = len(counts.cells), key.shape[1]
    made, grads = (split(x, layout, levels, heads) for x in (cells, gradients))
    return pyramid.down(summary, key, value, valid, counts, layout, made, grads, grad_key, grad_value)


def _delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> Tensor:
    return (grad_out.to(grad_lse.dtype) * out.to(grad_lse.dtype)).sum(-1) - grad_lse


KERNELS = Kernels(attend, attend_backward, _up, _down, _delta)


class _Visible:
    """Which tokens and cells of a plan can be read, and how their scores are biased."""

    def __init__(self, plan: Plan, key_mask: Tensor | None, levels: int, dtype: torch.dtype, count_bias: bool) -> None:
        self.plan, self.dtype, self.count_bias = plan, dtype, count_bias
        self.valid, self.in_cells = plan.readable(key_mask)
        full = key_mask is None and plan.whole and plan.is_sink is None
        self.counts = pyramid.count(self.in_cells, plan.layout, levels, full)

    def _hide(self, table: Table, shown: Tensor) -> Tensor:
        """Bias [B', units, places * w] of rows whose keys are biased by ``shown`` [B', R, w]."""
        bias = shown[:, table.rows].masked_fill(~table.used[..., None], -torch.inf)
        return bias.flatten(2)

    def _token_bias(self, shown: Tensor) -> Tensor:
        return torch.zeros(shown.shape, dtype=self.dtype, device=shown.device).masked_fill_(~shown, -torch.inf)

    def _cell_bias(self, level: int) -> Tensor:
        """[B', groups, P] log(count) or 0; -inf for an empty cell."""
        grouped = pyramid.to_groups(self.counts.cells[level], self.plan.layout, level + 1)
        counts = grouped[:, 0, :, :, 0].to(self.dtype)
        return counts.log() if self.count_bias else torch.where(counts > 0, 0.0, -torch.inf).to(self.dtype)

    @cached_property
    def tokens(self) -> Tensor:
        """[B', blocks, keys] of near field and sinks."""
        size = self.plan.layout.block_tokens
        bias = [self._hide(self.plan.near, self._token_bias(self.in_cells).unflatten(1, (-1, size)))]
        if self.plan.sinks is not None:
            bias.append(self._hide(self.plan.sinks, self._token_bias(self.valid)[..., None]))
        return torch.cat(bias, 2)

    @cached_property
    def cells(self) -> Tensor:
        """[B', blocks, keys] of the cells of all levels."""
        shown = torch.cat([self._cell_bias(level) for level in range(len(self.counts.cells))], 1)
        return self._hide(self.plan.far_of_block, shown)

    @cached_property
    def both(self) -> Tensor:
        """Tokens, then cells."""
        return torch.cat([self.tokens, self.cells], 2)

    def level(self, level: int) -> Tensor:
        """[B', groups, keys] of the cells of ``level`` (0-based)."""
        return self._hide(self.plan.far[level], self._cell_bias(level))


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _all_visible(plan: Plan, levels: int, dtype: torch.dtype, count_bias: bool) -> _Visible:
    return _Visible(plan, None, levels, dtype, count_bias)


class _Call:
    """The tensors of a call in block order, its pyramid and its biases: what forward and backward have in common."""

    def __init__(self, kernels: Kernels, s: Settings, tensors: Tensors) -> None:
        _, key, value, _, cu_seqlens, level_bias, seed, weights = tensors
        lengths, key_mask = packing(cu_seqlens, tensors.key_mask, key.shape[2])
        self.kernels, self.s = kernels, s
        self.batch, self.key_heads = key.shape[:2]
        self.dtype = compute_dtype(key.dtype)
        self.plan = make_plan(s.grid, lengths, s.block, s.rank, s.levels, s.causal, s.sinks, key.device)
        self.layout = self.plan.layout
        self.levels = self.layout.levels if s.far else 0
        self.key_mask = key_mask
        traced = type(self.plan.filled) is not Tensor
        if key_mask is None and cu_seqlens is None and not traced:  # packings seldom come twice
            self.visible = _all_visible(self.plan, self.levels, self.dtype, s.count_bias)
        else:
            self.visible = _Visible(self.plan, key_mask, self.levels, self.dtype, s.count_bias)
        self.valid, self.in_cells, self.counts = self.visible.valid, self.visible.in_cells, self.visible.counts
        self.key, self.value = self.blocks(key, keys=True), self.blocks(value, keys=True)
        self.summary = unpack(s.kind, weights)
        if s.far:
            check_levels(self.summary, level_bias, self.layout, key)
        self.cell_keys, self.cell_values = self._clean(self.key), self._clean(self.value)
        self.cells = kernels.up(
            self.summary, self.cell_keys, self.cell_values, self.in_cells, self.counts, self.layout, self.levels
        )
        self.level_bias = None if level_bias is None else level_bias.to(self.dtype)
        self.dropout = None if seed is None else Dropout(s.dropout, int(seed.item()))

    @property
    def pyramid(self) -> Summaries:
        """The cells level by level, [B, Hkv, groups, P, D] each."""
        return split(self.cells, self.layout, self.levels, self.key_heads)

    def _clean(self, x: Tensor) -> Tensor:
        """Without sinks, which are no part of any cell."""
        sink = self.plan.is_sink
        return x if sink is None else x.masked_fill(sink[:, None], 0.0)

    def blocks(self, x: Tensor, keys: bool = False) -> Tensor:
        """[B, H, N, D] -> [B, H, slots, D]; what may not be read is 0, so that nothing hidden, a NaN say, leaks."""
        x = self.plan.to_blocks(x)
        if keys and self.key_mask is not None:
            x = x.masked_fill(~self.valid[:, None, :, None], 0.0)
        return x.contiguous()

    # Lists of keys.

    def _rows(self, x: Tensor, width: int) -> Tensor:
        """[B, Hkv, rows.., D] as the rows of a store."""
        return x.reshape(self.batch * self.key_heads, -1, width, x.shape[-1]).contiguous()

    def token_stores(self) -> list[Store]:
        """Near field and sinks."""
        plan, size = self.plan, self.layout.block_tokens
        stores = [Store(self._rows(self.key, size), self._rows(self.value, size), plan.near.rows)]
        if plan.sinks is not None:
            stores.append(Store(self._rows(self.key, 1), self._rows(self.value, 1), plan.sinks.rows))
        return stores

    def _head_bias(self, level_of_key: list[int | None], heads: int) -> Tensor | None:
        """[Hkv, r, K] the level bias of every key; None stands for a token."""
        if self.level_bias is None:
            return None
        rows = self.level_bias[: max(1, self.levels)]
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        index = [padded.shape[0] - 1 if level is None else level for level in level_of_key]
        return padded[index].T.reshape(self.key_heads, heads // self.key_heads, -1).contiguous()

    def lists(self, heads: int) -> tuple[Lists, list[int | None]]:
        """One list for the tokens of every leaf block, and the level of each key."""
        stores = self.token_stores() if self.s.near else []
        level_of_key: list[int | None] = [None] * sum(s.width for s in stores)
        row_bias = self.plan.row_bias if self.s.near else None
        key_bias = self.visible.tokens if self.s.near else None
        if self.levels and self.plan.far_of_block.rows.shape[1]:
            stores.append(Store(*self.cells, self.plan.far_of_block.rows))
            key_bias = self.visible.both if self.s.near else self.visible.cells
            level_of_key += [level for level in self.plan.level_of_place for _ in range(self.layout.cells_per_group)]
        row_class = self.plan.row_class if row_bias is not None else ()
        return Lists(tuple(stores), key_bias, self._head_bias(level_of_key, heads), row_bias, row_class), level_of_key

    def level_dropout(self, level: int) -> Dropout | None:
        """Dropout of the weights on ``level`` (0-based), for pooled queries."""
        return None if self.dropout is None else Dropout(self.dropout.rate, self.dropout.seed + level + 1)

    def level_lists(self, level: int, heads: int) -> Lists:
        """The list of every group of ``level`` (0-based) over the cells of its own level, for pooled queries."""
        p, made = self.layout.cells_per_group, self.pyramid
        store = Store(self._rows(made.keys[level], p), self._rows(made.values[level], p), self.plan.far[level].rows)
        return Lists((store,), self.visible.level(level), self._head_bias([level] * store.width, heads))

    def units(self, query: Tensor, width: int) -> Tensor:
        """[B, Hq, rows.., D] -> [B * Hkv, r, U, M, D] for :func:`attend`."""
        repeat = query.shape[1] // self.key_heads
        return query.reshape(self.batch * self.key_heads, repeat, -1, width, query.shape[-1])

    def query_layout(self) -> Geometry:
        """The same groups, cut into cells of queries."""
        assert self.s.query_rank is not None
        return replace(self.layout, rank=self.s.query_rank)


def forward(s: Settings, tensors: Tensors, kernels: Kernels = KERNELS) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, N, D] in the dtype of the query and lse [B, Hq, N] in the precision of the arithmetic."""
    query = tensors.query
    if query.shape[0] == 0:
        return query.new_zeros(query.shape), query.new_zeros(query.shape[:-1], dtype=compute_dtype(query.dtype))
    call = _Call(kernels, s, tensors)
    out, lse = _forward(call, call.blocks(query))
    return call.plan.to_tokens(out), call.plan.to_tokens(lse)


def _forward(call: _Call, query: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`forward` in block order."""
    s, shape = call.s, query.shape
    rows = call.units(query, call.layout.block_tokens)
    if s.query_rank is None:
        lists, _ = call.lists(shape[1])
        if not lists.stores:
            return torch.zeros_like(query), query.new_full(shape[:-1], -torch.inf, dtype=call.dtype)
        out, lse = call.kernels.attend(rows, lists, batch=call.batch, scale=s.scale, dropout=call.dropout)
        return out.view(shape), lse.view(shape[:-1])
    out = torch.zeros_like(query, dtype=call.dtype)
    lse = query.new_full(shape[:-1], -torch.inf, dtype=call.dtype)
    if s.near:
        lists = Lists(tuple(call.token_stores()), call.visible.tokens)
        out, lse = call.kernels.attend(rows, lists, batch=call.batch, scale=s.scale, dropout=call.dropout)
        out, lse = out.view(shape).to(call.dtype), lse.view(shape[:-1])
    for level, (pooled, cell) in enumerate(_pooled_queries(call, query)):
        part, part_lse = _attend_level(call, level, pooled)
        out, lse = _merge(out, lse, part.index_select(2, cell), part_lse.index_select(2, cell))
    return out.to(query.dtype), lse


def _pooled_queries(call: _Call, query: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per level the query cells [B, Hq, groups * Pq, D], group by group, and the cell of each slot [slots]."""
    layout = call.query_layout()
    counts = pyramid.count(call.valid, layout, call.levels)
    query = query.masked_fill(~call.valid[:, None, :, None], 0.0)
    cells = pyramid.means(query, layout, counts, call.levels)
    return [
        (pyramid.to_groups(x, layout, level).flatten(2, 3), _cell_of_slot(layout, level, query.device))
        for level, x in enumerate(cells, start=1)
    ]


def _cell_of_slot(layout: Geometry, level: int, device: torch.device) -> Tensor:
    """[slots] index of the cell of ``level`` that holds each slot, counted group by group."""
    split = [n for pair in zip(layout.group_counts(level), layout.rank, strict=True) for n in pair]
    index = torch.arange(layout.group_total(level) * layout.cells_per_group, device=device)
    cells = pyramid.to_cells(index.view(1, 1, layout.group_total(level), -1, 1), layout, level)[0, 0, ..., 0]
    assert list(cells.shape) == [a * b for a, b in zip(split[::2], split[1::2], strict=True)]
    for axis, side in enumerate(layout.cell_side(level)):
        cells = cells.repeat_interleave(side, axis)
    leaf = [(c, m) for c, m in zip(layout.group_counts(1), layout.block, strict=True)]
    cells = cells[tuple(slice(0, c * m) for c, m in leaf)]
    for axis, (c, m) in enumerate(leaf):
        cells = cells.unflatten(2 * axis, (c, m))
    order = [*range(0, 2 * len(leaf), 2), *range(1, 2 * len(leaf), 2)]
    return cells.permute(order).reshape(-1)


def _attend_level(call: _Call, level: int, pooled: Tensor) -> tuple[Tensor, Tensor]:
    per_group = pooled.shape[2] // call.layout.group_total(level + 1)
    lists = call.level_lists(level, pooled.shape[1])
    if not lists.width:
        return torch.zeros_like(pooled), pooled.new_full(pooled.shape[:-1], -torch.inf, dtype=call.dtype)
    rows, dropout = call.units(pooled, per_group), call.level_dropout(level)
    out, lse = call.kernels.attend(rows, lists, batch=call.batch, scale=call.s.scale, dropout=dropout)
    return out.view(pooled.shape), lse.view(pooled.shape[:-1])


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two disjoint parts of one softmax."""
    joint = torch.logaddexp(lse, other_lse)
    safe = joint.masked_fill(joint == -torch.inf, 0.0)
    return out * (lse - safe).exp()[..., None] + other * (other_lse - safe).exp()[..., None], joint


def backward(s: Settings, tensors: Tensors, result: Result, kernels: Kernels = KERNELS) -> list[Tensor]:
    """Gradients of query, key, value, level_bias (empty where there is none) and of each weight, in this order."""
    query, key, value, _, _, level_bias, _, weights = tensors
    grad_out, grad_lse, out, lse = result
    if query.shape[0] == 0:
        bias = query.new_zeros(0) if level_bias is None else torch.zeros_like(level_bias)
        return [*(torch.zeros_like(x) for x in (query, key, value)), bias, *(torch.zeros_like(w) for w in weights)]
    call = _Call(kernels, s, tensors)
    lse = call.blocks(lse[..., None])[..., 0]
    hidden = lse == -torch.inf
    delta = kernels.delta(grad_out, out, grad_lse.to(call.dtype))
    delta = call.blocks(delta[..., None])[..., 0].masked_fill(hidden, 0.0)
    grads = _Totals(call, level_bias)
    grad_query = _backward(call, grads, call.blocks(grad_out), delta, call.blocks(query), lse)
    grad_weights = grads.finish()
    return [
        call.plan.to_tokens(grad_query).to(query.dtype),
        call.plan.to_tokens(grads.key).to(key.dtype),
        call.plan.to_tokens(grads.value).to(value.dtype),
        query.new_empty(0) if level_bias is None or grads.bias is None else grads.bias.to(level_bias.dtype),
        *(g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)),
    ]


class _Totals:
    """Gradients with respect to tokens, cells and biases, collected from the calls of :func:`attend_backward`."""

    def __init__(self, call: _Call, level_bias: Tensor | None) -> None:
        self.call = call
        self.key = torch.zeros((), dtype=call.dtype)
        self.value = self.key
        self.cells: list[list[Tensor]] = [[], []]
        self.bias = None if level_bias is None else torch.zeros_like(level_bias, dtype=call.dtype)

    def tokens(self, grads: Gradients) -> None:
        """Of the tokens, which the first store holds."""
        shape = self.call.key.shape
        key, value = grads.keys[0], grads.values[0]
        assert key is not None and value is not None
        self.key, self.value = key.view(shape), value.view(shape)

    def add_cells(self, grads: Gradients) -> None:
        """Of cells, in the order of :attr:`_Call.cells`: all at once, or level by level."""
        for side, grad in zip(self.cells, (grads.keys[-1], grads.values[-1]), strict=True):
            assert grad is not None
            side.append(grad)

    def unread(self, level: int) -> None:
        """Of ``level`` (0-based), where nothing reads it."""
        made = self.call.pyramid
        for side, like in zip(self.cells, (made.keys, made.values), strict=True):
            side.append(torch.zeros_like(like[level], memory_format=torch.contiguous_format).flatten(0, 1))

    def head_bias(self, grad: Tensor | None, level_of_key: list[int | None]) -> None:
        """Of the level bias, from the sums of the score gradients by head and key."""
        if grad is None or self.bias is None:
            return
        flat = grad.flatten(0, 1)
        for level in range(self.call.levels):
            columns = [i for i, of in enumerate(level_of_key) if of == level]
            if columns:
                self.bias[level] += flat[:, columns].sum(1)

    def finish(self) -> list[Tensor]:
        """Sends the gradients of the cells down to the tokens; returns those of the weights."""
        call = self.call
        if self.key.dim() == 0:
            self.key = torch.zeros_like(call.key, dtype=call.dtype)
            self.value = torch.zeros_like(call.value, dtype=call.dtype)
        gradients = [
            torch.zeros_like(like, dtype=call.dtype) if not have else have[0] if len(have) == 1 else torch.cat(have, 1)
            for have, like in zip(self.cells, call.cells, strict=True)
        ]
        sink = call.plan.is_sink
        key, value = self.key, self.value
        if sink is not None:
            key, value = torch.zeros_like(key), torch.zeros_like(value)
        weights = call.kernels.down(
            call.summary, call.cell_keys, call.cell_values, call.in_cells, call.counts, call.layout, call.cells,
            tuple(gradients), key, value,
        )  # fmt: skip
        if sink is not None:
            self.key.add_(key.masked_fill_(sink[:, None], 0.0))
            self.value.add_(value.masked_fill_(sink[:, None], 0.0))
        if call.key_mask is not None:
            hidden = ~call.valid[:, None, :, None]
            self.key.masked_fill_(hidden, 0.0)
            self.value.masked_fill_(hidden, 0.0)
        return weights


def _attend_backward(
    call: _Call,
    lists: Lists,
    grad_out: Tensor,
    delta: Tensor,
    query: Tensor,
    lse: Tensor,
    *,
    width: int,
    dropout: Dropout | None,
    shared: tuple[int, ...] | None = None,
) -> Gradients:
    """:func:`attend_backward` of queries [B, Hq, rows, D] (``delta``, ``lse`` [B, Hq, rows]), ``width`` to a unit."""
    delta_units, lse_units = (call.units(x[..., None], width)[..., 0] for x in (delta, lse))
    return call.kernels.attend_backward(
        call.units(grad_out, width),
        delta_units,
        call.units(query, width),
        lse_units,
        lists,
        batch=call.batch,
        scale=call.s.scale,
        dropout=dropout,
        shared=shared,
    )


def _backward(call: _Call, totals: _Totals, grad_out: Tensor, delta: Tensor, query: Tensor, lse: Tensor) -> Tensor:
    """Gradient of the query in block order; the others go to ``totals``."""
    s, size = call.s, call.layout.block_tokens
    if s.query_rank is not None:
        return _backward_pooled(call, totals, grad_out, delta, query, lse)
    lists, level_of_key = call.lists(query.shape[1])
    if not lists.stores:
        return torch.zeros_like(query)
    tokens = (2 if call.plan.sinks is not None else 1) if s.near else 0
    owner = (0, *(i if i >= tokens else 0 for i in range(1, len(lists.stores))))
    grads = _attend_backward(call, lists, grad_out, delta, query, lse, width=size, dropout=call.dropout, shared=owner)
    if s.near:
        totals.tokens(grads)
    if len(lists.stores) > tokens:
        totals.add_cells(grads)
    totals.head_bias(grads.head_bias, level_of_key)
    return grads.query.view(query.shape)


def _backward_pooled(
    call: _Call, totals: _Totals, grad_out: Tensor, delta: Tensor, query: Tensor, lse: Tensor
) -> Tensor:
    """:func:`_backward` where query cells share the far field."""
    grad_query = torch.zeros_like(query, dtype=call.dtype)
    if call.s.near:
        stores = call.token_stores()
        lists, owner, size = Lists(tuple(stores), call.visible.tokens), (0,) * len(stores), call.layout.block_tokens
        grads = _attend_backward(
            call, lists, grad_out, delta, query, lse, width=size, dropout=call.dropout, shared=owner
        )
        totals.tokens(grads)
        grad_query += grads.query.view(query.shape)
    grad_cells = []
    for level, (pooled, cell) in enumerate(_pooled_queries(call, query)):
        part_lse = _attend_level(call, level, pooled)[1]
        per_group = pooled.shape[2] // call.layout.group_total(level + 1)
        lists = call.level_lists(level, pooled.shape[1])
        if not lists.width:
            grad_cells.append(torch.zeros_like(pooled, dtype=call.dtype))
            totals.unread(level)
            continue
        # A cell's weights, taken with its own lse, are shared by its tokens up to a factor
        # exp(lse of the cell - lse of the token) <= 1.
        share = (part_lse.index_select(2, cell) - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
        seen = grad_out.to(call.dtype) * share[..., None]
        grad_pooled = pooled.new_zeros(pooled.shape, dtype=call.dtype).index_add_(2, cell, seen)
        delta_pooled = pooled.new_zeros(pooled.shape[:-1], dtype=call.dtype).index_add_(2, cell, delta * share)
        dropout = call.level_dropout(level)
        grads = _attend_backward(
            call, lists, grad_pooled, delta_pooled, pooled, part_lse, width=per_group, dropout=dropout
        )
        grad_cells.append(grads.query.reshape(pooled.shape))
        totals.add_cells(grads)
        totals.head_bias(grads.head_bias, [level] * lists.width)
    if grad_cells:
        layout = call.query_layout()
        counts = pyramid.count(call.valid, layout, call.levels)
        into = torch.zeros_like(grad_query)
        cells = [
            pyramid.to_cells(g.unflatten(2, (layout.group_total(level), -1)).to(call.dtype), layout, level)
            for level, g in enumerate(grad_cells, start=1)
        ]
        pyramid.means_down(cells, layout, counts, into)
        grad_query += into.masked_fill_(~call.valid[:, None, :, None], 0.0)
    return grad_query
