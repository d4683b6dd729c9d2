"""Peak memory of forward and backward by length: how far the process rises above its inputs, a process per length.

    python benchmarks/memory_by_length.py --plot docs/images/memory.png

B 1, H 2, D 64, float32, causal, block 64, rank 8. The line is a fit through the origin of log-log space: its slope says
how memory grows (1: linear).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ONE = """
import json, sys, torch, farfield as ff
from farfield.bench.memory import PeakMemory
n, impl = int(sys.argv[1]), sys.argv[2]
q, k, v = (torch.randn(1, 2, n, 64, requires_grad=True) for _ in range(3))
grad = torch.randn(1, 2, n, 64)
small = [x[:, :, :256].detach().requires_grad_() for x in (q, k, v)]
ff.multipole_attention(*small, causal=True, impl=impl).sum().backward()
with PeakMemory() as peak:
    torch.autograd.grad(ff.multipole_attention(q, k, v, causal=True, impl=impl), (q, k, v), grad)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"N": n, "rise": peak.raised, "q": q.nbytes, "process": int(status["VmHWM"].split()[0]) * 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="16384,32768,65536,131072,262144,524288,1048576")
    parser.add_argument("--engines", default="compiled,torch")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    print("| engine | N | rise in forward+backward | in sizes of q | whole process |\n|---|---|---|---|---|")
    rows: dict[str, list[dict[str, int]]] = {}
    for engine in args.engines.split(","):
        for length in map(int, args.lengths.split(",")):
            done = subprocess.run([sys.executable, "-c", ONE, str(length), engine], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {length} tokens with {engine}: {done.stderr.strip().splitlines()[-1]}")
            row = json.loads(done.stdout)
            rows.setdefault(engine, []).append(row)
            gib = 1 << 30
            print(
                f"| {engine} | {length:,} | {row['rise'] / gib:.2f} GiB | {row['rise'] / row['q']:.1f} "
                f"| {row['process'] / gib:.2f} GiB |",
                flush=True,
            )
    if args.plot:
        plot(rows, args.plot)


def plot(rows: dict[str, list[dict[str, int]]], path: Path) -> None:
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for engine, found in rows.items():
        n, rise = np.array([r["N"] for r in found]), np.array([r["rise"] for r in found]) / (1 << 30)
        slope = np.polyfit(np.log(n), np.log(rise), 1)[0]
        axes.plot(n, rise, "o-", label=f"{engine}: grows as N^{slope:.2f}")
    axes.plot(n, np.array([r["q"] for r in found]) / (1 << 30), "k:", label="one tensor: q")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="GiB above the inputs")
    axes.set_xscale("log", base=2)
    axes.set_title("Forward and backward, B 1, H 2, D 64, float32, causal", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
