"""Steps over opened pages in one compiled call: the rows of a prefill, and those of the steps in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from farfield.ops.compiled import choice as compiled
from farfield.ops.opened import opened_attention
from farfield.ops.opened.stream import OpenedStream

SETTINGS: dict[str, dict[str, Any]] = {
    "pages": {"rank": 2, "page": 2, "open": 3, "beam": 2, "share": 2, "choose": "bounds", "sinks": 3},
    "cells": {"rank": 4, "page": 2, "open": 2, "beam": 2, "share": 1, "choose": "bounds", "sinks": 0},
    "means": {"rank": 1, "page": 1, "open": 5, "beam": 2, "share": 4, "choose": "mean", "sinks": 5},
    "many sinks": {"rank": 2, "page": 4, "open": 2, "beam": 1, "share": 8, "choose": "bounds", "sinks": 13},
    "everything": {"rank": 2, "page": 1, "open": 500, "beam": 500, "share": 1, "choose": "bounds", "sinks": 2},
    "no counts": {"rank": 2, "page": 4, "open": 2, "beam": 2, "share": 1, "choose": "mean", "sinks": 3, "count": False},
}


def rows(options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Output and lse of a prompt and then single steps."""
    stream = OpenedStream(
        block=8, rank=options["rank"], levels=1, open=options["open"], beam=options["beam"], page=options["page"],
        share=options["share"], keep=False, choose=options["choose"], count_bias=options.get("count", True),
        sinks=options["sinks"], part="far", rewind=0,
    )  # fmt: skip
    cache = stream.empty(2, 4, 2, q.shape[-1], q.dtype, q.device)
    out, lse = [], []
    stream.reserve(cache, prompt)
    if prompt:
        stream.fill(cache, q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], lambda: "mean")
    for t in range(prompt, q.shape[2]):
        stream.reserve(cache, t + 1)
        now = slice(t, t + 1)
        state = stream.step(
            cache, q[:, :, now], k[:, :, now], v[:, :, now], t, scale=0.6, summary=lambda: "mean", level_bias=None
        )
        out.append(state.out)
        lse.append(state.lse)
    return torch.cat(out, 2), torch.cat(lse, 2)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dim", [5, 16, 64])
@pytest.mark.parametrize("prompt", [0, 37])
def test_compiled_steps_are_rows_of_a_prefill(name: str, dim: int, prompt: int, monkeypatch: Any) -> None:
    if compiled.why_not() is not None:
        pytest.skip(f"the compiled engine is not there: {compiled.why_not()}")
    options = SETTINGS[name]
    q = torch.randn(2, 4, 83, dim)
    k, v = torch.randn(2, 2, 83, dim), torch.randn(2, 2, 83, dim)
    out, lse = rows(options, q, k, v, prompt)
    expected, expected_lse = opened_attention(
        q, k, v, block=8, rank=options["rank"], levels=1, open=options["open"], beam=options["beam"],
        page=options["page"], share=options["share"], rest="drop", choose=options["choose"], causal=True, scale=0.6,
        count_bias=options.get("count", True), sinks=options["sinks"], return_lse=True, part="far",
    )  # fmt: skip
    torch.testing.assert_close(lse, expected_lse[:, :, prompt:])
    torch.testing.assert_close(out, expected[:, :, prompt:], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(OpenedStream, "_compiled", lambda *_: False)
    plain, plain_lse = rows(options, q, k, v, prompt)
    torch.testing.assert_close(lse, plain_lse)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_what_is_no_number_stays_where_it_is_seen() -> None:
    """A token that is not a number spoils the steps that open it, and no step that does not."""
    if compiled.why_not() is not None:
        pytest.skip(f"the compiled engine is not there: {compiled.why_not()}")
    options = SETTINGS["everything"]
    q = torch.randn(2, 4, 60, 16)
    k, v = torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 16)
    v[0, 1, 20] = torch.nan
    out, _ = rows(options, q, k, v, 0)
    assert out[0, 2:, 32:].isnan().all()  # block 2 is far from block 4 on
    assert out[0, :2].isfinite().all()
    assert out[1].isfinite().all()
    assert out[0, 2:, :32].isfinite().all()
