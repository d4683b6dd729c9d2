"""Decode states of the layer: a step equals the prefill at every prefix, however the tokens come and go."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import farfield as ff
from farfield.attention import ReadyAttention
from farfield.merge import Gate
from farfield.parts import Inputs, LayerSpec, NearPart, Part
from farfield.streaming import Decoder, StackState, StreamSpec, StreamState

far, near = ff.far, ff.near

LAYERS: dict[str, dict[str, Any]] = {
    "fma": {"near": near.Blocks(4), "far": far.Pyramid(2, bias=-1.0)},
    "fma biased": {"near": near.Blocks(4), "far": far.Pyramid(2, bias=-1.0), "position_bias": 3, "rope": None},
    "window biased": {"near": near.Window(7), "position_bias": 3, "rope": None},
    "fma mean": {"near": near.Blocks(6), "far": far.Pyramid(3, summary="mean", bias=None, count_bias=False)},
    "fma pooled": {"near": near.Blocks(4), "far": far.Pyramid(1, summary="pooled", bias=-1.0)},
    "fma cells": {"near": near.Blocks(4), "far": far.Pyramid(2, rope="cells", bias=-1.0)},
    "fma sinks": {"near": near.Blocks(4), "far": far.Pyramid(2, sinks=7, bias=-1.0)},
    "fma pooled cells, many sinks": {
        "near": near.Blocks(4), "far": far.Pyramid(4, summary="pooled", rope="cells", sinks=21, bias=None)
    },
    "fma 2 levels": {"near": near.Blocks(4), "far": far.Pyramid(2, levels=2, sinks=3, bias=-1.0)},
    "fma gate": {"near": near.Blocks(4), "far": far.Pyramid(2, summary="mean"), "merge": Gate(per="channel")},
    "fma opened": {"near": near.Blocks(4), "far": far.Pyramid(2, open=2, sinks=3, bias=-1.0)},
    "fma opened, quiet": {
        "near": near.Blocks(4), "far": far.Pyramid(2, open=2, sinks=3, bias=-1.0, open_bias=-2.0)
    },
    "fma opened, dropped, quiet": {
        "near": near.Blocks(4), "far": far.Pyramid(2, open=2, rest="drop", bias=None, open_bias=-2.0)
    },
    "fma opened, shared": {
        "near": near.Blocks(8),
        "far": far.Pyramid(2, levels=1, open=3, beam=2, page=2, share=4, rest="drop", choose="bounds", bias=None),
    },
    "fma opened, led by earlier queries": {
        "near": near.Blocks(8),
        "far": far.Pyramid(2, open=3, beam=2, page=2, share=2, beam_share=8, recent=11, bias=-1.0),
    },
    "fma opened, gate": {
        "near": near.Blocks(4), "far": far.Pyramid(2, summary="pooled", open=2, page=1), "merge": Gate(per="head")
    },
    "by head, opened": {
        "near": near.Blocks(8),
        "far": far.ByHead(
            (
                (
                    (0, 3),
                    far.Pyramid(
                        2, levels=1, open=3, beam=2, page=2, share=4, rest="drop", choose="bounds", bias=None, sinks=3
                    ),
                ),
                ((1,), far.Pyramid(2, bias=-1.0, sinks=3)),
            ),
            expansions=(
                far.Expansion.of((0, 1, 3), (0.5, 1.0, -1.0), torch.ones(3, 2, 4).cumsum(1)),
                far.Expansion.of((2,), (0.5,), torch.ones(1, 3, 4).cumsum(1), 7),
            ),
        ),
    },
    "by head, one key head kept": {
        "near": near.Blocks(8),
        "far": far.ByHead(
            (((0,), far.Pyramid(2, levels=1, open=3, rest="drop", choose="bounds", bias=None, sinks=3)),),
            expansions=(
                far.Expansion.of((0,), (0.5,), torch.ones(1, 2, 4).cumsum(1)),
                far.Expansion.of((1, 2), (0.5, -1.0), torch.ones(2, 3, 4).cumsum(1), 7),
                far.Expansion.of((3,), (1.0,), torch.ones(1, 1, 4), 12),
            ),
        ),
    },
    "by head, exact": {
        "near": near.Blocks(8),
        "far": far.ByHead(
            (((0,), far.Pyramid(2, levels=1, open=3, rest="drop", choose="bounds", bias=None, sinks=3)),),
            expansions=(far.Expansion.of((2,), (0.5,), torch.ones(1, 3, 4).cumsum(1), 7),),
            exact=(1, 3),
        ),
    },
    "blocks": {"near": near.Blocks(5)},
    "dense": {"near": near.Dense()},
    "window": {"near": near.Window(7)},
    "window dilated": {"near": near.Window(5, dilation=3)},
    "window strided": {"near": near.Window(7, stride=3, dilation=2, kv_norm=True)},
    "conv and linear": {"near": near.Conv(4), "far": far.Linear(temperature=True), "merge": "sum"},
    "linear": {"far": far.Linear("relu", floor=2.0)},
    "dense and projection": {"near": near.Dense(), "far": far.Projection(2, chunk=7)},
    "dense and landmarks of the past, gate": {
        "near": near.Dense(), "far": far.Projection(3, chunk=5, norm=False), "merge": "gate"
    },
    "partition": {"near": near.Partition(7)},
    "partition shifted, bias": {"near": near.Partition(6, shift=2, bias=True)},
    "window and pooled in reach": {
        "near": near.Window(9), "far": far.Pooled(4, reach=2, summary="learned", bias=True, count_bias=True)
    },
    "partition and pooled": {"near": near.Partition(5, shift=1), "far": far.Pooled(5, rank=3)},
    "anchors and pooled": {"near": near.Anchors(6), "far": far.Pooled(6, count_bias=True)},
    "linear centred": {"far": far.Linear("identity", temperature=True, normalise="subtract")},
}  # fmt: skip


def shaken(layer: ff.Attention) -> ff.Attention:
    """Parameters moved off their start, so that every one of them matters."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return layer.eval()


