"""The codes of the key columns say what Transformers' own matrix of who sees whom says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")

from transformers import masking_utils as theirs

from farfield.interop.transformers.masks import mask, read

B, N = 3, 24


def matrix(codes: Tensor | None, queries: int, columns: int, causal: bool, window: int | None = None) -> Tensor:
    """[B, Nq, Nk] who sees whom, from what an attention function is told."""
    key_mask, length, segments = read(codes, columns)
    seen = torch.ones(B, queries, columns, dtype=torch.bool)
    seen[..., length:] = False
    row, column = torch.arange(length - queries, length)[:, None], torch.arange(columns)
    if causal:
        seen &= column <= row
    if window is not None:
        seen &= column > row - window
    if key_mask is not None:
        seen[..., :length] &= key_mask[:, None]
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None, :]
    return seen


def padding(columns: int = N) -> Tensor:
    keep = torch.ones(B, columns, dtype=torch.bool)
    keep[0, :7], keep[1, -5:], keep[2, 9] = False, False, False
    return keep


POSITIONS = torch.cat([torch.arange(n) for n in (5, 1, 11, 7)])[None].expand(B, -1)
PACKED = theirs.find_packed_sequence_indices(POSITIONS)


def packed(function: Any) -> Any:
    return theirs.and_masks(theirs.packed_sequence_mask_function(PACKED), function)


CASES: dict[str, tuple[Any, bool, int | None, dict[str, Any]]] = {
    "causal": (theirs.causal_mask_function, True, None, {}),
    "bidirectional": (theirs.bidirectional_mask_function, False, None, {}),
    "sliding": (theirs.sliding_window_causal_mask_function(6), True, 6, {"local_size": 6}),
    "sliding by one": (theirs.sliding_window_causal_mask_function(1), True, 1, {"local_size": 1}),
    "packed": (packed(theirs.causal_mask_function), True, None, {}),
    "packed, sliding": (packed(theirs.sliding_window_causal_mask_function(4)), True, 4, {"local_size": 4}),
    "chunks": (
        theirs.chunked_causal_mask_function(7, torch.zeros(B, dtype=torch.long)),
        True,
        None,
        {"local_size": 7},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_prefill(name: str) -> None:
    function, causal, window, given = CASES[name]
    sizes = {"batch_size": B, "q_length": N, "kv_length": N, "mask_function": function, **given}
    expected = theirs.sdpa_mask(**sizes, allow_is_causal_skip=False)[:, 0]
    assert torch.equal(matrix(mask(**sizes), N, N, causal, window), expected)


@pytest.mark.parametrize("name", ["causal", "bidirectional", "sliding"])
def test_padding(name: str) -> None:
    function, causal, window, given = CASES[name]
    sizes = {"batch_size": B, "q_length": N, "kv_length": N, "mask_function": function, **given}
    expected = theirs.sdpa_mask(**sizes, attention_mask=padding(), allow_is_causal_skip=False)[:, 0]
    assert torch.equal(matrix(mask(**sizes, attention_mask=padding()), N, N, causal, window), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize(
    ("offset", "columns", "kv_offset"),
    [(20, None, 0), (20, 40, 0), (torch.tensor(20), 40, 0), (0, 40, 0), (20, None, 15)],
    ids=["dynamic", "static", "static, on the device", "static, empty", "sliding"],
)
def test_caches(offset: Any, columns: int | None, kv_offset: int, queries: int, padded: bool) -> None:
    end = int(offset) + queries
    columns = end - kv_offset if columns is None else columns
    name = "sliding" if kv_offset else "causal"
    function, causal, window, given = CASES[name]
    sizes = {"batch_size": B, "q_length": queries, "kv_length": columns, "q_offset": offset, "kv_offset": kv_offset}
    keep = padding(end) if padded and end > 10 else None
    expected = theirs.sdpa_mask(
        **sizes, mask_function=function, attention_mask=keep, allow_is_causal_skip=False, **given
    )[:, 0]
    codes = mask(**sizes, mask_function=function, attention_mask=keep, **given)
    assert torch.equal(matrix(codes, queries, columns, causal, window), expected)


def test_nothing_is_said_where_there_is_nothing_to_say() -> None:
    sizes = {"batch_size": B, "q_length": N, "kv_length": N}
    assert mask(**sizes) is None
    assert mask(**sizes, attention_mask=torch.ones(B, N, dtype=torch.bool)) is None
    assert mask(**sizes, mask_function=CASES["sliding"][0], local_size=6) is None


def test_other_orders_are_refused() -> None:
    sizes = {"batch_size": B, "q_length": N, "kv_length": N}
    blocks = torch.full((B, N), -1)
    blocks[:, 8:13] = 0
    image = theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(blocks))
    both_ways = theirs.sliding_window_bidirectional_mask_function(5)
    for function, given in ((image, {}), (both_ways, {"local_size": 5})):
        with pytest.raises(ValueError, match="neither causal nor bidirectional"):
            mask(**sizes, mask_function=function, **given)
    with pytest.raises(ValueError, match="a function of its own"):
        mask(**sizes, use_vmap=True)
    with pytest.raises(ValueError, match="together with padding"):
        mask(**sizes, mask_function=CASES["chunks"][0], local_size=7, attention_mask=padding())
    with pytest.raises(ValueError, match=r"shape \[3, 24, 24\]"):
        mask(**sizes, attention_mask=torch.ones(B, N, N, dtype=torch.bool))
