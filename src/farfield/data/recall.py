"""Multi-query associative recall: pairs of key and value first, the keys again much later, the values as answers.

The task of Zoology (Arora et al., arXiv 2312.04927), made for one question: can an attention fetch one exact token
from far away? A sequence of n tokens is

- in its first quarter `pairs` pairs, each a key and right behind it its value, at random even places;
- in its last quarter the same keys again, in random order at random places: the queries;
- random fillers everywhere else.

At a query the model has to name the value. The answer itself never stands in the sequence a second time, and n / 2
tokens at least lie between a value and its query, so a window shorter than that can only guess. Departures from the
paper: pairs are spread over a quarter and queries lie at uniform places of another one (there: pairs first, queries at
power-law gaps); fillers have a small vocabulary of their own; so have keys and values (there: 8,192 tokens in all).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

__all__ = ["RecallBatch", "RecallStages", "RecallTask", "Stage"]

_HELD_OUT = 1 << 32
"""Added to a seed for evaluation, so that no training batch is drawn from the same numbers."""


@dataclass(frozen=True)
class RecallBatch:
    """Sequences with their queries.

    Attributes:
        tokens: int64 `[B, N]`.
        places: int64 `[B, Q]`, where the queries stand.
        answers: int64 `[B, Q]`, the token that is the right answer at each.
    """

    tokens: Tensor
    places: Tensor
    answers: Tensor

    def to(self, device: torch.device | str) -> RecallBatch:
        """The same on another device."""
        return RecallBatch(self.tokens.to(device), self.places.to(device), self.answers.to(device))


@dataclass(frozen=True)
class RecallTask:
    """The vocabulary: keys are tokens 0 to keys - 1, then values, then fillers.

    Attributes:
        keys, values, fillers: how many there are of each.
    """

    keys: int = 32
    values: int = 32
    fillers: int = 16

    def __post_init__(self) -> None:
        """Check each number, so that a wrong one is reported by its own name."""
        for name in ("keys", "values", "fillers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.keys + self.values + self.fillers

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / self.values

    def draw(self, length: int, pairs: int, rows: int, generator: np.random.Generator) -> RecallBatch:
        """Sequences drawn from a generator.

        Args:
            length: tokens of a sequence, N.
            pairs: pairs of a sequence and queries of it, Q; the keys of one sequence differ.
            rows: sequences, B.
            generator: decides everything.

        Raises:
            ValueError: when the pairs do not fit into a quarter of the sequence, or there are too few keys.
        """
        quarter = length // 4
        most = min(self.keys, quarter // 2)
        if not 1 <= pairs <= most:
            raise ValueError(
                f"pairs={pairs} with {self.keys} keys and length {length}: from 1 to {most} fit into a quarter of it"
            )
        first_value, first_filler = self.keys, self.keys + self.values
        tokens = generator.integers(first_filler, self.vocab, size=(rows, length))

        def chosen(places: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
            return generator.random((rows, places)).argsort(1)[:, :pairs]

        keys = chosen(self.keys)
        values = generator.integers(first_value, first_filler, size=(rows, pairs))
        slots = 2 * chosen(quarter // 2)
        np.put_along_axis(tokens, slots, keys, 1)
        np.put_along_axis(tokens, slots + 1, values, 1)
        # Random places in no order are a random order of the queries already.
        places = length - quarter + chosen(quarter)
        np.put_along_axis(tokens, places, keys, 1)
        return RecallBatch(*(torch.from_numpy(x) for x in (tokens, places, values)))

    def held_out(self, length: int, pairs: int, sequences: int, rows: int, seed: int = 0) -> Iterator[RecallBatch]:
        """``sequences`` sequences for evaluation, ``rows`` at a time, a function of the arguments alone."""
        for first in range(0, sequences, rows):
            generator = np.random.default_rng((seed + _HELD_OUT, length, pairs, first))
            yield self.draw(length, pairs, min(rows, sequences - first), generator)


@dataclass(frozen=True)
class Stage:
    """A part of a curriculum: ``steps`` steps on ``rows`` sequences of ``length`` tokens with ``pairs`` pairs."""

    length: int
    pairs: int
    steps: int
    rows: int


class RecallStages:
    """Training batches of a curriculum, short sequences first; fits `farfield.training.loop.Trainer`.

    The batch of step s depends on (seed, s) only: the same for every attention.

    Args:
        task: the vocabulary.
        stages: in order; after the last one its lengths go on.
        seed: of the data.

    Raises:
        ValueError: for no stages.
    """

    def __init__(self, task: RecallTask, stages: Sequence[Stage], seed: int) -> None:
        if not stages:
            raise ValueError("a curriculum needs at least one stage")
        self.task, self.stages, self.seed = task, tuple(stages), seed

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage of a step, counted from 1."""
        for stage in self.stages:
            if step <= stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def batch(self, step: int) -> RecallBatch:
        """The batch of a step."""
        stage = self.stage(step)
        return self.task.draw(stage.length, stage.pairs, stage.rows, np.random.default_rng((self.seed, step)))

    def stream(self, first: int) -> Iterator[RecallBatch]:
        """See `farfield.training.loop.Batches`."""
        return map(self.batch, count(first))
