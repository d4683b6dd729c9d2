"""The reference engine: multipole attention written out as dense matrices, straight from its definition.

Every query's weight on every token and every cell is a dense matrix, built from who-is-adjacent-to-whom; nothing is
gathered, cut into chunks or shared with the fast engine. Plain torch, any float dtype (float64 for the truth),
differentiable to any order, memory O(N * (N + cells)). For tests, pictures and error analysis.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from farfield.geometry import Geometry, geometry
from farfield.ops.multipole.summary import LearnedSummary, PooledSummary, SharedSummary, Summaries, Summary


@dataclass(frozen=True)
class Coordinates:
    """Where every token lies: [N, dims] positions and, per level, group and cell indices."""

    shape: Geometry
    position: Tensor

    @staticmethod
    def of(shape: Geometry, device: torch.device) -> Coordinates:
        """Those of all tokens of the grid of ``shape``, row-major."""
        axes = [torch.arange(n, device=device) for n in shape.grid]
        return Coordinates(shape, torch.stack([a.reshape(-1) for a in torch.meshgrid(*axes, indexing="ij")], -1))

    def group(self, level: int) -> Tensor:
        """[N, dims] index of the token's group in the grid of all groups of the level."""
        return self.position // self.position.new_tensor(self.shape.group_side(level))

    def cell(self, level: int) -> Tensor:
        """[N, dims] index of the token's cell in the grid of all cells of the level."""
        return self.position // self.position.new_tensor(self.shape.cell_side(level))

    def cells(self, level: int) -> Tensor:
        """[C, dims] every cell of the level: group by group row-major, cells of a group row-major."""
        p = self.shape.rank
        groups = Coordinates.of(Geometry(self.shape.group_counts(level), p, p, 0), self.position.device).position
        inner = Coordinates.of(Geometry(p, p, p, 0), self.position.device).position
        return (groups[:, None] * self.position.new_tensor(p) + inner[None]).reshape(-1, self.shape.dims)


def same_rows(a: Tensor, b: Tensor) -> Tensor:
    """[A, B] bool: rows of a and b equal on every axis."""
    return (a[:, None] == b[None]).all(-1)


