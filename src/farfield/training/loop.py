"""The training loop: cheap steps, a schedule driven by steps or by seconds, and exact resumption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = ["Batches", "Progress", "TextWindows", "TrainConfig", "Trainer", "learning_rate_factor"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train; serialises to JSON by ``dataclasses.asdict``.

    At least one of ``steps`` and ``seconds`` is given; with both, training ends at whichever comes first.

    Attributes:
        context: Tokens that the model sees at once; the pixels of an image, the points of a grid.
        batch: Sequences, images or grids per step.
        lr: Peak learning rate of AdamW.
        embedding_lr: That of embeddings over ``lr``. Rows of an embedding are of size 1 where weights are of size
            0.02, so that Adam's equal steps move them little.
        warmup: Part of the budget over which the rate rises linearly from 0.
        cooldown: Part of the budget, at its end, over which the rate falls linearly to 0; constant in between.
        weight_decay: Decay on the weights of linear maps, and on nothing else.
        clip: Largest norm of the gradient; longer ones are scaled down.
        seed: Seed of the data's order.
        steps: Optimiser steps to take.
        seconds: Training time to spend. Evaluation, saving and whatever else a caller does between steps do not count.
    """

    context: int = 4096
    batch: int = 1
    lr: float = 3e-3
    embedding_lr: float = 1.0
    warmup: float = 0.05
    cooldown: float = 0.6
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Check each setting, so that a wrong one is reported by its own name."""
        for name in ("context", "batch", "seed", "steps"):
            value = getattr(self, name)
            if (value is not None or name != "steps") and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        for name in ("lr", "embedding_lr", "warmup", "cooldown", "weight_decay", "clip", "seconds"):
            value = getattr(self, name)
            if (value is not None or name != "seconds") and (
                not isinstance(value, int | float) or isinstance(value, bool)
            ):
                raise ValueError(f"{name} must be a number, got {value!r}")
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "embedding_lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("warmup", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a part of the budget between 0 and 1, got {getattr(self, name)}")
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup {self.warmup} and cooldown {self.cooldown} together exceed the whole budget, 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and not negative, got {self.weight_decay}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.steps is None and self.seconds is None:
            raise ValueError("give steps, seconds or both: training needs an end")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.seconds is not None and not (0 < self.seconds < math.inf):
            raise ValueError(f"seconds must be positive and finite, got {self.seconds}")


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step.

    Attributes:
        step: Steps taken so far, from 1.
        seconds: Training time so far.
        tokens: Tokens predicted so far.
        train_bits: Loss of this step's batch in bits per token; its loss over ln 2 where that is no likelihood.
    """

    step: int
    seconds: float
    tokens: int
    train_bits: float

    @property
    def loss(self) -> float:
        """The loss as the model gave it: nats, or whatever its task measures."""
        return self.train_bits * math.log(2)


class Batches(Protocol):
    """Where training batches come from."""

    def stream(self, first: int) -> Iterator[Any]:
        """The batches of steps ``first``, ``first + 1``, ... without end: tensors, or anything with a method ``to``.

        Each depends on its step alone, so that a run that is resumed reads what it would have read.
        """
        ...


class TextWindows:
    """Windows drawn at random from one array of bytes.

    Args:
        train: One-dimensional integer array longer than ``context``.
        context, batch, seed: As in `TrainConfig`.

    Raises:
        ValueError: If the text is shorter than ``context + 1``.
    """

    def __init__(self, train: npt.NDArray[np.uint8], context: int, batch: int, seed: int) -> None:
        if train.ndim != 1:
            raise ValueError(f"train must be a one-dimensional array, got shape {train.shape}")
        if len(train) < context + 1:
            raise ValueError(
                f"the training text has {len(train):,} bytes, context {context:,} needs at least "
                f"{context + 1:,}: give more text or a shorter context"
            )
        self.train, self.window, self.rows, self.seed = train, context + 1, batch, seed

    def batch(self, step: int) -> Tensor:
        """The windows of one step, [batch, context + 1] int64, a function of the seed and the step alone."""
        generator = np.random.default_rng((self.seed, step))
        starts = generator.integers(0, len(self.train) - self.window, size=self.rows, endpoint=True)
        windows = np.stack([self.train[start : start + self.window] for start in starts])
        return torch.from_numpy(windows.astype(np.int64))

    def stream(self, first: int) -> Iterator[Tensor]:
        """See `Batches`."""
        return map(self.batch, count(first))


