"""The vision benchmarks run from their command lines, on data made here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.vision_data import labelled_archive

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'cli')")

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_equal_time_gives_each_attention_the_steps_it_can_afford(tmp_path: Path) -> None:
    out = tmp_path / "out"
    archive = labelled_archive(tmp_path / "train.npz")
    options = ("--attention", "dense,na", "--steps", 3, "--batch", 2, "--examples", 4, "--out", out)
    run("equal_time.py", archive, *options, "--reference", "dense")
    found = json.loads((out / "steps.json").read_text())
    assert found["steps"]["dense"] == 3
    for name, seconds in found["seconds"].items():
        assert found["steps"][name] == round(3 * found["seconds"]["dense"] / seconds)
        (made,) = json.loads((out / name / "results.json").read_text())["runs"]
        assert (made["attention"], made["steps"]) == (name, found["steps"][name])


def test_a_whole_field_as_tokens(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", relief=np.random.default_rng(0).integers(-9, 9, (30, 41)).astype(np.int16))
    run("relief.py", tmp_path / "f.npz", "--out", tmp_path / "r.json", "--threads", 1)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["tokens"] == 30 * 41 and found["backward_seconds"] > 0 and 0 < found["loss"] < 10


def test_cost_by_resolution(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    said = run("resolution.py", "--first", 32, "--longest", 64, "--at", 64, "--attention", "dense,na", "--threads", 1,
               "--out", out)  # fmt: skip
    ratios = json.loads(out.read_text())["at 64"]
    assert ratios["dense"]["times faster than dense"] == 1.0 and ratios["na"]["times faster than dense"] > 0
    assert "na times faster than dense" in said
