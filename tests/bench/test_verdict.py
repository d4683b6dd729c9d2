from __future__ import annotations

from collections.abc import Sequence

import pytest

from farfield.bench.compare import RunResult
from farfield.bench.verdict import Verdict, compare_pair, judge, pair_sentence, ranked, summarise


def run(attention: str, seed: int = 0, windows: Sequence[float] = (2.0, 2.2), **changes: object) -> RunResult:
    values: dict[str, object] = {
        "attention": attention,
        "seed": seed,
        "bits": sum(windows) / len(windows),
        "windows": tuple(windows),
        "positions": ((0, 64, windows[0]), (64, 128, windows[-1])),
        "steps": 10,
        "tokens": 1000,
        "seconds": 2.0,
        "peak_bytes": 5 * 2**20,
        "parameters": 1234,
        "curve": ((10, 2.0, 2.5),),
        "key": {},
        **changes,
    }
    return RunResult(**values)  # type: ignore[arg-type]


def verdict(runs: Sequence[RunResult], **changes: object) -> Verdict:
    settings: dict[str, object] = {
        "context": 128,
        "budget": "10 steps each",
        "train_bytes": 10_000,
        "yardsticks": {"zlib": 9.0},
        **changes,
    }
    return judge(runs, **settings)  # type: ignore[arg-type]


def test_summary_has_mean_spread_and_deviation() -> None:
    one, two, three = (run("a", k, (bits, bits)) for k, bits in enumerate((2.0, 2.1, 2.3)))
    (summary,) = summarise([one, two, three])
    assert summary.bits == pytest.approx(6.4 / 3)
    assert summary.spread == pytest.approx(0.3)
    assert summary.deviation == pytest.approx(0.152753, rel=1e-4)
    assert summary.tokens_per_second == pytest.approx(500)
    assert summary.positions[0] == (0, 64, pytest.approx(6.4 / 3))


def test_one_seed_has_no_spread() -> None:
    (summary,) = summarise([run("a")])
    assert summary.spread is None
    assert summary.deviation is None


def test_paired_windows_see_a_small_steady_difference() -> None:
    base = [1.0, 3.0, 2.0, 4.0]
    worse = [b + d for b, d in zip(base, (0.01, 0.012, 0.011, 0.01), strict=True)]
    pair = compare_pair([run("a", 0, base)], [run("b", 0, worse)])
    assert pair.difference == pytest.approx(0.01075)
    assert pair.clear  # far smaller than the windows' own spread, but the same in each


def test_paired_windows_do_not_believe_a_difference_that_comes_and_goes() -> None:
    base = [1.0, 3.0, 2.0, 4.0]
    pair = compare_pair([run("a", 0, base)], [run("b", 0, [1.3, 2.8, 2.2, 3.8])])
    assert not pair.clear


def test_one_window_gives_no_yardstick() -> None:
    pair = compare_pair([run("a", 0, [2.0])], [run("b", 0, [3.0])])
    assert pair.yardstick is None
    assert not pair.clear


@pytest.mark.parametrize(("gap", "clear"), [(0.3, True), (0.05, False)])
def test_several_seeds_are_held_against_the_larger_spread(gap: float, clear: bool) -> None:
    best = [run("a", k, (2.0 + 0.1 * k,) * 2) for k in range(2)]
    other = [run("b", k, (2.0 + gap + 0.02 * k,) * 2) for k in range(2)]
    pair = compare_pair(best, other)
    assert pair.yardstick == pytest.approx(0.1)
    assert pair.clear is clear


def test_a_clear_winner_is_named_with_its_lead() -> None:
    said = verdict([run("slow", 0, (3.0, 3.1)), run("good", 0, (2.0, 2.1))])
    assert said.best == "good"
    assert "Take good" in said.headline
    assert "1.000 fewer than slow" in said.headline
    assert "context 128" in said.headline


def test_ties_are_said_and_the_faster_is_pointed_out() -> None:
    runs = [run("a", 0, (2.0, 2.2)), run("b", 0, (2.1, 2.12), seconds=1.0), run("c", 0, (5.0, 5.2))]
    said = verdict(runs)
    assert "a and b are too close to tell apart" in said.headline
    assert "clearly ahead of c" in said.headline
    assert "b trains fastest" in said.headline


