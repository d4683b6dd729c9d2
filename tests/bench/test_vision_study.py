"""The kept commands of docs/vision.md: the same words in both places, and they run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.vision_data import labelled_archive

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'cli')")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "vision_study.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


def test_docs_and_file_have_the_same_commands() -> None:
    kept = json.loads((ROOT / "benchmarks" / "vision.json").read_text())
    measured = (ROOT / "docs" / "vision.md").read_text().partition("\n## Measured")[2].replace("\\\n", " ")
    lines = re.findall(r"^    farfield compare (.*?) --out runs/(\w+)$", measured, re.MULTILINE)
    shown = {name: " ".join(words.split()) for words, name in lines if not words.startswith("runs/")}
    assert shown == {name: words for name, words in kept.items() if not name.endswith("converged")}


def test_a_study_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    labelled_archive(tmp_path / "data" / "train.npz")
    studies = tmp_path / "studies.json"
    studies.write_text(json.dumps({"small": "train.npz --attention na --steps 2 --batch 2 --examples 4 --no-cost"}))
    asked = (tmp_path / "data", "--studies", studies, "--out", tmp_path / "runs", "--device", "cpu")
    first = run(*asked)
    assert first.returncode == 0, first.stderr
    made = tmp_path / "runs" / "small" / "runs" / "na-seed0.json"
    before = made.stat().st_mtime_ns
    assert run(*asked).returncode == 0 and made.stat().st_mtime_ns == before


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert "there is no cifar10_train_jpeg.npz below" in run(tmp_path, "--only", "cifar").stderr
    assert "cifar_converged" in run(tmp_path, "--only", "other").stderr and "no DATA given" in run().stderr
    kept = json.loads((ROOT / "benchmarks" / "vision.json").read_text())
    assert run("--list").stdout.count("farfield compare") == len(kept)
