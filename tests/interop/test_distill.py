"""Training against the original: what is trained, that it helps, that it stops, goes on and loads; and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")
pytest.importorskip("peft", reason="peft is not installed (extra 'distill')")

from farfield.interop.transformers import configure, load, register  # noqa: E402 (needs what was checked above)
from farfield.interop.transformers.distill import Distillation, Windows, save  # noqa: E402
from farfield.interop.transformers.lora import Adapters, projections  # noqa: E402
from farfield.interop.transformers.tuning import TuneConfig, Tuner, farfield_parameters  # noqa: E402
from support.tiny_models import make, tokens  # noqa: E402

register()


def dense(**changes: Any) -> Any:
    model = make("Llama", **changes)
    model.set_attn_implementation("sdpa")
    return model


def coarse(**options: Any) -> Any:
    """The same weights; every query sees two blocks of 8 and averages of 8 tokens."""
    return configure(make("Llama"), "fma", **{"block": 8, "rank": 1, "sinks": 2, **options})


def opening() -> Any:
    """The same weights with settings by head: cells opened, or none."""
    groups = [{"heads": [0, 2], "rank": 2, "levels": 1, "open": 3, "share": 2, "rest": "drop", "choose": "bounds"}]
    return configure(make("Llama"), "converted", block=8, sinks=2, layers=[groups, "dense"])


def spans(number: int, length: int = 200, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 50, (length,), generator=generator) for _ in range(number)]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def windows(length: int = 256, refit: int = 1) -> Windows:
    return Windows(spans(refit, length, 1), spans(3, length, 2), spans(1, length, 3))


# Low-rank changes


def test_merged_is_what_was_trained() -> None:
    """The adapters' logits are those of the merged weights; nothing else is left behind."""
    model, ids = coarse(), tokens(1, 100)
    names = set(weights(model))
    before = model(ids).logits
    adapters = Adapters(model, 3, seed=0)
    assert len(adapters.parameters()) == 2 * len(projections(dense()))
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        for name, p in adapters.parameters().items():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn_like(p))
    changed = model(ids).logits
    assert not torch.allclose(changed, before, atol=1e-2)
    adapters.merge()
    torch.testing.assert_close(model(ids).logits, changed, rtol=1e-4, atol=1e-4)
    assert set(weights(model)) == names
    assert not hasattr(model, "peft_config")


def test_projections_are_those_of_attention() -> None:
    expected = {f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"}
    assert set(projections(dense())) == expected
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 300}
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*lora=0 would be accepted"):
        projections(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))


# Training


@pytest.mark.parametrize("make_model", [coarse, opening])
def test_recomputed_layers_give_the_same_training(make_model: Any) -> None:
    """And the loss is what it says: by hand, from whole runs of both models."""
    original, ids = dense(), spans(1)
    histories = []
    for recompute in (True, False):
        tuner = Tuner(make_model(), original, ids, TuneConfig(steps=3, lora=2, recompute=recompute))
        tuner.run()
        histories.append(tuner.history)
    torch.testing.assert_close(*map(torch.tensor, histories))
    with torch.no_grad():
        ours, theirs = (each(ids[0][None], output_hidden_states=True) for each in (make_model(), original))
    a, b = (out.logits[0].log_softmax(-1) for out in (theirs, ours))
    assert histories[0][0].divergence == pytest.approx(float((a.exp() * (a - b)).sum() / 200), rel=1e-4)
    # The first layer's output: what Transformers calls hidden state 1; the last one is normed, and left out here.
    error = (ours.hidden_states[1] - theirs.hidden_states[1]).square().sum(-1)
    first = float((error / theirs.hidden_states[1].square().sum(-1)).mean())
    assert histories[0][0].layers > first / 2 > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kept_targets_give_the_same_training(precision: str) -> None:
    """And the original is asked once for each window, and nothing is kept when it is done."""
    original, ids, asked = dense(), spans(2), 0

    def count(*_: object) -> None:
        nonlocal asked
        asked += 1

    handle = original.model.register_forward_hook(count)
    histories, numbers = [], []
    for keep in (False, True):
        tuner = Tuner(coarse(), original, ids, TuneConfig(6, lora=2, keep_targets=keep, precision=precision))
        asked = 0
        tuner.run()
        histories.append(tuner.history)
        numbers.append(asked)
        assert bool(tuner._targets) == keep
        tuner.finish(keep=True)
        assert not tuner._targets
    handle.remove()
    assert numbers == [6, 2]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("layer_weight", [0.0, 1.0])
