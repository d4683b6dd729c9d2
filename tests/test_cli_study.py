"""The command: settings from a file and from the line, results on the screen and in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from farfield.cli import build_app

runner = CliRunner()


def run(*words: object) -> tuple[int, str]:
    import torch

    threads = torch.get_num_threads()
    try:
        result = runner.invoke(build_app(), ["study", *map(str, words)])
    finally:
        torch.set_num_threads(threads)
    return result.exit_code, result.output


def test_a_study_from_a_file(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("near field, far field, level, group, cell\n" * 60)
    config = tmp_path / "study.toml"
    config.write_text(
        'about = "for readers"\nvariants = ["window=window:size=8"]\ncontexts = [32]\nsteps = 100\n'
        "dim = 8\ndepth = 1\nheads = 2\neval_tokens = 64\n"
    )
    words = (text, "--config", config, "--steps", 1, "--seeds", "0,1", "--device", "cpu", "--out", tmp_path / "out")
    code, output = run(*words)
    assert code == 0, output
    assert "| 32 | 1 | window | 2 |" in output
    saved = json.loads((tmp_path / "out" / "study.json").read_text())
    assert saved["study"]["steps"] == 1 and saved["study"]["seeds"] == [0, 1]
    assert "--seeds 0,1" in saved["command"] and "--steps 1" in saved["command"]
    code, output = run(*words)
    assert code == 0 and output.count("found finished") == 2
    code, output = run(text, "-c", config, "--budget", "1s", "--device", "cpu", "--out", tmp_path / "out")
    assert code == 2 and "steps 1 there, None now" in output


def test_what_comes_before_the_budget_and_what_gives_it_its_steps(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("near field, far field, level, group, cell\n" * 60)
    model = ("--dim", 8, "--depth", 1, "--heads", 2, "--contexts", 32, "--eval-tokens", 64, "--device", "cpu")
    words = (text, "--variant", "dense", *model, "--budget", "0.05s", "--out", tmp_path / "out")
    code, output = run(*words, "--pace-only")
    assert code == 0 and "| 32 | 1 | dense | " in output and " | 1.00 |" in output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pace.json"]
    code, output = run(*words, "--ramp", "16x2:3,24x1:2", "--ramps", tmp_path / "kept", "--embedding-lr", 5)
    assert code == 0, output
    saved = json.loads((tmp_path / "out" / "study.json").read_text())
    assert saved["study"]["ramp"] == [[16, 2, 3], [24, 1, 2]] and saved["study"]["embedding_lr"] == 5
    assert "--ramp 16x2:3,24x1:2" in saved["command"] and f"--ramps {tmp_path / 'kept'}" in saved["command"]
    assert len(list((tmp_path / "kept").iterdir())) == 1
    code, output = run(text, "--variant", "dense", *model, "--steps", 1, "--shift", "--out", tmp_path / "shift")
    assert code == 0, output
    saved = json.loads((tmp_path / "shift" / "study.json").read_text())
    assert saved["study"]["shift"] is True and "--shift --" in saved["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", 1), "a study needs variants"),
        (("--variant", "dense"), "a study has one budget"),
        (("--variant", "dense", "--steps", 1, "--contexts", "2k"), "--contexts '2k': whole numbers"),
        (("--variant", "dense:no=1", "--steps", 1), "is no option of dense"),
        (("--variant", "dense", "--steps", 1, "--ramp", "512:3"), "--ramp '512:3': CONTEXTxBATCH:STEPS between commas"),
    ],
)
def test_mistakes_are_named(words: tuple[object, ...], message: str) -> None:
    code, output = run(*words)
    assert code == 2 and message in output


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    code, output = run("--config", bad)
    assert code == 2 and f"cannot read {bad}" in output
    bad.write_text("[]")
    code, output = run("--config", bad)
    assert code == 2 and "holds no settings" in output
