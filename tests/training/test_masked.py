"""Masked language modelling: what is hidden, and that it is predicted from both sides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from farfield.models.language import LanguageConfig
from farfield.training.loop import TextWindows, TrainConfig, Trainer
from farfield.training.masked import MASK, MaskedModel, MaskedWindows, evaluate_masked, hide

TINY = LanguageConfig("dense", dim=16, depth=1, num_heads=2, vocab=257, causal=False)


def text(length: int, period: int = 7) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return (np.arange(length) % period + 65).astype(np.uint8)


def test_fifteen_percent_are_hidden_and_the_rest_is_not() -> None:
    targets = torch.randint(0, 256, (5, 200))
    batch = hide(targets, np.random.default_rng(0))
    assert (batch.hidden.sum(1) == 30).all()
    assert (batch.tokens[batch.hidden] == MASK).all()
    assert torch.equal(batch.tokens[~batch.hidden], targets[~batch.hidden])
    assert torch.equal(batch.targets, targets)
    assert not torch.equal(batch.hidden[0], batch.hidden[1])
    assert hide(targets[:, :2], np.random.default_rng(0)).hidden.sum() == 5  # one a row at least
    places = hide(torch.zeros(4000, 10, dtype=torch.int64), np.random.default_rng(0)).hidden.float().mean(0)
    assert (places - 0.2).abs().max() < 0.03


def test_batches_depend_on_seed_and_step() -> None:
    data = np.random.default_rng(0).integers(0, 256, 500).astype(np.uint8)
    one, two = MaskedWindows(data, 40, 3, seed=1), MaskedWindows(data, 40, 3, seed=1)
    stream = one.stream(1)
    batches = [next(stream) for _ in range(3)]
    assert torch.equal(two.batch(3).tokens, batches[2].tokens)
    assert not torch.equal(batches[0].hidden, batches[1].hidden)
    # The bytes are the windows of a causal model with the same context.
    assert torch.equal(batches[1].targets, TextWindows(data, 39, 3, seed=1).batch(2))


def test_only_hidden_bytes_count() -> None:
    model = MaskedModel(TINY).double()
    batch = hide(torch.randint(0, 256, (2, 30)), np.random.default_rng(0))
    logits = model(batch.tokens).log_softmax(-1)
    nats = -logits.gather(2, batch.targets[..., None])[..., 0][batch.hidden].mean()
    torch.testing.assert_close(model.loss(batch), nats)
    with pytest.raises(ValueError, match="vocab=256: masked modelling needs token 256"):
        MaskedModel(LanguageConfig("dense", causal=False))


def test_evaluation_is_the_mean_over_hidden_bytes() -> None:
    model = MaskedModel(TINY)
    with torch.no_grad():
        model.head.weight.zero_()  # every token is as likely as any other
    seen: list[tuple[int, int]] = []
    result = evaluate_masked(model, text(1000), 100, 500, on_window=lambda *at: seen.append(at))
    assert result.bits == pytest.approx(math.log2(257), abs=1e-5)
    assert result.tokens == 5 * 15 and len(result.windows) == 5
    assert seen == [(k, 5) for k in range(6)]
    assert [(low, high) for low, high, _ in result.positions] == [(0, 64), (64, 100)]
    model = MaskedModel(TINY)
    assert evaluate_masked(model, text(1000), 100) == evaluate_masked(model, text(1000), 100)
    with pytest.raises(ValueError, match="held-out text has 100 bytes, context 100 needs at least 101"):
        evaluate_masked(model, text(100), 100)


def test_it_learns_a_periodic_text() -> None:
    data = text(4000)
    model = MaskedModel(TINY)
    trainer = Trainer(model, MaskedWindows(data, 28, 8, 0), TrainConfig(context=28, batch=8, lr=1e-2, steps=120))
    trainer.run()
    assert evaluate_masked(model, data, 28).bits < 1.2  # 7 equally frequent bytes: 2.8
