"""Softmax attention of tiles of queries over gathered lists of key tiles: the arithmetic under every operator here.

A *unit* is a tile of M queries that read the same list of keys. Keys lie in *stores* of equal rows (a row is a leaf
block, the cells of a group, a single token ...), and an integer table names the rows that each unit reads. The units
are worked through in chunks whose buffers stay in cache, so memory beyond the inputs and outputs does not grow with
the length; one softmax runs over the whole list of a unit. No autograd in here: :func:`attend` and
:func:`attend_backward` are a pair for custom operators.

Arithmetic is float64 for float64 inputs and float32 for everything else. Inside, exponentials are powers of two,
which cost half as much on CPU, and every large buffer is allocated once per call, since the page faults of fresh ones
cost as much as the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farfield.ops.memory import empty, zeros

LOG2E = math.log2(math.e)
CHUNK_SCORES = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Scores held at once, per device type; measured: more leave the caches of a CPU, fewer starve the matrix product."""


@dataclass(frozen=True)
class Store:
    """Keys that units can read, and which unit reads which.

    Attributes:
        keys, values: [G, R, w, D] contiguous, G = batch * key heads, R rows of w keys.
        table: [U, S] or [G, U, S] int64, rows that each unit reads, in order. An unused place holds any valid row
            and -inf in the bias.
    """

    keys: Tensor
    values: Tensor
    table: Tensor

    @property
    def width(self) -> int:
        """Keys that the store contributes to the list of a unit."""
        return self.table.shape[-1] * self.keys.shape[2]

    def index(self, g: slice, u: slice) -> Tensor:
        """Rows of the chunk as an index into the store flattened over G and R."""
        first = torch.arange(g.start, g.stop, device=self.table.device) * self.keys.shape[1]
        table = self.table[u] if self.table.dim() == 2 else self.table[g, u]
        return (table + first[:, None, None]).reshape(-1)


@dataclass(frozen=True)
class Lists:
    """What every unit reads and how its scores are biased; K is the sum of the stores' widths, in order.

    Attributes:
        stores: the stores, whose keys stand side by side in the list of a unit.
        key_bias: [G' , U, K] added to the scores of all queries of a unit, G' = 1, batch or G; -inf hides a key.
            None: nothing hidden.
        head_bias: [Hkv, r, K] added to the scores of a query head (r query heads share a key head). None: none.
        row_bias: [C, M, K'] added to the first K' keys, by class of unit; -inf hides. None: none.
        row_class: the class of each unit, on the host.
    """

    stores: tuple[Store, ...]
    key_bias: Tensor | None = None
    head_bias: Tensor | None = None
    row_bias: Tensor | None = None
    row_class: tuple[int, ...] = field(default=())

    @property
    def width(self) -> int:
        """K, keys in the list of a unit."""
        return sum(store.width for store in self.stores)


@dataclass(frozen=True)
class Dropout:
    """Dropout of normalised weights: ``rate`` in [0, 1); ``seed`` lets the backward pass draw the same."""

    rate: float
    seed: int

    def mask(self, like: Tensor, chunk: int) -> Tensor:
        """What the weights of the ``chunk``-th chunk are multiplied by: 0 or 1 / (1 - rate), shaped like ``like``."""
        generator = torch.Generator(like.device).manual_seed((self.seed + 0x9E3779B97F4A7C15 * (chunk + 1)) % (1 << 63))
        keep = 1.0 - self.rate
        return torch.empty_like(like).bernoulli_(keep, generator=generator).div_(keep)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the arithmetic for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(groups: int, units: int, unit_scores: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cuts the (group, unit) plane into rectangles of about CHUNK_SCORES scores."""
    fit = max(1, CHUNK_SCORES.get(device.type, CHUNK_SCORES["cuda"]) // max(1, unit_scores))
    step_g, step_u = (max(1, fit // units), units) if fit >= units else (1, -(-units // -(-units // fit)))
    for g in range(0, groups, step_g):
        for u in range(0, units, step_u):
            yield slice(g, min(g + step_g, groups)), slice(u, min(u + step_u, units))


class _Workspace:
    """Buffers that the chunks of one call share, by name; a chunk takes a view of the size it needs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)


