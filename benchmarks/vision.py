"""Attentions on real images: CIFAR-10 by class, CamVid by pixel. Same model, same steps, same examples.

    python benchmarks/vision.py cifar10_train_jpeg.npz cifar10_test_jpeg.npz --steps 2000 --out runs/cifar
    python benchmarks/vision.py camvid_train.npz camvid_val.npz --image-size 120x160 --steps 600 --out runs/camvid
    python benchmarks/vision.py cifar10_train_jpeg.npz cifar10_test_jpeg.npz --steps 700 --equal-time fma2d --out runs/t

With --equal-time every attention takes the steps that it can afford in the time of the named one's --steps: processor
seconds of a step are measured first, all attentions in turn, ten rounds, and the medians are kept in steps.json. So
other work on the machine favours nobody.

Finished runs in --out are kept, so the same command goes on where it was stopped. results.json and report.html say what
`farfield compare` would.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch

from farfield.bench.runs import Watcher
from farfield.bench.vision import VisionRun, VisionSettings, compare_vision
from farfield.bench.vision_report import write_vision
from farfield.commands.compare_vision import parse_size
from farfield.data.examples import Batches, VisionData
from farfield.data.images import open_images
from farfield.models.vision import VisionModel
from farfield.training.files import write_json


class Lines(Watcher):
    """A line per run."""

    def on_begin(self, attention: str, seed: int, number: int, total: int) -> None:
        print(f"run {number} of {total}: {attention}, seed {seed}", flush=True)

    def on_run(self, run: VisionRun, reused: bool) -> None:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in run.tests.items())
        print(
            f"  {scores}; {run.images / run.seconds:.1f} per second{' (found finished)' if reused else ''}", flush=True
        )

    def on_bad(self, name: str, reason: str) -> None:
        print(f"  left out: {name}: {reason}", flush=True)


def study(settings: VisionSettings, data: VisionData, out: Path) -> None:
    """Makes the runs that are missing in ``out``, and the report."""
    outcome = compare_vision(settings, data, out, resume=True, watcher=Lines())
    outcome.command = "see the script's own command line"
    print(write_vision(outcome, out))


ROUNDS = 10


def step_seconds(settings: VisionSettings, data: VisionData) -> dict[str, float]:
    """Processor seconds of one training step by attention, the examples read before: the median over rounds."""
    batch = next(iter(Batches(data.train, settings.batch_of(data.task)).stream(1)))
    models = {name: VisionModel(settings.model_config(name, data)) for name in settings.attentions}
    steps = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            begin = time.process_time()
            steps[name].zero_grad()
            model.loss(batch).backward()
            steps[name].step()
            if turn:  # the first makes tables and pages
                seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def study_equal_time(settings: VisionSettings, data: VisionData, out: Path, reference: str) -> None:
    """A study per attention, each with the steps that take as long as those of ``reference``."""
    if reference not in settings.attentions or settings.steps is None:
        raise SystemExit(f"--equal-time {reference}: one of {', '.join(settings.attentions)} would be accepted")
    kept = out / "steps.json"
    if not kept.exists():
        seconds = step_seconds(settings, data)
        steps = {name: round(settings.steps * seconds[reference] / value) for name, value in seconds.items()}
        write_json(kept, {"reference": reference, "seconds": seconds, "steps": steps, "rounds": ROUNDS})
    found = json.loads(kept.read_text())
    print(found, flush=True)
    for name in settings.attentions:
        own = dataclasses.replace(settings, attentions=(name,), steps=found["steps"][name])
        study(own, data, out / name)


def arguments(
    description: str, steps: int, attention: str = "dense,window,blocks,fma,agent,l2vit"
) -> argparse.ArgumentParser:
    """The options that all vision benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--attention", default=attention)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--patch", type=int)
    parser.add_argument("--examples", type=int, default=1000, help="held-out examples at most")
    parser.add_argument("--latent", action="store_true", help="of fields: the backbone works on the grid of training")
    parser.add_argument("--bias", type=float, help="where the far field's level bias starts")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def settings_of(given: argparse.Namespace) -> VisionSettings:
    """What they mean."""
    options = {"block": given.block, "rank": given.rank}
    return VisionSettings(
        attentions=tuple(given.attention.split(",")),
        size=given.size,
        seconds=None,
        steps=given.steps,
        seeds=given.seeds,
        first_seed=given.first_seed,
        options=options if given.bias is None else {**options, "bias": given.bias},
        latent=given.latent,
        batch=given.batch,
        lr=given.lr,
        patch=given.patch,
        examples=given.examples,
        cost_seconds=None,
    )


def main() -> None:
    parser = arguments("attentions on real images", 2000)
    parser.add_argument("--image-size")
    parser.add_argument("--test-sizes", default="")
    parser.add_argument("--equal-time", metavar="ATTENTION")
    given = parser.parse_args()
    size = None if given.image_size is None else parse_size(given.image_size)
    further = [parse_size(piece) for piece in given.test_sizes.split(",") if piece]
    data = open_images(given.data, size=size, test_sizes=further)
    if given.equal_time is None:
        study(settings_of(given), data, given.out)
    else:
        study_equal_time(settings_of(given), data, given.out, given.equal_time)


if __name__ == "__main__":
    main()