def test_bfloat16_training_is_training(layer_weight: float) -> None:
    """Its losses are near those of float32, and what it leaves behind is float32."""
    original, histories = dense(), []
    for precision in ("float32", "bfloat16"):
        model = coarse()
        config = TuneConfig(steps=4, lora=2, precision=precision, keep_targets=True, layer_weight=layer_weight)
        tuner = Tuner(model, original, spans(2), config)
        tuner.run()
        histories.append(tuner.history)
        tuner.finish(keep=True)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact, low = torch.tensor(histories)
    # Both are squares of what is apart. bfloat16 keeps 8 bits, so what is apart moves by 2 ** -8 of the states
    # beside it; they are a few times as large, which a tenth leaves room for.
    torch.testing.assert_close(low, exact, rtol=0.1, atol=2**-12)
    assert not torch.equal(low, exact)


def test_training_brings_a_coarse_model_nearer(tmp_path: Path) -> None:
    """On windows that it has not seen; and what is written loads plainly, without far-field parameters."""
    original, model = dense(), coarse()
    text = Windows([], spans(4), spans(2, seed=9))
    told: list[tuple[str, float, str]] = []
    work = Distillation(model, original, text, TuneConfig(steps=25, lora=4, lr=1e-2))
    report = work.run(lambda *step: told.append(step))
    apart = report["divergence"]
    assert apart["after"] < 0.98 * apart["before"]
    assert report["training"]["kept"] and not report["training"]["stopped"]
    assert report["training"]["steps"] == 25 == len(report["training"]["losses"])
    assert report["tokens"] == 25 * 200
    assert report["training"]["trained_numbers"] == 2 * 4 * (3 * 64 + 2 * 16)
    assert report["refit"] is None
    assert told[-1][:2] == ("training", 1.0)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    save(model, None, report, tmp_path / "out", tmp_path, original="tiny")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="farfield")
    ids = tokens(1, 150)
    assert torch.equal(again(ids).logits, model(ids).logits)
    entry = json.loads((tmp_path / "out" / "conversion.json").read_text())["distillation"]
    assert entry["original"] == "tiny"
    assert entry["divergence"] == apart


def test_reports_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "conversion.json").write_text(json.dumps({"keys": 0.1, "distillation": {"seconds": 1}}))
    save(dense(), None, {"seconds": 2}, tmp_path / "out", tmp_path, seed=3)
    told = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert told == {"keys": 0.1, "distillation": {"seed": 3, "seconds": 2, "earlier": {"seconds": 1}}}


def test_far_field_parameters_are_trained_alone(tmp_path: Path) -> None:
    """Without low-rank changes nothing else moves; `load` reads them back."""
    original, model = dense(), coarse(summary="shared", bias=-4.0)
    before = weights(model)
    report = Distillation(
        model, original, Windows([], spans(2), spans(1, seed=9)), TuneConfig(steps=12, lora=0, lr=0.1)
    ).run()
    assert report["training"]["kept"]
    assert report["divergence"]["after"] < report["divergence"]["before"]
    changed = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= set(farfield_parameters(model))
    save(model, None, report, tmp_path / "out", tmp_path)
    ids = tokens(1, 100)
    assert torch.equal(load(tmp_path / "out")(ids).logits, model(ids).logits)


def test_what_does_not_help_is_undone() -> None:
    """Steps that are far too long; the report has the figure that they gave."""
    original, model = dense(), coarse(summary="shared", bias=-4.0)
    before = weights(model)
    report = Distillation(
        model, original, Windows([], spans(2), spans(1)), TuneConfig(steps=3, lr=3.0, warmup=0.0)
    ).run()
    assert not report["training"]["kept"]
    assert report["training"]["divergence"] > report["divergence"]["before"] == report["divergence"]["after"]
    assert set(weights(model)) == set(before)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    same = Distillation(dense(), dense(), windows(), None).run()
    assert not same["refit"]["kept"]
    assert same["divergence"]["after"] == same["divergence"]["before"]


def test_both_stages_in_turn() -> None:
    original, model = dense(), opening()
    report = Distillation(model, original, windows(), TuneConfig(steps=6, lora=2, lr=3e-3)).run()
    apart, fitted = report["divergence"], report["refit"]
    assert apart["after"] <= min(fitted["divergence"], apart["before"])
    assert len(fitted["layers"]) == 2
    assert report["tokens"] == 7 * 256


