"""Grids, levels, groups and interaction lists: integers only, no attention in it.

The vocabulary (per axis a of a grid of shape ``grid``):

- a *leaf block* has side ``block[a]``; it is also the *group* of level 1;
- a *group* of level l has side ``block[a] * 2**(l-1)``; there are ``ceil(grid[a] / side)`` of them;
- a group is cut into ``rank[a]`` *cells* per axis; a cell is what gets one summary;
- two groups of one level are *adjacent* when their indices differ by at most 1 on every axis;
- the *near field* of a block is the tokens of its adjacent blocks;
- the *interaction list* of a group holds the groups of its level through which its tokens see the far field: the
  children of the parent's neighbours that are not neighbours themselves, and at the top level every group that is not
  a neighbour.

Every token is seen by every query exactly once (for a causal operator: every past token), in the near field or
through one group.

Source: Fast Multipole Attention, arXiv 2310.11960, section 3, generalised to any length, to 2-D and to 3-D.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]

EMPTY = -1
"""Marks an unused place of a table."""


def integers(value: object, name: str) -> tuple[int, ...]:
    """One integer or a sequence of them (of any integer type) as a tuple; TypeError for anything else."""
    many: Sequence[Any] = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if torch.compiler.is_compiling():
        return tuple(many)  # lengths are symbols
    try:
        if any(isinstance(v, bool) for v in many):
            raise TypeError
        return tuple(operator.index(v) for v in many)
    except TypeError:
        raise TypeError(f"{name}={value!r}: an integer, or a sequence of integers, one per axis, is needed") from None


def per_axis(value: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    """One positive integer per axis, from one integer for all of them or one for each.

    Raises:
        TypeError: for anything but integers.
        ValueError: when the length is not ``dims`` or a value is below 1.
    """
    given = integers(value, name)
    values = given if isinstance(value, Sequence) else given * dims
    if len(values) != dims or any(v < 1 for v in values):
        raise ValueError(
            f"{name}={value!r} does not fit a {dims}-D grid: give one integer >= 1, or {dims} of them, one per axis"
        )
    return values


def check_divides(name: str, rank: tuple[int, ...], block: tuple[int, ...]) -> None:
    """Raises ValueError unless ``rank`` divides ``block`` on every axis, naming the ranks that would."""
    for axis, (p, m) in enumerate(zip(rank, block, strict=True)):
        if m % p:
            divisors = [d for d in range(1, m + 1) if m % d == 0]
            raise ValueError(f"{name}={p} does not divide block={m} (axis {axis}): one of {divisors} would be accepted")


def default_levels(grid: Sequence[int], block: Sequence[int]) -> int:
    """Levels of the published hierarchy.

    0 if every axis has at most 2 blocks, otherwise the least number of levels (>= 1) whose top level has at most 4
    groups on every axis. For n / block a power of two this is log2(n / block) - 1.
    """
    counts = [-(-n // m) for n, m in zip(grid, block, strict=True)]
    if max(counts) <= 2:
        return 0
    levels = 1
    while max(counts) > 4:
        counts = [-(-c // 2) for c in counts]
        levels += 1
    return levels


@dataclass(frozen=True)
class Geometry:
    """The hierarchy over one grid. Build it with :func:`geometry`, which checks its arguments."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    rank: tuple[int, ...]
    levels: int

    @property
    def dims(self) -> int:
        """Axes of the grid."""
        return len(self.grid)

    @property
    def tokens(self) -> int:
        """N, tokens of the grid."""
        return prod(self.grid)

    @property
    def block_tokens(self) -> int:
        """Tokens of a full leaf block."""
        return prod(self.block)

    @property
    def cells_per_group(self) -> int:
        """P, cells into which a group is cut."""
        return prod(self.rank)

    def group_side(self, level: int) -> tuple[int, ...]:
        """Side of a group of ``level`` (1 = leaf blocks), in tokens, per axis."""
        return tuple(m << (level - 1) for m in self.block)

    def group_counts(self, level: int) -> tuple[int, ...]:
        """Groups of ``level`` per axis."""
        return tuple(-(-n // g) for n, g in zip(self.grid, self.group_side(level), strict=True))

    def group_total(self, level: int) -> int:
        """Groups of ``level``."""
        return prod(self.group_counts(level))

    def cell_side(self, level: int) -> tuple[int, ...]:
        """Side of a cell of ``level``, in tokens, per axis."""
        return tuple(g // p for g, p in zip(self.group_side(level), self.rank, strict=True))

    @cached_property
    def blocks(self) -> int:
        """Number of leaf blocks."""
        return self.group_total(1)

    def group_of_block(self, level: int) -> Ints:
        """[blocks] the group of ``level`` that holds each leaf block."""
        index = np.indices(self.group_counts(1)).reshape(self.dims, -1) >> (level - 1)
        return np.ravel_multi_index(tuple(index), self.group_counts(level)).astype(np.int64)

    def near_list(self, causal: bool = False) -> Ints:
        """[blocks, places] the leaf blocks whose tokens a block sees exactly; the block itself is always in place 0."""
        own = self._places(1)
        steps = [s for s in itertools.product((0, -1, 1), repeat=self.dims) if not (causal and s > (0,))]
        other = own[:, None, :] + np.array(steps)
        return _compact(*self._numbers(other, 1))

    def far_list(self, level: int, causal: bool = False) -> Ints:
        """[groups of level, places] the interaction list of every group of ``level``, :data:`EMPTY` where unused."""
        own = self._places(level)
        if level == self.levels:
            other = np.broadcast_to(own[None], (len(own), *own.shape))
        else:
            children = np.array(list(itertools.product(range(-2, 4), repeat=self.dims)))
            other = (own // 2 * 2)[:, None, :] + children
        far = (np.abs(other - own[:, None, :]) > 1).any(-1)
        if causal:
            far &= other[..., 0] < own[:, None, 0]
        number, inside = self._numbers(other, level)
        return _compact(number, inside & far)

    def _places(self, level: int) -> Ints:
        """[groups, dims] where every group of ``level`` lies, row-major."""
        return np.indices(self.group_counts(level), dtype=np.int64).reshape(self.dims, -1).T

    def _numbers(self, places: Ints, level: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Row-major numbers of groups of ``level`` at ``places`` [.., dims], and which of them lie in the grid."""
        counts = self.group_counts(level)
        inside = np.all((places >= 0) & (places < np.array(counts)), axis=-1)
        return np.ravel_multi_index(tuple(np.moveaxis(places, -1, 0)), counts, mode="clip"), inside

    def token_of_slot(self) -> Ints:
        """[blocks * block_tokens] the token (row-major in the grid) at each slot, :data:`EMPTY` outside the grid.

        The block order keeps the tokens of a leaf block together, blocks row-major and tokens row-major in the block.
        """
        inside = np.ones((), dtype=bool)
        flat = np.zeros((), dtype=np.int64)
        for a, (n, m, c) in enumerate(zip(self.grid, self.block, self.group_counts(1), strict=True)):
            shape = [1] * (2 * self.dims)
            shape[a], shape[self.dims + a] = c, m
            position = np.arange(c * m).reshape(shape)
            inside = inside & (position < n)
            flat = flat * n + position
        return np.where(inside, flat, EMPTY).reshape(-1)


def _compact(values: Ints, keep: npt.NDArray[np.bool_]) -> Ints:
    """Moves the kept values of every row to its front, in order, and cuts the table to the longest row."""
    width = int(keep.sum(1).max(initial=0))
    order = np.argsort(~keep, axis=1, kind="stable")[:, :width]
    return np.where(np.take_along_axis(keep, order, 1), np.take_along_axis(values, order, 1), EMPTY).astype(np.int64)


@lru_cache(maxsize=256)
def geometry(
    grid: tuple[int, ...], block: int | tuple[int, ...], rank: int | tuple[int, ...], levels: int | None = None
) -> Geometry:
    """The hierarchy over ``grid``.

    Args:
        grid: lengths n_a >= 1 of one, two or three axes.
        block: side of a leaf block in tokens, one integer or one per axis.
        rank: summaries of a group per axis; divides ``block`` on every axis.
        levels: coarse levels; None takes the published number (:func:`default_levels`). A smaller number (>= 1) makes
            the top level hold more groups; a larger one is an error.

    Raises:
        ValueError: with what was given and what would be accepted.
    """
    if not 1 <= len(grid) <= 3 or any(n < 1 for n in grid):
        raise ValueError(f"grid={grid!r}: give one, two or three lengths, each >= 1")
    dims = len(grid)
    m, p = per_axis(block, dims, "block"), per_axis(rank, dims, "rank")
    check_divides("rank", p, m)
    most = default_levels(grid, m)
    if levels is None:
        levels = most
    elif not min(1, most) <= levels <= most:
        accepted = "0" if most == 0 else f"1 to {most}"
        raise ValueError(f"levels={levels} for grid={grid} and block={m}: {accepted} would be accepted (or None)")
    return Geometry(tuple(grid), m, p, levels)
