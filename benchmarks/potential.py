"""The potential of random charges on a grid: a task whose answer is global, learned with each attention in equal time.

    python benchmarks/potential.py --seconds 200 --seeds 0,1,2 --attention fma,blocks,window --out runs/potential

The input is a 64 x 64 grid of 8 x 8 patches with random charge, neutral in all; the target is their potential in the
plane, the sum over charges of -log(distance), exact by a zero-padded FFT and scaled to unit variance. It is the problem
that multipole methods were made for: every charge counts everywhere. One layer of attention (coordinates as Fourier
features) is trained with fma (also fma-mean, fma-pooled), with its near field alone (blocks), with neighbourhood
attention (window) or with dense attention; the result is the relative L2 error on charges that were not trained on.
fma starts with its far field open (bias 0) here: a regression does not drown in it as a young language model does.
Time is that of the processor (of all threads together), so that what else runs on the machine counts little. Every
finished run is kept in OUT as JSON and not repeated: use a new folder for new settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from farfield import recipes


def kernel_spectrum(side: int, softening: float = 0.5) -> Tensor:
    """[2 * side, side + 1] spectrum of -log(distance) on the doubled grid."""
    offset = torch.arange(2 * side, dtype=torch.float64)
    offset = torch.minimum(offset, 2 * side - offset)
    square = offset[:, None] ** 2 + offset[None, :] ** 2 + softening**2
    return torch.fft.rfft2(-0.5 * square.log())


def potential(charges: Tensor, spectrum: Tensor) -> Tensor:
    """[B, side, side] potential of charges [B, side, side]; exact, float64 inside."""
    side = charges.shape[-1]
    doubled = torch.fft.rfft2(charges.double(), s=(2 * side, 2 * side)) * spectrum
    return torch.fft.irfft2(doubled, s=(2 * side, 2 * side))[..., :side, :side]


class Charges:
    """A grid of 8 x 8 patches with random charge densities, neutral in all, and their potential with unit variance."""

    def __init__(self, side: int) -> None:
        self.side, self.spectrum = side, kernel_spectrum(side)
        charges = self._draw(256, torch.Generator().manual_seed(0))
        self.scale = float(1 / potential(charges, self.spectrum).std())

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        patches = torch.randn(count, 8, 8, generator=generator)
        patches = patches - patches.mean((1, 2), keepdim=True)
        return patches.repeat_interleave(self.side // 8, 1).repeat_interleave(self.side // 8, 2)

    def batch(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Charges and potential, each [count, side * side] float32."""
        charges = self._draw(count, torch.Generator().manual_seed(seed))
        field = potential(charges, self.spectrum) * self.scale
        return charges.flatten(1).float(), field.flatten(1).float()


class Solver(nn.Module):
    """A pre-norm transformer from charges to potential; only the attention differs between runs."""

    def __init__(self, side: int, attention: str, options: dict[str, object], dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.side = side
        axis = (torch.arange(side) + 0.5) / side
        waves = torch.cat([f(math.pi * 2**i * axis)[:, None] for i in range(5) for f in (torch.sin, torch.cos)], 1)
        rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
        self.register_buffer("place", torch.cat([rows, columns], -1).flatten(0, 1))
        self.embed = nn.Linear(1 + self.place.shape[1], dim)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(dim),
                    "attention": recipes.build(attention, dim, heads, dims=2, **options),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
                    ),
                }
            )
            for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 1))

    def forward(self, charges: Tensor) -> Tensor:
        """[B, N] -> [B, N]"""
        place = self.place.expand(len(charges), -1, -1)
        x = self.embed(torch.cat([charges[..., None], place], -1))
        for block in self.blocks:
            x = x + block["attention"](block["norm"](x), grid=(self.side, self.side))
            x = x + block["mlp"](x)
        return self.head(x)[..., 0]


def relative_error(model: Solver, data: Charges, batches: int = 8) -> float:
    """Norm of the error over norm of the truth on held-out charges."""
    error = truth = 0.0
    with torch.no_grad():
        for i in range(batches):
            charges, field = data.batch(8, 10**9 + i)
            error += float((model(charges) - field).square().sum())
            truth += float(field.square().sum())
    return math.sqrt(error / truth)


def run(args: argparse.Namespace, attention: str, seed: int) -> None:
    path = args.out / f"{attention}-seed{seed}.json"
    if path.exists():
        return
    fma = {"block": args.block, "rank": args.rank, "bias": 0.0}
    recipe, options = {
        "fma": ("fma", fma),
        "fma-mean": ("fma", {**fma, "summary": "mean"}),
        "fma-pooled": ("fma", {**fma, "summary": "pooled"}),
        "blocks": ("blocks", {"block": args.block}),
        "window": ("window", {"size": 3 * args.block}),
        "dense": ("dense", {}),
    }[attention]
    torch.manual_seed(seed)
    data = Charges(args.side)
    model = Solver(args.side, recipe, options, args.dim, args.depth, args.heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    spent, step, curve = 0.0, 0, []
    while spent < args.seconds:
        charges, field = data.batch(args.batch, seed * 10**6 + step)
        part = spent / args.seconds
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, part / 0.05 + 1e-3, (1 - part) / 0.5)
        start = time.process_time()
        loss = (model(charges) - field).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += time.process_time() - start
        step += 1
        if step % 20 == 0:
            curve.append((spent, math.sqrt(loss.item())))
            line = f"{attention} seed {seed} step {step} {spent:.0f} s relative error {curve[-1][1]:.3f}"
            print(f"\r{line} ", end="", flush=True)
    error = relative_error(model, data)
    record = {
        "attention": attention, "seed": seed, "relative_l2": error, "steps": step, "seconds": spent, "options": options,
        "side": args.side, "dim": args.dim, "depth": args.depth, "heads": args.heads, "batch": args.batch,
        "lr": args.lr,
        "parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "curve": curve,
    }  # fmt: skip
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(path)
    line = f"{attention} seed {seed}: relative L2 error {error:.4f} after {step} steps in {spent:.0f} s"
    print(f"\r{line}{'':20}", flush=True)


def table(out: Path) -> None:
    runs: dict[str, list[dict[str, object]]] = {}
    for path in sorted(out.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        runs.setdefault(record["attention"], []).append(record)
    print("| attention | seeds | relative L2 error | min | max | steps | parameters |\n|---|---|---|---|---|---|---|")
    for name, records in sorted(runs.items(), key=lambda item: statistics.mean(r["relative_l2"] for r in item[1])):
        errors = [r["relative_l2"] for r in records]
        print(
            f"| {name} | {len(errors)} | {statistics.mean(errors):.4f} | {min(errors):.4f} | {max(errors):.4f} "
            f"| {statistics.mean(r['steps'] for r in records):.0f} | {records[0]['parameters']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="fma,blocks,window")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seconds", type=float, default=200.0, help="of processor time, for training one model")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, args.seeds.split(",")):
        for attention in args.attention.split(","):
            run(args, attention, seed)
    table(args.out)


if __name__ == "__main__":
    main()
