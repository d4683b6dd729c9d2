"""The compiled engine: the torch engine with its arithmetic in C++. CPU; float32, bfloat16, float16; no dropout."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from farfield.geometry import Geometry
from farfield.ops.compiled import tiles
from farfield.ops.compiled.pyramid import children, reduce, reduce_down, reduction
from farfield.ops.memory import empty
from farfield.ops.multipole import torch as engine
from farfield.ops.multipole.engines import Request
from farfield.ops.multipole.pyramid import Counts
from farfield.ops.multipole.summary import SharedSummary, Summary

__all__ = ["backward", "forward", "why_not"]


def why_not(request: Request) -> str | None:
    """None where it can run a request, otherwise the reason; builds the library on first use."""
    return tiles.why_not(request.device, request.dtype, request.dropout)


def _weights(summary: Summary, level: int) -> tuple[Tensor | None, Tensor | None]:
    """[1 or H, children, D] for keys and values, or None for means."""
    if not isinstance(summary, SharedSummary):
        return None, None
    pair = (summary.key_leaf, summary.value_leaf) if level == 1 else (summary.key_up, summary.value_up)
    return pair[0].float().contiguous(), pair[1].float().contiguous()


def _linear(summary: Summary) -> bool:
    return summary == "mean" or isinstance(summary, SharedSummary)


def _up(
    summary: Summary, key: Tensor, value: Tensor, valid: Tensor, counts: Counts, layout: Geometry, levels: int
) -> tuple[Tensor, Tensor]:
    if not _linear(summary) or not levels:
        keys, values = engine.KERNELS.up(summary, key, value, valid, counts, layout, levels)
        return keys.float(), values.float()  # ready summaries may be wider
    heads, (groups, cells, dim) = key.shape[1], (key.shape[0] * key.shape[1], layout.cells_per_group, key.shape[3])
    sizes = [layout.group_total(level) * cells for level in range(1, levels + 1)]
    below = [x.reshape(groups, -1, dim) for x in (key, value)]
    joined = [empty((groups, sum(sizes), dim), torch.float32) for _ in below]
    steps, kept, start = [], [], 0
    for level, size in enumerate(sizes, start=1):
        table, weights = children(layout, level), _weights(summary, level)
        into = [x[:, start : start + size] for x in joined]
        steps += [
            reduction(x, y, table, heads, counts.by_group[level - 1], weight)
            for x, y, weight in zip(below, into, weights, strict=True)
        ]
        kept.append((weights, below))
        below, start = into, start + size
    reduce(steps)
    return joined[0].view(groups, -1, cells, dim), joined[1].view(groups, -1, cells, dim)


def _down(
    summary: Summary,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    counts: Counts,
    layout: Geometry,
    cells: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    grad_key: Tensor,
    grad_value: Tensor,
) -> list[Tensor]:
    levels = len(counts.cells)
    if not _linear(summary) or not levels:
        return engine.KERNELS.down(summary, key, value, valid, counts, layout, cells, gradients, grad_key, grad_value)
    heads, groups, dim = key.shape[1], key.shape[0] * key.shape[1], key.shape[3]
    sizes = [layout.group_total(level) * layout.cells_per_group for level in range(1, levels + 1)]
    weights: list[list[Tensor | None]] = []
    sides = zip((key, value), cells, gradients, (grad_key, grad_value), strict=True)
    for side, (tokens, made, grad, grad_tokens) in enumerate(sides):
        below = [tokens.reshape(groups, -1, dim), *made.flatten(1, 2).split(sizes, 1)]
        into = [grad_tokens.view(groups, -1, dim), *grad.flatten(1, 2).split(sizes, 1)]
        leaf: Tensor | None = None
        up: Tensor | None = None
        for level in range(levels, 0, -1):
            got = reduce_down(
                into[level], below[level - 1], into[level - 1], children(layout, level), heads,
                counts.by_group[level - 1], _weights(summary, level)[side],
            )  # fmt: skip
            if level == 1:
                leaf = got
            elif got is not None:
                up = got if up is None else up + got
        weights.append([leaf, up])
    if not isinstance(summary, SharedSummary):
        return []
    tensors = (summary.key_leaf, summary.key_up, summary.value_leaf, summary.value_up)
    found = (*weights[0], *weights[1])
    return [torch.zeros_like(t) if w is None else w for t, w in zip(tensors, found, strict=True)]


KERNELS = engine.Kernels(tiles.attend, tiles.attend_backward, _up, _down, tiles.delta)

forward = partial(engine.forward, kernels=KERNELS)
backward = partial(engine.backward, kernels=KERNELS)
