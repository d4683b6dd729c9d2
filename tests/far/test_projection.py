"""Dynamic projection: landmarks are mixtures of tokens, by chunk strictly of the past."""

from __future__ import annotations

import pytest
import torch

import farfield.far.projection as projection
from farfield.far.projection import Projection
from farfield.merge import attend_dense
from farfield.parts import Inputs, LayerSpec


def _inputs(tokens: int, causal: bool, mask: torch.Tensor | None = None) -> Inputs:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, tokens, 4, dtype=torch.float64) for h in (4, 2, 2))
    x = torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True)
    return Inputs(q=q, k=k, v=v, x=x, grid=(tokens,), causal=causal, scale=0.5, key_mask=mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [3, 8, 29])
def test_causal_landmarks_written_out(masked: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "SCORES", 700)  # several spans
    mask = torch.rand(2, tokens) < 0.5 if masked else None
    inputs = _inputs(tokens, True, mask)
    module = Projection(3, chunk=4, norm=False).build(LayerSpec(16, 4, 2, 4, causal=True)).double()
    got = module(inputs)
    logits = module.weights(inputs.x).view(2, tokens, 2, 3)
    keys, values, owner, alive = [], [], [], []
    for start in range(0, tokens, 4):
        span = slice(start, min(start + 4, tokens))
        part = logits[:, span]
        if mask is not None:
            part = part.masked_fill(~mask[:, span, None, None], -1e9)
        weights = part.softmax(1)
        keys.append(torch.einsum("bthr,bhtd->bhrd", weights, inputs.k[:, :, span]))
        values.append(torch.einsum("bthr,bhtd->bhrd", weights, inputs.v[:, :, span]))
        owner += [start // 4] * 3
        alive += [torch.ones(2, dtype=torch.bool) if mask is None else mask[:, span].any(1)] * 3
    seen = torch.tensor(owner)[None] < (torch.arange(tokens) // 4)[:, None]
    seen = seen[None, None] & torch.stack(alive, 1)[:, None, None]
    want = attend_dense(inputs.q, torch.cat(keys, 2), torch.cat(values, 2), scale=0.5, visible=seen)
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)
    if tokens > 4:
        grads = [torch.autograd.grad(s.out.square().sum(), inputs.x, retain_graph=True)[0] for s in (got, want)]
        torch.testing.assert_close(*grads)


def test_landmarks_are_convex_mixtures() -> None:
    inputs = _inputs(20, False)
    module = Projection(5, norm=False).build(LayerSpec(16, 4, 2, 4)).double()
    inputs.v = torch.ones_like(inputs.v)
    keys, values, present = module.landmarks(inputs)
    torch.testing.assert_close(values, torch.ones_like(values))
    assert present is None and keys.shape == (2, 2, 5, 4)
    low, high = inputs.k.amin(2, keepdim=True), inputs.k.amax(2, keepdim=True)
    assert ((keys >= low) & (keys <= high)).all()


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank=0\): rank must be a positive integer"):
        Projection(0)
    with pytest.raises(ValueError, match=r"chunk=-1\): chunk must be a positive integer"):
        Projection(1, chunk=-1)
