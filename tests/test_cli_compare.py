"""The commands compare and show as their users run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import farfield

SOURCES = str(Path(farfield.__file__).parents[1])
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(Path(farfield.__file__).parents[1]), os.environ.get("PYTHONPATH")])
    ),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "160",
    "NO_COLOR": "1",
}
PROGRAM = [sys.executable, "-W", "error", "-m", "farfield.cli"]
TINY = [
    "--context", "128", "--dim", "32", "--depth", "1", "--heads", "2", "--block", "16", "--rank", "4",
    "--eval-tokens", "512", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "my text.txt"
    path.write_text("near field, far field, level, group, cell, rank, summary\n" * 200)
    return path


def test_compare_reports_and_resumes(text: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    out = tmp_path / "out"
    command = ["compare", text, *TINY, "--steps", 3, "--cost-budget", "1s", "--out", out]
    done = subprocess.run([*PROGRAM, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "held-out text",
        "bits per byte by position",
        "one attention layer",
        "answer",
        str(out / "report.html"),
    ):
        assert words in done.stdout
    values = json.loads((out / "results.json").read_text())
    assert values["status"] == "finished"
    assert [run["attention"] for run in values["runs"]] == ["dense", "window", "fma"]
    assert all(run["steps"] == 3 for run in values["runs"])
    assert values["cost"]["points"]
    assert f"'{text}'" in values["command"]  # quoted, as the name has a space
    assert sorted(p.name for p in (out / "runs").iterdir()) == [f"{n}-seed0.json" for n in ("dense", "fma", "window")]

    before = (out / "runs" / "dense-seed0.json").stat().st_mtime_ns
    again = invoke(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert again.output.count("found finished") == 3
    assert (out / "runs" / "dense-seed0.json").stat().st_mtime_ns == before
    assert json.loads((out / "results.json").read_text())["runs"] == values["runs"]

    other = invoke(*command, "--resume", "--dim", 64)
    assert other.exit_code == 2
    assert "dim 32 there, 64 now" in other.output


def test_ctrl_c_reports_what_is_finished(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        *PROGRAM,
        "compare",
        str(text),
        *TINY,
        "--budget",
        "0.4s",
        "--seeds",
        "50",
        "--no-cost",
        "--out",
        str(out),
    ]
    command += ["--attention", "dense,window"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("runs/*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "interrupted" in stdout
    values = json.loads((out / "results.json").read_text())
    assert values["status"] == "interrupted"
    assert 1 <= len(values["runs"]) < 100
    assert len(values["runs"]) == len(list(out.glob("runs/*.json")))
    assert "Interrupted" in (out / "report.html").read_text()
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "dense,fmaa"], "did you mean 'fma'"),
        (["--attention", "agent"], "not causal"),
        (["--attention", ","], "no attention was named"),
        (["--attention", "dense,dense"], "named twice"),
        (["--budget", "soon"], "is not a duration"),
        (["--budget", "0s"], "is not a duration"),
        (["--budget", "5s", "--steps", "3"], "exclude each other"),
        (["--cost-budget", "long"], "is not a duration"),
        (["--resume"], "--out"),
        (["--heads", "3"], "num_heads must divide dim"),
        (["--rank", "5"], "rank"),
        (["--context", "0"], "--context"),
        (["--option", "colour=red"], "colour"),
        (["--option", "sinks=abc"], "sinks='abc'"),
        (["--option", "bias=abc"], "bias='abc'"),
        (["--device", "abacus"], "abacus"),
        (["--context", "9000"], "the text has"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    text: Path, tmp_path: Path, invoke: Callable[..., Result], arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if "--steps" not in arguments and "--budget" not in arguments:
        arguments = ["--steps", "2", *arguments]
    where = [] if "--resume" in arguments else ["--out", tmp_path / "out"]
    result = invoke("compare", text, *TINY, *where, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("contents", "message"), [(None, "no such file"), (b"", "empty"), (b"too short", "the text has 9 bytes")]
)
def test_bad_texts_are_named(
    tmp_path: Path, invoke: Callable[..., Result], contents: bytes | None, message: str
) -> None:
    path = tmp_path / "given.txt"
    if contents is not None:
        path.write_bytes(contents)
    result = invoke("compare", path, *TINY, "--steps", 2, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused(text: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    result = invoke("compare", text, *TINY, "--steps", 2, "--out", out)
    assert result.exit_code == 2
    assert "not a folder" in result.output
    assert out.read_text() == "mine"


def test_show_draws_in_the_terminal(invoke: Callable[..., Result]) -> None:
    result = invoke("show", "fma", "--n", 128, "--terminal")
    assert result.exit_code == 0, result.output
    assert "causal" in result.output
    assert "▀" in result.output
    assert "level 1" in result.output
    assert "effective weights" in result.output
    assert "level bias 0 (a fresh layer starts at -8)" in result.output
    assert "of the largest weight" in result.output
    assert "effective" not in invoke("show", "window", "--n", 128).output


def test_show_draws_the_weights_of_the_options(monkeypatch: pytest.MonkeyPatch, invoke: Callable[..., Result]) -> None:
    taken: list[dict[str, object]] = []
    real = farfield.effective_weights

    def listen(*tensors: object, **options: object) -> object:
        taken.append(options)
        return real(*tensors, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(farfield, "effective_weights", listen)
    result = invoke(
        "show", "fma", "--n", 128, "--no-causal", "--option", "count_bias=false", "--option", "query_rank=2",
        "--option", "bias=-3", "--option", "sinks=1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "level bias -3" in result.output
    (options,) = taken
    assert options["count_bias"] is False
    assert options["query_rank"] == 2
    assert options["sinks"] == 1
    assert options["level_bias"].unique().tolist() == [-3.0]  # type: ignore[attr-defined]


def test_the_answer_is_printed_before_the_report_is_written(
    text: Path, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from farfield.bench import report

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(report, "write", full)
    result = invoke("compare", text, *TINY, "--attention", "dense", "--steps", 1, "--no-cost", "--out", tmp_path / "o")
    assert result.exit_code == 1
    assert "answer" in result.output
    assert "the disk is full" in result.output


def test_a_second_comparison_needs_resume(text: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    command = ["compare", text, *TINY, "--attention", "fma", "--steps", 1, "--no-cost", "--out", tmp_path / "o"]
    command += ["--option", "summary=learned", "--option", "grid=[128]", "--option", "block=[16]"]
    first = invoke(*command)
    assert first.exit_code == 0, first.output
    said = json.loads((tmp_path / "o" / "results.json").read_text())["command"]
    assert "'grid=[128]'" in said
    assert "'block=[16]'" in said
    again = invoke(*command)
    assert again.exit_code == 2
    assert "--resume" in again.output
    assert invoke(*command, "--resume").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [["fma", "--n", "96", "--query", "40"], ["window", "--n", "96"], ["fma", "--grid", "16x20", "--query", "5"]],
)
def test_show_writes_a_picture(tmp_path: Path, invoke: Callable[..., Result], arguments: list[str]) -> None:
    out = tmp_path / "pattern.png"
    result = invoke("show", *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fmaa"], "did you mean 'fma'"),
        (["--grid", "32"], "32x32"),
        (["--grid", "0x4"], "32x32"),
        (["--grid", "8x8", "--causal"], "1-D"),
        (["--out", "picture.bmp"], ".png"),
        (["--n", "20000"], "at most 8,192"),
        (["--n", "64", "--query", "64"], "query 64 is outside"),
        (["--block", "16", "--rank", "5"], "rank"),
        (["dense", "--rank", "5"], "no option rank"),
        (["--option", "sinks=abc"], "sinks='abc'"),
        (["--option", "bias=abc"], "bias='abc'"),
        (["--n", "128", "--option", "rotate=cells"], "rotate='cells' cannot be drawn"),
        (["--n", "128", "--option", "summary=learned", "--option", "grid=[256]"], "give --n 256"),
        (["agent", "--causal"], "causal"),
    ],
)
def test_show_refuses_bad_input(
    tmp_path: Path, invoke: Callable[..., Result], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("show", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert list(tmp_path.iterdir()) == []
