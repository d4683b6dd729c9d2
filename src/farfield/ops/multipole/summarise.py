"""Summaries on their own: the differentiable pyramid that the operator would build, to look at or to change first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farfield.ops.multipole import pyramid
from farfield.ops.multipole.api import normalise
from farfield.ops.multipole.plan import make_plan
from farfield.ops.multipole.summary import Summaries, Summary, check


def summarise(
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int] | None = None,
    block: int | Sequence[int] = 64,
    rank: int | Sequence[int] = 8,
    levels: int | None = None,
    key_mask: Tensor | None = None,
    sinks: int = 0,
    summary: Summary = "mean",
) -> Summaries:
    """The pyramid of summaries of ``key`` and ``value``.

    ``multipole_attention(q, k, v, ..., summary=summarise(k, v, ..., summary=s))`` equals
    ``multipole_attention(q, k, v, ..., summary=s)``.

    Args:
        key, value: [B, Hkv, N, D].
        grid, block, rank, levels, key_mask, sinks, summary: as in :func:`farfield.multipole_attention`.

    Returns:
        Summaries of [B, Hkv, groups, P, D] per level, float32 (float64 for float64 inputs). Linear time and memory,
        differentiable.

    Raises:
        ValueError: as the operator.
    """
    call = normalise(
        key, key, value, grid, block, rank, levels, False, key_mask, None, None, None, sinks, 0.0, summary, None, "both"
    )
    plan = make_plan(call["grid"], None, call["block"], call["rank"], levels, False, sinks, key.device)
    layout = plan.layout
    check(summary, layout, key, layout.levels)
    _, valid = plan.readable(key_mask)
    blocks = [plan.to_blocks(x).masked_fill(~valid[:, None, :, None], 0.0) for x in (call["key"], call["value"])]
    full = key_mask is None and plan.whole and plan.is_sink is None
    counts = pyramid.count(valid, layout, layout.levels, full)
    with torch.autocast(key.device.type, enabled=False):
        return pyramid.up(summary, blocks[0], blocks[1], valid, counts, layout, layout.levels)


def cell_centres(tokens: int, block: int, rank: int, level: int, device: torch.device) -> Tensor:
    """[groups * rank] positions of the centres of the cells of ``level`` of a sequence, in tokens; fractional."""
    side = (block << (level - 1)) // rank
    groups = -(-tokens // (block << (level - 1)))
    return (torch.arange(groups * rank, device=device) + 0.5) * side - 0.5
