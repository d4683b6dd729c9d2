"""A learned bias by offset: what it adds to scores, where it works, and what it is refused for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from farfield import attention, recipes
from farfield.attention import Attention
from farfield.far import Landmarks, Linear, Pooled, Projection, Pyramid
from farfield.near import Anchors, Blocks, Conv, Dense, Partition, Window
from farfield.position_bias import PositionBias, places
from farfield.rope import segment_positions

GRIDS = {1: (23,), 2: (5, 7), 3: (3, 4, 5)}


def written_out(weight: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """[heads, N, N] by the formula, offset by offset."""
    where = list(itertools.product(*map(range, grid)))
    bias = torch.zeros(weight.shape[0], len(where), len(where), dtype=torch.float64)
    for i, a in enumerate(where):
        for j, b in enumerate(where):
            for axis, (x, y) in enumerate(zip(a, b, strict=True)):
                for octave in range(weight.shape[2]):
                    turn = 2 * math.pi * (y - x) / (4 * 2**octave)
                    c, s = weight[:, axis, octave].unbind(-1)
                    bias[:, i, j] += c * math.cos(turn) + s * math.sin(turn)
    return bias


def biased(**options: Any) -> Attention:
    torch.manual_seed(0)
    layer = Attention(16, 4, num_kv_heads=2, **options).double()
    assert layer.position_bias is not None
    torch.nn.init.normal_(layer.position_bias.weight)
    return layer


def attended(layer: Attention, x: torch.Tensor, bias: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The layer by a softmax over scores plus bias."""
    heads = layer.qkv(x).unflatten(-1, (8, 4)).transpose(1, 2)
    q, k, v = heads[:, :4], heads[:, 4:6].repeat_interleave(2, 1), heads[:, 6:].repeat_interleave(2, 1)
    scores = (q @ k.mT / 2 + bias).masked_fill(~seen, -torch.inf)
    out: torch.Tensor = layer.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return out


@pytest.mark.parametrize("dims", GRIDS)
def test_dense_attention_with_the_bias_written_out(dims: int) -> None:
    grid = GRIDS[dims]
    layer = biased(near=Dense(), dims=dims, position_bias=3)
    assert layer.position_bias is not None
    x = torch.randn(2, math.prod(grid), 16, dtype=torch.float64)
    bias = written_out(layer.position_bias.weight.detach(), grid)
    seen = torch.ones(bias.shape[-2:], dtype=torch.bool)
    torch.testing.assert_close(layer(x, grid=grid), attended(layer, x, bias, seen))


@pytest.mark.parametrize(
    "near", [Window(5), Window((3, 5), stride=(1, 2)), Blocks(2), Partition(3, shift=1), Anchors(2)], ids=repr
)
def test_near_fields_add_it_to_what_they_see(near: Any) -> None:
    grid = (7, 9)
    layer = biased(near=near, dims=2, position_bias=3)
    assert layer.position_bias is not None
    # Who sees whom, by what moves a query's answer.
    plain = Attention(16, 4, near=near, dims=2).double()
    x = torch.randn(1, 63, 16, dtype=torch.float64, requires_grad=True)
    y = plain(x, grid=grid)
    seen = torch.stack([torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].any(-1) for i in range(63)])
    bias = written_out(layer.position_bias.weight.detach(), grid)
    if isinstance(near, Anchors):
        seen[:] = False
        seen.unflatten(1, grid)[:, ::2] = True
    torch.testing.assert_close(layer(x, grid=grid), attended(layer, x, bias, seen))


@pytest.mark.parametrize("causal", [False, True])
def test_summaries_of_single_tokens_carry_it_exactly(causal: bool) -> None:
    options: dict[str, Any] = {"near": Blocks(4), "far": Pyramid(4, summary="mean", levels=1, bias=None)}
    layer = biased(causal=causal, position_bias=4, **options)
    assert layer.position_bias is not None
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    seen = torch.ones(37, 37, dtype=torch.bool)
    bias = written_out(layer.position_bias.weight.detach(), (37,))
    torch.testing.assert_close(layer(x), attended(layer, x, bias, seen.tril() if causal else seen))


