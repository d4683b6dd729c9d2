from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from farfield.training import loop
from farfield.training.loop import Progress, TrainConfig, Trainer, learning_rate_factor

Make = Callable[..., Trainer]


class Clock:
    """Stands for the module time: every look at it costs a second."""

    def __init__(self, tick: float = 1.0) -> None:
        self.now, self.tick = 0.0, tick

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


def assert_same_parameters(a: Trainer, b: Trainer) -> None:
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_training_learns_and_counts(make_trainer: Make) -> None:
    trainer = make_trainer(steps=60, batch=4)
    seen: list[Progress] = []
    history = trainer.run(on_progress=seen.append)
    assert history == seen
    assert [p.step for p in history] == list(range(1, 61))
    assert history[-1].tokens == 60 * 4 * 64
    assert all(a.seconds < b.seconds for a, b in zip(history, history[1:], strict=False))
    assert history[0].train_bits == pytest.approx(8, abs=0.1)
    assert history[-1].train_bits < 4
    assert trainer.done


def test_batches_depend_on_seed_and_step_only(make_trainer: Make, text: npt.NDArray[np.uint8]) -> None:
    trainer, other = make_trainer(batch=3), make_trainer(batch=3, dim=16)
    first = trainer.batch(5)
    other.run()
    assert torch.equal(first, other.batch(5))
    assert not torch.equal(first, trainer.batch(6))
    assert not torch.equal(first, make_trainer(batch=3, seed=1).batch(5))
    assert first.shape == (3, 65)
    assert first.dtype == torch.int64
    for row in first.numpy():
        assert row.astype(np.uint8).tobytes() in text.tobytes()


def test_the_last_byte_can_be_drawn() -> None:
    model = nn.Linear(1, 1)
    trainer = Trainer(model, np.arange(65, dtype=np.uint8), TrainConfig(context=64, steps=1))
    assert trainer.batch(1)[0, -1] == 64


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_an_interrupted_run_ends_with_the_same_bits(make_trainer: Make, stop: int) -> None:
    whole = make_trainer()
    whole.run()
    first = make_trainer()
    first.run(should_stop=lambda: first.step >= stop)
    assert first.step == stop
    assert not first.done
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    first.run()  # must not reach into the state that was taken
    resumed = make_trainer()
    resumed.load_state_dict(state)
    assert resumed.step == stop
    resumed.run()
    assert_same_parameters(whole, resumed)
    assert_same_parameters(whole, first)
    assert [(p.step, p.tokens, p.train_bits) for p in resumed.history] == [
        (p.step, p.tokens, p.train_bits) for p in whole.history
    ]


