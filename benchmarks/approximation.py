"""How well cheap attentions approximate exact attention on real text, at equal numbers of keys per query.

    python benchmarks/approximation.py smollm2.gguf text.txt --json runs/approximation.json --plot approximation.png

Queries (rotated), keys and values come from layers of a pretrained Llama model in a GGUF file; nothing is trained. For
every approximation: the relative error of the attention's output (through softmax and values, Frobenius norm over
queries, median over heads), and the total variation between its row of weights and that of softmax, from 0 to 1
(mean over queries, median over heads; for approximations with negative weights half the sum of absolute differences,
which can exceed 1).

Pretrained models park the weight that they have no use for on the first token. So multipole attention, opened cells
and windows see the first 4 tokens always (``--sinks``), in both forms. Low rank and features see every token; segment
means and landmarks average the first token with its segment, as published.

Keys per query are means over queries. A sliding window, multipole attention, opened cells (with what the choice
scores) and segment means count what a query scores. Kernel features: m features cost a query as much as m keys. Rank
r: two thin factors [N, r] and [r, N] cost a query as much as r keys; the best of all matrices of that rank is taken,
which no method that has to find its factors can beat in the weights' Frobenius norm. The largest weights of each row
(an oracle, too) bound every choice of tokens. Two forms: causal, as the model attends; and bidirectional, where
Nystrom attention and Linformer's form (one summary per segment, and nothing else) are defined, over the same queries
and keys.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield.far import Pyramid
from farfield.interop.gguf import load_llama
from farfield.interop.transformers.calibrate import watched
from farfield.interop.transformers.keys import keys_by_head
from farfield.near import Blocks
from farfield.ops.multipole import multipole_attention
from farfield.ops.opened import opened_attention
from farfield.parts import repeat_heads
from farfield.recipes import Parts

Weights = Callable[[Tensor, Tensor, bool], Tensor]
"""Scaled queries [H, N, D] and keys [H, N, D], causal or not -> weights [H, N, N]."""


@dataclass(frozen=True)
class Approximation:
    """One point: a family's line in the plot, its setting, its keys per query, and how its weights come about."""

    family: str
    setting: str
    keys: float
    weights: Weights


def scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """[H, N, N]; -inf where a query must not look."""
    s = q @ k.mT
    return s.masked_fill(later(s), -math.inf) if causal else s


def later(s: Tensor) -> Tensor:
    """[N, N] true where the key comes after the query."""
    return torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)


def through_identity(attend: Callable[[Tensor], Tensor], length: int, width: int) -> Tensor:
    """The weights of an operator that only answers: what it makes of one-hot values, ``width`` of them at a time."""
    one_hot = torch.eye(length)
    return torch.cat([attend(one_hot[:, i : i + width]) for i in range(0, length, width)], -1)


