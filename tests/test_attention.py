"""The layer: what it computes, what it refuses, and that it is causal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from farfield import recipes
from farfield.attention import Attention
from farfield.far import (
    Channels,
    Landmarks,
    Linear,
    Multigrid,
    Pooled,
    Projection,
    Pyramid,
    Relay,
    Spectrum,
)
from farfield.merge import AttentionState, Gate, attend_dense, merge_states, resolve_merge
from farfield.near import Anchors, Blocks, Conv, Dense, DynamicConv, GlobalQueries, Partition, Window
from farfield.parts import Inputs, LayerSpec, NearPart, OutputModule, Part

CAUSAL: dict[str, dict[str, Any]] = {
    "dense": {"near": Dense()},
    "window": {"near": Window(9)},
    "strided": {"near": Window(8, stride=4)},
    "dilated": {"near": Window(5, dilation=3)},
    "blocks": {"near": Blocks(8)},
    "conv": {"near": Conv(4)},
    "fma": {"near": Blocks(8), "far": Pyramid(rank=2)},
    "fma, cells": {"near": Blocks(8), "far": Pyramid(rank=2, summary="mean", rope="cells")},
    "fma, gate": {"near": Blocks(8), "far": Pyramid(rank=2), "merge": "gate"},
    "partition": {"near": Partition(8, shift=3, bias=True)},
    "linear": {"far": Linear()},
    "linear, centred": {"far": Linear("identity", normalise="subtract")},
    "window and pooled": {"near": Window(12), "far": Pooled(4, summary="learned")},
    "window and pooled in reach": {"near": Window(12), "far": Pooled(4, reach=2, rank=2, bias=True, count_bias=True)},
    "anchors": {"near": Anchors(5), "far": Pooled(8, count_bias=True)},
    "window and linear": {"near": Window(9), "far": Linear("relu"), "merge": Gate(per="channel")},
    "window and projection": {"near": Window(9, kv_norm=True), "far": Projection(2, chunk=8)},
    "conv and linear": {"near": Conv(2), "far": Linear("softmax"), "merge": "sum"},
    "fma, biased": {"near": Blocks(8), "far": Pyramid(rank=2), "position_bias": 3},
    "window, biased": {"near": Window(9), "far": Pooled(4), "position_bias": 4},
}
OPEN: dict[str, dict[str, Any]] = {
    "agents": {"near": Conv(3), "far": Landmarks(3), "merge": "sum"},
    "agents, joint": {"near": Window(5), "far": Landmarks(3)},
    "spread": {"near": Partition(3, spread=True, bias=True)},
    "widest": {"near": Window(3, dilation=None)},
    "global queries": {"near": GlobalQueries(4)},
    "dynamic conv": {"near": DynamicConv(3), "far": Linear("identity", normalise="subtract"), "merge": "sum"},
    "pooled": {"far": Pooled(4, rank=2)},
    "multigrid": {"near": Window(4, stride=4), "far": Multigrid(4, sampling="learned"), "merge": "sum"},
    "multigrid of means": {"near": Window(4, stride=4), "far": Multigrid(4, 3), "merge": "sum"},
    "spectrum": {"far": Spectrum(7)},
    "relay": {"near": Partition(8), "far": Relay(8, 2)},
    "channels": {"near": Window(3), "far": Channels(), "merge": "gate"},
    "projection": {"near": Dense(), "far": Projection(4)},
    "fma, pooled queries": {"near": Blocks(8), "far": Pyramid(rank=2, query_rank=2)},
}


def _layer(causal: bool, options: dict[str, Any], **more: Any) -> Attention:
    torch.manual_seed(0)
    rope = None if "position_bias" in options else 100.0
    layer = Attention(16, 4, num_kv_heads=2, causal=causal, rope=rope, **options, **more).double()
    for parameter in layer.parameters():
        # Zero and constant starts would hide a leak.
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("masked", [False, True])
def test_causal_by_perturbation_and_by_gradient(name: str, masked: bool) -> None:
    layer = _layer(True, CAUSAL[name])
    tokens = 77
    x = torch.randn(1, tokens, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, tokens) < 0.7 if masked else None
    y = layer(x, key_mask=mask)
    for cut in (1, 8, 33, 64, 76):
        changed = x.detach().clone()
        changed[:, cut:] = torch.randn_like(changed[:, cut:])
        assert torch.equal(layer(changed, key_mask=mask)[:, :cut], y[:, :cut])
    for row in (0, 7, 31, 76):
        (grad,) = torch.autograd.grad(y[:, row].square().sum(), x, retain_graph=True)
        assert not grad[:, row + 1 :].any()
        assert masked or grad[:, row].any()


@pytest.mark.parametrize("name", [*CAUSAL, *OPEN])
def test_packed_segments_are_sequences_of_their_own(name: str) -> None:
    causal = name in CAUSAL
    layer = _layer(causal, CAUSAL[name] if causal else OPEN[name])
    x = torch.randn(2, 60, 16, dtype=torch.float64)
    bounds = [0, 1, 22, 22, 60]
    packed = layer(x, cu_seqlens=torch.tensor(bounds), key_mask=torch.zeros(2, 60, dtype=torch.bool))
    alone = [layer(x[:, a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if b > a]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


@pytest.mark.parametrize("name", [*CAUSAL, *OPEN])
def test_hidden_tokens_change_nothing_elsewhere(name: str) -> None:
    causal = name in CAUSAL
    layer = _layer(causal, CAUSAL[name] if causal else OPEN[name])
    mask = torch.rand(2, 45) < 0.6
    if "fma, pooled" in name or "agents" in name:
        mask[:, 0] = True
    x = torch.randn(2, 45, 16, dtype=torch.float64)
    changed = torch.where(mask[..., None], x, torch.randn_like(x))
    same = torch.isclose(layer(x, key_mask=mask), layer(changed, key_mask=mask), atol=1e-12).all(-1)
    # Only a gate and the token's own query may look at a hidden token.
    assert same[mask].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*CAUSAL, *OPEN])
def test_hidden_tokens_may_hold_anything(name: str, bad: float) -> None:
    causal = name in CAUSAL
    layer = _layer(causal, CAUSAL[name] if causal else OPEN[name])
    mask = torch.rand(2, 45) < 0.6
    x = torch.randn(2, 45, 16, dtype=torch.float64)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.clone().requires_grad_()
        y = layer(x, key_mask=mask)[mask]
        of_x, *of_weights = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)
        return y, of_x[mask], *(g for g in of_weights if g is not None)

    for got, want in zip(run(torch.where(mask[..., None], x, bad)), run(x), strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", [*CAUSAL, *OPEN])
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_tiny_and_fully_hidden_inputs_stay_finite(name: str, tokens: int) -> None:
    causal = name in CAUSAL
    layer = _layer(causal, CAUSAL[name] if causal else OPEN[name])
    x = torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True)
    for mask in (None, torch.zeros(2, tokens, dtype=torch.bool)):
        y = layer(x, key_mask=mask)
        grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(g).all() for g in grads if g is not None)


def test_dense_is_attention_written_out() -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3, near=Dense(), qkv_bias=True, proj_bias=True).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, -1)

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.view(2, 9, 3, 4).transpose(1, 2)

    mixed = (heads(q) @ heads(k).mT / 2).softmax(-1) @ heads(v)
    want = layer.proj(mixed.transpose(1, 2).reshape(2, 9, 12))
    torch.testing.assert_close(layer(x), want)


def test_blocks_and_pyramid_are_one_operator_equal_to_two() -> None:
    fused = _layer(True, {"near": Blocks(8), "far": Pyramid(rank=2)})
    assert fused.near is None and fused.merge is None
    spec: LayerSpec = fused.spec
    near = Blocks(8).build(spec)
    far = Pyramid(rank=2).build(spec, Blocks(8)).double()
    assert fused.far is not None
    far.load_state_dict(fused.far.state_dict())
    x = torch.randn(1, 90, 16, dtype=torch.float64)
    inputs = fused._inputs(x, None, None, None)
    apart = resolve_merge("softmax").build(spec)(near(inputs), far(inputs), x)
    torch.testing.assert_close(apart, fused.far(inputs).out)


def test_images_and_volumes() -> None:
    for dims, grid in ((2, (6, 7)), (3, (3, 4, 5))):
        tokens = torch.Size(grid).numel()
        x = torch.randn(1, tokens, 16)
        for options in (
            {"near": Window(3)},
            {"near": Blocks(2), "far": Pyramid(rank=1)},
            {"near": Conv(3), "far": Landmarks(2), "merge": "sum"},
            {"near": Window(2), "far": Linear(), "merge": "gate"},
            {"near": Window(2), "far": Projection(3)},
            {"near": Partition(3, shift=1, bias=True), "far": Relay(3, 2)},
            {"near": GlobalQueries(2), "far": Pooled(2, reach=1, bias=True)},
            {"near": DynamicConv(3), "far": Spectrum(4), "merge": "sum"},
            {"near": Anchors(2), "far": Pooled((1, *(2,) * (dims - 1)), summary="learned", rank=2)},
            {"near": Window(2, dilation=None), "far": Multigrid(2), "merge": "gate"},
            {"near": Partition(2, spread=True), "far": Channels(), "merge": "sum"},
        ):
            layer = Attention(16, 2, dims=dims, **options)  # type: ignore[arg-type]
            assert layer(x, grid=grid).shape == x.shape
        with pytest.raises(ValueError, match="needs grid="):
            layer(x)
        with pytest.raises(ValueError, match=r"with product N = "):
            layer(x, grid=(2,) * dims)


def test_options_of_the_layer() -> None:
    layer = Attention(16, 2, head_dim=6, near=Dense(), qk_norm=True, dtype=torch.bfloat16, device="cpu", dropout=0.5)
    x = torch.randn(1, 5, 16, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert Attention(16, 2, near=Window(3), device="meta").qkv.weight.device.type == "meta"
    assert "Window(size=3" in repr(Attention(16, 2, near=Window(3)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("name", ["window", "fma", "fma, biased"])
def test_the_layer_compiles_into_one_graph_and_checkpoints(name: str) -> None:
    layer = _layer(True, CAUSAL[name])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (40, 57):
        x = torch.randn(1, tokens, 16, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(compiled(x), layer(x))
    want = torch.autograd.grad(layer(x).square().sum(), x)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), x), want)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_tiles_and_cells_compile_into_one_graph_for_one_grid() -> None:
    torch.manual_seed(0)
    layer = Attention(16, 2, dims=2, near=Partition(3, shift=1, bias=True), far=Pooled(2, reach=1, bias=True))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(1, 42, 16)
    torch.testing.assert_close(compiled(x, grid=(6, 7)), layer(x, grid=(6, 7)))


class _Twice(OutputModule):
    def forward(self, inputs: Inputs) -> AttentionState:
        raise AssertionError("nobody needs the log-sum-exp here")

    def output(self, inputs: Inputs) -> torch.Tensor:
        return 2 * inputs.v


class _TwicePart(NearPart):
    def build(self, spec: LayerSpec, near: Part | None = None) -> torch.nn.Module:
        return _Twice()


def test_a_part_alone_is_asked_for_its_output_alone() -> None:
    layer = Attention(16, 4, near=_TwicePart())
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(layer(x), layer.proj(2 * layer.qkv(x)[..., 32:]))
    with pytest.raises(NotImplementedError):
        OutputModule().output(layer._inputs(x, None, None, None))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "near=None and far=None: the layer would see nothing; near=Dense"),
    ({"near": Linear()}, TypeError, "Linear is a far field, pass it as far="),
    ({"far": Window(3)}, TypeError, "Window is a near field, pass it as near="),
    ({"near": "window"}, TypeError, "near must be a near field"),
    ({"far": 3}, TypeError, "far must be a far field"),
    ({"far": Landmarks(3), "causal": True}, ValueError, "not causal-safe: its agents are means of queries"),
    ({"far": Projection(3), "causal": True}, ValueError, "without chunk= its landmarks mix the whole sequence"),
    ({"near": Blocks(8), "far": Pyramid(2, query_rank=2), "causal": True}, ValueError, "query_rank pools queries"),
    ({"near": Window(3), "far": Linear()}, ValueError, r"merge='softmax' needs attention states.*merge='gate' or"),
    ({"near": Conv(3), "far": Landmarks(3)}, ValueError, "a convolution weighs by position"),
    ({"far": Pyramid(rank=2)}, ValueError, r"use near=Blocks\(...\)"),
    ({"near": Window(3), "far": Pyramid(rank=2)}, ValueError, r"use near=Blocks\(...\)"),
    (
        {"near": Blocks(8), "far": Pyramid(rank=2, sinks=4), "merge": "gate"},
        ValueError,
        "sinks are seen by the joint softmax; use merge='softmax' or sinks=0",
    ),
    ({"near": Blocks(8), "far": Pyramid(rank=3)}, ValueError, "rank=3 does not divide block=8"),
    ({"near": Window(3), "merge": "max"}, ValueError, "unknown merge 'max'"),
    ({"near": Window(3), "causal": True, "dims": 2}, ValueError, "only a sequence has an order"),
    ({"near": Window(3), "dims": 4}, ValueError, "dims must be 1, 2 or 3, got 4"),
    ({"near": Window(3), "dims": 2, "rope": 10.0}, ValueError, "the rotary embedding is 1-D"),
    ({"near": Window(3), "rope": -1.0}, ValueError, "base must be positive"),
    ({"near": Window(3), "rope": 10.0, "head_dim": 3}, ValueError, "head_dim=3 must be even"),
    ({"near": Window((3, 3))}, ValueError, r"\(3, 3\)"),
    ({"near": Window(3, stride=4)}, ValueError, "stride=4 exceeds window=3"),
    ({"near": Conv(2)}, ValueError, "kernel=2 has no middle"),
    ({"near": Window(3), "far": Projection(2, chunk=4), "dims": 2}, ValueError, "works in 1-D; dims=2 was asked for"),
    ({"near": Window(3), "num_kv_heads": 3}, ValueError, "num_kv_heads=3 must divide num_heads=4"),
    ({"near": Window(3), "num_heads": 5}, ValueError, "dim=16 does not divide among num_heads=5"),
    ({"near": Window(3), "dim": 0}, ValueError, "dim must be a positive integer, got 0"),
    ({"near": Window(3), "dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
    ({"far": Linear(), "dropout": 0.1}, ValueError, "has no attention dropout"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_senseless_layers_are_refused_with_the_reason(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Attention(**({"dim": 16, "num_heads": 4} | options))


def test_bad_inputs_are_refused_with_the_reason() -> None:
    layer = Attention(16, 4, near=Window(3))
    x = torch.randn(2, 10, 16)
    with pytest.raises(ValueError, match=r"x must be \[B, N, 16\]"):
        layer(x[..., :8])
    with pytest.raises(ValueError, match="holds no tokens"):
        layer(x[:, :0])
    with pytest.raises(ValueError, match=r"bool tensor \[B, N\] = \(2, 10\)"):
        layer(x, key_mask=torch.full((2, 10), float("nan")))
    with pytest.raises(ValueError, match=r"rise from 0 to N = 10, got \[0, 11\]"):
        layer(x, cu_seqlens=torch.tensor([0, 11]))
    with pytest.raises(ValueError, match="int32 or int64"):
        layer(x, cu_seqlens=torch.tensor([0.0, 10.0]))
    with pytest.raises(ValueError, match="packs 1-D sequences"):
        Attention(16, 4, near=Window(3), dims=2)(x, grid=(2, 5), cu_seqlens=torch.tensor([0, 10]))


@pytest.mark.parametrize("recipe", ["fma", "window", "dense", "swin"])
def test_a_state_has_the_output_and_meets_further_keys(recipe: str) -> None:
    """With the log-sum-exp, a softmax over more keys is that of both states together."""
    layer = recipes.build(recipe, 16, 2)
    inputs = layer._inputs(torch.randn(2, 200, 16), None, None, None)
    state = layer.state(inputs)
    torch.testing.assert_close(state.out, layer.attend(inputs), rtol=1e-4, atol=1e-5)
    more = torch.zeros_like(inputs.k[:, :, :3])
    seen = attend_dense(inputs.q, more, torch.ones_like(more), scale=inputs.scale)
    share = 3 / (3 + state.lse.exp())
    both = merge_states(state, seen).out
    torch.testing.assert_close(both, (1 - share)[..., None] * state.out + share[..., None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("recipe", "why"), [("agent", "a convolution"), ("mano", "every level has a softmax")])
def test_a_state_is_refused_where_there_is_none(recipe: str, why: str) -> None:
    layer = recipes.build(recipe, 16, 2)
    with pytest.raises(ValueError, match=why):
        layer.state(layer._inputs(torch.randn(1, 20, 16), None, None, None))
