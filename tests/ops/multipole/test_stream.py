"""The multipole operator one step at a time, against the dense reference on every prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from farfield.ops.multipole import PooledSummary, SharedSummary, multipole_attention
from farfield.ops.multipole.stream import GROUPS, MultipoleStream, Weights
from farfield.ops.state import AttentionState

F64 = torch.float64


def kept(kind: str, block: int, rank: int, heads: int) -> Any:
    if kind == "shared":
        size = block // rank
        return SharedSummary(*(torch.randn(heads, n, 4, dtype=F64) for n in (size, 2, size, 2)))
    return PooledSummary(torch.randn(heads, 4, dtype=F64)) if kind == "pooled" else "mean"


@pytest.mark.parametrize("part", ["both", "near", "far"])
@pytest.mark.parametrize(
    ("kind", "heads", "options"),
    [
        ("mean", 1, {"block": 3, "rank": 3}),
        ("mean", 1, {"block": 4, "rank": 1, "count_bias": False, "levels": 1}),
        ("shared", 1, {"block": 4, "rank": 2}),
        ("shared", 2, {"block": 2, "rank": 1, "sinks": 9}),
        ("pooled", 2, {"block": 4, "rank": 2, "sinks": 6}),
        ("pooled", 1, {"block": 1, "rank": 1, "levels": 3}),
    ],
)
def test_every_prefix_against_the_reference(kind: str, heads: int, part: str, options: dict[str, Any]) -> None:
    if part == "far" and options.get("sinks"):
        options = {**options, "sinks": 0}  # a far part alone has none
    settings = {"count_bias": True, "levels": None, "sinks": 0, **options}
    summary, level_bias = kept(kind, settings["block"], settings["rank"], heads), torch.randn(9, 4, dtype=F64)
    q, (k, v) = torch.randn(2, 4, 53, 4, dtype=F64), torch.randn(2, 2, 2, 53, 4, dtype=F64)
    stream = MultipoleStream(part=part, **settings)
    cache = stream.empty(2, 4, 2, 4, F64, torch.device("cpu"), biased=part != "near", pooled=kind == "pooled")
    weights = Weights(lambda: summary, lambda: level_bias)
    for i in range(53):
        span = slice(i, i + 1)
        stream.reserve(cache, i + 1)
        state = stream.step(cache, q[:, :, span], k[:, :, span], v[:, :, span], i, scale=0.7, weights=weights)
        out, lse = prefix(q, k, v, i + 1, part, summary, level_bias, settings)
        assert isinstance(state, AttentionState)
        torch.testing.assert_close(state.out, out[:, :, -1:])
        torch.testing.assert_close(state.lse, lse[:, :, -1:])


def prefix(
    q: Tensor, k: Tensor, v: Tensor, number: int, part: str, summary: Any, level_bias: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    from farfield.geometry import default_levels

    most = default_levels((number,), (settings["block"],))
    levels = settings["levels"]
    found = multipole_attention(
        *(x[:, :, :number] for x in (q, k, v)), causal=True, impl="reference", return_lse=True, scale=0.7, part=part,
        summary=summary, level_bias=level_bias, **{**settings, "levels": None if levels is None else min(levels, most)},
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found


def test_a_filled_cache_equals_a_stepped_one_in_all_that_is_seen() -> None:
    """Fill and steps leave the same keys, values and biases wherever a query may still look."""
    stream = MultipoleStream(4, 2, None, True, 5, "both", rewind=4)
    k, v = torch.randn(2, 1, 1, 67, 4, dtype=F64)
    for number in range(1, 68):
        caches = []
        for whole in (True, False):
            cache = stream.empty(1, 1, 1, 4, F64, torch.device("cpu"))
            stream.reserve(cache, number)
            if whole:
                stream.fill(cache, k[:, :, :number], v[:, :, :number])
            else:
                stream.step(cache, torch.zeros_like(k[:, :, :number]), k[:, :, :number], v[:, :, :number], 0, scale=1.0)
                stream.open_block(cache, number, Weights())
            caches.append(cache)
        torch.testing.assert_close(caches[0]["bias"], caches[1]["bias"])
        seen = caches[0]["bias"][0, 0] > -torch.inf
        for name in ("keys", "values"):
            torch.testing.assert_close(caches[0][name][:, :, seen], caches[1][name][:, :, seen])


def test_room_grows_by_one_level_when_the_length_doubles() -> None:
    stream = MultipoleStream(8, 2, None, True, 3, "both", rewind=5)
    cache = stream.empty(1, 2, 1, 4, torch.bfloat16, torch.device("cpu"), biased=True)
    assert cache["keys"].dtype == torch.float32  # the precision of the arithmetic
    for blocks in (1, 2, 3, 4, 7, 8, 1000, 1 << 20):
        stream.reserve(cache, 8 * blocks)
        places = 3 + 3 * 8 + GROUPS * 2 * blocks.bit_length()
        assert cache["keys"].shape == (1, 1, places, 4) and cache["bias"].shape == (1, 2, places)


@pytest.mark.parametrize(
    ("options", "reason"), [({"rewind": 9}, "up to block=8"), ({"levels": 0}, "at least one level"), ({}, None)]
)
def test_what_cannot_be_streamed(options: dict[str, Any], reason: str | None) -> None:
    settings = {"levels": None, "rewind": 8, **options}
    found = MultipoleStream(8, 2, count_bias=True, sinks=0, part="both", **settings).why_not()
    assert found is None if reason is None else reason in str(found)
