"""The model of associative recall, and what the language model has for it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from farfield import recipes
from farfield.data.recall import RecallStages, RecallTask, Stage
from farfield.models.language import LanguageConfig, LanguageModel
from farfield.models.recall import RecallModel
from farfield.training.loop import TrainConfig, Trainer

SMALL = LanguageConfig("dense", dim=16, depth=1, num_heads=2, rope=None, vocab=20, shift=True)


def test_only_answers_count() -> None:
    task = RecallTask(keys=12, values=5, fillers=3)
    batch = task.draw(64, 8, 3, np.random.default_rng(0))
    model = RecallModel(SMALL, task).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        logits = model(batch.tokens)
    rows = torch.arange(3)[:, None]
    values = logits[rows, batch.places][..., 12:17]
    torch.testing.assert_close(model.answers(batch), values)
    want = F.cross_entropy(values.flatten(0, 1), batch.answers.flatten() - 12)
    torch.testing.assert_close(model.loss(batch), want)
    right = model.correct(batch)
    assert torch.equal(right, values.argmax(-1) == batch.answers - 12)
    assert 0 < int(right.sum()) < right.numel()
    with pytest.raises(ValueError, match="the task has 80 tokens and the model 20"):
        RecallModel(SMALL, RecallTask())


def test_it_learns_to_look_up() -> None:
    task = RecallTask(keys=8, values=8, fillers=4)
    stages = RecallStages(task, [Stage(32, 4, 120, 16)], seed=0)
    model = RecallModel(dataclasses.replace(SMALL, dim=32), task)
    Trainer(model, stages, TrainConfig(context=32, lr=1e-2, steps=stages.steps, weight_decay=0.0)).run()
    (batch,) = task.held_out(32, 4, 64, 64)
    assert float(model.correct(batch).float().mean()) > 0.9  # a guess: 0.125


def test_a_shifted_model_reads_the_token_before() -> None:
    # A window of one token: without the shift a position knows itself only.
    config = LanguageConfig("window", {"size": 1}, dim=16, depth=2, num_heads=2, shift=True)
    for shift, reach in ((True, 2), (False, 1)):
        model = LanguageModel(dataclasses.replace(config, shift=shift)).double()
        tokens = torch.arange(10)[None]
        changed = tokens.clone()
        changed[0, 4] = 77
        differs = (model(tokens) != model(changed)).any(-1)[0]
        assert differs.nonzero().flatten().tolist() == list(range(4, 4 + reach))
    with pytest.raises(ValueError, match="shift=True reads the token before"):
        LanguageModel(config).stream()


def test_the_rest_begins_the_same_with_a_shift() -> None:
    plain = dict(LanguageModel(dataclasses.replace(SMALL, shift=False)).named_parameters())
    shifted = dict(LanguageModel(SMALL).named_parameters())
    assert set(shifted) - set(plain) == {"before.weight"}
    assert all(torch.equal(shifted[name], plain[name]) for name in plain)


def test_without_order_every_position_reads_all_others() -> None:
    config = LanguageConfig("fma", {"block": 4, "rank": 2}, dim=16, depth=1, num_heads=2, causal=False)
    model = LanguageModel(config).double()
    tokens = torch.randint(0, 256, (1, 40))
    changed = tokens.clone()
    changed[0, 37] = (changed[0, 37] + 1) % 256
    assert (model(tokens) != model(changed)).any(-1).all()
    assert "inline" in recipes.names()
    LanguageModel(LanguageConfig("inline", dim=16, depth=1, num_heads=2, causal=False))(tokens)
    with pytest.raises(ValueError, match="needs causal attention"):
        LanguageModel(LanguageConfig("inline", dim=16, depth=1, num_heads=2))
