"""Attentions on images at equal time that other work on the machine does not disturb.

    python benchmarks/equal_time.py cifar10_train_jpeg.npz cifar10_test_jpeg.npz --attention fma2d,na,dense \\
        --steps 100 --reference fma2d --examples 2000 --out runs/cifar_time

Every attention takes the steps that it can afford in the time of the reference's --steps: processor seconds of a step
are measured first, all attentions in turn, ten rounds, and the medians are kept in steps.json. `farfield compare
--budget` gives equal time by the clock, and `farfield compare --steps` equal steps.

Finished runs in --out are kept, so the same command goes on where it was stopped. The folder of each attention has the
report and results.json of `farfield compare`.
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
from farfield.data.examples import Batches, VisionData
from farfield.data.images import open_images
from farfield.models.vision import VisionModel
from farfield.training.files import write_json

ROUNDS = 10


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


def steps_of(settings: VisionSettings, data: VisionData, kept: Path, reference: str) -> dict[str, int]:
    """Steps by attention that take as long as those of the reference; measured once, and kept in a file."""
    if not kept.exists():
        assert settings.steps is not None
        seconds = step_seconds(settings, data)
        steps = {name: round(settings.steps * seconds[reference] / value) for name, value in seconds.items()}
        write_json(kept, {"reference": reference, "seconds": seconds, "steps": steps, "rounds": ROUNDS})
    found: dict[str, int] = json.loads(kept.read_text())["steps"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--attention", default="dense,window,blocks,fma,agent,l2vit")
    parser.add_argument("--reference", required=True, metavar="ATTENTION", help="whose steps are given")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--depths", type=lambda text: tuple(map(int, text.split(","))), help="layers of the stages")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--examples", type=int, default=1000, help="held-out examples at most")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    names = tuple(given.attention.split(","))
    if given.reference not in names:
        parser.error(f"--reference {given.reference}: one of {', '.join(names)} would be accepted")
    settings = VisionSettings(
        attentions=names,
        seconds=None,
        steps=given.steps,
        options={"block": given.block, "rank": given.rank},
        depths=given.depths,
        seeds=given.seeds,
        batch=given.batch,
        examples=given.examples,
        cost_seconds=None,
    )
    data = open_images(given.data)
    steps = steps_of(settings, data, given.out / "steps.json", given.reference)
    print(steps, flush=True)
    for name in names:
        study(dataclasses.replace(settings, attentions=(name,), steps=steps[name]), data, given.out / name)


if __name__ == "__main__":
    main()
