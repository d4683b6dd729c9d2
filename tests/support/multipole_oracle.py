"""Multipole attention, one query at a time, by the words of the definition: no tables, no matrices, no torch in it.

One batch entry, one head. Tokens are tuples of coordinates; a query walks over all tokens and all groups, decides by
the definition what it sees, lists (score, value) pairs and takes their softmax. For tens of tokens only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

Index = tuple[int, ...]


def published_levels(grid: Index, block: Index) -> int:
    def groups(level: int) -> list[int]:
        return [math.ceil(n / (m * 2 ** (level - 1))) for n, m in zip(grid, block, strict=True)]

    if all(c <= 2 for c in groups(1)):
        return 0
    return next(level for level in itertools.count(1) if all(c <= 4 for c in groups(level)))


class Tree:
    """Tokens, groups and cells of one grid."""

    def __init__(self, grid: Index, block: Index, rank: Index, levels: int | None = None) -> None:
        self.grid, self.block, self.rank = grid, block, rank
        self.levels = published_levels(grid, block) if levels is None else levels
        self.tokens = list(itertools.product(*(range(n) for n in grid)))

    def side(self, level: int) -> Index:
        return tuple(m * 2 ** (level - 1) for m in self.block)

    def group(self, token: Index, level: int) -> Index:
        return tuple(x // g for x, g in zip(token, self.side(level), strict=True))

    def groups(self, level: int) -> list[Index]:
        counts = (math.ceil(n / g) for n, g in zip(self.grid, self.side(level), strict=True))
        return list(itertools.product(*(range(c) for c in counts)))

    def cell(self, token: Index, level: int, rank: Index | None = None) -> Index:
        """Index in the grid of all cells of the level."""
        parts = zip(token, self.side(level), rank or self.rank, strict=True)
        return tuple(x // (g // p) for x, g, p in parts)

    def cells_of(self, group: Index) -> list[Index]:
        return [
            tuple(g * p + r for g, p, r in zip(group, self.rank, inner, strict=True))
            for inner in itertools.product(*(range(p) for p in self.rank))
        ]


def adjacent(a: Index, b: Index) -> bool:
    return all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True))


def half(a: Index) -> Index:
    return tuple(x // 2 for x in a)


def sees(tree: Tree, query: Index, level: int, group: Index, causal: bool) -> bool:
    own = tree.group(query, level)
    if adjacent(own, group) or (causal and not group < own):
        return False
    return level == tree.levels or adjacent(half(own), half(group))


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    tree: Tree,
    summarise: Callable[[int, Index, list[int]], tuple[np.ndarray, np.ndarray]],
    *,
    causal: bool = False,
    valid: list[bool] | None = None,
    scale: float | None = None,
    count_bias: bool = True,
    query_rank: Index | None = None,
    sinks: int = 0,
    level_bias: list[float] | None = None,
    part: str = "both",
) -> tuple[np.ndarray, np.ndarray]:
    """Output [N, D] and lse [N]; ``summarise(level, cell, its visible tokens)`` gives the key and value of a cell."""
    number, width = q.shape
    scale = width**-0.5 if scale is None else scale
    valid = [True] * number if valid is None else valid
    out, lse = np.zeros_like(q), np.full(number, -np.inf)
    for i, here in enumerate(tree.tokens):
        seen: list[tuple[float, np.ndarray]] = []
        for j, there in enumerate(tree.tokens):
            near = j < sinks or adjacent(tree.group(here, 1), tree.group(there, 1))
            if part != "far" and near and valid[j] and not (causal and j > i):
                seen.append((scale * float(q[i] @ k[j]), v[j]))
        for level in range(1, tree.levels + 1) if part != "near" else ():
            asking = q[i]
            if query_rank is not None:
                mine = tree.cell(here, level, query_rank)
                pool = [j for j, t in enumerate(tree.tokens) if valid[j] and tree.cell(t, level, query_rank) == mine]
                asking = q[pool].mean(0) if pool else np.zeros(width)
            for group in tree.groups(level):
                if not sees(tree, here, level, group, causal):
                    continue
                for cell in tree.cells_of(group):
                    inside = [
                        j for j, t in enumerate(tree.tokens) if tree.cell(t, level) == cell and valid[j] and j >= sinks
                    ]
                    if not inside:
                        continue
                    key, value = summarise(level, cell, inside)
                    score = scale * float(asking @ key)
                    score += math.log(len(inside)) if count_bias else 0.0
                    score += level_bias[level - 1] if level_bias is not None else 0.0
                    seen.append((score, value))
        if seen:
            top = max(s for s, _ in seen)
            total = sum(math.exp(s - top) for s, _ in seen)
            out[i] = sum(math.exp(s - top) / total * x for s, x in seen)
            lse[i] = top + math.log(total)
    return out, lse


# Summaries ------------------------------------------------------------------------------------------------------------

Summarise = Callable[[int, Index, list[int]], tuple[np.ndarray, np.ndarray]]


def mean(k: np.ndarray, v: np.ndarray) -> Summarise:
    return lambda level, cell, inside: (k[inside].mean(0), v[inside].mean(0))


def pooled(k: np.ndarray, v: np.ndarray, query: np.ndarray) -> Summarise:
    def summarise(level: int, cell: Index, inside: list[int]) -> tuple[np.ndarray, np.ndarray]:
        w = np.exp(k[inside] @ query)
        w = w / w.sum()
        return w @ k[inside], w @ v[inside]

    return summarise


def _place(index: Index, sizes: Index) -> int:
    return int(np.ravel_multi_index(tuple(x % s for x, s in zip(index, sizes, strict=True)), sizes))


def shared(k: np.ndarray, v: np.ndarray, tree: Tree, weights: list[np.ndarray]) -> Summarise:
    """``weights``: key leaf, key up, value leaf, value up, each [positions, D]."""

    def build(
        x: np.ndarray, leaf: np.ndarray, up: np.ndarray, level: int, cell: Index, inside: list[int]
    ) -> np.ndarray:
        side = tuple(g // p for g, p in zip(tree.side(1), tree.rank, strict=True))
        if level == 1:
            total = sum(leaf[_place(tree.tokens[j], side)] * x[j] for j in inside)
            return total * len(leaf) / len(inside)
        total = np.zeros(x.shape[1])
        for step in itertools.product((0, 1), repeat=len(cell)):
            child = tuple(2 * c + s for c, s in zip(cell, step, strict=True))
            below = [j for j in inside if tree.cell(tree.tokens[j], level - 1) == child]
            if below:
                total += len(below) * up[_place(step, (2,) * len(cell))] * build(x, leaf, up, level - 1, child, below)
        return total * len(up) / len(inside)

    return lambda level, cell, inside: (
        build(k, weights[0], weights[1], level, cell, inside),
        build(v, weights[2], weights[3], level, cell, inside),
    )


def learned(k: np.ndarray, v: np.ndarray, tree: Tree, weights: list[list[np.ndarray]], open_: list[bool]) -> Summarise:
    """``weights[level - 1]``: key weight [P, D, T], key bias [P, D], value's; ``open_``: tokens that are in cells."""

    def summarise(level: int, cell: Index, inside: list[int]) -> tuple[np.ndarray, np.ndarray]:
        group = tuple(c // p for c, p in zip(cell, tree.rank, strict=True))
        side = tree.side(level)
        full = math.prod(g // p for g, p in zip(side, tree.rank, strict=True))
        r = _place(cell, tree.rank)
        out = []
        for x, w, b in ((k, *weights[level - 1][:2]), (v, *weights[level - 1][2:])):
            tokens = [j for j, t in enumerate(tree.tokens) if open_[j] and tree.group(t, level) == group]
            total = sum(w[r, :, _place(tree.tokens[j], side)] * x[j] for j in tokens)
            out.append(total * full / len(inside) + b[r])
        return out[0], out[1]

    return summarise


def given(tree: Tree, keys: list[np.ndarray], values: list[np.ndarray]) -> Summarise:
    """Ready summaries, per level [groups, P, D]."""

    def summarise(level: int, cell: Index, inside: list[int]) -> tuple[np.ndarray, np.ndarray]:
        group = tree.groups(level).index(tuple(c // p for c, p in zip(cell, tree.rank, strict=True)))
        r = _place(cell, tree.rank)
        return keys[level - 1][group, r], values[level - 1][group, r]

    return summarise
