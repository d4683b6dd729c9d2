"""The error budget: its yardstick is plain torch, and a result that is too far off fails."""

from __future__ import annotations

import pytest
import torch

import farfield as ff
from farfield.bench import budget
from farfield.geometry import geometry
from support.multipole_cases import KINDS, Case, make_summary, tensors


@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_in_float64_is_the_reference(kind: str) -> None:
    g = geometry((45,), 8, 4)
    bias = torch.randn(g.levels, 2, dtype=torch.float64)
    case = Case(g, *tensors(1, 2, 1, 45, 16), make_summary(kind, g, 1, 1, 16), bias, {"causal": True, "sinks": 2})
    plain = budget.plain_attention(case.query, case.key, case.value, **case.keywords())
    assert all(torch.equal(a, b) for a, b in zip(plain, case.run(impl="reference"), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_torch_rounds_every_step(dtype: torch.dtype) -> None:
    """Its error is that of the dtype: more than that of one rounding at the end, as the engines have it at best."""
    case = [x.detach().to(dtype) for x in tensors(1, 2, 2, 200, 32)]
    options = {"block": 16, "rank": 4}
    truth = ff.multipole_attention(*(x.double() for x in case), impl="reference", **options)
    plain, lse = budget.plain_attention(*case, **options)
    once = ff.multipole_attention(*case, impl="reference", **options)
    assert plain.dtype == dtype and lse.dtype == torch.float32
    assert 1.2 * budget.error(once, truth) < budget.error(plain, truth) < 2 * torch.finfo(dtype).eps


def test_large_cells_are_counted_exactly() -> None:
    """bfloat16 has no 257: counts stay out of the low precision."""
    x = torch.ones(1, 1, 4096, 16, dtype=torch.bfloat16)
    out, lse = budget.plain_attention(x, x, x, block=1028, rank=4, part="far", scale=0.0)
    assert (out == 1).all()
    torch.testing.assert_close(lse[0, 0, 0].item(), torch.tensor(4096.0 - 2 * 1028).log().item(), rtol=0.01, atol=0.0)


def test_what_is_too_far_off_fails() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = [torch.randn(50, 8, generator=generator, dtype=torch.float64) for _ in range(4)]

    def off(*sizes: float) -> list[torch.Tensor]:
        noise = (torch.randn(50, 8, generator=generator, dtype=torch.float64) for _ in truth)
        return [(t + size * n).float() for t, n, size in zip(truth, noise, sizes, strict=True)]

    plain = off(1e-3, 1e-3, 1e-3, 2e-3)
    assert budget.judge(off(1.8e-3, 1.8e-3, 2.7e-3, 2.7e-3), plain, truth).right
    assert not budget.judge(off(2.5e-3, 1e-3, 1e-3, 1e-3), plain, truth).right
    assert not budget.judge(off(1e-3, 2.5e-3, 1e-3, 1e-3), plain, truth).right
    assert not budget.judge(off(1e-3, 1e-3, 7e-3, 1e-3), plain, truth).right  # gradients share the largest, 2e-3
    exact = [t.float() for t in truth]
    assert budget.judge(off(1e-6, 1e-6, 1e-6, 1e-6), exact, truth).right  # a few roundings of float32
    assert not budget.judge(off(1e-5, 0.0, 0.0, 0.0), exact, truth).right


def test_no_number_is_an_infinite_error() -> None:
    ones = torch.ones(3)
    assert budget.error(torch.tensor([1.0, torch.nan, 1.0]), ones) == float("inf")
    assert budget.error(torch.tensor([-torch.inf, 1.0, 1.0]), ones) == float("inf")
    empty = torch.tensor([-torch.inf, 1.0, 1.0])
    assert budget.error(empty, empty) == 0.0 and budget.error(ones[:0], ones[:0]) == 0.0


def test_what_is_no_number_passes_under_no_budget() -> None:
    ones = [torch.ones(3)] * 3
    broken = [torch.tensor([1.0, torch.nan, 1.0]), *ones[1:]]
    assert not budget.judge(broken, ones, ones).right
    with pytest.raises(ValueError, match="gives what is no number here"):
        budget.judge(broken, broken, ones)
