"""transformer_ls: one softmax over window and landmarks, both normalised."""

from __future__ import annotations

import pytest
import torch

from farfield import recipes
from farfield.attention import Attention
from farfield.merge import attend_dense
from farfield.ops.window.reference import window_mask
from farfield.parts import head_norm


def _layer(causal: bool, rank: int = 3) -> Attention:
    torch.manual_seed(0)
    layer = recipes.build("transformer_ls", 16, 4, num_kv_heads=2, causal=causal, block=4, rank=rank).double()
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("causal", [False, True])
def test_equals_one_softmax_over_window_and_landmarks(causal: bool) -> None:
    layer = _layer(causal)
    assert layer.near is not None and layer.far is not None
    x = torch.randn(2, 29, 16, dtype=torch.float64)
    inputs = layer._inputs(x, None, None, None)
    keys, values, _ = layer.far.landmarks(inputs)
    near_keys, near_values = head_norm(layer.near.norm, inputs.k), head_norm(layer.near.norm, inputs.v)
    window = window_mask((29,), (6,), (1,), (1,), (True,)) if causal else window_mask((29,), (8,), (4,), (1,), (False,))
    past = torch.ones(29, keys.shape[2], dtype=torch.bool)
    if causal:
        past = (torch.arange(keys.shape[2]) // 3)[None] < (torch.arange(29) // 4)[:, None]
    want = attend_dense(
        inputs.q,
        torch.cat((near_keys, keys), 2),
        torch.cat((near_values, values), 2),
        scale=0.5,
        visible=torch.cat((window, past), 1),
    ).out
    torch.testing.assert_close(layer(x), layer.proj(want.transpose(1, 2).flatten(2)))


def test_blocks_see_half_a_block_to_both_sides() -> None:
    mask = window_mask((40,), (8,), (4,), (1,), (False,))
    for row in range(4, 36):
        start = row // 4 * 4 - 2
        assert mask[row].nonzero().flatten().tolist() == list(range(start, start + 8))


def test_a_window_over_everything_without_landmarks_is_attention_on_normalised_keys() -> None:
    layer = _layer(False)
    assert layer.near is not None
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    inputs = layer._inputs(x, None, None, None)
    want = attend_dense(inputs.q, head_norm(layer.near.norm, inputs.k), head_norm(layer.near.norm, inputs.v), scale=0.5)
    torch.testing.assert_close(layer.near(inputs).out, want.out)


def test_edits_of_the_future_leave_chunks_alone() -> None:
    layer = _layer(True)
    x = torch.randn(1, 32, 16, dtype=torch.float64)
    y = layer(x)
    for cut in (3, 4, 5, 16, 31):
        changed = x.clone()
        changed[:, cut:] += 1
        assert torch.equal(layer(changed)[:, :cut], y[:, :cut])
