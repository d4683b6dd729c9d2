"""Examples of images and fields: what a source gives, and how it becomes a stream of batches.

The batches of a step depend on (seed, step) alone, with any number of workers: a run that is resumed reads what one
that was not stopped would have read, and every attention reads the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from farfield.models.vision.model import Examples

__all__ = ["BadExample", "Batches", "Example", "Source", "VisionData", "in_order", "size_in_words"]

Array = npt.NDArray[np.generic]


class BadExample(ValueError):
    """One example cannot be read.

    Attributes:
        name: which one.
        reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it survives the way from a worker
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Example(NamedTuple):
    """One example.

    Attributes:
        x: float32 `[channels, *grid]`.
        y: an integer label, int64 `[*grid]`, or float32 `[outputs, *grid]`.
        mask: bool `[*grid]`, True = the point counts; None when all do.
    """

    x: Array
    y: Array | int
    mask: Array | None = None


class Source(Protocol):
    """Where examples come from."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Lengths of the axes of every example."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """For people: a file, a place in a file."""
        ...

    def get(self, index: int, rng: np.random.Generator | None = None) -> Example:
        """One example, augmented by ``rng`` where one is given.

        Raises:
            BadExample: when it cannot be read.
        """
        ...


@dataclass(frozen=True)
class VisionData:
    """A data set of images or fields, cut into training and test examples.

    Attributes:
        task: "classify", "segment" or "operator".
        train: examples to train on.
        tests: held-out examples by name, the first of them at the resolution of training.
        channels: of the inputs.
        outputs: classes, or channels of the targets.
        classes: their names; empty for an operator.
        ignore: the label that stands for none.
        mean, std, target_mean, target_std: statistics of the training examples, per channel.
        residual: whether a model should predict changes of its input, as of what comes next.
        ahead: steps of the first of three axes that the targets have; None where they have the grid of the input.
        yardsticks: scores of answers that need no training by name, in the task's metric.
        source: in words, where the data are from.
        fingerprint: equal for equal data.
        skipped: one line for each file that was left out, with the reason.
    """

    task: str
    train: Source
    tests: dict[str, Source]
    channels: int
    outputs: int
    classes: tuple[str, ...] = ()
    ignore: int = -1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    residual: bool = False
    ahead: int | None = None
    yardsticks: dict[str, float] = field(default_factory=dict)
    source: str = ""
    fingerprint: str = ""
    skipped: tuple[str, ...] = field(default=(), repr=False)

    @property
    def dims(self) -> int:
        """Axes of the grid."""
        return len(self.train.grid)


class _Read(NamedTuple):
    """What comes from a worker: the tensors, the numbers of the examples in them, and those that could not be read."""

    batch: Examples
    indices: list[int]
    bad: list[tuple[str, str]]


class _Steps(Dataset[_Read]):
    """The batch of a step, as a data set whose items are whole batches."""

    def __init__(self, source: Source, batch: int, seed: int) -> None:
        self.source, self.batch, self.seed = source, batch, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The examples of an epoch, the last one asked for kept."""
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self.source))
        return self._order

    def __getitem__(self, step: int) -> _Read:
        """The batch of a step, from 1."""
        count = len(self.source)
        found: list[Example] = []
        indices: list[int] = []
        bad: list[tuple[str, str]] = []
        first = (step - 1) * self.batch
        for place in range(first, first + self.batch):
            epoch, position = divmod(place, count)
            order = self.order(epoch)
            for other in range(count):  # one that cannot be read is replaced by the next of its epoch
                index = int(order[(position + other) % count])
                rng = np.random.default_rng((self.seed, epoch, index))
                try:
                    found.append(self.source.get(index, rng))
                except BadExample as error:
                    bad.append((error.name, error.reason))
                else:
                    indices.append(index)
                    break
            else:
                raise ValueError(f"no example can be read; the first says {bad[0][0]}: {bad[0][1]}")
        return _Read(collate(found), indices, list(dict.fromkeys(bad)))


class _InOrder(Dataset[_Read]):
    """Batches of a source in its own order, without what cannot be read."""

    def __init__(self, source: Source, batch: int, indices: list[int]) -> None:
        self.source, self.batch, self.indices = source, batch, indices

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __getitem__(self, number: int) -> _Read:
        found: list[Example] = []
        kept: list[int] = []
        bad: list[tuple[str, str]] = []
        for index in self.indices[number * self.batch : (number + 1) * self.batch]:
            try:
                found.append(self.source.get(index))
                kept.append(index)
            except BadExample as error:
                bad.append((error.name, error.reason))
        return _Read(collate(found) if found else Examples(torch.empty(0), torch.empty(0)), kept, bad)


class Batches:
    """Training batches of a source, for :class:`farfield.training.loop.Trainer`.

    Args:
        source: the examples; shuffled anew in every epoch.
        batch: examples per step.
        seed: of order and augmentation.
        workers: processes that read ahead; 0 reads in this one.
        on_bad: told the name and the reason of every example that cannot be read, once.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int = 0,
        *,
        workers: int = 0,
        on_bad: Callable[[str, str], None] | None = None,
    ) -> None:
        if len(source) == 0:
            raise ValueError("there are no examples to train on")
        if batch < 1 or workers < 0:
            raise ValueError(f"batch must be at least 1 and workers at least 0, got {batch} and {workers}")
        self.source, self.workers = source, workers
        self._steps = _Steps(source, batch, seed)
        self._told: set[str] = set()
        self._on_bad = on_bad

    def stream(self, first: int) -> Iterator[Examples]:
        """The batches of steps ``first``, ``first + 1``, ... without end."""
        steps = itertools.count(first)
        if self.workers == 0:
            for step in steps:
                yield self._taken(self._steps[step])
        loader = DataLoader(
            self._steps,
            sampler=_Counter(first),
            batch_size=None,
            num_workers=self.workers,
        )
        for read in loader:
            yield self._taken(read)

    def _taken(self, read: _Read) -> Examples:
        for name, reason in read.bad:
            if name not in self._told:
                self._told.add(name)
                if self._on_bad is not None:
                    self._on_bad(name, reason)
        return read.batch


class _Counter(torch.utils.data.Sampler[int]):
    """Steps without end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


def in_order(
    source: Source,
    batch: int,
    *,
    indices: list[int] | None = None,
    workers: int = 0,
    on_bad: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[Examples, list[int]]]:
    """The examples of a source, or some of them, in order and as they are; those that cannot be read are left out.

    Yields:
        Batches, and the numbers of the examples in each.
    """
    reader = _InOrder(source, batch, list(range(len(source))) if indices is None else indices)
    inline = map(reader.__getitem__, range(len(reader)))
    batches = DataLoader(reader, batch_size=None, num_workers=workers) if workers else inline
    for read in batches:
        for name, reason in read.bad:
            if on_bad is not None:
                on_bad(name, reason)
        if read.indices:
            yield read.batch, read.indices


def collate(examples: list[Example]) -> Examples:
    """Examples of one size as a batch."""
    x = torch.from_numpy(np.stack([example.x for example in examples]))
    y = torch.from_numpy(np.stack([np.asarray(example.y) for example in examples]))
    masks = [example.mask for example in examples]
    mask = None
    if any(m is not None for m in masks):
        full = np.ones(examples[0].x.shape[1:], dtype=bool)
        mask = torch.from_numpy(np.stack([full if m is None else m for m in masks]))
    return Examples(x, y if y.is_floating_point() else y.long(), mask)


def size_in_words(grid: tuple[int, ...]) -> str:
    """32x48."""
    return "x".join(str(n) for n in grid)
