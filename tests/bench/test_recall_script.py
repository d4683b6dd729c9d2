"""The script benchmarks/recall.py: one command makes, keeps and shows its runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recall.py"
FEW = ["--stages", "64:2:2:2,128:2:1:1", "--lengths", "64,128", "--pairs", "2", "--sequences", "3", "--dim", "8"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location("recall", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["recall.py", "--out", str(tmp_path / "out"), *words])
        module.main()

    return run


def test_runs_are_kept_and_shown(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    variants = ["dense", "fma+open=fma:block=16:rank=8:open=2:choose=bounds"]
    command(*FEW, "--seeds", "0,1", *variants)
    paths = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in paths] == [
        f"{name}-seed{seed}.json" for name in ("dense", "fma+open") for seed in (0, 1)
    ]
    record = json.loads(paths[2].read_text())
    assert record["steps"] == 3 and set(record["accuracy"]) == {"64", "128"}
    assert record["settings"]["options"] == {"block": 16, "rank": 8, "open": 2, "choose": "bounds"}
    before = [path.read_bytes() for path in paths]
    both = tmp_path / "all.json", tmp_path / "picture.png"
    command(*FEW, "--seeds", "0,1", *variants, "--json", str(both[0]), "--plot", str(both[1]))
    assert [path.read_bytes() for path in paths] == before
    assert len(json.loads(both[0].read_text())["runs"]) == 4
    assert both[1].read_bytes().startswith(b"\x89PNG")
    assert "| fma+open | 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"dense-seed0.json: lr 0.003 there, 0.1 now; give another --out"):
        command(*FEW, "--lr", "0.1", "dense")
