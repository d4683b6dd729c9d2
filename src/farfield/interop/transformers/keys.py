"""How many keys a setting reads, and how many vectors a decode with it has to keep; counted, not measured.

The rule: a key is read when its token or its cell is scored, by a query, or by a choice, which is divided by the
queries that share it. A cell counts once, also where its score is made of two vectors (bounds); ``bounds=2`` counts
vectors instead. Relative figures are shares of the mean causal context, (N + 1) / 2 keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from farfield.far import ByHead, Pyramid
from farfield.geometry import default_levels, geometry
from farfield.near import Blocks, Dense
from farfield.ops.expansion import ExpansionStream
from farfield.recipes import Parts

__all__ = ["context", "expansion_keys", "kept_vectors", "keys_by_head", "keys_of", "near_keys"]

Numbers = npt.NDArray[np.float64]


def context(length: int) -> float:
    """Keys that a query of exact causal attention reads on average."""
    return (length + 1) / 2


def near_keys(length: int, block: int, sinks: int) -> float:
    """Mean keys of blocks and sinks: what a head without far field reads."""
    index = np.arange(length)
    start = _start(index, block)
    return float((index - start + 1 + np.minimum(sinks, start)).mean())


def expansion_keys(
    number: int, dim: int, bounds: int = 1, *, open: int = 0, length: int = 0, block: int = 64, sinks: int = 0
) -> float:
    """What an expansion about one of ``number`` centres reads per query.

    Every token is scored by every centre once, which is ``number`` for each query, as there are as many of both; and a
    query scores the centres to find its own, one cell, and the ``open`` tokens that its centre keeps, or all that are
    far where they are fewer. Where vectors are counted (``bounds=2``), so are the sums: a matrix of D by D numbers for
    every centre and one more to answer from, D / 2 keys with their values each.
    """
    kept = np.minimum(open, np.maximum(_start(np.arange(length), block) - sinks, 0)).mean() if open else 0.0
    return float(2 * number + 1 + kept + ((number + 1) * dim / 2 if bounds > 1 else 0))


def keys_of(pyramid: Pyramid, length: int, block: int, bounds: int = 1) -> float:
    """Mean keys that a causal query reads through a pyramid, beside near field and sinks.

    A page that sinks share counts whole, so that the figure is exact wherever ``page`` divides ``sinks`` (otherwise
    it can be too high by a page).

    Args:
        pyramid: the settings.
        length, block: tokens in all, and of a leaf block.
        bounds: what a cell that is scored by its bounds counts.

    Raises:
        ValueError: for settings that are not counted: opened cells of several levels, pooled queries.
    """
    rank, levels = _integer(pyramid.rank, "rank"), pyramid.levels
    if pyramid.query_rank is not None:
        raise ValueError(f"the keys of pooled queries are not counted: {pyramid!r}")
    most = default_levels((length,), (block,))
    levels = most if levels is None else min(levels, most)
    if levels == 0:
        return 0.0
    if not pyramid.open:
        return _plain(length, block, rank, levels)
    if levels > 1:
        raise ValueError(f"the keys of cells opened on {levels} levels are not counted, on levels=1 they are")
    cell = block // rank
    page = cell if pyramid.page is None else _integer(pyramid.page, "page")
    per_cell = cell // page
    each = bounds if pyramid.choose == "bounds" else 1
    index = np.arange(length)
    start = _start(index, block)
    cells = start // cell
    readable = np.maximum(start - pyramid.sinks, 0)
    used = cells - np.minimum(cells, pyramid.sinks // cell)  # cells that hold more than sinks
    beam, beam_share = pyramid.way if per_cell > 1 else (pyramid.open, pyramid.share)
    entered = np.minimum(used, beam)
    opened = np.minimum(np.minimum(pyramid.open * page, entered * cell), readable)
    # Choices are made once for a run of queries, and the last run may be short.
    total = opened.sum() + each * cells[index % beam_share == 0].sum()
    if per_cell > 1:
        total = total + each * (entered * per_cell)[index % pyramid.share == 0].sum()
    if pyramid.rest == "keep":
        closed = used - entered
        if per_cell > 1:
            pages = entered * per_cell
            closed = closed + np.maximum(pages - pyramid.open, 0)
        total = total + closed.sum()
    return float(total / length)


def keys_by_head(parts: Parts, heads: int, length: int, bounds: int = 1) -> Numbers:
    """[heads] mean keys per query of every head of a layer; ``bounds`` as in :func:`keys_of`.

    Raises:
        ValueError: for parts whose keys are not counted.
    """
    if isinstance(parts.near, Dense) and parts.far is None:
        return np.full(heads, context(length))
    if not isinstance(parts.near, Blocks):
        raise ValueError(f"the keys that near={parts.near!r} reads are not counted; Blocks and Dense are")
    block = _integer(parts.near.block, "block")
    groups, sinks = _groups(parts.far, heads)
    counted = np.full(heads, near_keys(length, block, sinks))
    for of_group, pyramid in groups:
        counted[list(of_group)] += keys_of(pyramid, length, block, bounds)
    for x in parts.far.expansions if isinstance(parts.far, ByHead) else ():
        counted[list(x.heads)] += expansion_keys(
            x.number, x.width, bounds, open=x.open, length=length, block=block, sinks=sinks
        )
    counted[list(_exact(parts.far))] = context(length)
    return counted


def kept_vectors(parts: Parts, heads: int, kv_heads: int, length: int) -> int:
    """Vectors per layer that decoding at ``length`` tokens has to keep: keys, values and what choices score.

    All tokens of key heads whose cells are opened or that an exact head reads, of others two blocks, the sinks and what
    centres keep, as many for each as for the one with most; what choices score; summaries of plain pyramids; sums of
    expansions. What centres keep is counted as if no two lists had a token in common, at most all that are far: an
    upper bound.

    Raises:
        ValueError: for parts that are not counted.
    """
    if isinstance(parts.near, Dense) and parts.far is None:
        return 2 * kv_heads * length
    if not isinstance(parts.near, Blocks):
        raise ValueError(f"what near={parts.near!r} keeps is not counted; Blocks and Dense are")
    block = _integer(parts.near.block, "block")
    groups, sinks = _groups(parts.far, heads)
    opened = [(h * kv_heads // heads, p) for of_group, p in groups if p.open for h in of_group]
    plain = [(h * kv_heads // heads, p) for of_group, p in groups if not p.open for h in of_group]
    expansions = parts.far.expansions if isinstance(parts.far, ByHead) else ()
    near = min(length, sinks + 2 * block)
    far = max(0, (length // block - 1) * block - sinks)
    listed = [0] * kv_heads
    for x in expansions:
        for h in x.heads:
            listed[h * kv_heads // heads] += x.number * x.open
    whole = {head for head, _ in opened} | {h * kv_heads // heads for h in _exact(parts.far)}
    kept = max((min(far, listed[head]) for head in range(kv_heads) if head not in whole), default=0)
    total = 2 * (len(whole) * length + (kv_heads - len(whole)) * (near + kept))
    scored = set()
    for head, p in opened:
        sides = {block // _integer(p.rank, "rank")} | (set() if p.page is None else {_integer(p.page, "page")})
        scored |= {(head, side, p.choose) for side in sides if side > 1}
    total += sum((2 if choose == "bounds" else 1) * (length // side) for _, side, choose in scored)
    for _, p in set(plain):
        shape = geometry((length,), (block,), (_integer(p.rank, "rank"),), p.levels)
        groups_seen = sum(shape.far_list(level, True).shape[1] for level in range(1, shape.levels + 1))
        total += 2 * groups_seen * shape.rank[0]
    for x in expansions:
        # k v' row by row, the mean value, the mean key; numbers and scores of tokens kept are three times four bytes.
        of_centre = x.width + 2 + 3 * x.open / x.width
        total += round(len(x.heads) * x.number * of_centre * ExpansionStream(block, sinks).places)
    return total


def _groups(far: Any, heads: int) -> tuple[list[tuple[tuple[int, ...], Pyramid]], int]:
    if far is None:
        return [], 0
    if isinstance(far, Pyramid):
        return [(tuple(range(heads)), far)], far.sinks
    if isinstance(far, ByHead):
        return list(far.groups), far.sinks or 0
    raise ValueError(f"the keys that far={far!r} reads are not counted; Pyramid and ByHead are")


def _exact(far: Any) -> tuple[int, ...]:
    """Heads that see every token."""
    return far.exact if isinstance(far, ByHead) else ()


def _plain(length: int, block: int, rank: int, levels: int) -> float:
    shape = geometry((length,), (block,), (rank,), levels)
    queries = np.bincount(np.arange(length) // block)
    lists = [(shape.far_list(n, True)[shape.group_of_block(n)] >= 0).sum(1) for n in range(1, levels + 1)]
    return float((queries * sum(lists) * rank).sum() / length)


def _start(index: npt.NDArray[np.int64], block: int) -> npt.NDArray[np.int64]:
    """The first token of each query's near field."""
    return np.maximum((index // block - 1) * block, 0)


def _integer(value: int | tuple[int, ...], name: str) -> int:
    if isinstance(value, int):
        return value
    if len(value) != 1:
        raise ValueError(f"{name}={value!r}: keys are counted in sequences, with one number")
    return value[0]
