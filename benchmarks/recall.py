"""Associative recall from far away: which attention fetches one exact token?

    python benchmarks/recall.py --out runs/recall --seeds 0,1,2
    python benchmarks/recall.py --out runs/recall --table --json recall.json --plot recall.png

The task is `farfield.data.recall`: pairs of key and value in the first quarter of a sequence, the keys again in its
last quarter; at each of these queries the model has to name the value. Every attention gets the same model (two layers
of width 64 with 2 heads, no positions, the token before each as a second input), the same seeds, steps and batches, and
the same curriculum: from 64 tokens, where a window reaches every pair, to 8,192. What counts is the accuracy on
sequences that were not trained on, at 1,024 to 8,192 tokens.

Every finished run is kept in OUT as JSON and not repeated; one with other settings under the same label and seed is
refused. A variant is LABEL=RECIPE[:OPTION=VALUE...].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from farfield.bench.machine import describe_machine
from farfield.bench.variants import Variant, parse_variant
from farfield.data.recall import RecallStages, RecallTask, Stage
from farfield.models.language import LanguageConfig
from farfield.models.recall import RecallModel
from farfield.training.files import write_json
from farfield.training.loop import TrainConfig, Trainer

VARIANTS = (
    "dense",
    "window=window:size=96",
    "blocks=blocks:block=32",
    "fma=fma:block=32:rank=16",
    "fma+open=fma:block=32:rank=16:open=16:beam=32:choose=bounds",
)
STAGES = "64:6:200:16,128:8:60:16,256:16:60:8,1024:16:40:4,2048:16:20:2,4096:16:20:1,8192:16:15:1"


def stages_of(text: str) -> list[Stage]:
    """LENGTH:PAIRS:STEPS:ROWS,... -> stages."""
    return [Stage(*(int(number) for number in stage.split(":"))) for stage in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), help="LABEL=RECIPE[:OPTION=VALUE...]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--stages", default=STAGES, help="LENGTH:PAIRS:STEPS:ROWS,...")
    parser.add_argument("--lengths", default="1024,2048,4096,8192", help="lengths to test at")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a tested sequence")
    parser.add_argument("--sequences", type=int, default=32, help="sequences tested at each length")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="train nothing, use what is there")
    parser.add_argument("--json", type=Path, help="all runs in one file")
    parser.add_argument("--plot", type=Path, help="accuracy by length as PNG")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        chosen = [parse_variant(text) for text in args.variants]
        plan = [(variant, seed) for seed in map(int, args.seeds.split(",")) for variant in chosen]
        for variant, seed in plan:  # all of them before the first one is trained
            found = finished(args, variant, seed)
            different = [] if found is None else differing(found["settings"], settings(args, variant))
            if different:
                sys.exit(f"error: {path_of(args.out, variant.label, seed)}: {'; '.join(different)}; give another --out")
        for variant, seed in plan:
            if finished(args, variant, seed) is None:
                run(args, variant, seed)
    runs = [json.loads(path.read_text()) for path in sorted(args.out.glob("*-seed*.json"))]
    if not runs:
        sys.exit(f"error: {args.out} holds no finished run")
    table(runs)
    if args.json is not None:
        write_json(args.json, {"format": "farfield-recall/1", "runs": runs})
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_bytes(picture(runs))


def path_of(out: Path, label: str, seed: int) -> Path:
    """Where a run's record lies."""
    return out / f"{label}-seed{seed}.json"


