"""Pooled as a part: the past of a causal query, counts, what is refused."""

from __future__ import annotations

import pytest
import torch

from farfield import Attention
from farfield.far import Pooled
from farfield.merge import attend_dense
from farfield.parts import Inputs, LayerSpec


@pytest.mark.parametrize("reach", [None, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_counts_make_constant_cells_exact(causal: bool, masked: bool, reach: int | None) -> None:
    """With log(count) a cell of equal tokens weighs what its tokens weigh together."""
    torch.manual_seed(0)
    tokens, cell = 26, 4
    index = torch.arange(tokens)
    own = index // cell
    inputs = Inputs(
        q=torch.randn(2, 4, tokens, 4, dtype=torch.float64),
        k=torch.randn(2, 2, 7, 4, dtype=torch.float64)[:, :, own],
        v=torch.randn(2, 2, 7, 4, dtype=torch.float64)[:, :, own],
        x=torch.zeros(2, tokens, 16, dtype=torch.float64),
        grid=(tokens,), scale=0.5, causal=causal,
        key_mask=torch.rand(2, tokens) < 0.4 if masked else None,
    )  # fmt: skip
    module = Pooled(cell, reach=reach, count_bias=True).build(LayerSpec(16, 4, 2, 4, causal=causal))
    ahead = own - own[:, None]
    visible = torch.ones_like(ahead, dtype=torch.bool) if reach is None else ahead.abs() <= reach
    visible = visible & (ahead < 0) if causal else visible
    if inputs.key_mask is not None:
        visible = visible & inputs.key_mask[:, None, None]
    want = attend_dense(inputs.q, inputs.k, inputs.v, scale=0.5, visible=visible)
    torch.testing.assert_close(tuple(module(inputs)), tuple(want))
    torch.testing.assert_close(module.output(inputs), want.out)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_output_alone_is_that_of_the_state(rank: int | None) -> None:
    torch.manual_seed(0)
    layer = Attention(16, 4, num_kv_heads=2, far=Pooled((2, 3), rank=rank), dims=2).double()
    assert layer.far is not None
    inputs = layer._inputs(torch.randn(2, 35, 16, dtype=torch.float64), (5, 7), None, None)
    torch.testing.assert_close(layer.far.output(inputs), layer.far(inputs).out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"summary": "max"}, "summary='max'.*known summaries are mean, learned"),
        ({"rank": 0}, "rank must be a positive integer, or None"),
        ({"bias": True}, "whose number reach= must bound"),
        ({"reach": -1}, "reach=-1: give one integer >= 0"),
        ({"reach": (1, 1)}, r"reach=\(1, 1\): give one integer >= 0, or 1 of them"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(16, 4, far=Pooled(4, **options))  # type: ignore[arg-type]


def test_dropout_drops_weights_in_training_only() -> None:
    x = torch.randn(1, 11, 16)
    for part in (Pooled(2), Pooled(2, reach=1), Pooled(2, count_bias=True)):
        layer = Attention(16, 4, far=part, dropout=0.5)
        assert not torch.equal(layer(x), layer(x))
        assert torch.equal(layer.eval()(x), layer(x))