def build(name: str, dtype: torch.dtype = torch.float64) -> ff.Attention:
    options = {"rope": 50.0, **LAYERS[name]}
    return shaken(ff.Attention(16, 4, num_kv_heads=2, causal=True, qk_norm=True, **options).to(dtype))


def recipe(name: str, layer: int = 0, dtype: torch.dtype = torch.float64) -> ff.Attention:
    known = ff.recipes.options(name)
    options = {key: value for key, value in (("block", 8), ("rank", 2), ("bias", -1.0)) if key in known}
    return shaken(ff.recipes.build(name, 16, 4, causal=True, layer=layer, rope=50.0, **options).to(dtype))


def last_rows(layer: ff.Attention, x: Tensor) -> Tensor:
    """[B, N, dim]: row i is the last row of the prefill of i + 1 tokens."""
    with torch.no_grad():
        return torch.cat([layer(x[:, : i + 1])[:, i:] for i in range(x.shape[1])], 1)


def strided(layer: ff.Attention) -> bool:
    """Whether the last queries' windows wait for tokens that are not there yet: the exception of docs/streaming.md."""
    return isinstance(layer.near_spec, near.Window) and layer.near_spec.stride != 1


def all_rows(layer: ff.Attention, x: Tensor) -> Tensor:
    """The same at the price of one prefill; `test_a_step_equals_the_prefill_at_every_prefix` shows that it is."""
    if strided(layer):
        return last_rows(layer, x)
    with torch.no_grad():
        return layer(x)


def streamed(layer: ff.Attention, x: Tensor, state: StreamState, chunks: list[int] | None = None) -> Tensor:
    """The rows of steps of those sizes, the last one repeated as often as needed; of one token each without sizes."""
    outs, done, sizes = [], 0, iter(chunks or [])
    size = 1
    while done < x.shape[1]:
        size = next(sizes, size)
        outs.append(layer.step(x[:, done : done + size], state))
        done += size
    return torch.cat(outs, 1)


