"""What a caller of multipole_attention may count on: exact limits, causality, precision, dropout, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import farfield as ff
from farfield.geometry import Geometry, geometry
from farfield.ops.multipole import averaging, reference
from farfield.ops.multipole.analysis import _arguments, _pieces
from farfield.ops.multipole.summary import pack, unpack
from support.multipole_cases import KINDS, Case, cases, geometries, make_summary, tensors

IMPLS = ("torch", "reference")

# What the definition promises -----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(cases(kinds=("mean", "pooled")), st.sampled_from(IMPLS))
def test_ones_give_ones(case: Case, impl: str) -> None:
    out, lse = case.run(value=torch.ones_like(case.value), impl=impl)
    torch.testing.assert_close(out, (lse > -torch.inf).double()[..., None].expand_as(out))


@settings(max_examples=20)
@given(cases(kinds=("mean",)))
def test_averaging_weights_are_the_mean(case: Case) -> None:
    """The shared summary at its start and the pooled one with a zero query are the mean; ones give ones too."""
    truth = case.run()
    heads, width = case.key.shape[1], case.key.shape[3]
    shared = averaging(case.shape, heads, width, torch.float64)
    torch.testing.assert_close(case.run(summary=shared), truth)
    torch.testing.assert_close(case.run(summary=ff.PooledSummary(torch.zeros(1, width, dtype=torch.float64))), truth)
    ones, lse = case.run(summary=shared, value=torch.ones_like(case.value))
    torch.testing.assert_close(ones, (lse > -torch.inf).double()[..., None].expand_as(ones))


@settings(max_examples=40)
@given(cases(kinds=("mean", "pooled", "averaging"), pooled_queries=False))
def test_one_vector_added_to_all_keys_changes_nothing(case: Case) -> None:
    if case.summary == "mean" and case.level_bias is not None:
        case.summary = averaging(case.shape, case.key.shape[1], case.key.shape[3], torch.float64)
    shift = torch.randn(case.key.shape[0], case.key.shape[1], 1, case.key.shape[3], dtype=torch.float64)
    out, lse = case.run()
    moved, moved_lse = case.run(key=case.key + shift)
    torch.testing.assert_close(moved, out)
    scale = case.options["scale"] or case.query.shape[-1] ** -0.5
    step = scale * (case.query * shift.repeat_interleave(case.query.shape[1] // case.key.shape[1], 1)).sum(-1)
    torch.testing.assert_close(moved_lse, lse + step)


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None = None) -> Tensor:
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal and mask is not None:
        mask, causal = mask & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), False
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("grid", "block", "rank", "levels"),
    [
        ((16,), 8, 2, 0), ((9,), 8, 1, 0), ((1,), 4, 2, 0), ((7, 8), 4, 2, 0), ((3, 4, 2), 2, 1, 0),  # no far field
        ((32,), 8, 8, 1), ((13,), 4, 4, 1), ((40,), 4, 4, 1), ((9, 14), (3, 4), (3, 4), 1),
        ((7, 4, 3), 2, 2, 1),  # the last five: cells of one token
    ],
)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_exact_limits(grid: tuple[int, ...], block: Any, rank: Any, levels: int, causal: bool, impl: str) -> None:
    if causal and len(grid) > 1:
        pytest.skip("causal is 1-D")
    g = geometry(grid, block, rank, levels)
    q, k, v = tensors(2, 4, 2, g.tokens, 3)
    mask = torch.rand(2, g.tokens) > 0.3
    mask[:, 0] = True
    for key_mask in (None, mask):
        for sinks in (0, 2):
            out = ff.multipole_attention(
                q,
                k,
                v,
                grid=grid,
                block=block,
                rank=rank,
                levels=levels,
                causal=causal,
                key_mask=key_mask,
                sinks=sinks,
                impl=impl,
            )
            truth = exact(q, k, v, causal, key_mask)
            torch.testing.assert_close(out, truth)
            weight = torch.randn_like(out)
            got, wanted = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, truth))
            torch.testing.assert_close(got, wanted)


@settings(max_examples=40)
@given(geometries(), st.booleans(), st.sampled_from(("mean", "shared", "pooled")), st.sampled_from((0, 3)))
def test_exact_when_far_cells_are_constant(g: Geometry, causal: bool, kind: str, sinks: int) -> None:
    """A query whose far cells hold one key and one value each sees exact attention."""
    causal = causal and g.dims == 1
    q, k, v = (x.detach() for x in tensors(1, 2, 1, g.tokens, 3))
    where = torch.stack(torch.meshgrid(*(torch.arange(n) for n in g.grid), indexing="ij"), -1).reshape(-1, g.dims)
    probe = int(torch.randint(g.tokens, ()))

    def flatten(x: Tensor) -> Tensor:
        """Constant in the cell through which the probe sees each token; the tokens next to it stay as they are."""
        x = x.clone()
        left = torch.ones(g.tokens, dtype=torch.bool)
        for level in range(1, g.levels + 1):
            group = where // torch.tensor(g.group_side(level))
            far = ((group - group[probe]).abs() > 1).any(-1)
            if level < g.levels:
                far &= ((group // 2 - group[probe] // 2).abs() <= 1).all(-1)
            cell = where // torch.tensor(g.cell_side(level))
            _, index = cell.unique(dim=0, return_inverse=True)
            fresh = torch.randn(1, x.shape[1], int(index.max()) + 1, x.shape[3], dtype=x.dtype)
            x = torch.where((far & left)[:, None], fresh[:, :, index], x)
            left &= ~far
        return x

    k, v = flatten(k), flatten(v)
    summary = averaging(g, 1, 3, torch.float64) if kind == "shared" else make_summary(kind, g, 1, 1, 3)
    out = ff.multipole_attention(
        q, k, v, grid=g.grid, block=g.block, rank=g.rank, levels=g.levels, causal=causal, summary=summary, sinks=sinks
    )
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out[:, :, probe], exact(q, k, v, causal)[:, :, probe])


# Causality ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(cases(dims=(1,), kinds=("mean", "shared", "pooled", "learned"), pooled_queries=False), st.data())
def test_the_future_cannot_be_seen(case: Case, data: st.DataObject) -> None:
    """Whatever comes after token i, enormous values too, outputs up to i stay bit for bit; gradients are exactly 0."""
    case.options["causal"] = True
    number = case.shape.tokens
    i = data.draw(st.integers(0, number - 1))
    later = torch.arange(number)[:, None] > i
    out, lse = case.run()
    for size in (1.0, 1e15):
        query, key, value = (
            torch.where(later, size * torch.randn_like(x), x) for x in (case.query, case.key, case.value)
        )
        again, again_lse = case.run(query=query, key=key, value=value)
        assert torch.equal(again[:, :, : i + 1], out[:, :, : i + 1])
        assert torch.equal(again_lse[:, :, : i + 1], lse[:, :, : i + 1])
    seen = out[:, :, : i + 1]
    loss = (seen * torch.randn_like(seen)).sum() + lse[:, :, : i + 1].clamp(min=-1e9).sum()
    for grad in torch.autograd.grad(loss, (case.query, case.key, case.value)):
        assert (grad.masked_select(later) == 0).all()


def test_the_past_is_seen() -> None:
    """And every token of the past, near or far, moves the last output."""
    q, k, v = tensors(1, 1, 1, 100, 3)
    out = ff.multipole_attention(q, k, v, block=4, rank=2, causal=True)
    grads = torch.autograd.grad(out[:, :, -1].sum(), (k, v))
    assert all((g.abs().sum(-1) > 0).all() for g in grads)


# Precision ------------------------------------------------------------------------------------------------------------


def plain_torch(q: Tensor, k: Tensor, v: Tensor, g: Geometry, causal: bool) -> Tensor:
    """The same formula by ordinary torch operations, everything in the precision of the inputs.

    Cell means, one list of scores on all tokens and cells, torch.softmax, one product with all values.
    """
    where = torch.arange(g.tokens)
    block = where // g.block[0]
    seen = [(block[:, None] - block[None]).abs() <= 1]
    keys, values, biases = [k], [v], [torch.zeros(g.tokens, dtype=q.dtype)]
    if causal:
        seen[0] &= where[:, None] >= where[None]
    for level in range(1, g.levels + 1):
        side, cell = g.group_side(level)[0], g.cell_side(level)[0]
        cells = torch.arange(-(-g.tokens // cell))
        inside = (where // cell)[None] == cells[:, None]
        mean = inside.to(q.dtype) / inside.sum(-1, keepdim=True).to(q.dtype)
        keys.append(mean @ k)
        values.append(mean @ v)
        biases.append(inside.sum(-1).to(q.dtype).log())
        own, other = where // side, cells * cell // side
        far = (own[:, None] - other[None]).abs() > 1
        if level < g.levels:
            far &= (own[:, None] // 2 - other[None] // 2).abs() <= 1
        if causal:
            far &= other[None] < own[:, None]
        seen.append(far)
    scores = q @ torch.cat(keys, 2).mT * q.shape[-1] ** -0.5 + torch.cat(biases)
    return scores.masked_fill(~torch.cat(seen, 1), -torch.inf).softmax(-1) @ torch.cat(values, 2)


def test_plain_torch_is_the_same_formula() -> None:
    q, k, v = tensors(1, 2, 2, 150, 4)
    for causal in (True, False):
        out = ff.multipole_attention(q, k, v, block=8, rank=4, causal=causal)
        torch.testing.assert_close(plain_torch(q, k, v, geometry((150,), 8, 4), causal), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("number", "block", "rank", "causal"), [(500, 16, 4, True), (333, 16, 8, False), (96, 48, 8, True)]
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_error_budget(dtype: torch.dtype, number: int, block: int, rank: int, causal: bool, scale: float) -> None:
    """Against float64 at most twice the error (RMS) of plain torch in the same precision, three times for gradients."""
    g = geometry((number,), block, rank)
    leaves = [(x.detach() * scale).to(dtype).requires_grad_() for x in tensors(2, 4, 4, number, 32)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    weight = torch.randn(2, 4, number, 32).to(dtype)
    truth = ff.multipole_attention(*wide, block=block, rank=rank, causal=causal, impl="reference")
    ours = ff.multipole_attention(*leaves, block=block, rank=rank, causal=causal)
    plain = plain_torch(*leaves, g, causal)
    assert isinstance(ours, Tensor) and isinstance(truth, Tensor) and ours.dtype == dtype

    def rms(x: Tensor, y: Tensor) -> float:
        return (x.detach().double() - y.detach()).square().mean().sqrt().item()

    assert rms(ours, truth) <= 2 * rms(plain, truth)
    assert (ours.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max()
    wanted = torch.autograd.grad((truth * weight.double()).sum(), wide)
    got, theirs = (torch.autograd.grad((x * weight).sum(), leaves) for x in (ours, plain))
    for a, b, c in zip(got, theirs, wanted, strict=True):
        assert a.dtype == dtype
        assert rms(a, c) <= 3 * rms(b, c)


def test_error_budget_against_sdpa_where_the_method_is_exact() -> None:
    q, k, v = (x.detach().bfloat16() for x in tensors(1, 4, 2, 128, 32))
    truth = exact(q.double(), k.double(), v.double(), True)
    theirs = (exact(q, k, v, True).double() - truth).square().mean().sqrt()
    for block, rank in ((64, 8), (32, 32)):
        out = ff.multipole_attention(q, k, v, block=block, rank=rank, causal=True)
        assert isinstance(out, Tensor)
        assert (out.double() - truth).square().mean().sqrt() <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"causal": True, "sinks": 2}, {"query_rank": 2}, {"part": "far"}, {"part": "near"}]
)
@pytest.mark.parametrize("kind", ["mean", "shared", "pooled", "learned", "given"])
def test_dtypes(dtype: torch.dtype, kind: str, options: dict[str, Any]) -> None:
    """Output and gradients in the dtype of the inputs, lse in float32 or wider, weights in their own."""
    g = geometry((50,), 4, 2)
    summary = make_summary(kind, g, 1, 2, 8)
    if not isinstance(summary, str):
        name, weights = pack(summary)
        summary = unpack(name, [w.detach().float().requires_grad_() for w in weights])
    bias = torch.zeros(g.levels, 4, requires_grad=True)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors(1, 4, 2, 50, 8))
    case = Case(g, q, k, v, summary, bias, dict(options))
    out, lse, grads = case.gradients()
    assert out.dtype == dtype and out.is_contiguous() and out.shape == q.shape
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(grad.dtype == x.dtype and grad.shape == x.shape for grad, x in zip(grads, case.leaves, strict=True))
    truth = case.run(query=q.double(), key=k.double(), value=v.double(), impl="reference")
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}[dtype]
    torch.testing.assert_close(out.double(), truth[0].double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"causal": True}, {"query_rank": 2}])
def test_autocast_is_a_cast_of_the_inputs(kind: str, options: dict[str, Any]) -> None:
    """The call equals that with cast inputs outside, bit for bit: the arithmetic inside stays float32."""
    g = geometry((50,), 4, 2)
    summary = make_summary(kind, g, 1, 2, 8)
    if not isinstance(summary, str):
        name, weights = pack(summary)
        summary = unpack(name, [w.detach().float().requires_grad_() for w in weights])
    q, k, v = (x.detach().float().requires_grad_() for x in tensors(1, 4, 2, 50, 8))
    case = Case(g, q, k, v, summary, None, dict(options))
    low = {"query": q.bfloat16(), "key": k.bfloat16(), "value": v.bfloat16()}
    truth = case.gradients(**low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.gradients()
        dense = case.run(impl="reference")
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    assert torch.equal(got[0], truth[0]) and torch.equal(got[1], truth[1])
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got[2], truth[2], strict=True))
    for x, y in zip(dense, case.run(impl="reference", **low), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = (x.detach() for x in tensors(1, 4, 2, 50, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ff.multipole_attention(q, k, v, block=4, rank=2)
    assert torch.equal(out, ff.multipole_attention(q, k, v, block=4, rank=2))  # type: ignore[arg-type]


# Dropout --------------------------------------------------------------------------------------------------------------

DROPPED = [{"causal": True}, {"query_rank": 2}, {"grid": (5, 10), "sinks": 2}, {"part": "far"}, {"part": "near"}]


@pytest.mark.parametrize("options", DROPPED)
def test_dropout_is_drawn_from_the_seed(options: dict[str, Any]) -> None:
    q, k, v = tensors(2, 4, 2, 50, 4)

    def run(seed: int, rate: float) -> Tensor:
        torch.manual_seed(seed)
        return ff.multipole_attention(q, k, v, block=4, rank=2, dropout=rate, **options)  # type: ignore[return-value]

    assert torch.equal(run(1, 0.3), run(1, 0.3))
    assert not torch.equal(run(1, 0.3), run(2, 0.3))
    state = torch.get_rng_state()
    assert torch.equal(run(1, 0.0), run(2, 0.0))
    torch.set_rng_state(state)
    plain = ff.multipole_attention(q, k, v, block=4, rank=2, **options)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(plain, run(1, 0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", DROPPED)
def test_dropout_keeps_the_mean(options: dict[str, Any], impl: str) -> None:
    """The mean over many draws is the output without; the lse does not know of it; the share of zeros is the rate."""
    q, k, v = (x.detach() for x in tensors(1, 2, 1, 50, 4))
    draws = 64
    options = {"block": 4, "rank": 2, "return_lse": True, "impl": impl, **options}
    truth, lse = ff.multipole_attention(q, k, v, **options)
    many = [x.expand(draws, -1, -1, -1) for x in (q, k, v)]
    out, dropped_lse = ff.multipole_attention(*many, dropout=0.25, **options)
    torch.testing.assert_close(dropped_lse, lse.expand_as(dropped_lse))
    error = (out.mean(0) - truth[0]) / (out.std(0) / draws**0.5).clamp(min=1e-9)
    assert (out.std(0) > 0).double().mean() > 0.9
    assert error.abs().max() < 6 and error.square().mean() < 2.0
    # Values of one: an output is (kept weights) / (1 - rate), of variance rate / (1 - rate) * sum of squared weights.
    ones = many[2] * 0 + 1
    spread = ff.multipole_attention(many[0], many[1], ones, dropout=0.25, **options)[0][..., 0].var(0)
    w = _squares(q, k, {n: o for n, o in options.items() if n not in ("return_lse", "impl")})
    assert float((spread / (w / 3)).log().mean().abs()) < 0.3


def _squares(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """[H, N] sum of the squared weights on tokens and cells."""
    call, fixed = _arguments(q, k, k, options)
    ((_, shape, valid),) = _pieces(call)
    w = reference.weights(call["query"], call["key"], call["value"], shape=shape, valid=valid, summary="mean", **fixed)
    return sum((x.square().sum(-1)[0] for x in w.cells), w.tokens.square().sum(-1)[0])


@pytest.mark.parametrize("options", DROPPED)
def test_dropout_gradients(options: dict[str, Any]) -> None:
    """Finite differences with the seed held fixed: the backward pass drops what the forward pass dropped."""
    q, k, v = tensors(1, 2, 1, 50, 2)
    bias = torch.randn(5, 2, dtype=torch.float64).requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return ff.multipole_attention(
            q, k, v, block=4, rank=2, dropout=0.3, level_bias=bias, return_lse=True, **options
        )  # type: ignore[return-value]

    assert torch.autograd.gradcheck(run, (q, k, v, bias), fast_mode=True)


# Bad input ------------------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


Q = zeros(2, 4, 64, 8)
KV = zeros(2, 2, 64, 8)
SMALL = {"block": 4, "rank": 2}  # levels: 3


@pytest.mark.parametrize(
    ("tensors_", "options", "error", "words"),
    [
        ((zeros(4, 64, 8), KV, KV), {}, ValueError, ["query", "[4, 64, 8]", "[B, H, N, D]"]),
        ((Q, zeros(2, 2, 64), KV), {}, ValueError, ["key", "[2, 2, 64]"]),
        ((Q.long(), KV, KV), {}, TypeError, ["query", "int64", "bfloat16"]),
        ((Q, KV, zeros(2, 2, 64, 4)), {}, ValueError, ["value", "[2, 2, 64, 4]", "one shape"]),
        ((Q, zeros(2, 2, 32, 8), zeros(2, 2, 32, 8)), {}, ValueError, ["[2, 2, 32, 8]", "share B, N and D"]),
        ((Q, zeros(1, 2, 64, 8), zeros(1, 2, 64, 8)), {}, ValueError, ["[1, 2, 64, 8]", "share"]),
        ((Q, zeros(2, 3, 64, 8), zeros(2, 3, 64, 8)), {}, ValueError, ["4 heads", "key 3", "multiple"]),
        ((zeros(2, 4, 0, 8), zeros(2, 4, 0, 8), zeros(2, 4, 0, 8)), {}, ValueError, ["[2, 4, 0, 8]", "N >= 1"]),
        ((Q, KV.double(), KV), {}, TypeError, ["float32", "float64", "one for all"]),
        ((Q, KV, KV), {"grid": (8, 9)}, ValueError, ["(8, 9)", "72", "N=64"]),
        ((Q, KV, KV), {"grid": (2, 2, 4, 4)}, ValueError, ["4 axes", "(T, H, W)"]),
        ((Q, KV, KV), {"grid": ()}, ValueError, ["0 axes"]),
        ((Q, KV, KV), {"grid": (8, 8), "causal": True}, ValueError, ["causal=True", "(8, 8)", "1-D"]),
        ((Q, KV, KV), {"block": (4, 4)}, ValueError, ["block=(4, 4)", "1-D"]),
        ((Q, KV, KV), {"block": 0}, ValueError, ["block=0", ">= 1"]),
        ((Q, KV, KV), {"block": 4.0}, (ValueError, TypeError), []),
        ((Q, KV, KV), {"rank": 3}, ValueError, ["rank=3", "block=4", "[1, 2, 4]"]),
        ((Q, KV, KV), {"query_rank": 3}, ValueError, ["query_rank=3", "[1, 2, 4]"]),
        ((Q, KV, KV), {"query_rank": 2, "causal": True}, ValueError, ["causal=True", "query_rank=2", "later tokens"]),
        ((Q, KV, KV), {"levels": 4}, ValueError, ["levels=4", "1 to 3"]),
        ((Q, KV, KV), {"levels": 0}, ValueError, ["levels=0", "1 to 3"]),
        ((Q, KV, KV), {"levels": -1}, ValueError, ["levels=-1", "1 to 3"]),
        ((Q, KV, KV), {"levels": -1, "cu_seqlens": torch.tensor([0, 64])}, ValueError, ["levels=-1"]),
        ((Q, KV, KV), {"levels": 3, "cu_seqlens": torch.tensor([0, 32, 64])}, ValueError, ["levels=3"]),
        ((Q, KV, KV), {"part": "middle"}, ValueError, ["'middle'", "'near'"]),
        ((Q, KV, KV), {"dropout": 1.0}, ValueError, ["dropout=1.0", "[0, 1)"]),
        ((Q, KV, KV), {"dropout": float("nan")}, ValueError, ["dropout=nan"]),
        ((Q, KV, KV), {"sinks": -1}, ValueError, ["sinks=-1", ">= 0"]),
        ((Q, KV, KV), {"sinks": 1.5}, ValueError, ["sinks=1.5"]),
        ((Q, KV, KV), {"impl": "triton9"}, ValueError, ["triton9", "reference", "torch"]),
        ((Q, KV, KV), {"summary": "median"}, ValueError, ["median", "'mean'", "SharedSummary"]),
        ((Q, KV, KV), {"summary": "shared"}, ValueError, ["'shared'", "ready weights"]),
        ((Q, KV, KV), {"summary": None}, TypeError, ["NoneType", "SharedSummary"]),
        ((Q, KV, KV), {"key_mask": torch.full((2, 64), float("nan"))}, TypeError, ["float32", "bool"]),
        ((Q, KV, KV), {"key_mask": torch.ones(2, 64)}, TypeError, ["float32", "True = the key may be seen"]),
        ((Q, KV, KV), {"key_mask": torch.ones(64, dtype=torch.bool)}, ValueError, ["[64]", "[2, 64]"]),
        ((Q, KV, KV), {"key_mask": torch.ones(2, 63, dtype=torch.bool)}, ValueError, ["[2, 63]", "[2, 64]"]),
        ((Q, KV, KV), {"cu_seqlens": torch.tensor([0, 60])}, ValueError, ["[0, 60]", "N=64"]),
        ((Q, KV, KV), {"cu_seqlens": torch.tensor([1, 64])}, ValueError, ["[1, 64]", "from 0"]),
        ((Q, KV, KV), {"cu_seqlens": torch.tensor([0, 40, 30, 64])}, ValueError, ["40, 30", "rise"]),
        ((Q, KV, KV), {"cu_seqlens": torch.tensor([0.0, 64.0])}, ValueError, ["float32", "int32"]),
        ((Q, KV, KV), {"cu_seqlens": torch.tensor([[0, 64]])}, ValueError, ["[1, 2]", "[S + 1]"]),
        ((Q, KV, KV), {"cu_seqlens": torch.tensor([0, 64]), "grid": (8, 8)}, ValueError, ["2-D", "1-D"]),
        ((Q, KV, KV), {"level_bias": zeros(3)}, ValueError, ["[3]", "Hq=4"]),
        ((Q, KV, KV), {"level_bias": zeros(3, 2)}, ValueError, ["[3, 2]", "Hq=4"]),
        ((Q, KV, KV), {"level_bias": zeros(2, 4)}, ValueError, ["2 rows", "3 levels"]),
        ((Q, KV, KV), {"level_bias": zeros(1, 4), "cu_seqlens": torch.tensor([0, 64])}, ValueError, ["1 rows", "3"]),
        ((Q, KV, KV), {"level_bias": zeros(2, 4), "cu_seqlens": torch.tensor([0, 64])}, ValueError, ["2 rows", "3"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", [None, "reference"])
def test_errors(
    tensors_: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], error: Any, words: list[str], impl: str | None
) -> None:
    """Each says what was given and what would be accepted, whichever engine was asked for."""
    with pytest.raises(error) as caught:
        ff.multipole_attention(*tensors_, **{**SMALL, "impl": impl, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_errors_of_weights(packed: bool, impl: str) -> None:
    """Weights that do not fit name the tensor, its shape and the shape needed."""
    g = geometry((64,), 4, 2)
    cu = {"cu_seqlens": torch.tensor([0, 64])} if packed else {}

    def call(summary: Any) -> None:
        ff.multipole_attention(Q, KV, KV, **SMALL, summary=summary, impl=impl, **cu)  # type: ignore[arg-type]

    shared = averaging(g, 2, 8)
    with pytest.raises(ValueError, match=r"SharedSummary.key_leaf has shape \[2, 5, 8\].*\[1, 2, 8\] or \[2, 2, 8\]"):
        call(shared._replace(key_leaf=zeros(2, 5, 8)))
    with pytest.raises(ValueError, match=r"SharedSummary.value_up has shape \[3, 2, 8\]"):
        call(shared._replace(value_up=zeros(3, 2, 8)))
    with pytest.raises(ValueError, match=r"PooledSummary.query has shape \[4\].*\[1, 8\] or \[2, 8\]"):
        call(ff.PooledSummary(zeros(4)))
    level = [ff.LevelWeights(zeros(2, 8, 4 << i), zeros(2, 8), zeros(2, 8, 4 << i), zeros(2, 8)) for i in range(3)]
    call(ff.LearnedSummary(tuple(level)))
    with pytest.raises(ValueError, match="LearnedSummary has weights for 2 levels; this length needs 3"):
        call(ff.LearnedSummary(tuple(level[:2])))
    with pytest.raises(ValueError, match=r"LearnedSummary.levels\[1\].key_weight has shape \[2, 8, 4\].*\[2, 8, 8\]"):
        call(ff.LearnedSummary((level[0], level[0], level[2])))
    ready = ff.summarise(KV, KV, **SMALL)
    if packed:
        with pytest.raises(ValueError, match="ready Summaries with cu_seqlens"):
            call(ready)
        return
    with pytest.raises(ValueError, match="Summaries has 2 key and 3 value levels"):
        call(ready._replace(keys=ready.keys[:2]))
    with pytest.raises(ValueError, match=r"Summaries.values\[0\] has shape \[2, 2, 8, 2, 8\].*\[2, 2, 16, 2, 8\]"):
        call(ready._replace(values=(ready.values[1], *ready.values[1:])))


def test_accepted_spellings() -> None:
    """Lists for tuples, one integer for all axes, int32 bounds, a mask together with bounds (which win)."""
    q, k, v = (x.detach() for x in tensors(1, 2, 1, 60, 4))
    a = ff.multipole_attention(q, k, v, grid=[6, 10], block=[2, 2], rank=[1, 1])
    assert torch.equal(a, ff.multipole_attention(q, k, v, grid=(6, 10), block=2, rank=1))  # type: ignore[arg-type]
    assert torch.equal(a, ff.multipole_attention(q, k, v, grid=torch.Size((6, 10)), block=2, rank=(1, 1), levels=2))  # type: ignore[arg-type]
    bounds = torch.tensor([0, 7, 60], dtype=torch.int32)
    hidden = torch.zeros(1, 60, dtype=torch.bool)
    b = ff.multipole_attention(q, k, v, block=4, rank=2, cu_seqlens=bounds)
    assert torch.equal(b, ff.multipole_attention(q, k, v, block=4, rank=2, cu_seqlens=bounds.long(), key_mask=hidden))  # type: ignore[arg-type]
    assert torch.equal(b, ff.multipole_attention(q, k, v, block=4, rank=2, cu_seqlens=bounds, grid=(60,), impl="torch"))  # type: ignore[arg-type]
