"""Keeps of comparisons what a table needs: scores, time and memory by run, without the numbers of every example.

    python benchmarks/collect.py runs/cifar runs/cifar_seed1 --out benchmarks/results/vision_cifar.json

Several folders are several runs of one question: other seeds, or other steps. Also prints them as a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from farfield.bench.runs import read_json
from farfield.training.files import write_json

RUN = ("attention", "seed", "tests", "classes", "steps", "images", "seconds", "peak_bytes", "parameters", "flops")
DATA = ("source", "task", "train", "tests", "classes", "yardsticks")


def kept(folder: Path) -> dict[str, Any]:
    """The settings, data, machine and runs of a comparison."""
    found = read_json(folder / "results.json")
    source = {name: found["data"][name] for name in DATA if name in found["data"]}
    if "source" in source:  # file names say what it was; folders are somebody's own
        source["source"] = ", ".join(Path(piece).name for piece in str(source["source"]).split(", "))
    runs = [{name: run[name] for name in RUN} for run in found["runs"]]
    return {"settings": found["settings"], "data": source, "machine": found["machine"], "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    studies = [kept(folder) for folder in given.folders]
    write_json(given.out, {"studies": studies})
    for study in studies:
        print({name: round(value, 4) for name, value in study["data"].get("yardsticks", {}).items()})
        for run in study["runs"]:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in run["tests"].items())
            speed, peak = run["images"] / run["seconds"], (run["peak_bytes"] or 0) / 2**20
            rate = f"{speed:.1f} per second, {peak:.0f} MiB"
            print(f"{run['attention']:>8} seed {run['seed']}, {run['steps']} steps: {scores}; {rate}")


if __name__ == "__main__":
    main()