def settings(args: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """What decides a run besides its seed, as JSON gives it back."""
    named = ("stages", "lengths", "pairs", "sequences", "dim", "depth", "heads", "lr", "device")
    asked = {"recipe": variant.recipe, "options": variant.options, **{name: getattr(args, name) for name in named}}
    read_back: dict[str, Any] = json.loads(json.dumps(asked))
    return read_back


def finished(args: argparse.Namespace, variant: Variant, seed: int) -> dict[str, Any] | None:
    """The record of a run that was made already."""
    path = path_of(args.out, variant.label, seed)
    return json.loads(path.read_text()) if path.exists() else None


def differing(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, where settings differ."""
    return [f"{name} {there.get(name)!r} there, {now[name]!r} now" for name in now if there.get(name) != now[name]]


def run(args: argparse.Namespace, variant: Variant, seed: int) -> None:
    """Trains, tests and saves one model."""
    task = RecallTask()
    batches = RecallStages(task, stages_of(args.stages), seed)
    longest = max(stage.length for stage in batches.stages)
    config = LanguageConfig(
        variant.recipe,
        variant.options,
        dim=args.dim,
        depth=args.depth,
        num_heads=args.heads,
        rope=None,
        vocab=task.vocab,
        context=longest,
        shift=True,
    )
    model = RecallModel(config, task, seed=seed).to(args.device)
    training = TrainConfig(context=longest, lr=args.lr, steps=batches.steps, cooldown=0.5, weight_decay=0.0, seed=seed)
    trainer = Trainer(model, batches, training)
    name = f"{variant.label}, seed {seed}"

    def show(progress: Any) -> None:
        length = batches.stage(progress.step).length
        if sys.stderr.isatty() or progress.step % 50 == 0:
            end = "" if sys.stderr.isatty() else "\n"
            said = f"{name}: step {progress.step} of {batches.steps}, {length:,} tokens, loss {progress.loss:.3f}"
            print(f"\r{said}   ", end=end, file=sys.stderr, flush=True)

    history = trainer.run(on_progress=show)
    trained = history[-1].seconds
    accuracy = {}
    model.eval()
    for length in map(int, args.lengths.split(",")):
        begun = time.perf_counter()
        rows = max(1, 4096 // length)
        with torch.no_grad():
            right = [
                model.correct(batch.to(args.device)).float().mean(1)
                for batch in task.held_out(length, args.pairs, args.sequences, rows)
            ]
        accuracy[str(length)] = float(torch.cat(right).mean())
        print(
            f"\r{name}: {length:,} tokens: {accuracy[str(length)]:.1%} right ({time.perf_counter() - begun:.0f} s)   ",
            flush=True,
        )
    record = {
        "label": variant.label,
        "seed": seed,
        "accuracy": accuracy,
        "chance": task.chance,
        "queries": args.sequences * args.pairs,
        "steps": trainer.step,
        "seconds": trained,
        "loss": [round(p.loss, 4) for p in history[9::10]],
        "parameters": model.parameter_count(),
        "task": dataclasses.asdict(task),
        "machine": describe_machine(args.device),
        "settings": settings(args, variant),
    }
    write_json(path_of(args.out, variant.label, seed), record)


def grouped(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs by label, the most accurate first."""
    labels: dict[str, list[dict[str, Any]]] = {}
    for record in runs:
        labels.setdefault(record["label"], []).append(record)

    def mean(label: str) -> float:
        return statistics.mean(value for record in labels[label] for value in record["accuracy"].values())

    return {label: labels[label] for label in sorted(labels, key=mean, reverse=True)}


def table(runs: Sequence[dict[str, Any]]) -> None:
    """Prints means over seeds, and the lowest seed where there are several."""
    lengths = list(runs[0]["accuracy"])
    print("| attention | seeds | " + " | ".join(f"{int(n):,}" for n in lengths) + " | training |")
    print("|---" * (len(lengths) + 3) + "|")
    for label, records in grouped(runs).items():
        cells = []
        for length in lengths:
            values = [100 * r["accuracy"][length] for r in records]
            least = f" ({min(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{least}")
        seconds = statistics.median(r["seconds"] for r in records)
        print(f"| {label} | {len(records)} | {' | '.join(cells)} | {seconds:.0f} s |")


def picture(runs: Sequence[dict[str, Any]]) -> bytes:
    """Accuracy by length, a line for every attention: the mean over seeds, and each seed as a point."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from farfield.bench.plots import legend, length_axis, looks, png, tidy
    from farfield.explain.show import STYLE

    labels = grouped(runs)
    style = looks(list(labels))
    lengths = [int(n) for n in runs[0]["accuracy"]]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        axes = figure.subplots()
        for label, records in labels.items():
            colour, marker = style[label]
            rows = [[100 * r["accuracy"][str(n)] for n in lengths] for r in records]
            mean = [statistics.mean(column) for column in zip(*rows, strict=True)]
            axes.plot(lengths, mean, color=colour, marker=marker, markerfacecolor="white", linewidth=1.8)
            for row in rows:
                axes.plot(lengths, row, color=colour, marker=".", markersize=4, linestyle="none", alpha=0.6)
        chance = 100 * runs[0]["chance"]
        axes.axhline(chance, color="#9ca3af", linewidth=0.9, linestyle=(0, (2, 3)))
        length_axis(axes, lengths)
        axes.set_ylim(-3, 103)
        axes.set_xlabel(f"length in tokens (dotted: a guess, {chance:.0f} %)")
        axes.set_ylabel("right answers in percent")
        tidy(axes)
        legend(figure, style, list(labels))
        return png(figure)


if __name__ == "__main__":
    main()
