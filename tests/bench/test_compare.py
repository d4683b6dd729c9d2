from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from farfield.bench.compare import (
    RUN_FORMAT,
    Outcome,
    RunResult,
    Settings,
    Watcher,
    compare,
    mixed_machines,
    run_file,
    thin,
)
from farfield.bench.report import to_json, write
from farfield.bench.verdict import verdict_of
from farfield.data.text import Corpus, TextFile
from farfield.models.language import LanguageConfig, LanguageModel
from farfield.training.evaluate import evaluate
from farfield.training.loop import Progress

TINY = Settings(
    attentions=("dense", "window"), context=64, seconds=None, steps=2, dim=16, depth=1, heads=1,
    options={"block": 8, "rank": 2}, eval_tokens=256, cost_seconds=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, size=int(n)).tolist()) for n in rng.integers(2, 9, size=50)]
    text = b" ".join(words[int(i)] for i in rng.integers(0, 50, size=3000))
    return Corpus((TextFile("words", text),), "generated words")


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    folder = tmp_path_factory.mktemp("finished")
    outcome = compare(TINY, corpus, folder)
    write(outcome, folder)
    return outcome, folder


def numbers(run: RunResult) -> dict[str, object]:
    return {
        name: getattr(run, name) for name in ("attention", "seed", "bits", "windows", "positions", "steps", "tokens")
    }


def test_every_run_is_made_and_saved(finished: tuple[Outcome, Path]) -> None:
    outcome, folder = finished
    assert [(r.attention, r.seed) for r in outcome.runs] == [("dense", 0), ("window", 0)]
    for run in outcome.runs:
        values = json.loads(run_file(folder, run.attention, run.seed).read_text())
        assert values["format"] == RUN_FORMAT
        assert RunResult.from_json(values) == run
        assert run.bits == pytest.approx(np.mean(run.windows))
        assert run.steps == 2
        assert run.tokens == 2 * 64
        assert len(run.windows) >= 8


def test_equal_seeds_give_equal_numbers(finished: tuple[Outcome, Path], corpus: Corpus, tmp_path: Path) -> None:
    again = compare(TINY, corpus, tmp_path)
    assert [numbers(run) for run in again.runs] == [numbers(run) for run in finished[0].runs]


def test_another_seed_gives_other_numbers(finished: tuple[Outcome, Path], corpus: Corpus, tmp_path: Path) -> None:
    other = compare(dataclasses.replace(TINY, attentions=("dense",), first_seed=5), corpus, tmp_path)
    assert other.runs[0].bits != finished[0].runs[0].bits


class Counter(Watcher):
    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []
        self.reused: list[tuple[str, int]] = []

    def on_run(self, run: RunResult, reused: bool) -> None:
        (self.reused if reused else self.made).append((run.attention, run.seed))


def test_resuming_makes_only_what_is_missing(corpus: Corpus, tmp_path: Path) -> None:
    first = compare(TINY, corpus, tmp_path)
    counter = Counter()
    more = dataclasses.replace(TINY, attentions=("dense", "window", "blocks"))
    second = compare(more, corpus, tmp_path, resume=True, watcher=counter)
    assert counter.reused == [("dense", 0), ("window", 0)]
    assert counter.made == [("blocks", 0)]
    assert second.runs[:2] == first.runs


@pytest.mark.parametrize("resume", [True, False])
def test_other_settings_are_refused_with_the_difference(
    finished: tuple[Outcome, Path], corpus: Corpus, resume: bool
) -> None:
    _, folder = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="steps 2 there, 3 now"):
        compare(dataclasses.replace(TINY, steps=3), corpus, folder, resume=resume)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_text_is_refused(finished: tuple[Outcome, Path]) -> None:
    other = Corpus((TextFile("other", bytes(range(256)) * 20),), "other")
    with pytest.raises(ValueError, match=r"text \w+ there"):
        compare(TINY, other, finished[1], resume=True)


@pytest.mark.parametrize("contents", ["{", "[]", '{"format": "farfield-run/1", "attention": "dense"}'])
def test_damaged_runs_are_named(corpus: Corpus, tmp_path: Path, contents: str) -> None:
    path = run_file(tmp_path, "dense", 0)
    path.parent.mkdir()
    path.write_text(contents)
    with pytest.raises(ValueError, match=r"dense-seed0\.json"):
        compare(TINY, corpus, tmp_path, resume=True)


