"""benchmarks/gpu.py where there is no GPU: what it counts, what it judges, and what it does when something fails."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from farfield import near
from farfield.bench.case import Case
from farfield.bench.model import work_of
from farfield.geometry import geometry
from farfield.ops.multipole.reference import Coordinates, far_visible, near_visible

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
CARD = {"gpu": "a card", "torch": "2.13", "natten": "0.21"}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


# Counting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block", "rank", "causal"),
    [((256,), 16, 4, True), ((250,), 16, 4, False), ((40, 33), 4, 2, False), ((12, 8, 10), 2, 1, False)],
)
def test_pairs_are_those_that_see_each_other(
    gpu: ModuleType, grid: tuple[int, ...], block: int, rank: int, causal: bool
) -> None:
    g = geometry(grid, block, rank)
    where = Coordinates.of(g, torch.device("cpu"))
    seen = int(near_visible(where, causal).sum())
    for level in range(1, g.levels + 1):
        filled = (where.cells(level)[:, None] == where.cell(level)[None]).all(-1).any(1)
        seen += int((far_visible(where, level, g.levels, causal) & filled).sum())
    assert gpu.pairs(grid, block, rank, causal) == seen


def test_natten_sees_a_whole_window_at_borders_too(gpu: ModuleType) -> None:
    work = work_of(near.Window(5), None, Case((9, 12)))
    assert work is not None
    assert gpu.window_pairs((9, 12), 5) == work.exact == 9 * 12 * 25
    assert gpu.window_pairs(gpu.IMAGE, gpu.NATTEN_WINDOW) == 65536 * 47 * 47


def test_flops_of_a_mode(gpu: ModuleType) -> None:
    """By the cost model's convention: 4 D forward, 14 D forward and backward."""
    case = Case((64, 64), head_dim=128, heads=1)
    work = work_of(near.Window(7), None, case)
    assert work is not None
    count = gpu.window_pairs((64, 64), 7)
    assert gpu.flops(count, 128, "forward") == work.flops(case, "forward")
    assert gpu.flops(count, 128, "both") == work.flops(case, "backward")


def test_break_even_needs_all_longer_ones(gpu: ModuleType) -> None:
    assert gpu.break_even({512: 1.2, 1024: 0.9, 2048: 1.0, 4096: 3.0}) == 2048
    assert gpu.break_even({512: 1.2, 1024: 1.1}) == 512
    assert gpu.break_even({512: 1.2, 1024: 0.9}) == math.inf


# Judging --------------------------------------------------------------------------------------------------------------


def full(gpu: ModuleType, path: Path) -> Any:
    """A report in which every target is met."""
    report = gpu.Report(path, dict(CARD))
    report.begin("matrix").append({"tflops": 700.0})
    for part, calls, dtypes in (
        ("correctness", gpu.CALLS, [torch.bfloat16]),
        ("precisions", gpu.CALLS, [torch.float16, torch.float32]),
        ("large", gpu.LARGE, [torch.float32]),
    ):
        report.begin(part).extend({"call": c, "dtype": str(d), "right": True} for d in dtypes for c in calls)
    report.begin("million").append({"n": 1 << 20, "both": {}, "finite": True})
    share = {"forward_share": 0.5, "both_share": 0.4}
    report.begin("rate").extend(
        {"n": n, "head_dim": d, "causal": c, **share}
        for n in gpu.RATE_LENGTHS
        for d in gpu.WIDTHS
        for c in (True, False)
    )
    report.begin("dense").extend(
        {"series": s, "n": n, "head_dim": d, "forward_ratio": n / 1024, "both_ratio": n / 1024}
        for s in gpu.SERIES
        for n in gpu.DENSE_LENGTHS
        for d in gpu.WIDTHS
    )
    report.begin("image").extend({"head_dim": d, "forward_ratio": 0.9, "both_ratio": 1.0} for d in gpu.WIDTHS)
    return report


