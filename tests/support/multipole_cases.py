"""Random calls of the multipole operator, and two engines side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import farfield as ff
from farfield.geometry import Geometry, default_levels, geometry
from farfield.ops.multipole.summary import Summary, averaging, pack

KINDS = ("mean", "shared", "pooled", "learned", "given")


@dataclass
class Case:
    """One call: tensors that take gradients, and the options."""

    shape: Geometry
    query: Tensor
    key: Tensor
    value: Tensor
    summary: Summary = "mean"
    level_bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        bias = [] if self.level_bias is None else [self.level_bias]
        return [self.query, self.key, self.value, *bias, *pack(self.summary)[1]]

    def keywords(self) -> dict[str, Any]:
        s = self.shape
        base = {"grid": s.grid, "block": s.block, "rank": s.rank, "levels": s.levels}
        return {**base, "summary": self.summary, "level_bias": self.level_bias, **self.options}

    def run(self, **changes: Any) -> tuple[Tensor, Tensor]:
        tensors = {"query": self.query, "key": self.key, "value": self.value}
        return ff.multipole_attention(**{**tensors, **self.keywords(), "return_lse": True, **changes})  # type: ignore[return-value]

    def gradients(self, **changes: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output, lse and the gradients of a fixed random functional of both; zeros where nothing flows."""
        out, lse = self.run(**changes)
        generator = torch.Generator().manual_seed(1)
        finite = lse > -torch.inf
        loss = (out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum()
        loss = (
            loss + (torch.where(finite, lse, 0.0) * torch.randn(lse.shape, dtype=lse.dtype, generator=generator)).sum()
        )
        grads = torch.autograd.grad(loss, self.leaves, allow_unused=True)
        return out, lse, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, self.leaves, strict=True)]


def make_summary(kind: str, g: Geometry, batch: int, heads: int, width: int, own: bool = True) -> Summary:
    """Random weights near averaging; ``own``: by head, not shared by heads (where there is a choice)."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    per_head = heads if own else 1
    if kind == "shared":
        return ff.SharedSummary(
            *((t + 0.3 * torch.randn_like(t)).requires_grad_() for t in averaging(g, per_head, width, torch.float64))
        )
    if kind == "pooled":
        return ff.PooledSummary(leaf(per_head, width))
    p = g.cells_per_group
    if kind == "learned":
        return ff.LearnedSummary(
            tuple(
                ff.LevelWeights(leaf(p, width, size), leaf(p, width), leaf(p, width, size), leaf(p, width))
                for size in (prod(g.group_side(level)) for level in range(1, g.levels + 1))
            )
        )
    if kind == "given":
        return ff.Summaries(
            *(
                tuple(leaf(batch, heads, g.group_total(level), p, width) for level in range(1, g.levels + 1))
                for _ in range(2)
            )
        )
    return "mean"


def tensors(batch: int, heads: int, key_heads: int, tokens: int, width: int) -> list[Tensor]:
    return [
        torch.randn(batch, h, tokens, width, dtype=torch.float64).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


@st.composite
def geometries(draw: st.DrawFn, most_tokens: int = 120, dims: Sequence[int] = (1, 2, 3)) -> Geometry:
    """Grids of one to three axes, anisotropic blocks and ranks, all levels or fewer."""
    axes = draw(st.sampled_from(dims))
    longest = {1: most_tokens, 2: 23, 3: 9}[axes]
    lengths = st.lists(st.integers(1, longest), min_size=axes, max_size=axes)
    grid = tuple(draw(lengths.filter(lambda g: prod(g) <= most_tokens)))
    block = tuple(draw(st.sampled_from((1, 2, 3, 4, 6))) for _ in grid)
    rank = tuple(draw(st.sampled_from([d for d in range(1, m + 1) if m % d == 0])) for m in block)
    most = default_levels(grid, block)
    return geometry(grid, block, rank, draw(st.none() | st.integers(min(1, most), most)))


@st.composite
def cases(
    draw: st.DrawFn,
    most_tokens: int = 120,
    dims: Sequence[int] = (1, 2, 3),
    kinds: Sequence[str] = KINDS,
    parts: Sequence[str] = ("both", "both", "near", "far"),
    pooled_queries: bool = True,
    packed: bool = True,
) -> Case:
    """Everything the operator takes, all at once."""
    g = draw(geometries(most_tokens, dims))
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    batch, key_heads, repeat = draw(st.sampled_from(((1, 1, 1), (2, 2, 1), (2, 1, 3), (1, 2, 2))))
    width = draw(st.sampled_from((1, 3, 4)))
    query, key, value = tensors(batch, key_heads * repeat, key_heads, g.tokens, width)
    kind = draw(st.sampled_from(kinds))
    options: dict[str, Any] = {
        "causal": g.dims == 1 and draw(st.booleans()),
        "count_bias": draw(st.sampled_from((True, True, False))),
        "scale": draw(st.sampled_from((None, None, 0.3, 2.0))),
        "sinks": draw(st.sampled_from((0, 0, 1, 3, 200))),
        "part": draw(st.sampled_from(parts)),
    }
    if not options["causal"] and pooled_queries and draw(st.integers(0, 2)) == 0:
        options["query_rank"] = tuple(
            draw(st.sampled_from([d for d in range(1, m + 1) if m % d == 0])) for m in g.block
        )
    mask = draw(st.sampled_from(("none", "none", "random", "sparse", "tail", "all")))
    if mask != "none":
        keep = {"random": 0.6, "sparse": 0.05, "tail": 1.0, "all": 0.0}[mask]
        options["key_mask"] = torch.rand(batch, g.tokens) < keep
        if mask == "tail":
            options["key_mask"][:, draw(st.integers(0, g.tokens)) :] = False
    if packed and g.dims == 1 and kind in ("mean", "shared", "pooled") and draw(st.integers(0, 2)) == 0:
        cuts = sorted(draw(st.lists(st.integers(0, g.tokens), max_size=5)))
        options["cu_seqlens"] = torch.tensor(
            [0, *cuts, g.tokens], dtype=draw(st.sampled_from((torch.int32, torch.int64)))
        )
        options["levels"] = None
    level_bias = None
    if draw(st.booleans()):
        most = default_levels(g.grid, g.block)
        level_bias = torch.randn(
            most + draw(st.sampled_from((0, 2))), key_heads * repeat, dtype=torch.float64
        ).requires_grad_()
    summary = make_summary(kind, g, batch, key_heads, width, own=draw(st.booleans()))
    return Case(g, query, key, value, summary, level_bias, options)


def assert_same(a: Case, ours: tuple[Tensor, Tensor, list[Tensor]], truth: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    """Output, lse and every gradient, to the precision of float64."""
    torch.testing.assert_close(ours[0], truth[0], atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(ours[1], truth[1], atol=1e-11, rtol=1e-9)
    for got, wanted in zip(ours[2], truth[2], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-8)
