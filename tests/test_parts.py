"""What parts share."""

from __future__ import annotations

import pytest
import torch

from farfield.merge import AttentionState
from farfield.parts import FarPart, Inputs, LayerSpec, NearPart, by_segment, repeat_heads, segment_bounds
from farfield.rope import Rope


def _inputs(**options: object) -> Inputs:
    q, k, v = (torch.randn(2, h, 6, 4) for h in (4, 2, 2))
    return Inputs(q=q, k=k, v=v, x=torch.randn(2, 6, 8), grid=(6,), **options)  # type: ignore[arg-type]


def test_rotation_happens_once_and_only_with_positions() -> None:
    plain = _inputs()
    assert plain.rotated_q is plain.q and plain.rotated_k is plain.k
    turned = _inputs(rope=Rope(), positions=torch.arange(6))
    torch.testing.assert_close(turned.rotated_k, Rope().rotate(turned.k, torch.arange(6)))
    assert turned.rotated_q is turned.rotated_q


def test_hidden_keys_and_values_are_empty() -> None:
    mask = torch.rand(2, 6) < 0.5
    k = torch.randn(2, 2, 6, 4).masked_fill(~mask[:, None, :, None], torch.nan)
    inputs = Inputs(q=k, k=k, v=k, x=k[:, 0], grid=(6,), key_mask=mask, rope=Rope(), positions=torch.arange(6))
    want = k.nan_to_num(0.0)
    assert torch.equal(inputs.k, want) and torch.equal(inputs.v, want)
    torch.testing.assert_close(inputs.rotated_k, Rope().rotate(want, torch.arange(6)))


def test_segments_are_cut_out_and_put_side_by_side() -> None:
    inputs = _inputs(cu_seqlens=torch.tensor([0, 2, 2, 6]), key_mask=torch.ones(2, 6, dtype=torch.bool))
    seen = []

    def run(piece: Inputs) -> AttentionState:
        seen.append((piece.grid, piece.cu_seqlens, tuple(piece.x.shape), tuple(piece.v.shape)))
        return AttentionState(piece.q, piece.q[..., 0])

    state = by_segment(inputs, run)
    assert torch.equal(state.out, inputs.q) and torch.equal(state.lse, inputs.q[..., 0])
    assert seen == [((2,), None, (2, 2, 8), (2, 2, 2, 4)), ((4,), None, (2, 4, 8), (2, 2, 4, 4))]
    assert torch.equal(by_segment(inputs, lambda piece: piece.q), inputs.q)
    assert segment_bounds(torch.tensor([0, 0, 3, 3, 5])) == [(0, 3), (3, 5)]


def test_heads_are_repeated_for_their_group() -> None:
    x = torch.arange(2).view(1, 2, 1, 1)
    assert repeat_heads(x, 4).flatten().tolist() == [0, 0, 1, 1]
    assert repeat_heads(x, 2) is x


def test_a_part_must_say_how_it_is_built() -> None:
    spec = LayerSpec(8, 2, 2, 4)
    with pytest.raises(NotImplementedError):
        NearPart().build(spec)
    with pytest.raises(TypeError, match="computes no near field together with itself"):
        FarPart().build_fused(spec)
