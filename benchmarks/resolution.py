"""What a vision model costs by resolution: one image forward and backward, 128 x 128 to 2,048 x 2,048 pixels.

    python benchmarks/resolution.py --budget 300 --out runs/resolution.json

Pixels double from 128 x 128 (so every other point is a square). All attentions in one run, turn by turn. A model leaves
the run when its next size would not fit in time or memory, and the reason is kept. An --out of the same settings is not
measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from farfield.bench.case import grid_of
from farfield.bench.cost import CostPoint, measure
from farfield.bench.flops import count_flops
from farfield.bench.machine import describe_machine
from farfield.bench.runs import read_json
from farfield.bench.vision import Whole
from farfield.models.vision import VisionConfig, VisionModel, preset
from farfield.recipes import options
from farfield.training.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description="cost by resolution")
    parser.add_argument("--attention", default="dense,window,blocks,fma,agent,l2vit")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--first", type=int, default=128)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=300.0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    asked = {name: value for name, value in vars(given).items() if name != "out"}
    if given.out.exists() and read_json(given.out).get("settings") == asked:
        print(f"{given.out} is there already")
        return

    def config(name: str) -> VisionConfig:
        chosen = {key: getattr(given, key) for key in ("block", "rank") if key in options(name)}
        return preset(given.size, attention=name, options=chosen)

    names = given.attention.split(",")

    def show(point: CostPoint) -> None:
        pixels = "x".join(map(str, grid_of(point.length, 2)))
        print(f"{point.attention} at {pixels}: {point.both:.3f} s, {point.memory} bytes", flush=True)

    for name in names:  # the first call of a process loads code, whose memory no model should pay for
        Whole(VisionModel(config(name)))(torch.zeros(1, 64 * 64, 3)).sum().backward()
    cost = measure(
        {name: lambda name=name: Whole(VisionModel(config(name))) for name in names},  # type: ignore[misc]
        dim=3,
        heads=1,
        budget=given.budget,
        call_limit=20.0,
        first=given.first**2,
        longest=given.longest**2,
        on_point=show,
    )
    counts = {name: dataclasses.asdict(count_flops(VisionModel(config(name)), 3, (given.first,) * 2)) for name in names}
    result = {
        "settings": asked,
        "machine": describe_machine("cpu"),
        "counts": counts,
        "cost": dataclasses.asdict(cost),
    }
    write_json(given.out, result)


if __name__ == "__main__":
    main()
