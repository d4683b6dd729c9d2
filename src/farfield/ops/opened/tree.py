"""The tables of a descent: cells of every level, their children, and the pages of tokens under them. Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farfield.geometry import EMPTY, Geometry, Ints, geometry


@dataclass(frozen=True, eq=False)
class Tree:
    """Cells by level and pages, numbered group by group; see :func:`make_tree`.

    Attributes:
        shape: the hierarchy.
        page: tokens of a page per axis.
        token_of_slot: [pages * page tokens] the token (row-major in the grid) at each slot of the pages, ``EMPTY``
            outside the grid; None where slots are the tokens' own order, followed by empty ones.
        slots: how many there are.
        children: per level, [cells, children] cells of the level below (level 1: pages), ``EMPTY`` outside the grid.
        lists: per level below the top, [blocks, places] cells that a leaf block sees there, ``EMPTY`` where unused.
        top: [blocks, cells of the top level] bool, those that a leaf block sees.
    """

    shape: Geometry
    page: tuple[int, ...]
    token_of_slot: Tensor | None
    slots: int
    children: tuple[Tensor, ...]
    lists: tuple[Tensor, ...]
    top: Tensor

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return prod(self.page)

    @property
    def pages(self) -> int:
        """Number of pages."""
        return self.slots // self.page_tokens

    @property
    def pages_per_cell(self) -> int:
        """Pages of a level 1 cell."""
        return self.children[0].shape[1]

    def cells(self, level: int) -> int:
        """Cells of a level."""
        return self.shape.group_total(level) * self.shape.cells_per_group

    def to_pages(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] -> [B, H, pages, page tokens, ...]; 0 where a slot holds no token."""
        if self.token_of_slot is None:
            spare = self.slots - x.shape[2]
            if spare:
                x = torch.cat([x, x.new_zeros(*x.shape[:2], spare, *x.shape[3:])], 2)
        else:
            inside = (self.token_of_slot != EMPTY).view(-1, *[1] * (x.dim() - 3))
            x = x.index_select(2, self.token_of_slot.clamp(min=0)) * inside.to(x.dtype)
        return x.unflatten(2, (self.pages, self.page_tokens))


def _numbers(place: Ints, groups: tuple[int, ...], per_group: tuple[int, ...]) -> Ints:
    """Numbers of cells at ``place`` [.., dims] on the grid of all cells, group by group; EMPTY outside."""
    size = np.array(per_group)
    inside = np.all((place >= 0) & (place < np.array(groups) * size), axis=-1)
    group = np.ravel_multi_index(tuple(np.moveaxis(place // size, -1, 0)), groups, mode="clip")
    cell = np.ravel_multi_index(tuple(np.moveaxis(place % size, -1, 0)), per_group)
    return np.where(inside, group * prod(per_group) + cell, EMPTY).astype(np.int64)


def _places(groups: tuple[int, ...], per_group: tuple[int, ...]) -> Ints:
    """[cells, dims] where every cell lies on the grid of all cells, in the order of their numbers."""
    outer = np.indices(groups, dtype=np.int64).reshape(len(groups), -1).T
    inner = np.indices(per_group, dtype=np.int64).reshape(len(groups), -1).T
    return (outer[:, None] * np.array(per_group) + inner).reshape(-1, len(groups))


def _children(
    groups: tuple[int, ...],
    rank: tuple[int, ...],
    below: tuple[int, ...],
    per: tuple[int, ...],
    factor: tuple[int, ...],
) -> Ints:
    """[cells, children]: each cell cut in ``factor`` per axis; below lie ``per`` in each of ``below`` groups."""
    steps = np.indices(factor, dtype=np.int64).reshape(len(factor), -1).T
    return _numbers(_places(groups, rank)[:, None] * np.array(factor) + steps, below, per)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def make_tree(
    grid: tuple[int, ...],
    block: tuple[int, ...],
    rank: tuple[int, ...],
    levels: int | None,
    page: tuple[int, ...],
    causal: bool,
    device: torch.device,
) -> Tree | None:
    """The tables for one grid, or None where nothing is far. ``page`` divides the cell of level 1 on every axis."""
    shape = geometry(grid, block, rank, levels)
    if shape.levels == 0:
        return None
    per_block = tuple(m // s for m, s in zip(block, page, strict=True))
    children: list[Ints] = []
    lists: list[Ints] = []
    for level in range(1, shape.levels + 1):
        groups = shape.group_counts(level)
        if level == 1:
            factor = tuple(b // r for b, r in zip(per_block, rank, strict=True))
            children.append(_children(groups, rank, groups, per_block, factor))
        else:
            children.append(_children(groups, rank, shape.group_counts(level - 1), rank, (2,) * shape.dims))
        if level < shape.levels:
            far = shape.far_list(level, causal)[shape.group_of_block(level)]
            cells = far[..., None] * shape.cells_per_group + np.arange(shape.cells_per_group)
            lists.append(np.where(far[..., None] == EMPTY, EMPTY, cells).reshape(len(far), -1))
    far = shape.far_list(shape.levels, causal)[shape.group_of_block(shape.levels)]
    seen = np.zeros((len(far), shape.group_total(shape.levels) + 1), dtype=bool)
    np.put_along_axis(seen, np.where(far == EMPTY, seen.shape[1] - 1, far), True, 1)
    top = np.repeat(seen[:, :-1], shape.cells_per_group, 1)
    token = _tokens(shape, page, per_block)
    count = int((token != EMPTY).sum())
    in_order = bool((token[:count] == np.arange(count)).all())

    def tensor(table: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(table)).to(device)

    return Tree(
        shape=shape,
        page=page,
        token_of_slot=None if in_order else tensor(token),
        slots=len(token),
        children=tuple(tensor(t) for t in children),
        lists=tuple(tensor(t) for t in lists),
        top=tensor(top),
    )


def _tokens(shape: Geometry, page: tuple[int, ...], per_block: tuple[int, ...]) -> Ints:
    """[slots] the token at each place of the pages, EMPTY outside the grid."""
    place = _places(shape.group_counts(1), per_block)[:, None] * np.array(page)
    place = place + np.indices(page, dtype=np.int64).reshape(shape.dims, -1).T
    inside = np.all(place < np.array(shape.grid), axis=-1)
    token = np.ravel_multi_index(tuple(np.moveaxis(place, -1, 0)), shape.grid, mode="clip")
    return np.where(inside, token, EMPTY).reshape(-1).astype(np.int64)
