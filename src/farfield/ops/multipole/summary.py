"""Summaries: how the keys and values of a cell become one key and one value.

The functional operator takes one of the small tuples below (ready weights, or a ready pyramid); modules own the
parameters. Shapes: Hw is 1 (shared by heads) or the number of key heads; D the head width; P the cells of a group
(product of ``rank``).

The cell of a level holds ``count`` valid tokens. Writing ``full`` for the size of a cell, a linear summary is
``full / count`` times the weighted sum over valid tokens, so that averaging weights give the mean over valid tokens
in every cell.

Sources: Fast Multipole Attention, arXiv 2310.11960 (learned, mean); the multipole-to-multipole form follows the fast
multipole method and MANO, arXiv 2507.02748 (shared); Combiner, arXiv 2107.05768 (pooled).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from farfield.geometry import Geometry


class SharedSummary(NamedTuple):
    """Level 1 cells from their tokens, level l + 1 cells from their 2**dims children, by weights for all levels.

    ``leaf`` weights are [Hw, tokens of a level 1 cell, D] and ``up`` weights [Hw, 2**dims, D], positions row-major.
    Averaging is 1 / size everywhere. Linear cost, any length.
    """

    key_leaf: Tensor
    key_up: Tensor
    value_leaf: Tensor
    value_up: Tensor


class PooledSummary(NamedTuple):
    """Weights that depend on the data: a softmax over the cell's tokens of ``query . key``.

    ``query`` is [Hw, D]; zero gives the mean.
    """

    query: Tensor


class LevelWeights(NamedTuple):
    """One level of :class:`LearnedSummary`: weights [P, D, tokens of a group of the level], bias [P, D]."""

    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor


class LearnedSummary(NamedTuple):
    """The paper's: per level a depthwise convolution with kernel = stride = group and P filters per channel.

    Heads share the weights, which grow linearly with the length and fix it; those of :class:`SharedSummary` do not.
    """

    levels: tuple[LevelWeights, ...]


class Summaries(NamedTuple):
    """Ready summaries, level 1 first: each [B, Hkv, groups, P, D], groups and cells row-major."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


Summary = str | SharedSummary | PooledSummary | LearnedSummary | Summaries


def pack(summary: Summary) -> tuple[str, list[Tensor]]:
    """The kind of a summary and its tensors as a flat list, as the custom operator takes them.

    Raises:
        ValueError: for a string other than "mean".
        TypeError: for anything that is not a summary.
    """
    if isinstance(summary, str):
        if summary != "mean":
            raise ValueError(
                f"summary={summary!r}: the functional form knows 'mean', or takes ready weights as SharedSummary(...), "
                "PooledSummary(...), LearnedSummary(...) or finished ones as Summaries(...); modules own the parameters"
            )
        return "mean", []
    if isinstance(summary, SharedSummary):
        return "shared", list(summary)
    if isinstance(summary, PooledSummary):
        return "pooled", list(summary)
    if isinstance(summary, LearnedSummary):
        return "learned", [t for level in summary.levels for t in level]
    if isinstance(summary, Summaries):
        return "given", [*summary.keys, *summary.values]
    raise TypeError(
        f"summary is a {type(summary).__name__}: "
        "'mean', SharedSummary, PooledSummary, LearnedSummary or Summaries would be accepted"
    )


def unpack(kind: str, tensors: Sequence[Tensor]) -> Summary:
    """The inverse of :func:`pack`."""
    if kind == "shared":
        return SharedSummary(*tensors)
    if kind == "pooled":
        return PooledSummary(*tensors)
    if kind == "learned":
        return LearnedSummary(tuple(LevelWeights(*tensors[i : i + 4]) for i in range(0, len(tensors), 4)))
    if kind == "given":
        half = len(tensors) // 2
        return Summaries(tuple(tensors[:half]), tuple(tensors[half:]))
    return kind


def check(summary: Summary, geometry: Geometry, key: Tensor, levels: int) -> None:
    """Compares the shapes of ready weights with the hierarchy.

    Raises:
        ValueError: naming the tensor, its shape and the shape that would be accepted.
    """
    heads, width = key.shape[1], key.shape[3]
    p = geometry.cells_per_group

    def expect(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
        if tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(list(s)) for s in shapes)
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; for this grid, block and rank it must be {wanted}"
            )

    def per_head(*tail: int) -> tuple[tuple[int, ...], ...]:
        return ((1, *tail), (heads, *tail))

    if isinstance(summary, SharedSummary):
        leaf, up = prod(geometry.cell_side(1)), 2**geometry.dims
        for name, tensor in summary._asdict().items():
            expect(f"SharedSummary.{name}", tensor, *per_head(leaf if name.endswith("leaf") else up, width))
    elif isinstance(summary, PooledSummary):
        expect("PooledSummary.query", summary.query, *per_head(width))
    elif isinstance(summary, LearnedSummary):
        if len(summary.levels) < levels:
            raise ValueError(f"LearnedSummary has weights for {len(summary.levels)} levels; this length needs {levels}")
        for i, level in enumerate(summary.levels[:levels], start=1):
            size = prod(geometry.group_side(i))
            for name, tensor in level._asdict().items():
                taps = (size,) if name.endswith("weight") else ()
                expect(f"LearnedSummary.levels[{i - 1}].{name}", tensor, (p, width, *taps))
    elif isinstance(summary, Summaries):
        if len(summary.keys) < levels or len(summary.values) < levels:
            raise ValueError(
                f"Summaries has {len(summary.keys)} key and {len(summary.values)} value levels; "
                f"this length needs {levels}"
            )
        for i in range(levels):
            shape = (key.shape[0], heads, geometry.group_total(i + 1), p, width)
            expect(f"Summaries.keys[{i}]", summary.keys[i], shape)
            expect(f"Summaries.values[{i}]", summary.values[i], shape)


def check_levels(summary: Summary, level_bias: Tensor | None, geometry: Geometry, key: Tensor) -> None:
    """Checks what must reach up to the top of the hierarchy: learned weights, ready summaries and level biases.

    Raises:
        ValueError: as :func:`check`.
    """
    if isinstance(summary, LearnedSummary | Summaries):
        check(summary, geometry, key, geometry.levels)
    if level_bias is not None and level_bias.shape[0] < geometry.levels:
        raise ValueError(f"level_bias has {level_bias.shape[0]} rows; this length has {geometry.levels} levels")


def averaging(
    geometry: Geometry, heads: int, width: int, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> SharedSummary:
    """The :class:`SharedSummary` that averages."""
    leaf, up = prod(geometry.cell_side(1)), 2**geometry.dims

    def full(size: int) -> Tensor:
        return torch.full((heads, size, width), 1.0 / size, dtype=dtype, device=device)

    return SharedSummary(full(leaf), full(up), full(leaf), full(up))
