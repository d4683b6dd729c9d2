"""The commands bench and doctor as their users run them."""

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
from typer.testing import CliRunner, Result

import farfield
from farfield.cli import build_app

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
TINY = ["--heads", "2", "--head-dim", "8", "--repeats", "1", "--device", "cpu"]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    from farfield.bench import ceilings

    monkeypatch.setattr(ceilings, "_LARGEST", {"cpu": 256})
    monkeypatch.setattr(ceilings, "_SAMPLE", 0.0)
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 16})

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(build_app(), list(map(str, arguments)), env={"COLUMNS": "160", "NO_COLOR": "1"})

    return run


def test_bench_measures_reports_and_resumes(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    out = tmp_path / "out"
    command = ["bench", "fma:block=8,rank=2,impl=torch", "window:size=9", "agent", "--peers", "sdpa,natten:window=9",
               "--lengths", "32,8x8", "--mode", "backward,decode", *TINY, "--out", str(out)]  # fmt: skip
    done = subprocess.run([*PROGRAM, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in ("32 tokens, float32, causal, decode", "8x8 tokens, float32, forward + backward", "× sdpa",
                  "cannot be causal", "an engine for whole sequences", str(out / "bench.html")):  # fmt: skip
        assert words in done.stdout, done.stdout
    values = json.loads((out / "results.json").read_text())
    assert values["status"] == "finished"
    assert len(values["rows"]) == 5 * 2 * 2
    assert {row["engine"] for row in values["rows"] if row["label"].startswith("fma") and row["seconds"]} == {"torch"}
    assert sorted(p.name for p in out.iterdir()) == [
        "bench-1d-float32.png", "bench-2d-float32.png", "bench.html", "results.json"
    ]  # fmt: skip

    assert invoke(*command).exit_code == 2
    again = invoke(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert again.output.count("(found finished)") == 4
    assert json.loads((out / "results.json").read_text())["rows"] == values["rows"]
    other = invoke(*command, "--resume", "--repeats", 2)
    assert other.exit_code == 2
    assert "repeats 1 there, 2 now" in other.output


def test_the_command_of_a_report_measures_the_same(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    first = invoke("bench", "fma:block=[4,4]", "--peers", "none", "--lengths", "64", "--dims", "2,1", "--no-causal",
                   "--mode", "forward", "--dtypes", "f32,bf16", *TINY, "--out", tmp_path / "a")  # fmt: skip
    assert first.exit_code == 0, first.output
    one = json.loads((tmp_path / "a" / "results.json").read_text())
    command = __import__("shlex").split(one["command"])[1:]
    command[command.index("--out") + 1] = str(tmp_path / "b")
    second = invoke(*command)
    assert second.exit_code == 0, second.output
    two = json.loads((tmp_path / "b" / "results.json").read_text())
    assert [(r["label"], r["case"], r["mode"]) for r in one["rows"]] == [
        (r["label"], r["case"], r["mode"]) for r in two["rows"]
    ]
    assert not any(row["case"]["causal"] for row in one["rows"])


def test_the_plan_is_printed_without_running(tmp_path: Path, invoke: Callable[..., Result],
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr("farfield.bench.sweep._one_case", never)
    monkeypatch.chdir(tmp_path)
    result = invoke("bench", "fma", "window", "--plan", "--lengths", "1M", "--mode", "forward")
    assert result.exit_code == 0, result.output
    assert "1,048,576 tokens, float32, causal, forward" in result.output
    assert "matrix products" in result.output and "No attention was run" in result.output
    assert not list(tmp_path.iterdir())


def test_missing_peers_are_left_out_with_a_line(
    tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farfield.bench.peers.installed", lambda module: False)
    result = invoke("bench", "window", "--peers", "sdpa,natten,local-attention", "--lengths", "32", "--mode", "forward",
                    *TINY, "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "natten left out: natten is not installed" in result.output
    assert "local-attention left out: local-attention is not installed" in result.output


def test_nothing_measured_is_a_failure(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke("bench", "fma", "--peers", "none", "--lengths", "4x8", "--mode", "decode", *TINY, "--out", tmp_path)
    assert result.exit_code == 1
    assert "tokens are decoded one by one in 1-D only" in result.output


def test_ctrl_c_reports_the_finished_cases(tmp_path: Path) -> None:
    out = tmp_path / "out"
    lengths = ",".join(str(32 * n) for n in range(1, 200))
    command = [*PROGRAM, "bench", "window", "--lengths", lengths, *TINY, "--out", str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (out / "results.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "interrupted" in stdout and "--resume" in stdout
    values = json.loads((out / "results.json").read_text())
    assert values["status"] == "interrupted"
    assert 2 <= len(values["rows"]) < 2 * 2 * 199
    assert "Interrupted" in (out / "bench.html").read_text()
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fmm"], ["unknown recipe 'fmm'", "Known recipes"]),
        (["fma:blok=3"], ["no option 'blok'", "block"]),
        (["fma", "fma"], ["fma is named twice"]),
        (["fma:block"], ["write NAME=VALUE"]),
        (["--peers", "spda"], ["unknown peer 'spda'", "sdpa"]),
        (["--lengths", "4q"], ["'4q' is not a length"]),
        (["--lengths", ","], ["--lengths is empty"]),
        (["--lengths", "1021", "--dims", "2"], ["1,021 tokens make no 2-D grid"]),
        (["--dims", "4"], ["'4' is not a number of axes"]),
        (["--dtypes", "int8"], ["'int8' is not a dtype"]),
        (["--mode", "sideways"], ["forward, backward, decode would be accepted"]),
        (["--causal", "--lengths", "8x8"], ["exists in 1-D only"]),
        (["--limit", "soon"], ["'soon' is not a duration"]),
        (["--device", "nowhere"], ["cannot use device 'nowhere'"]),
        (["--resume"], ["add --out DIR"]),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, invoke: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = invoke("bench", *arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert all(word in result.output for word in words), result.output
    assert not list(tmp_path.iterdir())


def test_doctor(invoke: Callable[..., Result]) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for words in ("versions", "torch on cpu", "reference on cpu", "peers of farfield bench", "compiler"):
        assert words in result.output
    facts = json.loads(invoke("doctor", "--json").output)
    assert facts["format"] == "farfield-doctor/1"