def test_a_budget_of_seconds_ends_on_time(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    trainer = make_trainer(steps=None, seconds=10.0)

    def evaluate_for_long(_: Progress) -> None:
        clock.now += 100.0

    history = trainer.run(on_progress=evaluate_for_long)
    assert [p.seconds for p in history] == [float(i) for i in range(1, 11)]


def test_steps_and_seconds_end_at_whichever_comes_first(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "time", Clock())
    assert len(make_trainer(steps=4, seconds=10.0).run()) == 4
    assert len(make_trainer(steps=40, seconds=3.0).run()) == 3


def test_a_step_that_mostly_does_not_fit_is_not_begun(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "time", Clock(tick=4.0))
    assert [p.seconds for p in make_trainer(steps=None, seconds=9.0).run()] == [4.0, 8.0]
    assert [p.seconds for p in make_trainer(steps=None, seconds=11.0).run()] == [4.0, 8.0, 12.0]


def test_learning_rate_rises_stays_and_falls() -> None:
    config = TrainConfig(steps=1, warmup=0.1, cooldown=0.5)
    assert [learning_rate_factor(f, config) for f in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    )
    constant = TrainConfig(steps=1, warmup=0.0, cooldown=0.0)
    assert {learning_rate_factor(f, constant) for f in (0.0, 0.5, 1.0)} == {1.0}


def test_every_step_learns_and_the_rate_ends_low(make_trainer: Make) -> None:
    trainer = make_trainer(steps=20)
    rates: list[float] = []
    trainer.run(on_progress=lambda _: rates.append(trainer._optimizer.param_groups[0]["lr"]))
    assert min(rates) > 0
    assert rates[-1] < 0.1 * max(rates)
    assert max(rates) == trainer.config.lr


def test_only_weights_of_linear_maps_decay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.embedding = nn.Embedding(3, 3)
            self.level_bias = nn.Parameter(torch.zeros(2, 3))

        def loss(self, tokens: Tensor) -> Tensor:
            return self.level_bias.sum()

    model = Model()
    trainer = Trainer(model, np.zeros(10, np.uint8), TrainConfig(context=4, steps=1, weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for g in trainer._optimizer.param_groups for p in g["params"]}
    expected = {"linear.weight": 0.5, "linear.bias": 0.0, "embedding.weight": 0.0, "level_bias": 0.0}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == expected
    # Parameters that got no gradient have no moments; the state must still make the round trip.
    trainer.run()
    trainer.load_state_dict(trainer.state_dict())


def test_embeddings_have_a_rate_of_their_own() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.embedding = nn.Linear(3, 3, bias=False), nn.Embedding(3, 3)

        def loss(self, tokens: Tensor) -> Tensor:
            return 1e-3 * (self.linear.weight.sum() + self.embedding.weight.sum())

    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(context=4, steps=1, lr=0.01, embedding_lr=5.0, warmup=0.0, cooldown=0.0, weight_decay=0.0)
    Trainer(model, np.zeros(10, np.uint8), config).run()
    # The first step of Adam is the rate, whatever the gradient.
    moved = {name: float((before[name] - p).detach().mean()) for name, p in model.named_parameters()}
    assert moved == pytest.approx({"linear.weight": 0.01, "embedding.weight": 0.05}, rel=1e-3)
    with pytest.raises(ValueError, match="embedding_lr must be positive and finite, got 0"):
        TrainConfig(steps=1, embedding_lr=0)


def test_divergence_is_an_error_that_leaves_the_parameters(make_trainer: Make) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match=r"diverged at step 1: loss nan.*learning rate below"):
        trainer.run()
    for p, q in zip(trainer.model.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True, rtol=0, atol=0)
    assert trainer.step == 0


def test_a_state_of_another_model_is_refused(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="another model"):
        make_trainer().load_state_dict(make_trainer(dim=16).state_dict())


def test_a_text_shorter_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="has 64 bytes, context 64 needs at least 65"):
        Trainer(nn.Linear(1, 1), np.zeros(64, np.uint8), TrainConfig(context=64, steps=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "training needs an end"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"seconds": float("inf")}, "finite"),
        ({"steps": 1, "context": 0}, "context must be at least 1, got 0"),
        ({"steps": 1, "batch": 0}, "batch must be at least 1"),
        ({"steps": 1, "lr": 0.0}, "lr must be positive"),
        ({"steps": 1, "lr": float("nan")}, "lr must be positive"),
        ({"steps": 1, "lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"steps": 1, "clip": float("inf")}, "clip must be positive and finite"),
        ({"steps": float("nan")}, "steps must be an integer, got nan"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"steps": 1, "context": 64.5}, "context must be an integer, got 64.5"),
        ({"steps": 1, "batch": 1.5}, "batch must be an integer"),
        ({"steps": 1, "lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"steps": 1, "warmup": float("nan")}, "warmup is a part"),
        ({"steps": 1, "weight_decay": float("nan")}, "weight_decay"),
        ({"steps": 1, "warmup": 2.0}, "warmup is a part"),
        ({"steps": 1, "warmup": 0.6, "cooldown": 0.6}, "exceed the whole budget"),
        ({"steps": 1, "weight_decay": -1.0}, "weight_decay"),
        ({"steps": 1, "seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)  # type: ignore[arg-type]
