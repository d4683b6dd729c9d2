"""Window as a part: rotation, normalised keys, the dense shortcut."""

from __future__ import annotations

import pytest
import torch

from farfield.near.window import Window
from farfield.parts import Inputs, LayerSpec
from farfield.rope import Rope

SPEC = LayerSpec(16, 4, 2, 4, causal=True)


def _inputs(tokens: int, **options: object) -> Inputs:
    q, k, v = (torch.randn(2, h, tokens, 4, dtype=torch.float64) for h in (4, 2, 2))
    return Inputs(
        q=q, k=k, v=v, x=q[:, 0], grid=(tokens,), scale=0.5, causal=True, rope=Rope(), positions=torch.arange(tokens),
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [5, 8, 30])
def test_the_output_is_that_of_the_state_also_where_dense_is_faster(tokens: int) -> None:
    mask = torch.rand(2, tokens) < 0.7
    for options in ({}, {"key_mask": mask}):
        inputs = _inputs(tokens, **options)
        module = Window(8).build(SPEC)
        torch.testing.assert_close(module.output(inputs), module(inputs).out)


def test_normalised_keys_are_rotated_after_their_norm() -> None:
    inputs = _inputs(9)
    module = Window(9, kv_norm=True).build(SPEC).double()
    torch.nn.init.normal_(module.norm.weight)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return module.norm(x.transpose(1, 2).reshape(2, 9, 8)).view(2, 9, 2, 4).transpose(1, 2)

    by_hand = _inputs(9)
    by_hand.q, by_hand.k, by_hand.v = inputs.q, normed(inputs.k), normed(inputs.v)
    want = Window(9).build(SPEC)(by_hand)
    torch.testing.assert_close(module(inputs).out, want.out)
    torch.testing.assert_close(module(inputs).lse, want.lse)


def test_cost_names_the_size() -> None:
    assert Window(9).cost == "n·size" and Window((3, 5)).cost == "n·3·5"
