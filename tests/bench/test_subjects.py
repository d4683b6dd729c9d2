from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import farfield as ff
from farfield import recipes
from farfield.bench.case import Case, Inputs
from farfield.bench.subjects import names, recipe, split_label


def test_entries_have_options() -> None:
    assert split_label("fma") == ("fma", [])
    assert split_label(" fma:block=32,impl=torch ") == ("fma", ["block=32", "impl=torch"])
    assert split_label("fma:block=[8,4],rank=[2,2]") == ("fma", ["block=[8,4]", "rank=[2,2]"])
    with pytest.raises(ValueError, match="separated by commas, as in fma:open=16,page=4"):
        split_label("fma:open=16:page=4")
    with pytest.raises(ValueError, match="names no attention"):
        split_label(":block=3")


def test_a_core_is_the_layer_between_its_projections() -> None:
    """With identity projections the layer itself gives the same."""
    case = Case((70,), causal=True, heads=2, head_dim=8)
    inputs = Inputs.of(case)
    built = recipe("window", {"size": 9}, "window").make(case)
    layer = recipes.build("window", case.width, case.heads, causal=True, size=9)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.eye(case.width).repeat(3, 1))
        layer.proj.weight.copy_(torch.eye(case.width))
        x = inputs.x
        q = inputs.q
        expected = layer(x).unflatten(2, (2, 8)).transpose(1, 2)
        torch.testing.assert_close(built.run(q, q, q), expected)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_runs_at_its_core(name: str) -> None:
    for case in (
        Case((40,), causal=True, heads=2, head_dim=8),
        Case((6, 7), heads=2, head_dim=8),
        Case((2, 3, 7), heads=2, head_dim=8),
    ):
        if case.dims not in recipes.get(name).dims:
            with pytest.raises(ValueError, match=f"works in .*; dims={case.dims} was asked for"):
                recipe(name, {}, name).make(case)
            continue
        if case.causal and not recipes.get(name).causal:
            with pytest.raises(ValueError, match="cannot be causal"):
                recipe(name, {}, name).make(case)
            continue
        inputs = Inputs.of(case)
        subject = recipe(name, {}, name)
        out = subject.make(case).run(inputs.q, inputs.k, inputs.v)
        assert out.shape == inputs.q.shape and out.isfinite().all()
        assert subject.work(case) is not None


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", ["fma", "blocks", "window", "fma2d", "na", "dina", "gna"])
def test_named_engines_agree_with_the_layer(name: str, impl: str) -> None:
    case = Case((12, 13) if name == "fma2d" else (150,), causal=name != "fma2d", heads=2, head_dim=8)
    inputs = Inputs.of(case)
    options: dict[str, int] = {"layer": 1} if name in ("na", "dina", "gna") else {"block": 2 if name == "fma2d" else 8}
    one = recipe(name, options, name).make(case)
    other = recipe(name, {**options, "impl": impl}, name).make(case)
    assert other.engine == impl
    out = [built.run(inputs.q, inputs.k, inputs.v) for built in (one, other)]
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-5)


def test_fma_has_no_level_bias_unless_it_is_given() -> None:
    case = Case((200,), causal=True, heads=2, head_dim=8)
    inputs = Inputs.of(case)
    q, k, v = inputs.q, inputs.k, inputs.v
    out = recipe("fma", {"block": 8, "rank": 2, "summary": "mean"}, "fma").make(case).run(q, k, v)
    plain = ff.multipole_attention(q, k, v, causal=True, block=8, rank=2)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    quiet = recipe("fma", {"block": 8, "rank": 2, "bias": -8.0}, "fma").make(case).run(q, k, v)
    assert not torch.allclose(out, quiet, atol=1e-3)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not torch.allclose(out, dense, atol=1e-3)


def test_what_is_wrong_with_an_entry_is_said() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'fm'"):
        recipe("fm", {}, "fm")
    with pytest.raises(ValueError, match=r"recipe 'fma' has no option 'blck'; its options: block, .*impl, layer"):
        recipe("fma", {"blck": 3}, "fma:blck=3")
    with pytest.raises(ValueError, match="impl='fast' is not an engine of 'fma'; its engines: reference, torch"):
        recipe("fma", {"impl": "fast"}, "fma:impl=fast")
    with pytest.raises(ValueError, match="its operator has one engine only"):
        recipe("dense", {"impl": "torch"}, "dense:impl=torch")
    subjects = [recipe("fma", {}, "fma"), recipe("fma", {}, "fma")]
    with pytest.raises(ValueError, match="fma is named twice"):
        names(subjects)
