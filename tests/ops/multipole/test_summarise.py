"""Summaries on their own: the operator with them equals the operator that makes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import farfield as ff
from farfield.ops.multipole.summarise import cell_centres
from support.multipole_cases import Case, assert_same, cases


@settings(max_examples=50)
@given(cases(kinds=("mean", "shared", "pooled", "learned"), packed=False))
def test_ready_summaries_equal_the_operators_own(case: Case) -> None:
    """Gradients through the pyramid included."""
    s, options = case.shape, case.options
    ready = ff.summarise(
        case.key, case.value, grid=s.grid, block=s.block, rank=s.rank, levels=s.levels,
        key_mask=options.get("key_mask"), sinks=options["sinks"], summary=case.summary,
    )  # fmt: skip
    assert all(level.dtype == torch.float64 for level in ready.keys)
    assert_same(case, case.gradients(**{"summary": ready}), case.gradients())


def test_half_precision_gives_float32() -> None:
    x = torch.randn(1, 2, 40, 4, dtype=torch.bfloat16)
    ready = ff.summarise(x, x, block=4, rank=2)
    assert ready.keys[0].dtype == torch.float32
    torch.testing.assert_close(ready.keys[0][0, 0].view(-1, 4), x[0, 0].float().view(20, 2, 4).mean(1))


def test_hidden_tokens_may_be_nan() -> None:
    x = torch.randn(1, 2, 40, 4)
    mask = torch.rand(1, 40) > 0.5
    dirty = x.masked_fill(~mask[:, None, :, None], float("nan"))
    for a, b in zip(
        ff.summarise(dirty, dirty, block=4, rank=2, key_mask=mask),
        ff.summarise(x, x, block=4, rank=2, key_mask=mask),
        strict=True,
    ):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": (5, 7)}, r"grid=\(5, 7\) has 35 tokens.*N=40"),
        ({"rank": 3}, "rank=3 does not divide"),
        ({"levels": 9}, "levels=9.*1 to 3"),
        ({"summary": "shared"}, "ready weights"),
        ({"summary": ff.PooledSummary(torch.zeros(3))}, "PooledSummary.query"),
        ({"sinks": -1}, "sinks=-1"),
        ({"key_mask": torch.ones(1, 39, dtype=torch.bool)}, "key_mask"),
    ],
)
def test_errors(options: dict[str, object], words: str) -> None:
    x = torch.zeros(1, 2, 40, 4)
    with pytest.raises(ValueError, match=words):
        ff.summarise(x, x, **{"block": 4, "rank": 2, **options})  # type: ignore[arg-type]


def test_centres_are_mean_positions() -> None:
    positions = torch.arange(64.0).view(1, 1, 64, 1)
    ready = ff.summarise(positions, positions, block=8, rank=4)
    for level, keys in enumerate(ready.keys, start=1):
        assert torch.equal(keys.flatten(), cell_centres(64, 8, 4, level, torch.device("cpu")))
