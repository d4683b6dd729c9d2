"""One forward and one backward pass over a whole large field, every point a token: the relief of the Earth, 540 x 1081.

    python benchmarks/relief.py etopo20.npz.xz --attention fma2d --threads 2 --out runs/relief.json

The model fills holes: a tenth of the points is hidden, the loss is the relative L2 of all. 583,740 tokens in the first
stage. Without --out the numbers are only printed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from farfield.bench.flops import count_flops
from farfield.bench.machine import describe_machine
from farfield.bench.memory import PeakMemory
from farfield.data.arrays import read_arrays
from farfield.models.vision import VisionModel, preset
from farfield.models.vision.model import Examples
from farfield.recipes import get
from farfield.training.files import write_json


def now(device: torch.device) -> float:
    """Seconds, when everything that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--attention", default="fma2d")
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--rows", type=int, help="only so many of the first rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    (values,) = (a for a in read_arrays(given.data).values() if a.ndim == 2)
    field = torch.from_numpy(values[: given.rows].astype(np.float32))
    mean, std = float(field.mean()), float(field.std())
    seen = torch.rand(field.shape, generator=torch.Generator().manual_seed(0)) > 0.1
    x = torch.stack((torch.where(seen, field, torch.full_like(field, mean)), seen.float()))[None]
    chosen = {name: getattr(given, name) for name in ("block", "rank") if name in get(given.attention).options(2)}
    model = VisionModel(
        preset("tiny", attention=given.attention, options=chosen, task="operator", channels=2, outputs=1, patch=1,
               position="waves", mean=(mean, 0.0), std=(std, 1.0), target_mean=(mean,), target_std=(std,))
    ).to(device)  # fmt: skip
    small = Examples(torch.randn(1, 2, 64, 64, device=device), torch.randn(1, 1, 64, 64, device=device))
    model.loss(small).backward()  # loads code, fills pools
    model.zero_grad()
    whole = Examples(x.to(device), field[None, None].to(device))
    with PeakMemory(given.device) as peak:
        begin = now(device)
        loss = model.loss(whole)
        middle = now(device)
        loss.backward()
        end = now(device)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients) and len(gradients) > 0
    count = count_flops(model, 2, tuple(field.shape))
    result = {
        "settings": {k: v for k, v in vars(given).items() if k not in ("out", "data")},
        "machine": describe_machine(given.device),
        "grid": list(field.shape),
        "tokens": field.numel(),
        "forward_seconds": middle - begin,
        "backward_seconds": end - middle,
        "peak_bytes": peak.raised,
        "parameters": count.parameters,
        "forward_flops": count.flops,
        "loss": float(loss.detach()),
    }
    print(result)
    if given.out is not None:
        write_json(given.out, result)


if __name__ == "__main__":
    main()
