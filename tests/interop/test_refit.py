"""Output projections fitted anew, the parts of a model that they are found by, and the divergence that judges them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")

from farfield.interop.transformers import configure, register  # noqa: E402 (needs what was checked above)
from farfield.interop.transformers.divergence import Yardstick, divergence, final_states, head_of  # noqa: E402
from farfield.interop.transformers.refit import Moments, refit  # noqa: E402
from farfield.interop.transformers.structure import (  # noqa: E402
    adds_to_state,
    blocks,
    check_pair,
    entered,
    first_output,
    output_projection,
)
from support.tiny_models import make, tokens  # noqa: E402

register()


def dense(kind: str = "Llama", **changes: Any) -> Any:
    model = make(kind, **changes)
    model.set_attn_implementation("eager" if kind == "Gemma2" else "sdpa")
    return model


def coarse(kind: str = "Llama", **changes: Any) -> Any:
    """The same weights; every query sees two blocks of 8 and averages of 8 tokens."""
    return configure(make(kind, **changes), "fma", block=8, rank=1, sinks=2)


# Structure


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3Text"])
def test_layers_one_by_one_give_the_model(kind: str) -> None:
    """With what each is called with (Gemma 3: other rotations and windows by layer)."""
    model, ids = dense(kind), tokens(40)
    (state,), (calls,) = entered(model, [ids])
    for block, (args, kwargs) in zip(blocks(model), calls, strict=True):
        state = first_output(block.layer(state, *args, **kwargs))
    torch.testing.assert_close(model.base_model.norm(state), model.base_model(ids[None]).last_hidden_state)
    assert [block.name for block in blocks(model)] == ["model.layers.0", "model.layers.1"]


def test_where_attention_reaches_the_state_as_it_is() -> None:
    assert adds_to_state(dense("Llama"))
    assert adds_to_state(coarse("Llama"))
    assert not adds_to_state(dense("Gemma3Text"))


def test_models_of_another_build_are_refused() -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 300}
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with pytest.raises(ValueError, match=r"transformer.h.0: the output projection c_proj is a Conv1D"):
        output_projection(blocks(other)[0])
    with pytest.raises(ValueError, match="no layer that uses"):
        blocks(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"original has 3 layers of width 32, 50 tokens.*model 2 layers"):
        check_pair(dense(num_hidden_layers=3), dense())


# Divergence


@pytest.mark.parametrize("rows", [7, 100])
def test_pieces_are_the_whole_divergence(rows: int) -> None:
    """Value and gradient, in float64, against both logits at once."""
    states, targets = torch.randn(2, 23, 6, dtype=torch.float64)
    heads = [torch.nn.Linear(6, 40).double().requires_grad_(False) for _ in range(2)]
    states.requires_grad_()
    got = divergence(states, targets, *heads, rows)
    whole = heads[0](states).log_softmax(-1)
    expected = F.kl_div(whole, heads[1](targets).log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * got, states), torch.autograd.grad(3 * expected, states))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_beyond_the_range_of_half_precision(dtype: torch.dtype) -> None:
    states, targets = torch.zeros(2, 4001, 2, dtype=dtype)
    states[:, 0], targets[:, 1] = 20.0, 20.0  # each is sure of another token: 20 nats per row
    states.requires_grad_()
    got = divergence(states, targets, torch.clone, torch.clone)
    assert got.item() == pytest.approx(20 * 4001, rel=1e-5)
    (grad,) = torch.autograd.grad(got, states)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, torch.tensor([1.0, -1.0], dtype=dtype).expand(4001, 2))


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Gemma3Text"])
def test_the_yardstick_measures_logits(kind: str) -> None:
    """Gemma's final soft-capping included; 0 for the original itself."""
    original, model, windows = dense(kind), coarse(kind), [tokens(80), tokens(60)]
    rule = Yardstick(original, windows)
    assert rule.measure(original) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        pairs = [(original(ids[None]).logits[0], model(ids[None]).logits[0]) for ids in windows]
    expected = sum(float((a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()) for a, b in pairs)
    assert rule.measure(model) == pytest.approx(expected / 140, rel=1e-4)
    assert expected > 0


def test_logits_made_in_another_way_are_refused() -> None:
    model = dense()
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + 1.0
        return out

    model.forward = shifted
    with pytest.raises(ValueError, match="LlamaForCausalLM makes its logits in a way that is not known"):
        head_of(model)


# Least squares


@pytest.mark.parametrize("bias", [True, False])
def test_fits_are_weighted_ridge_regression(bias: bool) -> None:
    """Against least squares with rows for the ridge, the bias free; the error as by hand."""
    a, e, w = torch.randn(50, 5) + 1.0, torch.randn(50, 3) + 2.0, torch.rand(50)
    moments = Moments(5, 3)
    moments.add(a[:20], e[:20], w[:20])
    moments.add(a[20:], e[20:], w[20:])
    a, e, root = a.double(), e.double(), w.double().sqrt()[:, None]
    for ridge, got in zip((1e-9, 0.3), moments.fits((1e-9, 0.3), bias), strict=True):
        columns = torch.cat([a, torch.ones(50, 1) if bias else torch.zeros(50, 1)], 1) * root
        gram = (a * root).mT @ (a * root)
        if bias:  # the scale of the ridge is that of inputs about their mean
            mean = (a * root**2).sum(0) / (root**2).sum()
            gram = ((a - mean) * root).mT @ ((a - mean) * root)
        lam = ridge * gram.diagonal().mean()
        shrink = torch.cat([lam.sqrt() * torch.eye(5, dtype=torch.float64), torch.zeros(5, 1)], 1)
        rows = torch.cat([columns, shrink]), torch.cat([e * root, torch.zeros(5, 3)])
        expected = torch.linalg.lstsq(*rows, driver="gelsd").solution
        torch.testing.assert_close(got, expected)
        left = (root * e - columns @ expected).square().sum().item() / 50
        assert moments.error(got) == pytest.approx(left)
    assert moments.error() == pytest.approx((root * e).square().sum().item() / 50)


# Whole models


@pytest.mark.parametrize(
    ("kind", "target", "options"),
    [
        ("Llama", "state", {}),
        ("Llama", "state", {"attention_bias": True}),
        ("Llama", "output", {}),
        ("Gemma3Text", "output", {}),
    ],
)
def test_a_planted_change_is_undone(kind: str, target: str, options: dict[str, Any]) -> None:
    """Projections and biases changed at random come back, in every layer."""
    original, model = dense(kind, **options), dense(kind, **options)
    with torch.no_grad():
        for block in blocks(model):
            projection = output_projection(block)
            for parameter in projection.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) * (parameter.std() + 0.1))
    windows = [tokens(300), tokens(260)]
    steps: list[tuple[int, int]] = []
    told = refit(model, original, windows, target=target, progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    for layer in told:
        assert layer.ridge is not None
        assert layer.after < 1e-8 < 1e-4 < layer.before
    for got, expected in zip(blocks(model), blocks(original), strict=True):
        for a, b in zip(output_projection(got).parameters(), output_projection(expected).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def held_out_error(model: Any, original: Any, ids: Tensor, layer: int) -> float:
    """Of states after the attention of one layer, relative, by hooks in whole runs of both models."""
    states: list[Tensor] = []
    for each in (model, original):
        kept: list[Tensor] = []
        norm = each.model.layers[layer].post_attention_layernorm
        handle = norm.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0]))
        with torch.no_grad():
            each(ids[None])
        handle.remove()
        states += kept
    held = torch.arange(len(ids)) // 64 % 4 == 3
    ours, theirs = states[0][held], states[1][held]
    return float(((ours - theirs).square().sum(1) / theirs.square().sum(1)).mean())


