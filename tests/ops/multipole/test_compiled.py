"""The compiled engine: as near to the truth as the torch engine in the same precision, and safe in the same places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import farfield as ff
from farfield.bench import budget
from farfield.geometry import geometry
from farfield.ops.compiled import build
from farfield.ops.multipole.engines import Request, can_run
from farfield.ops.multipole.summary import Summary, pack, unpack
from support.multipole_cases import KINDS, Case, cases, make_summary, tensors

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"no compiled engine: {build.why_not()}")

Run = tuple[Tensor, Tensor, list[Tensor]]


def convert(case: Case, dtype: torch.dtype) -> Case:
    """The same case with tensors of ``dtype``; weights and biases in float32 or wider."""

    def to(x: Tensor, d: torch.dtype) -> Tensor:
        return x.detach().to(d).requires_grad_()

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kind, weights = pack(case.summary)
    summary: Summary = "mean" if kind == "mean" else unpack(kind, [to(w, wide) for w in weights])
    bias = None if case.level_bias is None else to(case.level_bias, wide)
    q, k, v = (to(x, dtype) for x in (case.query, case.key, case.value))
    return replace(case, query=q, key=k, value=v, summary=summary, level_bias=bias)


def flat(run: Run) -> list[Tensor]:
    out, lse, grads = run
    return [out, torch.where(lse == -torch.inf, 0.0, lse), *grads]


def within_budget(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Errors against float64 at most twice (gradients: three times) those of the torch engine in the same precision.

    Of a few numbers either engine can be exact by luck, so a few roundings of the largest number are allowed, too.
    """
    low = convert(case, dtype)
    truth = convert(low, torch.float64).gradients(impl="reference")
    ours, plain = low.gradients(impl="compiled"), low.gradients(impl="torch")
    assert torch.equal(ours[1] == -torch.inf, truth[1] == -torch.inf)
    eps = torch.finfo(dtype).eps
    for i, (got, other, wanted) in enumerate(zip(flat(ours), flat(plain), flat(truth), strict=True)):
        assert got.dtype == other.dtype and got.shape == other.shape
        wanted, got, other = (x.detach().double() for x in (wanted, got, other))
        allowed = (2 if i < 2 else 3) * (other - wanted).abs().max() if wanted.numel() else torch.zeros(())
        allowed = allowed + 16 * eps * max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
        torch.testing.assert_close(got, wanted, atol=float(allowed), rtol=0.0)


@settings(max_examples=200)
@given(cases())
def test_as_good_as_the_torch_engine(case: Case) -> None:
    """Every summary, grouped heads, masks, sinks, packed sequences, pooled queries, parts, fewer levels, any grid."""
    within_budget(case)


@settings(max_examples=25)
@given(cases(most_tokens=330, dims=(1,)))
def test_deep_trees(case: Case) -> None:
    within_budget(case)


@settings(max_examples=100)
@given(cases())
def test_as_good_as_plain_torch_in_bfloat16(case: Case) -> None:
    """The same calls, beside the dense definition with every step rounded to bfloat16."""
    low = convert(case, torch.bfloat16)
    true = convert(low, torch.float64)
    inputs = {"query": low.query, "key": low.key, "value": low.value}
    got = budget.gradients(lambda: low.run(impl="compiled"), low.leaves)
    plain = budget.gradients(lambda: budget.plain_attention(**inputs, **low.keywords()), low.leaves)
    truth = budget.gradients(lambda: true.run(impl="reference"), true.leaves)
    verdict = budget.judge(got, plain, truth)
    assert verdict.right, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 8, 16, 20, 32, 64, 80, 128, 200])
def test_head_widths(width: int, dtype: torch.dtype) -> None:
    """Multiples of a register tile are read in place, others are copied."""
    g = geometry((157,), 16, 4)
    bias = torch.randn(g.levels, 4, dtype=torch.float64).requires_grad_()
    case = Case(g, *tensors(2, 4, 2, 157, width), make_summary("shared", g, 2, 2, width), bias, {"causal": True})
    within_budget(case, dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("block", "rank", "heads"),
    [(1, 1, 8), (3, 1, 6), (16, 4, 4), (33, 11, 4), (48, 8, 6), (64, 8, 2), (100, 10, 4), (200, 8, 2)],
)  # fmt: skip
def test_blocks_of_all_sizes(block: int, rank: int, heads: int, causal: bool) -> None:
    """Query tiles hold several heads, one head, or a part of one; lists are longer than a tile of keys."""
    number = 5 * block + 7 if block > 1 else 41
    g = geometry((number,), block, rank)
    bias = torch.randn(g.levels, heads, dtype=torch.float64).requires_grad_()
    case = Case(g, *tensors(1, heads, 2, number, 16), "mean", bias, {"causal": causal, "sinks": 3})
    within_budget(case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "block", "rank"), [((37, 29), 8, 2), ((17, 12, 9), 4, 2)])