def statuses(gpu: ModuleType, report: Any) -> dict[str, str]:
    return {t.name: t.status for t in gpu.targets(report)}


def find(report: Any, part: str, **where: Any) -> dict[str, Any]:
    (one,) = [r for r in report.rows(part) if all(r.get(k) == v for k, v in where.items())]
    return one


def test_every_target_of_the_issue_is_judged(gpu: ModuleType, tmp_path: Path) -> None:
    found = statuses(gpu, full(gpu, tmp_path / "r.json"))
    assert set(found.values()) == {"met"}
    for word, number in (("budget", 3), ("matrix rate", 8), ("times the best dense", 4), ("break-even", 8),
                         ("1,048,576", 1), ("NATTEN", 4)):  # fmt: skip
        assert sum(word in name for name in found) == number, word
    assert len(found) == 28


@pytest.mark.parametrize(
    ("part", "where", "changes", "name"),
    [
        ("correctness", {"call": "packed"}, {"right": False}, "error budget, bfloat16"),
        ("precisions", {"call": "line", "dtype": "torch.float16"}, {"right": False}, "error budget, float16"),
        ("large", {"call": "volume"}, {"right": False}, "error budget, 65,536"),
        ("rate", {"n": 32768, "head_dim": 128, "causal": True}, {"both_share": 0.34}, "forward + backward, share"),
        ("rate", {"n": 131072, "head_dim": 64, "causal": False}, {"forward_share": 0.44}, "forward, share"),
        ("dense", {"series": "single", "head_dim": 128, "n": 65536}, {"forward_ratio": 19.0}, "forward, times"),
        ("dense", {"series": "tokens", "head_dim": 64, "n": 4096}, {"both_ratio": 0.9}, "backward, break-even"),
        ("million", {}, {"finite": False}, "1,048,576"),
        ("image", {"head_dim": 64}, {"forward_ratio": 1.01}, "forward, time per useful FLOP"),
    ],
)
def test_a_target_is_missed_or_not_measured(
    gpu: ModuleType, tmp_path: Path, part: str, where: dict[str, Any], changes: dict[str, Any], name: str
) -> None:
    """Missed with a worse figure in one row; not measured when that row failed, lacks the figure, or is not there."""

    def after(change: Callable[[Any, dict[str, Any]], object]) -> dict[str, str]:
        report = full(gpu, tmp_path / "r.json")
        change(report, find(report, part, **where))
        return {n: s for n, s in statuses(gpu, report).items() if s != "met"}

    missed = after(lambda report, row: row.update(changes))
    assert set(missed.values()) == {"missed"} and len(missed) == 1 and name in next(iter(missed))
    for change in (
        lambda report, row: row.update(error="RuntimeError: no"),
        lambda report, row: [row.pop(key) for key in changes],
        lambda report, row: report.rows(part).remove(row),
    ):
        lost = after(change)
        assert set(lost.values()) == {"not measured"} and lost.keys() >= missed.keys()
    gone = after(lambda report, row: report.data["parts"].pop(part))
    assert set(gone.values()) == {"not measured"} and gone.keys() >= missed.keys()


def test_what_failed_or_is_wrong_is_no_success(gpu: ModuleType, tmp_path: Path) -> None:
    report = full(gpu, tmp_path / "r.json")
    for part in report.data["parts"].values():
        part["run"] = report.run
    assert gpu.failures(report) == []
    find(report, "correctness", call="packed").update(right=False)
    find(report, "million").update(error="OutOfMemoryError: no")
    find(report, "rate", n=32768, head_dim=128, causal=True).update(both_share=0.01)
    assert gpu.failures(report) == ["correctness: wrong", "million: OutOfMemoryError: no"]
    report.data["parts"]["million"]["run"] = "another"
    assert gpu.failures(report) == ["correctness: wrong"]


