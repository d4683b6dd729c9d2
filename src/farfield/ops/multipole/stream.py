"""The multipole operator one step at a time: a query needs the last blocks and a few groups of every level.

A query of leaf block b sees, at level l below the top, the groups from 2 (b_{l+1} - 1) to b_l - 2, where b_l is its
group: one or two. At the top level of a prefix it sees all groups up to b_L - 2; since a top level has at most four
groups, these are the same as if there were more levels, at which it sees nothing. So what a causal query reads does not
depend on how many tokens follow: row i of every prefill that holds it is the same, and no summary has to be made twice.

The group that completes at level l, number g, is made of the groups 2 g and 2 g + 1 of the level below, which are
still there. Four groups per level suffice, also after taking back up to a block of tokens. Everything lies in one
buffer of keys and one of values: [sinks | last blocks | 4 groups of level 1 | 4 groups of level 2 | ...], with one bias
that hides what the present block does not see. With an explicit number of levels, the top level keeps all its groups,
so that the buffers grow with the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farfield.ops.cache import Cache, attend_few, exactly, grown, join_rows
from farfield.ops.multipole.summary import PooledSummary, SharedSummary
from farfield.ops.state import AttentionState
from farfield.ops.tiles import compute_dtype

__all__ = ["MultipoleStream", "Turn", "Weights"]

GROUPS = 4
"""Groups kept per level."""

Kept = str | SharedSummary | PooledSummary
"""A summary that makes larger cells from smaller ones."""

Turn = Callable[[Tensor, int, int], Tensor]
"""(cells [B, H, C, D], level, number of the first cell) -> the same rotated by the positions of their centres."""


@dataclass(frozen=True)
class Weights:
    """What a call computes with, made when it is needed: for most tokens, not at all.

    Attributes:
        summary: "mean", a SharedSummary or a PooledSummary.
        level_bias: [levels or more, Hq] or None.
        turn: rotates summaries, where keys are summarised before their rotation.
    """

    summary: Callable[[], Kept] = field(default=lambda: "mean")
    level_bias: Callable[[], Tensor | None] = field(default=lambda: None)
    turn: Turn | None = None


@dataclass(frozen=True)
class MultipoleStream:
    """The operator on a cache; 1-D and causal. Weights come with every call, tokens in the order of their positions.

    Attributes:
        block, rank, levels, count_bias, sinks, part: as in :func:`farfield.multipole_attention`.
        rewind: tokens that can be taken back, at most ``block``.
        raw: keys are summarised before their rotation, which must be given beside the rotated ones.

    Caches hold ``keys`` and ``values`` [B, Hkv, M, D] in the precision of the arithmetic, ``bias`` [B, 1 or Hq, M],
    and where needed ``raw`` (keys before rotation) and ``mass`` [B, Hkv, M, 1] (log mass of pooled cells).
    """

    block: int
    rank: int
    levels: int | None
    count_bias: bool
    sinks: int
    part: str
    rewind: int = 0
    raw: bool = False

    @property
    def ring(self) -> int:
        """Places of recent tokens: the query's own block and the one before it, and what may be taken back."""
        return self.block * ((1 if self.part == "far" else 2) + -(-self.rewind // self.block))

    @property
    def far(self) -> bool:
        """Whether summaries are kept."""
        return self.part != "near"

    def why_not(self) -> str | None:
        """Why these settings cannot be streamed, or None."""
        if self.rewind > self.block:
            return f"rewind={self.rewind}: groups are kept for taking back up to block={self.block} tokens"
        if self.levels is not None and self.levels < 1:
            return f"levels={self.levels}: longer prefixes have far groups, and need at least one level"
        return None

    def empty(
        self,
        batch: int,
        heads: int,
        key_heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        biased: bool = False,
        pooled: bool = False,
    ) -> Cache:
        """A cache of nothing. ``biased``: level biases will be given; ``pooled``: the summary is a PooledSummary."""
        wide = compute_dtype(dtype)
        places = self._offset(2) if self.far else self._offset(1)
        made = {"keys": width, "values": width}
        if self.far and self.raw:
            made["raw"] = width
        if self.far and pooled:
            made["mass"] = 1
        with torch.inference_mode(False):
            cache = {
                name: torch.zeros(batch, key_heads, places, size, dtype=wide, device=device)
                for name, size in made.items()
            }
            shape = (batch, heads if biased and self.far else 1, places)
            cache["bias"] = torch.full(shape, -torch.inf, dtype=wide, device=device)
        return cache

    def _offset(self, level: int) -> int:
        """Where the cells of ``level`` begin."""
        return self.sinks + self.ring + (level - 1) * GROUPS * self.rank

    def _place(self, level: int, group: int) -> int:
        """Where the cells of a group begin."""
        return self._offset(level) + (group if level == self.levels else group % GROUPS) * self.rank

    def _slot(self, position: int) -> int:
        """Where a token lies."""
        return position if position < self.sinks else self.sinks + position % self.ring

    def tokens(self, cache: Cache, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, stop - start, D] of recent tokens that lie in one leaf block, sinks among them."""
        first = min(max(start, self.sinks), stop)
        spans = slice(start, first), slice(self._slot(first), self._slot(first) + stop - first)
        if start == first:
            return cache["keys"][:, :, spans[1]], cache["values"][:, :, spans[1]]
        key, value = (torch.cat([cache[name][:, :, s] for s in spans], 2) for name in ("keys", "values"))
        return key, value

    def _held(self, cache: Cache) -> int:
        """Levels for which there is room."""
        held = (cache["keys"].shape[2] - self._offset(1)) // (GROUPS * self.rank)
        return held if self.levels is None else min(held, self.levels)

    def reserve(self, cache: Cache, length: int) -> None:
        """Makes room for the groups that are complete at a length: one more level when the length has doubled."""
        if not self.far:
            return
        blocks = length // self.block
        top = max(1, blocks.bit_length())
        if self.levels is not None and top >= self.levels:
            groups = max(GROUPS, blocks >> (self.levels - 1))
            need = self._offset(self.levels) + groups * self.rank
            if need > cache["keys"].shape[2] and groups > GROUPS:
                need = self._offset(self.levels) + (1 << (groups - 1).bit_length()) * self.rank
        else:
            need = self._offset(top + 1)
        for name in cache:
            cache[name] = grown(cache[name], need, -torch.inf if name == "bias" else 0.0)

    def open_block(self, cache: Cache, length: int, weights: Weights) -> None:
        """Hides and shows what the query at position ``length`` sees of what lies before it. O(rank levels)."""
        bias, block = cache["bias"], length // self.block
        bias.fill_(-torch.inf)
        if self.part != "far":
            bias[:, :, : min(self.sinks, length)] = 0.0
            for b in (block - 1, block):
                start, stop = max(b * self.block, self.sinks, 0), min((b + 1) * self.block, length)
                if start < stop:
                    bias[:, :, self._slot(start) : self._slot(start) + stop - start] = 0.0
        if not self.far:
            return
        level_bias = weights.level_bias()
        for level in range(1, self._held(cache) + 1):
            first = 0 if level == self.levels else max(0, 2 * ((block >> level) - 1))
            last = (block >> (level - 1)) - 2
            runs = [(first, last + 1)] if level == self.levels else [(g, g + 1) for g in range(first, last + 1)]
            for start, stop in runs:
                if start < stop:
                    place = self._place(level, start)
                    shown = self._shown(level, start, stop, bias)
                    if level_bias is not None:
                        shown = shown + level_bias[level - 1].to(bias)[:, None]
                    bias[:, :, place : place + (stop - start) * self.rank] = shown

    def _shown(self, level: int, start: int, stop: int, like: Tensor) -> Tensor:
        """[cells of the groups] log(count), or 0; -inf for a cell that sinks leave empty."""
        side = (self.block << (level - 1)) // self.rank
        if start * side * self.rank >= self.sinks:
            return like.new_full((1,), math.log(side) if self.count_bias else 0.0)
        count = self._counts(side, start * self.rank, (stop - start) * self.rank, like)
        return count.log() if self.count_bias else torch.where(count > 0, 0.0, -torch.inf).to(like)

    def _counts(self, side: int, first: int, cells: int, like: Tensor) -> Tensor:
        """[cells] tokens that are no sinks, of cells of ``side`` tokens from number ``first``."""
        start = (torch.arange(cells, device=like.device) + first) * side
        return side - (self.sinks - start).clamp(0, side).to(like.dtype)

    def step(
        self,
        cache: Cache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        *,
        scale: float,
        weights: Weights | None = None,
        raw: Tensor | None = None,
        need_lse: bool = True,
    ) -> AttentionState | Tensor:
        """Takes tokens in and attends from each, block by block.

        Args:
            cache: changed; :meth:`reserve` made room for ``length + T`` tokens.
            query: [B, Hq, T, D].
            key, value: [B, Hkv, T, D].
            length: tokens in the cache.
            scale: factor of the scores.
            weights: the same in every call; None for means without biases.
            raw: keys before their rotation, where ``self.raw``.
            need_lse: whether the log-sum-exp is wanted; the far part alone always gives it.

        Returns:
            out [B, Hq, T, D], and lse [B, Hq, T] where it is wanted: the rows of the operator on the whole prefix.

        Time O(T (block + rank levels)), and O(block + rank levels) more for every block that completes.
        """
        tokens, done = query.shape[2], 0
        states: list[AttentionState | Tensor] = []
        weights = weights or Weights()
        first = self._offset(1) if self.part == "far" else 0
        need_lse = need_lse or self.part == "far"  # a far part may see nothing
        with exactly(key.device):
            while done < tokens:
                at = length + done
                stop = min(tokens, done + self.block - at % self.block)
                if at < self.sinks:
                    stop = min(stop, done + self.sinks - at)
                if at % self.block == 0:
                    self.open_block(cache, at, weights)
                slot, piece = self._slot(at), slice(done, stop)
                places = slice(slot, slot + stop - done)
                cache["keys"][:, :, places] = key[:, :, piece]
                cache["values"][:, :, places] = value[:, :, piece]
                if self.raw and raw is not None and "raw" in cache:
                    cache["raw"][:, :, places] = raw[:, :, piece]
                bias = cache["bias"]
                if self.part != "far":
                    bias[:, :, places] = 0.0
                shown = bias[:, :, None, first:]
                if self.part != "far" and stop - done > 1:
                    later = bias.new_full((stop - done, stop - done), -torch.inf).triu_(1)
                    shown = shown.expand(-1, -1, stop - done, -1).clone()
                    shown[..., places] = later
                states.append(
                    attend_few(
                        query[:, :, piece], cache["keys"][:, :, first:], cache["values"][:, :, first:],
                        scale=scale, bias=shown, dtype=bias.dtype, need_lse=need_lse,
                    )
                )  # fmt: skip
                done = stop
                if self.far and (length + done) % self.block == 0:
                    self._complete(cache, at // self.block, weights)
        return join_rows(states)

    def _complete(self, cache: Cache, block: int, weights: Weights) -> None:
        """Summarises a leaf block, and every larger group that ends with it."""
        start = self.sinks + block * self.block % self.ring
        span = slice(start, start + self.block)
        source, summary, turn = "raw" if "raw" in cache else "keys", weights.summary(), weights.turn
        cells = self._leaf(summary, cache[source][:, :, span], cache["values"][:, :, span], block)
        level, group = 1, block
        self._store(cache, cells, level, group, turn)
        while group % 2 and level != self.levels:
            start = self._place(level, group - 1)
            span = slice(start, start + 2 * self.rank)
            below = _Cells(
                cache[source][:, :, span],
                cache["values"][:, :, span],
                cache["mass"][:, :, span, 0] if "mass" in cache else None,
            )
            level, group = level + 1, group // 2
            cells = self._up(summary, below, level, group)
            self._store(cache, cells, level, group, turn)

    def _store(self, cache: Cache, cells: _Cells, level: int, group: int, turn: Turn | None) -> None:
        """Writes the cells of a run of groups that lie side by side."""
        place = self._place(level, group)
        span = slice(place, place + cells.key.shape[2])
        cache["values"][:, :, span] = cells.value
        if "raw" in cache:
            cache["raw"][:, :, span] = cells.key
        cache["keys"][:, :, span] = cells.key if turn is None else turn(cells.key, level, group * self.rank)
        if cells.mass is not None:
            cache["mass"][:, :, span, 0] = cells.mass

    def _leaf(self, summary: Kept, key: Tensor, value: Tensor, block: int) -> _Cells:
        """Cells of level 1 of whole blocks [B, H, blocks * block, D], the first being number ``block``."""
        side = self.block // self.rank
        counts = None
        if block * self.block < self.sinks:
            positions = torch.arange(key.shape[2], device=key.device) + block * self.block
            counts = (positions >= self.sinks).to(key.dtype).view(-1, side)
            # What lies in the places of sinks is no part of any cell, not even times 0.
            hidden = (positions < self.sinks)[:, None]
            key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        weights = (summary.key_leaf, summary.value_leaf) if isinstance(summary, SharedSummary) else None
        mass = None
        if isinstance(summary, PooledSummary):
            query = summary.query.to(key.dtype).expand(key.shape[1], -1)
            mass = torch.einsum("bhsd,hd->bhs", key, query)
            if counts is not None:
                mass = mass.masked_fill(counts.view(-1) == 0, -torch.inf)
        return _reduce(_Cells(key, value, mass), side, weights, counts)

    def _up(self, summary: Kept, below: _Cells, level: int, group: int) -> _Cells:
        """Cells of whole groups of ``level``, the first being number ``group``, from those of the level below."""
        side = (self.block << (level - 2)) // self.rank
        counts = None
        if group * (self.block << (level - 1)) < self.sinks:
            counts = self._counts(side, 2 * group * self.rank, below.key.shape[2], below.key).view(-1, 2)
        weights = (summary.key_up, summary.value_up) if isinstance(summary, SharedSummary) else None
        return _reduce(below, 2, weights, counts)

    def fill(
        self,
        cache: Cache,
        key: Tensor,
        value: Tensor,
        *,
        weights: Weights | None = None,
        raw: Tensor | None = None,
    ) -> None:
        """Takes a whole prefix [B, Hkv, N, D] into an empty cache, without attending. O(N) time."""
        number, dtype = key.shape[2], cache["keys"].dtype
        weights = weights or Weights()
        summary, turn = weights.summary(), weights.turn
        block = number // self.block
        sides = {"keys": key, "values": value}
        if "raw" in cache and raw is not None:
            sides["raw"] = raw
        for name, x in sides.items():
            cache[name][:, :, : min(self.sinks, number)] = x[:, :, : self.sinks]
            for b in range(max(0, block + 1 - self.ring // self.block), block + 1):
                start, stop = max(b * self.block, self.sinks), min((b + 1) * self.block, number)
                if start < stop:
                    cache[name][:, :, self._slot(start) : self._slot(start) + stop - start] = x[:, :, start:stop]
        if self.far and block:
            with exactly(key.device):
                source = sides.get("raw", key)
                whole = slice(0, block * self.block)
                cells = self._leaf(summary, source[:, :, whole].to(dtype), value[:, :, whole].to(dtype), 0)
                level, groups = 1, block
                while True:
                    self._store_last(cache, cells, level, groups, turn)
                    groups //= 2
                    if not groups or level == self.levels:
                        break
                    level += 1
                    cells = self._up(summary, cells.part(0, 2 * groups * self.rank), level, 0)
        self.open_block(cache, number, weights)

    def _store_last(self, cache: Cache, cells: _Cells, level: int, groups: int, turn: Turn | None) -> None:
        if level == self.levels:
            self._store(cache, cells, level, 0, turn)
            return
        for group in range(max(0, groups - GROUPS), groups):
            self._store(cache, cells.part(group * self.rank, (group + 1) * self.rank), level, group, turn)


@dataclass(frozen=True)
class _Cells:
    """Keys and values [B, H, C, D] of cells (or tokens) side by side; log mass [B, H, C] of pooled ones."""

    key: Tensor
    value: Tensor
    mass: Tensor | None = None

    def part(self, start: int, stop: int) -> _Cells:
        span = slice(start, stop)
        mass = None if self.mass is None else self.mass[:, :, span]
        return _Cells(self.key[:, :, span], self.value[:, :, span], mass)


def _reduce(below: _Cells, size: int, weights: tuple[Tensor, Tensor] | None, counts: Tensor | None) -> _Cells:
    """Every ``size`` neighbours become one: by their mass, by weights [Hw, size, D], or their mean.

    ``counts`` [C, size] are the valid tokens of each child, None where all are full.
    """
    key, value = below.key.unflatten(2, (-1, size)), below.value.unflatten(2, (-1, size))
    if below.mass is not None:
        mass = below.mass.unflatten(2, (-1, size))
        total = mass.logsumexp(-1)
        share = (mass - torch.where(total == -torch.inf, 0.0, total)[..., None]).exp()[..., None, :]
        return _Cells((share @ key).squeeze(-2), (share @ value).squeeze(-2), total)
    factor = None
    if counts is not None:
        total = counts.sum(-1, keepdim=True)
        factor = torch.where(total > 0, size * counts / total.clamp(min=1.0), 0.0)[..., None]
    sums = []
    for i, x in enumerate((key, value)):
        part = x if factor is None else x * factor
        if weights is None:
            sums.append(part.mean(-2))
        else:
            weight = weights[i].to(x.dtype)
            sums.append((part * weight[:, None]).sum(-2))
    return _Cells(*sums)