def test_images_and_volumes(kind: str, grid: tuple[int, ...], block: int, rank: int) -> None:
    g = geometry(grid, block, rank)
    case = Case(g, *tensors(1, 2, 1, g.tokens, 16), make_summary(kind, g, 1, 1, 16), None, {})
    case.options["key_mask"] = torch.rand(1, g.tokens) > 0.2
    within_budget(case)


def test_large_scores_neither_overflow_nor_lose_rows() -> None:
    g = geometry((700,), 64, 8)
    for scale in (30.0, 300.0):
        q, k, v = (x.detach().float() for x in tensors(1, 2, 2, 700, 16))
        case = Case(g, q * scale, k * scale, v, "mean", None, {"causal": True})
        out, lse = case.run(impl="compiled")
        other, other_lse = case.run(impl="torch")
        assert torch.isfinite(out).all() and torch.isfinite(lse).all()
        torch.testing.assert_close(lse, other_lse, rtol=1e-5, atol=0.0)
        # Scores of 1e5 carry errors of 1e-2 in float32: rows whose two largest scores are that close may differ.
        assert ((out - other).abs().amax(-1) < 1e-2).float().mean() > 0.95


@settings(max_examples=30)
@given(
    cases(kinds=("mean", "shared", "pooled", "learned"), packed=False), st.sampled_from((float("nan"), float("inf")))
)
def test_hidden_tokens_leak_nothing(case: Case, poison: float) -> None:
    if "key_mask" not in case.options:
        case.options["key_mask"] = torch.rand(case.key.shape[0], case.shape.tokens) < 0.7
    hidden = ~case.options["key_mask"][:, None, :, None]
    case = convert(case, torch.float32)
    dirty = replace(
        case,
        key=case.key.detach().masked_fill(hidden, poison).requires_grad_(),
        value=case.value.detach().masked_fill(hidden, poison).requires_grad_(),
    )
    clean, got = case.gradients(impl="compiled"), dirty.gradients(impl="compiled")
    assert all(torch.equal(a, b) for a, b in zip(flat(clean), flat(got), strict=True))


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_spoils_what_sees_it_and_nothing_else(where: str) -> None:
    """As with any softmax: a NaN shows, and does not turn into numbers."""
    g = geometry((200,), 16, 4)
    case = convert(Case(g, *tensors(1, 1, 1, 200, 16), "mean", None, {"causal": True}), torch.float32)
    broken = getattr(case, where).detach().clone()
    broken[0, 0, 100] = float("nan")
    out, _ = replace(case, **{where: broken}).run(impl="compiled")
    clean, _ = case.run(impl="compiled")
    bad = out.isnan().any(-1)[0, 0]
    # Inside a block it passes the causal mask, as it does in torch: 0 * NaN is NaN.
    assert bad[100] and not bad[:96].any() and (bad[101:].all() or where == "query")
    assert torch.equal(out[0, 0][~bad], clean[0, 0][~bad])


@settings(max_examples=30)
@given(cases())
def test_new_memory_is_never_read(case: Case) -> None:
    case = convert(case, torch.float32)
    before = torch.are_deterministic_algorithms_enabled()
    clean = case.gradients(impl="compiled")
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        again = case.gradients(impl="compiled")
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(flat(clean), flat(again), strict=True))


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"query_rank": 2}, {"causal": True, "sinks": 2}, {"part": "far"}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_see_nothing(kind: str, options: dict[str, Any]) -> None:
    """0 and -inf, with zero gradients and no NaN, whatever flows into output and lse."""
    g = geometry((37,), 4, 2)
    case = convert(
        Case(g, *tensors(2, 2, 2, 37, 3), make_summary(kind, g, 2, 2, 3), None, dict(options)), torch.float32
    )
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0], mask[1, :20] = False, False
    case.options["key_mask"] = mask
    out, lse, grads = case.gradients(impl="compiled")
    empty = lse == -torch.inf
    assert empty[0].all() and (out[empty] == 0).all()
    assert all(torch.isfinite(x).all() for x in (out, lse[~empty], *grads))
    assert (grads[0][empty] == 0).all() and (grads[1][0] == 0).all() and (grads[2][0] == 0).all()


