"""The cells of all levels in one store: built by fused kernels for mean and shared summaries, by torch for the others.

A store is [batch * key heads, cells, D] with the cells of a group together, groups row-major, level after level, in
the dtype of the keys, so that one matrix product reads cells of many levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farfield.ops.multipole import pyramid
from farfield.ops.multipole.summary import SharedSummary, Summaries, Summary, pack
from farfield.ops.multipole.triton.kernels_pyramid import fold_down, fold_up
from farfield.ops.multipole.triton.tables import Fold, Tables

FOLD_LEVELS = 7
"""Levels that one launch of the pyramid's kernels can name."""


@dataclass(frozen=True)
class Rows:
    """Where keys, values and what may be read of them lie, as the kernels take it.

    Attributes:
        key, value: [B, Hkv, N, D], the last axis contiguous.
        shown: [B', slots] bytes, tokens that take part in cells; None for all.
    """

    tables: Tables
    key: Tensor
    value: Tensor
    shown: Tensor | None

    @property
    def in_order(self) -> bool:
        """Whether the block order is the tokens' own."""
        return self.tables.slots is None

    @property
    def token_of_slot(self) -> Tensor:
        """The block order as int32; any table where :attr:`in_order`."""
        return self.tables.near if self.tables.slots is None else self.tables.slots

    @property
    def mask_stride(self) -> int:
        """From one batch entry's mask to the next."""
        return 0 if self.shown is None or self.shown.shape[0] == 1 else self.shown.stride(0)

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Batch, head and token stride."""
        return x.stride(0), x.stride(1), x.stride(2)


@dataclass(frozen=True)
class Cells:
    """Keys and values [G, cells, D] of all levels and valid tokens per cell, counts [B', cells] in float32."""

    key: Tensor
    value: Tensor
    counts: Tensor

    @property
    def count_stride(self) -> int:
        """From one batch entry's counts to the next."""
        return 0 if self.counts.shape[0] == 1 else self.counts.stride(0)


def fused(summary: Summary) -> bool:
    """Whether kernels build this kind."""
    return summary == "mean" or isinstance(summary, SharedSummary)


class _Weights:
    """Weights of a :class:`SharedSummary` as the kernels take them; any pointers for means."""

    def __init__(self, summary: Summary, spare: Tensor) -> None:
        self.shared = isinstance(summary, SharedSummary)
        self.key_leaf = self.key_up = self.value_leaf = self.value_up = spare
        if isinstance(summary, SharedSummary):
            self.key_leaf, self.key_up, self.value_leaf, self.value_up = (w.contiguous() for w in summary)
        self.leaf_head, self.up_head = (self._stride(w) for w in (self.key_leaf, self.key_up))

    def _stride(self, weight: Tensor) -> int:
        return weight.stride(0) if self.shared and weight.shape[0] > 1 else 0


def leaf_weights(summary: Summary, spare: Tensor) -> tuple[Tensor, Tensor, int]:
    """Weights of keys and of values from tokens to level 1, and their stride from head to head."""
    weights = _Weights(summary, spare)
    return weights.key_leaf, weights.value_leaf, weights.leaf_head


def _fold_arguments(rows: Rows, fold: Fold) -> tuple[list[Tensor], dict[str, Any], int]:
    """Tables and constants of a launch, and its number of programs."""
    layout = rows.tables.plan.layout
    children = 2**layout.dims
    cells = [*fold.cells, *[fold.cells[0]] * (FOLD_LEVELS - len(fold.cells))]
    width = rows.key.shape[3]
    constants = {
        "M": layout.block_tokens,
        "P": layout.cells_per_group,
        "S": layout.block_tokens // layout.cells_per_group,
        "D": width,
        "WIDTH": max(16, 1 << (width - 1).bit_length()),
        "SIZE": fold.cells[0].shape[1],
        "CHILDREN": children,
        "STEPS": fold.top - fold.base,
        "FROM_TOKENS": fold.base == 1,
        "MASKED": rows.shown is not None,
        "IN_ORDER": rows.in_order,
        "num_warps": 4 if width <= 64 else 8,
    }
    return cells, constants, fold.cells[0].shape[0]


def build(rows: Rows, summary: Summary) -> Cells:
    """Cells of all levels of a mean or shared summary; keys and values are read once."""
    tables, key = rows.tables, rows.key
    batch, heads, number, width = key.shape
    masks = 1 if rows.shown is None else rows.shown.shape[0]
    store = (batch * heads, tables.cells, width)
    counts = key.new_empty(masks, tables.cells, dtype=torch.float32)
    cells = Cells(key.new_empty(store), key.new_empty(store), counts)
    layout = tables.plan.layout
    first = sum(layout.group_total(level) for level in range(1, tables.folds[0].top)) * layout.cells_per_group
    handed = len(tables.folds) > 1
    exact = [
        key.new_empty(batch * heads, tables.cells - first if handed else 0, width, dtype=torch.float32)
        for _ in range(2)
    ]
    weights = _Weights(summary, key)
    shown = tables.near if rows.shown is None else rows.shown
    for fold in tables.folds:
        lists, constants, programs = _fold_arguments(rows, fold)
        fold_up[(programs * 2 * batch * heads,)](
            rows.key, rows.value, cells.key, cells.value, *exact, cells.counts,
            weights.key_leaf, weights.value_leaf, weights.key_up, weights.value_up,
            tables.offset, rows.token_of_slot, shown, *lists,
            *rows.strides(rows.key), *rows.strides(rows.value), rows.mask_stride, cells.count_stride,
            weights.leaf_head, weights.up_head,
            number, heads, programs, tables.cells, exact[0].shape[1], first, masks,
            HAND_OVER=fold is not tables.folds[-1], SHARED=weights.shared, **constants,
        )  # fmt: skip
    return cells


def send_down(rows: Rows, summary: Summary, cells: Cells, grad_key: Tensor, grad_value: Tensor) -> list[Tensor]:
    """Collects the gradients [G, cells, D] (float32, in place) of all levels in level 1; returns the weights'."""
    tables = rows.tables
    batch, heads, number, width = rows.key.shape
    weights = _Weights(summary, rows.key)
    shown = tables.near if rows.shown is None else rows.shown
    leaf: Tensor | None = None
    up: Tensor | None = None
    for fold in reversed(tables.folds):
        lists, constants, programs = _fold_arguments(rows, fold)
        launched = programs * 2 * batch * heads
        some = launched if weights.shared else 0
        part_leaf, part_up = (grad_key.new_empty(some, constants[n], width) for n in ("S", "CHILDREN"))
        fold_down[(launched,)](
            rows.key, rows.value, cells.key, cells.value, grad_key, grad_value, cells.counts,
            weights.key_up, weights.value_up, part_leaf, part_up,
            tables.offset, rows.token_of_slot, shown, *lists,
            *rows.strides(rows.key), *rows.strides(rows.value), rows.mask_stride, cells.count_stride, weights.up_head,
            number, heads, programs, tables.cells, SHARED=weights.shared, **constants,
        )  # fmt: skip
        if weights.shared:
            part = part_up.view(batch, heads, 2, programs, -1, width).sum((0, 3))
            up = part if up is None else up + part
            if fold.base == 1:
                leaf = part_leaf.view(batch, heads, 2, programs, -1, width).sum((0, 3))
    if not isinstance(summary, SharedSummary):
        return []
    assert leaf is not None and up is not None
    sides = (leaf[:, 0], up[:, 0], leaf[:, 1], up[:, 1])
    return [(g.sum(0, keepdim=True) if w.shape[0] == 1 else g).to(w.dtype) for g, w in zip(sides, summary, strict=True)]


class TorchCells:
    """The cells of the other kinds, by :mod:`farfield.ops.multipole.pyramid`; keeps what the way down needs."""

    def __init__(self, rows: Rows, summary: Summary) -> None:
        self.plan, self.layout, self.summary = rows.tables.plan, rows.tables.plan.layout, summary
        key, value = rows.key, rows.value
        self.in_cells = self.plan.filled[None] if rows.shown is None else rows.shown.view(torch.bool)
        self.counts = pyramid.count(self.in_cells, self.layout, self.layout.levels)
        self.key, self.value = self._blocks(key), self._blocks(value)
        self.made = pyramid.up(
            summary, self.key, self.value, self.in_cells, self.counts, self.layout, self.layout.levels
        )
        counts = [
            pyramid.to_groups(n, self.layout, level).flatten(1) for level, n in enumerate(self.counts.cells, start=1)
        ]
        width = (key.shape[0] * key.shape[1], -1, key.shape[3])
        keys, values = (torch.cat([x.reshape(width) for x in side], 1).to(key.dtype) for side in self.made)
        self.cells = Cells(keys, values, torch.cat(counts, 1).float().contiguous())

    def _blocks(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, H, slots, D]; 0 where a token is in no cell."""
        return self.plan.to_blocks(x).masked_fill(~self.in_cells[:, None, :, None], 0.0)

    def send_down(
        self, grad_key: Tensor, grad_value: Tensor, token_grad_key: Tensor, token_grad_value: Tensor
    ) -> list[Tensor]:
        """Adds the gradients [G, cells, D] of all levels to the tokens' in block order; returns the weights'."""
        layout = self.layout
        sizes = [layout.group_total(level) * layout.cells_per_group for level in range(1, layout.levels + 1)]
        grads = Summaries(
            *(
                tuple(x.reshape(y.shape) for x, y in zip(grad.split(sizes, 1), like, strict=True))
                for grad, like in zip((grad_key, grad_value), self.made, strict=True)
            )
        )
        weights = pyramid.down(
            self.summary, self.key, self.value, self.in_cells, self.counts, layout, self.made, grads,
            token_grad_key, token_grad_value,
        )  # fmt: skip
        hidden = ~self.in_cells[:, None, :, None]
        token_grad_key.masked_fill_(hidden, 0.0)
        token_grad_value.masked_fill_(hidden, 0.0)
        return [g.to(w.dtype) for g, w in zip(weights, pack(self.summary)[1], strict=True)]