class Trainer:
    """Trains one model, on windows drawn at random from one array of bytes or on batches from elsewhere.

    The batch of step s depends on (seed, s) only: the same for every attention, and the same after a resumption. With
    ``steps`` alone, a run that is stopped and resumed ends with the very parameters of one that is not, on the same
    machine and number of threads.

    Args:
        model: The model, on the device to train on, with a method ``loss(batch) -> scalar``.
        train: Training bytes, a one-dimensional integer array longer than ``config.context``; or `Batches`, which draw
            by a seed and in a number of their own.
        config: How to train.

    Raises:
        ValueError: If the training text is shorter than ``context + 1``.
    """

    def __init__(self, model: nn.Module, train: npt.NDArray[np.uint8] | Batches, config: TrainConfig) -> None:
        if isinstance(train, np.ndarray):
            train = TextWindows(train, config.context, config.batch, config.seed)
        self.model = model
        self.train = train
        self.config = config
        self.history: list[Progress] = []
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = list(self._named.values())
        self._device = self._parameters[0].device
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(model, config), lr=config.lr, betas=(0.9, 0.95), fused=True
        )

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.history[-1].step if self.history else 0

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self.history[-1].seconds if self.history else 0.0

    @property
    def fraction(self) -> float:
        """Part of the budget that is spent, from 0 to 1."""
        parts = [0.0]
        if self.config.steps is not None:
            parts.append(self.step / self.config.steps)
        if self.config.seconds is not None:
            parts.append(self.seconds / self.config.seconds)
        return min(max(parts), 1.0)

    @property
    def done(self) -> bool:
        """Whether the budget is spent. A step begins only while at least half of it still fits into the seconds."""
        if self.config.steps is not None and self.step >= self.config.steps:
            return True
        if self.config.seconds is None:
            return False
        recent = self.history[-9:]
        durations = [after.seconds - before.seconds for before, after in pairwise(recent)]
        typical = sorted(durations)[len(durations) // 2] if durations else 0.0
        return self.seconds + 0.5 * typical >= self.config.seconds

    def run(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Progress]:
        """Train until the budget is spent, or until told to stop.

        Args:
            on_progress: Called after every step; its time does not count as training time.
            should_stop: Asked before every step; true ends the run early, ready to be resumed.

        Returns:
            The whole history, that of earlier runs included.

        Raises:
            FloatingPointError: If the loss is not finite; the parameters are then those before that step.
        """
        self.model.train()
        batches = self.train.stream(self.step + 1)
        try:
            while not self.done and not (should_stop is not None and should_stop()):
                progress = self._take_step(batches)
                self.history.append(progress)
                if on_progress is not None:
                    on_progress(progress)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:  # a generator: workers that read ahead end with it
                close()
        return self.history

    def batch(self, step: int) -> Any:
        """The batch of one step, on the model's device."""
        return next(self.train.stream(step)).to(self._device)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumption needs, as flat named tensors.

        Returns:
            ``model.*``: the model's state; ``optimizer.<parameter>.<key>``; ``rng.cpu`` and ``rng.cuda``: random states
            (uint8); ``history``: [steps, 4] float64 of step, seconds, tokens and bits.
        """
        state = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = torch.as_tensor(value).detach()
        state["rng.cpu"] = torch.get_rng_state()
        if self._device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self._device)
        rows = [(p.step, p.seconds, p.tokens, p.train_bits) for p in self.history]
        state["history"] = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 4)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly from where `state_dict` was taken.

        Raises:
            ValueError: If the state is that of another model.
        """
        model_state = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
        try:
            self.model.load_state_dict(model_state)
        except RuntimeError as error:
            raise ValueError(f"this state belongs to another model: {error}") from error
        moments: dict[nn.Parameter, dict[str, Tensor]] = {}
        for name, parameter in self._named.items():
            prefix = f"optimizer.{name}."
            # Exact keys: one parameter's name may be the beginning of another's.
            found = {key: state[prefix + key] for key in ("step", "exp_avg", "exp_avg_sq") if prefix + key in state}
            if found:
                moments[parameter] = found
        groups = self._optimizer.state_dict()["param_groups"]
        order = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        indexed = {index: moments[parameter] for index, parameter in enumerate(order) if parameter in moments}
        # The optimiser keeps the tensors that it is given; clones keep the caller's state from changing under it.
        indexed = {index: {key: t.clone() for key, t in entry.items()} for index, entry in indexed.items()}
        self._optimizer.load_state_dict({"state": indexed, "param_groups": groups})
        torch.set_rng_state(state["rng.cpu"].cpu())
        if self._device.type == "cuda" and "rng.cuda" in state:
            torch.cuda.set_rng_state(state["rng.cuda"].cpu(), self._device)
        self.history = [
            Progress(int(step), seconds, int(tokens), bits) for step, seconds, tokens, bits in state["history"].tolist()
        ]

    def _take_step(self, batches: Iterator[Any]) -> Progress:
        started = time.perf_counter()
        step = self.step + 1
        rate = self.config.lr * learning_rate_factor(self._schedule_position(), self.config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["over"]
        loss: Tensor = self.model.loss(next(batches).to(self._device))  # type: ignore[operator]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip)
        value, length = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(length)):
            self._optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"training diverged at step {step}: loss {value}, norm of the gradient {length}; "
                f"a learning rate below {self.config.lr:g} may help"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        tokens = (self.history[-1].tokens if self.history else 0) + self.config.batch * self.config.context
        return Progress(step, self.seconds + time.perf_counter() - started, tokens, value / math.log(2))

    def _schedule_position(self) -> float:
        """Part of the budget spent when the coming step is half done: it is never 0, so no step is wasted at rate 0."""
        half = 0.5 / self.config.steps if self.config.steps is not None else 0.0
        if self.config.seconds is not None and self.step:
            half = max(half, 0.5 * self.seconds / self.step / self.config.seconds)
        return min(self.fraction + half, 1.0)


def learning_rate_factor(fraction: float, config: TrainConfig) -> float:
    """Learning rate over its peak when ``fraction`` of the budget is spent: up, constant, down to 0.

    Args:
        fraction: Part of the budget, from 0 to 1.
        config: Gives ``warmup`` and ``cooldown``.

    Returns:
        A number from 0 to 1, continuous in ``fraction``.
    """
    rising = fraction / config.warmup if config.warmup > 0 else 1.0
    falling = (1.0 - fraction) / config.cooldown if config.cooldown > 0 else 1.0
    return max(0.0, min(1.0, rising, falling))


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Split parameters into weights of linear maps, which decay, embeddings, and all others.

    By module and not by shape: a bias per level and head is a matrix by shape only, and must not be pulled to zero.
    """
    of_maps, of_embeddings = (
        {id(m.weight) for m in model.modules() if isinstance(m, kind)} for kind in (nn.Linear, nn.Embedding)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in trained if id(p) in of_maps]
    embeddings = [p for p in trained if id(p) in of_embeddings - of_maps]
    others = [p for p in trained if id(p) not in of_maps | of_embeddings]
    groups: list[dict[str, object]] = [
        {"params": decaying, "weight_decay": config.weight_decay, "over": 1.0},
        {"params": others, "weight_decay": 0.0, "over": 1.0},
        {"params": embeddings, "weight_decay": 0.0, "over": config.embedding_lr},
    ]
    return [group for group in groups if group["params"]]
