"""Writes harder Darcy flows than the public 16 x 16 ones: random coefficients of any contrast at 64 x 64 and 128 x 128.

    python benchmarks/make_darcy.py runs/darcy64.npz --train 400 --contrast 20
    farfield compare runs/darcy64.npz --attention fma2d --steps 500 --batch 4 --no-cost --out runs/darcy64

Solved at 128 x 128 by finite volumes (farfield.data.darcy), thinned out to 64 x 64 for training; the test pairs are
there at both resolutions, the same flows. Everything depends on --seed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from farfield.data.darcy import KINDS, DarcyTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--test", type=int, default=40)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--fine", type=int, default=128)
    parser.add_argument("--kind", choices=KINDS, default="blocky")
    parser.add_argument("--contrast", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    begin = time.perf_counter()
    task = DarcyTask(given.side, given.fine, given.kind, given.contrast)
    arrays = {}
    arrays["darcy_train_x"], arrays["darcy_train_y"] = task.pairs(given.train, given.seed)
    for side in sorted({given.side, given.fine}):
        x, y = replace(task, side=side).pairs(given.test, given.seed + 1)
        arrays[f"darcy_test_{side}_x"], arrays[f"darcy_test_{side}_y"] = x, y
    given.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(given.out, **arrays)
    seconds = time.perf_counter() - begin
    print(f"{given.out}: {given.train} pairs at {given.side}, {given.test} to test on, {seconds:.0f} s")


if __name__ == "__main__":
    main()
