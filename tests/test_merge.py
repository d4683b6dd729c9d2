"""Attention states and merges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.merge import (
    AttentionState,
    Gate,
    Softmax,
    Sum,
    attend_dense,
    merge_states,
    resolve_merge,
    state_from_scores,
)
from farfield.parts import LayerSpec

INF = float("inf")


def _qkv(seed: int, tokens: int = 6, keys: int = 9, heads: int = 2, kv_heads: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, tokens, 4), (2, kv_heads, keys, 4), (2, kv_heads, keys, 4)]
    return [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]


def _parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cuts: list[int]) -> list[AttentionState]:
    return [
        attend_dense(q, k[:, :, a:b], v[:, :, a:b], scale=0.7)
        for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        if b > a
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 9), max_size=3), st.sampled_from([1, 2]))
def test_the_merge_of_split_keys_is_one_softmax_with_its_gradients(seed: int, cuts: list[int], kv_heads: int) -> None:
    q, k, v = _qkv(seed, kv_heads=kv_heads)
    whole = attend_dense(q, k, v, scale=0.7)
    merged = merge_states(*_parts(q, k, v, [0, *sorted(cuts), 9]))
    g = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(whole.out.shape, generator=g, dtype=torch.float64)
    weights_lse = torch.randn(whole.lse.shape, generator=g, dtype=torch.float64)

    def gradients(state: AttentionState) -> tuple[torch.Tensor, ...]:
        loss = (state.out * weights).sum() + (state.lse * weights_lse).sum()
        return torch.autograd.grad(loss, (q, k, v))

    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)
    for got, want in zip(gradients(merged), gradients(whole), strict=True):
        torch.testing.assert_close(got, want)


def test_merge_is_associative_and_commutative() -> None:
    a, b, c = _parts(*_qkv(0), [0, 2, 5, 9])
    left = merge_states(merge_states(a, b), c)
    for other in (merge_states(a, merge_states(b, c)), merge_states(c, a, b), merge_states(a, b, c)):
        torch.testing.assert_close(other.out, left.out)
        torch.testing.assert_close(other.lse, left.lse)


def test_a_dense_state_is_torch_attention() -> None:
    q, k, v = _qkv(3, heads=4, kv_heads=2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(attend_dense(q, k, v, scale=0.7).out, want)


def test_gradcheck_of_merge_with_its_lse() -> None:
    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return merge_states(AttentionState(*tensors[:2]), AttentionState(*tensors[2:]))

    shapes = [(1, 2, 3, 4), (1, 2, 3)] * 2
    assert torch.autograd.gradcheck(run, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


def test_empty_states_merge_without_nan() -> None:
    out = torch.zeros(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    lse = torch.tensor([[[0.5, -INF, -INF]]], dtype=torch.float64, requires_grad=True)
    other = torch.ones(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    other_lse = torch.tensor([[[-INF, 1.0, -INF]]], dtype=torch.float64, requires_grad=True)
    states = [AttentionState(out, lse), AttentionState(other, other_lse)]
    for order in (states, states[::-1]):
        merged = merge_states(*order)
        assert merged.lse.tolist() == [[[0.5, 1.0, -INF]]]
        assert merged.out[0, 0, :, 0].tolist() == [0.0, 1.0, 0.0]
        grads = torch.autograd.grad(merged.out.sum() + merged.lse[..., :2].sum(), (out, lse, other, other_lse))
        for grad in grads:
            assert torch.isfinite(grad).all()
            assert not grad[0, 0, 2].any()


def test_scores_that_show_nothing_give_zero_and_finite_gradients() -> None:
    scores = torch.full((1, 1, 2, 3), -INF, dtype=torch.float64)
    scores[..., 0, :] = torch.tensor([1.0, -INF, 2.0])
    scores.requires_grad_()
    value = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    state = state_from_scores(scores, value)
    assert state.lse[0, 0, 1] == -INF and not state.out[0, 0, 1].any()
    (state.out.sum() + state.lse[0, 0, 0]).backward()
    assert scores.grad is not None and torch.isfinite(scores.grad).all()
    assert value.grad is not None and torch.isfinite(value.grad).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_beyond_the_range_of_float16_are_kept(autocast: bool) -> None:
    q, k, v = (t.detach().half() for t in _qkv(1))
    q, k = 200 * q, 200 * k  # scores of about 1e5 before the scale
    assert not torch.isfinite(q @ k.mT).all()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        state = attend_dense(q, k, v, scale=0.01)
    want = attend_dense(q.double(), k.double(), v.double(), scale=0.01)
    assert state.out.dtype == torch.float16 and state.lse.dtype == torch.float32
    torch.testing.assert_close(state.lse, want.lse.float())
    torch.testing.assert_close(state.out, want.out.half(), atol=2e-3, rtol=1e-3)


def test_low_precision_keeps_its_dtype_and_a_float32_lse() -> None:
    q, k, v = (t.detach().bfloat16() for t in _qkv(1))
    state = merge_states(*_parts(q, k, v, [0, 4, 9]))
    assert state.out.dtype == torch.bfloat16 and state.lse.dtype == torch.float32


def test_merge_states_refuses_nothing_and_mixed_shapes() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge_states()
    a, b = _parts(*_qkv(0), [0, 2, 9])
    with pytest.raises(ValueError, match="one shape"):
        merge_states(a, AttentionState(b.out[:1], b.lse[:1]))


def test_merges_by_name() -> None:
    assert [resolve_merge(name) for name in ("softmax", "gate", "sum")] == [Softmax(), Gate(), Sum()]
    assert resolve_merge(Gate(per="channel")) == Gate(per="channel")
    with pytest.raises(ValueError, match=r"unknown merge 'max'; known merges: gate, softmax, sum"):
        resolve_merge("max")
    with pytest.raises(TypeError, match="merge must be one of"):
        resolve_merge(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'head' or 'channel'"):
        Gate(per="token")


@pytest.mark.parametrize("per", ["head", "channel"])
def test_a_gate_starts_quiet_and_is_convex(per: str) -> None:
    spec = LayerSpec(dim=8, num_heads=2, num_kv_heads=2, head_dim=4)
    near, far, x = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 5, 8)
    gate = Gate(per=per).build(spec)
    share = torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(gate(near, far, x), near + share * (far - near))
    torch.nn.init.normal_(gate.gate.weight)
    mixed = gate(near, AttentionState(far, far[..., 0]), x)
    low, high = torch.minimum(near, far), torch.maximum(near, far)
    assert ((mixed >= low - 1e-6) & (mixed <= high + 1e-6)).all()


def test_sum_adds_outputs_of_states_and_tensors() -> None:
    spec = LayerSpec(dim=8, num_heads=2, num_kv_heads=2, head_dim=4)
    near, far = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    assert torch.equal(Sum().build(spec)(AttentionState(near, near[..., 0]), far, near), near + far)
