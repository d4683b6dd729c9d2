"""The command compare on images and fields as its users run it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

import farfield
from support.vision_data import encoded, folder_by_class, labelled_archive, mask_archive, picture

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
TINY = ["--widths", "16,16", "--depths", "1,1", "--head-dim", "16", "--block", "2", "--rank", "1", "--workers", "0"]
TWO = ["--attention", "window,fma", "--batch", "4"]


def pairs(path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, n, count in (("train", 16, 12), ("test", 16, 4), ("test_fine", 24, 4)):
        arrays[f"{name}_x"] = rng.random((count, n, n))
        arrays[f"{name}_y"] = arrays[f"{name}_x"] + 1
    np.savez(path, **arrays)
    return path


def test_options_of_the_layer_are_for_all_or_refused(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    root, out = folder_by_class(tmp_path / "set", 6), tmp_path / "out"
    biased = ["compare", root, *TINY, "--batch", "4", "--steps", 2, "--no-cost", "--option", "position_bias=2"]
    done = invoke(*biased, "--attention", "window,fma", "--out", out)
    assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    assert all(run["key"]["options"]["position_bias"] == 2 for run in results["runs"])
    assert "--option position_bias=2" in results["command"]
    assert (out / "pattern.png").is_file()
    refused = invoke(*biased, "--attention", "fma,agent", "--out", tmp_path / "other")
    assert refused.exit_code == 2
    assert "agent: position_bias=2: near=Conv(" in refused.output
    assert not (tmp_path / "other").exists()


def test_images_by_class_are_compared_and_resumed(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    root = folder_by_class(tmp_path / "my set", 6)
    (root / "reds" / "broken.png").write_bytes(encoded(picture((200, 40, 40), (64, 64)))[:200])
    (root / "blues" / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    command = ["compare", root, *TINY, *TWO, "--steps", 4, "--cost-budget", "0.2s", "--out", out,
               "--test-sizes", "14,20x18"]  # fmt: skip
    done = subprocess.run([*PROGRAM, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in ("held-out examples", "by resolution", "20x18", "answer", "broken.png", "notes.txt: not the name",
                  str(out / "report.html")):  # fmt: skip
        assert words in done.stdout, words
    values = json.loads((out / "results.json").read_text())
    assert values["status"] == "finished"
    assert values["data"]["task"] == "classify"
    assert values["data"]["bad"][0].startswith(str(root / "reds" / "broken.png"))
    assert [run["attention"] for run in values["runs"]] == ["window", "fma"]
    assert values["runs"][0]["tests"].keys() == {"10x10", "14x14", "20x18"}
    assert values["cost"]["points"]
    assert f"'{root}'" in values["command"]
    for name in ("predictions.png", "looks.png", "pattern.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 100
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") == 3
    assert "broken.png" in page

    again = invoke(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert again.output.count("found finished") == 2
    assert json.loads((out / "results.json").read_text())["runs"] == values["runs"]
    other = invoke(*command, "--resume", "--head-dim", 8)
    assert other.exit_code == 2
    assert "head_dim 16 there, 8 now" in other.output
    text = invoke("compare", "--out", out, "--steps", 1)
    assert text.exit_code == 2
    assert "would be overwritten" in text.output


def test_the_command_of_a_report_makes_the_same_runs(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    path, out = labelled_archive(tmp_path / "set.npz"), tmp_path / "out"
    first = invoke("compare", path, *TINY, *TWO, "--steps", 2, "--no-cost", "--out", out)
    assert first.exit_code == 0, first.output
    values = json.loads((out / "results.json").read_text())
    words = shlex.split(values["command"])[1:]
    assert invoke(*words, "--resume").output.count("found finished") == 2


@pytest.mark.parametrize("kind", ["masks", "pairs", "video", "field"])
def test_other_data(tmp_path: Path, invoke: Callable[..., Result], kind: str) -> None:
    path = tmp_path / "set.npz"
    extra: list[object] = []
    if kind == "masks":
        mask_archive(path)
    elif kind == "pairs":
        pairs(path)
    elif kind == "field":
        np.savez(path, relief=np.random.default_rng(0).normal(size=(24, 80)))
        extra = ["--image-size", "12"]
    else:
        waves = np.random.default_rng(0).random((14, 8, 9))
        waves[:, :3, 4] = np.nan
        np.savez(path, u=waves, v=waves + 1)
        extra = ["--frames", "2"]
    out = tmp_path / "out"
    done = invoke("compare", path, *TINY, *TWO, *extra, "--steps", 2, "--no-cost", "--out", out)
    assert done.exit_code == 0, done.output
    values = json.loads((out / "results.json").read_text())
    assert values["data"]["metric"] == ("mean IoU" if kind == "masks" else "relative L2")
    assert values["runs"][0]["steps"] == 2
    assert (out / "predictions.png").exists()
    if kind == "pairs":
        assert {"16x16", "24x24", "16x16 MSE", "24x24 MSE"} == values["runs"][0]["tests"].keys()
    if kind == "masks":
        assert len(values["runs"][0]["counts"]) == len(values["runs"][0]["examples"])
    if kind == "video":
        assert values["data"]["grid"] == [2, 8, 9]


def test_ctrl_c_reports_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*PROGRAM, "compare", str(labelled_archive(tmp_path / "set.npz")), *TINY, *TWO, "--budget", "0.4s",
               "--seeds", "50", "--no-cost", "--out", str(out)]  # fmt: skip
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
    assert json.loads((out / "results.json").read_text())["status"] == "interrupted"
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "64"], "--context is for text"),
        (["--frames", "2"], "--frames is for fields"),
        (["--ahead", "1"], "--ahead is for fields"),
        (["--fill"], "--fill is for fields"),
        (["--transpose"], "--transpose is for fields"),
        (["--latent"], "latent=True is for fields"),
        (["--image-size", "axb"], "'axb' is not a size"),
        (["--size", "huge"], "unknown size 'huge'"),
        (["--attention", "transformer_lss"], "did you mean 'transformer_ls'"),
        (["--attention", "fma,fma"], "named twice"),
        (["--widths", "16,x"], "--widths '16,x'"),
        (["--patch", "3"], "power of two"),
        (["--patch", "2x2x2"], "patch"),
        (["--position", "rope"], "position must be one of"),
        (["--option", "colour=red"], "colour"),
        (["--kind", "sound"], "auto, text, images, fields"),
        (["--kind", "fields"], "needed are pairs"),
        (["--kind", "text", "--image-size", "8"], "--image-size is for images and fields"),
        (["--block", "3", "--rank", "2", "--attention", "fma"], "does not divide"),
        (["--resume"], "--out"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, invoke: Callable[..., Result], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = labelled_archive(tmp_path / "set.npz")
    before = sorted(tmp_path.rglob("*"))
    where = [] if "--resume" in arguments else ["--out", tmp_path / "out"]
    result = invoke("compare", path, *TINY, "--attention", "window,fma", "--steps", 2, *where, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", [["--frames", 2], ["--ahead", 1], ["--fill"], ["--transpose"], ["--latent"]])
def test_text_refuses_options_of_images(tmp_path: Path, invoke: Callable[..., Result], option: list[object]) -> None:
    result = invoke("compare", *option, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{option[0]} is for images and fields; PATH holds text" in result.output
    assert not (tmp_path / "out").exists()


def made(invoke: Callable[..., Result], out: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """results.json and what was printed; the command in it makes the same runs again."""
    done = invoke("compare", *arguments, *TINY, *TWO, "--steps", 2, "--no-cost", "--out", out)
    assert done.exit_code == 0, done.output
    values = json.loads((out / "results.json").read_text())
    again = invoke(*shlex.split(values["command"])[1:], "--resume")
    assert again.output.count("found finished") == 2, again.output
    return values, done.output


def rows_of_page(out: Path) -> dict[str, list[str]]:
    """The cells of the first table of the report by its first column."""
    table = (out / "report.html").read_text().split("<table>")[1].split("</table>")[0]
    rows = [re.findall(r"<td>(?:<span[^>]*></span>)?([^<]*)</td>", line) for line in table.split("<tr")]
    return {row[0]: row[1:] for row in rows if row}


def test_the_next_frame_from_several(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    """Persistence and climatology stand in the tables beside the trained ones, best first."""
    season = np.sin(np.arange(20) * 2 * np.pi / 3)[:, None, None] + np.random.default_rng(0).random((20, 8, 9)) / 9
    np.savez(tmp_path / "set.npz", u=season, v=season + 1)
    out = tmp_path / "out"
    values, said = made(invoke, out, tmp_path / "set.npz", "--frames", 3, "--ahead", 1)
    simple = values["data"]["yardsticks"]
    assert values["data"]["tests"] == {"3x8x9": 4}
    assert simple["climatology, period 3"] < simple["persistence"]
    rows = rows_of_page(out)
    trained = sorted(values["summary"], key=lambda s: s["score"])
    assert list(rows) == [*(s["attention"] for s in trained), *sorted(simple, key=lambda name: simple[name])]
    for name, score in simple.items():
        assert rows[name] == [f"{score:.4f}", *["–"] * 5]
        assert name.split(",")[0] in said
    (beaten,) = [line for line in values["answer"]["warnings"] if "needs no training" in line]
    assert "climatology, period 3" in beaten  # the best of them alone
    with np.load(out / "runs" / "fma-seed0.npz") as samples:
        assert samples["predicted"].shape[1:] == (2, 1, 8, 9)
        assert samples["x"].shape[1:] == (2, 3, 8, 9)


def test_holes_in_frames_with_land(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    values = np.random.default_rng(0).standard_normal((3, 16, 40)).cumsum(1).cumsum(2)
    values[:, 5:9, 3:30] = np.nan
    np.savez(tmp_path / "set.npz", airt=values, lat=np.zeros(16), relief=values[0], other=values)
    out = tmp_path / "out"
    found, said = made(invoke, out, tmp_path / "set.npz", "--fill", "--variables", "airt", "--image-size", "12x8")
    assert found["data"]["grid"] == [12, 8]
    assert (found["data"]["channels"], found["data"]["outputs"]) == (2, 1)
    simple = found["data"]["yardsticks"]
    assert 0 < simple["nearest shown point"] < simple["mean in the holes"]
    assert rows_of_page(out)["nearest shown point"][0] == f"{simple['nearest shown point']:.4f}"
    assert "nearest shown point" in said


def test_latent_grids_and_exchanged_axes(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    out = tmp_path / "out"
    values, _ = made(invoke, out, pairs(tmp_path / "set.npz"), "--latent", "--transpose")
    assert values["runs"][0]["key"]["latent"] == [16, 16]
    for dropped in ("--latent", "--transpose"):
        words = [word for word in shlex.split(values["command"])[1:] if word != dropped]
        other = invoke(*words, "--resume")
        assert other.exit_code == 2
        assert ("latent" if dropped == "--latent" else "data") in other.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ahead", "2"], "ahead=2 with frames=1: 1 would be accepted"),
        (["--ahead", "99"], "ahead=99 with frames=1"),
        (["--frames", "9", "--ahead", "9"], "14 frames; frames=9 with ahead=9 needs at least 27"),
        (["--frames", "4"], "14 frames; frames=4 needs at least 16"),
        (["--fill"], "name one of them (--variables)"),
        (["--fill", "--variables", "u"], "u [14, 8, 9] in"),
        (["--fill", "--variables", "v", "--ahead", "1"], "ahead=1 is for a series [T, H, W], to predict the next"),
        (["--transpose"], "transpose=True is for pairs"),
        (["--image-size", "8"], "size=8x8 is for crops"),
        (["--variables", "w"], "has no variable w; it holds u [14, 8, 9]"),
    ],
)
def test_bad_questions_to_a_series_write_nothing(
    tmp_path: Path, invoke: Callable[..., Result], arguments: list[str], message: str
) -> None:
    land = np.random.default_rng(0).random((14, 8, 9))
    land[:, 2:4, 3:5] = np.nan
    np.savez(tmp_path / "set.npz", u=np.zeros((14, 8, 9)), v=land)
    before = sorted(tmp_path.rglob("*"))
    command = ["compare", tmp_path / "set.npz", *TINY, *TWO, "--steps", 2, "--out", tmp_path / "out"]
    result = invoke(*command, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before
