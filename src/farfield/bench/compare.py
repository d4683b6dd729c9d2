"""The same byte-level language model, trained once per attention (and per seed), on the same text and the same budget.

Every run begins from the same numbers and reads the same windows of text in the same order; only the attention differs.
The budget is training time (evaluation, warm-up and saving do not count) or a number of steps. A run's file is written
when the run is finished and never before, so a folder holds finished runs only, whatever happens.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from farfield import recipes
from farfield.bench import cost as layer_cost
from farfield.bench import runs
from farfield.bench.machine import describe_machine
from farfield.bench.memory import PeakMemory, is_out_of_memory
from farfield.bench.pictures import pictures
from farfield.bench.runs import Failure, Stopped, Watcher, make_runs, mixed_machines, read_json, run_file, thin
from farfield.data.text import Corpus, Split
from farfield.models.language import LanguageConfig, LanguageModel
from farfield.training.evaluate import evaluate
from farfield.training.files import write_json
from farfield.training.loop import TrainConfig, Trainer

__all__ = [
    "COST_FORMAT",
    "RESULTS_FORMAT",
    "RUN_FORMAT",
    "Failure",
    "Outcome",
    "RunResult",
    "Settings",
    "Watcher",
    "check_folder",
    "compare",
    "describe_text",
    "mixed_machines",
    "run_file",
    "run_key",
    "thin",
]

RUN_FORMAT = "farfield-run/1"
COST_FORMAT = "farfield-cost/1"
RESULTS_FORMAT = "farfield-compare/1"
LEAST_WINDOWS = 8
"""Held-out windows that are read at least, where the text has them: fewer give no useful standard error."""
MOST_WINDOWS = 256
"""Held-out windows that are read at most: with a short context, more would take longer than training."""
_SIMPLE_BYTES = 4_000_000
"""Held-out bytes that simple coders are measured on at most."""


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        attentions: names of causal recipes, without repetition.
        context: bytes that the model sees at once.
        seconds: training time of each run; None when ``steps`` decides.
        steps: steps of each run; None when ``seconds`` decides.
        seeds: runs per attention, with seeds ``first_seed``, ``first_seed + 1``, ...
        first_seed: the first seed.
        dim, depth, heads: of the model.
        options: of the recipes; each recipe gets those that it knows.
        batch: sequences per step.
        lr: peak learning rate; None takes the default of :class:`farfield.training.loop.TrainConfig`.
        eval_tokens: held-out bytes to predict, in windows of ``context``; 8 windows at least, where
            the text has them, and 256 at most.
        device: where to train.
        cost_seconds: time for measuring one layer by length; None leaves that out.
    """

    attentions: tuple[str, ...]
    context: int = 4096
    seconds: float | None = 60.0
    steps: int | None = None
    seeds: int = 1
    first_seed: int = 0
    dim: int = 128
    depth: int = 4
    heads: int = 4
    options: Mapping[str, Any] = field(default_factory=lambda: {"block": 64, "rank": 8})
    batch: int = 1
    lr: float | None = None
    eval_tokens: int = 98304
    device: str = "cpu"
    cost_seconds: float | None = 45.0

    def validate(self) -> None:
        """Builds every model and runs its kinds of layers once, so that what cannot work is refused before training.

        One forward pass of a layer at full length, far less than the first step of training takes.

        Raises:
            ValueError: with what was given and what would be accepted.
        """
        if not self.attentions:
            raise ValueError(f"no attention was named; known ones: {', '.join(recipes.names())}")
        twice = sorted({name for name in self.attentions if self.attentions.count(name) > 1})
        if twice:
            raise ValueError(
                f"attention {', '.join(twice)} is named twice; name each once and use --seeds to repeat runs"
            )
        for name in ("seeds", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in self.attentions:
            recipes.get(name)
        for option in self.options:
            if not any(option in recipes.options(name) for name in self.attentions) and option not in ("block", "rank"):
                known = {name: ", ".join(recipes.options(name)) or "none" for name in self.attentions}
                listed = "; ".join(f"{name}: {options}" for name, options in known.items())
                raise ValueError(f"no attention here has an option {option!r}; options are {listed}")
        self.train_config(self.first_seed)
        for name in self.attentions:
            try:
                model = LanguageModel(self.model_config(name))
            except TypeError as error:
                raise ValueError(str(error)) from error
            x = torch.zeros(1, self.context, self.dim, device=self.device)
            try:
                with torch.no_grad():
                    for block in list(model.blocks)[:2]:  # recipes alternate between two kinds of layers at most
                        block.get_submodule("attention").to(self.device)(x)
            except (ValueError, TypeError, RuntimeError) as error:
                if is_out_of_memory(error):
                    continue  # a failure of that run, told when it comes to it; others may fit
                raise ValueError(f"{name} cannot work at context {self.context:,}: {error}") from error

    def recipe_options(self, attention: str) -> dict[str, Any]:
        """The options that this recipe knows."""
        known = recipes.options(attention)
        return {name: value for name, value in self.options.items() if name in known}

    def model_config(self, attention: str) -> LanguageConfig:
        """The model of one attention."""
        return LanguageConfig(
            attention=attention,
            options=self.recipe_options(attention),
            dim=self.dim,
            depth=self.depth,
            num_heads=self.heads,
            context=self.context,
        )

    def train_config(self, seed: int) -> TrainConfig:
        """The training of one seed."""
        config = TrainConfig(context=self.context, batch=self.batch, seed=seed, steps=self.steps, seconds=self.seconds)
        return config if self.lr is None else dataclasses.replace(config, lr=self.lr)

    @property
    def plan(self) -> list[tuple[str, int]]:
        """All runs, attentions alternating within a seed, so that a machine that slows down slows all of them."""
        return [(name, self.first_seed + k) for k in range(self.seeds) for name in self.attentions]

    @property
    def budget_in_words(self) -> str:
        """Such as ``60 s of training each`` or ``300 steps each``."""
        if self.steps is not None:
            return f"{self.steps:,} step{'s' * (self.steps != 1)} each"
        return f"{self.seconds:g} s of training each"


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        attention, seed: which one.
        bits: held-out bits per byte.
        windows: bits per byte of each held-out window, the same windows for every run.
        positions: (first, last + 1, bits) by position in the context.
        steps, tokens, seconds: of training.
        peak_bytes: rise of memory in training, model and optimiser included; None where unmeasured.
        parameters: of the model.
        curve: (step, training seconds, bits per byte on the training text), means over equal numbers of steps.
        key: the settings that decide the numbers; two runs may be compared when all but attention, options and seed
            agree.
        machine: what made it (processor, cores, threads, torch); empty for runs of earlier versions.
    """

    attention: str
    seed: int
    bits: float
    windows: tuple[float, ...]
    positions: tuple[tuple[int, int, float], ...]
    steps: int
    tokens: int
    seconds: float
    peak_bytes: int | None
    parameters: int
    curve: tuple[tuple[int, float, float], ...]
    key: Mapping[str, Any]
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """What the run is judged by: the held-out bits per byte."""
        return self.bits

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunResult:
        """The inverse of ``dataclasses.asdict`` through JSON.

        Raises:
            KeyError, TypeError, ValueError: for anything else.
        """
        return cls(
            attention=str(values["attention"]),
            seed=int(values["seed"]),
            bits=float(values["bits"]),
            windows=tuple(float(w) for w in values["windows"]),
            positions=tuple((int(a), int(b), float(c)) for a, b, c in values["positions"]),
            steps=int(values["steps"]),
            tokens=int(values["tokens"]),
            seconds=float(values["seconds"]),
            peak_bytes=None if values["peak_bytes"] is None else int(values["peak_bytes"]),
            parameters=int(values["parameters"]),
            curve=tuple((int(a), float(b), float(c)) for a, b, c in values["curve"]),
            key=dict(values["key"]),
            machine=dict(values.get("machine", {})),
        )


@dataclass
class Outcome:
    """Everything that a comparison found.

    Attributes:
        settings: what was asked for.
        text: about the text: source, files, bytes, fingerprint, and what simple coders need for the held-out part.
        machine: cores, threads, versions.
        runs: the finished runs, in the order of the plan.
        failures: runs that diverged or ran out of memory.
        notes: what else a reader should know: pictures and costs that could not be had, runs of several machines.
        cost: of one layer by length; None when left out.
        interrupted: whether the user ended it early.
        unfinished: the run that was under way then.
        command: the command line that reproduces it.
    """

    settings: Settings
    text: dict[str, Any]
    machine: dict[str, Any]
    runs: list[RunResult] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cost: layer_cost.Cost | None = None
    interrupted: bool = False
    unfinished: tuple[str, int] | None = None
    command: str = ""


def describe_text(corpus: Corpus, split: Split) -> dict[str, Any]:
    """Where the text is from, and how many bits simple coders need for its held-out part."""
    valid = split.valid[:_SIMPLE_BYTES]
    counts = np.bincount(valid, minlength=256)
    share = counts[counts > 0] / len(valid)
    return {
        "source": corpus.source,
        "files": len(corpus.files),
        "skipped": len(corpus.skipped),
        "fingerprint": corpus.fingerprint,
        "train_bytes": len(split.train),
        "valid_bytes": len(split.valid),
        "byte_frequencies_bits": float(-(share * np.log2(share)).sum()),
        "simple_bytes": len(valid),
        "zlib_bits": 8 * len(zlib.compress(valid.tobytes(), 9)) / len(valid),
    }


def run_key(
    settings: Settings, attention: str, seed: int, fingerprint: str, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings that decide a run's numbers, by their names on the command line."""
    key: dict[str, Any] = {
        "attention": attention,
        "seed": seed,
        "context": settings.context,
        "budget": settings.seconds,
        "steps": settings.steps,
        "dim": settings.dim,
        "depth": settings.depth,
        "heads": settings.heads,
        "options": settings.recipe_options(attention),
        "batch": settings.batch,
        "lr": settings.train_config(seed).lr,
        "eval_tokens": settings.eval_tokens,
        "device": settings.device,
        "text": fingerprint[:16],
    }
    if settings.seconds is not None:  # equal time means something on one machine only
        key |= {"processor": machine["processor"], "threads": machine["threads"]}
    read_back: dict[str, Any] = json.loads(json.dumps(key))  # as a run's file gives it: lists for tuples
    return read_back


def check_folder(
    folder: Path, settings: Settings, fingerprint: str, machine: Mapping[str, Any], resume: bool
) -> dict[tuple[str, int], RunResult]:
    """What ``folder`` holds already, see :func:`farfield.bench.runs.check_folder`."""
    return runs.check_folder(
        folder,
        settings.plan,
        key_of=lambda attention, seed: run_key(settings, attention, seed, fingerprint, machine),
        read=RunResult.from_json,
        run_format=RUN_FORMAT,
        results_format=RESULTS_FORMAT,
        resume=resume,
    )


def compare(
    settings: Settings,
    corpus: Corpus,
    folder: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    should_stop: Callable[[], bool] | None = None,
    before_first_run: Callable[[], None] | None = None,
) -> Outcome:
    """Trains and measures everything in the plan.

    Args:
        settings: what to compare.
        corpus: the text.
        folder: gets ``runs/<attention>-seed<k>.json`` as each run finishes, and ``cost.json``.
        resume: reuse the finished runs and costs in ``folder``.
        watcher: told what happens.
        should_stop: asked between steps, windows and lengths; true ends the comparison with what is finished.
        before_first_run: called once everything is checked, before anything is trained or written.

    Returns:
        The outcome; a run under way when stopped is not in it.

    Raises:
        ValueError: for settings that cannot work, text that is too short, or a folder with other settings; nothing is
            written then.
        OSError: when a run cannot be saved.
    """
    watcher = watcher or Watcher()
    stop = should_stop or (lambda: False)
    settings.validate()
    split = corpus.split(settings.context)
    machine = describe_machine(settings.device)
    finished = check_folder(folder, settings, corpus.fingerprint, machine, resume)
    outcome = Outcome(settings, describe_text(corpus, split), machine, notes=pictures(settings)[1])
    if before_first_run is not None:
        before_first_run()
    make_runs(
        settings.plan,
        finished,
        outcome,
        folder,
        one_run=lambda attention, seed: _one_run(
            settings,
            attention,
            seed,
            split,
            run_key(settings, attention, seed, corpus.fingerprint, machine),
            watcher,
            stop,
        ),
        warm_up=lambda attention: _warm_up(settings, attention, split.train),
        run_format=RUN_FORMAT,
        machine=machine,
        watcher=watcher,
        stop=stop,
    )
    outcome.notes += mixed_machines(outcome.runs)
    if settings.cost_seconds is not None and not outcome.interrupted:
        try:
            outcome.cost = _cost(settings, folder, machine, resume, watcher, stop)
        except (ValueError, TypeError, RuntimeError, OSError) as error:  # the runs are worth more than this stage
            outcome.notes.append(f"The cost of one layer by length was not measured: {error}")
        else:
            outcome.interrupted = outcome.cost.interrupted
            outcome.notes += [
                f"The cost of one layer of {name} was not measured: {reason}"
                for name, reason in outcome.cost.stopped.items()
                if not outcome.cost.of(name) and not outcome.cost.interrupted
            ]
    return outcome


def _warm_up(settings: Settings, attention: str, train: npt.NDArray[np.uint8]) -> None:
    """Two steps that count for nothing, so that thread pools, tables and memory pages are there for every attention."""
    model = LanguageModel(settings.model_config(attention)).to(settings.device)
    config = dataclasses.replace(settings.train_config(settings.first_seed), steps=2, seconds=None)
    Trainer(model, train, config).run()


def _one_run(
    settings: Settings,
    attention: str,
    seed: int,
    split: Split,
    key: Mapping[str, Any],
    watcher: Watcher,
    stop: Callable[[], bool],
) -> RunResult:
    with PeakMemory(settings.device) as peak:
        model = LanguageModel(settings.model_config(attention), seed=seed).to(settings.device)
        trainer = Trainer(model, split.train, settings.train_config(seed))
        history = trainer.run(on_progress=lambda p: watcher.on_step(p, trainer.fraction), should_stop=stop)
        if not trainer.done:
            raise Stopped

    def on_window(done: int, total: int) -> None:
        if done:
            watcher.on_window(done, total)
        if done < total and stop():
            raise Stopped

    result = evaluate(
        model,
        split.valid,
        settings.context,
        settings.eval_tokens,
        least=LEAST_WINDOWS,
        most=MOST_WINDOWS,
        on_window=on_window,
    )
    return RunResult(
        attention=attention,
        seed=seed,
        bits=result.bits,
        windows=result.windows,
        positions=tuple(result.positions),
        steps=history[-1].step,
        tokens=history[-1].tokens,
        seconds=history[-1].seconds,
        peak_bytes=peak.raised,
        parameters=model.parameter_count(),
        curve=tuple(thin(history)),
        key=key,
    )


def _cost(
    settings: Settings,
    folder: Path,
    machine: Mapping[str, Any],
    resume: bool,
    watcher: Watcher,
    stop: Callable[[], bool],
) -> layer_cost.Cost:
    """Measures one layer of each attention, or takes an earlier measurement of the same layers on the same machine."""
    assert settings.cost_seconds is not None
    config = settings.model_config(settings.attentions[0])
    key: dict[str, Any] = {
        "attentions": {name: settings.recipe_options(name) for name in settings.attentions},
        "dim": settings.dim,
        "heads": settings.heads,
        "seconds": settings.cost_seconds,
        "machine": {name: machine[name] for name in ("processor", "threads", "device", "torch")},
    }
    key = json.loads(json.dumps(key))  # as the file gives it: lists for tuples
    path = folder / "cost.json"
    if resume and path.exists():
        values = read_json(path)
        if values.get("format") == COST_FORMAT and values.get("key") == key:
            cost = layer_cost.Cost.from_json(values["cost"])
            for point in cost.points:
                watcher.on_cost(point)
            return cost

    def builder(name: str) -> Callable[[], torch.nn.Module]:
        return lambda: recipes.build(
            name, settings.dim, settings.heads, causal=True, rope=config.rope, **settings.recipe_options(name)
        )

    cost = layer_cost.measure(
        {name: builder(name) for name in settings.attentions},
        dim=settings.dim,
        heads=settings.heads,
        budget=settings.cost_seconds,
        device=settings.device,
        on_point=watcher.on_cost,
        should_stop=stop,
    )
    if not cost.interrupted:
        write_json(path, {"format": COST_FORMAT, "key": key, "cost": dataclasses.asdict(cost)})
    return cost