CAUSAL = [name for name in ff.recipes.names() if ff.recipes.get(name).causal]


def kinds(name: str) -> list[int]:
    """The layers of a recipe that differ: 0, and 1 where layers alternate."""
    even, odd = (ff.recipes.build(name, 16, 4, causal=True, layer=layer) for layer in (0, 1))
    return [0] if (even.near_spec, even.far_spec) == (odd.near_spec, odd.far_spec) else [0, 1]


@pytest.mark.parametrize("name", [*LAYERS, *(f"recipe {name} {layer}" for name in CAUSAL for layer in kinds(name))])
def test_a_step_equals_the_prefill_at_every_prefix(name: str) -> None:
    """And that of every longer prefix: levels that only a longer one has show its earlier rows nothing."""
    module = recipe(name.split()[1], int(name.split()[2])) if name.startswith("recipe") else build(name)
    x = torch.randn(1, 73, 16, dtype=torch.float64)
    want = last_rows(module, x)
    torch.testing.assert_close(streamed(module, x, module.stream()), want)
    torch.testing.assert_close(all_rows(module, x), want)


@pytest.mark.parametrize(
    "name",
    [
        "fma cells", "linear centred", "partition shifted, bias", "window and pooled in reach", "anchors and pooled",
        "by head, one key head kept",
    ],
)  # fmt: skip
def test_after_a_prompt_of_any_length(name: str) -> None:
    module, x = build(name), torch.randn(1, 75, 16, dtype=torch.float64)
    want = all_rows(module, x)
    for prompt in [*range(1, 18), 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 72]:
        state = module.stream()
        torch.testing.assert_close(module.step(x[:, :prompt], state), module(x[:, :prompt]))
        torch.testing.assert_close(streamed(module, x[:, prompt : prompt + 3], state), want[:, prompt : prompt + 3])


@pytest.mark.parametrize("name", LAYERS)
@hypothesis_settings(max_examples=2)
@given(data=st.data())
def test_chunks_of_any_size(name: str, data: st.DataObject) -> None:
    """The rows of a step are the last rows of the prefill of all tokens so far."""
    module, x = build(name), torch.randn(1, 130, 16, dtype=torch.float64)
    state, done, want = module.stream(), 0, all_rows(module, x[:, : 60 if name == "window strided" else 130])
    while done < want.shape[1]:
        size = data.draw(st.sampled_from([1, 2, 3, 4, 7, 12, 33, 100]))
        rows = module.step(x[:, done : done + size], state)
        done = min(done + size, x.shape[1])
        if name == "window strided":
            with torch.no_grad():
                want = torch.cat((want[:, : done - rows.shape[1]], module(x[:, :done])[:, -rows.shape[1] :]), 1)
        torch.testing.assert_close(rows, want[:, done - rows.shape[1] : done])
        assert state.lengths == [done]
        if name == "window strided" and done > 60:
            break


