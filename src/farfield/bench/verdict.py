"""What the runs say: means, spreads, paired differences, and a plain answer.

Two yardsticks decide whether a difference counts:

- with several seeds, the spread of the runs: seeds are paired (the same seed sees the same text in the same order), and
  a difference is clear when its mean is larger than the larger of the two attentions' ranges (max - min over seeds);
- with one seed, the held-out windows: every attention is tested on the same windows, so their bits are paired too, and
  a difference is clear when its mean is larger than twice its standard error over windows. That says how sure the
  difference of these two *models* is; how much another seed would change it stays unknown, and the answer says so.

Attentions are ranked on the seeds that all of them have finished, so that an interruption favours nobody; every run is
in the tables all the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

from farfield.bench.compare import Outcome, RunResult

CLEAR_ERRORS = 2.0
"""Standard errors from which a difference between two single runs counts."""


@dataclass(frozen=True)
class Measure:
    """What runs are judged by, and how it is said.

    Attributes:
        noun: such as "bits per byte".
        higher: whether more is better.
        number: a score in figures, such as "2.345" or "61.25 %".
        gap: a difference of scores in figures, such as "0.012" or "1.20 points".
        gap_noun: what the gap is of, after the figures.
        better, worse: the words for a better and a worse score, such as "fewer" and "more".
        most: the best score of several in words, such as "the fewest bits per byte".
        unit: what a single run is tested on, several of which give a standard error: "window", "example".
    """

    noun: str
    higher: bool
    number: Callable[[float], str]
    gap: Callable[[float], str]
    gap_noun: str
    better: str
    worse: str
    most: str
    unit: str


BITS = Measure(
    noun="bits per byte",
    higher=False,
    number=lambda value: f"{value:.3f}",
    gap=lambda value: f"{value:.3f}",
    gap_noun="bits per byte",
    better="fewer",
    worse="more",
    most="the fewest bits per byte",
    unit="window",
)


class Scored(Protocol):
    """A run, as far as a verdict looks at it."""

    @property
    def attention(self) -> str:
        """Name of the recipe."""
        ...

    @property
    def seed(self) -> int:
        """Runs of one seed saw the same data in the same order."""
        ...

    @property
    def score(self) -> float:
        """What it is judged by."""
        ...


@dataclass(frozen=True)
class Standing:
    """All runs of one attention: the mean score, and how fast it trains (in whatever unit, equal for all)."""

    attention: str
    score: float
    speed: float


Tests = Callable[[Any, Any], "tuple[int, float]"]
"""(number of paired tests, standard error of the difference of scores) of two runs of one seed."""


@dataclass(frozen=True)
class Summary:
    """All runs of one attention together.

    Attributes:
        bits: mean held-out bits per byte over seeds.
        spread: max - min over seeds; None with one seed.
        deviation: standard deviation over seeds (n - 1); None with one seed.
        positions: (first, last + 1, mean bits) by position in the context.
        steps, tokens, tokens_per_second: means over seeds, of training only.
        peak_bytes: the highest of the runs; None where unmeasured.
    """

    attention: str
    runs: int
    bits: float
    spread: float | None
    deviation: float | None
    positions: tuple[tuple[int, int, float], ...]
    steps: float
    tokens: float
    tokens_per_second: float
    peak_bytes: int | None
    parameters: int


@dataclass(frozen=True)
class Pair:
    """How much worse ``other`` is than ``best``, in bits per byte or another measure, and what it is held against.

    ``clear`` is true when ``best`` is better by more than the yardstick.
    """

    best: str
    other: str
    difference: float
    yardstick: float | None
    kind: str
    clear: bool


@dataclass(frozen=True)
class Verdict:
    """The plain answer.

    Attributes:
        best: the attention with the fewest bits; None when nothing is finished.
        headline: one sentence.
        details: further sentences.
        warnings: what limits the answer.
        pairs: the best against each other attention, closest first; then those other pairs on which the headline rests.
    """

    best: str | None
    headline: str
    details: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = field(default=())


def summarise(runs: Sequence[RunResult]) -> list[Summary]:
    """One summary per attention, in the order in which the attentions first appear."""
    grouped: dict[str, list[RunResult]] = {}
    for run in runs:
        grouped.setdefault(run.attention, []).append(run)
    result = []
    for attention, members in grouped.items():
        bits = [run.bits for run in members]
        several = len(members) > 1
        positions = tuple(
            (low, high, statistics.fmean(run.positions[i][2] for run in members))
            for i, (low, high, _) in enumerate(members[0].positions)
        )
        peaks = [run.peak_bytes for run in members if run.peak_bytes is not None]
        seconds = sum(run.seconds for run in members)
        result.append(
            Summary(
                attention=attention,
                runs=len(members),
                bits=statistics.fmean(bits),
                spread=max(bits) - min(bits) if several else None,
                deviation=statistics.stdev(bits) if several else None,
                positions=positions,
                steps=statistics.fmean(run.steps for run in members),
                tokens=statistics.fmean(run.tokens for run in members),
                tokens_per_second=sum(run.tokens for run in members) / seconds if seconds > 0 else 0.0,
                peak_bytes=max(peaks) if peaks else None,
                parameters=members[0].parameters,
            )
        )
    return result


def shared_seeds(runs: Sequence[Scored]) -> list[int]:
    """The seeds that every attention among ``runs`` has finished."""
    grouped: dict[str, set[int]] = {}
    for run in runs:
        grouped.setdefault(run.attention, set()).add(run.seed)
    return sorted(set.intersection(*grouped.values())) if grouped else []


def ranked(runs: Sequence[RunResult]) -> list[Summary]:
    """Summaries of all runs, best first by the mean over :func:`shared_seeds` (over all seeds where there are none)."""
    seeds = shared_seeds(runs)
    counted = {s.attention: s.bits for s in summarise([run for run in runs if run.seed in seeds] or runs)}
    return sorted(summarise(runs), key=lambda s: counted[s.attention])


def compare_pair(
    best: Sequence[Any], other: Sequence[Any], measure: Measure = BITS, tests: Tests | None = None
) -> Pair:
    """Holds ``other`` against ``best`` on the seeds that both have finished; unpaired if they share none.

    Args:
        best, other: runs of one attention each.
        measure: what they are judged by.
        tests: gives the standard error of two single runs; by default that of the windows of text.
    """
    names = best[0].attention, other[0].attention
    left = {run.seed: run for run in best}
    right = {run.seed: run for run in other}
    shared = sorted(left.keys() & right.keys())
    if shared:
        best, other = [left[s] for s in shared], [right[s] for s in shared]
    difference = statistics.fmean(r.score for r in other) - statistics.fmean(r.score for r in best)
    if measure.higher:
        difference = -difference
    if len(best) > 1 and len(other) > 1:
        yardstick = max(_range(best), _range(other))
        return Pair(*names, difference, yardstick, "the spread of the runs", difference > yardstick)
    if not shared:
        return Pair(*names, difference, None, "no shared seed", False)
    count, error = (tests or _window_error)(left[shared[0]], right[shared[0]])
    if count < 2:
        return Pair(*names, difference, None, f"one held-out {measure.unit}", False)
    yardstick = CLEAR_ERRORS * error
    said = f"twice the standard error over {measure.unit}s"
    return Pair(*names, difference, yardstick, said, difference > yardstick)


def _window_error(left: RunResult, right: RunResult) -> tuple[int, float]:
    windows = [b - a for a, b in zip(left.windows, right.windows, strict=True)]
    if len(windows) < 2:
        return len(windows), math.nan
    return len(windows), statistics.stdev(windows) / math.sqrt(len(windows))


def _range(runs: Sequence[Scored]) -> float:
    return max(run.score for run in runs) - min(run.score for run in runs)


def decide(
    runs: Sequence[Any],
    standings: Sequence[Standing],
    where: str,
    shared: bool,
    measure: Measure = BITS,
    tests: Tests | None = None,
) -> tuple[str, tuple[str, ...], tuple[Pair, ...]]:
    """The headline, further sentences, and the pairs on which they rest.

    Args:
        runs: those that count.
        standings: of their attentions, best first.
        where: for what data and budget, in words.
        shared: whether they share a seed.
        measure: what they are judged by.
        tests: see :func:`compare_pair`.
    """
    members = {s.attention: [run for run in runs if run.attention == s.attention] for s in standings}
    table = {  # better, worse
        (a, b): compare_pair(members[a], members[b], measure, tests) for a, b in combinations(members, 2)
    }
    pairs = [table[standings[0].attention, s.attention] for s in standings[1:]]
    headline, further = _headline(standings, table, where, shared, measure)
    pairs += further
    return headline, tuple(pair_sentence(pair, measure) for pair in pairs), tuple(pairs)


def judge(
    runs: Sequence[RunResult],
    *,
    context: int,
    budget: str,
    train_bytes: int,
    yardsticks: Mapping[str, float],
    interrupted: bool = False,
    wanted: Sequence[str] = (),
) -> Verdict:
    """The plain answer to "which attention for this text, at this context and budget?".

    Args:
        runs: the finished runs.
        context: tokens of context.
        budget: the budget in words, such as ``"60 s of training each"``.
        train_bytes: bytes of training text, to say how often it was seen.
        yardsticks: bits per byte that simple coders need for the held-out text, such as ``{"gzip": 2.1}``.
        interrupted: whether runs are missing.
        wanted: every attention that was asked for.
    """
    seeds = shared_seeds(runs)
    counted = [run for run in runs if run.seed in seeds] or list(runs)
    summaries = sorted(summarise(counted), key=lambda s: s.bits)
    missing = [name for name in wanted if name not in {s.attention for s in summaries}]
    if not summaries:
        return Verdict(None, "No run was finished, so there is nothing to compare.")
    headline, details, pairs = decide(
        counted,
        [Standing(s.attention, s.bits, s.tokens_per_second) for s in summaries],
        f"this text, context {context:,} and {budget}",
        bool(seeds),
    )
    return Verdict(
        summaries[0].attention,
        headline,
        details,
        tuple(_warnings(runs, seeds, summaries, train_bytes, yardsticks, interrupted, missing)),
        pairs,
    )


def _headline(
    summaries: Sequence[Standing], table: Mapping[tuple[str, str], Pair], where: str, shared: bool, measure: Measure
) -> tuple[str, list[Pair]]:
    """The sentence, and the pairs without the best on which it rests. ``table`` has (better, worse) attentions."""
    top = summaries[0]
    others = [s.attention for s in summaries[1:]]
    if not others:
        return f"Only {top.attention} was measured for {where}: {measure.number(top.score)} {measure.noun}.", []
    if not shared:
        return (
            f"For {where}, no seed was finished with every attention, so the runs do not compare; "
            f"{top.attention} has {measure.most} in its own ({measure.number(top.score)}).",
            [],
        )
    tied = [top.attention, *(name for name in others if not table[top.attention, name].clear)]
    if len(tied) == 1:
        second = summaries[1]
        lead = table[top.attention, second.attention].difference
        return (
            f"Take {top.attention} for {where}: {measure.number(top.score)} {measure.noun}, "
            f"{measure.gap(lead)} {measure.better} than {second.attention} ({measure.number(second.score)}).",
            [],
        )
    fastest = max((s for s in summaries if s.attention in tied), key=lambda s: s.speed)
    if len(tied) == 2:
        said = f"For {where}, {_names(tied)} are too close to tell apart"
    else:  # each was held against the best only
        said = f"For {where}, {_names(tied[1:])} are too close to {top.attention} to tell apart"
    behind, between, further = [], [], []
    for name in others:
        if name in tied:
            continue
        # A tied attention that ranks below this one is not ahead of it; ``other`` is then the tied one.
        tests = [table.get((beside, name)) or table[name, beside] for beside in tied[1:]]
        ahead = [top.attention, *(pair.best for pair in tests if pair.other == name and pair.clear)]
        further += tests
        if len(ahead) == len(tied):
            behind.append(name)
        else:
            between.append(f"only {_names(ahead)} {'is' if len(ahead) == 1 else 'are'} clearly ahead of {name}")
    if behind:
        said += f"; {'they' if len(tied) == 2 else 'all of these'} are clearly ahead of {_names(behind)}"
    said = "; ".join([said, *between])
    return f"{said}. Of {_names(tied)}, {fastest.attention} trains fastest.", further


def verdict_of(outcome: Outcome) -> Verdict:
    """The plain answer of an outcome."""
    return judge(
        outcome.runs,
        context=outcome.settings.context,
        budget=outcome.settings.budget_in_words,
        train_bytes=outcome.text["train_bytes"],
        yardsticks=yardsticks_of(outcome),
        interrupted=outcome.interrupted,
        wanted=outcome.settings.attentions,
    )


def yardsticks_of(outcome: Outcome) -> dict[str, float]:
    """What simple coders need for the held-out text, in bits per byte."""
    return {"zlib": outcome.text["zlib_bits"], "byte frequencies": outcome.text["byte_frequencies_bits"]}


def pair_sentence(pair: Pair, measure: Measure = BITS) -> str:
    """Who is better than whom, by how much, and whether that is clear."""
    amount = f"{measure.gap(abs(pair.difference))} {measure.gap_noun} "
    amount += measure.worse if pair.difference < 0 else measure.better
    said = f"{pair.best} against {pair.other}: {amount}"
    if pair.yardstick is None:
        return f"{said}; {pair.kind} gives no yardstick for that."
    word = "larger" if pair.clear else "not larger"
    verdict = "clear" if pair.clear else "too small to tell"
    return f"{said}, {word} than {pair.kind} ({measure.gap(pair.yardstick)}): {verdict}."


def _warnings(
    runs: Sequence[RunResult],
    seeds: Sequence[int],
    summaries: Sequence[Summary],
    train_bytes: int,
    yardsticks: Mapping[str, float],
    interrupted: bool,
    missing: Sequence[str],
) -> list[str]:
    said = []
    if interrupted:
        left_out = f" Nothing is known about {_names(missing)}." if missing else ""
        said.append(f"Interrupted: this rests on the {len(runs)} finished run{'s' * (len(runs) != 1)} only.{left_out}")
    finished = summarise(runs)
    if seeds and any(s.runs > len(seeds) for s in finished):
        counts = ", ".join(f"{s.attention} {s.runs}" for s in finished)
        said.append(
            f"The attentions have different numbers of runs ({counts}); the answer rests on the "
            f"seed{'s' * (len(seeds) != 1)} that all of them have finished ({', '.join(map(str, seeds))})."
        )
    if any(s.runs < 2 for s in summaries) and len(summaries) > 1:
        said.append(
            "At least one attention has a single run, so the spread between seeds is not known; the "
            "yardstick covers the choice of held-out windows only. More seeds (--seeds 3) would tell."
        )
    best = summaries[0]
    beaten = {name: bits for name, bits in yardsticks.items() if best.bits > bits}
    seen = best.tokens / max(train_bytes, 1)
    if beaten:
        strongest = min(beaten, key=lambda name: beaten[name])
        said.append(
            f"All runs are far from trained: even the best needs more bits ({best.bits:.3f}) than {strongest} on the "
            f"same text ({beaten[strongest]:.3f}), after reading {seen:.2g} times the training text. The order may "
            "change with a larger budget."
        )
    return said


def _names(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]
