"""The comparisons of docs/vision.md, by the commands that vision.json keeps.

    python benchmarks/vision_study.py DATA --only camvid_half,climatology --out runs
    python benchmarks/vision_study.py DATA --only cifar_converged,camvid_converged --device cuda --out runs
    python benchmarks/vision_study.py --list

DATA is a folder; the files that a command names are looked for below it. Every study has its folder in OUT, with the
report of `farfield compare`; finished runs in there are kept, so the same command goes on where it was stopped. Those
that end in "converged" are for a GPU. `benchmarks/collect.py` makes of the folders what benchmarks/results/ keeps.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

STUDIES = Path(__file__).with_name("vision.json")


def command(words: str, data: Path, out: Path, more: list[str]) -> list[str]:
    """The command line of one study, its files found below ``data``."""
    found = []
    for word in shlex.split(words):
        if not word.endswith((".npz", ".npz.xz", ".nc")):
            found.append(word)
            continue
        paths = sorted(data.rglob(word))
        if not paths:
            sys.exit(f"there is no {word} below {data}")
        found.append(str(paths[0]))
    return [sys.executable, "-m", "farfield.cli", "compare", *found, *more, "--out", str(out), "--resume"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--list", action="store_true", help="print the studies and end")
    parser.add_argument("--only", help="names, separated by commas; all that do not end in converged by default")
    parser.add_argument("--studies", type=Path, default=STUDIES)
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    given = parser.parse_args()
    studies: dict[str, str] = json.loads(given.studies.read_text())
    if given.list:
        print("\n".join(f"{name}: farfield compare {words}" for name, words in studies.items()))
        return
    names = given.only.split(",") if given.only else [n for n in studies if not n.endswith("converged")]
    unknown = [name for name in names if name not in studies]
    if unknown:
        parser.error(f"unknown studies {unknown}: {', '.join(studies)} would be accepted")
    if given.data is None:
        parser.error("no DATA given: the folder that holds the files")
    more = [] if given.device is None else ["--device", given.device]
    for name in names:
        print(f"== {name}", flush=True)
        done = subprocess.run(command(studies[name], given.data, given.out / name, more), check=False)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
