"""A few ratios that must not get worse, measured in under three minutes and compared with benchmarks/baseline.json.

    python benchmarks/guard.py            measure, print the table, exit with 1 on a regression
    python benchmarks/guard.py --update   measure on a quiet machine and write the baseline

Shape: B 1, H 8, D 64, float32, causal, block 64, rank 8. Speed is torch's scaled_dot_product_attention over multipole
attention, both timed in turn in one run, at two lengths, forward and forward+backward: larger is better. Memory is how
far the process rises in forward+backward, in sizes of q, from the shorter to the longer length: the slope of a linear
method is a small constant; smaller is better. Ratios travel between machines better than times, but not freely: the
baseline names its machine, and another one is said. Run it by hand and in review; timing has no place in the tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farfield.bench import peers
from farfield.bench.case import Case
from farfield.bench.machine import describe_machine
from farfield.bench.memory import why_unmeasured
from farfield.bench.subjects import recipe
from farfield.bench.sweep import Row, Settings, sweep
from farfield.training.files import write_json

FORMAT = "farfield-guard/1"
BASELINE = Path(__file__).with_name("baseline.json")
SPEED_TOLERANCE = 0.25
"""Part of a speed ratio that may be lost: what two quiet runs of one machine differ by, and more."""
MEMORY_TOLERANCE = 0.15
"""Part by which the memory slope may rise."""
FMA = "fma:block=64,rank=8,summary=mean"


@dataclass(frozen=True)
class Ratio:
    """A measured number, how much of it may be lost, and whether a larger one is better."""

    name: str
    value: float
    tolerance: float
    larger_is_better: bool = True

    def worse_than(self, before: float) -> bool:
        """Whether it lies outside what is tolerated."""
        if self.larger_is_better:
            return self.value < before * (1 - self.tolerance)
        return self.value > before * (1 + self.tolerance)


def measure(lengths: tuple[int, int], repeats: int, device: str) -> list[Ratio]:
    """The short list, in the order of the table."""
    subjects = [
        recipe("fma", {"block": 64, "rank": 8, "summary": "mean"}, FMA),
        peers.peer("sdpa", {}, "sdpa"),
    ]
    cases = tuple(Case((n,), causal=True, device=device) for n in lengths)
    rows = {(r.label, r.case.tokens, r.mode): r for r in sweep(subjects, Settings(cases, repeats=repeats)).rows}
    for row in rows.values():
        if row.seconds is None:
            sys.exit(f"{row.label} at {row.case.name} gave no time: {row.reason}")
    found = []
    for n in lengths:
        for mode, name in (("forward", "forward"), ("backward", "forward+backward")):
            ratio = _seconds(rows["sdpa", n, mode]) / _seconds(rows[FMA, n, mode])
            found.append(Ratio(f"speed over SDPA, {name}, {n:,} tokens", ratio, SPEED_TOLERANCE))
    short, long = (rows[FMA, n, "backward"] for n in lengths)
    if short.memory is None or long.memory is None:
        print(f"memory slope not measured: {why_unmeasured(device)}")
        return found
    size = short.case.heads * short.case.head_dim * short.case.size
    slope = (long.memory - short.memory) / (size * (lengths[1] - lengths[0]))
    name = f"memory slope, {lengths[0]:,} to {lengths[1]:,} tokens, sizes of q"
    return [*found, Ratio(name, slope, MEMORY_TOLERANCE, larger_is_better=False)]


def _seconds(row: Row) -> float:
    assert row.seconds is not None
    return row.seconds


def facts(device: str) -> dict[str, Any]:
    """The machine, as the baseline keeps it."""
    machine = describe_machine(device)
    return {name: machine[name] for name in ("processor", "capability", "cores", "threads", "device", "torch")}


def read_baseline(path: Path) -> dict[str, Any] | None:
    """The baseline, or None where there is none yet.

    Raises:
        ValueError: for a file of another kind.
    """
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not a baseline of this script ({FORMAT}); delete it and run with --update")
    return values


def as_baseline(ratios: list[Ratio], machine: dict[str, Any]) -> dict[str, Any]:
    """What ``--update`` writes."""
    listed = {r.name: {"value": round(r.value, 3), "tolerance": r.tolerance} for r in ratios}
    return {"format": FORMAT, "machine": machine, "ratios": listed}


def compare(ratios: list[Ratio], baseline: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines of the table in Markdown, and whether anything got worse than is tolerated."""
    lines = ["| ratio | baseline | now | tolerated | |", "|---|---|---|---|---|"]
    worse = False
    for ratio in ratios:
        before = baseline["ratios"].get(ratio.name)
        if before is None:
            lines.append(f"| {ratio.name} | – | {ratio.value:.2f} | – | new |")
            continue
        kept = Ratio(ratio.name, ratio.value, before["tolerance"], ratio.larger_is_better)
        bad = kept.worse_than(before["value"])
        worse = worse or bad
        sign = "-" if ratio.larger_is_better else "+"
        lines.append(
            f"| {ratio.name} | {before['value']:.2f} | {ratio.value:.2f} | {sign}{kept.tolerance:.0%} "
            f"| {'WORSE' if bad else 'ok'} |"
        )
    missing = [name for name in baseline["ratios"] if name not in {r.name for r in ratios}]
    lines += [f"| {name} | {baseline['ratios'][name]['value']:.2f} | not measured | – | missing |" for name in missing]
    return lines, worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--lengths", default="2048,8192", help="two lengths, the shorter first")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    lengths = tuple(int(n) for n in args.lengths.split(","))
    if len(lengths) != 2 or not 0 < lengths[0] < lengths[1]:
        parser.error(f"--lengths {args.lengths}: two rising numbers would be accepted, such as 2048,8192")
    baseline = None if args.update else read_baseline(args.baseline)
    if baseline is None and not args.update:
        sys.exit(
            f"there is no baseline at {args.baseline}; on a quiet machine: python benchmarks/guard.py --update "
            "(and commit the file)"
        )
    machine = facts(args.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    began = time.perf_counter()
    ratios = measure((lengths[0], lengths[1]), args.repeats, args.device)
    print(f"measured in {time.perf_counter() - began:.0f} s with {torch.get_num_threads()} thread(s)")
    if args.update:
        write_json(args.baseline, as_baseline(ratios, machine))
        for ratio in ratios:
            print(f"{ratio.name}: {ratio.value:.2f}")
        print(f"written to {args.baseline}")
        return
    assert baseline is not None
    other = [
        f"{n} {baseline['machine'].get(n)} there, {v} now"
        for n, v in machine.items()
        if baseline["machine"].get(n) != v
    ]
    if other:
        print(f"note: the baseline is from another machine ({'; '.join(other)}); ratios need not agree")
    lines, worse = compare(ratios, baseline)
    print("\n".join(lines))
    if worse:
        sys.exit(1)


if __name__ == "__main__":
    main()
