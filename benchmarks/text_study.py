"""Trains one small language model with variants of an attention; held-out bits per byte and their spread over seeds.

    python benchmarks/text_study.py --out runs/study --steps 600 --context 4096 --seeds 0,1,2 \
        near=blocks window=window fma=fma mean=fma:summary=mean cells=fma:rotate=cells

A variant is LABEL=RECIPE[:OPTION=VALUE...]. Every finished run is kept in OUT as JSON and not repeated; one with other
settings under the same label and seed is refused. Several of these commands may share OUT. ``--table`` only prints what
is there. ``farfield study`` does the same for several contexts and batches, and for masked modelling.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import torch

from farfield.bench.study import level_biases
from farfield.bench.variants import parse_variant
from farfield.data.text import collect
from farfield.models.language import LanguageConfig, LanguageModel
from farfield.training.evaluate import evaluate
from farfield.training.files import write_json
from farfield.training.loop import TrainConfig, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help="LABEL=RECIPE[:OPTION=VALUE...]")
    parser.add_argument(
        "--text",
        action="append",
        help="file, folder or glob, may be given again; default: the standard library's sources",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr)
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--eval-tokens", type=int, default=262144)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        torch.set_num_threads(args.threads)
        corpus = collect(args.text)
        split = corpus.split(args.context)
        variants = [parse_variant(text) for text in args.variants]
        plan = [
            (v.label, v.recipe, dict(v.options), seed) for seed in map(int, args.seeds.split(",")) for v in variants
        ]
        for label, recipe, options, seed in plan:  # all of them before the first one is trained
            path = run_path(args.out, label, seed)
            if path.exists():
                different = differences(
                    json.loads(path.read_text()), settings(args, recipe, options, corpus.fingerprint)
                )
                if different:
                    sys.exit(f"error: {path} has other settings ({'; '.join(different)}); give another label or --out")
        for label, recipe, options, seed in plan:
            run(args, label, recipe, options, seed, corpus.fingerprint, split.train, split.valid)
    table(args.out)


def run_path(out: Path, label: str, seed: int) -> Path:
    """Where a run's record lies."""
    return out / f"{label}-seed{seed}.json"


def settings(args: argparse.Namespace, recipe: str, options: dict[str, object], fingerprint: str) -> dict[str, object]:
    """What decides a run besides its seed, as JSON gives it back."""
    asked = {
        "recipe": recipe,
        "options": options,
        "context": args.context,
        "batch": args.batch,
        "lr": args.lr,
        "steps": args.steps,
        "seconds": args.seconds,
        "eval_tokens": args.eval_tokens,
        "text": fingerprint,
    }
    read_back: dict[str, object] = json.loads(json.dumps(asked))
    return read_back


def differences(record: dict[str, object], asked: dict[str, object]) -> list[str]:
    """In words, where a stored run was made with other settings than those asked for.

    Records of earlier versions keep some settings at their top level, and there ``steps`` and ``seconds`` are those
    that were taken; what such a record does not say counts as equal.
    """
    stored = record.get("settings")
    if not isinstance(stored, dict):
        unknown = {"seconds", *(["steps"] if asked["seconds"] is not None or asked["steps"] is None else [])}
        stored = {name: record[name] for name in asked if name in record and name not in unknown}
    return [
        f"{name} {stored[name]!r} there, {value!r} now"
        for name, value in asked.items()
        if name in stored and stored[name] != value
    ]


def run(
    args: argparse.Namespace,
    label: str,
    recipe: str,
    options: dict[str, object],
    seed: int,
    fingerprint: str,
    train: object,
    valid: object,
) -> None:
    """One training run, unless its result is there."""
    path = run_path(args.out, label, seed)
    if path.exists():
        return
    model = LanguageModel(LanguageConfig(recipe, options, context=args.context), seed=seed)
    config = TrainConfig(
        context=args.context, batch=args.batch, lr=args.lr, seed=seed, steps=args.steps, seconds=args.seconds
    )
    trainer = Trainer(model, train, config)  # type: ignore[arg-type]
    trainer.run(
        on_progress=lambda p: print(f"\r{label} seed {seed} step {p.step} {p.train_bits:.3f}", end="", flush=True)
    )
    result = evaluate(model, valid, args.context, max_tokens=args.eval_tokens)  # type: ignore[arg-type]
    record = {
        "label": label,
        "recipe": recipe,
        "options": options,
        "seed": seed,
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "context": args.context,
        "batch": args.batch,
        "lr": args.lr,
        "bits": result.bits,
        "positions": result.positions,
        "level_bias": level_biases(model),
        "parameters": model.parameter_count(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "torch": torch.__version__,
        "settings": settings(args, recipe, options, fingerprint),
    }
    write_json(path, record)
    print(
        f"\r{label} seed {seed}: {result.bits:.4f} bits per byte after {trainer.step} steps, {trainer.seconds:.0f} s",
        flush=True,
    )


def table(out: Path) -> None:
    """Prints mean, standard deviation and range over seeds for every label."""
    runs: dict[str, list[dict[str, object]]] = {}
    for path in sorted(out.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        runs.setdefault(record["label"], []).append(record)
    print("| variant | seeds | bits per byte | std | min | max | steps | ms per step | last octave |")
    print("|---|---|---|---|---|---|---|---|---|")
    for label, records in sorted(runs.items(), key=lambda item: statistics.mean(r["bits"] for r in item[1])):  # type: ignore[misc]
        bits = [float(r["bits"]) for r in records]  # type: ignore[arg-type]
        steps = statistics.mean(int(r["steps"]) for r in records)  # type: ignore[call-overload]
        each = statistics.median(1000 * float(r["seconds"]) / int(r["steps"]) for r in records)  # type: ignore[arg-type, call-overload]
        last = statistics.mean(r["positions"][-1][2] for r in records)  # type: ignore[index]
        spread = statistics.stdev(bits) if len(bits) > 1 else float("nan")
        print(
            f"| {label} | {len(bits)} | {statistics.mean(bits):.4f} | {spread:.4f} | {min(bits):.4f} | {max(bits):.4f} "
            f"| {steps:.0f} | {each:.0f} | {last:.4f} |"
        )


if __name__ == "__main__":
    main()