def test_a_foreign_results_file_is_not_overwritten(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="would be overwritten"):
        compare(TINY, corpus, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attentions": ()}, "no attention"),
        ({"attentions": ("dense", "dense")}, "twice"),
        ({"attentions": ("dens",)}, "did you mean 'dense'"),
        ({"attentions": ("agent",)}, "not causal"),
        ({"heads": 3}, "num_heads must divide dim"),
        ({"options": {"block": 8, "rank": 3}, "attentions": ("fma",)}, "does not divide"),
        ({"options": {"sise": 4}}, "'sise'"),
        ({"steps": None, "seconds": None}, "needs an end"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"options": {"block": 8, "sinks": "abc"}, "attentions": ("fma",)}, "sinks='abc'"),
        (
            {"options": {"block": 8, "rank": 2, "summary": "learned", "grid": (32,)}, "attentions": ("fma",)},
            "fma cannot work at context 64: .*grid",
        ),
        ({"context": 100_000}, "the text has"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    corpus: Corpus, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = tmp_path / "new"
    with pytest.raises(ValueError, match=message):
        compare(dataclasses.replace(TINY, **changes), corpus, folder)  # type: ignore[arg-type]
    assert not folder.exists()


def test_stopping_in_a_run_leaves_that_run_out(corpus: Corpus, tmp_path: Path) -> None:
    class Stop(Counter):
        stop = False

        def on_begin(self, attention: str, seed: int, number: int, total: int) -> None:
            self.stop = attention == "window"

    watcher = Stop()
    outcome = compare(TINY, corpus, tmp_path, watcher=watcher, should_stop=lambda: watcher.stop)
    assert outcome.interrupted
    assert outcome.unfinished == ("window", 0)
    assert [run.attention for run in outcome.runs] == ["dense"]
    assert not run_file(tmp_path, "window", 0).exists()
    assert to_json(outcome)["status"] == "interrupted"
    assert "window" in " ".join(verdict_of(outcome).warnings)


def test_a_diverged_run_does_not_end_the_others(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farfield.bench import compare as module

    real = module._one_run

    def one_run(settings: Settings, attention: str, *rest: object) -> RunResult:
        if attention == "dense":
            raise FloatingPointError("training diverged at step 1")
        return real(settings, attention, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_one_run", one_run)
    outcome = compare(TINY, corpus, tmp_path)
    assert [(f.attention, f.reason) for f in outcome.failures] == [("dense", "training diverged at step 1")]
    assert [run.attention for run in outcome.runs] == ["window"]
    assert "diverged" in write(outcome, tmp_path).read_text()


def test_finished_runs_are_not_overwritten(finished: tuple[Outcome, Path], corpus: Corpus) -> None:
    _, folder = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"holds 2 finished runs .*--resume .* another --out"):
        compare(TINY, corpus, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_more_levels_than_a_picture_or_a_short_length_has(corpus: Corpus, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        TINY, attentions=("fma",), context=256, options={"block": 8, "rank": 2, "levels": 4}, cost_seconds=0.2
    )
    outcome = compare(settings, corpus, tmp_path)
    assert outcome.notes == []
    assert outcome.cost is not None
    assert outcome.cost.points
    assert "Who sees whom" in write(outcome, tmp_path).read_text()


def test_a_layer_that_cannot_be_measured_or_drawn_is_a_note(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farfield.bench import pictures as module

    def no_picture(*_: object, **__: object) -> None:
        raise ValueError("no picture is known for the far field Odd()")

    monkeypatch.setattr(module, "pattern", no_picture)
    options = {"block": (8,), "rank": 2, "summary": "learned", "grid": (64,)}
    settings = dataclasses.replace(TINY, attentions=("fma",), options=options, cost_seconds=0.2)
    outcome = compare(settings, corpus, tmp_path)
    assert len(outcome.runs) == 1
    picture, cost = outcome.notes
    assert "no picture is known for the far field Odd()" in picture
    assert "cost of one layer of fma was not measured" in cost
    assert "grid (64,)" in cost
    page = write(outcome, tmp_path).read_text()
    assert "Odd()" in page
    assert "Who sees whom" not in page
    assert to_json(outcome)["notes"] == outcome.notes
    again = compare(settings, corpus, tmp_path, resume=True)  # tuples survive the way through JSON
    assert again.runs == outcome.runs


def test_a_cost_stage_that_breaks_is_a_note(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farfield.bench import compare as module

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(module.layer_cost, "measure", broken)
    outcome = compare(dataclasses.replace(TINY, attentions=("dense",), cost_seconds=1.0), corpus, tmp_path)
    assert len(outcome.runs) == 1
    assert "shapes cannot be multiplied" in outcome.notes[0]


def test_runs_of_several_machines_are_noted(finished: tuple[Outcome, Path]) -> None:
    outcome, _ = finished
    assert outcome.runs[0].machine.keys() == {"processor", "cores", "threads", "torch"}
    assert mixed_machines(outcome.runs) == []
    other = dataclasses.replace(outcome.runs[1], machine={**outcome.runs[1].machine, "threads": 77})
    (note,) = mixed_machines([outcome.runs[0], other])
    assert "threads" in note
    assert "77" in note
    unknown = dataclasses.replace(other, machine={})
    assert mixed_machines([outcome.runs[0], unknown]) == []


def test_windows_are_those_of_the_evaluation(finished: tuple[Outcome, Path], corpus: Corpus) -> None:
    model = LanguageModel(LanguageConfig(attention="dense", dim=16, depth=1, num_heads=1, context=64))
    whole = evaluate(model, corpus.split(64).valid, 64, max_tokens=256, least=8, most=256)
    assert len(whole.windows) == len(finished[0].runs[0].windows) == 8
    assert np.mean(whole.windows) == pytest.approx(whole.bits)


def test_thinning_keeps_the_mean_and_the_end() -> None:
    history = [Progress(i, i / 10, i * 8, float(i % 7)) for i in range(1, 1001)]
    curve = thin(history, 100)
    assert len(curve) == 100
    assert curve[-1][:2] == (1000, 100.0)
    assert np.mean([bits for _, _, bits in curve]) == pytest.approx(np.mean([p.train_bits for p in history]))
    assert thin(history[:5], 100) == [(p.step, p.seconds, p.train_bits) for p in history[:5]]
