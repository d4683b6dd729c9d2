"""How long an expansion takes, in keys of exact attention: both in turn, the median of seven.

python benchmarks/expansion.py --tokens 8192 --centres 8 --open 0
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from farfield.ops.expansion import expansion_state

HEADS, KEY_HEADS, DIM, BLOCK, SINKS = 9, 3, 64, 64, 4
"""Of SmolLM2-135M, and of its conversions."""


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--centres", type=int, default=8)
    parser.add_argument("--open", type=int, default=0, help="tokens that a centre keeps out of the cell")
    given = parser.parse_args()
    torch.manual_seed(0)
    query = torch.randn(1, HEADS, given.tokens, DIM)
    key, value = (torch.randn(1, KEY_HEADS, given.tokens, DIM) for _ in range(2))
    centres, bias = torch.randn(HEADS, given.centres, DIM), torch.zeros(HEADS)

    def expansion() -> object:
        return expansion_state(
            query, key, value, centres, bias, block=BLOCK, key_mask=None, scale=DIM**-0.5, sinks=SINKS, open=given.open
        )

    def exact() -> object:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    expansion(), exact()
    pairs = [(seconds(expansion), seconds(exact)) for _ in range(7)]
    keys = statistics.median(a / b for a, b in pairs) * (given.tokens + 1) / 2
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"{given.tokens:,} tokens, {given.centres} centres that keep {given.open}, {torch.get_num_threads()} threads:"
    )
    print(f"expansion {ours * 1e3:.0f} ms, exact attention {theirs * 1e3:.0f} ms: {keys:.0f} keys")


if __name__ == "__main__":
    main()
