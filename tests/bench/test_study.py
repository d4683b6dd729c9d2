"""Studies: the plan, what is kept, what is refused, and what is shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from farfield import recipes
from farfield.bench.pace import TURNS
from farfield.bench.runs import Watcher
from farfield.bench.study import Study, StudyRun, study, study_paces
from farfield.bench.study_report import markdown, pace_table, rows_of, study_figure, write
from farfield.data.text import Corpus, TextFile

CONFIGS = sorted((Path(__file__).parents[2] / "benchmarks" / "study").glob("*.json"))
SMALL = {"steps": 2, "contexts": [64], "dim": 8, "depth": 1, "heads": 2, "eval_tokens": 128}
FMA = "fma=fma:block=8:rank=2"


@pytest.fixture
def corpus() -> Corpus:
    text = "near field, far field, level, group, cell, rank, summary\n" * 60
    return Corpus((TextFile("a.txt", text.encode()),), "a test")


def small(*variants: str, **changes: object) -> Study:
    return Study.from_dict({"variants": list(variants or (FMA,)), **SMALL, **changes})


def test_every_cell_and_seed_is_planned() -> None:
    plan = small("dense", FMA, contexts=[64, 128], batches=[1, 2], seeds=[3, 4])
    assert len(plan.plan) == len(set(plan.plan)) == 16
    assert plan.plan[:3] == [("dense-n64-b1", 3), ("fma-n64-b1", 3), ("dense-n64-b2", 3)]
    assert {seed for _, seed in plan.plan[:8]} == {3}


def test_budgets_in_bytes_give_steps() -> None:
    plan = small(steps=None, tokens=1000, contexts=[64], batches=[1, 4, 32])
    assert [plan.train_config(cell, 0).steps for cell in plan.cells] == [15, 3, 1]
    assert plan.budget_in_words == "1,000 bytes each"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": []}, "a study needs variants"),
        ({"variants": ["dense", "dense"]}, "variants of a study name something twice: dense, dense"),
        ({"contexts": [64, 64]}, "contexts of a study name something twice"),
        ({"seeds": []}, "seeds of a study must not be empty"),
        ({"contexts": 64}, "contexts of a study is a list, got 64"),
        ({"task": "both"}, "task='both': one of next, masked"),
        ({"seconds": 2.0}, "a study has one budget, steps or seconds or tokens; got steps=2, seconds=2.0"),
        ({"steps": None}, "a study has one budget.*got none"),
        ({"eval_tokens": 0}, "eval_tokens must be an integer of at least 1, got 0"),
        ({"batches": [0]}, "batch must be at least 1"),
        ({"dim": 9}, "num_heads must divide dim"),
        ({"width": 9}, r"unknown settings \['width'\] of a study"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Study.from_dict({"variants": [FMA], **SMALL, **changes})


def test_what_cannot_work_is_refused_before_training(corpus: Corpus, tmp_path: Path) -> None:
    for variant, message in (("x=fma:block=8:rank=3", "x at context 64"), ("agent", "agent at context 64.*causal")):
        with pytest.raises(ValueError, match=message):
            study(small("dense", variant), corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finished_runs_are_kept_and_others_refused(corpus: Corpus, tmp_path: Path) -> None:
    told: list[tuple[str, int, bool]] = []

    class Listener(Watcher):
        def on_run(self, run: StudyRun, reused: bool) -> None:
            told.append((run.attention, run.seed, reused))

    first = study(small(FMA, seeds=[0, 1]), corpus, tmp_path, watcher=Listener())
    files = {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    assert set(files) == {"fma-n64-b1-seed0.json", "fma-n64-b1-seed1.json"}
    assert first.runs[0].bits != first.runs[1].bits and first.runs[0].steps == 2
    assert len(first.runs[0].level_bias) == 1 and first.runs[0].level_bias[0][0] == pytest.approx(-8, abs=0.5)
    again = study(small(FMA, "dense", seeds=[0, 1]), corpus, tmp_path, watcher=Listener())
    assert told == [
        ("fma-n64-b1", 0, False), ("fma-n64-b1", 1, False),
        ("fma-n64-b1", 0, True), ("dense-n64-b1", 0, False), ("fma-n64-b1", 1, True), ("dense-n64-b1", 1, False),
    ]  # fmt: skip
    assert [run for run in again.runs if run.key["label"] == "fma"] == first.runs
    assert all((tmp_path / "runs" / name).read_bytes() == data for name, data in files.items())
    with pytest.raises(ValueError, match=r"steps 2 there, 3 now.*another label or --out"):
        study(small(steps=3), corpus, tmp_path)
    with pytest.raises(ValueError, match=r"options \{'block': 8, 'rank': 2\} there, .*'rank': 4"):
        study(small("fma=fma:block=8:rank=4"), corpus, tmp_path)
    other = Corpus((TextFile("b.txt", b"other " * 400),), "another")
    with pytest.raises(ValueError, match="text "):
        study(small(), other, tmp_path)
    (tmp_path / "runs" / "fma-n64-b1-seed0.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a finished run of farfield study"):
        study(small(), corpus, tmp_path)


def test_stopping_keeps_what_is_finished(corpus: Corpus, tmp_path: Path) -> None:
    plan = small("dense", FMA)
    stopped = study(
        plan, corpus, tmp_path, should_stop=lambda: (tmp_path / "runs" / "dense-n64-b1-seed0.json").exists()
    )
    assert stopped.interrupted and [run.key["label"] for run in stopped.runs] == ["dense"]
    whole = study(plan, corpus, tmp_path)
    assert [run.key["label"] for run in whole.runs] == ["dense", "fma"] and whole.runs[0] == stopped.runs[0]


def test_masked_studies_read_both_sides(corpus: Corpus, tmp_path: Path) -> None:
    outcome = study(small(FMA, "agent", task="masked", steps=1), corpus, tmp_path)
    assert len(outcome.runs) == 2 and outcome.study.unit == "bits per hidden byte"
    assert all(5 < run.bits < 12 for run in outcome.runs)


def test_tables_hold_means_and_ranges(corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = study(small(), corpus, tmp_path).runs[0]

    def made(label: str, context: int, batch: int, seed: int, bits: float) -> StudyRun:
        key = {**run.key, "label": label, "context": context, "batch": batch}
        return dataclasses.replace(run, key=key, seed=seed, bits=bits, steps=10, seconds=0.5, tokens=1000)

    runs = [made("a", 64, 1, 0, 3.0), made("b", 64, 1, 0, 2.0), made("a", 64, 1, 1, 4.0), made("b", 128, 1, 0, 2.5)]
    rows = rows_of(runs)
    assert [(row.context, row.label, row.seeds, row.bits, row.low, row.high) for row in rows] == [
        (64, "b", 1, 2.0, 2.0, 2.0), (64, "a", 2, 3.5, 3.0, 4.0), (128, "b", 1, 2.5, 2.5, 2.5),
    ]  # fmt: skip
    assert rows[1].step_ms == pytest.approx(50) and rows[1].tokens_per_second == pytest.approx(2000)
    table = markdown(rows, "bits per byte")
    assert "| 64 | 1 | a | 2 | 3.5000 | 3.0000 to 4.0000 |" in table
    in_turn = [dataclasses.replace(run, pace=0.016) for run in runs]
    assert rows_of(in_turn)[1].pace_ms == pytest.approx(16) and rows[1].pace_ms is None
    assert "| 10 | 50 | 2,000 |" in table and "| 10 | 16 | 4,000 |" in markdown(rows_of(in_turn), "bits per byte")
    by_context = study_figure(rows, "bits")
    assert by_context.axes[0].get_xlabel() == "context in bytes"
    by_batch = study_figure(rows_of([made("a", 64, b, 0, 3.0) for b in (1, 2)]), "bits")
    assert by_batch.axes[0].get_xlabel() == "sequences per step"
    bars = study_figure(rows[:2], "bits")
    assert [label.get_text() for label in bars.axes[0].get_yticklabels()] == ["b", "a"]


def test_results_are_written(corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = study(small(), corpus, tmp_path)
    names = [path.name for path in write(outcome, tmp_path, "farfield study --steps 2")]
    assert names == ["study.json", "table.md", "study.png"]
    result = json.loads((tmp_path / "study.json").read_text())
    assert result["rows"][0]["bits"] == outcome.runs[0].bits and result["study"]["steps"] == 2
    assert "farfield study --steps 2" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_kept_studies_can_run(path: Path) -> None:
    values = json.loads(path.read_text())
    assert values.pop("about")
    plan = Study.from_dict({**values, "dim": 16, "heads": 2, "depth": 1, "contexts": values["contexts"][:1]})
    plan.validate()


def test_the_kept_studies_are_there() -> None:
    assert [path.stem for path in CONFIGS] == ["ablation", "batch", "masked", "recipes", "small"]


def test_budgets_in_seconds_become_steps_at_a_measured_pace(corpus: Corpus, tmp_path: Path) -> None:
    asked = {"steps": None, "seconds": 0.2}
    told: list[tuple[str, int, int]] = []

    class Listener(Watcher):
        def on_pace(self, place: str, done: int, total: int) -> None:
            told.append((place, done, total))

    plan = small("dense", FMA, seeds=[0, 1], **asked)
    first = study(plan, corpus, tmp_path, watcher=Listener())
    assert told == [("context 64, batch 1", turn, TURNS) for turn in range(1, TURNS + 1)]
    kept = json.loads((tmp_path / "pace.json").read_text())["cells"]
    for run in first.runs:
        assert run.pace == kept[run.attention]["median"] and len(kept[run.attention]["seconds"]) == TURNS
        assert run.steps == max(1, round(0.2 / run.pace)) == run.key["paced_steps"]
    by_label = {label: {run.steps for run in first.runs if run.key["label"] == label} for label in ("dense", "fma")}
    assert all(len(steps) == 1 for steps in by_label.values()), "every seed gets the steps of its variant"
    # Measured once: what is made later gets its steps from the file, not from how busy the machine is then.
    (tmp_path / "runs" / "fma-n64-b1-seed1.json").unlink()
    again = study(plan, corpus, tmp_path, watcher=Listener())
    assert len(told) == TURNS
    assert [(run.attention, run.steps, run.bits) for run in again.runs] == [
        (run.attention, run.steps, run.bits) for run in first.runs
    ]
    table = pace_table(plan, study_paces(plan, corpus, tmp_path) or {}).splitlines()
    assert len(table) == 4 and table[2].startswith("| 64 | 1 | dense | ") and table[2].endswith(" | 1.00 |")
    with pytest.raises(ValueError, match=r"has the seconds per step of dense-n64-b1, fma-n64-b1, not of window-n64-b1"):
        study(small("dense", FMA, "window=window:size=8", **asked), corpus, tmp_path)
    with pytest.raises(ValueError, match=r"measured dense-n64-b1 with .*'dim': 8.* now asked for is .*'dim': 16"):
        study(small("dense", FMA, dim=16, **asked), corpus, tmp_path)


def test_every_position_can_read_the_token_before(corpus: Corpus, tmp_path: Path) -> None:
    runs = study(small(FMA, shift=True), corpus, tmp_path).runs
    assert runs[0].key["shift"] is True
    assert runs[0].parameters == study(small(FMA), corpus, tmp_path / "without").runs[0].parameters + 257 * 8
    with pytest.raises(ValueError, match="shift must be true or false, got 2"):
        small(shift=2)


def test_a_ramp_comes_before_the_budget_and_is_not_counted(corpus: Corpus, tmp_path: Path) -> None:
    plan = small("dense", FMA, ramp=[[16, 3, 4], [32, 1, 2]])
    assert plan.ramp_steps == 6 and plan.budget_in_words == "2 steps each after 6 on shorter windows"
    trainer = plan.trainer(plan.cells[0], 0, corpus.split(64).train)
    assert [list(trainer.batch(step).shape) for step in range(1, 10)] == [[3, 17]] * 4 + [[1, 33]] * 2 + [[1, 65]] * 3
    assert torch.equal(trainer.batch(7), plan.batches_of(plan.cells[0], corpus.split(64).train, 0).batch(1))
    # 60 % of two steps out of eight, 5 % of six.
    rates = trainer.config
    assert (rates.steps, rates.cooldown, rates.warmup) == (8, pytest.approx(0.15), pytest.approx(0.0375))
    first = study(plan, corpus, tmp_path)
    run = first.runs[0]
    assert len(list((tmp_path / "ramps").iterdir())) == 2
    # Another study goes on from the same ramps, with the same numbers as if it had taken them.
    longer = small("dense", FMA, ramp=[[16, 3, 4], [32, 1, 2]], contexts=[128], steps=3)
    kept = study(longer, corpus, tmp_path / "kept", ramps=tmp_path / "ramps").runs
    taken = study(longer, corpus, tmp_path / "taken").runs
    assert not (tmp_path / "kept" / "ramps").exists() and len(list((tmp_path / "ramps").iterdir())) == 2
    assert [run.bits for run in kept] == pytest.approx([run.bits for run in taken], rel=1e-6)
    next((tmp_path / "ramps").iterdir()).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is not the state after a ramp"):
        study(longer, corpus, tmp_path / "damaged", ramps=tmp_path / "ramps")
    assert (run.steps, run.tokens, run.curve[-1][0]) == (2, 128, 8) and 0 < run.seconds < run.curve[-1][1]
    assert run.bits != study(small("dense"), corpus, tmp_path / "without").runs[0].bits
    for ramp, message in (([[16, 3]], "a stage of a ramp is"), ([[16, 0, 2]], "each at least 1"), (16, "a list of")):
        with pytest.raises(ValueError, match=message):
            small(ramp=ramp)


def test_runs_of_other_defaults_are_other_runs(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(small(FMA), corpus, tmp_path)
    now = {**recipes.options("fma", 1), "sinks": 1}
    monkeypatch.setattr(recipes, "options", lambda *_: now)
    with pytest.raises(ValueError, match=r"defaults \{.*'sinks': 0.* there, \{.*'sinks': 1.* now"):
        study(small(FMA), corpus, tmp_path)
