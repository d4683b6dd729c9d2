"""The program as its users run it: train, generate and recipes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import farfield
from farfield.training import checkpoint

SOURCES = Path(farfield.__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "240",
    "NO_COLOR": "1",
}
PROGRAM = [sys.executable, "-W", "error", "-m", "farfield.cli"]
SMALL = ["--attention", "dense", "--context", "64", "--dim", "16", "--depth", "1", "--heads", "2"]


def farfield_(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **settings)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("near field, far field, level, group, cell\n" * 300)
    return path


@pytest.fixture
def trained(text: Path, tmp_path: Path, invoke: Callable[..., Result]) -> Path:
    out = tmp_path / "trained"
    result = invoke("train", text, *SMALL, "--steps", 3, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return out


def test_help_names_every_command_at_once() -> None:
    result = farfield_("--help")
    assert result.returncode == 0, result.stderr
    for command in ("compare", "train", "generate", "show", "recipes"):
        assert command in result.stdout


def test_version(invoke: Callable[..., Result]) -> None:
    assert invoke("--version").output.strip() == farfield.__version__


@pytest.mark.parametrize(
    ("command", "default"), [("train", "4096"), ("convert", "0.12"), ("study", "98304"), ("bench", "in 1-D")]
)
def test_help_says_defaults(command: str, default: str, invoke: Callable[..., Result]) -> None:
    """Square brackets in a help text are markup, and would not be shown."""
    assert f"(default: {default})" in invoke(command, "--help").output


def test_commands_bring_in_nothing_heavy_before_they_run() -> None:
    code = (
        "import sys, farfield; before = set(sys.modules); import farfield.cli; farfield.cli.build_app();"
        "sys.exit(' '.join({'torch', 'matplotlib', 'safetensors'} & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == ""


def test_train_then_generate(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = farfield_("train", text, *SMALL, "--steps", 40, "--batch", 2, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "bits per byte" in result.stdout
    assert sorted(os.listdir(out)) == ["checkpoint.safetensors", "config.json", "evaluation.json"]
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["step"] == 40
    assert 0 < evaluation["bits"] < 8
    assert evaluation["positions"][0][:2] == [0, 64]

    arguments = ("generate", out, "--prompt", "far fi", "--bytes", 30, "--seed", 3)
    written = farfield_(*arguments, encoding="latin-1")  # a young model writes bytes that are no UTF-8
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("far fi")
    assert len(written.stdout) == 6 + 30 + 1
    assert farfield_(*arguments, encoding="latin-1").stdout == written.stdout


def test_ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_bits(
    text: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    arguments = ["train", text, *SMALL, "--steps", 600, "--device", "cpu"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen(
        [*PROGRAM, *map(str, arguments), "--out", str(stopped)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not checkpoint.exists(stopped):
        assert time.monotonic() < deadline, "no checkpoint before the first step"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "go on with: farfield train --resume" in stdout
    assert stderr == ""
    step = checkpoint.load(stopped).step
    assert 0 <= step < 600

    resumed = farfield_("train", "--resume", "--out", stopped)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {step:,}" in resumed.stdout
    uninterrupted = invoke(*arguments, "--out", whole)
    assert uninterrupted.exit_code == 0, uninterrupted.output
    a, b = checkpoint.load(stopped), checkpoint.load(whole)
    assert a.step == b.step == 600
    for name, tensor in a.state.items():
        if name.startswith(("model.", "optimizer.")):
            assert tensor.equal(b.state[name]), name


def test_a_file_that_cannot_grow_ends_in_one_line_and_leaves_nothing(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = farfield_(
        "train",
        text,
        *SMALL,
        "--steps",
        1,
        "--out",
        out,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot save {out / 'checkpoint.safetensors'}: File too large; it needs ")
    assert result.stderr.count("\n") == 1
    assert os.listdir(out) == ["config.json"]


def test_recipes_lists_them_all() -> None:
    from farfield import recipes

    result = farfield_("recipes")
    assert result.returncode == 0, result.stderr
    for heading in ("name", "title", "dims", "causal", "arXiv"):
        assert heading in result.stdout
    listed = json.loads(farfield_("recipes", "--json").stdout)
    assert [row["name"] for row in listed] == recipes.names()
    assert all(row["name"] in result.stdout for row in listed)
    assert {"title", "dims", "departures", "proof", "options"} <= set(listed[0])
    assert [row["departures"] for row in listed] == [recipes.get(name).departures for name in recipes.names()]


def test_recipes_names_the_proofs_where_there_is_room() -> None:
    narrow, wide = (
        subprocess.run(
            [*PROGRAM, "recipes"], env={**ENVIRONMENT, "COLUMNS": columns}, capture_output=True, text=True, timeout=120
        ).stdout
        for columns in ("100", "150")
    )
    assert "equals a softmax written out" in wide and "written out" not in narrow


def test_recipes_shows_some_in_full() -> None:
    result = farfield_("recipes", "fma", "swin")
    assert result.returncode == 0, result.stderr
    assert "2310.11960" in result.stdout
    assert "option block" in result.stdout
    assert "tests/recipes/test_swin.py" in result.stdout.replace("\n", "")
    told = " ".join(result.stdout.split())
    assert "the padding is seen" in told and "departures" in told
    assert "departures" not in farfield_("recipes", "dense").stdout
    wrong = farfield_("recipes", "fmaa")
    assert wrong.returncode == 2
    assert "did you mean 'fma'?" in wrong.stderr


def test_generate_writes_bytes_not_characters(trained: Path) -> None:
    result = subprocess.run(
        [*PROGRAM, "generate", str(trained), "--prompt", "\udcff\u00e9", "--bytes", "0"],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=60,
    )
    assert result.stdout == b"\xff\xc3\xa9\n"


def test_resuming_a_finished_run_with_more_steps(trained: Path, invoke: Callable[..., Result]) -> None:
    result = invoke("train", "--resume", "--out", trained, "--steps", 5, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert checkpoint.load(trained).step == 5
    again = invoke("train", "--resume", "--out", trained, "--device", "cpu")
    assert again.exit_code == 0, again.output
    assert "5 steps" in again.output


def test_training_by_the_clock(text: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke("train", text, *SMALL, "--budget", "0.2s", "--out", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert checkpoint.load(tmp_path / "run").state["history"][-1, 1] == pytest.approx(0.2, abs=0.15)


def expect_error(result: Result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output.replace("\n", " "), result.output


def test_bad_text(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    out = tmp_path / "run"
    expect_error(
        invoke("train", tmp_path / "nowhere.txt", *SMALL, "--out", out), "no such file or folder", "nowhere.txt"
    )
    expect_error(invoke("train", tmp_path / "*.txt", *SMALL, "--out", out), "matches no file")
    (tmp_path / "empty.txt").write_bytes(b"")
    expect_error(invoke("train", tmp_path / "empty.txt", *SMALL, "--out", out), "empty.txt is empty")
    (tmp_path / "short.txt").write_bytes(b"x" * 100)
    expect_error(
        invoke("train", tmp_path / "short.txt", *SMALL, "--out", out),
        "100 bytes, but context 64 needs at least 130",
        "context of at most 49",
    )
    assert not out.exists()


def test_unreadable_text(
    text: Path, tmp_path: Path, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    expect_error(invoke("train", text, *SMALL, "--out", tmp_path / "run"), "cannot read", "text.txt: Permission denied")


def test_bad_settings(text: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    def train(*arguments: object) -> Result:
        return invoke("train", text, "--context", 64, "--steps", 1, "--out", tmp_path / "run", *arguments)

    expect_error(train("--attention", "no_such"), "no_such", "dense")
    expect_error(train("--attention", "dense", "--option", "no_such=1"), "no_such")
    expect_error(train("--attention", "dense", "--option", "block"), "write NAME=VALUE")
    expect_error(train("--attention", "dense", "--heads", 3), "num_heads must divide dim")
    expect_error(train("--attention", "dense", "--lr", -1), "lr must be positive")
    expect_error(train("--attention", "dense", "--steps", 0), "steps must be at least 1")
    expect_error(train("--attention", "dense", "--budget", "soon"), "'soon' is not a duration")
    expect_error(train("--attention", "dense", "--device", "abacus"), "cannot use device 'abacus'")
    assert not (tmp_path / "run").exists()


def test_training_never_overwrites(trained: Path, text: Path, invoke: Callable[..., Result]) -> None:
    expect_error(
        invoke("train", text, *SMALL, "--steps", 1, "--out", trained), "already holds a checkpoint", "--resume"
    )


def test_what_cannot_be_resumed(trained: Path, text: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    expect_error(invoke("train", "--resume", "--out", tmp_path / "new"), "holds no checkpoint to resume")
    expect_error(
        invoke("train", "--resume", "--out", trained, "--dim", 32, "--seed", 1),
        "another dim 32 (was 16), seed 1 (was 0)",
    )
    text.write_text("another text altogether " * 100)
    expect_error(invoke("train", "--resume", "--out", trained), "is not the one that")


def test_bad_checkpoints(trained: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    expect_error(invoke("generate", tmp_path / "nowhere"), "no such folder", "farfield train --out")
    expect_error(invoke("generate", tmp_path), "holds no checkpoint")
    expect_error(invoke("generate", trained, "--temperature", -1), "temperature must be")
    path = trained / checkpoint.STATE_FILE
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    expect_error(invoke("generate", trained), "checkpoint.safetensors is damaged")
    expect_error(invoke("train", "--resume", "--out", trained), "checkpoint.safetensors is damaged")


def test_an_output_folder_that_cannot_be_made(text: Path, invoke: Callable[..., Result]) -> None:
    expect_error(invoke("train", text, *SMALL, "--steps", 1, "--out", text / "run"), "cannot save", code=1)
