"""Some rows of causal multipole attention: for queries whose keys were there before them, in a key-value cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from farfield.geometry import Geometry
from farfield.ops.multipole.api import normalise
from farfield.ops.multipole.summarise import summarise
from farfield.ops.multipole.summary import Summaries, Summary, check_levels
from farfield.ops.state import attend_dense

__all__ = ["multipole_rows"]


def multipole_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first: int | Tensor | None = None,
    block: int = 64,
    rank: int = 8,
    levels: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    count_bias: bool = True,
    sinks: int = 0,
    summary: Summary = "mean",
    level_bias: Tensor | None = None,
    part: str = "both",
) -> Tensor:
    """Rows ``first`` to ``first + Nq - 1`` of causal :func:`farfield.multipole_attention` over all of ``key``.

    For decoding with a cache of keys and values: the rows that a prefill of the N tokens would give, without computing
    the others.

    Args:
        query: [B, Hq, Nq, D], consecutive tokens; Nq <= N.
        key, value: [B, Hkv, N, D], the whole sequence so far, the queries' own tokens included.
        first: position of the first query, one integer or [B]; None: N - Nq, the queries are the last tokens.
        block, rank, levels, key_mask, scale, count_bias, sinks, summary, level_bias, part: as in
            :func:`farfield.multipole_attention`, 1-D.

    Returns:
        [B, Hq, Nq, D] in the dtype of the query; 0 where nothing is seen.

    Raises:
        ValueError, TypeError: with what was given and what would be accepted.

    Complexity: O(N) per call to read keys and values once for their summaries, and O(Nq (block + rank * levels)) scores
    (O(Nq N rank / block) when ``first`` differs within the batch). Nothing is kept between calls. Differentiable to any
    order. Causal-safe.
    """
    number, tokens = query.shape[2], key.shape[2]
    if number > tokens:
        raise ValueError(f"query has {number} tokens, key {tokens}: the queries' own tokens must be among the keys")
    # The rest of the call is that of self-attention over the keys, with the heads of the query.
    whole = query.new_empty(()).expand(*query.shape[:2], tokens, query.shape[3])
    call = normalise(
        whole, key, value, None, block, rank, levels, True, key_mask, None, scale, None, sinks, 0.0, summary,
        level_bias, part,
    )  # fmt: skip
    shape = Geometry((tokens,), call["block"], call["rank"], 0)
    made, counts = None, []
    if part != "near":
        made = summarise(
            key, value, block=block, rank=rank, levels=levels, key_mask=key_mask, sinks=sinks, summary=summary
        )
        shape = Geometry((tokens,), call["block"], call["rank"], len(made.keys))
        check_levels(summary, level_bias, shape, key)
        counts = _counts(key_mask, shape, sinks, key.device)
    pyramid = _Pyramid(shape, made, counts, level_bias if part != "near" else None, count_bias)
    start = tokens - number if first is None else first
    if isinstance(start, int) and not 0 <= start <= tokens - number:
        raise ValueError(f"first={start} with {number} queries and {tokens} keys: 0 to {tokens - number} is possible")
    # In pieces, so that the near field stays a band.
    step = max(block, 64)
    rows = [
        _piece(query[:, :, i : i + step], key, value, start + i, key_mask, call["scale"], sinks, pyramid, part)
        for i in range(0, number, step)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 2)


class _Pyramid(NamedTuple):
    """What a query may see of the far field: summaries [B, Hkv, groups, P, D] and counts [B', groups, P] per level."""

    shape: Geometry
    made: Summaries | None
    counts: list[Tensor]
    level_bias: Tensor | None
    count_bias: bool


class _Keys(NamedTuple):
    """Keys of one kind: [B, Hkv, M, D] both, bias broadcastable to [B, Hq, Nq, M], visible to [B, 1, Nq, M]."""

    key: Tensor
    value: Tensor
    bias: Tensor
    visible: Tensor


def _counts(key_mask: Tensor | None, shape: Geometry, sinks: int, device: torch.device) -> list[Tensor]:
    """Valid tokens of every cell, [B', groups, P] per level."""
    (tokens,), (rank,) = shape.grid, shape.rank
    valid = torch.ones(1, tokens, dtype=torch.bool, device=device) if key_mask is None else key_mask.clone()
    valid[:, :sinks] = False
    out = []
    for level in range(1, shape.levels + 1):
        groups = shape.group_total(level)
        (side,) = shape.cell_side(level)
        filled = torch.nn.functional.pad(valid, (0, groups * rank * side - tokens))
        out.append(filled.view(valid.shape[0], groups, rank, side).sum(-1))
    return out


def _piece(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: int | Tensor,
    key_mask: Tensor | None,
    scale: float,
    sinks: int,
    pyramid: _Pyramid,
    part: str,
) -> Tensor:
    batch, _, number, _ = query.shape
    start = torch.as_tensor(first, device=query.device).reshape(-1, 1)
    position = start + torch.arange(number, device=query.device)  # [B', Nq]
    kinds = []
    if part != "far":
        kinds += _near(key, value, position, key_mask, sinks, pyramid.shape)
    if pyramid.made is not None:
        kinds += _far(position, first, pyramid)
    wide = torch.promote_types(query.dtype, torch.float32)
    if not kinds:
        return torch.zeros_like(query)
    heads = query.shape[1]
    keys = torch.cat([k.key.to(wide) for k in kinds], 2)
    values = torch.cat([k.value.to(wide) for k in kinds], 2)
    bias = torch.cat([k.bias.to(wide).expand(batch, heads, -1, -1) for k in kinds], 3)
    visible = torch.cat([k.visible.expand(batch, -1, number, -1) for k in kinds], 3)
    state = attend_dense(query, keys, values, scale=scale, bias=bias, visible=visible)
    return state.out.to(query.dtype)


def _near(
    key: Tensor, value: Tensor, position: Tensor, key_mask: Tensor | None, sinks: int, shape: Geometry
) -> list[_Keys]:
    """Tokens of a query's own block and the one before, and the sinks that are not among them."""
    (block,), tokens, number = shape.block, key.shape[2], position.shape[1]
    since = (position // block - 1).clamp(min=0) * block  # [B', Nq] where the near field begins
    # A row of a padded batch may lie before its first token; it sees whatever is there.
    index = since[:, :1] + torch.arange(min(tokens, number + 2 * block), device=key.device)
    inside = (index >= 0) & (index < tokens)
    index = index.clamp(0, tokens - 1)
    seen = inside[:, None] & (index[:, None] <= position[..., None]) & (index[:, None] >= since[..., None])
    places = [(index, seen)]
    if sinks:
        index = torch.arange(min(sinks, tokens), device=key.device)[None]
        places.append((index, (index[:, None] <= position[..., None]) & (index[:, None] < since[..., None])))
    found = []
    for index, seen in places:
        if key_mask is not None:
            rows = index.expand(key_mask.shape[0], -1)
            seen = seen & key_mask.gather(1, rows)[:, None]
        nothing = torch.zeros(1, 1, 1, index.shape[1], device=key.device)
        hidden = ~seen.any(1)[:, None, :, None]
        k, v = (_take(x, index).masked_fill(hidden, 0.0) for x in (key, value))
        found.append(_Keys(k, v, nothing, seen[:, None]))
    return found


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, N, D] at positions [B' , M]."""
    if index.shape[0] == 1:
        return x.index_select(2, index[0])
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _far(position: Tensor, first: int | Tensor, pyramid: _Pyramid) -> list[_Keys]:
    """The cells of the interaction lists of the queries' groups, level by level."""
    shape, made = pyramid.shape, pyramid.made
    assert made is not None
    (block,), number = shape.block, position.shape[1]
    found = []
    for level in range(1, shape.levels + 1):
        own = position // block >> (level - 1)  # [B', Nq]
        low, high = 0, shape.group_total(level)
        if isinstance(first, int):
            # No row of this piece sees a group outside.
            oldest, newest = (i // block >> (level - 1) for i in (first, first + number - 1))
            low = 0 if level == shape.levels else max(0, 2 * ((oldest >> 1) - 1))
            high = max(low, newest - 1)
        group = torch.arange(low, high, device=position.device)
        seen = group <= own[..., None] - 2
        if level < shape.levels:
            seen = seen & (group >> 1 >= (own[..., None] >> 1) - 1)
        count = pyramid.counts[level - 1][:, low:high]
        visible = (seen[..., None] & (count > 0)[:, None]).flatten(2)[:, None]
        bias = torch.zeros(1, 1, 1, visible.shape[-1], device=position.device, dtype=torch.float64)
        if pyramid.count_bias:
            bias = count.clamp(min=1).double().log().flatten(1)[:, None, None]
        if pyramid.level_bias is not None:
            bias = bias + pyramid.level_bias[level - 1].double()[:, None, None]
        keys, values = (side[level - 1][:, :, low:high].flatten(2, 3) for side in made)
        found.append(_Keys(keys, values, bias, visible))
    return found
