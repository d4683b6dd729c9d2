"""The reference engine against the definition written out one query at a time; smooth to the second order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import farfield as ff
from farfield.geometry import geometry
from support import multipole_oracle as oracle
from support.multipole_cases import Case, cases, make_summary, tensors


def by_words(case: Case, b: int, h: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's answer for one batch entry and query head over the tokens ``part``."""
    s, options = case.shape, case.options
    packed = options.get("cu_seqlens") is not None
    repeat = case.query.shape[1] // case.key.shape[1]
    kv = h // repeat
    q, k, v = (x.detach()[b, i, part].numpy() for x, i in ((case.query, h), (case.key, kv), (case.value, kv)))
    tree = oracle.Tree((len(q),), s.block, s.rank) if packed else oracle.Tree(s.grid, s.block, s.rank, s.levels)
    mask = options.get("key_mask")
    valid = [True] * len(q) if mask is None or packed else mask[b].tolist()

    def own(x: torch.Tensor) -> np.ndarray:
        return x.detach()[kv if x.shape[0] > 1 else 0].numpy()

    summary = case.summary
    if isinstance(summary, ff.SharedSummary):
        summarise = oracle.shared(k, v, tree, [own(w) for w in summary])
    elif isinstance(summary, ff.PooledSummary):
        summarise = oracle.pooled(k, v, own(summary.query))
    elif isinstance(summary, ff.LearnedSummary):
        open_ = [ok and j >= options["sinks"] for j, ok in enumerate(valid)]
        summarise = oracle.learned(k, v, tree, [[w.detach().numpy() for w in level] for level in summary.levels], open_)
    elif isinstance(summary, ff.Summaries):
        summarise = oracle.given(tree, *([x.detach()[b, kv].numpy() for x in side] for side in summary))
    else:
        summarise = oracle.mean(k, v)
    bias = None if case.level_bias is None else case.level_bias.detach()[:, h].tolist()
    names = ("causal", "scale", "count_bias", "query_rank", "sinks", "part")
    chosen: dict[str, Any] = {name: options[name] for name in names if name in options}
    return oracle.attend(q, k, v, tree, summarise, valid=valid, level_bias=bias, **chosen)


@settings(max_examples=100)
@given(cases(most_tokens=36))
def test_reference_is_the_definition(case: Case) -> None:
    out, lse = case.run(impl="reference")
    bounds = case.options.get("cu_seqlens", torch.tensor([0, case.shape.tokens])).tolist()
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            for start, stop in zip(bounds, bounds[1:], strict=False):
                part = slice(start, stop)
                expected, expected_lse = by_words(case, b, h, part)
                np.testing.assert_allclose(out.detach()[b, h, part].numpy(), expected, atol=1e-12, rtol=1e-10)
                np.testing.assert_allclose(lse.detach()[b, h, part].numpy(), expected_lse, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kind", ["mean", "shared", "pooled", "learned"])
def test_reference_is_differentiable_twice(kind: str) -> None:
    g = geometry((11,), 2, 2)
    case = Case(g, *tensors(1, 2, 1, 11, 2), make_summary(kind, g, 1, 1, 2), None, {"causal": True, "sinks": 1})
    key_mask = torch.ones(1, 11, dtype=torch.bool)
    key_mask[0, :3] = False

    def run(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = case.run(impl="reference", query=x[0], key=x[1], value=x[2], key_mask=key_mask)
        return out, lse[..., 3:]

    assert torch.autograd.gradcheck(run, (case.query, case.key, case.value))
    assert torch.autograd.gradgradcheck(run, (case.query, case.key, case.value), fast_mode=True)


def test_half_precision_is_computed_in_float32() -> None:
    q, k, v = (torch.randn(1, 2, 50, 8, dtype=torch.bfloat16) for _ in range(3))
    options: dict[str, Any] = {"block": 4, "rank": 2, "causal": True, "impl": "reference", "return_lse": True}
    out, lse = ff.multipole_attention(q, k, v, **options)
    wide, wide_lse = ff.multipole_attention(q.float(), k.float(), v.float(), **options)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, wide.bfloat16()) and torch.equal(lse, wide_lse)
