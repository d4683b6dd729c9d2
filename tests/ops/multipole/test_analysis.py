"""The partition of tokens, seen in the effective weights, and the distance to exact attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import farfield as ff
from farfield.geometry import Geometry, geometry
from farfield.ops.multipole.analysis import LevelError
from support.multipole_cases import Case, cases, geometries, make_summary, tensors


def options_of(case: Case, *without: str) -> dict[str, Any]:
    return {name: value for name, value in case.keywords().items() if name not in without}


@settings(max_examples=80)
@given(geometries(), st.booleans(), st.booleans(), st.sampled_from((0, 3)))
def test_every_token_counts_once(g: Geometry, causal: bool, ask_with_queries: bool, sinks: int) -> None:
    """With all scores 0 the softmax over tokens and counted cells is uniform: 1 / N on every token, exactly once."""
    causal = causal and g.dims == 1
    x, zero = torch.randn(1, 1, g.tokens, 2), torch.zeros(1, 1, g.tokens, 2)
    q, k = (x, zero) if ask_with_queries else (zero, x)
    w = ff.effective_weights(q, k, grid=g.grid, block=g.block, rank=g.rank, levels=g.levels, causal=causal, sinks=sinks)
    ones = torch.ones(g.tokens, g.tokens, dtype=torch.float64)
    expected = ones.tril() / torch.arange(1, g.tokens + 1)[:, None] if causal else ones / g.tokens
    torch.testing.assert_close(w[0, 0], expected)


@settings(max_examples=30)
@given(cases(kinds=("mean", "pooled")))
def test_partition_under_masks_and_packing(case: Case) -> None:
    """With scores 0 every visible token weighs the same, whatever hides the others."""
    case.options |= {"count_bias": True, "part": "both"}
    case.level_bias = None
    w = ff.effective_weights(torch.zeros_like(case.query), torch.zeros_like(case.key), **options_of(case))
    seen = w > 0
    number, batch = case.shape.tokens, case.key.shape[0]
    expected = torch.ones(batch, number, number, dtype=torch.bool)
    bounds = case.options.get("cu_seqlens")
    if bounds is not None:
        segment = torch.searchsorted(bounds[1:].contiguous(), torch.arange(number, dtype=bounds.dtype), right=True)
        expected &= segment[:, None] == segment[None]
    elif "key_mask" in case.options:
        expected &= case.options["key_mask"][:, None]
    if case.options["causal"]:
        expected = expected.tril()
    assert (seen == expected[:, None]).all()
    share = expected.double() / expected.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(w, share[:, None].expand_as(w))


@settings(max_examples=60)
@given(cases(kinds=("mean", "pooled")))
def test_effective_weights_are_the_operator(case: Case) -> None:
    w = ff.effective_weights(case.query, case.key, **options_of(case))
    repeat = case.query.shape[1] // case.key.shape[1]
    out, lse = case.run()
    torch.testing.assert_close(w @ case.value.repeat_interleave(repeat, 1), out)
    torch.testing.assert_close(w.sum(-1), (lse > -torch.inf).double())
    assert (w >= 0).all()


@pytest.mark.parametrize("kind", ["shared", "learned"])
def test_effective_weights_of_linear_summaries(kind: str) -> None:
    """Exact where the value weights do not depend on the channel and nothing is added."""
    g = geometry((5, 13), (2, 2), (1, 2))
    summary = make_summary(kind, g, 1, 2, 3)
    with torch.no_grad():
        if isinstance(summary, ff.SharedSummary):
            summary = summary._replace(
                value_leaf=summary.value_leaf[..., :1].expand(-1, -1, 3),
                value_up=summary.value_up[..., :1].expand(-1, -1, 3),
            )
        else:
            assert isinstance(summary, ff.LearnedSummary)
            levels = (
                level._replace(
                    value_weight=level.value_weight[:, :1].expand(-1, 3, -1), value_bias=0 * level.value_bias
                )
                for level in summary.levels
            )
            summary = ff.LearnedSummary(tuple(levels))
    case = Case(g, *tensors(2, 4, 2, 65, 3), summary, None, {"key_mask": torch.rand(2, 65) > 0.3, "sinks": 1})
    w = ff.effective_weights(case.query, case.key, **options_of(case))
    torch.testing.assert_close(w @ case.value.repeat_interleave(2, 1), case.run()[0])


def test_effective_weights_refuses_what_it_cannot_know() -> None:
    q, k, v = (x.detach() for x in tensors(1, 2, 2, 40, 3))
    ready = ff.summarise(k, v, block=4, rank=2)
    with pytest.raises(ValueError, match=r"ready Summaries.*pass 'mean' or weights"):
        ff.effective_weights(q, k, block=4, rank=2, summary=ready)
    with pytest.raises(TypeError, match=r"unknown option \['dropout'\].*block"):
        ff.effective_weights(q, k, block=4, rank=2, dropout=0.1)
    with pytest.raises(ValueError, match="rank=3 does not divide"):
        ff.effective_weights(q, k, block=4, rank=3)
    for name, value in (("cu_seqlens", torch.tensor([0, 40])), ("part", "far")):
        with pytest.raises(ValueError, match=f"{name}=.*whole sequence"):
            ff.error_report(q, k, v, block=4, rank=2, **{name: value})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["mean", "shared", "pooled"])
def test_no_error_where_the_method_is_exact(causal: bool, kind: str) -> None:
    g = geometry((16,), 4, 4)
    q, k, v = (x.detach() for x in tensors(1, 4, 2, 16, 3))
    with torch.no_grad():
        summary = make_summary(kind, g, 1, 2, 3) if kind == "pooled" else "mean"
        if kind == "shared":
            summary = ff.ops.multipole.averaging(g, 2, 3, torch.float64)
    report = ff.error_report(q, k, v, block=4, rank=4, causal=causal, summary=summary, sinks=1)
    assert len(report.levels) == 2
    assert max(report.score, report.weight, report.output, report.lse) < 1e-12
    for level in report.levels:
        assert max(level.score, level.weight, level.output, abs(level.mass - level.exact_mass)) < 1e-12


@settings(max_examples=30)
@given(cases(kinds=("mean", "pooled", "shared"), packed=False, parts=("both",)))
def test_report_adds_up(case: Case) -> None:
    """Masses sum to the queries that see anything; totals equal a computation from effective weights alone."""
    if case.options.get("key_mask") is not None and not case.options["key_mask"].any(1).all():
        case.options["key_mask"][:, 0] = True
    if case.options["causal"]:
        case.options.pop("key_mask", None)  # rows that see nothing have a test of their own
    report = ff.error_report(case.query, case.key, case.value, **options_of(case, "part"))
    number, repeat = case.shape.tokens, case.query.shape[1] // case.key.shape[1]
    k, v = (x.detach().repeat_interleave(repeat, 1) for x in (case.key, case.value))
    scale = case.options["scale"] if case.options["scale"] is not None else case.query.shape[-1] ** -0.5
    scores = scale * case.query.detach() @ k.mT
    allowed = torch.ones(k.shape[0], 1, number, number, dtype=torch.bool)
    if case.options.get("key_mask") is not None:
        allowed = allowed & case.options["key_mask"][:, None, None]
    if case.options["causal"]:
        allowed = allowed.tril()
    exact = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    out, lse = (x.detach() for x in case.run())
    truth = exact @ v
    assert report.output == pytest.approx(float((out - truth).norm() / truth.norm()), abs=1e-10, rel=1e-8)
    exact_lse = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    assert report.lse == pytest.approx(float((lse - exact_lse).square().mean().sqrt()), abs=1e-10, rel=1e-8)
    assert sum(e.exact_mass for e in report.levels) == pytest.approx(1)
    visible = allowed.expand(exact.shape).double().sum(-1).mean().item()
    assert sum(e.tokens for e in report.levels) == pytest.approx(visible)
    if case.summary == "mean" or isinstance(case.summary, ff.PooledSummary):
        w = ff.effective_weights(case.query, case.key, **options_of(case)).detach()
        assert report.weight == pytest.approx(float((w - exact).abs().sum(-1).mean()), abs=1e-10, rel=1e-8)
        assert sum(e.mass for e in report.levels) == pytest.approx(1)
        levels = case.shape.levels
        assert [e.level for e in report.levels] == list(range(levels + 1))


def test_score_error_of_a_hand_made_case() -> None:
    """Six blocks of two tokens: keys 0 and 2 in every cell, query 1, so that every far score is off by 1."""
    key = torch.tensor([0.0, 2.0] * 3, dtype=torch.float64).view(1, 1, 6, 1)
    query = torch.ones_like(key)
    report = ff.error_report(query, key, torch.randn_like(key), block=2, rank=1, scale=1.0)
    assert [e.level for e in report.levels] == [0, 1]
    assert report.score == pytest.approx(1.0) and report.levels[0].score == 0.0
    assert report.levels[1].tokens == pytest.approx((2 + 0 + 2) * 2 / 6)
    assert report.levels[1].mass < report.levels[1].exact_mass  # 2 e^1 < 1 + e^2
    text = str(report)
    assert "near" in text and "lse rms" in text and len(text.splitlines()) == 4
    assert isinstance(report.levels[0], LevelError)


def test_report_without_anything_to_see_or_to_say() -> None:
    """All hidden, and all values zero: zeros, neither NaN nor a division by zero."""
    q, k, v = (x.detach() for x in tensors(1, 1, 1, 20, 2))
    hidden = ff.error_report(q, k, v, block=2, rank=1, key_mask=torch.zeros(1, 20, dtype=torch.bool))
    silent = ff.error_report(q, k, torch.zeros_like(v), block=2, rank=1)
    for report in (hidden, silent):
        assert report.output == 0.0 and report.lse == report.lse
    assert hidden.lse == 0.0
