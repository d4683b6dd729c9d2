"""Linear attention against its explicit matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.far.linear import FEATURES, Linear, linear_attention
from farfield.parts import Inputs, LayerSpec


def _explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, floor: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    weights = q @ k.repeat_interleave(groups, 1).mT
    weights = weights.tril() if causal else weights
    mass = weights.sum(-1, keepdim=True)
    mass = mass.clamp(min=floor) if floor else torch.where(mass == 0, 1.0, mass)
    return (weights / mass) @ v.repeat_interleave(groups, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from([0.0, 1.5, 100.0]),
    st.sampled_from(sorted(FEATURES)),
    st.sampled_from([(2, 2), (4, 2)]),
    st.integers(0, 10**6),
)
def test_equals_the_explicit_matrix_with_gradients(
    tokens: int, causal: bool, floor: float, feature: str, heads: tuple[int, int], seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    raw = [
        torch.randn(2, h, tokens, 3, generator=g, dtype=torch.float64).requires_grad_()
        for h in (heads[0], *heads[1:] * 2)
    ]
    phi = FEATURES[feature]
    hidden = torch.rand(2, 1, tokens, 1, generator=g) < 0.2
    q, k, v = phi(raw[0]), phi(raw[1]).masked_fill(hidden, 0.0), raw[2]
    got, want = linear_attention(q, k, v, causal=causal, floor=floor), _explicit(q, k, v, causal, floor)
    torch.testing.assert_close(got, want)
    weights = torch.randn(got.shape, generator=g, dtype=torch.float64)
    mine = torch.autograd.grad((got * weights).sum(), raw, retain_graph=True)
    for a, b in zip(mine, torch.autograd.grad((want * weights).sum(), raw), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


def test_gradcheck() -> None:
    q, k, v = (torch.rand(1, h, 70, 2, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, causal=True), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_values_of_ones_give_ones(causal: bool) -> None:
    q, k = torch.rand(1, 2, 100, 4), torch.rand(1, 2, 100, 4)
    torch.testing.assert_close(linear_attention(q, k, torch.ones_like(q), causal=causal), torch.ones_like(q))


def test_low_precision_sums_in_float32_and_ignores_autocast() -> None:
    q, k, v = (torch.randn(1, 2, 3000, 4) for _ in range(3))
    module = Linear().build(LayerSpec(8, 2, 2, 4))
    exact = module(Inputs(q=q, k=k, v=v, x=q[:, 0], grid=(3000,)))
    with torch.autocast("cpu", torch.bfloat16):
        low = module(Inputs(q=q.bfloat16(), k=k.bfloat16(), v=v.bfloat16(), x=q[:, 0], grid=(3000,)))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, atol=0.01, rtol=0.05)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"feature='cos'.*elu, relu, softmax"):
        Linear("cos")
    with pytest.raises(ValueError, match="least denominator cannot be negative"):
        Linear(floor=-1.0)
