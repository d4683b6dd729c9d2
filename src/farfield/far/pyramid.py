"""Pyramid: the far field of Fast Multipole Attention, a hierarchy of summaries of everything outside the near field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.geometry import Geometry, default_levels, geometry, integers, per_axis
from farfield.merge import AttentionState
from farfield.near.blocks import Blocks
from farfield.ops.cache import Cache
from farfield.ops.multipole import multipole_attention, multipole_rows
from farfield.ops.multipole.stream import MultipoleStream, Turn, Weights
from farfield.ops.multipole.summarise import cell_centres, summarise
from farfield.ops.multipole.summary import (
    LearnedSummary,
    LevelWeights,
    PooledSummary,
    SharedSummary,
    Summaries,
    Summary,
    averaging,
)
from farfield.ops.opened import opened_attention
from farfield.ops.opened.api import check_options
from farfield.ops.opened.stream import OpenedStream
from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["Pyramid"]

MAX_LEVELS = 32
"""Rows of the learned bias: enough for 2**32 leaf blocks on an axis."""

FAST = 10.0
"""The level bias is stored as its offset from the start, divided by this.

Adam's steps do not depend on scale, so the bias moves ten times as far; and weight decay pulls it towards quiet.
"""


_OF_PAGES = ("beam", "page", "share", "beam_share", "recent", "rest", "choose")
"""Options that say nothing where nothing is opened."""


@dataclass(frozen=True)
class Pyramid(FarPart):
    """Far tokens through summaries of groups that double in side from level to level.

    The exact complement of the near field :class:`farfield.near.Blocks`: every token is seen once, itself or in one
    summary. With merge="softmax" both are computed by one operator. Causal-safe, since far groups are complete and
    strictly past. Source: Fast Multipole Attention, arXiv 2310.11960.

    Args:
        rank: summaries of a group per axis; divides the block.
        summary: "shared" (one small set of weights for all levels, any length), "pooled" (softmax over the cell),
            "mean" (no parameters) or "learned" (the paper's: weights per level, linear in the length, which they fix).
        levels: coarse levels; None for the published number.
        count_bias: a summary of ``count`` tokens weighs as many tokens.
        query_rank: pool queries too (linear cost); not causal.
        sinks: leading tokens that are always seen exactly.
        bias: where the learned bias per level and head starts. Far below 0, so that the far field starts quiet and
            has to earn its weight; it can move fast. None: no bias.
        rope: with a rotary embedding, "tokens" rotates keys before they are summarised, "cells" rotates each summary
            by the position of its cell's centre.
        grid: the grid that summary="learned" is made for; None otherwise.
        open: pages of tokens that each query head opens for itself: the cells with the largest mass leave the sum and
            their tokens are seen exactly, see :func:`farfield.opened_attention`. 0: none. Where it is more, decoding
            keeps the tokens.
        open_bias: where a learned bias per head of opened tokens starts: "bias" where that of summaries does, so that
            all of the far field starts quiet, or is without one (what it comes to is kept); a number of its own; or
            None, no bias.
        beam, page, share, beam_share, recent, rest, choose: how they are chosen, as there.
    """

    rank: int | tuple[int, ...] = 8
    summary: str = "shared"
    levels: int | None = None
    count_bias: bool = True
    query_rank: int | tuple[int, ...] | None = None
    sinks: int = 0
    bias: float | None = -8.0
    rope: str = "tokens"
    grid: tuple[int, ...] | None = None
    open: int = 0
    beam: int | None = None
    page: int | tuple[int, ...] | None = None
    share: int = 1
    beam_share: int | None = None
    recent: int = 0
    rest: str = "keep"
    choose: str = "mean"
    open_bias: float | str | None = "bias"

    def __post_init__(self) -> None:
        kinds = ("shared", "pooled", "mean", "learned")
        if self.summary not in kinds:
            raise ValueError(f"Pyramid(summary={self.summary!r}): one of {', '.join(kinds)} would be accepted")
        if self.rope not in ("tokens", "cells"):
            raise ValueError(f"Pyramid(rope={self.rope!r}): 'tokens' or 'cells' would be accepted")
        if (self.grid is not None) != (self.summary == "learned"):
            raise ValueError(
                f"Pyramid(summary={self.summary!r}, grid={self.grid!r}): "
                "learned summaries need the grid they are made for, the others work on any"
            )
        for name in ("rank", "levels", "query_rank", "sinks", "grid"):
            value = getattr(self, name)
            if value is not None:
                given = integers(value, f"Pyramid.{name}")
                if name == "grid" or (name in ("rank", "query_rank") and len(given) > 1):
                    object.__setattr__(self, name, given)
        if self.bias is not None and not isinstance(self.bias, int | float):
            raise TypeError(f"Pyramid(bias={self.bias!r}): a number, or None for no bias, would be accepted")
        if self.open_bias == "bias":
            object.__setattr__(self, "open_bias", self.bias if self.open else None)
        if self.open_bias is not None and (not isinstance(self.open_bias, int | float) or not self.open):
            raise ValueError(
                f"Pyramid(open={self.open!r}, open_bias={self.open_bias!r}): a number would be accepted where pages "
                'are opened, None for no bias, or "bias" for what the summaries have'
            )
        if self.open and self.query_rank is not None:
            raise ValueError(
                f"Pyramid(open={self.open!r}, query_rank={self.query_rank!r}): a pooled query opens nothing for its "
                "tokens; use share= to let neighbouring queries share a choice"
            )
        idle = [name for name in _OF_PAGES if not self.open and getattr(self, name) != getattr(Pyramid, name)]
        if idle:
            named = ", ".join(f"{name}={getattr(self, name)!r}" for name in idle)
            raise ValueError(
                f"Pyramid(open={self.open!r}, {named}): these say how pages are opened, open=16 opens some"
            )
        if self.sinks < 0:
            raise ValueError(f"Pyramid(sinks={self.sinks}): a number of leading tokens >= 0 would be accepted")

    @property
    def takes_dropout(self) -> bool:  # type: ignore[override]
        """Where nothing is opened."""
        return not self.open

    @property
    def causal_safe(self) -> bool:
        """Whether no output depends on a later token when built causal."""
        return self.query_rank is None

    why_not_causal = "query_rank pools queries, which mixes later tokens in"

    @property
    def way(self) -> tuple[int, int]:
        """Cells opened on every level on the way to the pages, and queries that share them."""
        beam = self.open if self.beam is None else self.beam
        return beam, self.share if self.beam_share is None else self.beam_share

    @property
    def needs_queries(self) -> bool:
        """Whether what a query opens hangs on queries before it."""
        return bool(self.open) and (self.way[1] > 1 or self.recent > 0)

    @property
    def takes_position_bias(self) -> bool:
        """Always; a summary carries the mean of its tokens' waves."""
        return True

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        if self.open:
            return "n·(open·page + beam·log(n/block)/share)"
        return "n·rank·log(n/block)" if self.query_rank is None else "n·rank²/block"

    def fuses(self, near: Part | None, merge: str) -> bool:
        """One operator computes blocks, summaries and their joint softmax."""
        return isinstance(near, Blocks) and merge == "softmax"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """See :class:`farfield.parts.Part`."""
        if not isinstance(near, Blocks):
            raise ValueError(
                f"far={self!r} with near={near!r}: its interaction lists are the complement of leaf blocks, "
                "anything else would see tokens twice or never; use near=Blocks(...)"
            )
        block = per_axis(near.block, spec.dims, "Blocks.block")
        shape = geometry(block, block, per_axis(self.rank, spec.dims, "Pyramid.rank"))
        if self.query_rank is not None:
            geometry(block, block, per_axis(self.query_rank, spec.dims, "Pyramid.query_rank"))
        check_options(
            shape.block, shape.rank, self.open, self.beam, self.page, self.share, self.beam_share, self.recent,
            self.rest, self.choose, spec.causal,
        )  # fmt: skip
        if self.open and self.page is not None:
            per_axis(self.page, spec.dims, "Pyramid.page")
        if self.grid is not None:
            if len(self.grid) != spec.dims:
                raise ValueError(
                    f"Pyramid(grid={self.grid!r}) has {len(self.grid)} axes in a layer with dims={spec.dims}: "
                    "one length per axis would be accepted"
                )
            geometry(self.grid, shape.block, shape.rank, self.levels)
        if self.rope == "cells" and spec.dims != 1:
            raise ValueError(
                f"Pyramid(rope='cells') with dims={spec.dims}: the rotary embedding is 1-D; use rope='tokens'"
            )

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """The far field alone, as an attention state.

        Raises:
            ValueError: with sinks, which belong to no cell and so would be seen by nobody.
        """
        if self.sinks:
            raise ValueError(
                f"far={self!r} apart from its near field: sinks are seen by the joint softmax; "
                "use merge='softmax' or sinks=0"
            )
        return self._module(spec, near, "far")

    def build_fused(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """Near and far field together."""
        return self._module(spec, near, "both")

    def build_far(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """The far field alone, sinks left to whoever computes the near field with them."""
        return self._module(spec, near, "far")

    def _module(self, spec: LayerSpec, near: Part | None, part: str) -> nn.Module:
        self.check(spec, near)
        assert isinstance(near, Blocks)
        block = per_axis(near.block, spec.dims, "Blocks.block")
        levels = self.levels if self.grid is not None else None
        shape = geometry(self.grid or block, block, per_axis(self.rank, spec.dims, "Pyramid.rank"), levels)
        return _Pyramid(self, spec, shape, part)


class _Pyramid(StreamModule):
    def __init__(self, options: Pyramid, spec: LayerSpec, shape: Geometry, part: str) -> None:
        super().__init__()
        self.options, self.shape, self.part = options, shape, part
        self.level_bias = None
        if options.bias is not None:
            self.level_bias = nn.Parameter(torch.empty(MAX_LEVELS, spec.num_heads))
        self.page_bias = None
        if options.open_bias is not None:
            self.page_bias = nn.Parameter(torch.empty(spec.num_heads))
        self.weights = nn.ParameterDict()
        self.waves = spec.waves
        heads, width = spec.num_kv_heads, spec.head_dim - spec.waves
        if options.summary == "shared":
            for name, value in averaging(shape, heads, width)._asdict().items():
                self.weights[name] = nn.Parameter(torch.empty_like(value))
        elif options.summary == "pooled":
            self.weights["query"] = nn.Parameter(torch.empty(heads, width))
        elif options.summary == "learned":
            p = shape.cells_per_group
            for level in range(1, shape.levels + 1):
                size = math.prod(shape.group_side(level))
                for side in ("key", "value"):
                    self.weights[f"{side}_weight_{level}"] = nn.Parameter(torch.empty(p, width, size))
                    self.weights[f"{side}_bias_{level}"] = nn.Parameter(torch.empty(p, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Summaries average, the far field is quiet."""
        if self.level_bias is not None:
            nn.init.zeros_(self.level_bias)
        if self.page_bias is not None:
            nn.init.zeros_(self.page_bias)
        if self.options.summary == "shared":
            for weight in self.weights.values():
                nn.init.ones_(weight)
        elif self.options.summary == "pooled":
            nn.init.zeros_(self.weights["query"])
        elif self.options.summary == "learned":
            for level in range(1, self.shape.levels + 1):
                average = _averaging_taps(self.shape, level)
                for side in ("key", "value"):
                    self.weights[f"{side}_weight_{level}"].copy_(average[:, None, :])
                    nn.init.zeros_(self.weights[f"{side}_bias_{level}"])

    def summary(self) -> Summary:
        """The summary with its present weights, as the operator takes it."""
        w = self.weights
        if self.options.summary == "shared":
            # Stored relative to averaging: while the far field is quiet, Adam turns its tiny gradients into full
            # steps, which are small beside 1 but not beside 1 / size.
            whole = {name: F.pad(w[name], (0, self.waves), value=1.0) for name in SharedSummary._fields}
            return SharedSummary(*(x / x.shape[1] for x in whole.values()))
        if self.options.summary == "pooled":
            return PooledSummary(F.pad(w["query"], (0, self.waves)))
        if self.options.summary == "learned":
            return LearnedSummary(tuple(self._level(i) for i in range(1, self.shape.levels + 1)))
        return "mean"

    def _level(self, level: int) -> LevelWeights:
        """The weights of one level; waves of a position bias are averaged."""
        weights = [self.weights[f"{side}_weight_{level}"] for side in ("key", "value")]
        biases = [F.pad(self.weights[f"{side}_bias_{level}"], (0, self.waves)) for side in ("key", "value")]
        if self.waves:
            taps = _averaging_taps(self.shape, level).to(weights[0])[:, None].expand(-1, self.waves, -1)
            weights = [torch.cat((weight, taps), 1) for weight in weights]
        return LevelWeights(weights[0], biases[0], weights[1], biases[1])

    def biases(self) -> Tensor | None:
        """[levels, query heads] the bias of each level and head; None without."""
        if self.level_bias is None or self.options.bias is None:
            return None
        return self.options.bias + FAST * self.level_bias

    def opened_bias(self) -> Tensor | None:
        """[query heads] the bias of opened tokens; None without."""
        if self.page_bias is None or self.options.open_bias is None:
            return None
        return cast(float, self.options.open_bias) + FAST * self.page_bias

    def _levels(self, inputs: Inputs) -> int | None:
        """The levels that were asked for, or all of a shorter input that has fewer."""
        asked = self.options.levels
        if asked is None:
            return None
        longest = inputs.grid if inputs.cu_seqlens is None else (int(inputs.cu_seqlens.diff().max()),)
        return min(asked, default_levels(longest, self.shape.block))

    def forward(self, inputs: Inputs) -> AttentionState:
        """The attention state of the far field, or of near and far field when fused."""
        options = self.options
        if options.grid is not None and inputs.grid != options.grid:
            raise ValueError(
                f"learned summaries were made for grid {options.grid}, got {inputs.grid}; 'shared' works on any"
            )
        key, summary = inputs.rotated_k, self.summary()
        if options.rope == "cells" and inputs.rope is not None:
            if inputs.cu_seqlens is not None:
                state = by_segment(inputs, self.forward)
                assert isinstance(state, AttentionState)
                return state
            summary = self._rotated_summaries(inputs, summary)
        if options.open:
            return self._opened(inputs, summary)
        out = multipole_attention(
            inputs.rotated_q,
            key,
            inputs.v,
            grid=inputs.grid,
            block=self.shape.block,
            rank=self.shape.rank,
            levels=self._levels(inputs),
            causal=inputs.causal,
            key_mask=inputs.key_mask,
            cu_seqlens=inputs.cu_seqlens,
            scale=inputs.scale,
            count_bias=options.count_bias,
            query_rank=options.query_rank,
            sinks=options.sinks,
            dropout=inputs.dropout,
            summary=summary,
            level_bias=self.biases(),
            return_lse=True,
            part=self.part,
        )
        return AttentionState(*out)

    def _opened(self, inputs: Inputs, summary: Summary) -> AttentionState:
        """As :meth:`forward`, with opened cells."""
        if inputs.cu_seqlens is not None:
            state = by_segment(inputs, self.forward)
            assert isinstance(state, AttentionState)
            return state
        options = self.options
        out = opened_attention(
            inputs.rotated_q,
            inputs.rotated_k,
            inputs.v,
            grid=inputs.grid,
            block=self.shape.block,
            rank=self.shape.rank,
            levels=self._levels(inputs),
            open=options.open,
            beam=options.beam,
            page=options.page,
            share=options.share,
            beam_share=options.beam_share,
            recent=options.recent,
            rest=options.rest,
            choose=options.choose,
            causal=inputs.causal,
            key_mask=inputs.key_mask,
            scale=inputs.scale,
            count_bias=options.count_bias,
            sinks=options.sinks,
            summary=summary,
            level_bias=self.biases(),
            page_bias=self.opened_bias(),
            return_lse=True,
            part=self.part,
        )
        return AttentionState(*out)

    def rows(self, inputs: Inputs, first: int | Tensor) -> Tensor:
        """The rows of near and far field from position ``first`` on, for fewer queries than keys; causal.

        See :func:`farfield.ops.multipole.multipole_rows`.

        Raises:
            ValueError: for learned summaries, which fix the length.
        """
        options = self.options
        if options.grid is not None:
            raise ValueError(f"learned summaries were made for grid {options.grid}: there is no decoding with them")
        if options.open:
            raise ValueError(f"{options!r} opens cells: its rows need the state of a stream")
        return multipole_rows(
            inputs.rotated_q,
            inputs.rotated_k,
            inputs.v,
            first=first,
            block=self.shape.block[0],
            rank=self.shape.rank[0],
            levels=self._levels(inputs),
            key_mask=inputs.key_mask,
            scale=inputs.scale,
            count_bias=options.count_bias,
            sinks=options.sinks,
            summary=self.summary(),
            level_bias=self.biases(),
            part=self.part,
        )

    def _rotated_summaries(self, inputs: Inputs, summary: Summary) -> Summaries:
        """Summaries of keys as they are, rotated by the position of their cell's centre."""
        assert inputs.rope is not None and inputs.positions is not None
        options, (block,), (rank,) = self.options, self.shape.block, self.shape.rank
        plain = summarise(
            inputs.k,
            inputs.v,
            grid=inputs.grid,
            block=block,
            rank=rank,
            levels=self._levels(inputs),
            key_mask=inputs.key_mask,
            sinks=options.sinks,
            summary=summary,
        )
        keys = []
        for level, k in enumerate(plain.keys, start=1):
            centres = cell_centres(inputs.q.shape[2], block, rank, level, k.device)
            keys.append(inputs.rope.rotate(k.flatten(2, 3), centres).view(k.shape))
        return plain._replace(keys=tuple(keys))

    def _stream(self, rewind: int, raw: bool) -> MultipoleStream:
        options, (block,), (rank,) = self.options, self.shape.block, self.shape.rank
        return MultipoleStream(block, rank, options.levels, options.count_bias, options.sinks, self.part, rewind, raw)

    def _opening(self, rewind: int) -> OpenedStream | None:
        """The stream with opened cells, or None where nothing is opened."""
        return _opening(self.options, self.shape, self.part, rewind) if self.options.open else None

    def why_no_stream(self, spec: StreamSpec) -> str | None:
        """See :class:`farfield.streaming.StreamModule`."""
        if self.options.summary == "learned":
            return (
                f"learned summaries are made for one length, {self.options.grid}, and a stream has every length; "
                "summary='shared', 'pooled' and 'mean' can be streamed"
            )
        if self.options.open and spec.rope and self.options.rope == "cells":
            return "opened cells with rope='cells' would keep every key twice; rope='tokens' can be streamed"
        return self._stream(spec.rewind, False).why_not()

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """Sinks, the last blocks, and four groups of every level.

        With an explicit number of levels, all groups of the top one: then it grows with the context. With opened cells,
        all tokens.
        """
        opening = self._opening(spec.rewind)
        if opening is not None:
            return opening.empty(
                spec.batch_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device
            )
        stream = self._stream(spec.rewind, spec.rope and self.options.rope == "cells")
        return stream.empty(
            spec.batch_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device,
            biased=self.level_bias is not None, pooled=self.options.summary == "pooled",
        )  # fmt: skip

    def reserve(self, cache: Cache, length: int, rewind: int) -> None:
        """One more level whenever the length has doubled; with opened cells, room for the tokens."""
        opening = self._opening(rewind)
        if opening is not None:
            opening.reserve(cache, length)
        else:
            self._stream(rewind, "raw" in cache).reserve(cache, length)

    def resume(self, cache: Cache, length: int, rewind: int) -> None:
        """Hides what was taken back."""
        opening = self._opening(rewind)
        if opening is not None:
            opening.refresh(cache, length, self.summary)
        else:
            self._stream(rewind, "raw" in cache).open_block(cache, length, self._weights())

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`. O(T (block + rank levels)); with opened cells, see there."""
        whole = length == 0 and inputs.q.shape[2] > 1
        tokens = inputs.rotated_q, inputs.rotated_k, inputs.v
        opening = self._opening(rewind)
        if opening is not None:
            if whole:
                opening.fill(cache, *tokens, self.summary)
                return self(inputs)
            return opening.step(
                cache, *tokens, length, scale=inputs.scale, summary=self.summary, level_bias=self.biases(),
                page_bias=self.opened_bias(),
            )  # fmt: skip
        stream = self._stream(rewind, "raw" in cache)
        weights = self._weights(self._turn(inputs) if stream.raw else None)
        raw = inputs.k if stream.raw else None
        if whole:
            state: AttentionState = self(inputs)
            stream.fill(cache, inputs.rotated_k, inputs.v, weights=weights, raw=raw)
            return state
        return stream.step(cache, *tokens, length, scale=inputs.scale, weights=weights, raw=raw, need_lse=need_lse)

    def _weights(self, turn: Turn | None = None) -> Weights:
        def kept() -> str | SharedSummary | PooledSummary:
            summary = self.summary()
            assert isinstance(summary, str | SharedSummary | PooledSummary)
            return summary

        return Weights(kept, self.biases, turn)

    def _turn(self, inputs: Inputs) -> Turn:
        """Rotates cells by the positions of their centres."""
        rope, (block,), (rank,) = inputs.rope, self.shape.block, self.shape.rank
        assert rope is not None

        def turn(cells: Tensor, level: int, first: int) -> Tensor:
            side = (block << (level - 1)) // rank
            number = torch.arange(first, first + cells.shape[2], device=cells.device)
            return rope.rotate(cells, (number + 0.5) * side - 0.5)

        return turn

    def extra_repr(self) -> str:
        """What was asked for."""
        return f"{self.options!r}, part={self.part!r}"


@lru_cache(maxsize=1024)
def _opening(o: Pyramid, shape: Geometry, part: str, rewind: int) -> OpenedStream:
    (block,), (rank,) = shape.block, shape.rank
    (page,) = per_axis(block // rank if o.page is None else o.page, 1, "Pyramid.page")
    beam, beam_share = o.way
    return OpenedStream(
        block=block, rank=rank, levels=o.levels, open=o.open, beam=beam, page=page, share=o.share,
        beam_share=beam_share, recent=o.recent, keep=o.rest == "keep", choose=o.choose, count_bias=o.count_bias,
        sinks=o.sinks, part=part, rewind=rewind,
    )  # fmt: skip


def _averaging_taps(shape: Geometry, level: int) -> Tensor:
    """[P, tokens of a group] filters that average each cell of a group."""
    side, cell = shape.group_side(level), shape.cell_side(level)
    position = torch.stack(torch.meshgrid(*(torch.arange(n) for n in side), indexing="ij"), -1).reshape(-1, shape.dims)
    index = position // position.new_tensor(cell)
    flat = torch.zeros_like(index[:, 0])
    for axis, p in enumerate(shape.rank):
        flat = flat * p + index[:, axis]
    return (flat[None] == torch.arange(shape.cells_per_group)[:, None]).float() / math.prod(cell)
