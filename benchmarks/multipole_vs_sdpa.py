"""Multipole attention beside torch's scaled_dot_product_attention: time and memory by length, interleaved in one run.

    python benchmarks/multipole_vs_sdpa.py --lengths 2048,4096,8192,16384,65536 --json runs/multipole_vs_sdpa.json

Shape of the targets: B 1, H 8, D 64, float32, causal, block 64, rank 8. Every repeat times both, one after the other;
the table gives medians and the ratio of medians. Memory is how far the resident size rises above the inputs, in sizes
of q.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import farfield as ff
from farfield.bench.memory import PeakMemory


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forward_backward(
    attention: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)


def measure(length: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: medians in ms, every single time in s, peak memory in sizes of q."""
    generator = torch.Generator().manual_seed(length)
    shape = (1, args.heads, length, args.head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ff.multipole_attention(q, k, v, causal=True, block=args.block, rank=args.rank)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    forward_backward(ours, inputs, grad)()
    with PeakMemory() as peak:
        forward_backward(ours, inputs, grad)()
    rise = None if peak.raised is None else peak.raised / (q.numel() * q.element_size())
    times: dict[str, list[float]] = {name: [] for name in ("dense f", "fma f", "dense fb", "fma fb")}
    slow = seconds(lambda: dense(*(x.detach() for x in inputs)))
    repeats = args.repeats if slow < 1 else 3 if slow < 8 else 1
    for _ in range(repeats):
        with torch.no_grad():
            times["fma f"].append(seconds(lambda: ours(*inputs)))
            times["dense f"].append(slow if repeats == 1 else seconds(lambda: dense(*inputs)))
            times["fma f"].append(seconds(lambda: ours(*inputs)))
        times["fma fb"].append(seconds(forward_backward(ours, inputs, grad)))
        times["dense fb"].append(seconds(forward_backward(dense, inputs, grad)))
        times["fma fb"].append(seconds(forward_backward(ours, inputs, grad)))
    ms = {name: 1000 * statistics.median(t) for name, t in times.items()}
    return {"N": length, "repeats": repeats, "peak_over_q": rise, "ms": ms, "all": times}


def line(row: dict[str, Any]) -> str:
    """A measured row in Markdown."""
    ms, rise = row["ms"], row["peak_over_q"]
    cells = [str(row["N"])]
    for run in ("f", "fb"):
        dense, ours = ms[f"dense {run}"], ms[f"fma {run}"]
        cells += [f"{dense:.1f}", f"{ours:.1f}", f"{dense / ours:.1f}"]
    cells.append("" if rise is None else f"{rise:.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384,65536")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="fewer for calls of over a second")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}")
    print("| N | SDPA fwd ms | fma fwd ms | ratio | SDPA fwd+bwd ms | fma fwd+bwd ms | ratio | fma peak / q |")
    print("|---|---|---|---|---|---|---|---|")
    for length in map(int, args.lengths.split(",")):
        rows.append(measure(length, args))
        print(line(rows[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "settings": vars(args),
        }
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1, default=str))


if __name__ == "__main__":
    main()
