"""``farfield simulate``: table, JSON, picture, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from farfield.cli import build_app


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(
        build_app(), ["simulate", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )


def test_a_row_per_stride() -> None:
    result = _run("--grid", "256x256", "--window", 80, "--stride", 1, "--stride", "16")
    assert result.exit_code == 0, result.output
    assert "no tiling can exceed 10.24" in result.output
    assert "7.06" in result.output and "10.24" in result.output


def test_json_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "tiles.png"
    result = _run("--grid", "30x48x80", "--window", "18x24x24", "--stride", "16x8x8", "--json", "--out", out)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)
    assert row["perfect"] is True and row["speedup"] == pytest.approx(row["bound"])
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--window", "8y8"), "--window '8y8': write one to three positive numbers"),
        (("--window", "8", "--grid", "0"), "--grid '0'"),
        (("--window", "8", "--stride", "9"), "stride=9 exceeds window=8"),
        (("--window", "8", "--out", "tiles.txt"), "give a name that ends in .png"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