def test_a_coarse_model_comes_nearer() -> None:
    """The errors told are those of whole runs, they never rise, and nothing but projections changes."""
    original, model, ids = dense(), coarse(), tokens(512)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first = held_out_error(model, original, ids, 0)
    told = refit(model, original, [ids])
    assert told[0].before == pytest.approx(first, rel=1e-3)
    for number, layer in enumerate(told):
        assert layer.after <= layer.before
        assert layer.after == pytest.approx(held_out_error(model, original, ids, number), rel=1e-3)
    assert any(layer.ridge is not None for layer in told)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}
    assert changed


def test_what_does_not_help_is_not_kept() -> None:
    """A ridge of almost nothing on fewer tokens than unknowns; and a model without error."""
    original, model = dense(hidden_size=256, head_dim=64), coarse(hidden_size=256, head_dim=64)
    weights = [output_projection(block).weight.clone() for block in blocks(model)]
    told = refit(model, original, [tokens(256)], ridges=(1e-9,))
    assert [layer.ridge for layer in told] == [None, None]
    assert all(layer.after == layer.before > 0 for layer in told)
    assert all(torch.equal(output_projection(b).weight, w) for b, w in zip(blocks(model), weights, strict=True))
    same = refit(dense(), dense(), [tokens(256)])
    assert [tuple(layer) for layer in same] == [(0.0, 0.0, None)] * 2


def test_it_stops_between_layers() -> None:
    original, model = dense(), coarse()
    last = output_projection(blocks(model)[1]).weight.clone()
    asked = iter([False, True])
    assert len(refit(model, original, [tokens(300)], should_stop=lambda: next(asked))) == 1
    assert torch.equal(output_projection(blocks(model)[1]).weight, last)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"windows of \[100\] tokens: .* 256 tokens in each"):
        refit(coarse(), dense(), [tokens(300), tokens(100)])
    with pytest.raises(ValueError, match="at least one window"):
        refit(coarse(), dense(), [])
    with pytest.raises(ValueError, match="target='logits': one of 'state', 'output'"):
        refit(coarse(), dense(), [tokens(300)], target="logits")
    with pytest.raises(ValueError, match=r"Gemma3ForCausalLM.*target='output' would be accepted"):
        refit(coarse("Gemma3Text"), dense("Gemma3Text"), [tokens(300)])
    broken = coarse()
    with torch.no_grad():
        broken.model.layers[0].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="layer 0: hidden states that are not finite"):
        refit(broken, dense(), [tokens(300)])


def test_final_states_make_the_logits() -> None:
    model, ids = dense(), tokens(20)
    torch.testing.assert_close(head_of(model)(final_states(model, ids)), model(ids[None]).logits[0])
