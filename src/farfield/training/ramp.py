"""Short windows first: what a model can learn from them costs far less there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from farfield.training.loop import Batches

__all__ = ["RampedBatches"]


class RampedBatches:
    """So many steps of other batches, then one kind without end; resumable at any step as the others are.

    Args:
        stages: (batches, steps) in order; each counts its steps from 1.
        last: what follows, counted from 1 again.

    Raises:
        ValueError: for a stage without steps.
    """

    def __init__(self, stages: Sequence[tuple[Batches, int]], last: Batches) -> None:
        for _, steps in stages:
            if steps < 1:
                raise ValueError(f"a stage of a ramp takes at least 1 step, got {steps}")
        self.stages, self.last = tuple(stages), last

    @property
    def steps(self) -> int:
        """Of all stages together."""
        return sum(steps for _, steps in self.stages)

    def stream(self, first: int) -> Iterator[Any]:
        """See `farfield.training.loop.Batches`."""
        for batches, steps in self.stages:
            if first <= steps:
                yield from islice(batches.stream(first), steps - first + 1)
                first = steps + 1
            first -= steps
        yield from self.last.stream(first)
