from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from farfield import recipes
from farfield.models.language import LanguageConfig, LanguageModel
from farfield.streaming import StackState


def small(attention: str = "dense", **changes: object) -> LanguageConfig:
    settings = {"dim": 32, "depth": 2, "num_heads": 2, "context": 128, **changes}
    return LanguageConfig(attention, **settings)  # type: ignore[arg-type]


CAUSAL = [name for name in recipes.names() if recipes.get(name).causal]


@pytest.mark.parametrize("attention", CAUSAL)
@pytest.mark.parametrize("length", [1, 7, 300])
def test_every_causal_recipe_gives_a_working_model(attention: str, length: int) -> None:
    model = LanguageModel(small(attention))
    tokens = torch.randint(0, 256, (2, length + 1), generator=torch.Generator().manual_seed(0))
    logits = model(tokens[:, :-1])
    assert logits.shape == (2, length, 256)
    loss = model.loss(tokens)
    # A fresh model knows nothing: every byte is about equally likely.
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("attention", CAUSAL)
def test_no_prediction_sees_a_later_byte(attention: str) -> None:
    model = LanguageModel(small(attention)).double().eval()
    tokens = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 200:] = (changed[:, 200:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :200], after[:, :200], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 200:], after[:, 200:])


def test_loss_is_the_mean_over_shifted_targets() -> None:
    model = LanguageModel(small())
    tokens = torch.randint(0, 256, (3, 20))
    log_p = model(tokens[:, :-1]).log_softmax(-1)
    expected = -log_p.gather(-1, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(model.loss(tokens), expected)


def test_the_seed_decides_the_parameters_and_the_global_state_stays() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = LanguageModel(small(), seed=1), LanguageModel(small(), seed=1), LanguageModel(small(), seed=2)
    assert torch.equal(before, torch.get_rng_state())
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c) or bool((a == a.flatten()[0]).all()), name


@pytest.mark.parametrize("attention", [name for name in CAUSAL if name != "dense"])
def test_all_but_the_attention_begins_the_same(attention: str) -> None:
    dense = dict(LanguageModel(small()).named_parameters())
    for name, parameter in LanguageModel(small(attention)).named_parameters():
        if ".attention." not in name:
            assert torch.equal(parameter, dense[name]), name


def test_config_survives_json() -> None:
    config = small(options={}, rope=None)
    assert LanguageConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    grid = small(attention="fma", options={"block": 8, "rank": 2, "summary": "learned", "grid": (64,)})
    read = LanguageConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(grid))))
    assert read == grid
    assert read.options["grid"] == (64,)
    LanguageModel(read)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"depth": 1.5}, "depth must be an integer"),
        ({"num_heads": 3}, "num_heads must divide dim, got num_heads 3 and dim 32"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive"),
    ],
)
def test_bad_sizes_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_unknown_settings_and_recipes_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown model settings \['width'\]"):
        LanguageConfig.from_dict({"attention": "dense", "width": 3})
    with pytest.raises(ValueError, match="lack 'attention'"):
        LanguageConfig.from_dict({"dim": 3})
    with pytest.raises(ValueError, match="no_such"):
        LanguageModel(small("no_such"))
    with pytest.raises(TypeError, match="no_such"):
        LanguageModel(small(options={"no_such": 1}))


@pytest.mark.parametrize("shape", [(4,), (1, 0), (1, 2, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, N\]"):
        LanguageModel(small())(torch.zeros(shape, dtype=torch.int64))


def test_bidirectional_recipes_are_refused() -> None:
    others = [name for name in recipes.names() if not recipes.get(name).causal]
    for name in others:
        with pytest.raises(ValueError, match="needs causal attention"):
            LanguageModel(small(name))


@pytest.mark.parametrize("attention", [n for n in recipes.names() if recipes.get(n).causal and n != "l2vit"])
def test_a_step_equals_the_whole_text(attention: str) -> None:
    known = recipes.options(attention)
    options = {name: value for name, value in (("block", 8), ("rank", 2), ("bias", -1.0)) if name in known}
    model = LanguageModel(LanguageConfig(attention, options, dim=16, depth=2, num_heads=2)).double().eval()
    tokens = torch.randint(0, 256, (2, 60))
    with torch.no_grad():
        want = model(tokens)
    state = model.stream(2, rewind=2)
    rows = [model.step(tokens[:, :33], state)] + [model.step(tokens[:, i : i + 1], state) for i in range(33, 50)]
    torch.testing.assert_close(torch.cat(rows, 1), want[:, :50])
    model.step(torch.zeros(2, 2, dtype=torch.long), state)
    state.rewind(2)
    swapped = state.reorder([1, 0])
    torch.testing.assert_close(model.step(tokens[[1, 0], 50:], swapped), want[[1, 0], 50:])
    assert swapped.lengths == [60, 60] and state.lengths == [50, 50] and state.nbytes > 0


def test_prompts_of_different_lengths_are_padded_on_either_side() -> None:
    model = LanguageModel(LanguageConfig("fma", {"block": 4, "rank": 2}, dim=16, depth=2, num_heads=2)).double().eval()
    tokens = torch.randint(0, 256, (2, 30))
    present = torch.ones(2, 30, dtype=torch.bool)
    present[0, :13] = False
    present[1, 21:] = False
    state = model.stream(2)
    logits = model.step(tokens, state, present=present)
    assert state.lengths == [17, 21]
    with torch.no_grad():
        torch.testing.assert_close(logits[0, 13:], model(tokens[:1, 13:])[0])
        torch.testing.assert_close(logits[1, :21], model(tokens[1:, :21])[0])


def test_states_of_a_model_are_saved_and_checked(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = LanguageModel(LanguageConfig("window", {"size": 4}, dim=16, depth=2, num_heads=2)).eval()
    state = model.stream()
    model.step(torch.zeros(1, 9, dtype=torch.long), state)
    state.save(tmp_path / "state.safetensors")
    loaded = StackState.load(tmp_path / "state.safetensors")
    token = torch.ones(1, 1, dtype=torch.long)
    assert torch.equal(model.step(token, loaded), model.step(token, state))
    with pytest.raises(ValueError, match="the state has 1 layers, the model 2"):
        model.step(token, StackState(state.layers[:1]))
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, T\]"):
        model.step(token[0], state)
