"""The script benchmarks/text_study.py: what it reuses, and what it refuses to."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "text_study.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("text_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    text = tmp_path / "text.txt"
    text.write_text("near field, far field, level, group, cell, rank, summary\n" * 100)
    values = {"--text": text, "--out": tmp_path / "out", "--context": 64, "--steps": 2, "--eval-tokens": 128}

    def run(*variants: str, **changes: object) -> None:
        given = {**values, **{"--" + name.replace("_", "-"): value for name, value in changes.items()}}
        words = [str(word) for name, value in given.items() if value is not None for word in (name, value)]
        monkeypatch.setattr(sys, "argv", ["text_study.py", *words, *(variants or ("fma=fma:block=8:rank=2",))])
        study.main()

    return run


def test_a_finished_run_is_reused_and_other_settings_are_refused(
    command: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(command)
    command()
    (path,) = (tmp_path / "out").iterdir()
    before = path.read_bytes()
    record = json.loads(before)
    assert record["settings"]["steps"] == 2
    assert len(record["level_bias"]) == 4
    command()
    assert path.read_bytes() == before
    other = tmp_path / "other.txt"
    other.write_text("other " * 200)
    for changes, message in (
        ({"steps": 3}, "steps 2 there, 3 now"),
        ({"steps": None, "seconds": 0.5}, "seconds None there, 0.5 now"),
        ({"context": 32}, "context 64 there, 32 now"),
        ({"batch": 2}, "batch 1 there, 2 now"),
        ({"lr": 0.5}, "lr 0.003 there, 0.5 now"),
        ({"eval_tokens": 64}, "eval_tokens 128 there, 64 now"),
        ({"text": other}, "text "),
    ):
        with pytest.raises(SystemExit, match=message):
            command(**changes)
    with pytest.raises(SystemExit, match="recipe 'fma' there, 'dense' now"):
        command("fma=dense")
    with pytest.raises(SystemExit, match=r"options .*'rank': 2.* there, .*'rank': 4.* now"):
        command("fma=fma:block=8:rank=4")
    assert path.read_bytes() == before
    assert "| fma | 1 |" in capsys.readouterr().out


def test_records_without_settings_stay_readable(command: object, tmp_path: Path) -> None:
    assert callable(command)
    command()
    (path,) = (tmp_path / "out").iterdir()
    record = json.loads(path.read_text())
    del record["settings"]
    path.write_text(json.dumps(record))
    command()
    command(eval_tokens=64)
    command(steps=None, seconds=0.5)
    with pytest.raises(SystemExit, match="steps 2 there, 3 now"):
        command(steps=3)
    with pytest.raises(SystemExit, match="lr"):
        command(lr=0.5)
