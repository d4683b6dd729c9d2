"""Decoding by context: tokens per second and bytes of state, recipes' streams beside a dense KV cache.

    python benchmarks/decode.py --json runs/decode.json --plot docs/images/decode.png

One layer between its projections, B 1, H 8, D 64, float32, causal. The dense cache is preallocated, and one query goes
through torch's scaled_dot_product_attention over all of it, which is what decoding with a full cache does at best.
Every state is filled with random keys and values, in chunks; then single tokens are timed in turns, one attention after
the other. A turn of a stream is a whole leaf block of tokens, so that blocks that complete are paid for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from farfield import recipes
from farfield.bench.case import parse_length
from farfield.parts import Inputs

HEADS, WIDTH, CHUNK, TURN = 8, 64, 8192, 64


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def draw(tokens: int) -> torch.Tensor:
    return torch.randn(3, 1, HEADS, tokens, WIDTH)


class Stream:
    """A recipe's stream."""

    def __init__(self, name: str, context: int) -> None:
        # A fresh level bias of -8 would silence the far field; without one every summary weighs in.
        options = {"bias": None} if "bias" in recipes.options(name) else {}
        self.layer = recipes.build(name, HEADS * WIDTH, HEADS, causal=True, **options).eval()
        self.state = self.layer.stream(1)
        for start in range(0, context, CHUNK):
            self.feed(draw(min(CHUNK, context - start)))

    def feed(self, qkv: torch.Tensor) -> None:
        tokens = qkv.shape[3]
        x = qkv.new_empty(1, tokens, 0)
        self.layer.attend_step(Inputs(*qkv, x, (tokens,), causal=True, scale=WIDTH**-0.5), self.state)

    @property
    def nbytes(self) -> int:
        return self.state.nbytes


class Dense:
    """Keys and values of everything, preallocated, and one query."""

    def __init__(self, context: int, turns: int) -> None:
        self.length, room = context, context + (turns + 1) * TURN
        self.kv = torch.empty(2, 1, HEADS, room, WIDTH)
        for start in range(0, context, CHUNK):
            stop = min(start + CHUNK, context)
            self.kv[:, :, :, start:stop] = draw(stop - start)[1:]

    @torch.no_grad()
    def feed(self, qkv: torch.Tensor) -> None:
        self.kv[:, :, :, self.length : self.length + 1] = qkv[1:]
        self.length += 1
        k, v = self.kv[:, :, :, : self.length]
        F.scaled_dot_product_attention(qkv[0], k, v)

    @property
    def nbytes(self) -> int:
        return 2 * self.length * HEADS * WIDTH * 4  # what is used of the room


def seconds_per_token(feed: Callable[[torch.Tensor], None], tokens: list[torch.Tensor]) -> float:
    begin = time.perf_counter()
    for token in tokens:
        feed(token)
    return (time.perf_counter() - begin) / len(tokens)


def measure(context: int, names: list[str], turns: int, limit: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    subjects: dict[str, Any] = {}
    for name in names:
        begin = time.perf_counter()
        subjects[name] = Dense(context, turns) if name == "dense" else Stream(name, context)
        say(f"  {name}: state of {context:,} tokens in {time.perf_counter() - begin:.1f} s")
    held = {name: subject.nbytes for name, subject in subjects.items()}
    tokens = [draw(1) for _ in range(TURN)]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for name, subject in subjects.items():
            # A dense turn may be shorter: all its tokens cost the same.
            known = times[name][-1] if times[name] else 0.0
            few = TURN if name != "dense" or known * TURN < limit else max(1, int(limit / known))
            took = seconds_per_token(subject.feed, tokens[: 4 if turn == 0 and name == "dense" else few])
            if turn:
                times[name].append(took)
        say(f"  turn {turn}/{turns}")
    return [
        {
            "attention": name,
            "context": context,
            "seconds": statistics.median(times[name]),
            "low": min(times[name]),
            "high": max(times[name]),
            "bytes": held[name],
        }
        for name in names
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from farfield.bench.plots import amount_axis, legend, length_axis, looks, png, tidy
    from farfield.explain.show import STYLE

    names = list(dict.fromkeys(row["attention"] for row in rows))
    style = looks(names)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        speed, memory = figure.subplots(1, 2)
        for name in names:
            own = [row for row in rows if row["attention"] == name]
            colour, marker = style[name]
            look = {
                "color": colour,
                "marker": marker,
                "markerfacecolor": "white",
                "markeredgewidth": 1.5,
                "linewidth": 1.8,
            }
            contexts = [row["context"] for row in own]
            speed.plot(contexts, [1 / row["seconds"] for row in own], **look)
            memory.plot(contexts, [row["bytes"] / 2**20 for row in own], **look)
        speed.set_ylabel("tokens per second, one layer")
        memory.set_ylabel("state in MiB, one layer")
        for axes in (speed, memory):
            amount_axis(axes)
            length_axis(axes, [row["context"] for row in rows])
            axes.set_xlabel("context in tokens")
            tidy(axes)
        legend(figure, style, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="1k,16k,256k")
    parser.add_argument("--attention", default="fma,window,dense", help="recipes; dense is the KV cache of torch")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds that a turn of the dense cache may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| attention | context | tokens per second | µs per token (least, most) | MiB | × dense |")
    print("|---|---|---|---|---|---|")
    for text in args.contexts.split(","):
        (context,) = parse_length(text)
        say(f"context {context:,}")
        found = measure(context, args.attention.split(","), args.turns, args.limit)
        dense = next((row["seconds"] for row in found if row["attention"] == "dense"), None)
        for row in found:
            least, middle, most = (row[key] * 1e6 for key in ("low", "seconds", "high"))
            ratio = f"{dense / row['seconds']:.2f}" if dense else "-"
            print(
                f"| {row['attention']} | {context:,} | {1 / row['seconds']:,.0f} "
                f"| {middle:,.0f} ({least:,.0f}, {most:,.0f}) | {row['bytes'] / 2**20:.2f} | {ratio} |",
                flush=True,
            )
        rows += found
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "dtype": "float32",
        }
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
