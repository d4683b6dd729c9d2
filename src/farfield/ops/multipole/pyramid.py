"""Pyramids of summaries over tokens in block order: up, from tokens to summaries of every level; down, gradients.

Tokens come as [B, H, slots, D] in the block order of :meth:`Geometry.token_of_slot`, zero where invalid. Cells are
kept as a grid [B, H, C_1, .., C_d, D] while levels are built, and handed out group by group, [B, H, groups, P, D].
Everything is plain torch, so that :func:`up` is differentiable; :func:`down` is its gradient written out, for use
inside a custom operator. Linear time and memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from farfield.geometry import Geometry
from farfield.ops.multipole.summary import LearnedSummary, PooledSummary, SharedSummary, Summaries, Summary, pack
from farfield.ops.tiles import compute_dtype


@dataclass(frozen=True, eq=False)
class Counts:
    """Valid tokens per cell of every level, and the share of each child in its cell.

    ``cells[l - 1]`` holds the counts of level l, [B', 1, C_1, .., C_d, 1] with B' = 1 or B. ``coefficients[l - 1]``
    lists, per child of a level l cell, ``children * n_child / n_cell`` (0 in an empty cell), so that the children's
    plain mean weighted by it is the mean over valid tokens; None when every cell is full.
    """

    geometry: Geometry
    cells: tuple[Tensor, ...]
    coefficients: tuple[tuple[Tensor, ...] | None, ...]

    @cached_property
    def by_group(self) -> tuple[Tensor | None, ...]:
        """The coefficients as float32 [B', cells, children] per level, cells group by group."""
        out: list[Tensor | None] = []
        for level, parts in enumerate(self.coefficients, start=1):
            if parts is None:
                out.append(None)
            else:
                grouped = to_groups(torch.cat(parts, -1), self.geometry, level)
                out.append(grouped.flatten(2, 3)[:, 0].float().contiguous())
        return tuple(out)


def children(x: Tensor, geometry: Geometry, level: int) -> list[Tensor]:
    """Views of the children of every cell of ``level``.

    ``x`` holds tokens in block order for level 1, the padded cells below otherwise. Each view is [B, H, cells.., D],
    where for level 1 the cells' axes are split into (groups, rank) pairs.
    """
    d = geometry.dims
    if level > 1:
        cuts = itertools.product(range(2), repeat=d)
        return [x[(slice(None), slice(None), *(slice(c, None, 2) for c in cut))] for cut in cuts]
    sides = geometry.cell_side(1)
    split = [n for pair in zip(geometry.rank, sides, strict=True) for n in pair]
    x = x.unflatten(2, (*geometry.group_counts(1), *split))
    # axes: B, H, groups.., (rank, side).., D  ->  B, H, (group, rank).., side.., D
    order = [0, 1]
    for a in range(d):
        order += [2 + a, 2 + d + 2 * a]
    order += [2 + d + 2 * a + 1 for a in range(d)] + [2 + 3 * d]
    x = x.permute(order)
    views = []
    for places in itertools.product(*(range(s) for s in sides)):
        index: tuple[slice | int, ...] = (*(slice(None),) * (2 + 2 * d), *places)
        views.append(x[index])
    return views


def pad_cells(x: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Pads the cells of ``level`` with zeros so that they fill the groups of the level above."""
    pads = []
    for have, above, p in zip(x.shape[2:-1], geometry.group_counts(level + 1), geometry.rank, strict=True):
        pads.append(2 * above * p - have)
    if not any(pads):
        return x
    flat = [0, 0]
    for pad in reversed(pads):
        flat += [0, pad]
    return torch.nn.functional.pad(x, flat)


def cell_shape(geometry: Geometry, level: int) -> tuple[int, ...]:
    """C_1, .., C_d: cells of ``level`` per axis."""
    return tuple(c * p for c, p in zip(geometry.group_counts(level), geometry.rank, strict=True))


def _cut(x: Tensor, counts: tuple[int, ...], sides: tuple[int, ...]) -> Tensor:
    """[B, H, axes.., D] -> [B, H, tiles, places, D]: axes cut into ``counts`` tiles of ``sides`` places, row-major."""
    d = len(counts)
    split = [n for pair in zip(counts, sides, strict=True) for n in pair]
    order = [0, 1, *(2 + 2 * a for a in range(d)), *(3 + 2 * a for a in range(d)), 2 + 2 * d]
    tiles = x.reshape(*x.shape[:2], *split, x.shape[-1]).permute(order)
    return tiles.reshape(*x.shape[:2], prod(counts), prod(sides), x.shape[-1])


def _join(x: Tensor, counts: tuple[int, ...], sides: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`_cut`; tiles and their places may also lie on one axis."""
    d = len(counts)
    order = [0, 1, *(axis for a in range(d) for axis in (2 + a, 2 + d + a)), 2 + 2 * d]
    pairs = x.reshape(*x.shape[:2], *counts, *sides, x.shape[-1]).permute(order)
    return pairs.reshape(*x.shape[:2], *(c * s for c, s in zip(counts, sides, strict=True)), x.shape[-1])


def to_groups(cells: Tensor, geometry: Geometry, level: int) -> Tensor:
    """[B, H, C_1, .., C_d, D] -> [B, H, groups, P, D]."""
    return _cut(cells, geometry.group_counts(level), geometry.rank)


def to_cells(groups: Tensor, geometry: Geometry, level: int) -> Tensor:
    """The inverse of :func:`to_groups`."""
    return _join(groups, geometry.group_counts(level), geometry.rank)


def count(valid: Tensor, geometry: Geometry, levels: int, full: bool = False) -> Counts:
    """Counts from ``valid`` [B', slots], True where the token takes part.

    ``full`` promises that all are True and that the cells are whole.
    """
    below = valid[:, None, :, None].to(torch.float64 if valid.device.type == "cpu" else torch.float32)
    cells: list[Tensor] = []
    coefficients: list[tuple[Tensor, ...] | None] = []
    for level in range(1, levels + 1):
        parts = children(below if level == 1 else pad_cells(below, geometry, level - 1), geometry, level)
        total = torch.stack(parts).sum(0)
        shape = (valid.shape[0], 1, *cell_shape(geometry, level), 1)
        inverse = torch.where(total > 0, len(parts) / total.clamp(min=1.0), 0.0)
        if level > 1:
            full = full and all(2 * c == b for c, b in zip(shape[2:-1], below.shape[2:-1], strict=True))
        coefficients.append(None if full else tuple((p * inverse).reshape(shape) for p in parts))
        below = total.reshape(shape)
        cells.append(below)
    return Counts(geometry, tuple(cells), tuple(coefficients))


def _reduce(below: Tensor, geometry: Geometry, level: int, counts: Counts, weight: Tensor | None) -> Tensor:
    """Cells of ``level`` from their children: the sum of coefficient * weight * child.

    ``weight`` is [Hw, children, D], or None to average.
    """
    parts = children(below if level == 1 else pad_cells(below, geometry, level - 1), geometry, level)
    dtype = compute_dtype(below.dtype)
    factors = _factors(parts[0], geometry, level, counts, weight, len(parts), dtype)
    total: Tensor | None = None
    for part, factor in zip(parts, factors, strict=True):
        part = part.to(dtype)
        if total is None:
            total = part * factor
        else:
            total = torch.addcmul(total, part, factor) if torch.is_grad_enabled() else total.addcmul_(part, factor)
    assert total is not None
    return total.reshape(*below.shape[:2], *cell_shape(geometry, level), below.shape[-1])


def _factors(
    like: Tensor, geometry: Geometry, level: int, counts: Counts, weight: Tensor | None, number: int, dtype: torch.dtype
) -> list[Tensor]:
    """What each child is multiplied by, shaped like the children's views."""
    axes = like.dim() - 3
    out = []
    coefficients = counts.coefficients[level - 1]
    for i in range(number):
        if weight is None:
            factor = torch.full((), 1.0 / number, dtype=dtype, device=like.device)
        else:
            factor = weight[:, i].to(dtype).reshape(1, weight.shape[0], *(1,) * axes, weight.shape[-1])
        if coefficients is not None:
            coefficient = coefficients[i]
            factor = factor * coefficient.to(dtype).reshape(coefficient.shape[0], 1, *like.shape[2:-1], 1)
        out.append(factor)
    return out


def _reduce_down(
    grad: Tensor,
    below: Tensor,
    grad_below: Tensor,
    geometry: Geometry,
    level: int,
    counts: Counts,
    weight: Tensor | None,
) -> Tensor | None:
    """Adds the gradient of :func:`_reduce` to ``grad_below``, padded like its children; returns ``weight``'s."""
    parts = children(below if level == 1 else pad_cells(below, geometry, level - 1), geometry, level)
    into = children(grad_below, geometry, level)
    grad = grad.reshape(*grad.shape[:2], *parts[0].shape[2:-1], grad.shape[-1])
    factors = _factors(parts[0], geometry, level, counts, weight, len(parts), grad.dtype)
    grad_weight = []
    axes = tuple(range(2, parts[0].dim() - 1))
    coefficients = counts.coefficients[level - 1]
    for i, (part, target, factor) in enumerate(zip(parts, into, factors, strict=True)):
        target.addcmul_(grad, factor.expand_as(grad))
        if weight is not None:
            product = grad * part.to(grad.dtype)
            if coefficients is not None:
                product.mul_(coefficients[i].to(grad.dtype).reshape(-1, 1, *part.shape[2:-1], 1))
            summed = product.sum((0, *axes))
            grad_weight.append(summed.sum(0, keepdim=True) if weight.shape[0] == 1 else summed)
    return torch.stack(grad_weight, 1) if weight is not None else None


def means(x: Tensor, geometry: Geometry, counts: Counts, levels: int) -> list[Tensor]:
    """Means over the valid tokens of every cell, level by level, [B, H, C_1, .., C_d, D]."""
    cells = []
    for level in range(1, levels + 1):
        x = _reduce(x, geometry, level, counts, None)
        cells.append(x)
    return cells


def means_down(grads: Sequence[Tensor], geometry: Geometry, counts: Counts, into: Tensor) -> None:
    """Adds the gradient of :func:`means` to ``into`` [B, H, slots, D]."""
    carried: Tensor | None = None
    for level in range(len(grads), 0, -1):
        grad = grads[level - 1] if carried is None else grads[level - 1] + carried
        if level == 1:
            _reduce_down(grad, into, into, geometry, 1, counts, None)
        else:
            below = grads[level - 2]
            padded = torch.zeros_like(pad_cells(below, geometry, level - 1))
            _reduce_down(grad, below, padded, geometry, level, counts, None)
            carried = padded[tuple(slice(0, n) for n in below.shape)]


def _masses(query: Tensor, key: Tensor, valid: Tensor, geometry: Geometry, levels: int) -> list[tuple[Tensor, Tensor]]:
    """Per level of a :class:`PooledSummary`: shares [children, B, H, cells.., 1] and the cells' log mass."""
    dtype = compute_dtype(key.dtype)
    logits = torch.einsum("bhsd,hd->bhs", key.to(dtype), query.to(dtype).expand(key.shape[1], -1))[..., None]
    below = torch.where(valid[:, None, :, None], logits, -torch.inf)
    out = []
    for level in range(1, levels + 1):
        if level > 1:
            padded = pad_cells(torch.zeros_like(below), geometry, level - 1).shape
            if padded != below.shape:
                fill = below.new_full(padded, -torch.inf)
                fill[tuple(slice(0, n) for n in below.shape)] = below
                below = fill
        parts = torch.stack(children(below, geometry, level))
        top = parts.amax(0)
        top = torch.where(top == -torch.inf, 0.0, top)
        shares = (parts - top).exp()
        total = shares.sum(0)
        shares = shares / torch.where(total == 0, 1.0, total)
        below = (total.log() + top).reshape(*key.shape[:2], *cell_shape(geometry, level), 1)
        out.append((shares, below))
    return out


def _pool(below: Tensor, shares: Tensor, geometry: Geometry, level: int) -> Tensor:
    parts = children(below if level == 1 else pad_cells(below, geometry, level - 1), geometry, level)
    total = sum(part.to(shares.dtype) * share for part, share in zip(parts, shares, strict=True))
    assert isinstance(total, Tensor)
    return total.reshape(*below.shape[:2], *cell_shape(geometry, level), below.shape[-1])


def _group_tokens(x: Tensor, geometry: Geometry, level: int) -> Tensor:
    """[B, H, slots, D] in block order -> [B, H, groups of level, tokens of a group, D], zero outside."""
    x = _join(x, geometry.group_counts(1), geometry.block)
    counts, sides = geometry.group_counts(level), geometry.group_side(level)
    flat = [0, 0]
    for have, c, g in reversed(list(zip(x.shape[2:-1], counts, sides, strict=True))):
        flat += [0, c * g - have]
    return _cut(torch.nn.functional.pad(x, flat), counts, sides)


def _add_group_tokens(target: Tensor, grad: Tensor, geometry: Geometry, level: int) -> None:
    """Adds the gradient of :func:`_group_tokens` to ``target`` [B, H, slots, D]."""
    x = _join(grad, geometry.group_counts(level), geometry.group_side(level))
    leaf = geometry.group_counts(1)
    x = x[(slice(None), slice(None), *(slice(0, c * m) for c, m in zip(leaf, geometry.block, strict=True)))]
    target.add_(_cut(x, leaf, geometry.block).reshape(target.shape))


def _fullness(counts: Counts, geometry: Geometry, level: int, dtype: torch.dtype) -> Tensor:
    """[B', 1, groups, P, 1] cell size / valid tokens, 0 in empty cells."""
    n = to_groups(counts.cells[level - 1], geometry, level)
    return torch.where(n > 0, prod(geometry.cell_side(level)) / n.clamp(min=1.0), 0.0).to(dtype)


def up(
    summary: Summary, key: Tensor, value: Tensor, valid: Tensor, counts: Counts, geometry: Geometry, levels: int
) -> Summaries:
    """Summaries of all levels.

    Args:
        summary: kind and weights.
        key, value: [B, H, slots, D] in block order, zero where not valid.
        valid: [B', slots] bool, B' = 1 or B.
        counts: :func:`count` of ``valid``.
        geometry: the hierarchy; ``levels``: how many of them.

    Returns:
        Summaries in the precision of the arithmetic, each [B, H, groups, P, D].
    """
    if isinstance(summary, Summaries):
        return Summaries(summary.keys[:levels], summary.values[:levels])
    if isinstance(summary, LearnedSummary):
        out: list[list[Tensor]] = [[], []]
        for level, w in enumerate(summary.levels[:levels], start=1):
            scale = _fullness(counts, geometry, level, compute_dtype(key.dtype))
            for into, x, weight, bias in (
                (out[0], key, w.key_weight, w.key_bias),
                (out[1], value, w.value_weight, w.value_bias),
            ):
                tokens = _group_tokens(x, geometry, level).to(scale.dtype)
                into.append(
                    torch.einsum("bhgtc,rct->bhgrc", tokens, weight.to(scale.dtype)) * scale + bias.to(scale.dtype)
                )
        return Summaries(tuple(out[0]), tuple(out[1]))
    keys, values = _cells(summary, key, value, valid, counts, geometry, levels)
    return Summaries(
        tuple(to_groups(x, geometry, i) for i, x in enumerate(keys, start=1)),
        tuple(to_groups(x, geometry, i) for i, x in enumerate(values, start=1)),
    )


def _cells(
    summary: Summary, key: Tensor, value: Tensor, valid: Tensor, counts: Counts, geometry: Geometry, levels: int
) -> tuple[list[Tensor], list[Tensor]]:
    keys, values = [], []
    shares = _masses(summary.query, key, valid, geometry, levels) if isinstance(summary, PooledSummary) else []
    for level in range(1, levels + 1):
        if isinstance(summary, PooledSummary):
            key, value = (_pool(x, shares[level - 1][0], geometry, level) for x in (key, value))
        else:
            key, value = (
                _reduce(x, geometry, level, counts, w)
                for x, w in zip((key, value), _level_weights(summary, level), strict=True)
            )
        keys.append(key)
        values.append(value)
    return keys, values


def _level_weights(summary: Summary, level: int) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(summary, SharedSummary):
        return (summary.key_leaf, summary.value_leaf) if level == 1 else (summary.key_up, summary.value_up)
    return None, None


def down(
    summary: Summary,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    counts: Counts,
    geometry: Geometry,
    made: Summaries,
    grads: Summaries,
    grad_key: Tensor,
    grad_value: Tensor,
) -> list[Tensor]:
    """Adds the gradients of :func:`up` to those of keys and values and returns those of the summary's tensors.

    Args:
        summary, key, value, valid, counts, geometry: as in :func:`up`.
        made: what it returned.
        grads: gradients of that.
        grad_key, grad_value: [B, H, slots, D] in the precision of the arithmetic, added to in place.

    Returns:
        One gradient per tensor, in the order of :func:`farfield.ops.multipole.summary.pack`.
    """
    levels = len(grads.keys)
    if levels == 0:
        return [torch.zeros_like(t) for t in pack(summary)[1]]
    if isinstance(summary, Summaries):
        spare = [torch.zeros_like(t) for t in (*summary.keys[levels:], *summary.values[levels:])]
        half = len(summary.keys) - levels
        # Levels are views of one buffer, and results of a custom operator must not share memory.
        keys, values = ([g.clone(memory_format=torch.contiguous_format) for g in side] for side in grads)
        return [*keys, *spare[:half], *values, *spare[half:]]
    if isinstance(summary, LearnedSummary):
        return _learned_down(summary, key, value, counts, geometry, grads, grad_key, grad_value)
    keys, values = ([to_cells(x, geometry, i) for i, x in enumerate(side, start=1)] for side in made)
    sides = (_Side(key, keys, grads.keys, grad_key), _Side(value, values, grads.values, grad_value))
    if isinstance(summary, PooledSummary):
        return [_pooled_down(summary, sides, valid, geometry)]
    return _linear_down(summary, sides, counts, geometry)


class _Side(NamedTuple):
    """Keys or values on the way down: tokens, cells by level, gradients of the cells by group and of the tokens."""

    tokens: Tensor
    cells: list[Tensor]
    grads: tuple[Tensor, ...]
    grad_tokens: Tensor

    def step(self, geometry: Geometry, level: int, carried: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the cells of ``level``, what they were made of, and the (padded) gradient of that to add to."""
        grad = to_cells(self.grads[level - 1], geometry, level)
        if carried is not None:
            grad = grad + carried
        if level == 1:
            return grad, self.tokens, self.grad_tokens
        below = self.cells[level - 2]
        return grad, below, torch.zeros_like(pad_cells(below, geometry, level - 1))


def _unpad(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`pad_cells`."""
    return x[tuple(slice(0, n) for n in like.shape)]


def _linear_down(summary: Summary, sides: tuple[_Side, _Side], counts: Counts, geometry: Geometry) -> list[Tensor]:
    """:func:`down` for means and :class:`SharedSummary`."""
    found: list[Tensor | None] = []
    for i, side in enumerate(sides):
        carried: Tensor | None = None
        leaf: Tensor | None = None
        up: Tensor | None = None
        for level in range(len(side.grads), 0, -1):
            grad, below, into = side.step(geometry, level, carried)
            got = _reduce_down(grad, below, into, geometry, level, counts, _level_weights(summary, level)[i])
            if level == 1:
                leaf = got
            else:
                up = got if up is None or got is None else up + got
                carried = _unpad(into, below)
        found += [leaf, up]
    if isinstance(summary, SharedSummary):
        tensors = (summary.key_leaf, summary.key_up, summary.value_leaf, summary.value_up)
        return [torch.zeros_like(t) if w is None else w for t, w in zip(tensors, found, strict=True)]
    return []


def _pooled_down(summary: PooledSummary, sides: tuple[_Side, _Side], valid: Tensor, geometry: Geometry) -> Tensor:
    """:func:`down` for :class:`PooledSummary`; the gradient of its query."""
    key, grad_key, levels = sides[0].tokens, sides[0].grad_tokens, len(sides[0].grads)
    masses = _masses(summary.query, key, valid, geometry, levels)
    carried: list[Tensor | None] = [None, None]
    mass: Tensor | None = None
    for level in range(levels, 0, -1):
        share = masses[level - 1][0]
        grad_shares = torch.zeros_like(share)
        for i, side in enumerate(sides):
            grad, below, into = side.step(geometry, level, carried[i])
            parts = children(below if level == 1 else pad_cells(below, geometry, level - 1), geometry, level)
            grad = grad.reshape(*grad.shape[:2], *parts[0].shape[2:-1], grad.shape[-1])
            for target, factor in zip(children(into, geometry, level), share, strict=True):
                target.addcmul_(grad, factor.expand_as(grad))
            grad_shares = grad_shares + torch.stack([(grad * p.to(grad.dtype)).sum(-1, keepdim=True) for p in parts])
            if level > 1:
                carried[i] = _unpad(into, below)
        grad_logits = share * (grad_shares - (share * grad_shares).sum(0))
        if mass is not None:
            grad_logits = grad_logits + share * mass.reshape(share.shape[1:])
        if level == 1:
            mass = grad_logits.new_empty(*key.shape[:3], 1)
            into = mass
        else:
            below = masses[level - 2][1]
            into = grad_logits.new_empty(pad_cells(below, geometry, level - 1).shape)
            mass = _unpad(into, below)
        for target, part in zip(children(into, geometry, level), grad_logits, strict=True):
            target.copy_(part)
    assert mass is not None
    query = summary.query.to(grad_key.dtype).expand(key.shape[1], -1)
    grad_key.addcmul_(mass, query[None, :, None, :])
    grad_query = torch.einsum("bhs,bhsd->hd", mass[..., 0], key.to(grad_key.dtype))
    return grad_query.sum(0, keepdim=True) if summary.query.shape[0] == 1 else grad_query


def _learned_down(
    summary: LearnedSummary,
    key: Tensor,
    value: Tensor,
    counts: Counts,
    geometry: Geometry,
    grads: Summaries,
    grad_key: Tensor,
    grad_value: Tensor,
) -> list[Tensor]:
    out: list[Tensor] = []
    for level, w in enumerate(summary.levels, start=1):
        if level > len(grads.keys):
            out += [torch.zeros_like(t) for t in w]
            continue
        scale = _fullness(counts, geometry, level, grad_key.dtype)
        sides: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]] = (
            (key, grads.keys[level - 1], w.key_weight, grad_key),
            (value, grads.values[level - 1], w.value_weight, grad_value),
        )
        for x, grad, weight, into in sides:
            tokens = _group_tokens(x, geometry, level).to(grad.dtype)
            scaled = grad * scale
            _add_group_tokens(into, torch.einsum("bhgrc,rct->bhgtc", scaled, weight.to(grad.dtype)), geometry, level)
            out += [torch.einsum("bhgrc,bhgtc->rct", scaled, tokens), grad.sum((0, 1, 2))]
    return out
