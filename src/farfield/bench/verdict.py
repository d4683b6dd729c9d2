"""What the runs say: means, spreads, paired differences, and a plain answer.

Two yardsticks decide whether a difference counts:

- with several seeds, the spread of the runs: seeds are paired (the same seed sees the same text in the same order), and
  a difference is clear when its mean is larger than the larger of the two attentions' ranges (max - min over seeds);
- with one seed, the held-out windows: every attention is tested on the same windows, so their bits are paired too, and
  a difference is clear when its mean is larger than twice its standard error over windows. That says how sure the
  difference of these two *models* is; how much another seed would change it stays unknown, and the answer says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from farfield.bench.compare import Outcome, RunResult

CLEAR_ERRORS = 2.0
"""Standard errors from which a difference between two single runs counts."""


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
    """How much worse ``other`` is than ``best``, in bits per byte, and the yardstick it is held against."""

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
        pairs: the best against each other attention, closest first.
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


def compare_pair(best: Sequence[RunResult], other: Sequence[RunResult]) -> Pair:
    """Holds ``other`` against ``best`` on the seeds that both have finished; unpaired if they share none."""
    left = {run.seed: run for run in best}
    right = {run.seed: run for run in other}
    shared = sorted(left.keys() & right.keys())
    if shared:
        difference = statistics.fmean(right[s].bits - left[s].bits for s in shared)
    else:
        difference = statistics.fmean(r.bits for r in other) - statistics.fmean(r.bits for r in best)
    names = best[0].attention, other[0].attention
    if len(best) > 1 and len(other) > 1:
        yardstick = max(_range(best), _range(other))
        return Pair(*names, difference, yardstick, "the spread of the runs", difference > yardstick)
    windows = [b - a for s in shared for a, b in zip(left[s].windows, right[s].windows, strict=True)]
    if len(windows) < 2:
        return Pair(*names, difference, None, "none", False)
    error = statistics.stdev(windows) / math.sqrt(len(windows))
    yardstick = CLEAR_ERRORS * error
    return Pair(*names, difference, yardstick, "twice the standard error over windows", difference > yardstick)


def _range(runs: Sequence[RunResult]) -> float:
    return max(run.bits for run in runs) - min(run.bits for run in runs)


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
    summaries = sorted(summarise(runs), key=lambda s: s.bits)
    missing = [name for name in wanted if name not in {s.attention for s in summaries}]
    if not summaries:
        return Verdict(None, "No run was finished, so there is nothing to compare.")
    top = summaries[0]
    where = f"this text, context {context:,} and {budget}"
    members = {s.attention: [run for run in runs if run.attention == s.attention] for s in summaries}
    pairs = tuple(compare_pair(members[top.attention], members[s.attention]) for s in summaries[1:])
    details: list[str] = []
    if not pairs:
        headline = f"Only {top.attention} was measured for {where}: {top.bits:.3f} bits per byte."
    elif pairs[0].clear:
        second = summaries[1]
        headline = (
            f"Take {top.attention} for {where}: {top.bits:.3f} bits per byte, "
            f"{pairs[0].difference:.3f} fewer than {second.attention} ({second.bits:.3f})."
        )
    else:
        tied = [top.attention, *(p.other for p in pairs if not p.clear)]
        rest = [p.other for p in pairs if p.clear]
        fastest = max((s for s in summaries if s.attention in tied), key=lambda s: s.tokens_per_second)
        headline = (
            f"For {where}, {_names(tied)} are too close to tell apart"
            + (f"; they are clearly ahead of {_names(rest)}" if rest else "")
            + f". Of these, {fastest.attention} trains fastest."
        )
    details += [_pair_sentence(pair) for pair in pairs]
    return Verdict(
        top.attention,
        headline,
        tuple(details),
        tuple(_warnings(runs, summaries, pairs, context, train_bytes, yardsticks, interrupted, missing)),
        pairs,
    )


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
    return {"gzip": outcome.text["gzip_bits"], "byte frequencies": outcome.text["byte_frequencies_bits"]}


def _pair_sentence(pair: Pair) -> str:
    said = f"{pair.best} against {pair.other}: {pair.difference:.3f} bits per byte fewer"
    if pair.yardstick is None:
        return f"{said}; one held-out window gives no yardstick for that."
    word = "larger" if pair.clear else "not larger"
    verdict = "clear" if pair.clear else "too small to tell"
    return f"{said}, {word} than {pair.kind} ({pair.yardstick:.3f}): {verdict}."


def _warnings(
    runs: Sequence[RunResult],
    summaries: Sequence[Summary],
    pairs: Sequence[Pair],
    context: int,
    train_bytes: int,
    yardsticks: Mapping[str, float],
    interrupted: bool,
    missing: Sequence[str],
) -> list[str]:
    said = []
    if interrupted:
        left_out = f" Nothing is known about {_names(missing)}." if missing else ""
        said.append(f"Interrupted: this rests on the {len(runs)} finished run{'s' * (len(runs) != 1)} only.{left_out}")
    if len({s.runs for s in summaries}) > 1:
        counts = ", ".join(f"{s.attention} {s.runs}" for s in summaries)
        said.append(f"The attentions have different numbers of runs ({counts}).")
    if any(s.runs < 2 for s in summaries) and pairs:
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
