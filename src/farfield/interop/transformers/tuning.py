"""Training the small parts of a converted model against the original: far-field parameters, low-rank changes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farfield.interop.transformers import cores
from farfield.interop.transformers.divergence import divergence, final_states, head_of
from farfield.interop.transformers.lora import Adapters, projections, require_peft
from farfield.interop.transformers.structure import Block, blocks, check_pair, first_output

__all__ = ["PRECISIONS", "Losses", "TuneConfig", "Tuner", "check_tuning", "farfield_parameters"]

PRECISIONS = ("float32", "bfloat16")
"""Of products while training."""


@dataclass(frozen=True)
class TuneConfig:
    """How to train. At least one of ``steps`` and ``seconds``; whichever comes first ends it.

    Attributes:
        steps: windows to train on, one a step.
        seconds: of training; no step begins that would probably end later.
        lora: rank of the changes to attention projections; 0 for none.
        lr: highest rate of Adam.
        warmup: share of the whole in which the rate rises, before it falls to 0 as a cosine.
        layer_weight: what the mean relative squared error of a layer's output counts beside the divergence.
        clip: norm of the gradient beyond which it is shortened.
        recompute: forget what is inside layers, and compute it again for the gradient: less memory, more time.
        precision: "float32" for products in the model's own dtype, or "bfloat16" for products in it (autocast), which
            processors and cards that multiply bfloat16 by themselves do several times faster; parameters stay as they
            are, what the original gives is rounded to it.
        keep_targets: keep what the original gave for a window until the window comes again: with layer_weight all
            layers' outputs, (layers + 1) * N * width numbers, otherwise the last. The same training, memory for time.
        seed: of the order of windows and of the low-rank factors.
    """

    steps: int | None = None
    seconds: float | None = None
    lora: int = 8
    lr: float = 2e-3
    warmup: float = 0.1
    layer_weight: float = 1.0
    clip: float = 1.0
    recompute: bool = True
    precision: str = "float32"
    keep_targets: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: one of {', '.join(PRECISIONS)} would be accepted")
        if self.steps is None and self.seconds is None:
            raise ValueError("steps=None, seconds=None: at least one of them says when training ends")
        positive = {"steps": self.steps, "seconds": self.seconds, "lr": self.lr, "clip": self.clip}
        for name, value in positive.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value!r}: a number > 0 would be accepted")
        for name, value in {"lora": self.lora, "layer_weight": self.layer_weight, "seed": self.seed}.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value!r}: a number >= 0 would be accepted")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup!r}: a share in [0, 1) would be accepted")


class Losses(NamedTuple):
    """Of one step.

    Attributes:
        divergence: from the original, nats per token.
        layers: mean relative squared error of the layers' outputs.
    """

    divergence: float
    layers: float


def farfield_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The far-field parameters that `configure` gave a model, by name; none after a conversion."""
    return {name: p for name, p in model.named_parameters() if f".{cores.NAME}." in f".{name}"}


def check_tuning(model: Any, original: Any, windows: Sequence[Tensor], config: TuneConfig) -> None:
    """Checks what a :class:`Tuner` is asked for.

    Raises:
        ValueError, ModuleNotFoundError: as that does.
    """
    check_pair(original, model)
    if not windows:
        raise ValueError("no windows to train on: at least one is needed")
    if config.precision == "bfloat16" and any(p.dtype == torch.float64 for p in model.parameters()):
        raise ValueError("precision='bfloat16' with a model in float64: 'float32', its own precision, would do")
    if config.lora:
        require_peft(config.lora)
        projections(model)
    elif not farfield_parameters(model):
        raise ValueError(
            "nothing to train: the model has no far-field parameters, as after a conversion, and lora=0; "
            "lora=8 would be accepted"
        )


