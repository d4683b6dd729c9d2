"""The Pyramid far field as a part: what it refuses, how it starts, that it is the complement of Blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import farfield as ff
from farfield.far.pyramid import FAST, MAX_LEVELS
from farfield.parts import Inputs, LayerSpec
from farfield.rope import Rope, segment_positions

SPEC = LayerSpec(dim=16, num_heads=4, num_kv_heads=2, head_dim=4, causal=True, dims=1)
KINDS = ("shared", "pooled", "mean", "learned")


def inputs(
    number: int = 50, spec: LayerSpec = SPEC, grid: tuple[int, ...] | None = None, batch: int = 2, **more: Any
) -> Inputs:
    f64 = torch.float64
    q = torch.randn(batch, spec.num_heads, number, spec.head_dim, dtype=f64)
    k, v = (torch.randn(batch, spec.num_kv_heads, number, spec.head_dim, dtype=f64) for _ in range(2))
    x = torch.randn(batch, number, spec.dim, dtype=f64)
    return Inputs(q=q, k=k, v=v, x=x, grid=grid or (number,), causal=spec.causal, scale=0.5, **more)


def far(summary: str = "shared", number: int = 50, **options: Any) -> ff.far.Pyramid:
    grid = {"grid": (number,)} if summary == "learned" else {}
    return ff.far.Pyramid(**{"rank": 2, "summary": summary, "bias": -1.0, **grid, **options})


def shaken(module: nn.Module) -> nn.Module:
    """In float64, parameters moved off their start."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"summary": "median"}, ["'median'", "shared, pooled, mean, learned"]),
        ({"rope": "groups"}, ["'groups'", "'tokens' or 'cells'"]),
        ({"summary": "learned"}, ["grid=None", "need the grid"]),
        ({"grid": (64,)}, ["'shared'", "(64,)", "work on any"]),
        ({"sinks": -1}, ["sinks=-1", ">= 0"]),
        ({"share": 4, "rest": "drop"}, ["open=0, share=4, rest='drop'", "open=16 opens some"]),
        ({"open_bias": -8.0}, ["open=0", "open_bias=-8.0", "where pages are opened"]),
        ({"open": 2, "open_bias": "quiet"}, ["open_bias='quiet'", "a number", '"bias"']),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="Pyramid") as caught:
        ff.far.Pyramid(**options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("spec", "near", "options", "words"),
    [
        ({}, None, {}, ["near=None", "near=Blocks"]),
        ({}, ff.near.Window(8), {}, ["Window", "complement of leaf blocks", "near=Blocks"]),
        ({}, ff.near.Blocks(8), {"rank": 3}, ["rank=3", "block=8", "[1, 2, 4, 8]"]),
        ({}, ff.near.Blocks(8), {"rank": (2, 2)}, ["Pyramid.rank=(2, 2)", "1-D"]),
        ({}, ff.near.Blocks((8, 8)), {"rank": 2}, ["Blocks.block=(8, 8)", "1-D"]),
        ({"causal": False}, ff.near.Blocks(8), {"query_rank": 3}, ["3", "block=8"]),
        ({"causal": False, "dims": 2}, ff.near.Blocks(4), {"rank": 2, "rope": "cells"}, ["rope='cells'", "dims=2"]),
        ({}, ff.near.Blocks(4), {"rank": 2, "summary": "learned", "grid": (64,), "levels": 9}, ["levels=9", "1 to 3"]),
        ({}, ff.near.Blocks(4), {"rank": 2, "summary": "learned", "grid": (8, 8)}, ["grid=(8, 8)", "2 axes", "dims=1"]),
    ],
)
def test_layers_that_make_no_sense(spec: dict[str, Any], near: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        ff.far.Pyramid(**options).build(replace(SPEC, **spec), near)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_pooled_queries_are_not_causal() -> None:
    part = far(query_rank=2)
    assert not part.causal_safe and far().causal_safe and far().gives_state
    with pytest.raises(ValueError, match=r"causal-safe.*later tokens"):
        ff.Attention(16, 4, causal=True, near=ff.near.Blocks(4), far=part)


def test_what_fuses() -> None:
    blocks = ff.near.Blocks(4)
    assert far().fuses(blocks, "softmax")
    assert (
        not far().fuses(blocks, "gate")
        and not far().fuses(ff.near.Window(4), "softmax")
        and not far().fuses(None, "softmax")
    )


@pytest.mark.parametrize("summary", KINDS)
def test_a_quiet_average_at_the_start(summary: str) -> None:
    """Level bias -8 for every level and head, stored as an offset divided by 10; summaries are means."""
    module = far(summary, bias=-8.0).build_fused(SPEC, ff.near.Blocks(4))
    assert module.level_bias.shape == (MAX_LEVELS, 4) and FAST == 10.0
    torch.testing.assert_close(module.biases(), torch.full((MAX_LEVELS, 4), -8.0))
    assert not module.level_bias.any()  # so that weight decay keeps it quiet
    given = inputs()
    state = module.double()(given)
    bias = -8 * torch.ones(8, 4, dtype=torch.float64)
    out, lse = ff.multipole_attention(
        given.q, given.k, given.v, block=4, rank=2, causal=True, scale=0.5, level_bias=bias, return_lse=True
    )
    torch.testing.assert_close((state.out, state.lse), (out, lse), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    module.reset_parameters()
    torch.testing.assert_close(module(given).out, out, atol=1e-6, rtol=1e-5)


def test_no_bias_and_the_default() -> None:
    assert ff.far.Pyramid().bias == -8.0
    module = far("mean", bias=None).build_fused(SPEC, ff.near.Blocks(4))
    assert module.level_bias is None and not list(module.parameters())
    assert ff.far.Pyramid().build(SPEC, ff.near.Blocks(64)).weights["key_leaf"].shape == (2, 8, 4)


def test_a_step_of_adam_moves_the_bias_ten_times_as_far() -> None:
    module = far(bias=-8.0).build_fused(SPEC, ff.near.Blocks(4)).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    state = module(inputs())
    (state.out.square().sum() + state.lse.sum()).backward()
    optimizer.step()
    moved = (module.biases() + 8).abs()
    torch.testing.assert_close(moved[:3], torch.full_like(moved[:3], 0.1), rtol=1e-3, atol=0)
    assert (moved[4:] < 1e-6).all()  # levels that a length does not have


def test_opened_tokens_can_start_quiet() -> None:
    module = far(open=2, bias=None, rest="drop", open_bias=-40.0).build_fused(SPEC, ff.near.Blocks(4)).double()
    given = inputs()
    near = ff.near.Blocks(4).build(SPEC).double()(given)
    state = module(given)
    torch.testing.assert_close(state.out, near.out)
    module = far(open=2, bias=None, open_bias=-4.0).build_fused(SPEC, ff.near.Blocks(4)).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    module(given).lse.sum().backward()
    optimizer.step()
    # The sum falls with the bias, which moves ten times as far as the rate.
    torch.testing.assert_close(module.opened_bias(), torch.full_like(module.opened_bias(), -4.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"open": 2}, -8.0), ({"open": 2, "bias": -1.5}, -1.5), ({"open": 2, "open_bias": -3}, -3.0),
        ({"open": 2, "open_bias": None}, None), ({"open": 2, "bias": None}, None), ({}, None),
    ],
)  # fmt: skip
def test_opened_tokens_start_where_summaries_do(options: dict[str, Any], start: float | None) -> None:
    module = ff.far.Pyramid(2, **options).build_fused(SPEC, ff.near.Blocks(4))
    if start is None:
        assert module.opened_bias() is None
    else:
        torch.testing.assert_close(module.opened_bias(), torch.full((SPEC.num_heads,), start))


