"""The torch engine: equal to the reference, gradients included, and safe where numbers are missing or are none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import farfield as ff
from farfield.geometry import geometry
from farfield.ops import tiles
from farfield.ops.multipole.summary import pack, unpack
from support.multipole_cases import KINDS, Case, assert_same, cases, make_summary, tensors

Run = tuple[Tensor, Tensor, list[Tensor]]


def both_engines(case: Case) -> None:
    assert_same(case, case.gradients(impl="torch"), case.gradients(impl="reference"))


@settings(max_examples=150)
@given(cases())
def test_engines_agree(case: Case) -> None:
    """Every summary, grouped heads, masks, sinks, packed sequences, pooled queries, parts, fewer levels, any grid."""
    both_engines(case)


@settings(max_examples=25)
@given(cases(most_tokens=330, dims=(1,)))
def test_engines_agree_on_deep_trees(case: Case) -> None:
    both_engines(case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grid", "block", "rank", "options"),
    [
        ((97,), (4,), (2,), {"causal": True, "sinks": 6}),
        ((9, 20), (2, 4), (1, 2), {"query_rank": (2, 2)}),
        ((7, 6, 8), (2, 1, 2), (1, 1, 2), {"sinks": 3}),
    ],
)
def test_chunks_do_not_show(
    kind: str, grid: tuple[int, ...], block: tuple[int, ...], rank: tuple[int, ...], options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, poisoned: None,
) -> None:  # fmt: skip
    """One chunk, chunks of a few units and a chunk per unit give the same, with all new memory poisoned."""
    g = geometry(grid, block, rank)
    bias = torch.randn(g.levels, 4, dtype=torch.float64).requires_grad_()
    case = Case(g, *tensors(2, 4, 2, g.tokens, 3), make_summary(kind, g, 2, 2, 3), bias, dict(options))
    case.options["key_mask"] = torch.rand(2, g.tokens) > 0.3
    truth = case.gradients(impl="reference")
    for scores in (1, 1500, 1 << 20):
        monkeypatch.setitem(tiles.CHUNK_SCORES, "cpu", scores)
        assert_same(case, case.gradients(impl="torch"), truth)


@settings(max_examples=30)
@given(cases())
def test_new_memory_is_never_read(case: Case) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    clean = case.gradients(impl="torch")
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(4).isnan().all()
        again = case.gradients(impl="torch")
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(clean[0], again[0]) and torch.equal(clean[1], again[1])
    assert all(torch.equal(a, b) for a, b in zip(clean[2], again[2], strict=True))


@settings(max_examples=30)
@given(
    cases(kinds=("mean", "shared", "pooled", "learned"), packed=False), st.sampled_from((float("nan"), float("inf")))
)
def test_hidden_tokens_leak_nothing(case: Case, poison: float) -> None:
    """Keys and values that the mask hides may hold anything; their gradients are zero."""
    if "key_mask" not in case.options:
        case.options["key_mask"] = torch.rand(case.key.shape[0], case.shape.tokens) < 0.7
    hidden = ~case.options["key_mask"][:, None, :, None]
    dirty = replace(
        case,
        key=case.key.detach().masked_fill(hidden, poison).requires_grad_(),
        value=case.value.detach().masked_fill(hidden, poison).requires_grad_(),
    )
    for impl in ("torch", "reference"):
        clean, got = case.gradients(impl=impl), dirty.gradients(impl=impl)
        assert_same(case, got, clean)
        assert (got[2][1].masked_select(hidden) == 0).all() and (got[2][2].masked_select(hidden) == 0).all()


@settings(max_examples=20)
@given(cases(kinds=("mean", "shared", "pooled"), packed=False))
def test_queries_of_hidden_tokens_leak_nothing(case: Case) -> None:
    """A padded token whose query is NaN spoils its own row only, with pooled queries too."""
    if "key_mask" not in case.options:
        case.options["key_mask"] = torch.rand(case.key.shape[0], case.shape.tokens) < 0.7
    shown = case.options["key_mask"][:, None, :, None]
    dirty = replace(case, query=case.query.detach().masked_fill(~shown, float("nan")).requires_grad_())
    out, lse = case.run(impl="torch")
    got, got_lse = dirty.run(impl="torch")
    torch.testing.assert_close(got.masked_select(shown), out.masked_select(shown))
    torch.testing.assert_close(got_lse.masked_select(shown[..., 0]), lse.masked_select(shown[..., 0]))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"query_rank": 2}, {"causal": True, "sinks": 2}, {"part": "far"}]
)
def test_rows_that_see_nothing(kind: str, impl: str, options: dict[str, Any]) -> None:
    """0 and -inf, with zero gradients and no NaN, whatever flows into output and lse."""
    g = geometry((37,), 4, 2)
    case = Case(g, *tensors(2, 2, 2, 37, 3), make_summary(kind, g, 2, 2, 3), None, dict(options))
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0], mask[1, :20] = False, False
    case.options["key_mask"] = mask
    out, lse, grads = case.gradients(impl=impl)
    empty = lse == -torch.inf
    assert empty[0].all() and not empty[1, :, -1].any()
    if options.get("causal"):
        assert empty[1, :, :20].all()
    assert (out[empty] == 0).all()
    assert all(torch.isfinite(x).all() for x in (out, lse[~empty], *grads))
    assert (grads[0][empty] == 0).all() and (grads[1][0] == 0).all() and (grads[2][0] == 0).all()


@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 8, 9, 13, 17, 31, 61])
@pytest.mark.parametrize("kind", ["mean", "shared", "pooled", "learned"])
def test_tiny_and_prime_lengths(number: int, kind: str) -> None:
    for block, rank in ((1, 1), (2, 1), (4, 4), (64, 8)):
        g = geometry((number,), block, rank)
        case = Case(g, *tensors(1, 2, 1, number, 2), make_summary(kind, g, 1, 1, 2))
        case.options = {"causal": number % 2 == 1}
        both_engines(case)


@settings(max_examples=20)
@given(cases(kinds=("mean", "shared", "pooled")))
def test_strides_do_not_matter(case: Case) -> None:
    def odd(x: Tensor) -> Tensor:
        spread = x.detach().permute(3, 2, 0, 1).repeat_interleave(2, 0).contiguous()[::2]
        return spread.permute(2, 3, 1, 0).requires_grad_()

    strided = replace(case, query=odd(case.query), key=odd(case.key), value=odd(case.value))
    assert strided.query.numel() == 1 or strided.query.stride() != case.query.stride()
    assert_same(case, strided.gradients(), case.gradients())
    expanded = replace(case, query=case.query[:, :1].expand_as(case.query))
    dense = replace(case, query=case.query[:, :1].expand_as(case.query).contiguous())
    torch.testing.assert_close(expanded.run(), dense.run())


@settings(max_examples=25)
@given(st.data())
def test_padding_at_the_end_does_not_show(data: st.DataObject) -> None:
    """A padded batch with one mask per entry equals every entry alone at its own length, gradients included."""
    number = data.draw(st.integers(2, 90))
    lengths = data.draw(st.lists(st.integers(1, number), min_size=2, max_size=3))
    kind = data.draw(st.sampled_from(("mean", "shared", "pooled")))
    options: dict[str, Any] = {"causal": data.draw(st.booleans()), "sinks": data.draw(st.sampled_from((0, 2)))}
    if not options["causal"] and data.draw(st.booleans()):
        options["query_rank"] = 2
    g = geometry((number,), 4, 2)
    bias = torch.randn(g.levels, 2, dtype=torch.float64).requires_grad_()
    summary = make_summary(kind, g, 1, 1, 3)
    case = Case(g, *tensors(len(lengths), 2, 1, number, 3), summary, bias, dict(options))
    case.options["key_mask"] = torch.arange(number) < torch.tensor(lengths)[:, None]
    out, lse = case.run()
    weight = torch.randn_like(out)
    kept = case.options["key_mask"][:, None, :, None]
    loss = ((out * weight).masked_fill(~kept, 0.0)).sum() + lse.masked_fill(~kept[..., 0], 0.0).sum()
    grads = torch.autograd.grad(loss, case.leaves, allow_unused=True)
    total = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths):
        q, k, v = (x[b : b + 1, :, :length] for x in (case.query, case.key, case.value))
        alone = Case(geometry((length,), 4, 2), q, k, v, summary, bias, options)
        single, single_lse = alone.run()
        torch.testing.assert_close(out[b : b + 1, :, :length], single)
        torch.testing.assert_close(lse[b : b + 1, :, :length], single_lse)
        total = total + (single * weight[b : b + 1, :, :length]).sum() + single_lse.sum()
    for got, wanted in zip(grads, torch.autograd.grad(total, case.leaves, allow_unused=True), strict=True):
        if got is not None:
            torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted)


@pytest.mark.parametrize("bounds", [[0, 4, 16], [0, 4, 16, 18, 22], [0, 2, 18, 22, 22], [0, 2, 8, 14, 22]])
@pytest.mark.parametrize("block", [1, 2])
def test_packed_sequences_that_fill_all_blocks(bounds: list[int], block: int) -> None:
    """No padding at all, yet sequences with more levels come first in the block order."""
    g = geometry((bounds[-1] * block,), block, 1)
    case = Case(g, *tensors(1, 2, 1, g.tokens, 3), "mean", None, {"causal": True, "levels": None})
    case.options["cu_seqlens"] = torch.tensor(bounds) * block
    both_engines(case)


@settings(max_examples=40)
@given(cases(kinds=("mean", "shared", "pooled"), dims=(1,), packed=False))
def test_packed_sequences_equal_each_alone(case: Case) -> None:
    cuts = sorted(torch.randint(0, case.shape.tokens + 1, (3,)).tolist())
    bounds = [0, *cuts, case.shape.tokens]
    case.options.pop("key_mask", None)
    case.options["levels"] = None
    together = case.run(
        cu_seqlens=torch.tensor(bounds), key_mask=torch.zeros(case.key.shape[0], case.shape.tokens, dtype=torch.bool)
    )
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if stop > start:
            q, k, v = (x[:, :, start:stop] for x in (case.query, case.key, case.value))
            alone = case.run(query=q, key=k, value=v, grid=None)
            torch.testing.assert_close(together[0][:, :, start:stop], alone[0])
            torch.testing.assert_close(together[1][:, :, start:stop], alone[1])


@settings(max_examples=30)
@given(cases(parts=("both",)))
def test_near_and_far_merge_to_both(case: Case) -> None:
    """The two parts are states of one softmax: merged by lse they give the whole, gradients included."""
    whole = case.gradients()
    near, far = (ff.AttentionState(*case.run(part=part)) for part in ("near", "far"))
    merged = ff.merge_states(near, far)

    class Merged(Case):
        def run(self, **_: Any) -> tuple[Tensor, Tensor]:
            return merged.out, merged.lse

    again = Merged(case.shape, case.query, case.key, case.value, case.summary, case.level_bias, case.options)
    assert_same(case, again.gradients(), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    """Against finite differences, lse and weights included."""
    g = geometry((15,), 2, 2)
    bias = torch.randn(g.levels, 2, dtype=torch.float64).requires_grad_()
    summary = make_summary(kind, g, 1, 1, 2)
    case = Case(g, *tensors(1, 2, 1, 15, 2), summary, bias, {"causal": True, "sinks": 1})
    packed, _ = pack(summary)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return case.run(query=q, key=k, value=v, level_bias=bias, summary=unpack(packed, weights))

    assert torch.autograd.gradcheck(run, tuple(case.leaves), fast_mode=kind != "pooled")


def test_gradcheck_pooled_queries_on_an_image() -> None:
    g = geometry((5, 7), (1, 2), (1, 2))
    case = Case(g, *tensors(2, 1, 1, 35, 2), "mean", None, {"query_rank": (1, 1), "sinks": 2})
    case.options["key_mask"] = torch.rand(2, 35) > 0.3
    assert torch.autograd.gradcheck(
        lambda q, k, v: case.run(query=q, key=k, value=v), (case.query, case.key, case.value), fast_mode=True
    )


def test_second_derivatives_are_refused_not_wrong() -> None:
    g = geometry((23,), 2, 2)
    case = Case(g, *tensors(1, 1, 1, 23, 2))
    out, _ = case.run()
    (grad,) = torch.autograd.grad(out.square().sum(), case.query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("causal", [True, False])
def test_only_what_is_asked_for_gets_gradients(causal: bool) -> None:
    q, k, v = tensors(1, 2, 1, 40, 3)
    out = ff.multipole_attention(q.detach(), k, v.detach(), block=4, rank=2, causal=causal)
    (grad,) = torch.autograd.grad(out.sum(), k)
    out = ff.multipole_attention(q, k, v, block=4, rank=2, causal=causal)
    torch.testing.assert_close(grad, torch.autograd.grad(out.sum(), k)[0])
    assert not ff.multipole_attention(q.detach(), k.detach(), v.detach(), block=4, rank=2).requires_grad


def test_gradient_of_lse_alone() -> None:
    g = geometry((61,), 4, 2)
    case = Case(g, *tensors(1, 2, 2, 61, 3), "mean", None, {"causal": True})
    for impl in ("torch", "reference"):
        _, lse = case.run(impl=impl)
        grads = torch.autograd.grad(lse.sum(), (case.query, case.key, case.value), allow_unused=True)
        assert grads[2] is None or (grads[2] == 0).all()
        if impl == "torch":
            first = grads
    torch.testing.assert_close(first[:2], grads[:2])


def test_large_scores_neither_overflow_nor_lose_rows() -> None:
    g = geometry((70,), 4, 2)
    case = Case(
        g, *(x.detach().mul(300).requires_grad_() for x in tensors(1, 2, 2, 70, 4)), "mean", None, {"causal": True}
    )
    both_engines(case)
    q, k, v = (x.detach().float() for x in (case.query, case.key, case.value))
    out = ff.multipole_attention(q, k, v, block=4, rank=2, causal=True)
    assert torch.isfinite(out).all()


def test_no_batch_entries() -> None:
    q, k, v = tensors(0, 2, 1, 40, 3)
    for options in ({"causal": True}, {"query_rank": 2}, {"sinks": 2, "part": "far"}):
        out, lse = ff.multipole_attention(q, k, v, block=4, rank=2, return_lse=True, **options)  # type: ignore[arg-type]
        assert out.shape == q.shape and lse.shape == q.shape[:-1]
        out.sum().backward()
