"""Distilling: a converted model brought nearer to its original, by a fit and by training, and judged on other text."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield import __version__
from farfield.interop.transformers.divergence import Yardstick
from farfield.interop.transformers.refit import Refit, check_refit, refit
from farfield.interop.transformers.structure import blocks, check_pair, output_projection
from farfield.interop.transformers.tuning import Losses, TuneConfig, Tuner, check_tuning

__all__ = ["CONVERSION", "Distillation", "Windows", "save"]

CONVERSION = "conversion.json"

Checkpoint = Callable[[bool], None]
"""Called when :meth:`Distillation.state` can be saved, with whether it should be now."""

Progress = Callable[[str, float, str], None]
"""Called with the stage in words, the share of it that is done, and a word on how it stands."""


@dataclass(frozen=True)
class Windows:
    """Text as windows of token ids [N] each.

    Attributes:
        refit: to fit output projections on; none for no such stage.
        train: to train on.
        held: to judge by; nothing is fitted to or trained on them.
    """

    refit: Sequence[Tensor]
    train: Sequence[Tensor]
    held: Sequence[Tensor]


class Distillation:
    """Both stages, each kept only if it brings the model nearer to the original on held-out text.

    Args:
        model: converted or configured; changed in place by :meth:`run`.
        original: what it was made from; not changed.
        windows: of text.
        tune: how to train; None for the fit alone.
        target: of the fit, "state" or "output" (:func:`farfield.interop.transformers.refit.refit`).

    Raises:
        ValueError: for models that do not fit each other, or when there is nothing to do, fit or train.
        ModuleNotFoundError: for low-rank changes without peft.
    """

    def __init__(
        self, model: Any, original: Any, windows: Windows, tune: TuneConfig | None, *, target: str = "state"
    ) -> None:
        check_pair(original, model)
        if not windows.refit and tune is None:
            raise ValueError("nothing to do: no windows to refit on, and no training")
        if not windows.held:
            raise ValueError("no held-out windows: at least one is needed to see whether the model came nearer")
        if windows.refit:
            check_refit(model, original, windows.refit, target)
        if tune is not None:
            check_tuning(model, original, windows.train, tune)
        self.model, self.original, self.windows, self.tune, self.target = model, original, windows, tune, target
        self.before: float | None = None
        self.fitted: dict[str, Any] | None = None
        self.tuner: Tuner | None = None
        # Held from now on: while low-rank changes are trained, other modules stand in their place.
        self._projections = {
            f"{block.name}.{name}": p
            for block in (blocks(model) if windows.refit else [])
            for name, p in output_projection(block).named_parameters()
        }
        self._began = time.perf_counter()
        self._saved_seconds = 0.0
        self._restored: dict[str, Tensor] = {}

    @property
    def seconds(self) -> float:
        """Since the beginning, also that of an earlier run which this one continues."""
        return self._saved_seconds + time.perf_counter() - self._began

    def run(
        self,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, Any]:
        """Does what is left to do; the model is then the best of what was reached.

        Args:
            progress: told of every step.
            should_stop: asked between steps; what was reached until then is judged and kept.
            checkpoint: called after the fit, after each step of training and when that is stopped.

        Returns:
            The report, JSON-able: the divergence from the original on held-out text before, after each stage and in
            the end, what became of each layer and each step, whether it was kept, seconds and tokens.

        Raises:
            ArithmeticError: when numbers are not finite; the model is then as it was before that stage.
        """
        tell: Progress = progress or (lambda stage, share, word: None)
        rule = Yardstick(self.original, self.windows.held)
        if self.before is None:
            self.before = rule.measure(self.model)
            if not math.isfinite(self.before):
                raise ArithmeticError(f"the divergence from the original is {self.before}: logits are not finite")
        tell("held-out text", 1.0, f"{self.before:.5f} nats per token from the original")
        if self.windows.refit and self.fitted is None:
            fitted = self._fit(rule, self.before, tell, should_stop)
            # A fit that was stopped half way is not one to go on from.
            if not fitted["stopped"] and checkpoint is not None:
                self.fitted = fitted
                checkpoint(True)
            self.fitted = fitted
        now = self.fitted["divergence"] if self.fitted is not None and self.fitted["kept"] else self.before
        trained = None
        if self.tune is not None and not (self.fitted is not None and self.fitted["stopped"]):
            trained = self._train(rule, now, tell, should_stop, checkpoint)
            now = trained["divergence"] if trained["kept"] else now
        return {
            "farfield": __version__,
            "divergence": {"before": self.before, "after": now, "windows": len(rule.windows)},
            "held_out_tokens": sum(map(len, self.windows.held)),
            "refit": self.fitted,
            "training": trained,
            "tokens": (self.fitted or {}).get("tokens", 0) + (trained or {}).get("tokens", 0),
            "seconds": self.seconds,
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What another `Distillation` of the same models, windows and settings needs to go on: tensors, and JSON."""
        tensors = {} if self.tuner is None else self.tuner.state_dict()
        if self.fitted is not None and self.fitted["kept"]:
            tensors |= {f"fitted.{name}": p.detach().clone() for name, p in self._projections.items()}
        return tensors, {"before": self.before, "fitted": self.fitted, "seconds": self.seconds}

    def load_state(self, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        """Goes back to what :meth:`state` gave; :meth:`run` then continues.

        Raises:
            ValueError: when the state is of another model.
        """
        fitted = {name.removeprefix("fitted."): t for name, t in tensors.items() if name.startswith("fitted.")}
        if fitted:
            own = self._projections
            if {name: t.shape for name, t in fitted.items()} != {name: t.shape for name, t in own.items()}:
                raise ValueError(f"the saved state has projections {sorted(fitted)}, the model has {sorted(own)}")
            self._put(fitted)
        self.before, self.fitted, self._saved_seconds = told["before"], told["fitted"], told["seconds"]
        self._restored = {name: t for name, t in tensors.items() if name.startswith("tuner.")}

    def _fit(
        self, rule: Yardstick, before: float, tell: Progress, should_stop: Callable[[], bool] | None
    ) -> dict[str, Any]:
        start = time.perf_counter()
        old = {name: p.detach().clone() for name, p in self._projections.items()}
        kept = False
        try:
            done: list[Refit] = refit(
                self.model, self.original, self.windows.refit, target=self.target, should_stop=should_stop,
                progress=lambda n, total: tell("refit", n / total, f"{n} of {total} layers"),
            )  # fmt: skip
            after = rule.measure(self.model)
            kept = after < before
        finally:
            if not kept:
                self._put(old)
        tell("refit", 1.0, f"{after:.5f} nats per token" + ("" if kept else ", no better: undone"))
        return {
            "kept": kept,
            "stopped": len(done) < len(blocks(self.model)),
            "divergence": after,
            "target": self.target,
            "layers": [layer._asdict() for layer in done],
            "tokens": sum(map(len, self.windows.refit)),
            "seconds": time.perf_counter() - start,
        }

    def _train(
        self,
        rule: Yardstick,
        before: float,
        tell: Progress,
        should_stop: Callable[[], bool] | None,
        checkpoint: Checkpoint | None,
    ) -> dict[str, Any]:
        assert self.tune is not None
        tuner = self.tuner = Tuner(self.model, self.original, self.windows.train, self.tune)
        keep = False
        try:
            if self._restored:
                tuner.load_state_dict(self._restored)

            def step(losses: Losses) -> None:
                word = f"step {tuner.step}, {losses.divergence:.5f} nats per token, layers {losses.layers:.5f}"
                tell("training", tuner.fraction, word)
                if checkpoint is not None:
                    checkpoint(False)

            tuner.run(step, should_stop)
            if not tuner.done and checkpoint is not None:
                checkpoint(True)
            after = rule.measure(self.model) if tuner.step else before
            keep = after < before
        finally:
            numbers = sum(p.numel() for p in tuner.parameters.values())
            tuner.finish(keep)
        tell("training", 1.0, f"{after:.5f} nats per token" + ("" if keep else ", no better: undone"))
        return {
            "kept": keep,
            "stopped": not tuner.done,
            "divergence": after,
            "settings": asdict(self.tune),
            "trained_numbers": numbers,
            "steps": tuner.step,
            "losses": [losses._asdict() for losses in tuner.history],
            "tokens": tuner.tokens,
            "seconds": tuner.seconds,
        }

    def _put(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self._projections.items():
                p.copy_(tensors[name])


def save(
    model: Any, tokenizer: Any, report: dict[str, Any], folder: str | Path, converted: str | Path, **more: Any
) -> None:
    """Writes model, tokenizer and `conversion.json` to a folder, which is read as the converted model's was.

    Args:
        model, report: after and of :meth:`Distillation.run`.
        tokenizer: the model's; None to write none.
        folder: made where it does not exist.
        converted: the folder of the converted model, whose `conversion.json`, if any, is extended by "distillation".
        **more: further entries of that.
    """
    path, source = Path(folder), Path(converted) / CONVERSION
    told: dict[str, Any] = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    entry = {**more, **report}
    if "distillation" in told:
        entry["earlier"] = told["distillation"]
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    text = json.dumps({**told, "distillation": entry}, indent=1) + "\n"
    (path / CONVERSION).write_text(text, encoding="utf-8")