@pytest.mark.parametrize("summary", KINDS)
@pytest.mark.parametrize("rope", [None, "tokens", "cells"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_fused_is_blocks_merged_with_the_far_field(summary: str, rope: str | None, sinks: int) -> None:
    """The same parameters in three modules: Blocks, the far field alone, both in one operator; with gradients."""
    blocks = ff.near.Blocks(4)
    part = far(summary, rope=rope or "tokens", sinks=sinks)
    fused, alone = shaken(part.build_fused(SPEC, blocks)), part._module(SPEC, blocks, "far").double()
    alone.load_state_dict(fused.state_dict())
    turn = {} if rope is None else {"rope": Rope(), "positions": torch.arange(50)}
    given = inputs(key_mask=torch.rand(2, 50) > 0.3, **turn)
    near = ff.AttentionState(
        *ff.multipole_attention(
            given.rotated_q, given.rotated_k, given.v, block=4, rank=2, causal=True, key_mask=given.key_mask, scale=0.5,
            sinks=sinks, part="near", return_lse=True,
        )
    )  # fmt: skip
    if sinks == 0:
        torch.testing.assert_close(blocks.build(SPEC)(given), near)
    merged, whole = ff.merge_states(near, alone(given)), fused(given)
    torch.testing.assert_close(merged, whole)
    finite = whole.lse > -torch.inf
    for state, module in ((merged, alone), (whole, fused)):
        (state.out.square().sum() + state.lse[finite].sum()).backward()
        assert not list(module.parameters()) or all(p.grad is not None for p in module.parameters())
    for a, b in zip(alone.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("summary", ["shared", "pooled", "mean"])
def test_rotating_tokens_or_cells_is_one_thing_for_cells_of_one_token(summary: str) -> None:
    blocks = ff.near.Blocks(8)
    given = inputs(29, rope=Rope(), positions=torch.arange(29))
    tokens = shaken(far(summary, rank=8, rope="tokens").build_fused(SPEC, blocks))
    cells = far(summary, rank=8, rope="cells").build_fused(SPEC, blocks).double()
    cells.load_state_dict(tokens.state_dict())
    if summary == "shared":  # weights by channel do not commute with a rotation of channel pairs
        for module in (tokens, cells):
            with torch.no_grad():
                for w in module.weights.values():
                    w.copy_(w.mean(-1, keepdim=True).expand_as(w))
    torch.testing.assert_close(tokens(given), cells(given))
    longer = inputs(80, rope=Rope(), positions=torch.arange(80))
    assert not torch.allclose(tokens(longer).out, cells(longer).out)


@pytest.mark.parametrize("rope", ["tokens", "cells"])
@pytest.mark.parametrize("summary", ["shared", "pooled", "mean"])
def test_packed_sequences_equal_each_alone(summary: str, rope: str) -> None:
    bounds = torch.tensor([0, 13, 13, 60])
    module = shaken(far(summary, rope=rope, sinks=1).build_fused(SPEC, ff.near.Blocks(4)))
    given = inputs(60, rope=Rope(), positions=segment_positions(60, bounds, torch.device("cpu")), cu_seqlens=bounds)
    together = module(given)
    for start, stop in ((0, 13), (13, 60)):
        span = slice(start, stop)
        alone = module(
            Inputs(
                q=given.q[:, :, span], k=given.k[:, :, span], v=given.v[:, :, span], x=given.x[:, span],
                grid=(stop - start,), causal=True, scale=0.5, rope=Rope(), positions=torch.arange(stop - start),
            )
        )  # fmt: skip
        torch.testing.assert_close(together.out[:, :, span], alone.out)
        torch.testing.assert_close(together.lse[:, :, span], alone.lse)


@pytest.mark.parametrize("summary", KINDS)
@pytest.mark.parametrize("rope", ["tokens", "cells"])
def test_the_layer_is_causal(summary: str, rope: str) -> None:
    layer = ff.Attention(
        16, 4, num_kv_heads=2, causal=True, near=ff.near.Blocks(4), far=far(summary, 61, rope=rope, sinks=2), rope=100.0
    ).double()
    shaken(layer)
    x = torch.randn(2, 61, 16, dtype=torch.float64).requires_grad_()
    out = layer(x)
    for i in (0, 3, 17, 40, 59):
        y = torch.cat([x[:, : i + 1], 100 * torch.randn(2, 60 - i, 16, dtype=torch.float64)], 1)
        assert torch.equal(layer(y)[:, : i + 1], out[:, : i + 1])
        (grad,) = torch.autograd.grad(out[:, : i + 1].square().sum(), x, retain_graph=True)
        assert (grad[:, i + 1 :] == 0).all() and (grad[:, : i + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("dims", "grid", "block"), [(2, (9, 14), 2), (2, (8, 20), (4, 2)), (3, (9, 5, 4), 2), (1, (50,), 4)]
)
@pytest.mark.parametrize("summary", KINDS)
def test_grids(dims: int, grid: tuple[int, ...], block: Any, summary: str) -> None:
    """Every summary on images and volumes, with pooled queries too, learns: every parameter gets a gradient."""
    spec = replace(SPEC, causal=False, dims=dims)
    number = torch.Size(grid).numel()
    for query_rank in (None, 1):
        part = far(summary, query_rank=query_rank, **({"grid": grid} if summary == "learned" else {}))
        module = shaken(part.build_fused(spec, ff.near.Blocks(block)))
        state = module(inputs(number, spec, grid))
        state.out.square().sum().backward()
        for name, p in module.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
            assert p.grad.abs().sum() > 0, name


def test_learned_summaries_are_made_for_one_grid() -> None:
    module = far("learned", 50).build(SPEC, ff.near.Blocks(4)).double()
    module(inputs(50))
    with pytest.raises(ValueError, match=r"made for grid \(50,\), got \(51,\); 'shared' works on any"):
        module(inputs(51))


def test_the_others_work_at_any_length() -> None:
    for summary in ("shared", "pooled", "mean"):
        module = shaken(far(summary).build_fused(SPEC, ff.near.Blocks(4)))
        for number in (1, 2, 9, 64, 301):
            state = module(inputs(number))
            assert torch.isfinite(state.out).all() and torch.isfinite(state.lse).all()


def test_dropout_reaches_the_operator() -> None:
    module = far().build_fused(SPEC, ff.near.Blocks(4)).double()
    given = inputs()
    dropped = replace(given, dropout=0.5)
    torch.manual_seed(0)
    a = module(dropped).out
    torch.manual_seed(0)
    assert torch.equal(module(dropped).out, a)
    assert not torch.equal(module(given).out, a)


def test_state_dict_and_dtype_round_trip() -> None:
    part = far("learned", 50)
    module, other = (
        shaken(part.build_fused(SPEC, ff.near.Blocks(4))),
        part.build_fused(SPEC, ff.near.Blocks(4)).double(),
    )
    other.load_state_dict(module.state_dict())
    given = inputs()
    torch.testing.assert_close(module(given), other(given))
    low = module.bfloat16()
    half: dict[str, Tensor] = {name: getattr(given, name).bfloat16() for name in ("q", "k", "v", "x")}
    state = low(replace(given, **half))
    assert state.out.dtype == torch.bfloat16 and state.lse.dtype == torch.float32


@pytest.mark.parametrize("rope", ["tokens", "cells"])
def test_export_leaves_the_layer_as_it_was(rope: str) -> None:
    layer = ff.Attention(
        16, 2, num_kv_heads=1, causal=True, near=ff.near.Blocks(4), far=far("shared", rope=rope), rope=100.0
    ).eval()
    x = torch.randn(1, 47, 16)
    program = torch.export.export(layer, (x,))
    out = layer(x)
    assert type(out) is Tensor
    assert torch.equal(program.module()(x), out)


def test_queries_before_are_those_of_causal_sequences() -> None:
    opened = ff.far.Pyramid(2, open=2, recent=4)
    with pytest.raises(ValueError, match=r"recent=4 with causal=False on 1 axes.*recent=0 would be accepted"):
        ff.Attention(16, 2, near=ff.near.Blocks(8), far=opened)
    ff.Attention(16, 2, near=ff.near.Blocks(8), far=opened, causal=True)
    with pytest.raises(ValueError, match=r"beam_share=3: a multiple of share=1 that divides the 8 tokens"):
        ff.Attention(16, 2, near=ff.near.Blocks(8), far=ff.far.Pyramid(2, open=2, beam_share=3), causal=True)


@pytest.mark.parametrize(("name", "dims"), [("fma", 1), ("fma2d", 2)])
def test_recipes_hand_the_start_of_opened_tokens_on(name: str, dims: int) -> None:
    for given, start in (({}, -8.0), ({"open_bias": -3.0}, -3.0)):
        layer = ff.recipes.build(name, 16, 2, dims=dims, block=4, rank=2, open=2, **given)
        torch.testing.assert_close(layer.far.opened_bias(), torch.full((2,), start))
