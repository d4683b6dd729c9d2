"""Keeps the finished runs of studies in one file, prints their tables, and draws them.

    python benchmarks/keep_study.py books --add runs/books2k runs/books8k
    python benchmarks/keep_study.py wiki --contexts 4096 --plot docs/images/study_steps.png

``--add`` puts the runs of `farfield study` under one name, in place of what is there. Without it, nothing changes: the
runs under all the names are one table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farfield.bench.plots import png
from farfield.bench.study_report import Row, markdown, study_figure
from farfield.training.files import write_atomically

FILE = Path(__file__).parent / "results" / "study.json"
FORMAT = "farfield-study-results/1"
RUN = ("bits", "steps", "tokens", "seconds", "parameters", "positions")
EACH = ("label", "recipe", "options", "context", "batch", "seed")
MACHINE = ("processor", "cores", "threads", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="of studies in the file")
    parser.add_argument("--add", nargs="+", type=Path, metavar="DIR", help="folders of farfield study")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--contexts", help="such as 2048,4096 (default: all)")
    args = parser.parse_args()
    kept = read(args.file)
    if args.add:
        if len(args.names) != 1:
            sys.exit(f"error: {len(args.names)} names for what is added; give one")
        kept[args.names[0]] = study_of(args.add)
        write(args.file, kept)
    missing = [name for name in args.names if name not in kept]
    if missing:
        sys.exit(f"error: {args.file} has no study {', '.join(missing)}; it has {', '.join(kept)}")
    contexts = [int(number) for number in args.contexts.split(",")] if args.contexts else None
    rows = rows_of([kept[name] for name in args.names], contexts)
    unit = "bits per hidden byte" if kept[args.names[0]]["settings"]["task"] == "masked" else "bits per byte"
    print(markdown(rows, unit))
    if args.plot is not None:
        args.plot.write_bytes(png(study_figure(rows, unit)))


def read(path: Path) -> dict[str, Any]:
    """Studies by name; none where there is no file."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["studies"]
    return found


def write(path: Path, studies: dict[str, Any]) -> None:
    """One line for every run, so that a change shows what it changes."""
    pieces = []
    for name, study in studies.items():
        runs = ",\n".join(json.dumps(run) for run in study["runs"])
        rest = json.dumps({key: value for key, value in study.items() if key != "runs"})
        pieces.append(f'{json.dumps(name)}: {rest[:-1]}, "runs": [\n{runs}]}}')
    text = f'{{"format": "{FORMAT}", "studies": {{\n' + ",\n".join(pieces) + "\n}}\n"
    write_atomically(path, text.encode())


def study_of(folders: Sequence[Path]) -> dict[str, Any]:
    """Settings that all runs share, the machine, the runs, and the pace where it was measured."""
    files = sorted(path for folder in folders for path in (folder / "runs").glob("*.json"))
    if not files:
        sys.exit(f"error: no finished run in {', '.join(map(str, folders))}")
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    keys = [run["key"] for run in runs]
    settings = {
        name: value
        for name, value in keys[0].items()
        if name not in (*EACH, "defaults") and all(k[name] == value for k in keys)
    }
    kept = [
        {
            **{name: run["key"][name] for name in EACH}, **{name: _short(run[name]) for name in RUN},
            "level_bias": _short(run["level_bias"] or []), "windows": _short(run["windows"]),
        }
        for run in runs
    ]  # fmt: skip
    machine = {name: runs[0]["machine"].get(name) for name in MACHINE}
    found: dict[str, Any] = {"settings": settings, "machine": machine, "runs": kept}
    paces = [path for folder in folders if (path := folder / "pace.json").exists()]
    if paces:
        cells = [json.loads(path.read_text(encoding="utf-8"))["cells"] for path in paces]
        found["pace"] = {
            name: {"median": _short(statistics.median(cell["seconds"])), "seconds": _short(cell["seconds"])}
            for some in cells
            for name, cell in some.items()
        }
    return found


def _short(value: Any) -> Any:
    """Six digits of every number."""
    if isinstance(value, list):
        return [_short(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def rows_of(studies: Sequence[dict[str, Any]], contexts: Sequence[int] | None) -> list[Row]:
    """A row for each label, context and batch, the best first."""
    cells: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    paces: dict[str, float] = {}
    for study in studies:
        paces |= {name: pace["median"] for name, pace in study.get("pace", {}).items()}
        for run in study["runs"]:
            if contexts is None or run["context"] in contexts:
                cells.setdefault((run["label"], run["context"], run["batch"]), []).append(run)
    rows = []
    for (label, context, batch), runs in cells.items():
        bits, seconds, steps = ([run[name] for run in runs] for name in ("bits", "seconds", "steps"))
        pace = paces.get(f"{label}-n{context}-b{batch}")
        rows.append(
            Row(
                label=label, context=context, batch=batch, seeds=len(runs), bits=statistics.fmean(bits), low=min(bits),
                high=max(bits), last=statistics.fmean(run["positions"][-1][2] for run in runs),
                steps=statistics.fmean(steps),
                step_ms=statistics.median(1000 * s / n for s, n in zip(seconds, steps, strict=True)),
                tokens_per_second=sum(run["tokens"] for run in runs) / sum(seconds), peak_bytes=None,
                parameters=runs[0]["parameters"], pace_ms=None if pace is None else 1000 * pace,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row.context, row.batch, row.bits))


if __name__ == "__main__":
    main()