def test_without_natten_its_targets_are_not_measured(gpu: ModuleType, tmp_path: Path) -> None:
    report = full(gpu, tmp_path / "r.json")
    report.machine["natten"] = None
    report.begin("image").extend({"head_dim": d, "forward_tflops": 1.0} for d in gpu.WIDTHS)
    lost = [t for t in gpu.targets(report) if t.status != "met"]
    assert len(lost) == 4 and {t.note for t in lost} == {"NATTEN is not installed"}


def test_a_length_that_never_breaks_even_is_written(gpu: ModuleType, tmp_path: Path) -> None:
    report = full(gpu, tmp_path / "r.json")
    find(report, "dense", series="single", head_dim=64, n=65536)["both_ratio"] = 0.99
    (even,) = [t for t in gpu.targets(report) if "break-even" in t.name and t.status == "missed"]
    assert even.figure == math.inf
    gpu.run_parts(report, [], 0.0, lambda: 0.0)
    assert "inf" in [t["figure"] for t in json.loads(report.path.read_text())["targets"]]


# Running --------------------------------------------------------------------------------------------------------------


class Clock:
    """Advances when a part runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def parts(clock: Clock, ran: list[str], failing: str = "") -> dict[str, Callable[[Any], None]]:
    def make(name: str) -> Callable[[Any], None]:
        def part(report: Any) -> None:
            ran.append(name)
            clock.now += 100.0
            if name == failing:
                raise RuntimeError("out of memory")
            report.begin(name).append({"tflops": 1.0} if name == "matrix" else {"share": report.ceiling()})

        return part

    return {name: make(name) for name in ("matrix", "rate", "dense", "image")}


def test_the_budget_leaves_later_parts_out(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, ran = Clock(), list[str]()
    monkeypatch.setattr(gpu, "PARTS", parts(clock, ran))
    report = gpu.Report(tmp_path / "r.json", dict(CARD))
    gpu.run_parts(report, ["image", "dense", "rate"], 250.0, clock)
    said = capsys.readouterr().out
    assert ran == ["matrix", "rate", "dense"]
    assert "== image: left out, 300 of 250 seconds are over" in said and "== rate: 100 s, 200 s in all" in said
    found = json.loads(report.path.read_text())
    assert found["last"]["left_out"] == ["image"] and "image" not in found["parts"]
    assert found["parts"]["rate"]["seconds"] == 100.0
    assert {t["status"] for t in found["targets"]} == {"not measured"}


def test_parts_of_earlier_runs_keep_their_machine_and_shares_stay_within_a_run(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ran = Clock(), list[str]()
    monkeypatch.setattr(gpu, "PARTS", parts(clock, ran))
    first = gpu.Report(tmp_path / "r.json", {"gpu": "old"})
    gpu.run_parts(first, ["rate", "dense"], math.inf, clock)
    second = gpu.Report(tmp_path / "r.json", {"gpu": "new"})
    assert second.rows("matrix") and second.ceiling() is None  # that of another run
    gpu.run_parts(second, ["dense"], math.inf, clock)
    found = json.loads(second.path.read_text())["parts"]
    assert {name: (part["run"], part["machine"]["gpu"]) for name, part in found.items()} == {
        "matrix": (second.run, "new"), "rate": (first.run, "old"), "dense": (second.run, "new"),
    }  # fmt: skip
    assert "rate" in gpu.table(second) and f"{first.run} on old" in gpu.table(second)
    monkeypatch.setattr(gpu, "PARTS", parts(clock, ran, failing="matrix"))
    third = gpu.Report(tmp_path / "r.json", {"gpu": "third"})
    gpu.run_parts(third, ["rate"], math.inf, clock)
    assert third.rows("rate") == [{"share": None}] and third.rows("matrix")[0]["error"] == "out of memory"


def test_a_file_of_another_format_is_not_overwritten(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"parts": {"matrix": []}}')
    with pytest.raises(SystemExit, match="another format"):
        gpu.Report(path, {})


def test_it_says_what_it_needs(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "rate,speed"])
    with pytest.raises(SystemExit, match="speed"):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.main()
