"""The index tables of the kernels: a plan's tables without holes, and turned round, from keys to their readers.

The forward kernel asks "what does this block read?"; the gradient of a key asks "who reads it?". The second question
is answered by inverse tables in compressed rows, whose long rows are cut into pieces of about equal work, so that a
coarse cell that half of all queries see is summed by many programs. Every sum has a fixed order: no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farfield.geometry import EMPTY, Geometry, Ints
from farfield.ops.multipole.plan import Plan, Table, make_plan

PIECE_TOKENS = 4096
"""Queries (of one head) that one piece of a long list of readers holds."""

FOLD_CELLS = 64
"""Cells of the lowest level that one program of the pyramid starts from."""


def compact(rows: Ints, used: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """[units, places] rows with the used ones in front (:data:`EMPTY` behind), and how many each unit has."""
    count = used.sum(1)
    width = int(count.max(initial=0))
    order = np.argsort(~used, axis=1, kind="stable")[:, :width]
    front = np.where(np.take_along_axis(used, order, 1), np.take_along_axis(rows, order, 1), EMPTY)
    return front.astype(np.int64), count.astype(np.int64)


def readers(rows: Ints, used: npt.NDArray[np.bool_], total: int) -> tuple[Ints, Ints]:
    """Which units read each of ``total`` rows.

    Returns:
        first [total + 1] and units: the readers of row i are ``units[first[i] : first[i + 1]]``, ascending.
    """
    unit, place = np.nonzero(used)
    row = rows[unit, place]
    order = np.argsort(row, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=total))])
    return first.astype(np.int64), unit[order].astype(np.int64)


def pieces(first: Ints, most: int) -> tuple[Ints, Ints, Ints]:
    """Cuts compressed rows into pieces of at most ``most`` entries, the pieces of a row of about equal size.

    Returns:
        row [pieces] of each piece; bounds [pieces, 2] of its entries; start [rows + 1], the first piece of each row.
    """
    size = np.diff(first)
    number = -(-size // most)
    start = np.concatenate([[0], np.cumsum(number)]).astype(np.int64)
    row = np.repeat(np.arange(len(size)), number).astype(np.int64)
    inside = np.arange(len(row)) - start[row]
    low = first[row] + inside * size[row] // number[row]
    high = first[row] + (inside + 1) * size[row] // number[row]
    return row, np.stack([low, high], 1).astype(np.int64), start


def hierarchy(layout: Geometry, base: int, top: int, tops: int) -> list[Ints]:
    """The cells under every cell of level ``top``, level by level, so that children follow one another.

    Cells are numbered group by group through all levels (as in the store of all levels), :data:`EMPTY` outside the
    grid. Entry k holds level ``base + k``: [programs, tops * children**(top - base - k)]; the children of its i-th
    cell are the entries ``i * children`` to ``(i + 1) * children`` of the level below.
    """
    dims = layout.dims
    offsets = np.indices((2,) * dims).reshape(dims, -1).T
    shape = tuple(c * p for c, p in zip(layout.group_counts(top), layout.rank, strict=True))
    places = np.indices(shape).reshape(dims, -1).T
    programs = -(-len(places) // tops)
    # Programs are filled up with places outside of every level's grid.
    places = np.concatenate([places, np.full((programs * tops - len(places), dims), -1 << 40)])
    out = []
    for level in range(top, base - 1, -1):
        out.append(_cell_numbers(layout, places, level).reshape(programs, -1))
        places = (places[:, None] * 2 + offsets).reshape(-1, dims)
    return out[::-1]


def _cell_numbers(layout: Geometry, places: Ints, level: int) -> Ints:
    """Number in the store of all levels of the cells at ``places`` [.., dims] of ``level``'s grid of cells."""
    counts, rank = np.array(layout.group_counts(level)), np.array(layout.rank)
    inside = ((places >= 0) & (places < counts * rank)).all(-1)
    safe = np.where(inside[:, None], places, 0)
    group = np.ravel_multi_index(tuple((safe // rank).T), tuple(counts))
    cell = np.ravel_multi_index(tuple((safe % rank).T), tuple(rank))
    before = sum(layout.group_total(lower) for lower in range(1, level))
    return np.where(inside, (before + group) * layout.cells_per_group + cell, EMPTY).astype(np.int64)


def leaf_tokens(layout: Geometry) -> tuple[Ints, Ints, Ints]:
    """How the tokens of a leaf block lie in its cells.

    Returns:
        offset [P, S]: places in the block of the S tokens of each cell, row-major in the cell; cell [block_tokens] and
        child [block_tokens]: the cell of each place, and where it lies in it.
    """
    dims, sides = layout.dims, layout.cell_side(1)
    cells = np.indices(layout.rank).reshape(dims, -1).T
    inner = np.indices(sides).reshape(dims, -1).T
    place = cells[:, None] * np.array(sides) + inner[None]
    offset = np.ravel_multi_index(tuple(np.moveaxis(place, -1, 0)), layout.block).astype(np.int64)
    cell = np.empty(layout.block_tokens, dtype=np.int64)
    child = np.empty(layout.block_tokens, dtype=np.int64)
    cell[offset] = np.arange(len(cells))[:, None]
    child[offset] = np.arange(len(inner))[None]
    return offset, cell, child


def folds(layout: Geometry, levels: int) -> list[tuple[int, int, int]]:
    """How ``levels`` of a pyramid are shared out over launches: (base level, top level, top cells per program).

    The first launch starts from tokens and builds levels 1 (its base) to its top; each further one starts from the
    top level of the one before.
    """
    children = 2**layout.dims
    out: list[tuple[int, int, int]] = []
    base = 1
    while levels and (not out or base < levels):
        top = base
        while top < levels and children ** (top + 1 - base) <= FOLD_CELLS:
            top += 1
        tops = 1
        while 2 * tops * children ** (top - base) <= FOLD_CELLS:
            tops *= 2
        out.append((base, top, tops))
        base = top
    return out


@dataclass(frozen=True, eq=False)
class Readers:
    """Who reads the rows of a store, cut into pieces; int32, on the device.

    Attributes:
        first, units: the readers (leaf blocks) of all rows in compressed form, as :func:`readers` gives them.
        row, low, high: per piece, its row and its entries of ``units``.
        start: [rows + 1] the first piece of each row.
    """

    first: Tensor
    units: Tensor
    row: Tensor
    low: Tensor
    high: Tensor
    start: Tensor

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return len(self.row)

    @property
    def rows(self) -> int:
        """Number of rows of the store."""
        return len(self.start) - 1

    @staticmethod
    def of(rows: Ints, used: npt.NDArray[np.bool_], total: int, most: int, device: torch.device) -> Readers:
        """From a table of what every unit reads."""
        first, units = readers(rows, used, total)
        row, bounds, start = pieces(first, most)
        return Readers(*(_tensor(x, device) for x in (first, units, row, bounds[:, 0], bounds[:, 1], start)))


@dataclass(frozen=True, eq=False)
class Sinks:
    """Leading tokens that are always seen: ``slots`` [sets, places] (EMPTY where unused), the set of each block."""

    slots: Tensor
    set_of_block: Tensor
    readers: Readers


@dataclass(frozen=True, eq=False)
class Fold:
    """One launch of the pyramid: the cells of each of its levels, lowest first, as :func:`hierarchy` gives them."""

    base: int
    top: int
    cells: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Tables:
    """Everything the kernels look up; int32, on the device.

    Attributes:
        plan: what they were made from.
        slots: the token at each slot (EMPTY for none); None where they are the same, up to padding at the end.
        near, near_count: blocks read by each block, itself first, and how many.
        far, far_count: rows (of the store of all levels) read by each block, and how many.
        level_of_row: level (0-based) of each row of the store.
        near_readers, far_readers: the inverse tables.
        sinks: or None.
        offset, cell, child: :func:`leaf_tokens`.
        folds: the launches of the pyramid.
        rows: rows of the store of all levels; ``cells``: its cells.
    """

    plan: Plan
    slots: Tensor | None
    near: Tensor
    near_count: Tensor
    far: Tensor
    far_count: Tensor
    level_of_row: Tensor
    near_readers: Readers
    far_readers: Readers
    sinks: Sinks | None
    offset: Tensor
    cell: Tensor
    child: Tensor
    folds: tuple[Fold, ...]
    rows: int

    @property
    def cells(self) -> int:
        """Cells of all levels."""
        return self.rows * self.plan.layout.cells_per_group


def _tensor(x: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.astype(np.int32))).to(device)


def _arrays(table: Table) -> tuple[Ints, npt.NDArray[np.bool_]]:
    return table.rows.cpu().numpy(), table.used.cpu().numpy()


def make_tables(
    grid: tuple[int, ...],
    lengths: tuple[int, ...] | None,
    block: tuple[int, ...],
    rank: tuple[int, ...],
    levels: int | None,
    causal: bool,
    sinks: int,
    device: torch.device,
) -> Tables:
    """Tables of a plan; the arguments are those of :func:`farfield.ops.multipole.plan.make_plan`."""
    return _make_tables(make_plan(grid, lengths, block, rank, levels, causal, sinks, device), device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or the tables of an evaluation could not serve a later training step
def _make_tables(plan: Plan, device: torch.device) -> Tables:
    layout = plan.layout
    levels = layout.levels
    most = max(1, PIECE_TOKENS // prod(layout.block))
    near, far = _arrays(plan.near), _arrays(plan.far_of_block)
    near_rows, near_count = compact(*near)
    far_rows, far_count = compact(*far)
    totals = [layout.group_total(level) for level in range(1, levels + 1)]
    offset, cell, child = leaf_tokens(layout)
    return Tables(
        plan=plan,
        slots=None if plan.padding is not None or plan.token_of_slot is None else plan.token_of_slot.to(torch.int32),
        near=_tensor(near_rows, device),
        near_count=_tensor(near_count, device),
        far=_tensor(far_rows, device),
        far_count=_tensor(far_count, device),
        level_of_row=_tensor(np.repeat(np.arange(levels), totals), device),
        near_readers=Readers.of(*near, layout.blocks, layout.blocks, device),
        far_readers=Readers.of(*far, sum(totals), most, device),
        sinks=_sinks(plan.sinks, layout.blocks, most, device),
        offset=_tensor(offset, device),
        cell=_tensor(cell, device),
        child=_tensor(child, device),
        folds=tuple(
            Fold(base, top, tuple(_tensor(x, device) for x in hierarchy(layout, base, top, tops)))
            for base, top, tops in folds(layout, levels)
        ),
        rows=sum(totals),
    )


def _sinks(table: Table | None, blocks: int, most: int, device: torch.device) -> Sinks | None:
    """Blocks of one sequence share one set of sinks; the sets are told apart by their first slot."""
    if table is None:
        return None
    rows, used = _arrays(table)
    seeing = used[:, 0]
    _, lead, which = np.unique(rows[seeing, 0], return_index=True, return_inverse=True)
    leaders = np.flatnonzero(seeing)[lead]
    slots = np.where(used[leaders], rows[leaders], EMPTY)
    set_of_block = np.full(blocks, EMPTY, dtype=np.int64)
    set_of_block[seeing] = which
    reads = Readers.of(np.maximum(set_of_block, 0)[:, None], seeing[:, None], len(slots), most, device)
    return Sinks(_tensor(slots, device), _tensor(set_of_block, device), reads)
