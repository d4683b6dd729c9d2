"""Associative recall: the answer follows its key in the first quarter, and nowhere near the query."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from farfield.data.recall import RecallStages, RecallTask, Stage

TASK = RecallTask(keys=12, values=5, fillers=3)


@pytest.mark.parametrize(("length", "pairs"), [(64, 8), (100, 12), (1024, 12), (8, 1)])
def test_every_query_has_one_answer_far_away(length: int, pairs: int) -> None:
    batch = TASK.draw(length, pairs, 20, np.random.default_rng(0))
    assert batch.tokens.shape == (20, length) and batch.places.shape == batch.answers.shape == (20, pairs)
    for tokens, places, answers in zip(batch.tokens, batch.places, batch.answers, strict=True):
        keys = tokens[places]
        assert len(set(places.tolist())) == len(set(keys.tolist())) == pairs
        for place, key, answer in zip(places.tolist(), keys, answers, strict=True):
            early, late = (tokens == key).nonzero().flatten().tolist()  # the pair and the query, nothing else
            assert late == place and early + 1 < length // 4 and late >= length - length // 4
            assert late - (early + 1) >= length // 2
            assert tokens[early + 1] == answer
        values = (tokens >= 12) & (tokens < 17)
        assert int(values.sum()) == pairs  # the answer is not written down a second time
        assert int((tokens >= 17).sum()) == length - 3 * pairs


def test_places_and_values_are_spread() -> None:
    batch = TASK.draw(64, 8, 400, np.random.default_rng(0))
    assert set(batch.places.flatten().tolist()) == set(range(48, 64))
    assert set(batch.answers.flatten().tolist()) == set(range(12, 17))
    # The order of the queries says nothing about the order of the pairs.
    places = batch.places.argsort(1)
    keys = batch.tokens.gather(1, batch.places).gather(1, places)
    early = torch.stack([(batch.tokens[:, :16] == keys[:, i : i + 1]).int().argmax(1) for i in range(8)], 1)
    first = (early[:, 0] < early[:, 1]).float().mean()
    assert 0.4 < float(first) < 0.6


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    stages = [Stage(32, 2, 3, 4), Stage(64, 4, 2, 2)]
    one, two = (RecallStages(TASK, stages, seed=5) for _ in range(2))
    assert one.steps == 5
    stream = one.stream(1)
    batches = [next(stream) for _ in range(7)]
    assert [tuple(batch.tokens.shape) for batch in batches] == [(4, 32)] * 3 + [(2, 64)] * 4
    for step in (2, 4, 7):
        assert torch.equal(two.batch(step).tokens, batches[step - 1].tokens)
        assert torch.equal(next(two.stream(step)).answers, batches[step - 1].answers)
    assert not torch.equal(batches[0].tokens, batches[1].tokens)
    assert not torch.equal(RecallStages(TASK, stages, seed=6).batch(1).tokens, batches[0].tokens)


def test_held_out_sequences_are_fixed_and_not_those_of_training() -> None:
    first, second = (list(TASK.held_out(64, 4, sequences=5, rows=2)) for _ in range(2))
    assert [len(batch.tokens) for batch in first] == [2, 2, 1]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.tokens, other.tokens)
    trained = RecallStages(TASK, [Stage(64, 4, 1, 2)], seed=0)
    rows = {tuple(row.tolist()) for step in range(1, 50) for row in trained.batch(step).tokens}
    assert not rows & {tuple(row.tolist()) for batch in first for row in batch.tokens}


@pytest.mark.parametrize(("length", "pairs"), [(64, 0), (64, 9), (1024, 13), (4, 1)])
def test_what_does_not_fit_is_refused(length: int, pairs: int) -> None:
    with pytest.raises(ValueError, match=rf"pairs={pairs} with 12 keys and length {length}: from 1 to"):
        TASK.draw(length, pairs, 1, np.random.default_rng(0))


def test_bad_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="values must be an integer of at least 1, got 0"):
        RecallTask(values=0)
    with pytest.raises(ValueError, match="at least one stage"):
        RecallStages(TASK, [], 0)