@pytest.mark.parametrize("heads", [1, 3])
def test_any_number_of_threads(heads: int) -> None:
    """Fewer groups than threads: gradients of keys are summed from parts, in an order that does not vary."""
    g = geometry((400,), 16, 4)
    bias = torch.randn(g.levels, 2 * heads, dtype=torch.float64).requires_grad_()
    case = convert(
        Case(g, *tensors(1, 2 * heads, heads, 400, 16), "mean", bias, {"causal": True, "sinks": 2}), torch.float32
    )
    threads = torch.get_num_threads()
    try:
        runs = []
        for number in (1, 2, 2, 5):
            torch.set_num_threads(number)
            runs.append(flat(case.gradients(impl="compiled")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))
    for other in runs[1:]:
        assert torch.equal(other[0], runs[0][0]) and torch.equal(other[1], runs[0][1])
        for a, b in zip(other, runs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_float16_and_bfloat16_round_as_torch_does() -> None:
    """One block of one token: the output is the value, read and written back, whatever number it is."""
    for dtype, bits in ((torch.float16, torch.int16), (torch.bfloat16, torch.int16)):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(bits).view(dtype)
        value = every[every.isfinite()].view(1, 1, -1, 1)[:, :, : (every.isfinite().sum() // 8) * 8]
        value = value.view(-1, 1, 1, 8)
        out = ff.multipole_attention(
            torch.ones_like(value), torch.ones_like(value), value, block=1, rank=1, impl="compiled"
        )
        assert isinstance(out, Tensor)
        assert torch.equal(out, value)
    # Subnormal numbers, also where the processor is told to take them for zero.
    value = torch.arange(8, dtype=torch.int16).view(torch.float16).view(1, 1, 1, 8)
    torch.set_flush_denormal(True)
    try:
        out = ff.multipole_attention(
            torch.ones_like(value), torch.ones_like(value), value, block=1, rank=1, impl="compiled"
        )
    finally:
        torch.set_flush_denormal(False)
    assert isinstance(out, Tensor) and torch.equal(out, value)
    # Means of two need rounding: to the nearest, ties to even.
    for dtype in (torch.float16, torch.bfloat16):
        value = (torch.randn(5000, 1, 2, 8) * torch.logspace(-9, 4, 5000).view(-1, 1, 1, 1)).to(dtype)
        zero = torch.zeros_like(value)
        out = ff.multipole_attention(zero, zero, value, block=2, rank=1, impl="compiled")
        assert isinstance(out, Tensor)
        exact = (value[:, :, :1].float() * 0.5 + value[:, :, 1:].float() * 0.5).to(dtype)
        assert torch.equal(out[:, :, :1].nan_to_num(), exact.nan_to_num())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default: torch.dtype) -> None:
    """Tables that are made on the first call of a geometry serve every later one."""
    q, k, v = (x.detach().float() for x in tensors(1, 2, 1, 307, 16))
    options: dict[str, Any] = {"block": 16, "rank": 2, "causal": True, "sinks": 2}
    torch.set_default_dtype(default)
    try:
        first = ff.multipole_attention(q, k, v, **options, impl="compiled")
    finally:
        torch.set_default_dtype(torch.float32)
    wanted = ff.multipole_attention(q, k, v, **options, impl="torch")
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(first, wanted)


def test_odd_strides_of_axes_of_length_one_and_wide_summaries() -> None:
    k = torch.randn(2, 3, 1, 40).transpose(2, 3)
    torch.testing.assert_close(
        *(ff.multipole_attention(k, k, k, block=4, rank=2, impl=i) for i in ("compiled", "torch"))
    )
    x = torch.randn(1, 1, 64, 8)
    ready = ff.Summaries(*(tuple(t.double() for t in side) for side in ff.summarise(x, x, block=8, rank=2)))
    torch.testing.assert_close(
        *(ff.multipole_attention(x, x, x, block=8, rank=2, summary=ready, impl=i) for i in ("compiled", "torch"))
    )


def test_it_is_chosen_where_it_can_run() -> None:
    q, k, v = (x.detach().float() for x in tensors(1, 2, 1, 300, 16))
    options: dict[str, Any] = {"block": 16, "rank": 4, "causal": True}
    chosen, named = (ff.multipole_attention(q, k, v, **options, impl=impl) for impl in (None, "compiled"))
    assert torch.equal(chosen, named) and not torch.equal(
        chosen, ff.multipole_attention(q, k, v, **options, impl="torch")
    )  # type: ignore[arg-type]
    wide = [x.double() for x in (q, k, v)]
    assert torch.equal(  # type: ignore[arg-type]
        ff.multipole_attention(*wide, **options), ff.multipole_attention(*wide, **options, impl="torch")
    )


@pytest.mark.parametrize(
    ("options", "dtype", "words"),
    [({"dropout": 0.5}, torch.float32, "dropout"), ({}, torch.float64, "float64"), ({}, torch.float32, None)],
)
def test_why_not(options: dict[str, Any], dtype: torch.dtype, words: str | None) -> None:
    q = torch.zeros(1, 1, 8, 4, dtype=dtype)
    reason = can_run("compiled", Request.of(q, dropout=bool(options)))
    if words is None:
        assert reason is None
        return
    assert reason is not None and words in reason
    with pytest.raises(ValueError, match=words):
        ff.multipole_attention(q, q, q, block=4, rank=2, impl="compiled", **options)
