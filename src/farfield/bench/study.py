"""Training evidence: one small language model for every variant, context, batch and seed of a study.

Where `farfield.bench.compare` asks which attention suits a text, a study asks what a recipe's options, the context or
the batch change. Every run of a study begins from the same numbers and reads text in the same order as far as its
context and batch allow. A run's file is written when the run is finished and never before, and a finished run is not
made again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from farfield import recipes
from farfield.bench.compare import LEAST_WINDOWS, MOST_WINDOWS, RunResult, describe_text
from farfield.bench.machine import describe_machine
from farfield.bench.memory import PeakMemory
from farfield.bench.pace import TURNS, Pace, keep_paces, kept_paces, measure_paces, paced_steps
from farfield.bench.ramps import ramp_file, take_ramp
from farfield.bench.runs import Failure, Stopped, Watcher, make_runs, mixed_machines, read_json, run_file, thin
from farfield.bench.variants import Variant, parse_variant
from farfield.data.text import Corpus, Split
from farfield.models.language import LanguageConfig, LanguageModel
from farfield.training.evaluate import evaluate
from farfield.training.loop import Batches, Progress, TextWindows, TrainConfig, Trainer
from farfield.training.masked import MASK, MaskedModel, MaskedWindows, evaluate_masked
from farfield.training.ramp import RampedBatches

__all__ = [
    "RUN_FORMAT",
    "STUDY_FORMAT",
    "TASKS",
    "Cell",
    "Study",
    "StudyOutcome",
    "StudyRun",
    "level_biases",
    "study",
    "study_paces",
]

RUN_FORMAT = "farfield-study-run/1"
STUDY_FORMAT = "farfield-study/1"
TASKS = ("next", "masked")
"""Predict the next byte, or hidden bytes from both sides."""
PACE_FILE = "pace.json"
_BUDGETS = ("steps", "seconds", "tokens")
_MODEL = ("dim", "depth", "heads", "shift")


class Cell(NamedTuple):
    """One place of a study's table: its runs differ in the seed only."""

    variant: Variant
    context: int
    batch: int

    @property
    def name(self) -> str:
        """As files and displays call it."""
        return f"{self.variant.label}-n{self.context}-b{self.batch}"