def multipole(block: int, rank: int, sinks: int = 0, **opening: Any) -> Weights:
    """Mean cells with the count bias, and opened pages where asked for."""

    def weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
        heads, length, width = q.shape
        function = opened_attention if opening else multipole_attention

        def attend(values: Tensor) -> Tensor:
            v = values.expand(1, heads, length, values.shape[-1]).contiguous()
            out = function(
                q[None], k[None], v, block=block, rank=rank, causal=causal, scale=1.0, summary="mean", sinks=sinks,
                **opening,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out[0]

        return through_identity(attend, length, width)

    return weights


def window(size: int, sinks: int = 0) -> Weights:
    """The last ``size`` tokens, or as many around the query, and the first ones."""

    def weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
        s = scores(q, k, causal)
        index = torch.arange(s.shape[-1])
        back = index[:, None] - index
        near = back < size if causal else (back <= size // 2) & (back > size // 2 - size)
        return s.masked_fill(~(near | (index < sinks)), -math.inf).softmax(-1)

    return weights


def largest(count: int) -> Weights:
    """The ``count`` largest scores of each row: an oracle."""

    def weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
        s = scores(q, k, causal)
        least = s.topk(count, -1).values[..., -1:]
        return s.masked_fill(s < least, -math.inf).softmax(-1)

    return weights


@lru_cache(maxsize=8)
def decomposed(q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of the weights; kept, because every rank begins with them."""
    u, s, v = torch.linalg.svd(scores(q, k, causal).softmax(-1), full_matrices=False)
    return u, s, v


def best_rank(rank: int) -> Weights:
    """The nearest matrix of that rank to the true weights: an oracle."""

    def weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
        u, s, v = decomposed(q, k, causal)
        return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]

    return weights


def segments(x: Tensor, count: int) -> Tensor:
    """[H, count, D] means of equal segments."""
    return x.unflatten(1, (count, -1)).mean(2)


def linformer(count: int) -> Weights:
    """One mean key and value for each of ``count`` segments; causal: of the past ones, and the query's own exactly."""

    def weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
        length = k.shape[1]
        size = length // count
        coarse = q @ segments(k, count).mT + math.log(size)
        if not causal:
            return coarse.softmax(-1).repeat_interleave(size, -1) / size
        own = torch.arange(length) // size
        fine = scores(q, k, True).masked_fill(own[:, None] != own, -math.inf)
        coarse = coarse.masked_fill(torch.arange(count) >= own[:, None], -math.inf)
        both = torch.cat([fine, coarse], -1).softmax(-1)
        return both[..., :length] + both[..., length:].repeat_interleave(size, -1) / size

    return weights


def nystrom(count: int) -> Weights:
    """Nystromformer (arXiv 2102.03902): three softmaxes over landmarks, with an exact pseudoinverse."""

    def weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
        if causal:
            raise ValueError("Nystrom attention has no causal form")
        few_q, few_k = segments(q, count), segments(k, count)
        middle = (few_q @ few_k.mT).softmax(-1)
        return (q @ few_k.mT).softmax(-1) @ torch.linalg.pinv(middle, rtol=1e-5) @ (few_q @ k.mT).softmax(-1)

    return weights


def performer(features: int) -> Weights:
    """Positive orthogonal random features (FAVOR+, arXiv 2009.14794)."""

    def weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
        width = q.shape[-1]
        generator = torch.Generator().manual_seed(0)
        blocks = []
        for start in range(0, features, width):
            base = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
            length = torch.randn(width, width, generator=generator).norm(dim=1, keepdim=True)
            blocks.append((base * length)[: min(width, features - start)])
        omega = torch.cat(blocks)
        # In float64, and scaled for the largest exponent: neither overflow nor an epsilon is part of the figure.
        a = (q @ omega.mT - 0.5 * q.square().sum(-1, keepdim=True)).double()
        b = (k @ omega.mT - 0.5 * k.square().sum(-1, keepdim=True)).double()
        product = (a - a.amax(-1, keepdim=True)).exp() @ (b - b.amax((-2, -1), keepdim=True)).exp().mT
        if causal:
            product = product.masked_fill(later(product), 0.0)
        return (product / product.sum(-1, keepdim=True)).float()

    return weights


def counted(block: int, rank: int, length: int, causal: bool, sinks: int = 0, **opening: Any) -> float:
    """Mean keys per query of multipole attention: scored tokens and cells, and the choice's share."""
    if causal:
        pyramid = Pyramid(rank, summary="mean", sinks=sinks, **opening)
        return float(keys_by_head(Parts(near=Blocks(block), far=pyramid), 1, length)[0])
    if opening:
        raise ValueError("the keys of opened cells are counted in the causal form")
    zeros = torch.zeros(1, 1, length, 8)
    _, lse = multipole_attention(
        zeros, zeros, zeros, block=block, rank=rank, count_bias=False, summary="mean", sinks=sinks, return_lse=True
    )
    return float(lse.exp().mean())


def approximations(length: int, causal: bool, sinks: int) -> Iterator[Approximation]:
    """Everything that is compared."""
    for block, rank in ((8, 4), (16, 2), (16, 4), (16, 8), (32, 8), (32, 16), (64, 16), (64, 32)):
        keys = counted(block, rank, length, causal, sinks)
        yield Approximation("multipole (fma)", f"block {block}, rank {rank}", keys, multipole(block, rank, sinks))
    if causal:
        for block, cell, pages in ((16, 8, 8), (16, 8, 16), (32, 8, 16), (32, 8, 32), (64, 8, 48)):
            opening: dict[str, Any] = {"sinks": sinks, "levels": 1, "open": pages, "page": 4, "beam": pages, "share": 4}
            keys = counted(block, block // cell, length, causal, **opening)
            setting = f"block {block}, rank {block // cell}, {pages} pages of 4"
            yield Approximation("opened (fma+open)", setting, keys, multipole(block, block // cell, **opening))
    for count in (32, 64, 128, 256, 512):
        # The first rows of a causal matrix have fewer keys than the window, or than the choice.
        kept = count - count * (count - 1) / (2 * length) if causal else count
        yield Approximation("window", f"{count}", kept + sinks * (1 - count / length), window(count, sinks))
        yield Approximation("largest weights (oracle)", f"{count}", kept, largest(count))
        yield Approximation("best of its rank (oracle)", f"{count}", count, best_rank(count))
        yield Approximation("random features (Performer)", f"{count}", count, performer(count))
        own = (length // count + 1) / 2 + (count - 1) / 2 if causal else count
        yield Approximation("segment means (Linformer)", f"{count}", own, linformer(count))
        if not causal:
            yield Approximation("Nystrom", f"{count}", 2 * count, nystrom(count))


def measure(layers: dict[int, tuple[Tensor, Tensor, Tensor]], causal: bool, sinks: int) -> list[dict[str, Any]]:
    """Rows of the table: medians over the heads of all layers, and the quartiles."""
    length = next(iter(layers.values()))[0].shape[1]
    exact = {layer: scores(q, k, causal).softmax(-1) for layer, (q, k, _) in layers.items()}
    rows = []
    for a in approximations(length, causal, sinks):
        output, variation = [], []
        for layer, (q, k, v) in layers.items():
            true = exact[layer]
            found = a.weights(q, k, causal)
            answer = true @ v
            error = (found @ v - answer).flatten(1).norm(dim=1) / answer.flatten(1).norm(dim=1)
            output += error.tolist()
            variation += (0.5 * (found - true).abs().sum(-1).mean(-1)).tolist()
        row = {"causal": causal, "family": a.family, "setting": a.setting, "keys": a.keys}
        for name, values in (("output", output), ("variation", variation)):
            low, middle, high = statistics.quantiles(values, n=4)
            row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
        print(
            f"{'causal' if causal else 'both sides'}: {a.family}, {a.setting}: {a.keys:.0f} keys, output "
            f"{row['output']:.3f}, variation {row['variation']:.3f}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def activations(model: Any, ids: Tensor, layers: list[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Queries (scaled), keys and values [H, N, D] of some layers."""
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        if layer in layers:
            k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
            kept[layer] = ((q * scale)[0].float(), k[0].float(), v[0].float())

    with torch.no_grad(), watched(model, keep):
        model(ids[None], use_cache=False)
    return kept


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Output error and total variation by keys per query, one column for each form."""
    from matplotlib import figure as figures
    from matplotlib import rc_context

    from farfield.bench.plots import length_axis, looks, png, tidy
    from farfield.explain.show import STYLE
    from farfield.training.files import write_atomically

    families = list(dict.fromkeys(row["family"] for row in rows))
    style = looks(families)
    with rc_context(STYLE):
        figure = figures.Figure(figsize=(9.6, 7.4), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey="row")
        for column, causal in enumerate((True, False)):
            for axes, name in zip(panels[:, column], ("output", "variation"), strict=True):
                for family in families:
                    line = sorted(
                        (row["keys"], row[name]) for row in rows if (row["family"], row["causal"]) == (family, causal)
                    )
                    if name == "variation" and family == "Nystrom":
                        line = [(x, min(y, 2.0)) for x, y in line]
                    best = [p for i, p in enumerate(line) if p[1] <= min(q[1] for q in line[: i + 1])]
                    shown = best if family.startswith(("multipole", "opened")) else line
                    colour, marker = style[family]
                    dashes = "--" if "oracle" in family else "-"
                    axes.plot(
                        [x for x, _ in shown], [y for _, y in shown], dashes, color=colour, marker=marker,
                        markerfacecolor="white", linewidth=1.6, label=family,
                    )  # fmt: skip
                axes.set_yscale("log")
                length_axis(axes, [32, 64, 128, 256, 512])
                tidy(axes)
            panels[0, column].set_title("causal" if causal else "both sides")
            panels[1, column].set_xlabel("keys per query")
        panels[0, 0].set_ylabel("relative error of the output")
        panels[1, 0].set_ylabel("total variation of the weights")
        handles = {}
        for axes in panels.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles[label] = handle
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
        write_atomically(path, png(figure))


def table(rows: list[dict[str, Any]]) -> str:
    """For the docs."""
    lines = ["| form | approximation | setting | keys | output error | total variation |", "|---" * 6 + "|"]
    for row in sorted(rows, key=lambda row: (not row["causal"], row["family"], row["keys"])):
        lines.append(
            f"| {'causal' if row['causal'] else 'both sides'} | {row['family']} | {row['setting']} | {row['keys']:.0f} "
            f"| {row['output']:.3f} | {row['variation']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Llama model as GGUF")
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=1024, help="tokens, a multiple of 512")
    parser.add_argument("--layers", default="4,14,24")
    parser.add_argument("--sinks", type=int, default=4, help="leading tokens that near fields always see")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.length % 512 or args.length < 512:
        raise SystemExit(f"--length {args.length}: a multiple of 512 would be accepted")
    torch.set_num_threads(args.threads)
    model, tokenizer = load_llama(args.model)
    text = args.text.read_text(encoding="utf-8")
    # From the middle of the text: titles and tables of contents are no running text.
    ids = tokenizer(text[len(text) // 2 :][: 12 * args.length], return_tensors="pt").input_ids[0][: args.length]
    if len(ids) < args.length:
        raise SystemExit(f"{args.text} has too little text after its middle: {len(ids)} tokens, {args.length} needed")
    layers = activations(model, ids, [int(layer) for layer in args.layers.split(",")])
    with torch.no_grad():
        rows = [row for causal in (True, False) for row in measure(layers, causal, args.sinks)]
    print(table(rows))
    result = {
        "length": args.length,
        "sinks": args.sinks,
        "layers": sorted(layers),
        "heads": sum(len(q) for q, _, _ in layers.values()),
        "model": args.model.name,
        "text": args.text.name,
        "rows": rows,
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot is not None:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
