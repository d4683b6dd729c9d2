"""The same vision model, trained once per attention (and per seed), on the same images or fields and the same budget.

Every run begins from the same numbers (the attention's own excepted) and reads the same examples in the same order,
augmented alike. The budget is training time (evaluation, warm-up and saving do not count) or a number of steps.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from farfield import recipes
from farfield.bench import cost as layer_cost
from farfield.bench import runs as runs_on_disk
from farfield.bench.case import grid_of
from farfield.bench.flops import count_flops
from farfield.bench.machine import describe_machine
from farfield.bench.memory import PeakMemory, is_out_of_memory
from farfield.bench.runs import Failure, Stopped, Watcher, make_runs, mixed_machines, read_json
from farfield.bench.samples import Samples, sample
from farfield.data.examples import Batches, VisionData, in_order, size_in_words
from farfield.geometry import per_axis
from farfield.models.vision import SIZES, VisionConfig, VisionModel, preset
from farfield.training.files import write_atomically, write_json
from farfield.training.loop import TrainConfig, Trainer
from farfield.training.metrics import METRICS, Metric, VisionEvaluation, evaluate_vision

__all__ = ["VisionOutcome", "VisionRun", "VisionSettings", "Whole", "compare_vision", "load_samples", "samples_file"]

RUN_FORMAT = "farfield-vision-run/1"
COST_FORMAT = "farfield-vision-cost/1"
RESULTS_FORMAT = "farfield-vision-compare/1"
_FEW_TOKENS = 4096
_LR = 2e-3
LAYER_OPTIONS = ("position_bias", "qk_norm", "dropout", "num_kv_heads")
"""What every recipe's layer takes, whatever its parts; a part may refuse it."""