def test_a_single_seed_is_warned_about() -> None:
    assert any("spread between seeds is not known" in w for w in verdict([run("a"), run("b")]).warnings)
    several = [run(name, seed) for name in "ab" for seed in (0, 1)]
    assert not any("spread between seeds" in w for w in verdict(several).warnings)


def test_far_from_trained_is_warned_about() -> None:
    said = verdict([run("a"), run("b")], yardsticks={"zlib": 1.5, "byte frequencies": 4.5})
    assert any("far from trained" in w and "zlib" in w for w in said.warnings)
    assert not any("far from trained" in w for w in verdict([run("a"), run("b")]).warnings)


def test_an_interruption_names_what_is_missing() -> None:
    said = verdict([run("a")], interrupted=True, wanted=["a", "b"])
    assert any("Interrupted" in w and "b" in w for w in said.warnings)


def test_nothing_finished() -> None:
    said = verdict([], interrupted=True, wanted=["a"])
    assert said.best is None
    assert "nothing to compare" in said.headline


def test_unequal_numbers_of_runs_are_said() -> None:
    said = verdict([run("a", 0), run("a", 1), run("b", 0)])
    assert any("different numbers of runs" in w for w in said.warnings)


def seeds(attention: str, *bits: float, **changes: object) -> list[RunResult]:
    return [run(attention, seed, (value, value), **changes) for seed, value in enumerate(bits)]


def test_clearly_ahead_is_said_of_what_was_tested_only() -> None:
    said = verdict([*seeds("a", 2.000, 2.001), *seeds("b", 1.98, 2.06), *seeds("c", 2.08, 2.081)])
    assert "a and b are too close to tell apart" in said.headline
    assert "they are clearly ahead" not in said.headline
    assert "; only a is clearly ahead of c" in said.headline
    assert any(d.startswith("b against c: 0.06") and "too small to tell" in d for d in said.details)
    assert [(p.best, p.other) for p in said.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_a_winner_must_beat_every_other_and_not_only_the_second() -> None:
    said = verdict([*seeds("a", 2.000, 2.001), *seeds("b", 2.05, 2.051), *seeds("c", 1.9, 2.4)])
    assert "Take" not in said.headline
    assert "a and c are too close to tell apart" in said.headline
    assert "; only a is clearly ahead of b" in said.headline


def test_three_that_are_tied_are_each_held_against_the_best_only() -> None:
    said = verdict([*seeds("a", 2.0, 2.1), *seeds("b", 2.04, 2.14), *seeds("c", 2.08, 2.18), *seeds("d", 3.0, 3.0)])
    assert "b and c are too close to a to tell apart; all of these are clearly ahead of d" in said.headline


def test_attentions_are_ranked_on_the_seeds_that_all_have_finished() -> None:
    runs = [*seeds("a", 2.10, 1.80), *seeds("b", 2.05)]
    said = verdict(runs, interrupted=True)
    assert said.best == "b"
    assert "Take b" in said.headline or "b and a" in said.headline
    assert "-0.0" not in said.headline + " ".join(said.details)
    assert "b against a: 0.050 bits per byte fewer" in said.details[0]
    assert any("all of them have finished (0)" in w for w in said.warnings)
    assert [s.attention for s in ranked(runs)] == ["b", "a"]


def test_runs_without_a_common_seed_give_no_winner() -> None:
    said = verdict([run("a", 0, (2.0, 2.0)), run("b", 1, (3.0, 3.0))])
    assert "Take" not in said.headline
    assert "do not compare" in said.headline
    assert "no shared seed gives no yardstick" in said.details[0]


def test_a_pair_that_is_worse_is_worded_so() -> None:
    pair = compare_pair([run("a", 0, (2.1, 2.2))], [run("b", 0, (2.0, 2.1))])
    assert not pair.clear
    assert "0.100 bits per byte more" in pair_sentence(pair)
