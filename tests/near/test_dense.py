"""Dense: with and without its log-sum-exp."""

from __future__ import annotations

import pytest
import torch

from farfield.near.dense import Dense
from farfield.parts import Inputs, LayerSpec


def _inputs(**options: object) -> Inputs:
    q, k, v = (torch.randn(2, h, 12, 4, dtype=torch.float64) for h in (4, 2, 2))
    return Inputs(q=q, k=k, v=v, x=q[:, 0], grid=(12,), scale=0.5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
def test_the_fused_output_is_that_of_the_state(causal: bool, kind: str) -> None:
    mask = torch.rand(2, 12) < 0.6 if kind == "masked" else None
    if mask is not None:
        mask[0] = False
    cu = torch.tensor([0, 5, 5, 12]) if kind == "packed" else None
    inputs = _inputs(causal=causal, key_mask=mask, cu_seqlens=cu)
    module = Dense().build(LayerSpec(8, 4, 2, 4, causal))
    state = module(inputs)
    torch.testing.assert_close(module.output(inputs), state.out)
    if mask is not None:
        assert (state.lse[0] == -torch.inf).all() and not state.out[0].any()