@dataclass(frozen=True)
class VisionSettings:
    """What is compared.

    Attributes:
        attentions: names of recipes, without repetition.
        size: of the model, a key of :data:`farfield.models.vision.SIZES`.
        seconds: training time of each run; None when ``steps`` decides.
        steps: steps of each run; None when ``seconds`` decides.
        seeds: runs per attention, with seeds ``first_seed``, ``first_seed + 1``, ...
        first_seed: the first seed.
        widths, depths, head_dim: instead of those of the size.
        patch: pixels of a token, per axis or the same on all (in 3-D: of H and W, with 1 in T); None chooses by the
            data: 4 for images from 64 pixels and 2 for smaller ones, for fields 1 up to 4,096 points and 2 above.
        position: see :data:`farfield.models.vision.config.POSITIONS`; None takes "conv" for images, "waves" for fields.
        options: of the recipes; each recipe gets those that it knows, and those of the layer (:data:`LAYER_OPTIONS`).
        latent: of an operator, let the backbone work on the grid of training whatever grid it is asked about.
        batch: examples per step; None takes 32 for classes and 8 otherwise.
        lr: peak learning rate; None takes 0.002.
        examples: held-out examples to test on at most, evenly spread.
        workers: processes that read ahead; None takes 1 for images and 0 for fields, which lie in memory.
        device: where to train.
        cost_seconds: time for measuring the model by resolution; None leaves that out.
    """

    attentions: tuple[str, ...]
    size: str = "tiny"
    seconds: float | None = 60.0
    steps: int | None = None
    seeds: int = 1
    first_seed: int = 0
    widths: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    head_dim: int | None = None
    patch: int | tuple[int, ...] | None = None
    position: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    latent: bool = False
    batch: int | None = None
    lr: float | None = None
    examples: int = 1000
    workers: int | None = None
    device: str = "cpu"
    cost_seconds: float | None = 45.0

    def recipe_options(self, attention: str) -> dict[str, Any]:
        """The options that this recipe knows, and those of the layer."""
        known = {*recipes.options(attention), *LAYER_OPTIONS}
        return {name: value for name, value in self.options.items() if name in known}

    def model_config(self, attention: str, data: VisionData) -> VisionConfig:
        """The model of one attention for this data."""
        grid = data.train.grid
        fields = data.task == "operator"
        patch: int | tuple[int, ...] = self.patch if self.patch is not None else _patch(grid, fields)
        if data.dims == 3 and isinstance(patch, int):
            patch = (1, patch, patch)
        changes: dict[str, Any] = {
            "attention": attention,
            "options": self.recipe_options(attention),
            "task": data.task,
            "dims": data.dims,
            "channels": data.channels,
            "outputs": data.outputs,
            "patch": patch,
            "downsample": 2 if data.dims == 2 else (1, 2, 2),
            "mean": data.mean,
            "std": data.std,
            "target_mean": data.target_mean,
            "target_std": data.target_std,
            "residual": data.residual,
            "ahead": data.ahead,
            "latent": data.train.grid if self.latent else None,
            "ignore": data.ignore,
        }
        plain = self.size.startswith("vit")
        if self.position is not None or not plain:
            changes["position"] = self.position or ("waves" if fields else "conv")
        if plain:
            sides = per_axis(patch, data.dims, "patch")
            changes["table"] = tuple(-(-n // p) for n, p in zip(grid, sides, strict=True))
        for name in ("widths", "depths", "head_dim"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        return preset(self.size, **changes)

    def batch_of(self, task: str) -> int:
        """Examples per step."""
        return self.batch if self.batch is not None else 32 if task == "classify" else 8

    def workers_of(self, task: str) -> int:
        """Processes that read ahead."""
        if self.workers is not None:
            return self.workers
        return 0 if task == "operator" or (os.cpu_count() or 1) < 2 else 1

    def train_config(self, data: VisionData, seed: int) -> TrainConfig:
        """The training of one seed."""
        return TrainConfig(
            context=math.prod(data.train.grid),
            batch=self.batch_of(data.task),
            seed=seed,
            steps=self.steps,
            seconds=self.seconds,
            lr=_LR if self.lr is None else self.lr,
        )

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

    def validate(self, data: VisionData) -> None:
        """Builds every model and runs it once on a test example, so that what cannot work is refused before training.

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
        if self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; known sizes are {', '.join(SIZES)}")
        for name in ("seeds", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in self.attentions:
            recipes.get(name)
        for option in set(self.options) - {"block", "rank", *LAYER_OPTIONS}:
            if not any(option in recipes.options(name) for name in self.attentions):
                known = {name: ", ".join(recipes.options(name)) or "none" for name in self.attentions}
                listed = "; ".join(f"{name}: {options}" for name, options in known.items())
                layer = f"of every layer {', '.join(LAYER_OPTIONS)}"
                raise ValueError(f"no attention here has an option {option!r}; options are {listed}; {layer}")
        self.train_config(data, self.first_seed)
        if self.latent and data.task != "operator":
            raise ValueError(f"latent=True is for fields; {data.source} holds images")
        for name in self.attentions:
            try:
                model = VisionModel(self.model_config(name, data)).to(self.device)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from error
            for source in data.tests.values():
                x = torch.zeros(1, data.channels, *source.grid, device=self.device)
                try:
                    with torch.no_grad():
                        model(x)
                except (ValueError, TypeError, RuntimeError) as error:
                    if is_out_of_memory(error):
                        continue  # a failure of that run, told when it comes to it; others may fit
                    raise ValueError(f"{name} cannot work at {size_in_words(source.grid)}: {error}") from error


def _patch(grid: tuple[int, ...], fields: bool) -> int:
    if fields:
        return 1 if math.prod(grid) <= _FEW_TOKENS else 2
    return 4 if min(grid) >= 64 else 2


@dataclass(frozen=True)
class VisionRun:
    """One finished run.

    Attributes:
        attention, seed: which one.
        score: accuracy, mean IoU or relative L2 on the held-out examples at the resolution of training.
        tests: the score at every resolution; of an operator also "<resolution> MSE", the relative one, and of a
            segmentation "<resolution> pixels", the share of pixels that are right.
        examples: per held-out example, the same for every run: right or wrong, share of pixels, relative L2.
        counts: of a segmentation, per example the pixels per class in both and in either of truth and prediction.
        classes: per class its accuracy or IoU; None for a class that occurs nowhere.
        steps, images, seconds: of training.
        peak_bytes: rise of memory in training, model and optimiser included; None where unmeasured.
        parameters: of the model.
        flops: of one forward pass of one example; None where unknown.
        curve: (step, training seconds, training loss over ln 2), means over equal numbers of steps.
        bad: examples that could not be read, with the reason.
        key: the settings that decide the numbers.
        machine: what made it (processor, cores, threads, torch).
    """

    attention: str
    seed: int
    score: float
    tests: Mapping[str, float]
    examples: tuple[float, ...]
    counts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    classes: tuple[float | None, ...]
    steps: int
    images: int
    seconds: float
    peak_bytes: int | None
    parameters: int
    flops: int | None
    curve: tuple[tuple[int, float, float], ...]
    bad: tuple[str, ...]
    key: Mapping[str, Any]
    machine: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VisionRun:
        """The inverse of ``dataclasses.asdict`` through JSON.

        Raises:
            KeyError, TypeError, ValueError: for anything else.
        """
        return cls(
            attention=str(values["attention"]),
            seed=int(values["seed"]),
            score=float(values["score"]),
            tests={str(name): float(value) for name, value in values["tests"].items()},
            examples=tuple(float(v) for v in values["examples"]),
            counts=tuple((tuple(map(int, a)), tuple(map(int, b))) for a, b in values["counts"]),
            classes=tuple(None if v is None else float(v) for v in values["classes"]),
            steps=int(values["steps"]),
            images=int(values["images"]),
            seconds=float(values["seconds"]),
            peak_bytes=None if values["peak_bytes"] is None else int(values["peak_bytes"]),
            parameters=int(values["parameters"]),
            flops=None if values["flops"] is None else int(values["flops"]),
            curve=tuple((int(a), float(b), float(c)) for a, b, c in values["curve"]),
            bad=tuple(str(v) for v in values["bad"]),
            key=dict(values["key"]),
            machine=dict(values["machine"]),
        )


@dataclass
class VisionOutcome:
    """Everything that a comparison found.

    Attributes:
        settings: what was asked for.
        data: what it was asked of.
        machine: cores, threads, versions.
        grids: the grid of tokens at every stage of the model.
        runs: the finished runs, in the order of the plan.
        failures: runs that diverged or ran out of memory.
        notes: what else a reader should know.
        cost: of the model by number of pixels; None when left out.
        interrupted: whether the user ended it early.
        unfinished: the run that was under way then.
        command: the command line that reproduces it.
    """

    settings: VisionSettings
    data: VisionData
    machine: dict[str, Any]
    grids: list[tuple[int, ...]]
    runs: list[VisionRun] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cost: layer_cost.Cost | None = None
    interrupted: bool = False
    unfinished: tuple[str, int] | None = None
    command: str = ""

    @property
    def metric(self) -> Metric:
        """What the runs are judged by."""
        return METRICS[self.data.task]

    @property
    def bad(self) -> list[str]:
        """Examples that some run could not read, with the reason."""
        return sorted({line for run in self.runs for line in run.bad})


def run_key(
    settings: VisionSettings, data: VisionData, attention: str, seed: int, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings that decide a run's numbers, by their names on the command line."""
    config = settings.model_config(attention, data)
    key: dict[str, Any] = {
        "attention": attention,
        "seed": seed,
        "image": size_in_words(data.train.grid),
        "tests": list(data.tests),
        "budget": settings.seconds,
        "steps": settings.steps,
        "size": settings.size,
        "widths": config.widths,
        "depths": config.depths,
        "head_dim": config.head_dim,
        "patch": config.patches,
        "position": config.position,
        "options": settings.recipe_options(attention),
        "batch": settings.batch_of(data.task),
        "lr": settings.train_config(data, seed).lr,
        "examples": settings.examples,
        "device": settings.device,
        "data": data.fingerprint[:16],
        "channels": [data.channels, data.outputs],
        "residual": data.residual,
        **({} if data.ahead is None else {"ahead": data.ahead}),
        **({"latent": config.latent} if settings.latent else {}),
    }
    if settings.seconds is not None:  # equal time means something on one machine only
        key |= {
            "processor": machine["processor"],
            "threads": machine["threads"],
            "workers": settings.workers_of(data.task),
        }
    read_back: dict[str, Any] = json.loads(json.dumps(key))  # as a run's file gives it: lists for tuples
    return read_back


def samples_file(folder: Path, attention: str, seed: int) -> Path:
    """Where the predictions of a run lie that are drawn."""
    return folder / "runs" / f"{attention}-seed{seed}.npz"


def compare_vision(
    settings: VisionSettings,
    data: VisionData,
    folder: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    should_stop: Callable[[], bool] | None = None,
    before_first_run: Callable[[], None] | None = None,
) -> VisionOutcome:
    """Trains and measures everything in the plan.

    Args:
        settings: what to compare.
        data: the images or fields.
        folder: gets ``runs/<attention>-seed<k>.json`` as each run finishes, beside it the predictions that are drawn,
            and ``cost.json``.
        resume: reuse the finished runs and costs in ``folder``.
        watcher: told what happens.
        should_stop: asked between steps and batches; true ends the comparison with what is finished.
        before_first_run: called once everything is checked, before anything is trained or written.

    Returns:
        The outcome; a run under way when stopped is not in it.

    Raises:
        ValueError: for settings that cannot work, or a folder with other settings; nothing is written then.
        OSError: when a run cannot be saved.
    """
    watcher = watcher or Watcher()
    stop = should_stop or (lambda: False)
    settings.validate(data)
    machine = describe_machine(settings.device)

    def key_of(attention: str, seed: int) -> dict[str, Any]:
        return run_key(settings, data, attention, seed, machine)

    finished = runs_on_disk.check_folder(
        folder,
        settings.plan,
        key_of=key_of,
        read=VisionRun.from_json,
        run_format=RUN_FORMAT,
        results_format=RESULTS_FORMAT,
        resume=resume,
    )
    outcome = VisionOutcome(settings, data, machine, _grids(settings, data))
    if before_first_run is not None:
        before_first_run()
    make_runs(
        settings.plan,
        finished,
        outcome,
        folder,
        one_run=lambda attention, seed: _one_run(
            settings, data, attention, seed, key_of(attention, seed), folder, watcher, stop
        ),
        warm_up=lambda attention: _warm_up(settings, data, attention),
        run_format=RUN_FORMAT,
        machine=machine,
        watcher=watcher,
        stop=stop,
    )
    outcome.notes += mixed_machines(outcome.runs)
    if settings.cost_seconds is not None and not outcome.interrupted:
        try:
            outcome.cost = _cost(settings, data, folder, machine, resume, watcher, stop)
        except (ValueError, TypeError, RuntimeError, OSError) as error:  # the runs are worth more than this stage
            outcome.notes.append(f"The cost of the model by resolution was not measured: {error}")
        else:
            outcome.interrupted = outcome.cost.interrupted
    return outcome


def _grids(settings: VisionSettings, data: VisionData) -> list[tuple[int, ...]]:
    model = VisionModel(settings.model_config(settings.attentions[0], data))
    with torch.no_grad():
        maps = model.backbone(torch.zeros(1, data.channels, *data.train.grid))
    return [tuple(f.map.shape[2:]) for f in maps]


def _warm_up(settings: VisionSettings, data: VisionData, attention: str) -> None:
    """Two steps that count for nothing, so that thread pools, tables and memory pages are there for every attention."""
    model = VisionModel(settings.model_config(attention, data)).to(settings.device)
    config = dataclasses.replace(settings.train_config(data, settings.first_seed), steps=2, seconds=None)
    Trainer(model, Batches(data.train, config.batch, config.seed), config).run()


def _one_run(
    settings: VisionSettings,
    data: VisionData,
    attention: str,
    seed: int,
    key: Mapping[str, Any],
    folder: Path,
    watcher: Watcher,
    stop: Callable[[], bool],
) -> VisionRun:
    bad: dict[str, str] = {}

    def on_bad(name: str, reason: str) -> None:
        if name not in bad:
            bad[name] = reason
            watcher.on_bad(name, reason)

    batch = settings.batch_of(data.task)
    workers = settings.workers_of(data.task)
    with PeakMemory(settings.device) as peak:
        model = VisionModel(settings.model_config(attention, data), seed=seed).to(settings.device)
        batches = Batches(data.train, batch, seed, workers=workers, on_bad=on_bad)
        trainer = Trainer(model, batches, settings.train_config(data, seed))
        history = trainer.run(on_progress=lambda p: watcher.on_step(p, trainer.fraction), should_stop=stop)
        if not trainer.done:
            raise Stopped
    results: dict[str, VisionEvaluation] = {}
    for name, source in data.tests.items():
        count = min(settings.examples, len(source))
        indices = sorted({int(i) for i in np.linspace(0, len(source) - 1, count)})

        def on_batch(done: int, total: int = len(indices)) -> None:
            watcher.on_window(done, total)
            if done < total and stop():
                raise Stopped

        read = in_order(source, batch, indices=indices, workers=workers, on_bad=on_bad)
        results[name] = evaluate_vision(model, read, on_batch=on_batch)
    first = next(iter(results.values()))
    if seed == settings.first_seed:
        _save_samples(samples_file(folder, attention, seed), sample(model, next(iter(data.tests.values()))))
    count_ = count_flops(model, data.channels, data.train.grid)
    return VisionRun(
        attention=attention,
        seed=seed,
        score=first.score,
        tests=_scores(results),
        examples=first.examples,
        counts=first.counts,
        classes=tuple(None if math.isnan(v) else v for v in first.classes),
        steps=history[-1].step,
        images=history[-1].step * batch,
        seconds=history[-1].seconds,
        peak_bytes=peak.raised,
        parameters=count_.parameters,
        flops=count_.flops,
        curve=tuple(runs_on_disk.thin(history)),
        bad=tuple(f"{name}: {reason}" for name, reason in sorted(bad.items())),
        key=key,
    )


def _scores(results: Mapping[str, VisionEvaluation]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name, result in results.items():
        scores[name] = result.score
        if result.relative_mse is not None:
            scores[f"{name} MSE"] = result.relative_mse
        if result.pixels is not None:
            scores[f"{name} pixels"] = result.pixels
    return scores


def _save_samples(path: Path, samples: Samples) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **samples.arrays())  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def load_samples(path: Path) -> Samples | None:
    """The predictions of a run that are drawn; None where there are none, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            return Samples.from_arrays({name: archive[name] for name in archive.files})
    except Exception:  # pictures are an extra: a damaged file (zlib.error, BadZipFile, KeyError) costs no numbers
        return None


class Whole(nn.Module):
    """A model as the cost stage calls it: `[1, N, channels]` in and out, the pixels of the largest grid of N points."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The input and, on top, the mean of what the model makes of it: a gradient reaches everything."""
        config = self.model.config
        grid = grid_of(x.shape[1], config.dims)
        image = x.transpose(1, 2).unflatten(2, grid)
        return x + self.model(image).mean()


def _cost(
    settings: VisionSettings,
    data: VisionData,
    folder: Path,
    machine: Mapping[str, Any],
    resume: bool,
    watcher: Watcher,
    stop: Callable[[], bool],
) -> layer_cost.Cost:
    """Measures the whole model of each attention by resolution, or takes an earlier measurement of the same models."""
    assert settings.cost_seconds is not None
    configs = {name: settings.model_config(name, data) for name in settings.attentions}
    key: dict[str, Any] = {
        "models": {name: dataclasses.asdict(config) for name, config in configs.items()},
        "seconds": settings.cost_seconds,
        "machine": {name: machine[name] for name in ("processor", "threads", "device", "torch")},
    }
    key = json.loads(json.dumps(key))
    path = folder / "cost.json"
    if resume and path.exists():
        values = read_json(path)
        if values.get("format") == COST_FORMAT and values.get("key") == key:
            cost = layer_cost.Cost.from_json(values["cost"])
            for point in cost.points:
                watcher.on_cost(point)
            return cost

    def builder(config: VisionConfig) -> Callable[[], nn.Module]:
        return lambda: Whole(VisionModel(config))

    first = configs[settings.attentions[0]]
    cost = layer_cost.measure(
        {name: builder(config) for name, config in configs.items()},
        dim=data.channels,
        heads=first.widths[0] // first.head_dim,
        budget=settings.cost_seconds,
        device=settings.device,
        on_point=watcher.on_cost,
        should_stop=stop,
    )
    if not cost.interrupted:
        write_json(path, {"format": COST_FORMAT, "key": key, "cost": dataclasses.asdict(cost)})
    return cost