@pytest.mark.parametrize(
    "options",
    [
        *({"near": Blocks(4), "far": Pyramid(2, summary=kind, bias=-1.0)} for kind in ("mean", "shared", "pooled")),
        {"near": Blocks(4), "far": Pyramid(2, summary="learned", grid=(40,), bias=-1.0)},
        {"near": Window(8), "far": Pooled(4, summary="learned")},
        {"near": Blocks(4), "far": Pyramid(2, open=2, bias=-1.0)},
    ],
    ids=repr,
)
def test_it_depends_on_offsets_alone(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the sequence begins, whatever summaries have learned."""
    layer = biased(causal=True, position_bias=3, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    y = layer(x)
    monkeypatch.setattr(attention, "segment_positions", lambda *given: segment_positions(*given) + 5)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("kind", ["shared", "pooled", "learned"])
def test_every_summary_carries_the_mean_of_the_waves(kind: str) -> None:
    """Before it has learned anything, and so equals the summary that is a mean, bias included."""
    grid = (40,) if kind == "learned" else None
    options: dict[str, Any] = {"causal": True, "position_bias": 3, "near": Blocks(4)}
    mean, layer = (
        biased(**options, far=Pyramid(2, summary=summary, grid=made_for, bias=-1.0))
        for summary, made_for in (("mean", None), (kind, grid))
    )
    assert mean.position_bias is not None and layer.position_bias is not None
    layer.position_bias.load_state_dict(mean.position_bias.state_dict())
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), mean(x))


def test_ready_queries_and_states_of_other_widths_are_refused() -> None:
    layer, plain = (Attention(16, 2, near=Dense(), causal=True, position_bias=octaves) for octaves in (4, None))
    x = torch.zeros(1, 3, 16)
    with pytest.raises(ValueError, match="8 channels per head, the layer works on 16, the last 8 of them"):
        layer.attend(plain._inputs(x, None, None, None))
    wide = Attention(16, 2, near=Dense(), causal=True, head_dim=16)
    with pytest.raises(ValueError, match="made for another layer"):
        wide.step(x, layer.stream())


def test_it_begins_as_no_bias_and_learns() -> None:
    torch.manual_seed(3)
    plain = Attention(16, 4, near=Blocks(2), far=Pyramid(1), dims=2)
    torch.manual_seed(3)
    layer = Attention(16, 4, near=Blocks(2), far=Pyramid(1), dims=2, position_bias=2)
    x = torch.randn(1, 80, 16)
    assert layer.far is not None and layer.position_bias is not None
    torch.testing.assert_close(layer(x, grid=(8, 10)), plain(x, grid=(8, 10)))
    layer(x, grid=(8, 10)).square().sum().backward()
    grad = layer.position_bias.weight.grad
    assert grad is not None and (grad != 0).all()


def test_far_away_tokens_have_exact_waves() -> None:
    bias = PositionBias(2, 1, 5)
    torch.nn.init.normal_(bias.weight)
    tokens = torch.zeros(1, 2, 64, 8)

    def scores(first: int) -> torch.Tensor:
        q, k, v = bias(tokens, tokens, tokens, torch.arange(first, first + 64)[:, None], 0.5)
        assert not v.any() and v.shape == (1, 2, 64, 18)
        return 0.5 * q @ k.mT

    torch.testing.assert_close(scores(0), scores(3 * 2**40), atol=0, rtol=0)


def test_places_are_row_major() -> None:
    assert places((2, 3), torch.device("cpu")).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("name", ["fma2d", "window", "na", "dina", "gna", "swin", "maxvit", "dense", "blocks", "focal"])
def test_recipes_of_images_take_it(name: str) -> None:
    options = {"block": 4, "rank": 1} if name == "fma2d" else {}
    layer = recipes.build(name, 32, 2, dims=2, position_bias=2, **options)
    x, mask = torch.randn(1, 9 * 13, 32), torch.rand(1, 9 * 13) < 0.8
    assert layer(x, grid=(9, 13), key_mask=mask).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_the_error_of_plain_torch(dtype: torch.dtype) -> None:
    layer = biased(near=Blocks(4), far=Pyramid(4, summary="mean", levels=1, bias=None), position_bias=4)
    assert layer.position_bias is not None
    x = torch.randn(2, 61, 16, dtype=torch.float64)
    bias, seen = written_out(layer.position_bias.weight.detach(), (61,)), torch.ones(61, 61, dtype=torch.bool)
    want = attended(layer, x, bias, seen)
    low = layer.to(dtype)
    plain = attended(low, x.to(dtype), bias.to(dtype), seen)
    assert (low(x.to(dtype)) - want).norm() <= 2 * (plain - want).norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"near": Dense(), "position_bias": 0}, "position_bias=0: a number of octaves from 1 to 16"),
        ({"near": Dense(), "position_bias": True}, "position_bias=True"),
        ({"near": Dense(), "position_bias": 4, "rope": 100.0}, "with rope=100.0"),
        ({"far": Linear(), "position_bias": 4}, r"far=Linear\(.*does not score tokens"),
        ({"near": Conv(3), "far": Landmarks(3), "merge": "sum", "position_bias": 4}, r"near=Conv\("),
        ({"near": Window(5), "far": Landmarks(3), "position_bias": 4}, r"far=Landmarks\("),
        ({"near": Window(5, kv_norm=True), "position_bias": 4}, r"near=Window\("),
        ({"near": Window(5), "far": Projection(3), "position_bias": 4}, r"far=Projection\("),
        ({"far": Pooled(4, rank=2), "position_bias": 4}, r"far=Pooled\("),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(16, 4, **options)
