"""The script benchmarks/guard.py: what it calls worse, and what it says without a baseline. Nothing is timed here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "guard.py"


@pytest.fixture(scope="module")
def guard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guard", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guard"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def run(guard: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["guard.py", *map(str, arguments)])
    guard.main()


def test_what_is_worse(guard: ModuleType) -> None:
    speed = guard.Ratio("a", 7.4, 0.25)
    assert speed.worse_than(10.0) and not speed.worse_than(9.8)
    memory = guard.Ratio("b", 5.8, 0.15, larger_is_better=False)
    assert memory.worse_than(5.0) and not memory.worse_than(5.1)


def test_update_then_compare(
    guard: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "baseline.json"
    ratios = [guard.Ratio("speed", 10.0, 0.25), guard.Ratio("memory", 5.0, 0.15, larger_is_better=False)]
    monkeypatch.setattr(guard, "measure", lambda *_: ratios)
    with pytest.raises(SystemExit, match=r"there is no baseline at .* python benchmarks/guard\.py --update"):
        run(guard, monkeypatch, "--baseline", path)
    run(guard, monkeypatch, "--baseline", path, "--update")
    assert json.loads(path.read_text())["ratios"]["speed"] == {"value": 10.0, "tolerance": 0.25}
    run(guard, monkeypatch, "--baseline", path)
    assert "| speed | 10.00 | 10.00 | -25% | ok |" in capsys.readouterr().out
    ratios[0] = guard.Ratio("speed", 7.0, 0.25)
    with pytest.raises(SystemExit) as stopped:
        run(guard, monkeypatch, "--baseline", path)
    assert stopped.value.code == 1
    assert "| speed | 10.00 | 7.00 | -25% | WORSE |" in capsys.readouterr().out


def test_another_machine_is_said(
    guard: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "baseline.json"
    monkeypatch.setattr(guard, "measure", lambda *_: [guard.Ratio("speed", 10.0, 0.25)])
    run(guard, monkeypatch, "--baseline", path, "--update")
    values = json.loads(path.read_text())
    values["machine"]["processor"] = "an abacus"
    path.write_text(json.dumps(values))
    run(guard, monkeypatch, "--baseline", path)
    assert "processor an abacus there" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_ceilings")
def test_the_short_list(guard: ModuleType) -> None:
    names = [ratio.name for ratio in guard.measure((64, 128), 1, "cpu")]
    assert names[:4] == [
        f"speed over SDPA, {mode}, {n} tokens" for n in (64, 128) for mode in ("forward", "forward+backward")
    ]
