"""The tables of a comparison on images or fields for the terminal and the page. Needs the extra ``cli`` (rich)."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from farfield.bench.sweep_report import flops_in_words
from farfield.bench.tables import bytes_in_words
from farfield.bench.vision import VisionOutcome
from farfield.bench.vision_verdict import VisionSummary, ranked_vision

__all__ = ["class_rows", "headings", "resolution_rows", "rows_of_vision", "vision_table", "yardstick_rows"]


def headings(outcome: VisionOutcome, narrow: bool = False) -> list[str]:
    """Of the main table; with ``narrow`` those that fit a terminal of 80 columns."""
    several = any(s.runs > 1 for s in ranked_vision(outcome))
    spread = ["max − min"] if several else []
    last = ["memory", "params", "FLOP"] if narrow else ["peak memory", "parameters", "FLOP per example"]
    return ["attention", outcome.metric.name, *spread, "steps", "images/s", *last]


def rows_of_vision(outcome: VisionOutcome, summaries: Sequence[VisionSummary]) -> list[list[str]]:
    """The cells of the main table by :func:`headings`."""
    say = outcome.metric.say
    several = any(s.runs > 1 for s in summaries)
    rows = []
    for s in summaries:
        score = say(s.score) if s.deviation is None else f"{say(s.score)} ± {say(s.deviation)}"
        spread = ["–" if s.spread is None else say(s.spread)] if several else []
        rows.append(
            [
                s.attention + (f" ({s.runs} seeds)" if s.runs > 1 else ""),
                score,
                *spread,
                f"{s.steps:,.0f}",
                f"{s.images_per_second:,.1f}",
                bytes_in_words(s.peak_bytes),
                f"{s.parameters:,}",
                flops_in_words(s.flops),
            ]
        )
    return rows


def yardstick_rows(outcome: VisionOutcome) -> list[list[str]]:
    """The cells of answers that need no training by :func:`headings`, best first."""
    metric, rest = outcome.metric, len(headings(outcome)) - 2
    ordered = sorted(outcome.data.yardsticks.items(), key=lambda item: item[1], reverse=metric.higher)
    return [[name, metric.say(value), *["–"] * rest] for name, value in ordered]


def resolution_rows(outcome: VisionOutcome, summaries: Sequence[VisionSummary]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of scores by resolution."""
    names = list(summaries[0].tests) if summaries else []
    say = outcome.metric.say
    return ["attention", *names], [[s.attention, *(say(s.tests[name]) for name in names)] for s in summaries]


def class_rows(outcome: VisionOutcome, summaries: Sequence[VisionSummary]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of scores by class."""
    rows = [[s.attention, *("–" if value is None else f"{100 * value:.1f}" for value in s.classes)] for s in summaries]
    return ["attention", *outcome.data.classes], rows


def vision_table(heads: Sequence[str], rows: Sequence[Sequence[str]], untrained: Sequence[Sequence[str]] = ()) -> Table:
    """Rows for the terminal, the first of several in bold; below a line those that need no training."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for n, name in enumerate(heads):
        table.add_column(name, justify="right" if n else "left", no_wrap=n > 0 or not untrained)
    for n, row in enumerate(rows):
        table.add_row(*row, style="bold" if n == 0 and len(rows) > 1 else None, end_section=n == len(rows) - 1)
    for row in untrained:
        table.add_row(*row)
    return table
