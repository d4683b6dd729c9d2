"""What the runs on images or fields say: see :mod:`farfield.bench.verdict` for the yardsticks.

With one seed the held-out examples are the yardstick, paired: of means over examples by their standard error, of the
mean IoU, a ratio of sums, by its jackknife over examples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from farfield.bench.verdict import Measure, Standing, Verdict, decide, shared_seeds
from farfield.bench.vision import VisionOutcome, VisionRun
from farfield.data.examples import size_in_words
from farfield.training.metrics import METRICS

__all__ = ["MEASURES", "VisionSummary", "paired_error", "summarise_vision", "verdict_of_vision"]

MEASURES = {
    "classify": Measure(
        noun="accuracy",
        higher=True,
        number=METRICS["classify"].say,
        gap=lambda value: f"{100 * value:.2f} points",
        gap_noun="of accuracy",
        better="more",
        worse="fewer",
        most="the highest accuracy",
        unit="example",
    ),
    "segment": Measure(
        noun="mean IoU",
        higher=True,
        number=METRICS["segment"].say,
        gap=lambda value: f"{100 * value:.2f} points",
        gap_noun="of mean IoU",
        better="more",
        worse="fewer",
        most="the highest mean IoU",
        unit="example",
    ),
    "operator": Measure(
        noun="relative L2",
        higher=False,
        number=METRICS["operator"].say,
        gap=lambda value: f"{value:.4f}",
        gap_noun="of relative L2",
        better="less",
        worse="more",
        most="the lowest relative L2",
        unit="example",
    ),
}


@dataclass(frozen=True)
class VisionSummary:
    """All runs of one attention together.

    Attributes:
        score: mean over seeds.
        spread: max - min over seeds; None with one seed.
        deviation: standard deviation over seeds (n - 1); None with one seed.
        tests: means over seeds, by resolution.
        classes: per class, means over seeds; None where unknown.
        steps, images, images_per_second: means over seeds, of training only.
        peak_bytes: the highest of the runs; None where unmeasured.
        parameters, flops: of the model, and of one forward pass of one example.
    """

    attention: str
    runs: int
    score: float
    spread: float | None
    deviation: float | None
    tests: Mapping[str, float]
    classes: tuple[float | None, ...]
    steps: float
    images: float
    images_per_second: float
    peak_bytes: int | None
    parameters: int
    flops: int | None


def summarise_vision(runs: Sequence[VisionRun]) -> list[VisionSummary]:
    """One summary per attention, in the order in which the attentions first appear."""
    grouped: dict[str, list[VisionRun]] = {}
    for run in runs:
        grouped.setdefault(run.attention, []).append(run)
    result = []
    for attention, members in grouped.items():
        scores = [run.score for run in members]
        several = len(members) > 1
        peaks = [run.peak_bytes for run in members if run.peak_bytes is not None]
        seconds = sum(run.seconds for run in members)
        result.append(
            VisionSummary(
                attention=attention,
                runs=len(members),
                score=statistics.fmean(scores),
                spread=max(scores) - min(scores) if several else None,
                deviation=statistics.stdev(scores) if several else None,
                tests={name: statistics.fmean(run.tests[name] for run in members) for name in members[0].tests},
                classes=tuple(_mean(values) for values in zip(*(run.classes for run in members), strict=True)),
                steps=statistics.fmean(run.steps for run in members),
                images=statistics.fmean(run.images for run in members),
                images_per_second=sum(run.images for run in members) / seconds if seconds > 0 else 0.0,
                peak_bytes=max(peaks) if peaks else None,
                parameters=members[0].parameters,
                flops=members[0].flops,
            )
        )
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def ranked_vision(outcome: VisionOutcome) -> list[VisionSummary]:
    """Summaries of all runs, best first by the mean over the seeds that all have finished."""
    seeds = shared_seeds(outcome.runs)
    counted = [run for run in outcome.runs if run.seed in seeds] or outcome.runs
    scores = {s.attention: s.score for s in summarise_vision(counted)}
    return sorted(
        summarise_vision(outcome.runs),
        key=lambda s: -scores[s.attention] if outcome.metric.higher else scores[s.attention],
    )


def paired_error(left: VisionRun, right: VisionRun) -> tuple[int, float]:
    """(number of examples, standard error of the difference of scores) of two runs on the same examples."""
    if left.counts and right.counts:
        return len(left.counts), _jackknife(left, right)
    differences = np.subtract(left.examples, right.examples)
    if len(differences) < 2:
        return len(differences), math.nan
    return len(differences), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def _jackknife(left: VisionRun, right: VisionRun) -> float:
    """Of the difference of two mean IoUs: from the differences with each example left out in turn."""
    without = _scores_without(left) - _scores_without(right)
    count = len(without)
    if count < 2:
        return math.nan
    return float(math.sqrt((count - 1) * np.nanvar(without)))


def _scores_without(run: VisionRun) -> npt.NDArray[np.float64]:
    """[examples] mean IoU without each example."""
    counts = np.asarray(run.counts, dtype=np.float64)
    hits, unions = np.moveaxis(counts.sum(0)[None] - counts, 1, 0)
    with np.errstate(invalid="ignore"):
        ratio = hits / unions  # 0 / 0 is NaN: a class that occurs nowhere
    known = ~np.isnan(ratio)
    return np.asarray(np.where(known, ratio, 0).sum(1) / np.maximum(known.sum(1), 1))


def verdict_of_vision(outcome: VisionOutcome) -> Verdict:
    """The plain answer to "which attention for this data, at this resolution and budget?"."""
    runs, settings, data = outcome.runs, outcome.settings, outcome.data
    measure = MEASURES[data.task]
    seeds = shared_seeds(runs)
    counted = [run for run in runs if run.seed in seeds] or list(runs)
    summaries = summarise_vision(counted)
    summaries.sort(key=lambda s: -s.score if measure.higher else s.score)
    if not summaries:
        return Verdict(None, "No run was finished, so there is nothing to compare.")
    standings = [Standing(s.attention, s.score, s.images_per_second) for s in summaries]
    things = "fields" if data.task == "operator" else "images"
    where = f"these {things} at {size_in_words(data.train.grid)} and {settings.budget_in_words}"
    headline, details, pairs = decide(counted, standings, where, bool(seeds), measure, paired_error)
    return Verdict(summaries[0].attention, headline, details, tuple(_warnings(outcome, summaries, seeds)), pairs)


def _warnings(outcome: VisionOutcome, summaries: Sequence[VisionSummary], seeds: Sequence[int]) -> list[str]:
    said = []
    names = {s.attention for s in summaries}
    missing = [name for name in outcome.settings.attentions if name not in names]
    if outcome.interrupted:
        left_out = f" Nothing is known about {', '.join(missing)}." if missing else ""
        count = len(outcome.runs)
        said.append(f"Interrupted: this rests on the {count} finished run{'s' * (count != 1)} only.{left_out}")
    finished = summarise_vision(outcome.runs)
    if seeds and any(s.runs > len(seeds) for s in finished):
        counts = ", ".join(f"{s.attention} {s.runs}" for s in finished)
        said.append(
            f"The attentions have different numbers of runs ({counts}); the answer rests on the "
            f"seed{'s' * (len(seeds) != 1)} that all of them have finished ({', '.join(map(str, seeds))})."
        )
    if any(s.runs < 2 for s in summaries) and len(summaries) > 1:
        said.append(
            "At least one attention has a single run, so the spread between seeds is not known; the "
            "yardstick covers the choice of held-out examples only. More seeds (--seeds 3) would tell."
        )
    metric, best = outcome.metric, summaries[0]
    simple = outcome.data.yardsticks
    if simple:
        strongest = (max if metric.higher else min)(simple, key=lambda name: simple[name])
        value = simple[strongest]
        if best.score <= value if metric.higher else best.score >= value:
            said.append(
                f"All runs are far from trained: even the best ({metric.say(best.score)} {metric.name}) is not ahead "
                f"of an answer that needs no training: {strongest} ({metric.say(value)}). The order may change with a "
                "larger budget."
            )
    return said
