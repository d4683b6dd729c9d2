"""The index tables of one call: which blocks, sinks and groups every leaf block of a grid or packed row reads.

Packed sequences are laid out as one row of leaf blocks in which every sequence starts at a multiple of its own
largest group (the sequences with the most levels come first), so that the groups of each sequence's own tree are
groups of the row. A packed batch is then just another set of tables. Plans depend on integers only and are cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from farfield.geometry import EMPTY, Geometry, Ints, geometry


@dataclass(frozen=True, eq=False)
class Table:
    """[units, places] rows to read (0 where unused) and [units, places] bool: which places are used."""

    rows: Tensor
    used: Tensor

    @staticmethod
    def of(table: Ints, own: Ints, device: torch.device) -> Table:
        """From a table of rows that holds :data:`farfield.geometry.EMPTY` where unused."""
        used = table != EMPTY
        # An unused place is gathered and then hidden. It repeats a row that the unit reads anyway (or its own, where it
        # reads none), so that a NaN in one packed sequence cannot reach another.
        first = table[:, :1] if table.shape[1] else table
        filler = np.where(first == EMPTY, own[:, None], first)
        rows = np.where(used, table, filler)
        return Table(torch.from_numpy(rows).to(device), torch.from_numpy(used).to(device))


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables over the leaf blocks of ``layout``, a geometry whose grid may be a row of packed trees.

    Attributes:
        layout: block order, group and cell counts.
        tokens: N.
        token_of_slot, slot_of_token: the block order, None where it is the order of the tokens itself.
        padding: empty slots, where the block order is the tokens' own order followed by them; otherwise None.
        filled: [slots] bool, slots that hold a token; ``whole``: all do.
        near: blocks read by each block, itself first.
        sinks: [blocks, sinks] slots of the leading tokens, or None.
        is_sink: [slots] bool or None.
        far: per level, groups read by each group.
        group_of_block: per level, [blocks].
        far_of_block: [blocks, places of all levels] rows of the concatenated levels; ``level_of_place`` the level
            (0-based) of each.
        row_bias: [classes, block_tokens, near and sink keys] causal mask inside a block, or None; ``row_class`` per
            block.
    """

    layout: Geometry
    tokens: int
    token_of_slot: Tensor | None
    slot_of_token: Tensor | None
    padding: int | None
    filled: Tensor
    whole: bool
    near: Table
    sinks: Table | None
    is_sink: Tensor | None
    far: tuple[Table, ...]
    group_of_block: tuple[Tensor, ...]
    far_of_block: Table
    level_of_place: tuple[int, ...]
    row_bias: Tensor | None
    row_class: tuple[int, ...]

    def readable(self, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots [B', slots] bool whose token may be read, and those of them that lie in cells (all but sinks).

        ``key_mask`` is [B, N] bool or None.
        """
        valid = self.filled[None]
        if key_mask is not None:
            valid = key_mask if self.token_of_slot is None else key_mask[:, self.token_of_slot.clamp(min=0)] & valid
        return valid, valid if self.is_sink is None else valid & ~self.is_sink

    def to_blocks(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, H, slots, D], 0 in slots that hold no token."""
        if self.token_of_slot is None:
            return x
        if self.padding is not None:
            return torch.nn.functional.pad(x, (0, 0, 0, self.padding))
        x = x.index_select(2, self.token_of_slot.clamp(min=0))
        return x if self.whole else x.masked_fill(~self.filled[:, None], 0.0)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, H, slots, ...] -> [B, H, N, ...], the inverse of :meth:`to_blocks`."""
        if self.slot_of_token is None:
            return x
        if self.padding is not None:
            return x[:, :, : self.tokens].contiguous()
        return x.index_select(2, self.slot_of_token)


@dataclass(frozen=True)
class _Tree:
    """One sequence (or the one grid) and where its leaf blocks and tokens start."""

    geometry: Geometry
    first_block: int
    first_token: int


def _trees(lengths: tuple[int, ...], block: int, rank: int, levels: int | None) -> tuple[list[_Tree], int]:
    """Places the sequences in a row of blocks; returns them and the number of blocks of the row."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shapes = []
    for length, start in zip(lengths, starts, strict=False):
        if length:
            most = geometry((length,), block, rank).levels
            shapes.append((geometry((length,), block, rank, most if levels is None else min(levels, most)), int(start)))
    if levels is not None and shapes and levels > max(g.levels for g, _ in shapes):
        raise ValueError(f"levels={levels}: the longest packed sequence has {max(g.levels for g, _ in shapes)}")
    shapes.sort(key=lambda pair: -pair[0].levels)
    trees, blocks = [], 0
    for shape, start in shapes:
        trees.append(_Tree(shape, blocks, start))
        step = 1 << max(0, shape.levels - 1)
        blocks += -(-shape.blocks // step) * step
    return trees, blocks


def segment_lengths(cu_seqlens: Tensor, tokens: int) -> tuple[int, ...]:
    """Lengths of packed sequences; raises ValueError unless their bounds rise from 0 to ``tokens``."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens={bounds}: it must rise from 0 to N={tokens}")
    return tuple(b - a for a, b in zip(bounds, bounds[1:], strict=False))


def packing(
    cu_seqlens: Tensor | None, key_mask: Tensor | None, tokens: int
) -> tuple[tuple[int, ...] | None, Tensor | None]:
    """Lengths of packed sequences, or None, and the mask that counts: explicit segments win over one."""
    return (None, key_mask) if cu_seqlens is None else (segment_lengths(cu_seqlens, tokens), None)


def make_plan(
    grid: tuple[int, ...],
    lengths: tuple[int, ...] | None,
    block: tuple[int, ...],
    rank: tuple[int, ...],
    levels: int | None,
    causal: bool,
    sinks: int,
    device: torch.device,
) -> Plan:
    """Tables for ``grid``, or for packed sequences of ``lengths`` on a 1-D grid; made once, except while tracing."""
    # The tensors of a trace (torch.export, a fake tensor mode) are not real and must not be handed to later calls.
    traced = torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor
    make = _make_plan.__wrapped__ if traced else _make_plan
    return make(grid, lengths, block, rank, levels, causal, sinks, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or the tables of an evaluation could not serve a later training step
def _make_plan(
    grid: tuple[int, ...],
    lengths: tuple[int, ...] | None,
    block: tuple[int, ...],
    rank: tuple[int, ...],
    levels: int | None,
    causal: bool,
    sinks: int,
    device: torch.device,
) -> Plan:
    if lengths is None:
        only = geometry(grid, block, rank, levels)
        trees, layout = [_Tree(only, 0, 0)], only
    else:
        trees, row = _trees(lengths, block[0], rank[0], levels)
        layout = Geometry((row * block[0],), block, rank, max(t.geometry.levels for t in trees))
    size, total = layout.block_tokens, layout.blocks
    token = np.full(total * size, EMPTY, dtype=np.int64)
    near_parts, sink_parts = [], []
    for tree in trees:
        local = tree.geometry.token_of_slot()
        first = tree.first_block * size
        token[first : first + len(local)] = np.where(local == EMPTY, EMPTY, local + tree.first_token)
        near_parts.append((tree.first_block, _shift(tree.geometry.near_list(causal), tree.first_block)))
        if sinks:
            leading = np.argsort(np.where(local == EMPTY, len(local), local), kind="stable")
            slot = leading[: min(sinks, tree.geometry.tokens)]
            sink_parts.append((tree.first_block, np.tile(slot + first, (tree.geometry.blocks, 1))))
    near = _stack(near_parts, total)
    sink = _stack(sink_parts, total) if sinks else None
    far = [_far_table(trees, layout, level, causal) for level in range(1, layout.levels + 1)]
    groups = [layout.group_of_block(level) for level in range(1, layout.levels + 1)]
    of_block, level_of_place, rows = [np.zeros((total, 0), dtype=np.int64)], [], 0
    for level, (table, group) in enumerate(zip(far, groups, strict=True)):
        of_block.append(_shift(table[group], rows))
        level_of_place += [level] * table.shape[1]
        rows += len(table)
    row_bias, row_class = _row_bias(trees, total, size, near.shape[1], sink, causal)
    order, blocks = np.arange(len(token)), np.arange(total)
    count = int((token != EMPTY).sum())
    padding = len(token) - count if (token[:count] == order[:count]).all() else None
    in_order = padding == 0
    slot_of_token = np.empty(count, dtype=np.int64)
    slot_of_token[token[token != EMPTY]] = np.nonzero(token != EMPTY)[0]
    is_sink = np.zeros(len(token), dtype=bool)
    if sink is not None:
        is_sink[sink[sink != EMPTY]] = True
    return Plan(
        layout=layout,
        tokens=count,
        padding=padding,
        token_of_slot=None if in_order else torch.from_numpy(token).to(device),
        slot_of_token=None if in_order else torch.from_numpy(slot_of_token).to(device),
        filled=torch.from_numpy(token != EMPTY).to(device),
        whole=bool((token != EMPTY).all()),
        near=Table.of(near, blocks, device),
        sinks=None if sink is None else Table.of(sink, blocks * size, device),
        is_sink=torch.from_numpy(is_sink).to(device) if sinks else None,
        far=tuple(Table.of(table, np.arange(len(table)), device) for table in far),
        group_of_block=tuple(torch.from_numpy(group).to(device) for group in groups),
        far_of_block=Table.of(np.concatenate(of_block, 1), blocks, device),
        level_of_place=tuple(level_of_place),
        row_bias=None if row_bias is None else row_bias.to(device),
        row_class=row_class,
    )


def _far_table(trees: list[_Tree], layout: Geometry, level: int, causal: bool) -> Ints:
    """[groups of ``level`` of the layout, places] the interaction lists of all trees."""
    parts = []
    for tree in trees:
        if tree.geometry.levels >= level:
            first = tree.first_block >> (level - 1)
            parts.append((first, _shift(tree.geometry.far_list(level, causal), first)))
    return _stack(parts, layout.group_total(level))


def _shift(table: Ints, by: int) -> Ints:
    return np.where(table == EMPTY, EMPTY, table + by)


def _stack(parts: list[tuple[int, Ints]], rows: int) -> Ints:
    """One table of ``rows`` rows from the trees' own, each starting at its row."""
    out = np.full((rows, max((p.shape[1] for _, p in parts), default=0)), EMPTY, dtype=np.int64)
    for start, part in parts:
        out[start : start + len(part), : part.shape[1]] = part
    return out


def _row_bias(
    trees: list[_Tree], blocks: int, size: int, near: int, sink: Ints | None, causal: bool
) -> tuple[Tensor | None, tuple[int, ...]]:
    """The causal mask inside a block: of its own tokens, and of sinks, which can lie behind the first queries."""
    if not causal:
        return None, ()
    places = 0 if sink is None else sink.shape[1]
    early = -(-places // size)
    row_class = np.zeros(blocks, dtype=np.int64)
    bias = torch.zeros(1 + early, size, near * size + places, dtype=torch.float32)
    bias[:, :, :size] = torch.full((size, size), -torch.inf).triu(1)
    for b in range(early):
        later = torch.arange(places) > torch.arange(b * size, (b + 1) * size)[:, None]
        bias[1 + b, :, near * size :].masked_fill_(later, -torch.inf)
        for tree in trees:
            if b < tree.geometry.blocks:
                row_class[tree.first_block + b] = 1 + b
    return bias, tuple(row_class.tolist())
