"""The CPU engines beside scaled_dot_product_attention and beside the matrix rate, interleaved in one run.

    python benchmarks/cpu.py --out runs/cpu.json
    python benchmarks/cpu.py --dtype bfloat16 --lengths 2048,16384 --out runs/cpu16.json

Two tables. By length: B 1, H 8, D 64, causal, block 64, rank 8, float32 unless --dtype says otherwise; SDPA and both
engines in turn, forward and then forward+backward, medians and ratios; memory of forward+backward in sizes of q, as
far as the process rises above its inputs. By form: causal, not causal, an image and a volume with the compiled engine,
as a share of the rate of matrix products that is measured in the same turns, useful FLOPs only (``farfield bench``
says how they are counted). Every row is kept in OUT as soon as it is measured, and not measured again.
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
from farfield.bench.case import DTYPES, Case
from farfield.bench.ceilings import MatrixProduct
from farfield.bench.memory import PeakMemory
from farfield.bench.model import work_of
from farfield.far import Pyramid
from farfield.near import Blocks

HEADS, DIM = 8, 64
FORMS = {
    "causal": ((65536,), 64, 8, True),
    "not causal": ((65536,), 64, 8, False),
    "image": ((256, 256), 8, 2, False),
    "volume": ((32, 32, 32), 4, 1, False),
}
Run = Callable[[], object]


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def inputs(tokens: int, dtype: str) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    *leaves, grad = (torch.randn((1, HEADS, tokens, DIM), generator=generator).to(DTYPES[dtype]) for _ in range(4))
    return tuple(x.requires_grad_() for x in leaves), grad


def runs(attention: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> tuple[Run, Run]:
    def forward() -> object:
        with torch.no_grad():
            return attention(*leaves)

    return forward, lambda: torch.autograd.grad(attention(*leaves), leaves, grad)


def medians(calls: dict[str, Run], repeats: int, slow: frozenset[str] = frozenset()) -> dict[str, float]:
    """Median seconds of every call, in turns; a ``slow`` one is called in the first three turns only."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        if name not in slow:
            call()
    for turn in range(repeats):
        for name, call in calls.items():
            if name not in slow or turn < 3:
                times[name].append(seconds(call))
    return {name: statistics.median(t) for name, t in times.items()}


def by_length(tokens: int, repeats: int, dtype: str) -> dict[str, Any]:
    leaves, grad = inputs(tokens, dtype)
    options = {"causal": True, "block": 64, "rank": 8}
    calls: dict[str, Run] = {}
    peak = {}
    for engine in ("compiled", "torch"):
        calls[f"{engine} f"], calls[f"{engine} fb"] = runs(
            lambda q, k, v, e=engine: ff.multipole_attention(q, k, v, impl=e, **options), leaves, grad
        )
        calls[f"{engine} fb"]()
        with PeakMemory() as rise:
            calls[f"{engine} fb"]()
        peak[engine] = None if rise.raised is None else rise.raised / leaves[0].nbytes
    calls["sdpa f"], calls["sdpa fb"] = runs(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), leaves, grad
    )
    times: dict[str, float] = {}
    for mode in ("f", "fb"):  # turns of their own, or the inputs of every forward pass would lie out of the caches
        of_mode = {name: call for name, call in calls.items() if name.endswith(f" {mode}")}
        if tokens > 32768:
            times[f"sdpa {mode}"] = seconds(of_mode.pop(f"sdpa {mode}"))
        slow = frozenset({f"sdpa {mode}"} if tokens >= 16384 else ())
        times |= medians(of_mode, min(repeats, 5) if tokens > 32768 else repeats, slow)
    return {"N": tokens, "seconds": times, "peak": peak, "repeats": repeats}


def by_form(name: str, repeats: int, dtype: str) -> dict[str, Any]:
    grid, block, rank, causal = FORMS[name]
    case = Case(grid, causal=causal, heads=HEADS, head_dim=DIM)
    work = work_of(Blocks(block), Pyramid(rank=rank), case)
    assert work is not None
    leaves, grad = inputs(case.tokens, dtype)
    product = MatrixProduct(dtype, "cpu")
    f, fb = runs(
        lambda q, k, v: ff.multipole_attention(
            q, k, v, grid=grid, block=block, rank=rank, causal=causal, impl="compiled"
        ),
        leaves, grad,
    )  # fmt: skip
    times = medians({"f": f, "matrix": product.time, "fb": fb, "matrix again": product.time}, repeats)
    rate = product.rate([times["matrix"], times["matrix again"]])
    flops = {"f": work.flops(case, "forward"), "fb": work.flops(case, "backward")}
    return {
        "form": name, "grid": grid, "block": block, "rank": rank, "seconds": times, "matrix": rate,
        "share": {m: flops[m] / times[m] / rate for m in flops}, "flops": flops,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384,65536")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    here = {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(), "dtype": args.dtype,
    }  # fmt: skip
    other = {name: found.get(name) for name in here if found["rows"] and found.get(name) != here[name]}
    if other:
        parser.error(f"{args.out} holds rows of other settings ({other}); another --out would be accepted")
    found |= here
    asked = [("N", n) for n in args.lengths.split(",") if n] + [("form", n) for n in args.forms.split(",") if n]
    how = args.repeats, args.dtype
    for kind, name in asked:
        key = f"{kind} {name}"
        if key not in found["rows"]:
            row = by_length(int(name), *how) if kind == "N" else by_form(name, *how)
            found["rows"][key] = row
            temporary = args.out.with_suffix(".tmp")
            temporary.write_text(json.dumps(found, indent=1))
            temporary.replace(args.out)
            print(f"{key} done", flush=True)
    machine = f"{found['cores']} cores, {found['threads']} threads, {platform.machine()} with {found['capability']}"
    print(f"\n{machine}, torch {found['torch']}, {found['dtype']}\n")
    print(
        "| N | SDPA f | compiled f | ratio | torch f | ratio "
        "| SDPA fb | compiled fb | ratio | torch fb | ratio | peak / q |"
    )
    print("|" + "---|" * 12)
    for row in (r for k, r in found["rows"].items() if k.startswith("N")):
        cells = [f"{row['N']:,}"]
        for mode in ("f", "fb"):
            s = row["seconds"]
            cells.append(f"{1000 * s[f'sdpa {mode}']:.1f}")
            for engine in ("compiled", "torch"):
                t = s[f"{engine} {mode}"]
                cells += [f"{1000 * t:.1f}", f"{s[f'sdpa {mode}'] / t:.1f}"]
        cells.append(" / ".join(f"{p:.1f}" for p in row["peak"].values() if p is not None))
        print(f"| {' | '.join(cells)} |")
    print("\n| form | grid | block, rank | forward | share of matrix rate | forward+backward | share |")
    print("|" + "---|" * 7)
    for row in (r for k, r in found["rows"].items() if k.startswith("form")):
        f, fb = (f"{1000 * row['seconds'][m]:.0f} ms | {100 * row['share'][m]:.0f} %" for m in ("f", "fb"))
        grid = " x ".join(map(str, row["grid"]))
        print(f"| {row['form']} | {grid} | {row['block']}, {row['rank']} | {f} | {fb} |")


if __name__ == "__main__":
    main()