@dataclass(frozen=True)
class Study:
    """What is trained.

    Attributes:
        variants: attentions with options, see `farfield.bench.variants.parse_variant`.
        contexts: bytes seen at once.
        batches: sequences per step.
        seeds: of parameters and data order.
        task: "next" (causal) or "masked" (bidirectional).
        steps, seconds, tokens: the budget of each run, one of the three; ``tokens`` gives every run as many steps as
            fit, at least one, ``seconds`` as many as fit at the pace that is measured beforehand, see
            `farfield.bench.pace`.
        lr: peak learning rate.
        embedding_lr: that of embeddings over ``lr``.
        dim, depth, heads: of the model.
        ramp: (context, batch, steps) of every run before its budget begins, such as ``((512, 2, 600),)``: what can be
            learned from short windows costs less there. Equal for all variants, and in none of the counts of a run.
        shift: whether every position also reads the token before it, see `LanguageConfig`. Then no attention has to
            learn that first, which takes most of a short run, and dense attention's longest.
        eval_tokens: held-out bytes to read, in 8 windows at least, where the text has them, and 256 at most.
        device: where to train.
    """

    variants: tuple[Variant, ...]
    contexts: tuple[int, ...] = (2048,)
    batches: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (0,)
    task: str = "next"
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    lr: float = TrainConfig.lr
    embedding_lr: float = TrainConfig.embedding_lr
    dim: int = 128
    depth: int = 4
    heads: int = 4
    ramp: tuple[tuple[int, int, int], ...] = ()
    shift: bool = False
    eval_tokens: int = 98304
    device: str = "cpu"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """From JSON or TOML, where variants are words as on the command line.

        Raises:
            ValueError: for unknown settings, or variants that are none.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown settings {unknown} of a study; accepted are {known}")
        given = dict(values)
        for name in ("variants", "contexts", "batches", "seeds"):
            if name in given and not isinstance(given[name], list | tuple):
                raise ValueError(f"{name} of a study is a list, got {given[name]!r}")
            if name in given:
                given[name] = tuple(given[name])
        ramp = given.get("ramp", ())
        if not isinstance(ramp, list | tuple) or not all(isinstance(stage, list | tuple) for stage in ramp):
            raise ValueError(f"ramp of a study is a list of [context, batch, steps], got {ramp!r}")
        given["ramp"] = tuple(tuple(stage) for stage in ramp)
        given["variants"] = tuple(parse_variant(str(text)) for text in given.get("variants", ()))
        return cls(**given)

    def __post_init__(self) -> None:
        """Check each setting, so that a wrong one is reported by its own name.

        Raises:
            ValueError: with what was given and what would be accepted.
        """
        if not self.variants:
            raise ValueError("a study needs variants, such as dense or fma+open=fma:open=16")
        labels = [variant.label for variant in self.variants]
        for name, listed in (
            ("variants", labels),
            ("contexts", self.contexts),
            ("batches", self.batches),
            ("seeds", self.seeds),
        ):
            if not listed:
                raise ValueError(f"{name} of a study must not be empty")
            if len(set(listed)) < len(listed):
                raise ValueError(f"{name} of a study name something twice: {', '.join(map(str, listed))}")
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r}: one of {', '.join(TASKS)} would be accepted")
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            said = ", ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none"
            raise ValueError(f"a study has one budget, {' or '.join(_BUDGETS)}; got {said}")
        for name in ("tokens", "eval_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for stage in self.ramp:
            whole = all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in stage)
            if len(stage) != 3 or not whole:
                raise ValueError(f"a stage of a ramp is (context, batch, steps), each at least 1; got {stage!r}")
        if not isinstance(self.shift, bool):
            raise ValueError(f"shift must be true or false, got {self.shift!r}")
        for cell in self.cells:
            self.train_config(cell, self.seeds[0])
            self.model_config(cell)

    @property
    def cells(self) -> list[Cell]:
        """Variants alternating within a context and batch, so that a machine that slows down slows all of them."""
        return [Cell(v, n, b) for n in self.contexts for b in self.batches for v in self.variants]

    @property
    def plan(self) -> list[tuple[str, int]]:
        """All runs, as (name of the cell, seed); seed by seed."""
        return [(cell.name, seed) for seed in self.seeds for cell in self.cells]

    @property
    def causal(self) -> bool:
        """Whether the models are."""
        return self.task == "next"

    @property
    def unit(self) -> str:
        """Of the numbers in the table."""
        return "bits per byte" if self.task == "next" else "bits per hidden byte"

    @property
    def budget_in_words(self) -> str:
        """Such as ``600 steps each``."""
        before = f" after {self.ramp_steps:,} on shorter windows" if self.ramp else ""
        if self.steps is not None:
            return f"{self.steps:,} step{'s' * (self.steps != 1)} each{before}"
        if self.seconds is not None:
            return f"{self.seconds:g} s of training each{before}, at the pace measured beforehand"
        return f"{self.tokens:,} bytes each{before}"

    def model_config(self, cell: Cell) -> LanguageConfig:
        """The model of a cell."""
        return LanguageConfig(
            cell.variant.recipe,
            cell.variant.options,
            dim=self.dim,
            depth=self.depth,
            num_heads=self.heads,
            vocab=256 if self.causal else MASK + 1,
            context=cell.context,
            causal=self.causal,
            shift=self.shift,
        )

    def train_config(self, cell: Cell, seed: int, pace: Pace | None = None) -> TrainConfig:
        """The training of one run; a budget in seconds becomes steps with the ``pace`` of the cell only."""
        steps, seconds = self.steps, self.seconds
        if self.tokens is not None:
            steps = max(1, self.tokens // (cell.batch * cell.context))
        elif seconds is not None and pace is not None:
            steps, seconds = paced_steps(seconds, pace), None
        return TrainConfig(
            context=cell.context,
            batch=cell.batch,
            lr=self.lr,
            embedding_lr=self.embedding_lr,
            seed=seed,
            steps=steps,
            seconds=seconds,
        )

    def trainer(
        self,
        cell: Cell,
        seed: int,
        train: npt.NDArray[np.uint8],
        *,
        pace: Pace | None = None,
        steps: int | None = None,
    ) -> Trainer:
        """The trainer of one run; ``steps`` ends it there, whatever the budget."""
        config = self.train_config(cell, seed, pace)
        batches = self.batches_of(cell, train, seed)
        if steps is not None:
            config = dataclasses.replace(config, steps=steps, seconds=None)
        elif self.ramp:
            assert config.steps is not None, "a budget in seconds needs the pace of its cell"
            stages = [
                (self.batches_of(Cell(cell.variant, context, batch), train, seed), taken)
                for context, batch, taken in self.ramp
            ]
            batches = RampedBatches(stages, batches)
            # The rate rises in the ramp and falls where the context is whole, so that one ramp serves all budgets.
            whole = config.steps + self.ramp_steps
            config = dataclasses.replace(
                config,
                steps=whole,
                warmup=config.warmup * self.ramp_steps / whole,
                cooldown=config.cooldown * config.steps / whole,
            )
        return Trainer(self.build(cell, seed), batches, config)

    def build(self, cell: Cell, seed: int) -> LanguageModel:
        """The untrained model of one run."""
        kind = LanguageModel if self.causal else MaskedModel
        return kind(self.model_config(cell), seed=seed).to(self.device)

    @property
    def ramp_steps(self) -> int:
        """Before the budget of a run."""
        return sum(steps for _, _, steps in self.ramp)

    def batches_of(self, cell: Cell, train: npt.NDArray[np.uint8], seed: int) -> Batches:
        """The training batches of one run."""
        kind = TextWindows if self.causal else MaskedWindows
        return kind(train, cell.context, cell.batch, seed)

    def validate(self) -> None:
        """Builds every model and runs it on one token block, so that what cannot work is refused before training.

        Raises:
            ValueError: with the variant and the reason.
        """
        for cell in self.cells:
            try:
                model = self.build(cell, self.seeds[0])
                with torch.no_grad():
                    model(torch.zeros(1, min(cell.context, 256), dtype=torch.int64, device=self.device))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{cell.variant.label} at context {cell.context:,}: {error}") from error

    def key(
        self, cell: Cell, seed: int, fingerprint: str, machine: Mapping[str, Any], pace: Pace | None = None
    ) -> dict[str, Any]:
        """The settings that decide a run's numbers, as JSON gives them back."""
        asked: dict[str, Any] = {
            "label": cell.variant.label,
            "recipe": cell.variant.recipe,
            "options": dict(cell.variant.options),
            "defaults": _defaults(cell.variant),
            "context": cell.context,
            "batch": cell.batch,
            "seed": seed,
            **{name: getattr(self, name) for name in ("task", *_BUDGETS, "lr", "embedding_lr", "ramp", *_MODEL)},
            "eval_tokens": self.eval_tokens,
            "device": self.device,
            "text": fingerprint[:16],
        }
        if self.seconds is not None:  # equal time means something on one machine only
            asked |= {"processor": machine["processor"], "threads": machine["threads"]}
            if pace is not None:
                asked["paced_steps"] = paced_steps(self.seconds, pace)
        return _as_json(asked)

    def ramp_key(self, cell: Cell, seed: int, train: npt.NDArray[np.uint8], fingerprint: str) -> dict[str, Any]:
        """The settings that decide the numbers after the ramp, as JSON gives them back."""
        return _as_json(
            {
                "recipe": cell.variant.recipe,
                "options": dict(cell.variant.options),
                "defaults": _defaults(cell.variant),
                "seed": seed,
                **{name: getattr(self, name) for name in ("task", "lr", "embedding_lr", "ramp", *_MODEL, "device")},
                "threads": torch.get_num_threads(),
                "text": [fingerprint, len(train)],
            }
        )

    def pace_key(self, cell: Cell, machine: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that decide how long a step of a cell takes, as JSON gives them back."""
        return _as_json(
            {
                "recipe": cell.variant.recipe,
                "options": dict(cell.variant.options),
                "defaults": _defaults(cell.variant),
                **{name: getattr(self, name) for name in ("task", *_MODEL, "device")},
                "processor": machine["processor"],
                "threads": machine["threads"],
            }
        )

    def as_json(self) -> dict[str, Any]:
        """For the study's file."""
        return _as_json(dataclasses.asdict(self))


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As a file gives them back: lists for tuples."""
    read_back: dict[str, Any] = json.loads(json.dumps(values))
    return read_back


@dataclass(frozen=True)
class StudyRun(RunResult):
    """A finished run of a study; ``attention`` is the name of its cell, and ``key`` says what that was.

    Steps, tokens and seconds are those after the ramp; the curve begins with it.

    Attributes:
        level_bias: per layer, the mean over heads of the learned bias of the first levels; empty without.
        pace: seconds per step as measured in turn with the other variants, which gave a budget in seconds its steps;
            None for other budgets.
    """

    level_bias: tuple[tuple[float, ...], ...] = ()
    pace: float | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StudyRun:
        """The inverse of ``dataclasses.asdict`` through JSON.

        Raises:
            KeyError, TypeError, ValueError: for anything else.
        """
        run = super().from_json(values)
        assert isinstance(run, StudyRun)
        pace = values.get("pace")
        return dataclasses.replace(
            run,
            level_bias=tuple(tuple(row) for row in values["level_bias"]),
            pace=None if pace is None else float(pace),
        )


@dataclass
class StudyOutcome:
    """What a study found.

    Attributes:
        study, text, machine: what was asked for, of what, on what.
        runs: finished ones, in the order of the plan.
        failures: runs that diverged or ran out of memory.
        notes: what else a reader should know.
        interrupted: whether the user ended it early.
        unfinished: the run that was under way then.
    """

    study: Study
    text: dict[str, Any]
    machine: dict[str, Any]
    runs: list[StudyRun] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    unfinished: tuple[str, int] | None = None


def study(
    plan: Study,
    corpus: Corpus,
    folder: Path,
    *,
    watcher: Watcher | None = None,
    should_stop: Callable[[], bool] | None = None,
    before_first_run: Callable[[], None] | None = None,
    ramps: Path | None = None,
) -> StudyOutcome:
    """Trains what is not there yet.

    Args:
        plan: what to train.
        corpus: the text.
        folder: gets ``runs/<cell>-seed<k>.json`` as each run finishes; several studies may share it. With a budget in
            seconds also ``pace.json``, the seconds per step, which are measured once.
        watcher: told what happens.
        should_stop: asked between steps and windows; true ends the study with what is finished.
        before_first_run: called once everything is checked, before anything is trained or written.
        ramps: where states after the ramp are kept, which several studies may share; None for ``folder/ramps``.

    Raises:
        ValueError: for settings that cannot work, text that is too short, or a finished run with other settings;
            nothing is written then.
        OSError: when a run cannot be saved.
    """
    watcher, stop = watcher or Watcher(), should_stop or (lambda: False)
    plan.validate()
    splits = {context: corpus.split(context) for context in plan.contexts}
    machine = describe_machine(plan.device)
    cells = {cell.name: cell for cell in plan.cells}

    pace_keys = {name: plan.pace_key(cell, machine) for name, cell in cells.items()}
    paces = kept_paces(folder / PACE_FILE, pace_keys) if plan.seconds is not None else {}

    def key(name: str, seed: int) -> dict[str, Any]:
        return plan.key(cells[name], seed, corpus.fingerprint, machine, (paces or {}).get(name))

    found = finished_runs(folder, plan.plan, key)
    outcome = StudyOutcome(plan, describe_text(corpus, splits[max(plan.contexts)]), machine)
    if before_first_run is not None:
        before_first_run()
    if paces is None:
        paces = study_paces(plan, corpus, folder, watcher=watcher, should_stop=stop)
        if paces is None:
            outcome.interrupted = True
            return outcome
    measured = paces

    def warm_up(name: str) -> None:
        # Two steps that count for nothing: thread pools, tables and memory pages are there for every variant.
        cell = cells[name]
        plan.trainer(cell, plan.seeds[0], splits[cell.context].train, steps=2).run()

    make_runs(
        plan.plan,
        found,
        outcome,
        folder,
        one_run=lambda name, seed: _one_run(
            plan,
            cells[name],
            seed,
            splits[cells[name].context],
            measured.get(name),
            key(name, seed),
            ramp_file(
                ramps or folder / "ramps",
                plan.ramp_key(cells[name], seed, splits[cells[name].context].train, corpus.fingerprint),
            ),
            watcher,
            stop,
        ),
        warm_up=warm_up,
        run_format=RUN_FORMAT,
        machine=machine,
        watcher=watcher,
        stop=stop,
    )
    outcome.notes += mixed_machines(outcome.runs)
    return outcome


def study_paces(
    plan: Study,
    corpus: Corpus,
    folder: Path,
    *,
    watcher: Watcher | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Pace] | None:
    """The seconds per step of every cell, all variants of a context and batch in turn.

    Args:
        plan, corpus, folder, watcher, should_stop: as in `study`.

    Returns:
        What ``folder/pace.json`` holds, or else holds now; None where it was stopped.

    Raises:
        ValueError: for settings that cannot work, text that is too short, or a file that misses a cell of the plan.
        OSError: when the file cannot be written.
    """
    watcher, stop = watcher or Watcher(), should_stop or (lambda: False)
    plan.validate()
    machine = describe_machine(plan.device)
    keys = {cell.name: plan.pace_key(cell, machine) for cell in plan.cells}
    paces = kept_paces(folder / PACE_FILE, keys)
    if paces is not None:
        return paces
    paces = {}
    for context, batch in dict.fromkeys((cell.context, cell.batch) for cell in plan.cells):
        train = corpus.split(context).train
        trainers = {
            cell.name: partial(plan.trainer, cell, plan.seeds[0], train, steps=TURNS + 1)
            for cell in plan.cells
            if (cell.context, cell.batch) == (context, batch)
        }
        place = f"context {context:,}, batch {batch}"
        found = measure_paces(trainers, should_stop=stop, on_turn=partial(watcher.on_pace, place))
        if found is None:
            return None
        paces |= found
    keep_paces(folder / PACE_FILE, paces, keys)
    return paces


def finished_runs(
    folder: Path, plan: Sequence[tuple[str, int]], key: Callable[[str, int], Mapping[str, Any]]
) -> dict[tuple[str, int], StudyRun]:
    """The runs of the plan that ``folder`` holds.

    Raises:
        ValueError: when one of them is damaged or was made with other settings.
    """
    found = {}
    for name, seed in plan:
        path = run_file(folder, name, seed)
        if not path.exists():
            continue
        values = read_json(path)
        try:
            if values.get("format") != RUN_FORMAT:
                raise ValueError("another format")
            run = StudyRun.from_json(values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a finished run of farfield study ({error}); delete it or give another --out"
            ) from error
        wanted = key(name, seed)
        different = [
            f"{word} {run.key.get(word)!r} there, {wanted.get(word)!r} now"
            for word in dict.fromkeys([*wanted, *run.key])
            if run.key.get(word) != wanted.get(word)
        ]
        if different:
            raise ValueError(f"{path} has other settings ({'; '.join(different)}); give another label or --out")
        found[name, seed] = run
    return found


def _defaults(variant: Variant) -> dict[str, Any]:
    """Of the options that are not given: with another default it is another run."""
    return {k: v for k, v in recipes.options(variant.recipe, 1).items() if k not in variant.options}


def level_biases(model: nn.Module, levels: int = 8) -> tuple[tuple[float, ...], ...]:
    """Per layer of a language model, the learned biases of its first levels, means over heads; empty without."""
    far: list[Any] = [getattr(block.attention, "far", None) for block in model.blocks]  # type: ignore[union-attr]
    learned = [part.biases() for part in far if getattr(part, "level_bias", None) is not None]
    return tuple(tuple(round(v, 2) for v in bias.detach().mean(1)[:levels].tolist()) for bias in learned)


def _one_run(
    plan: Study,
    cell: Cell,
    seed: int,
    split: Split,
    pace: Pace | None,
    key: Mapping[str, Any],
    ramp: Path,
    watcher: Watcher,
    stop: Callable[[], bool],
) -> StudyRun:
    with PeakMemory(plan.device) as peak:
        trainer = plan.trainer(cell, seed, split.train, pace=pace)
        model = trainer.model
        assert isinstance(model, LanguageModel)

        def run(enough: Callable[[], bool]) -> list[Progress]:
            return trainer.run(
                on_progress=lambda p: watcher.on_step(p, trainer.fraction), should_stop=lambda: stop() or enough()
            )

        if plan.ramp:
            take_ramp(trainer, plan.ramp_steps, ramp, run)
        history = run(lambda: False)
        if not trainer.done:
            raise Stopped

    def on_window(done: int, total: int) -> None:
        if done:
            watcher.on_window(done, total)
        if done < total and stop():
            raise Stopped

    counted = history[plan.ramp_steps :]
    limits: dict[str, Any] = {"least": LEAST_WINDOWS, "most": MOST_WINDOWS, "on_window": on_window}
    if isinstance(model, MaskedModel):
        result = evaluate_masked(model, split.valid, cell.context, plan.eval_tokens, **limits)
    else:
        result = evaluate(model, split.valid, cell.context, plan.eval_tokens, **limits)
    return StudyRun(
        attention=cell.name,
        seed=seed,
        bits=result.bits,
        windows=result.windows,
        positions=tuple(result.positions),
        steps=len(counted),
        tokens=len(counted) * cell.batch * cell.context,
        seconds=history[-1].seconds - (history[plan.ramp_steps - 1].seconds if plan.ramp_steps else 0.0),
        peak_bytes=peak.raised,
        parameters=model.parameter_count(),
        curve=tuple(thin(history)),
        key=key,
        level_bias=level_biases(model),
        pace=None if pace is None else pace.median,
    )
