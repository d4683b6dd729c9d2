"""Linear attention normalised by subtraction: causal sums, and what is refused."""

from __future__ import annotations

import pytest
import torch

from farfield.far import Linear
from farfield.far.linear import CHUNK, centred_attention


@pytest.mark.parametrize("tokens", [1, 5, CHUNK, 2 * CHUNK + 7])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_rows_are_the_explicit_ones(tokens: int, masked: bool) -> None:
    q, k, v = (torch.randn(2, h, tokens, 4, dtype=torch.float64) for h in (4, 2, 2))
    mask = torch.rand(2, tokens) < 0.5 if masked else torch.ones(2, tokens, dtype=torch.bool)
    k, v = (t * mask[:, None, :, None] for t in (k, v))
    got = centred_attention(q, k, v, mask if masked else None, causal=True, scale=0.5)
    seen = torch.ones(tokens, tokens).tril().bool() & mask[:, None, None]
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    scores = (q @ k.repeat_interleave(2, 1).mT / 2).masked_fill(~seen, 0.0)
    weights = ((scores - scores.sum(-1, keepdim=True) / count + 1) / count).masked_fill(~seen, 0.0)
    torch.testing.assert_close(got, weights @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "mean"}, "normalise='mean'.*known ways are divide, subtract"),
        ({"normalise": "subtract", "floor": 1.0}, "there is no denominator"),
        ({"feature": "identity"}, "use normalise='subtract'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Linear(**options)  # type: ignore[arg-type]
