"""Decoding with opened cells: the tokens are kept, and with them what the choice scores, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from farfield.geometry import default_levels
from farfield.ops.cache import Cache, attend_few, exactly, grown, join_rows, room_for, write_ring
from farfield.ops.multipole.summarise import summarise
from farfield.ops.multipole.summary import Summary
from farfield.ops.opened.api import attend_choice
from farfield.ops.opened.choose import Bank, descend, make_bank
from farfield.ops.opened.leaders import leader_of
from farfield.ops.opened.tree import Tree, make_tree
from farfield.ops.state import AttentionState, merge_states
from farfield.ops.tiles import compute_dtype

__all__ = ["OpenedStream"]

Biases = tuple[Tensor | None, Tensor | None]
"""Of levels [L, Hq] and of opened tokens [Hq]."""


@lru_cache(maxsize=4)
def _tree(
    blocks: int, block: int, rank: int, levels: int | None, page: int, sinks: int, device: torch.device
) -> tuple[Tree, Tensor] | None:
    """The tables of a sequence of so many blocks, and [1, pages, page tokens] bool, the tokens that lie in cells."""
    grid = (blocks * block,)
    most = default_levels(grid, (block,))
    tree = make_tree(grid, (block,), (rank,), None if levels is None else min(levels, most), (page,), True, device)
    if tree is None:
        return None
    # The last block is still being filled, and far from nobody.
    index = torch.arange(tree.slots, device=device)
    return tree, ((index >= sinks) & (index < (blocks - 1) * block)).view(1, tree.pages, page)


@dataclass(frozen=True)
class OpenedStream:
    """The stream of a pyramid with opened cells; causal, 1-D. The arguments are those of ``opened_attention``.

    A cache holds all keys and values, the last queries, and for every level what the choice scores and
    (where closed cells are seen) their summaries. A step costs the choice, O(beam log n) cells (with ``levels=1`` all
    of level 1), and the opened tokens; when a block is complete, O(n) once (O(block) where bounds choose on one level
    and the rest is dropped).
    """

    block: int
    rank: int
    levels: int | None
    open: int
    beam: int
    page: int
    share: int
    beam_share: int
    recent: int
    keep: bool
    choose: str
    count_bias: bool
    sinks: int
    part: str
    rewind: int

    @property
    def ring(self) -> int:
        """Queries kept, so that every leader can be made after tokens were taken back."""
        return self.beam_share + self.recent + self.rewind

    def empty(self, batch: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """The cache of rows without tokens."""
        with torch.inference_mode(False):
            none = torch.zeros(batch, kv_heads, 0, dim, dtype=dtype, device=device)
            queries = torch.zeros(batch, heads, self.ring, dim, dtype=dtype, device=device)
            return {"keys": none, "values": none.clone(), "queries": queries}

    def _shape(self, blocks: int, device: torch.device) -> tuple[Tree, Tensor] | None:
        return _tree(blocks, self.block, self.rank, self.levels, self.page, self.sinks, device)

    def reserve(self, cache: Cache, length: int) -> None:
        """A quarter more room when it is used up, in whole blocks."""
        have = cache["keys"].shape[2]
        if length < have:  # the tables of a complete block already count the next
            return
        blocks = room_for(length, have) // self.block + 1
        for name in ("keys", "values"):
            cache[name] = grown(cache[name], blocks * self.block)
        shape = self._shape(blocks, cache["keys"].device)
        if shape is None:
            return
        tree = shape[0]
        batch, heads, _, dim = cache["keys"].shape
        wide = compute_dtype(cache["keys"].dtype)
        for level in range(len(tree.children) + 1):
            cells = tree.cells(level) if level else tree.pages
            width = 2 * dim if self.choose == "bounds" and (level or self.page > 1) else dim
            wanted = {f"score {level}": (width, torch.float32)}
            if self.keep and (level or tree.pages_per_cell > 1):
                wanted |= {f"key {level}": (dim, wide), f"value {level}": (dim, wide)}
            for name, (size, dtype) in wanted.items():
                if name not in cache:
                    with torch.inference_mode(False):
                        cache[name] = torch.zeros(batch, heads, 0, size, dtype=dtype, device=cache["keys"].device)
                cache[name] = grown(cache[name], cells)

    def refresh(self, cache: Cache, length: int, summary: Callable[[], Summary]) -> None:
        """What the present block's choice reads, from all blocks before it. O(length)."""
        shape = self._shape(length // self.block + 1, cache["keys"].device)
        if shape is None:
            return
        tree, valid = shape
        made = self._bank(tree, valid, cache, summary())
        bank, cells = made
        batch, heads = cache["keys"].shape[:2]
        for level, keys in enumerate(bank.keys):
            cache[f"score {level}"][:, :, : keys.shape[1]] = keys.view(batch, heads, *keys.shape[1:])
        for level, (key, value) in cells.items():
            cache[f"key {level}"][:, :, : key.shape[2]] = key
            cache[f"value {level}"][:, :, : value.shape[2]] = value

    def _advance(self, cache: Cache, length: int, summary: Callable[[], Summary]) -> None:
        """As :meth:`refresh`, when a block has just become complete. O(block) where bounds choose on one level."""
        start, above = length - self.block, self._above(cache["keys"].device)
        # Before the third block nothing was far, and nothing was made.
        if length < 3 * self.block or self.keep or above is None:
            self.refresh(cache, length, summary)
            return
        batch, heads = cache["keys"].shape[:2]
        valid = torch.arange(start, length, device=cache["keys"].device).view(1, -1, self.page) >= self.sinks
        pages = cache["keys"][:, :, start:length].reshape(-1, *valid.shape[1:], cache["keys"].shape[-1])
        bank = make_bank(above, pages.masked_fill(~valid[..., None], 0.0), valid, (), "bounds", self.count_bias)
        for level, keys in enumerate(bank.keys):
            size = keys.shape[1]
            first = start // self.block * size
            cache[f"score {level}"][:, :, first : first + size] = keys.view(batch, heads, *keys.shape[1:])

    def _above(self, device: torch.device) -> Tree | None:
        """The tables of one leaf block, where its cells have no others above them and need no summaries."""
        if self.levels != 1 or self.choose != "bounds":
            return None
        tree = make_tree((3 * self.block,), (self.block,), (self.rank,), 1, (self.page,), True, device)
        assert tree is not None
        return replace(tree, children=(tree.children[0][: self.rank],))

    def _bank(
        self, tree: Tree, valid: Tensor, cache: Cache, summary: Summary
    ) -> tuple[Bank, dict[int, tuple[Tensor, Tensor]]]:
        shown = valid.flatten()[None, None, :, None]
        key, value = (cache[name][:, :, : tree.slots].masked_fill(~shown, 0.0) for name in ("keys", "values"))
        pages = [tree.to_pages(x) for x in (key, value)]
        cells: dict[int, tuple[Tensor, Tensor]] = {}
        rows: list[Tensor] = []
        if self.keep or self.choose == "mean":
            made = summarise(
                key, value, block=self.block, rank=self.rank, levels=tree.shape.levels, summary=summary,
                key_mask=valid.view(1, -1).expand(len(key), -1),
            )  # fmt: skip
            rows = [x.flatten(0, 1).flatten(1, 2) for x in made.keys]
            if self.keep:
                sides = zip(made.keys, made.values, strict=True)
                cells = {i: (k.flatten(2, 3), v.flatten(2, 3)) for i, (k, v) in enumerate(sides, start=1)}
        if self.keep and tree.pages_per_cell > 1:
            wide = compute_dtype(key.dtype)
            weight = valid[:, None, :, :, None].to(wide)
            mean = [(x.to(wide) * weight).sum(3) / weight.sum(3).clamp(min=1) for x in pages]
            cells[0] = (mean[0], mean[1])
        return make_bank(tree, pages[0].flatten(0, 1), valid, tuple(rows), self.choose, self.count_bias), cells

    def fill(self, cache: Cache, query: Tensor, key: Tensor, value: Tensor, summary: Callable[[], Summary]) -> None:
        """A whole prefix into an empty cache."""
        length = key.shape[2]
        cache["keys"][:, :, :length], cache["values"][:, :, :length] = key, value
        write_ring(cache["queries"], query, 0)
        self.refresh(cache, length, summary)

    def step(
        self,
        cache: Cache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        *,
        scale: float,
        summary: Callable[[], Summary],
        level_bias: Tensor | None,
        page_bias: Tensor | None = None,
    ) -> AttentionState:
        """Takes T tokens in, one after the other, and attends from each."""
        states = []
        for t in range(query.shape[2]):
            at = length + t
            cache["keys"][:, :, at], cache["values"][:, :, at] = key[:, :, t], value[:, :, t]
            cache["queries"][:, :, at % self.ring] = query[:, :, t]
            if at % self.block == 0:
                self._advance(cache, at, summary)
            states.append(self._one(cache, query[:, :, t : t + 1], at, scale, (level_bias, page_bias)))
        joined = join_rows(states)
        assert isinstance(joined, AttentionState)
        return joined

    def _one(self, cache: Cache, query: Tensor, at: int, scale: float, biases: Biases) -> AttentionState:
        states = []
        wide = compute_dtype(query.dtype)
        if self.part != "far":
            first = max(0, at // self.block - 1) * self.block
            spans = [slice(0, min(self.sinks, first)), slice(first, at + 1)]
            keys, values = (torch.cat([cache[n][:, :, s] for s in spans], 2) for n in ("keys", "values"))
            with exactly(query.device):
                near = attend_few(query, keys, values, scale=scale, bias=None, dtype=wide, need_lse=True)
            assert isinstance(near, AttentionState)
            states.append(near)
        shape = self._shape(at // self.block + 1, query.device)
        if shape is not None and self.part != "near":
            with exactly(query.device):
                states.append(self._far(cache, *shape, query, at, scale, biases))
        if not states:
            nothing = query.new_full(query.shape[:-1], -torch.inf, dtype=wide)
            return AttentionState(torch.zeros_like(query), nothing)
        return merge_states(*states)

    def _far(
        self,
        cache: Cache,
        tree: Tree,
        valid: Tensor,
        query: Tensor,
        at: int,
        scale: float,
        biases: Biases,
    ) -> AttentionState:
        batch, heads = query.shape[:2]
        wide = compute_dtype(query.dtype)
        sizes = [tree.cells(level) if level else tree.pages for level in range(len(tree.children) + 1)]
        # Whole buffers, room included: a slice would be copied. Only the top level is read from end to end.
        keys = [cache[f"score {i}"].flatten(0, 1) for i in range(len(sizes))]
        keys[-1] = keys[-1][:, : sizes[-1]]
        bank = Bank(tuple(keys), _counts(tree, valid, self.count_bias, wide))
        ahead, own = (
            leader_of(cache["queries"], at, share, self.recent).flatten(0, 1)[:, None] * scale
            for share in (self.beam_share, self.share)
        )
        block = torch.tensor([at // self.block], device=query.device)
        choice = descend(tree, bank, ahead, block, self.open, self.beam, self.keep, own)
        paged = [cache[name].unflatten(2, (-1, tree.page_tokens)) for name in ("keys", "values")]
        first = 0 if tree.pages_per_cell > 1 else 1
        cells = tuple(
            [cache[f"{side} {i}"] for i in range(first, len(sizes))] if self.keep else [] for side in ("key", "value")
        )
        partly = self.sinks % self.page > 0
        state = attend_choice(
            tree, bank, choice, query.flatten(0, 1)[:, None], paged, (cells[0], cells[1]), valid if partly else None,
            *biases, batch, scale, wide, None,
        )  # fmt: skip
        return AttentionState(
            state.out[:, 0].unflatten(0, (batch, heads)), state.lse[:, 0].unflatten(0, (batch, heads))
        )


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _counts(tree: Tree, valid: Tensor, count_bias: bool, wide: torch.dtype) -> tuple[Tensor, ...]:
    """[1, cells] per level from pages up: log(count) or 0, -inf in an empty cell."""
    none = torch.zeros(1, tree.pages, tree.page_tokens, 0, dtype=wide, device=valid.device)
    rows = tuple(none.new_zeros(1, tree.cells(i), 0) for i in range(1, len(tree.children) + 1))
    return make_bank(tree, none, valid, rows, "mean", count_bias).bias
