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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", 1), "a study needs variants"),
        (("--variant", "dense"), "a study has one budget"),
        (("--variant", "dense", "--steps", 1, "--contexts", "2k"), "--contexts '2k': whole numbers"),
        (("--variant", "dense:no=1", "--steps", 1), "is no option of dense"),
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
