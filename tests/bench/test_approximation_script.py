"""The approximations of benchmarks/approximation.py: exact where they must be, and counted right."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("gguf")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "approximation.py"
LENGTH = 64


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("approximation", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["approximation"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def qk() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, LENGTH, 16, generator=generator)
    return q * 16**-0.25, k * 16**-0.25


def exact(script: ModuleType, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    return script.scores(q, k, causal).softmax(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("causal", [True, False])
def test_with_all_keys_they_are_exact(script: ModuleType, qk: tuple[Tensor, Tensor], causal: bool) -> None:
    true = exact(script, *qk, causal)
    whole = {
        "window": script.window(2 * LENGTH),
        "largest": script.largest(LENGTH),
        "rank": script.best_rank(LENGTH),
        "segments": script.linformer(LENGTH),
        "multipole": script.multipole(8, 8, levels=1),
        "window and sinks": script.window(4, LENGTH),
        "opened": script.multipole(8, 4, levels=1, open=LENGTH, page=2),
    }
    if not causal:
        whole["nystrom"] = script.nystrom(LENGTH)
    for name, weights in whole.items():
        # Orthogonal features and pseudoinverses are float32 like everything else here.
        tolerance = 5e-3 if name == "nystrom" else 1e-5
        assert torch.allclose(weights(*qk, causal), true, atol=tolerance), name


@pytest.mark.parametrize("causal", [True, False])
def test_weights_add_up_to_one_and_look_back_only(script: ModuleType, qk: tuple[Tensor, Tensor], causal: bool) -> None:
    for weights in (
        script.window(9), script.largest(9), script.linformer(8), script.performer(24), script.multipole(8, 2),
        script.multipole(8, 2, levels=1, open=3, page=2, share=4), script.window(9, 3), script.multipole(8, 2, 3),
    ):  # fmt: skip
        found = weights(*qk, causal)
        assert torch.allclose(found.sum(-1), torch.ones(3, LENGTH), atol=1e-5) and found.min() >= 0
        assert not causal or bool((found.triu(1) == 0).all())
    with pytest.raises(ValueError, match="no causal form"):
        script.nystrom(4)(*qk, True)


def test_features_approach_softmax(script: ModuleType, qk: tuple[Tensor, Tensor]) -> None:
    true = exact(script, *qk, True)
    errors = [float((script.performer(m)(*qk, True) - true).abs().sum(-1).mean()) for m in (8, 128, 2048)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_keys_are_those_that_are_scored(script: ModuleType) -> None:
    # 64 tokens in 8 blocks of 8, 4 groups of 16 above them; 2 cells in each far group.
    keys = []
    for b in range(8):
        near = sum(8 for g in range(8) if abs(g - b) <= 1)
        far = sum(abs(g - b) > 1 and abs(g // 2 - b // 2) <= 1 for g in range(8))
        keys.append(near + 2 * (far + sum(abs(g - b // 2) > 1 for g in range(4))))
    assert script.counted(8, 2, LENGTH, False) == pytest.approx(sum(keys) / 8)
    zero = torch.zeros(1, LENGTH, 8)
    seen = (script.multipole(8, 2)(zero, zero, True) > 0).sum(-1).float().mean()
    # The weights say how many tokens a row reaches, the count with how many scores.
    assert 8 < script.counted(8, 2, LENGTH, True) < float(seen) == (LENGTH + 1) / 2
    for causal, most in ((True, 512), (False, 1024)):
        assert all(0 < a.keys <= most for a in script.approximations(512, causal, 4))


def test_rows_table_and_picture(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    few = [
        script.Approximation("window", "8", 8.0, script.window(8)),
        script.Approximation("window", "64", 32.5, script.window(64)),
        script.Approximation("multipole (fma)", "block 8, rank 2", 20.0, script.multipole(8, 2)),
    ]
    monkeypatch.setattr(script, "approximations", lambda length, causal, sinks: few)
    torch.manual_seed(0)
    rows = script.measure({5: tuple(torch.randn(3, 4, LENGTH, 16))}, True, 0)
    assert [row["output"] for row in rows][1] < 1e-6 < rows[0]["output"] and rows[0]["variation"] < 1
    assert rows[0]["output_low"] <= rows[0]["output"] <= rows[0]["output_high"]
    assert "window, 8: 8 keys" in capsys.readouterr().err
    assert "| causal | window | 8 | 8 |" in script.table(rows)
    json.dumps(rows)
    script.draw([*rows, *({**row, "causal": False} for row in rows)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