def test_a_stride_is_the_exception() -> None:
    module, x = build("window strided"), torch.randn(1, 20, 16, dtype=torch.float64)
    assert not torch.allclose(module(x), last_rows(module, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    [*CAUSAL, "linear", "linear centred", "partition and pooled", "anchors and pooled", "by head, one key head kept",
     "by head, exact"],
)  # fmt: skip
def test_low_precision_stays_within_the_budget(name: str, dtype: torch.dtype) -> None:
    """At most twice the error that the plain forward makes in the same dtype."""
    low = build(name, dtype) if name in LAYERS and name not in CAUSAL else recipe(name, 0, dtype)
    exact = copy.deepcopy(low).double()
    x = torch.randn(1, 50 if strided(low) else 101, 16).to(dtype)
    want, plain = all_rows(exact, x.double()), all_rows(low, x)
    for chunks in (None, [40, 1, 9, 30]):
        if strided(low) and chunks:
            continue  # a chunk's rows are others
        got = streamed(low, x, low.stream(), chunks)
        assert got.dtype == dtype
        assert (got - want).norm() <= 2 * (plain - want).norm()


@pytest.mark.parametrize("rope", [50.0, None], ids=["rope", "no rope"])
@pytest.mark.parametrize(
    "name",
    ["fma", "window strided", "linear", "dense and projection", "by head, opened", "by head, one key head kept"],
)
def test_under_autocast(name: str, rope: float | None) -> None:
    module, x = (
        shaken(ff.Attention(16, 4, num_kv_heads=2, causal=True, **{"rope": rope, **LAYERS[name]})),
        torch.randn(1, 60, 16),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = streamed(module, x, module.stream())
        want = last_rows(module, x)
    exact = last_rows(copy.deepcopy(module).double(), x.double())
    assert (got - exact).norm() <= 2 * (want - exact).norm()


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_different_lengths(name: str) -> None:
    """Prompts padded on the left, on the right and in between, then steps in which not every row takes part."""
    module, f64 = build(name), torch.float64
    steps = [torch.randn(4, size, 16, dtype=f64) for size in (37, 1, 1, 6, 1)]
    masks = [torch.zeros(4, 37, dtype=torch.bool)]
    masks[0][0, 25:] = True  # left padding
    masks[0][1, :30] = True  # right padding
    masks[0][2] = True
    masks[0][3, ::2] = True
    for size in (1, 1, 6, 1):
        masks.append(torch.rand(4, size) < 0.7)
    state, sequences = module.stream(4), [torch.zeros(1, 0, 16, dtype=f64)] * 4
    for x, mask in zip(steps, masks, strict=True):
        x = torch.where(mask[..., None], x, torch.nan)  # what is not there may be anything
        out = module.step(x, state, present=mask)
        for row in range(4):
            sequences[row] = torch.cat((sequences[row], x[row : row + 1, mask[row]]), 1)
            if mask[row].any():
                with torch.no_grad():
                    want = module(sequences[row])[:, -int(mask[row].sum()) :]
                torch.testing.assert_close(out[row : row + 1, mask[row]], want)
    assert state.lengths == [s.shape[1] for s in sequences] and len(set(state.lengths)) > 1


@pytest.mark.parametrize("name", LAYERS)
def test_beams(name: str) -> None:
    """A reordered state goes on from the rows that it copied, and shares nothing with the old one."""
    module, x = build(name), torch.randn(3, 50, 16, dtype=torch.float64)
    state = module.stream(3)
    module.step(x[:, :43], state)
    chosen = torch.tensor([2, 0, 2, 1])
    beams = state.reorder(chosen)
    assert beams.lengths == [43] * 4 and state.lengths == [43] * 3
    more = torch.randn(4, 7, 16, dtype=torch.float64)
    want = all_rows(module, torch.cat((x[chosen][:, :43], more), 1))[:, 43:]
    torch.testing.assert_close(streamed(module, more, beams), want)
    torch.testing.assert_close(streamed(module, x[:, 43:], state), all_rows(module, x)[:, 43:])


@pytest.mark.parametrize("name", LAYERS)
def test_up_to_a_block_can_be_taken_back(name: str) -> None:
    module, f64 = build(name), torch.float64
    spec = module.near_spec
    limit = spec.block if isinstance(spec, near.Blocks) else 9
    for i, (length, back) in enumerate([(9, limit), (17, limit), (33, 1), (32, limit), (65, 2), (71, limit)]):
        x = torch.randn(1, length, 16, dtype=f64)
        state = module.stream(1, rewind=limit)
        streamed(module, x, state, [[1], [length], [length // 2, 1]][i % 3])
        state.rewind(back)
        assert state.lengths == [length - back]
        other = torch.randn(1, back + limit, 16, dtype=f64)
        text = torch.cat((x[:, : length - back], other), 1)
        torch.testing.assert_close(streamed(module, other, state), all_rows(module, text)[:, length - back :])


def test_speculation_and_taking_back_by_turns() -> None:
    """Three guessed tokens, of which some are kept, again and again, each row on its own."""
    module, f64 = build("fma"), torch.float64
    state, kept = module.stream(2, rewind=4), [torch.zeros(1, 0, 16, dtype=f64)] * 2
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        guess = torch.randn(2, 3, 16, dtype=f64, generator=generator)
        out = module.step(guess, state)
        wrong = torch.randint(0, 4, (2,), generator=generator).tolist()
        for row in range(2):
            text = torch.cat((kept[row], guess[row : row + 1]), 1)
            with torch.no_grad():
                torch.testing.assert_close(out[row : row + 1], module(text)[:, -3:])
            kept[row] = text[:, : text.shape[1] - wrong[row]]
        state.rewind(wrong)
        assert state.lengths == [k.shape[1] for k in kept]


def test_no_more_can_be_taken_back_than_the_state_was_made_for() -> None:
    module, x = build("fma"), torch.randn(2, 30, 16, dtype=torch.float64)
    state = module.stream(2, rewind=3)
    module.step(x, state)
    with pytest.raises(ValueError, match=r"rewind\(4\) of row 0, which has 30 tokens.*0 to 3 would be accepted"):
        state.rewind(4)
    state.rewind([2, 0])
    with pytest.raises(ValueError, match=r"rewind\(2\) of row 0, which has 28 tokens and has had 30: 0 to 1"):
        state.rewind(2)
    with pytest.raises(ValueError, match="3 numbers for 2 rows"):
        state.rewind([1, 1, 1])
    assert state.lengths == [28, 30]
    with pytest.raises(ValueError, match=r"rewind=5: groups are kept for taking back up to block=4"):
        module.stream(1, rewind=5)


@pytest.mark.parametrize("name", LAYERS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    module, x = build(name), torch.randn(2, 60, 16, dtype=torch.float64)
    state = module.stream(2, rewind=2)
    streamed(module, x[:, :50], state, [45, 1])
    state.rewind([1, 0])
    state.save(tmp_path / "state.safetensors")
    loaded = StreamState.load(tmp_path / "state.safetensors")
    assert loaded.lengths == [49, 50] and loaded.limit == 2 and loaded.nbytes == state.nbytes
    more = torch.randn(2, 8, 16, dtype=torch.float64)
    assert torch.equal(streamed(module, more, loaded), streamed(module, more, state))
    with pytest.raises(ValueError, match="0 to 2 would be accepted"):
        loaded.rewind(3)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        StreamState.load(path)
    safetensors.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no stream state"):
        StreamState.load(path)
    state = build("fma").stream()
    StackState([state, state.clone()]).save(path)
    with pytest.raises(ValueError, match="holds the states of 2 layers"):
        StreamState.load(path)
    header = {"farfield.stream": "3", "states": '[{"layer": "x", "caches": {"near": ["keys"]}}]'}
    safetensors.save_file({"a": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(ValueError, match="its header does not fit its tensors"):
        StreamState.load(path)


@pytest.mark.parametrize("name", LAYERS)
def test_a_clone_shares_nothing(name: str) -> None:
    module, x = build(name), torch.randn(1, 40, 16, dtype=torch.float64)
    state = module.stream()
    module.step(x[:, :21], state)
    copied = state.clone()
    module.step(torch.randn(1, 15, 16, dtype=torch.float64), state)
    assert copied.lengths == [21]
    torch.testing.assert_close(streamed(module, x[:, 21:], copied), all_rows(module, x)[:, 21:])


BOUNDED = ["blocks", "window and pooled in reach", "conv and linear", "linear", "linear centred"]


@pytest.mark.parametrize("name", LAYERS)
def test_bytes_by_length(name: str) -> None:
    """Bounded parts keep what they keep; a pyramid adds one level when the length doubles."""
    module, size = build(name), {}
    for length in (128, 256, 512, 1024):
        state = module.stream()
        module.step(torch.randn(1, length, 16, dtype=torch.float64), state)
        size[length] = state.nbytes
    steps = [size[256] - size[128], size[512] - size[256], size[1024] - size[512]]
    if "opened" in name:
        assert size[1024] > 4 * size[128]  # it keeps the tokens, and says so
    elif name.startswith("fma") and name != "fma 2 levels":
        assert steps[0] == steps[1] == steps[2] > 0  # one level each
        assert size[1024] < 2 * size[128]
    elif name in BOUNDED or (name.startswith(("window", "partition")) and "pooled" not in name):
        assert steps == [0, 0, 0]
    else:  # dense, anchors, landmarks, all cells and the top of a cut pyramid grow with the context
        assert steps[2] > steps[1] > steps[0] > 0


def test_the_pyramid_keeps_what_its_page_says() -> None:
    """Two blocks and four groups of rank summaries per level, keys and values, and a bias for each place."""
    layer = ff.Attention(16, 4, causal=True, near=near.Blocks(8), far=far.Pyramid(2, bias=None))
    state = layer.stream()
    layer.step(torch.randn(1, 8 * 100, 16), state)
    places = 2 * 8 + 4 * 2 * (100).bit_length()
    assert state.nbytes == 4 * places * (2 * 16 + 1)


def test_a_state_that_does_not_fit_is_refused() -> None:
    module, x = build("fma"), torch.randn(2, 9, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="the state has 1 rows, the tokens come in a batch of 2"):
        module.step(x, module.stream(1))
    with pytest.raises(ValueError, match=r"made for another layer:\n  state: .*Blocks\(block=5\)"):
        module.step(x, build("blocks").stream(2))
    with pytest.raises(ValueError, match=r"present must be a bool tensor \[B, T\] = \[2, 9\]"):
        module.step(x, module.stream(2), present=torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"x must be \[B, N, 16\]"):
        module.step(x[..., :3], module.stream(2))
    with pytest.raises(ValueError, match="reorder"):
        module.stream(2).reorder([0, 2])
    with pytest.raises(ValueError, match=r"stream\(batch_size=0, rewind=0\)"):
        module.stream(0)
    with pytest.raises(ValueError, match="lies on meta"):
        module.step(x, module.stream(2, device="meta"))


PARTS = [
    near.Anchors(3), near.Blocks(4), near.Conv(3), near.Dense(), near.DynamicConv(3), near.GlobalQueries(4),
    near.Partition(4), near.Window(5), far.Channels(), far.Landmarks(), far.Linear(), far.Multigrid(4, 2),
    far.Pooled(4), far.Projection(2, 4), far.Pyramid(2), far.Relay(4), far.Spectrum(8),
    far.ByHead((((0, 2), far.Pyramid(2)),)),
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_every_part_that_can_be_causal_can_be_streamed(part: Part) -> None:
    fields: dict[str, Any] = {"near": part} if isinstance(part, NearPart) else {"far": part}
    if isinstance(part, far.Pyramid | far.ByHead):
        fields["near"] = near.Blocks(4)
    if part.causal_safe:
        assert ff.Attention(16, 4, causal=True, **fields).stream().lengths == [0]
    else:
        with pytest.raises(ValueError, match=re.escape(part.why_not_causal)):
            ff.Attention(16, 4, causal=True, **fields)


def test_that_means_all_parts() -> None:
    every = [getattr(side, name) for side in (near, far) for name in side.__all__]
    parts = [x.__name__ for x in every if issubclass(x, Part)]
    assert sorted(type(part).__name__ for part in PARTS) == sorted(parts)


def test_layers_that_cannot_be_streamed_say_why() -> None:
    with pytest.raises(ValueError, match="use causal=True"):
        ff.Attention(16, 4, near=near.Dense()).stream()
    learned = far.Pyramid(2, summary="learned", grid=(64,))
    layer = ff.Attention(16, 4, causal=True, near=near.Blocks(4), far=learned)
    with pytest.raises(ValueError, match=r"learned summaries are made for one length, \(64,\)"):
        layer.stream()
    cut = ff.Attention(16, 4, causal=True, near=near.Blocks(4), far=far.Pyramid(2, levels=0))
    with pytest.raises(ValueError, match="levels=0"):
        cut.stream()
    with pytest.raises(ValueError, match="the near field of x has no stream: Linear keeps no state"):
        Decoder(torch.nn.Linear(2, 2), None, None, "x")


def test_no_gradients_and_no_dropout() -> None:
    module = ff.Attention(16, 4, causal=True, near=near.Window(5), dropout=0.5).train()
    x = torch.randn(1, 12, 16, requires_grad=True)
    out = module.step(x, module.stream())
    assert not out.requires_grad
    torch.testing.assert_close(out, module.eval()(x).detach())


@pytest.mark.parametrize("name", ["fma", "by head, one key head kept", "by head, exact"])
def test_states_made_in_inference_mode_serve_outside_of_it(name: str) -> None:
    module, x = build(name), torch.randn(2, 90, 16, dtype=torch.float64)
    with torch.inference_mode():
        state = module.stream(2)
        module.step(x[:, :30], state, present=torch.ones(2, 30, dtype=torch.bool).tril(25))  # rows of two lengths
        begun = [x[:1, :26], x[1:, :27]]
        state = state.reorder([0, 1]).clone()
    out = streamed(module, x[:, 30:], state)
    for row in range(2):
        whole = torch.cat([begun[row], x[row : row + 1, 30:]], 1)
        torch.testing.assert_close(out[row : row + 1], all_rows(module, whole)[:, begun[row].shape[1] :])


@pytest.mark.parametrize("name", ["fma", "by head, one key head kept", "by head, kept"])
def test_a_state_holds_no_gradients(name: str) -> None:
    """Also of queries, keys and values that somebody else trains."""
    lists = far.ByHead(sinks=3, expansions=(far.Expansion.of((0, 3), (0.5, 1.0), torch.ones(2, 3, 4).cumsum(1), 5),))
    spec = {"near": near.Blocks(8), "far": lists} if name == "by head, kept" else LAYERS[name]
    layer = ReadyAttention(LayerSpec(16, 4, 2, 4, causal=True), **spec).double().eval()
    decoder = Decoder(layer.near, layer.far, layer.merge, "layer")
    for context in (torch.enable_grad, torch.inference_mode):
        state = decoder.stream(StreamSpec(1, 4, 2, 4, 0, False, torch.float64, torch.device("cpu")))
        for start, stop in ((0, 40), (40, 60), (60, 61)):
            q, k, v = (torch.randn(1, h, stop - start, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
            with context():
                decoder.step(
                    Inputs(
                        q=q, k=k, v=v, x=q.new_empty(1, stop - start, 0), grid=(stop - start,), causal=True, scale=0.5
                    ),
                    state,
                )
        assert not any(x.requires_grad for cache in state.caches.values() for x in cache.values())
        copy.deepcopy(state)


@pytest.mark.usefixtures("poisoned")
def test_nothing_is_read_that_was_not_written() -> None:
    for name in LAYERS:
        module, x = build(name), torch.randn(1, 61, 16, dtype=torch.float64)
        torch.testing.assert_close(streamed(module, x, module.stream(1, rewind=3)), all_rows(module, x))


@pytest.mark.parametrize("name", ["fma", "fma pooled", "window", "dense", "linear"])
def test_ready_queries_keys_and_values(name: str) -> None:
    """What a cache for other models does: rotated queries and keys, no layer input, fewer key heads."""
    spec = dict(LAYERS[name])
    layer = shaken(ff.Attention(16, 4, num_kv_heads=2, causal=True, **spec).double())
    q, k, v = (torch.randn(2, h, 90, 4, dtype=torch.float64) for h in (4, 2, 2))

    def inputs(start: int, stop: int) -> Inputs:
        span = slice(start, stop)
        return Inputs(q[:, :, span], k[:, :, span], v[:, :, span], q.new_empty(2, stop - start, 0), (stop - start,),
                      causal=True, scale=0.4)  # fmt: skip

    state = layer.stream(2)
    rows = [layer.attend_step(inputs(0, 37), state)]
    rows += [layer.attend_step(inputs(i, i + 1), state) for i in range(37, 90)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(rows, 2), layer.attend(inputs(0, 90)))
