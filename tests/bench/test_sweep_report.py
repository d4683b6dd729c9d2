from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from farfield.bench.case import Case
from farfield.bench.plots import looks
from farfield.bench.sweep import Prediction, Row, Sweep
from farfield.bench.sweep_report import (
    flops_in_words,
    groups,
    kind_figure,
    left_out,
    plan_table,
    read_rows,
    result_table,
    time_in_words,
    title,
    write,
    yardstick,
)

MACHINE = {"processor": "a processor", "threads": 2, "device": "cpu", "torch": "2.13.0"}
KEY = {"attentions": ["fma", "sdpa"], "repeats": 5}


def row(label: str, tokens: int, mode: str = "forward", seconds: float | None = 1e-3, **more: object) -> Row:
    measured: dict[str, object] = {"level": "core", "engine": "torch"}
    measured |= {} if seconds is None else {
        "seconds": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds, "repeats": 5, "memory": 3 << 20,
        "flops": 1e8, "bytes": 1e6, "floor": seconds / 4, "ceiling": 4e11, "error": 0.25, "error_from": "somehow",
    }  # fmt: skip
    return Row(label=label, case=Case((tokens,), causal=True), mode=mode, **{**measured, **more})  # type: ignore[arg-type]


ROWS = [
    row("fma", 1024),
    row("sdpa", 1024, seconds=4e-3),
    row("<peer>", 1024, seconds=None, reason="not installed & gone"),
    row("fma", 4096, seconds=5e-3),
    row("sdpa", 4096, seconds=60e-3),
    row("fma", 4096, "backward", seconds=2.0),
]


def shown(table: object, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_numbers_in_words() -> None:
    assert [flops_in_words(v) for v in (None, 12.0, 1.5e6, 2.34e9, 7e12)] == ["–", "12", "1.5 M", "2.34 G", "7 T"]
    assert [time_in_words(v) for v in (None, 84e-6, 0.012, 1.26)] == ["–", "84 µs", "12 ms", "1.3 s"]


def test_rows_know_their_ratios() -> None:
    assert ROWS[0].share == pytest.approx(0.25)
    assert ROWS[0].over_floor == pytest.approx(4.0)
    assert ROWS[0].spread == pytest.approx(0.1)
    assert (ROWS[2].share, ROWS[2].over_floor, ROWS[2].spread) == (None, None, None)


def test_the_table_of_a_case() -> None:
    case, mode, rows = groups(ROWS)[0]
    assert title(case, mode, rows) == "1,024 tokens, float32, causal, forward (peak: 400 GFLOP/s in a matrix product)"
    lines = shown(result_table(rows, 200)).splitlines()
    assert "× sdpa" in lines[1] and "FLOP/s" in lines[1]
    cells = next(line for line in lines if "fma" in line).split()
    assert cells == ["fma", "1", "ms", "10%", "4.00", "3", "MiB", "100", "G", "25%", "4.0", "0.25"]
    assert "peer" not in "".join(lines)
    assert left_out(rows) == {"not installed & gone": ["<peer>"]}


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    long = [row("linear-attention-transformer", 1024, level="layer"), row("sdpa", 1024)]
    text = shown(result_table(long, 80), 80)
    assert "…" not in text and "FLOP/s" not in text
    assert "0.25" in text


def test_speed_is_told_against_exact_attention_where_there_is_one() -> None:
    assert yardstick(ROWS[:3]) == ROWS[1]
    assert yardstick([ROWS[0]]) is None
    assert "×" not in shown(result_table([ROWS[0]], 80)).replace("× floor", "")


def test_the_plan() -> None:
    case = Case((1024,))
    found = [
        Prediction("fma", case, "forward", 2.5e8, 8 << 20, 0.005, "matrix"),
        Prediction("x", case, "forward", None, None, None, None),
        Prediction("gone", case, "forward", None, None, None, None, "not installed"),
    ]
    text = shown(plan_table(found))
    assert "250 M" in text and "8 MiB" in text and "5 ms" in text and "matrix products" in text
    assert "not counted" in text and "gone" not in text


def test_files_are_written_and_read_back(tmp_path: Path) -> None:
    page = write(Sweep(list(ROWS), 1e10), KEY, MACHINE, "farfield bench fma", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench-1d-float32.png", "bench.html", "results.json"]
    assert (tmp_path / "bench-1d-float32.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["format"] == "farfield-bench/1" and values["status"] == "finished"
    assert values["rows"][0]["share"] == pytest.approx(0.25)
    assert read_rows(tmp_path, KEY) == ROWS
    text = page.read_text()
    assert "not installed &amp; gone" in text and "&lt;peer&gt;" in text and "<svg" in text
    assert "farfield bench fma" in text

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe")
            for name, value in attributes:
                assert name != "src" or (value or "").startswith("data:")

    Links().feed(text)


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    page = write(Sweep(list(ROWS[:2]), 1e10, interrupted=True), KEY, MACHINE, "farfield bench", tmp_path)
    assert "Interrupted" in page.read_text()
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "interrupted"


def test_nothing_measured_still_makes_a_page(tmp_path: Path) -> None:
    page = write(Sweep([ROWS[2]]), KEY, MACHINE, "farfield bench", tmp_path)
    assert "not installed" in page.read_text()
    assert not list(tmp_path.glob("*.png"))


def test_other_results_are_not_resumed(tmp_path: Path) -> None:
    assert read_rows(tmp_path, KEY) == []
    write(Sweep(list(ROWS), 1e10), KEY, MACHINE, "farfield bench", tmp_path)
    with pytest.raises(ValueError, match=r"cannot resume .*repeats 5 there, 3 now.*another --out"):
        read_rows(tmp_path, {**KEY, "repeats": 3})
    (tmp_path / "results.json").write_text('{"format": "farfield-compare/1"}')
    with pytest.raises(ValueError, match="is not from farfield bench"):
        read_rows(tmp_path, KEY)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is not from farfield bench"):
        read_rows(tmp_path, KEY)


def test_no_panel_is_cut_off_where_an_earlier_one_ends() -> None:
    rows = [row("fma", 1024), row("fma", 1024, "backward", seconds=1e-4)]
    figure = kind_figure(rows, looks(["fma"]))
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert all(low <= y <= high for line in axes.lines for y in line.get_ydata())


def test_many_lines_look_different() -> None:
    style = looks([f"a{n}" for n in range(11)] + ["fma", "sdpa", "dense"])
    assert len(set(style.values())) == 14
    assert style["fma"][0] == "#0072b2"
