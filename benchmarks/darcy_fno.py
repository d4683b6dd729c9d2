"""The Fourier neural operator on the same Darcy examples, steps and loss as `farfield compare`, as a peer.

    python benchmarks/darcy_fno.py darcy.npz.xz --steps 2000 --seeds 2 --out runs/darcy_fno.json

Needs neuraloperator (pip install --no-deps neuraloperator tensorly tensorly-torch opt-einsum zencfg configmypy
ruamel.yaml). Complex weights cannot train with torch's fused AdamW; that is the only departure from farfield's loop.
"""

from __future__ import annotations

import argparse
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farfield.bench.machine import describe_machine
from farfield.data.examples import Batches, VisionData, in_order
from farfield.data.grids import open_grids
from farfield.models.vision.model import Examples, relative_errors
from farfield.training.files import write_json
from farfield.training.loop import TrainConfig, learning_rate_factor


class Normalised(nn.Module):
    """An operator on normalised inputs whose outputs are scaled back, as farfield's models do it."""

    def __init__(self, operator: nn.Module, data: VisionData) -> None:
        super().__init__()
        self.operator = operator
        self.statistics = [
            torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std, data.target_mean, data.target_std)
        ]

    def forward(self, x: Tensor) -> Tensor:
        mean, std, target_mean, target_std = self.statistics
        out: Tensor = self.operator((x - mean) / std)
        return out * target_std + target_mean


def train(model: Normalised, data: VisionData, config: TrainConfig) -> float:
    """Trains as farfield's Trainer does; the seconds of it."""
    assert config.steps is not None
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    begin = time.perf_counter()
    stream = islice(Batches(data.train, config.batch, config.seed).stream(1), config.steps)
    for taken, batch in enumerate(stream):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * learning_rate_factor((taken + 0.5) / config.steps, config)
        optimiser.zero_grad()
        relative_errors(model(batch.x), batch.y).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
    return time.perf_counter() - begin


@torch.no_grad()
def scores(model: Normalised, data: VisionData) -> dict[str, float]:
    """Relative L2 and relative MSE on every grid of the tests."""
    found = {}
    for name, source in data.tests.items():
        batches: list[Examples] = [batch for batch, _ in in_order(source, 10)]
        errors = torch.cat([relative_errors(model(b.x).double(), b.y.double()) for b in batches])
        found[name], found[f"{name} MSE"] = float(errors.mean()), float((errors**2).mean())
    return found


def main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from neuralop.models import FNO

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--modes", type=int, default=8)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    data = open_grids([given.data])
    runs: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        torch.manual_seed(seed)
        operator = FNO(n_modes=(given.modes,) * 2, in_channels=data.channels, out_channels=data.outputs,
                       hidden_channels=given.width, n_layers=given.layers)  # fmt: skip
        model = Normalised(operator, data)
        config = TrainConfig(context=1, batch=given.batch, lr=given.lr, steps=given.steps, seed=seed)
        seconds = train(model, data, config)
        count = sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())
        runs.append({"attention": "fno", "seed": seed, "tests": scores(model.eval(), data), "steps": given.steps,
                     "seconds": seconds, "parameters": count})  # fmt: skip
        print(runs[-1], flush=True)
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "data")}
    write_json(given.out, {"settings": settings, "machine": describe_machine("cpu"), "runs": runs})


if __name__ == "__main__":
    main()
