"""Attentions on real images: CIFAR-10 by class, CamVid by pixel. Same model, same steps, same examples.

    python benchmarks/vision.py cifar10_train_jpeg.npz cifar10_test_jpeg.npz --steps 2000 --out runs/cifar
    python benchmarks/vision.py camvid_train.npz camvid_val.npz --image-size 120x160 --steps 600 --out runs/camvid

Finished runs in --out are kept, so the same command goes on where it was stopped. results.json and report.html say what
`farfield compare` would.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from farfield.bench.runs import Watcher
from farfield.bench.vision import VisionRun, VisionSettings, compare_vision
from farfield.bench.vision_report import write_vision
from farfield.commands.compare_vision import parse_size
from farfield.data.examples import VisionData
from farfield.data.images import open_images


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


def arguments(
    description: str, steps: int, attention: str = "dense,window,blocks,fma,agent,l2vit"
) -> argparse.ArgumentParser:
    """The options that all vision benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--attention", default=attention)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def settings_of(given: argparse.Namespace) -> VisionSettings:
    """What they mean."""
    return VisionSettings(
        attentions=tuple(given.attention.split(",")),
        size=given.size,
        seconds=None,
        steps=given.steps,
        seeds=given.seeds,
        options={"block": given.block, "rank": given.rank},
        batch=given.batch,
        cost_seconds=None,
    )


def main() -> None:
    parser = arguments("attentions on real images", 2000)
    parser.add_argument("--image-size")
    parser.add_argument("--test-sizes", default="")
    given = parser.parse_args()
    size = None if given.image_size is None else parse_size(given.image_size)
    further = [parse_size(piece) for piece in given.test_sizes.split(",") if piece]
    study(settings_of(given), open_images(given.data, size=size, test_sizes=further), given.out)


if __name__ == "__main__":
    main()