class Tuner:
    """Adam on far-field parameters and low-rank changes of the attention projections.

    The loss of a window is the divergence of the next tokens from the original's, in nats per token, and
    ``layer_weight`` times the squared error of each layer's output relative to the original's, mean over tokens and
    layers. Of both models, all layers' outputs `[N, width]` of one window are held at once.

    Args:
        model: converted; frozen but for what is trained, until :meth:`finish`.
        original: what it was converted from.
        windows: token ids [N] each, taken in an order drawn anew for each round.
        config: how to train.

    Raises:
        ValueError: for models that do not fit each other, no windows, or nothing to train.
        ModuleNotFoundError: for low-rank changes without peft.
    """

    def __init__(self, model: Any, original: Any, windows: Sequence[Tensor], config: TuneConfig) -> None:
        check_tuning(model, original, windows, config)
        self.model, self.original, self.config = model, original, config
        self.windows = [ids.to(next(model.parameters()).device) for ids in windows]
        self.history: list[Losses] = []
        self.seconds = 0.0
        self._targets: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._blocks, self._patterns = blocks(model), blocks(original)
        self._heads = head_of(model), head_of(original)
        self._required = {id(p): p.requires_grad for p in model.parameters()}
        self._began = {name: p.detach().clone() for name, p in farfield_parameters(model).items()}
        self._adapters = Adapters(model, config.lora, config.seed) if config.lora else None
        for p in model.parameters():
            p.requires_grad_(False)
        self.parameters = farfield_parameters(model)
        if self._adapters is not None:
            self.parameters |= self._adapters.parameters()
        for p in self.parameters.values():
            p.requires_grad_(True)
        self._adam = torch.optim.Adam(self.parameters.values(), lr=config.lr)

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.history)

    @property
    def tokens(self) -> int:
        """Tokens trained on, windows that came twice counted twice."""
        return sum(len(self.windows[self._place(step)]) for step in range(self.step))

    @property
    def fraction(self) -> float:
        """How much of the whole is done, 0 to 1."""
        return min(1.0, max(self._shares(0.0)))

    @property
    def done(self) -> bool:
        """Whether the steps are taken, or another would probably not end in time."""
        if self.step == 0:
            return False
        config = self.config
        late = config.seconds is not None and self.seconds * (1 + 1 / self.step) > config.seconds
        return late or (config.steps is not None and self.step >= config.steps)

    def run(
        self,
        on_progress: Callable[[Losses], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Trains until it is done.

        Args:
            on_progress: called after each step.
            should_stop: asked before each step; ends the run, which another call continues.

        Raises:
            ArithmeticError: when the loss is not finite; parameters are those before that step.
        """
        while not self.done and not (should_stop is not None and should_stop()):
            start = time.perf_counter()
            losses = self._take_step()
            self.seconds += time.perf_counter() - start
            self.history.append(losses)
            if on_progress is not None:
                on_progress(losses)

    def finish(self, keep: bool) -> None:
        """Merges what was trained into the model, or undoes it; the model is then as plain as it was.

        Args:
            keep: False puts back the parameters from before training.
        """
        if self._adapters is not None:
            if keep:
                self._adapters.merge()
            else:
                self._adapters.remove()
        if not keep:
            with torch.no_grad():
                for name, p in farfield_parameters(self.model).items():
                    p.copy_(self._began[name])
        self._targets.clear()
        for p in self.model.parameters():
            p.grad = None
            p.requires_grad_(self._required.get(id(p), True))

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, the optimiser's moments, losses and seconds, with which another tuner goes on bit for bit."""
        state = {
            "tuner.history": torch.tensor(self.history, dtype=torch.float64).reshape(-1, 2),
            "tuner.seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }
        for name, p in self.parameters.items():
            state[f"tuner.parameter.{name}"] = p.detach().clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self._adam.state[p]:
                    state[f"tuner.{moment}.{name}"] = self._adam.state[p][moment].clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to where a tuner of the same models, windows and settings stood.

        Raises:
            ValueError: when other parameters were trained.
        """
        saved = {name: t for name, t in state.items() if name.startswith("tuner.parameter.")}
        shapes = {f"tuner.parameter.{name}": p.shape for name, p in self.parameters.items()}
        if {name: t.shape for name, t in saved.items()} != shapes:
            raise ValueError(
                f"the saved state has {len(saved)} trained tensors that are not the {len(shapes)} of this model and "
                f"lora={self.config.lora}"
            )
        self.history = [Losses(*row) for row in state["tuner.history"].tolist()]
        self.seconds = float(state["tuner.seconds"])
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state[f"tuner.parameter.{name}"])
                if self.history:
                    moments = {m: state[f"tuner.{m}.{name}"].to(p.device) for m in ("exp_avg", "exp_avg_sq")}
                    self._adam.state[p] = {"step": torch.tensor(float(self.step)), **moments}

    def _place(self, step: int) -> int:
        """Which window a step takes."""
        turn, place = divmod(step, len(self.windows))
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + turn)
        return int(torch.randperm(len(self.windows), generator=generator)[place])

    def _wanted(self, place: int) -> tuple[Tensor, list[Tensor]]:
        """What the original gives for a window: final states, and the layers' outputs where they count."""
        if place in self._targets:
            return self._targets[place]
        patterns = self._patterns if self.config.layer_weight else []
        with torch.no_grad(), self._lowered(), _outputs(patterns) as layers:
            states = final_states(self.original, self.windows[place])
        dtype = torch.bfloat16 if self.config.precision == "bfloat16" else states.dtype
        found = states.to(dtype), [x.to(dtype) for x in layers]
        # Where there is another round; a window that does not come again is not kept.
        comes_again = self.config.steps is None or self.step + len(self.windows) < self.config.steps
        if self.config.keep_targets and comes_again:
            self._targets[place] = found
        return found

    def _shares(self, ahead: float) -> list[float]:
        """Shares of steps and of seconds, so many steps ahead."""
        config, steps = self.config, self.step + ahead
        each = self.seconds / self.step if self.step else 0.0
        by_steps = [] if config.steps is None else [steps / config.steps]
        return by_steps + ([] if config.seconds is None else [each * steps / config.seconds])

    def _rate(self) -> float:
        """The rate of this step, taken at its middle."""
        at, warmup = min(1.0, max(self._shares(0.5))), self.config.warmup
        if at < warmup:
            # Not nothing in a first step, whose share of the time is not known.
            return self.config.lr * max(at / warmup, 0.1)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup)))

    def _lowered(self) -> torch.autocast:
        device = next(iter(self.parameters.values())).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _take_step(self) -> Losses:
        place, config = self._place(self.step), self.config
        ids, layers = self.windows[place], bool(config.layer_weight)
        targets, wanted = self._wanted(place)
        forgetting = _recomputed(self._blocks) if config.recompute else nullcontext()
        with torch.enable_grad(), self._lowered(), _outputs(self._blocks if layers else []) as given, forgetting:
            states = final_states(self.model, ids)
            apart = divergence(states, targets, *self._heads) / len(ids)
            pairs = zip(given, wanted, strict=True)
            # Kept as the two states alone: their difference is made again for the gradient.
            errors = [checkpoint(_relative, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in pairs]
            error = torch.stack(errors).mean() if errors else torch.zeros_like(apart)
            loss = apart + config.layer_weight * error
        losses = Losses(float(apart.detach()), float(error.detach()))
        if not math.isfinite(losses.divergence + losses.layers):
            raise ArithmeticError(
                f"step {self.step + 1}: the divergence is {losses.divergence}, the layers' error {losses.layers}; a "
                f"lower lr than {config.lr:g} may help"
            )
        self._adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        for group in self._adam.param_groups:
            group["lr"] = self._rate()
        self._adam.step()
        return losses


def _relative(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of the squared error of states `[1, N, width]`, relative to what is wanted."""
    given, wanted = given.float(), wanted.float()
    square = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((given - wanted).square().sum(-1) / square).mean()


@contextmanager
def _outputs(found: Sequence[Block]) -> Iterator[list[Tensor]]:
    """While open, collects what the layers give."""
    kept: list[Tensor] = []
    handles = [block.layer.register_forward_hook(lambda _, __, out: kept.append(first_output(out))) for block in found]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recomputed(found: Sequence[Block]) -> Iterator[None]:
    """While open, layers keep their inputs alone; Transformers' own way asks for training mode, and so for dropout."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    for block in found:
        block.layer.forward = wrap(block.layer.forward)
    try:
        yield
    finally:
        for block in found:
            block.layer.__dict__.pop("forward", None)
