"""Steps of a layer whose heads open cells in their own ways: the rows of a prefill, compiled and in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farfield as ff
from farfield.far import ByHead, Pyramid
from farfield.near import Blocks
from farfield.ops.compiled import choice as compiled
from farfield.ops.opened.heads import HeadsStream


def opens(rank: int, open: int, **more: Any) -> Pyramid:
    given = {"levels": 1, "rest": "drop", "choose": "bounds", "summary": "mean", "bias": None, **more}
    return Pyramid(rank, open=open, **given)


LAYERS: dict[str, ByHead] = {
    "pages": ByHead(
        (((0, 1, 4), opens(2, 3, beam=2, page=2, share=2)), ((2,), opens(2, 5, page=4, share=8))), sinks=None
    ),
    "cells and single tokens": ByHead(
        (((5, 0), opens(4, 2)), ((3,), opens(2, 4, beam=2, page=1)), ((1,), opens(8, 6)))
    ),
    "queries before, beams shared": ByHead(
        (
            ((0, 1, 4), opens(2, 3, beam=2, page=2, share=2, beam_share=8, recent=12)),
            ((2,), opens(2, 5, page=2, share=4, recent=3)),
            ((3,), opens(1, 3, beam=2, page=4, share=8, recent=32)),
        )
    ),
    "means": ByHead((((0, 1, 2, 3), opens(1, 5, beam=2, page=1, share=4, choose="mean")), ((4,), opens(2, 2, page=4)))),
    "no counts": ByHead((((0,), opens(2, 2, beam=2, page=4, count_bias=False)),)),
    "everything": ByHead((((0, 1, 2, 3, 4, 5), opens(2, 500, beam=500, page=1)),)),
}


@pytest.mark.parametrize("engine", ["compiled", "torch"])
@pytest.mark.parametrize("expanded", [False, True], ids=["alone", "expansion"])
@pytest.mark.parametrize("sinks", [0, 3, 13])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("prompt", [0, 37])
def test_steps_are_rows_of_a_prefill(
    name: str, sinks: int, expanded: bool, engine: str, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where everything is opened, heads without an expansion equal exact attention, too."""
    if engine == "torch":
        monkeypatch.setattr(HeadsStream, "_can", lambda *_: False)
    elif compiled.why_not() is not None:
        pytest.skip(f"the compiled engine is not there: {compiled.why_not()}")
    groups = tuple((heads, ff.far.Pyramid(**{**vars(p), "sinks": sinks})) for heads, p in LAYERS[name].groups)
    expansion = ff.far.Expansion.of((0, 3), (0.5, -1.0), torch.randn(2, 3, 6))
    far = ByHead(groups, sinks=sinks, expansions=(expansion,) if expanded else ())
    layer = ff.Attention(36, 6, num_kv_heads=2, near=Blocks(8), far=far, causal=True, rope=1e4).eval()
    x = 2 * torch.randn(2, 83, 36)
    with torch.no_grad():
        whole, state = layer(x), layer.stream(2, rewind=3)
        rows = [layer.step(x[:, :prompt], state)] if prompt else []
        for i in range(prompt, 83):
            if i == 50:
                layer.step(torch.randn(2, 3, 36), state)
                state.rewind(3)
            rows.append(layer.step(x[:, i : i + 1], state))
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-4, atol=2e-5)
    if name == "everything" and not expanded:
        dense = ff.Attention(36, 6, num_kv_heads=2, near=ff.near.Dense(), causal=True, rope=1e4).eval()
        dense.load_state_dict(layer.state_dict())
        torch.testing.assert_close(whole, dense(x), rtol=1e-4, atol=2e-5)


def test_tokens_are_kept_once() -> None:
    """However many groups read them; bounds once for all groups that score cells of one size."""
    far = ByHead((((0, 1), opens(2, 3, page=2)), ((2, 3), opens(2, 9, page=2)), ((4, 5), opens(4, 2, page=2))))
    layer = ff.Attention(36, 6, num_kv_heads=2, near=Blocks(8), far=far, causal=True)
    state = layer.stream(rewind=0)
    layer.step(torch.randn(1, 80, 36), state)
    tokens, cells = 2 * 2 * 80, (2 * 80 // 2 + 2 * 80 // 4) * 2
    queries, chosen = 6, 6 * (1 + 9)
    assert state.nbytes == 4 * 6 * (tokens + cells + queries) + 8 * chosen


@pytest.mark.skipif(compiled.why_not() is not None, reason=f"no compiled engine: {compiled.why_not()}")
def test_a_choice_is_made_once_for_a_run() -> None:
    """Within a run nothing that choices score is read again, and the first step of the next run reads it."""
    far = ByHead((((0, 1, 2, 3, 4, 5), opens(2, 3, beam=2, page=2, share=8, recent=4)),))
    layer = ff.Attention(36, 6, num_kv_heads=2, near=Blocks(8), far=far, causal=True).eval()
    x = 2 * torch.randn(1, 65, 36)
    state = layer.stream(rewind=0)
    with torch.no_grad():
        expected = layer(x)
        layer.step(x[:, :49], state)
        rows = [layer.step(x[:, 49:50], state)]
        for cache in state.caches.values():
            for name in cache:
                if "bounds" in name:
                    cache[name].zero_()
        rows += [layer.step(x[:, i : i + 1], state) for i in range(50, 57)]
    torch.testing.assert_close(torch.cat(rows[:7], 1), expected[:, 49:56], rtol=1e-4, atol=2e-5)
    assert not torch.allclose(rows[7], expected[:, 56:57], rtol=1e-4, atol=2e-5)


def test_what_is_no_number_stays_where_it_is_seen() -> None:
    far = ByHead((((0, 1, 2, 3, 4, 5), opens(2, 500, beam=500, page=1)),))
    layer = ff.Attention(36, 6, num_kv_heads=2, near=Blocks(8), far=far, causal=True).eval()
    x = torch.randn(2, 40, 36)
    x[0, 20] = torch.nan
    state = layer.stream(2)
    with torch.no_grad():
        out = torch.cat([layer.step(x[:, i : i + 1], state) for i in range(40)], 1)
    assert out[0, :20].isfinite().all()
    assert out[0, 20:].isnan().all()
    assert out[1].isfinite().all()
