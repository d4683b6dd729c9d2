"""Writes text whose next byte depends on everything before it: documents drawn from random sources.

    python benchmarks/make_sources_text.py runs/sources.bin
    farfield compare runs/sources.bin --attention window,fma --context 4096 --budget 4m

Every document of 32 KiB draws its bytes independently from its own random distribution over all 256 values
(Dirichlet, concentration 0.2). The best prediction is the counts of all bytes so far, so bits per byte keep falling
with the context for a model that sees all of it: after n bytes about 255 / (2 n ln 2) bits above the entropy at most.
A window of w tokens forgets what left it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--symbols", type=int, default=32, help="values that a byte takes, at most 256")
    parser.add_argument("--concentration", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    entropy = 0.0
    with args.out.open("wb") as file:
        for _ in range(args.documents):
            shares = rng.dirichlet(np.full(args.symbols, args.concentration))
            entropy -= float((shares * np.log2(np.maximum(shares, 1e-300))).sum()) / args.documents
            file.write(rng.choice(args.symbols, size=args.length, p=shares).astype(np.uint8).tobytes())
    print(f"{args.out}: {args.documents} documents of {args.length} bytes, mean entropy {entropy:.3f} bits per byte")


if __name__ == "__main__":
    main()