def adjacent(a: Tensor, b: Tensor) -> Tensor:
    """[A, B] bool: group indices that differ by at most 1 on every axis."""
    return ((a[:, None] - b[None]).abs() <= 1).all(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums."""
    return torch.promote_types(dtype, torch.float32)


def _row_major(index: Tensor, sizes: tuple[int, ...]) -> Tensor:
    flat = torch.zeros_like(index[..., 0])
    for a, n in enumerate(sizes):
        flat = flat * n + index[..., a]
    return flat


def near_visible(where: Coordinates, causal: bool) -> Tensor:
    """[N, N] bool: tokens seen exactly because their leaf block is adjacent (and, if causal, not in the future)."""
    block = where.group(1)
    seen = adjacent(block, block)
    if causal:
        seen = seen & (where.position[:, None, 0] >= where.position[None, :, 0])
    return seen


def far_visible(where: Coordinates, level: int, levels: int, causal: bool) -> Tensor:
    """[N, C] bool: cells of ``level`` on the query's interaction list."""
    own = where.group(level)
    group = where.cells(level) // where.position.new_tensor(where.shape.rank)
    seen = ~adjacent(own, group)
    if level < levels:
        seen = seen & adjacent(own // 2, group // 2)
    if causal:
        seen = seen & (group[None, :, 0] < own[:, None, 0])
    return seen


def summaries(
    summary: Summary, where: Coordinates, key: Tensor, value: Tensor, valid: Tensor, levels: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Keys and values [B, H, C, D] of the cells of every level, and their counts [B, C]."""
    keys, values, counts = [], [], []
    weight = valid.to(key.dtype)
    for level in range(1, levels + 1):
        inside = same_rows(where.cells(level), where.cell(level)).to(key.dtype)  # [C, N]
        counts.append(weight @ inside.T)
    if isinstance(summary, Summaries):
        flat = [[x.flatten(2, 3).to(key.dtype) for x in side[:levels]] for side in summary]
        return flat[0], flat[1], counts
    if isinstance(summary, LearnedSummary):
        for level in range(1, levels + 1):
            given = summary.levels[level - 1]
            keys.append(_learned(where, level, key, weight, counts[level - 1], given.key_weight, given.key_bias))
            values.append(
                _learned(where, level, value, weight, counts[level - 1], given.value_weight, given.value_bias)
            )
        return keys, values, counts
    if isinstance(summary, SharedSummary):
        keys = _shared(where, key, weight, counts, summary.key_leaf, summary.key_up)
        values = _shared(where, value, weight, counts, summary.value_leaf, summary.value_up)
        return keys, values, counts
    for level in range(1, levels + 1):
        inside = same_rows(where.cells(level), where.cell(level))
        if isinstance(summary, PooledSummary):
            logits = torch.einsum("bhnd,hd->bhn", key, summary.query.to(key.dtype).expand(key.shape[1], -1))
            open_ = inside[None, None] & valid[:, None, None, :]
            share = logits[:, :, None].masked_fill(~open_, -torch.inf)
            dead = ~open_.any(-1, keepdim=True)
            share = torch.softmax(share.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
        else:
            share = (inside[None].to(key.dtype) * weight[:, None] / counts[level - 1].clamp(min=1)[..., None])[:, None]
        keys.append(share @ key)
        values.append(share @ value)
    return keys, values, counts


def _full_share(count: Tensor, size: int) -> Tensor:
    return torch.where(count > 0, size / count.clamp(min=1), 0.0)


def _shared(
    where: Coordinates, x: Tensor, weight: Tensor, counts: list[Tensor], leaf: Tensor, up: Tensor
) -> list[Tensor]:
    shape = where.shape
    out: list[Tensor] = []
    for level, count in enumerate(counts, start=1):
        if level == 1:
            side = shape.cell_side(1)
            place = _row_major(where.position % where.position.new_tensor(side), side)
            child, child_count, below, w = where.cell(1), weight, x, leaf
        else:
            place = _row_major(where.cells(level - 1) % 2, (2,) * shape.dims)
            child, child_count, below, w = where.cells(level - 1) // 2, counts[level - 2], out[-1], up
        inside = same_rows(where.cells(level), child).to(x.dtype)  # [C, children]
        weighted = below * child_count[:, None, :, None] * w.to(x.dtype)[:, place][None]
        out.append((inside @ weighted) * _full_share(count, w.shape[1])[:, None, :, None])
    return out


def _learned(
    where: Coordinates, level: int, x: Tensor, weight: Tensor, count: Tensor, w: Tensor, bias: Tensor
) -> Tensor:
    shape = where.shape
    side, p = shape.group_side(level), shape.rank
    place = _row_major(where.position % where.position.new_tensor(side), side)  # position in the group
    cells = where.cells(level)
    inside = same_rows(cells // cells.new_tensor(p), where.group(level)).to(x.dtype)  # [C, N] token in the cell's group
    row = _row_major(cells % cells.new_tensor(p), p)  # [C]
    taps = w.to(x.dtype)[row][:, :, place]  # [C, D, N]
    out = torch.einsum("cn,cdn,bhnd->bhcd", inside, taps, x * weight[:, None, :, None])
    return out * _full_share(count, prod(shape.cell_side(level)))[:, None, :, None] + bias.to(x.dtype)[row]


def pooled_queries(where: Coordinates, query: Tensor, valid: Tensor, level: int) -> Tensor:
    """[B, H, N, D]: for every token, the mean over the valid tokens of its cell of ``level``."""
    together = same_rows(where.cell(level), where.cell(level)).to(query.dtype)[None] * valid[:, None, :].to(query.dtype)
    total = together.sum(-1, keepdim=True)
    return (together / total.clamp(min=1))[:, None] @ query


@dataclass(frozen=True)
class Weights:
    """Joint softmax weights of one grid, and what they were computed from.

    Attributes:
        tokens: [B, H, N, N] weights on tokens.
        cells: per level [B, H, N, C] weights on cells.
        lse: [B, H, N].
        values: per level [B, H, C, D] value summaries, repeated for grouped heads.
        scores: [B, H, N, N] biased scores of tokens, -inf where unseen.
        cell_scores: per level [B, H, N, C] those of cells.
    """

    tokens: Tensor
    cells: list[Tensor]
    lse: Tensor
    values: list[Tensor]
    scores: Tensor
    cell_scores: list[Tensor]


def weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    shape: Geometry,
    causal: bool,
    valid: Tensor,
    scale: float,
    count_bias: bool,
    query_rank: tuple[int, ...] | None,
    sinks: int,
    summary: Summary,
    level_bias: Tensor | None,
    part: str,
) -> Weights:
    """All weights of one grid. ``valid`` [B, N] bool; keys and values are repeated for grouped heads in here."""
    repeat = query.shape[1] // key.shape[1]
    where = Coordinates.of(shape, query.device)
    number = shape.tokens
    hidden = ~valid[:, None, :, None]
    key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    is_sink = torch.arange(number, device=query.device) < sinks
    levels = shape.levels if part != "near" else 0
    wide = _wide(key.dtype)  # counts and sums over cells are exact in no half precision
    keys, values, counts = summaries(summary, where, key.to(wide), value.to(wide), valid & ~is_sink, levels)
    keys, values = ([x.to(key.dtype) for x in side] for side in (keys, values))
    seen = near_visible(where, causal) & ~is_sink
    always = is_sink[None].expand(number, number)
    if causal:
        always = always & (where.position[:, None, 0] >= where.position[None, :, 0])
    seen = (seen | always) if part != "far" else torch.zeros_like(seen)
    token_scores = scale * query @ key.repeat_interleave(repeat, 1).mT
    scores = [token_scores.masked_fill(~(seen[None] & valid[:, None])[:, None], -torch.inf)]
    for level in range(1, levels + 1):
        q = query
        if query_rank is not None:
            pooling = Coordinates(Geometry(shape.grid, shape.block, query_rank, shape.levels), where.position)
            q = pooled_queries(pooling, query.masked_fill(hidden, 0.0), valid, level)
        s = scale * q @ keys[level - 1].repeat_interleave(repeat, 1).mT
        count = counts[level - 1][:, None, None, :]
        if count_bias:
            s = s + count.clamp(min=1).log().to(s.dtype)
        if level_bias is not None:
            s = s + level_bias[level - 1].to(s.dtype)[None, :, None, None]
        visible = far_visible(where, level, levels, causal)[None, None] & (count > 0)
        scores.append(s.masked_fill(~visible, -torch.inf))
    joined = torch.cat(scores, -1)
    dead = (joined == -torch.inf).all(-1, keepdim=True)
    soft = torch.softmax(joined.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    lse = torch.logsumexp(joined.masked_fill(dead, 0.0).to(_wide(joined.dtype)), -1).masked_fill(
        dead[..., 0], -torch.inf
    )
    parts = list(soft.split([s.shape[-1] for s in scores], -1))
    return Weights(parts[0], parts[1:], lse, [v.repeat_interleave(repeat, 1) for v in values], scores[0], scores[1:])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    rank: tuple[int, ...],
    levels: int | None,
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    count_bias: bool,
    query_rank: tuple[int, ...] | None,
    sinks: int,
    dropout: float,
    summary: Summary,
    level_bias: Tensor | None,
    part: str,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, N, D] in the dtype of the query and lse [B, Hq, N], from the normalised arguments of a call.

    Half precision is computed in float32; ``plain`` rounds scores, weights, summaries and gradients to the dtype of the
    query, as torch's operators do one by one: what error budgets are measured by.
    """
    dtype = query.dtype
    if not plain:
        query, key, value = (x.to(_wide(dtype)) for x in (query, key, value))
    options: dict[str, Any] = {
        "causal": causal,
        "scale": scale,
        "count_bias": count_bias,
        "query_rank": query_rank,
        "sinks": sinks,
        "summary": summary,
        "level_bias": level_bias,
        "part": part,
    }
    if cu_seqlens is None:
        shape = geometry(grid, block, rank, levels)
        valid = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        outs = [_one(query, key, value, shape, valid if key_mask is None else key_mask, dropout, options)]
    else:
        outs, bounds = [], cu_seqlens.tolist()
        for start, stop in zip(bounds, bounds[1:], strict=False):
            if stop > start:
                cut = slice(start, stop)
                most = geometry((stop - start,), block, rank).levels
                shape = geometry((stop - start,), block, rank, most if levels is None else min(levels, most))
                valid = torch.ones(key.shape[0], stop - start, dtype=torch.bool, device=key.device)
                outs.append(_one(query[:, :, cut], key[:, :, cut], value[:, :, cut], shape, valid, dropout, options))
    return torch.cat([o for o, _ in outs], 2).to(dtype), torch.cat([e for _, e in outs], 2)


def _one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: Geometry,
    valid: Tensor,
    dropout: float,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        w = weights(query, key, value, shape=shape, valid=valid, **options)
        repeat = query.shape[1] // key.shape[1]
        value = value.masked_fill(~valid[:, None, :, None], 0.0).repeat_interleave(repeat, 1)
        out = torch.nn.functional.dropout(w.tokens, dropout) @ value
        for cell, summary in zip(w.cells, w.values, strict=True):
            out = out + torch.nn.functional.dropout(cell, dropout) @ summary
    return out, w.lse