class _Chunk:
    """One rectangle of units: its queries, gathered keys and biased scores (in base 2)."""

    def __init__(
        self, space: _Workspace, query: Tensor, lists: Lists, batch: int, g: slice, u: slice, scale: float
    ) -> None:
        self.space, self.lists, self.g, self.u = space, lists, g, u
        groups, repeat, _, rows, width = query.shape
        self.groups, self.heads, self.repeat, self.rows = groups, groups // batch, repeat, rows
        self.dtype = compute_dtype(query.dtype)
        self.count = (g.stop - g.start) * (u.stop - u.start)
        self.query = self.take("query", repeat * rows, width)
        torch.mul(self.rows_of(query), scale * LOG2E, out=self.query)
        self.index = [store.index(g, u) for store in lists.stores]
        self.keys = self._gather("keys", [store.keys for store in lists.stores])
        self.values = self._gather("values", [store.values for store in lists.stores])

    def take(self, name: str, *shape: int) -> Tensor:
        """A buffer [units, *shape] in the precision of the arithmetic."""
        return self.space.take(name, self.dtype, self.count, *shape)

    def rows_of(self, x: Tensor) -> Tensor:
        """[G, r, U, M, D] cut to the chunk: a matrix of r * M rows per unit, in the precision of the arithmetic."""
        part = x[self.g, :, self.u].transpose(1, 2)
        return part.reshape(self.count, self.repeat * self.rows, x.shape[-1]).to(self.dtype)

    def put(self, target: Tensor, part: Tensor) -> None:
        """Writes what :meth:`rows_of` reads."""
        view = target[self.g, :, self.u]
        shape = (view.shape[0], view.shape[2], self.repeat, self.rows, target.shape[-1])
        view.copy_(part.view(shape).transpose(1, 2))

    def _gather(self, name: str, stores: list[Tensor]) -> Tensor:
        """[units, K, D] the listed rows of all stores side by side."""
        list_ = self.take(name, self.lists.width, stores[0].shape[3])
        start = 0
        for store, tensor, index in zip(self.lists.stores, stores, self.index, strict=True):
            row = tensor.shape[2] * tensor.shape[3]
            # The buffer's name carries the dtype: a pyramid may be more precise than the tokens.
            rows = self.space.take(f"rows of {tensor.dtype}", tensor.dtype, len(index), row)
            torch.index_select(tensor.view(-1, row), 0, index, out=rows)
            list_[:, start : start + store.width].copy_(rows.view(self.count, store.width, -1))
            start += store.width
        return list_

    def scores(self) -> Tensor:
        """[units, r * M, K] biased scores times log2(e)."""
        scores = self.take("scores", self.repeat * self.rows, self.lists.width)
        torch.bmm(self.query, self.keys.mT, out=scores)
        g, u, lists = self.g, self.u, self.lists
        split = scores.view(g.stop - g.start, u.stop - u.start, self.repeat, self.rows, -1)
        bias: Tensor | None = None
        if lists.key_bias is not None:
            if lists.key_bias.shape[0] == 1:
                bias = lists.key_bias[:, u, None]
            elif lists.key_bias.shape[0] == self.groups:
                bias = lists.key_bias[g, u, None]
            else:
                bias = lists.key_bias[[i // self.heads for i in range(g.start, g.stop)], u, None]
        if lists.head_bias is not None:
            head = lists.head_bias[[i % self.heads for i in range(g.start, g.stop)]][:, None]
            bias = head if bias is None else bias + head
        if bias is not None:
            split.add_(bias[:, :, :, None], alpha=LOG2E)
        if lists.row_bias is not None:
            classes = lists.row_class[u] if lists.row_class else (0,)
            if len(set(classes)) == 1:
                row_bias = lists.row_bias[classes[0]]
            else:
                row_bias = lists.row_bias[list(classes)][:, None]
            split[..., : row_bias.shape[-1]].add_(row_bias, alpha=LOG2E)
        return scores


def attend(
    query: Tensor, lists: Lists, *, batch: int, scale: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every unit over its list.

    Args:
        query: [G, r, U, M, D], G = batch * key heads, r query heads to a key head, U units of M queries.
        lists: what the units read.
        batch: B, to find the batch entry of a group.
        scale: factor of the scores.
        dropout: of the normalised weights, or None.

    Returns:
        Output [G, r, U, M, Dv] in the dtype of the query and lse [G, r, U, M] in the precision of the arithmetic
        (natural log); a query that reads nothing gets 0 and -inf.

    Time O(G r U M K D), extra memory O(chunk).
    """
    groups, repeat, units, rows, _ = query.shape
    width = lists.stores[0].values.shape[-1]
    out = empty((groups, repeat, units, rows, width), query.dtype, query.device)
    lse = empty((groups, repeat, units, rows, 1), compute_dtype(query.dtype), query.device)
    space = _Workspace(query.device)
    for n, (g, u) in enumerate(_chunks(groups, units, repeat * rows * lists.width, query.device)):
        chunk = _Chunk(space, query, lists, batch, g, u, scale)
        weights = chunk.scores()
        top = weights.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        weights.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        chunk.put(lse, total.log2().add_(top).div_(LOG2E))
        if dropout is not None:
            weights.mul_(dropout.mask(weights, n))
        part = chunk.take("out", repeat * rows, width)
        torch.bmm(weights, chunk.values, out=part)
        chunk.put(out, part.div_(total.masked_fill_(total == 0, 1.0)))
    return out, lse.squeeze(-1)


@dataclass(frozen=True)
class Gradients:
    """Gradients of :func:`attend`.

    Attributes:
        query: [G, r, U, M, D] in the dtype of the query.
        keys, values: per store [G, R, w, D] in the precision of the arithmetic; None for a store that shares
            another's buffers.
        head_bias: [Hkv, r, K], or None where there is none.
    """

    query: Tensor
    keys: list[Tensor | None]
    values: list[Tensor | None]
    head_bias: Tensor | None


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
    """Gradients of :func:`attend`, or of this list's part of a larger joint softmax.

    Args:
        grad_out: [G, r, U, M, Dv] gradient of the (joint) output.
        delta: [G, r, U, M] rowsum(grad_out * out) - grad_lse of the joint softmax, 0 where a query reads nothing.
        query, lists, batch, scale, dropout: as in :func:`attend`.
        lse: [G, r, U, M] of the joint softmax; weights are exp(score - lse).
        shared: for each store, the index of the store whose gradient buffers it adds to (two stores that view the
            same memory). None: each its own.

    Time and memory as :func:`attend`, plus buffers of the size of the stores.
    """
    groups, repeat, units, rows, width = query.shape
    owner = shared or tuple(range(len(lists.stores)))
    dtype = compute_dtype(query.dtype)
    grad_query = empty(query.shape, query.dtype, query.device)

    def buffers(tensors: list[Tensor]) -> list[Tensor | None]:
        return [zeros(t.shape, dtype, t.device) if owner[i] == i else None for i, t in enumerate(tensors)]

    grad_keys = buffers([store.keys for store in lists.stores])
    grad_values = buffers([store.values for store in lists.stores])
    grad_head = torch.zeros_like(lists.head_bias, dtype=dtype) if lists.head_bias is not None else None
    lse = lse.masked_fill(lse == -torch.inf, 0.0)[..., None] * LOG2E
    delta = delta[..., None]
    space = _Workspace(query.device)
    for n, (g, u) in enumerate(_chunks(groups, units, repeat * rows * lists.width, query.device)):
        chunk = _Chunk(space, query, lists, batch, g, u, scale)
        weights = chunk.scores().sub_(chunk.rows_of(lse)).exp2_()
        grad = chunk.rows_of(grad_out)
        grad_scores = chunk.take("grad scores", repeat * rows, lists.width)
        torch.bmm(grad, chunk.values.mT, out=grad_scores)
        kept = weights
        if dropout is not None:
            mask = dropout.mask(weights, n)
            grad_scores.mul_(mask)
            kept = mask.mul_(weights)
        grad_value = chunk.take("grad values", lists.width, grad.shape[-1])
        torch.bmm(kept.mT, grad, out=grad_value)
        grad_scores.sub_(chunk.rows_of(delta)).mul_(weights)
        part = chunk.take("grad query", repeat * rows, width)
        chunk.put(grad_query, torch.bmm(grad_scores, chunk.keys, out=part).mul_(scale))
        grad_key = chunk.take("grad keys", lists.width, width)
        torch.bmm(grad_scores.mT, chunk.query, out=grad_key)
        if grad_head is not None:
            by_unit = grad_scores.view(g.stop - g.start, u.stop - u.start, repeat, rows, -1).sum((1, 3))
            of_head = torch.arange(g.start, g.stop, device=query.device) % chunk.heads
            grad_head.index_add_(0, of_head, by_unit)
        for totals, grads in ((grad_keys, grad_key), (grad_values, grad_value)):
            start = 0
            for i, (store, index) in enumerate(zip(lists.stores, chunk.index, strict=True)):
                total = totals[owner[i]]
                assert total is not None
                piece = space.take("grad rows", dtype, len(index), store.keys.shape[2] * grads.shape[2])
                piece.view(chunk.count, store.width, -1).copy_(grads[:, start : start + store.width])
                total.view(-1, piece.shape[1]).index_add_(0, index, piece)
                start += store.width
    for grads_of_keys in grad_keys:
        if grads_of_keys is not None:
            grads_of_keys.div_(LOG2E)  # the chunk's queries carry log2(e)
    return Gradients(grad_query, grad_keys, grad_values, grad_head)
