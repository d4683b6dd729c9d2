"""Runs of studies in one file, and their tables."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import Result

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "keep_study.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("keep_study", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_studies_are_kept_by_name(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    invoke: Callable[..., Result],
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 96)) * 60)
    arguments = ["study", str(text), "--variant", "dense", "--variant", "near=blocks:block=8", "--contexts", "32",
                 "--seeds", "0,1", "--steps", "2", "--dim", "16", "--depth", "1", "--heads", "2", "--eval-tokens", "96",
                 "--device", "cpu", "--out", str(tmp_path / "runs")]  # fmt: skip
    made = invoke(*arguments)
    assert made.exit_code == 0, made.output
    capsys.readouterr()
    file = tmp_path / "study.json"
    monkeypatch.setattr(sys, "argv", ["x", "one", "--file", str(file), "--add", str(tmp_path / "runs")])
    script.main()
    said = capsys.readouterr().out
    first = file.read_bytes()
    study = json.loads(first)["studies"]["one"]
    assert study["settings"]["steps"] == 2 and "seed" not in study["settings"]
    assert [(run["label"], run["seed"]) for run in study["runs"]] == [
        ("dense", 0),
        ("dense", 1),
        ("near", 0),
        ("near", 1),
    ]
    mean = sum(run["bits"] for run in study["runs"][:2]) / 2
    assert f"| 32 | 1 | dense | 2 | {mean:.4f} |" in said
    # Read and written again, it is the same, a line for every run.
    script.write(file, script.read(file))
    assert file.read_bytes() == first and first.count(b"\n") == 7
    plot = tmp_path / "p.png"
    monkeypatch.setattr(sys, "argv", ["x", "one", "--file", str(file), "--plot", str(plot)])
    script.main()
    assert plot.read_bytes().startswith(b"\x89PNG")
    for argv, message in (
        (["two", "--file", str(file)], "has no study two; it has one"),
        (["one", "two", "--file", str(file), "--add", str(tmp_path / "runs")], "give one"),
        (["one", "--file", str(file), "--add", str(tmp_path / "none")], "no finished run"),
    ):
        monkeypatch.setattr(sys, "argv", ["x", *argv])
        with pytest.raises(SystemExit, match=message):
            script.main()
    assert file.read_bytes() == first
