"""What a vision model costs by resolution: one image forward and backward, 128 x 128 to 2,048 x 2,048 pixels.

    python benchmarks/resolution.py --threads 2 --budget 460 --out runs/resolution.json --plot runs/resolution.png

The side doubles from 128 pixels; tokens at stride 4, so 1,024 to 262,144 in the first stage. All attentions in one run,
turn by turn. A model leaves the run when its next size would not fit in time or memory, and the reason is kept. An
--out of the same settings is not measured again. At the end it says how many times faster than dense each is, and by
which power of the number of pixels its time grew over the last step, beside the power of N log N over the same step
(N tokens of the first stage). With --device cuda --longest 4096 the same on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import torch

from farfield.bench.case import grid_of
from farfield.bench.cost import Cost, CostPoint, measure
from farfield.bench.flops import count_flops
from farfield.bench.machine import describe_machine
from farfield.bench.plots import cost_figure, looks, png
from farfield.bench.runs import read_json
from farfield.bench.vision import Whole
from farfield.models.vision import VisionConfig, VisionModel, preset
from farfield.recipes import options
from farfield.training.files import write_atomically, write_json

TOKEN = 4**2
"""Pixels of a token in the first stage."""


def told(cost: Cost, names: list[str], length: int) -> dict[str, dict[str, float]]:
    """Ratios to dense at a number of pixels, and the exponent of growth over the last step, by attention."""
    found: dict[str, dict[str, float]] = {}
    times = {name: {point.length: point for point in cost.of(name)} for name in names}
    yardstick = times.get("dense", {}).get(length)
    for name, points in times.items():
        entry = found.setdefault(name, {})
        if yardstick is not None and length in points:
            entry["times faster than dense"] = yardstick.both / points[length].both
            entry["times faster than dense, forward"] = yardstick.forward / points[length].forward
        sizes = sorted(points)
        if len(sizes) > 1:
            before, last = sizes[-2:]
            growth = {
                "exponent": points[last].both / points[before].both,
                "exponent of N log N": last / before * math.log(last // TOKEN) / math.log(before // TOKEN),
            }
            entry |= {name: math.log(x) / math.log(last / before) for name, x in growth.items()}
    return found


def draw(cost: Cost, names: list[str], path: Path) -> None:
    """Time and memory by pixels."""
    write_atomically(path, png(cost_figure(cost, looks(names), "pixels of one image")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="dense,window,fma2d,swin,agent")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--first", type=int, default=128)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--factor", type=int, default=4, help="of the number of pixels from one size to the next")
    parser.add_argument("--call-limit", type=float, default=120.0, help="seconds of one forward and backward pass")
    parser.add_argument("--at", type=int, default=1024, help="side at which ratios to dense are told")
    parser.add_argument("--budget", type=float, default=460.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="a PNG of time and memory by pixels")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    asked = {name: value for name, value in vars(given).items() if name not in ("out", "plot")}
    if given.out.exists() and read_json(given.out).get("settings") == asked:
        print(f"{given.out} is there already")
        if given.plot is not None:
            draw(Cost.from_json(read_json(given.out)["cost"]), given.attention.split(","), given.plot)
        return

    def config(name: str) -> VisionConfig:
        chosen = {key: getattr(given, key) for key in ("block", "rank") if key in options(name, 2)}
        return preset(given.size, attention=name, options=chosen)

    names = given.attention.split(",")

    def show(point: CostPoint) -> None:
        pixels = "x".join(map(str, grid_of(point.length, 2)))
        print(f"{point.attention} at {pixels}: {point.both:.3f} s, {point.memory} bytes", flush=True)

    for name in names:  # the first call of a process loads code, whose memory no model should pay for
        first = Whole(VisionModel(config(name))).to(given.device)
        first(torch.zeros(1, 64 * 64, 3, device=given.device)).sum().backward()
    cost = measure(
        {name: lambda name=name: Whole(VisionModel(config(name))) for name in names},  # type: ignore[misc]
        dim=3,
        heads=1,
        budget=given.budget,
        call_limit=given.call_limit,
        first=given.first**2,
        longest=given.longest**2,
        factor=given.factor,
        device=given.device,
        on_point=show,
    )
    counts = {name: dataclasses.asdict(count_flops(VisionModel(config(name)), 3, (given.first,) * 2)) for name in names}
    result = {
        "settings": asked,
        "machine": describe_machine(given.device),
        "counts": counts,
        "cost": dataclasses.asdict(cost),
        f"at {given.at}": told(cost, names, given.at**2),
    }
    for name, entry in result[f"at {given.at}"].items():
        print(name, ", ".join(f"{what} {value:.2f}" for what, value in entry.items()), "; ", cost.stopped.get(name))
    write_json(given.out, result)
    if given.plot is not None:
        draw(cost, names, given.plot)


if __name__ == "__main__":
    main()