@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16", "keep_targets": True}], ids=["plain", "kept"])
def test_a_resumed_run_is_the_uninterrupted_one(options: dict[str, Any]) -> None:
    """Stopped after the fit and three of six steps, written and read, and gone on with: bit for bit."""
    config = TuneConfig(steps=6, lora=2, **options)

    def work() -> Distillation:
        return Distillation(coarse(summary="shared", bias=-4.0), dense(), windows(), config)

    whole = work()
    expected = whole.run()
    stopped = work()
    kept: list[Any] = []
    taken = 0

    def checkpoint(now: bool) -> None:
        nonlocal taken
        taken = stopped.tuner.step if stopped.tuner else 0
        if now:
            tensors, told = stopped.state()
            kept.append((write_tensors(tensors), json.dumps(told)))

    half = stopped.run(None, lambda: taken == 3, checkpoint)
    assert len(kept) == 2  # after the fit, and when it was stopped
    assert half["training"]["stopped"] and half["training"]["steps"] == 3
    for state, (tensors, told) in zip((0, 3), kept, strict=True):
        again = work()
        again.load_state(read_tensors(tensors), json.loads(told))
        report = again.run()
        assert report["training"]["losses"] == expected["training"]["losses"], state
        assert report["divergence"] == expected["divergence"]
        assert report["refit"] == again.fitted == json.loads(told)["fitted"]
        got, wanted = weights(again.model), weights(whole.model)
        assert all(torch.equal(got[name], p) for name, p in wanted.items())


def test_a_fit_that_is_stopped_is_kept_but_not_gone_on_from() -> None:
    model, saved = coarse(), []
    stops = iter([False, True, True, True])
    work = Distillation(model, dense(), windows(), TuneConfig(steps=3))
    report = work.run(None, lambda: next(stops), saved.append)
    assert report["refit"]["stopped"] and len(report["refit"]["layers"]) == 1
    assert report["training"] is None
    assert saved == []


def test_time_ends_training_too() -> None:
    tuner = Tuner(coarse(), dense(), spans(1), TuneConfig(seconds=1e-6, lora=1))
    assert tuner.fraction == 0.0
    tuner.run()
    assert tuner.step == 1 and tuner.fraction == 1.0 and tuner.done


def test_a_loss_that_is_not_finite_ends_it() -> None:
    models = coarse(), coarse()
    with torch.no_grad():
        for model in models:
            model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match=r"step 1: the divergence is nan.*a lower lr than 0.002"):
        Tuner(models[0], dense(), spans(1), TuneConfig(steps=1)).run()
    with pytest.raises(ArithmeticError, match="divergence from the original is nan"):
        Distillation(models[1], dense(), windows(), None).run()


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one of them says when training ends"),
        ({"steps": 0}, "steps=0: a number > 0"),
        ({"seconds": -1.0}, "seconds=-1.0: a number > 0"),
        ({"steps": 1, "lora": -1}, "lora=-1: a number >= 0"),
        ({"steps": 1, "lr": float("nan")}, "lr=nan"),
        ({"steps": 1, "precision": "half"}, "precision='half': one of float32, bfloat16"),
        ({"steps": 1, "warmup": 1.0}, r"warmup=1.0: a share in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneConfig(**arguments)


def test_what_cannot_be_distilled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tune = TuneConfig(steps=1)
    with pytest.raises(ValueError, match=r"original has 2 layers of width 32, 60 tokens.*50 tokens"):
        Distillation(coarse(), dense(vocab_size=60), windows(), tune)
    with pytest.raises(ValueError, match="nothing to do"):
        Distillation(coarse(), dense(), windows(refit=0), None)
    with pytest.raises(ValueError, match="no held-out windows"):
        Distillation(coarse(), dense(), Windows(spans(1), spans(1), []), tune)
    with pytest.raises(ValueError, match="target='logits'"):
        Distillation(coarse(), dense(), windows(), tune, target="logits")
    with pytest.raises(ValueError, match="no windows to train on"):
        Distillation(coarse(), dense(), Windows([], [], spans(1)), tune)
    with pytest.raises(ValueError, match="no windows to train on"):
        Tuner(coarse(), dense(), [], tune)
    with pytest.raises(ValueError, match=r"nothing to train: .* lora=8 would be accepted"):
        Tuner(coarse(), dense(), spans(1), TuneConfig(steps=1, lora=0))
    one, other = (Tuner(coarse(), dense(), spans(1), TuneConfig(steps=1, lora=rank)) for rank in (1, 2))
    with pytest.raises(ValueError, match="16 trained tensors that are not the 16 of this model and lora=1"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="precision='bfloat16' with a model in float64"):
        Tuner(coarse().double(), dense(), spans(1), TuneConfig(steps=1, precision="bfloat16"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'farfield\[distill\]'"):
        Tuner(coarse(), dense(), spans(1), tune)
    Tuner(coarse(bias=-1.0), dense(), spans(1), TuneConfig(steps=1, lora=0)).run()
