"""The table of recipes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from farfield import recipes
from farfield.attention import Attention
from farfield.far import Linear, Pyramid
from farfield.near import Blocks, Window

NAMES = recipes.names()


def test_the_recipes_and_their_proofs() -> None:
    assert {"dense", "window", "fma", "blocks", "transformer_ls", "agent", "l2vit"} <= set(recipes.names())
    root = Path(__file__).parents[2]
    for name in recipes.names():
        recipe = recipes.get(name)
        assert recipe.name == name and "arXiv" in recipe.citation
        path, test = recipe.proof.split("::")
        assert f"def {test}(" in (root / path).read_text(), f"the proof of {name} is missing"
        assert recipe.status == "tested"


def test_the_table_in_the_docs_says_what_the_recipes_say() -> None:
    text = (Path(__file__).parents[2] / "docs" / "layer.md").read_text()
    _, _, table = text.partition("| recipe | even layers | odd layers | where this differs")
    lines = table.partition("\n\n")[0].splitlines()[2:]
    rows = [re.fullmatch(r"\| `(\w+)` \| ([^|]+) \| ([^|]+) \|(?: (.+))? \|", line) for line in lines]
    assert [row and row[1] for row in rows] == NAMES
    for row in rows:
        assert row is not None
        assert (row[4] or "") == recipes.get(row[1]).departures, f"docs/layer.md departs from recipe {row[1]!r}"
        dims = recipes.get(row[1]).dims[-1]
        even, odd = (recipes.build(row[1], 16, 4, dims=dims, layer=layer) for layer in range(2))
        alike = (even.near_spec, even.far_spec) == (odd.near_spec, odd.far_spec)
        assert (row[3] == "the same") == alike, f"docs/layer.md: odd layers of {row[1]!r}"


def test_only_exact_attention_departs_from_nothing() -> None:
    assert [name for name in NAMES if not recipes.get(name).departures] == ["dense"]


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("layer", [0, 1])
def test_every_recipe_builds_and_learns(name: str, layer: int) -> None:
    recipe = recipes.get(name)
    grid = {1: (70,), 2: (7, 10), 3: (2, 5, 7)}[recipe.dims[0]]
    rope = 100.0 if len(grid) == 1 else None
    for causal in {False, recipe.causal}:
        attention = recipes.build(name, 16, 4, causal=causal, layer=layer, rope=rope, num_kv_heads=2)
        assert isinstance(attention, Attention)
        x = torch.randn(1, 70, 16)
        attention(x, grid=grid).square().mean().backward()
        assert all(p.grad is not None for p in attention.parameters())


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_works_on_images_and_volumes(name: str) -> None:
    small = {"block": 4, "rank": 2}
    options = {key: value for key, value in small.items() if key in recipes.options(name)}
    for dims, grid in ((2, (9, 10)), (3, (5, 4, 6))):
        if dims not in recipes.get(name).dims:
            continue
        attention = recipes.build(name, 16, 4, dims=dims, **options)
        x = torch.randn(1, torch.Size(grid).numel(), 16)
        assert attention(x, grid=grid).shape == x.shape


def test_unknown_names_and_options_are_refused_with_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'windw'; did you mean 'window'\?.*dense, window, fma"):
        recipes.get("windw")
    with pytest.raises(ValueError, match=r"unknown recipe 'xyzzy'\..*dense, window, fma"):
        recipes.get("xyzzy")
    with pytest.raises(TypeError, match=r"'window' has no option rank=8; its options: block=64, size=None"):
        recipes.build("window", 16, 4, rank=8)
    with pytest.raises(TypeError, match=r"'dense' has no option block=64; its options: none"):
        recipes.build("dense", 16, 4, block=64)
    with pytest.raises(ValueError, match="'agent' cannot be causal"):
        recipes.build("agent", 16, 4, causal=True)
    with pytest.raises(ValueError, match="dims=4 was asked for"):
        recipes.build("dense", 16, 4, dims=4)


def test_options_and_their_defaults() -> None:
    assert recipes.options("dense") == {}
    assert recipes.options("window") == {"block": 64, "size": None, "stride": 1, "dilation": 1}
    for dims, block, rank in ((1, 64, 8), (2, 8, 2), (3, 4, 1)):
        options = recipes.options("fma", dims)
        assert options["block"] == block and options["rank"] == rank
        assert all("block" not in recipes.options(n, dims) or recipes.options(n, dims)["block"] == block for n in NAMES)


@pytest.mark.parametrize("name", ["fma", "blocks", "window", "transformer_ls"])
def test_the_defaults_are_not_dense_on_images_and_volumes(name: str) -> None:
    for dims, grid in ((2, (48, 48)), (3, (16, 16, 16))):
        near = recipes.build(name, 16, 4, dims=dims).near_spec
        side = near.block * 3 if isinstance(near, Blocks) else near.size
        assert side < min(grid), f"{near} sees all of {grid}"
    assert recipes.build("fma", 16, 4, dims=2).near_spec == Blocks(8)
    assert recipes.build("fma", 16, 4, dims=3).far_spec == Pyramid(1)
    assert recipes.build("blocks", 16, 4, dims=2, block=(4, 6)).near_spec == Blocks((4, 6))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_the_layer_are_passed_on(name: str) -> None:
    layer = recipes.build(name, 16, 4, num_kv_heads=2, device="meta", dtype=torch.bfloat16, qk_norm=True, layer=1)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.q_norm is not None and layer.spec.num_kv_heads == 2
    assert not set(recipes.options(name)) & set(inspect.signature(Attention).parameters)
    for argument in ("near", "far", "merge", "bias_of_nothing"):
        with pytest.raises(TypeError, match=f"has no option {argument}="):
            recipes.build(name, 16, 4, **{argument: None})


def test_the_default_window_reads_as_many_keys_as_the_near_field_of_fma() -> None:
    assert recipes.build("window", 16, 4, causal=True).near_spec == Window(96)
    assert recipes.build("window", 16, 4).near_spec == Window(192)


def test_l2vit_alternates() -> None:
    assert recipes.build("l2vit", 16, 4, layer=2).near_spec == Window(7, stride=7)
    assert recipes.build("l2vit", 16, 4, layer=3).far_spec == Linear("relu", floor=100.0, temperature=True)
