"""The tables of a comparison for the terminal, and numbers in words. Needs the extra ``cli`` (rich)."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from farfield.bench.compare import Outcome
from farfield.bench.cost import Cost
from farfield.bench.plots import short
from farfield.bench.verdict import Summary, ranked


def bits_in_words(summary: Summary) -> str:
    """Bits per byte, with the standard deviation over seeds where there are several."""
    return f"{summary.bits:.3f}" if summary.deviation is None else f"{summary.bits:.3f} ± {summary.deviation:.3f}"


def bytes_in_words(value: float | None) -> str:
    """12 MiB, 3.4 GiB, or a dash."""
    if value is None:
        return "–"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def seconds_in_words(value: float) -> str:
    """12 ms, 1.3 s."""
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.3g} ms"


SPREAD = "max − min"
"""Heading of the column that says nothing with one seed."""
COLUMNS = ("attention", "bits per byte", SPREAD, "steps", "bytes read", "tokens/s", "peak memory", "parameters")
"""Headings of the main table."""


def rows_of(summaries: Sequence[Summary]) -> list[list[str]]:
    """The cells of the main table by :data:`COLUMNS`, as ordered. The column max - min is empty with one seed."""
    return [
        [
            s.attention + (f" ({s.runs} seeds)" if s.runs > 1 else ""),
            bits_in_words(s),
            "–" if s.spread is None else f"{s.spread:.3f}",
            f"{s.steps:,.0f}",
            f"{s.tokens:,.0f}",
            f"{s.tokens_per_second:,.0f}",
            bytes_in_words(s.peak_bytes),
            f"{s.parameters:,}",
        ]
        for s in summaries
    ]


_LENGTHS = 7
"""Lengths that fit a terminal of 80 columns; the report has all."""


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def result_table(outcome: Outcome) -> Table:
    """The main table for a terminal of 80 columns."""
    summaries = ranked(outcome.runs)
    several = any(s.runs > 1 for s in summaries)
    table = _table()
    table.add_column("attention", no_wrap=True)
    for name in ("bits/byte", *(["max−min"] if several else []), "steps", "tokens/s", "memory", "params"):
        table.add_column(name, justify="right", no_wrap=True)
    for n, (s, cells) in enumerate(zip(summaries, rows_of(summaries), strict=True)):
        _, bits, spread, steps, _, speed, memory, parameters = cells
        row = (s.attention, bits, *([spread] if several else []), steps, speed, memory, parameters)
        table.add_row(*row, style="bold" if n == 0 and len(summaries) > 1 else None)
    return table


def position_table(outcome: Outcome) -> Table:
    """Held-out bits by position in the context, for the terminal."""
    summaries = ranked(outcome.runs)
    table = _table()
    table.add_column("attention", no_wrap=True)
    for low, high, _ in summaries[0].positions:
        table.add_column(f"{short(low)}–{short(high)}", justify="right", no_wrap=True)
    for s in summaries:
        table.add_row(s.attention, *(f"{bits:.2f}" for _, _, bits in s.positions))
    return table


def cost_table(cost: Cost, quantity: str = "time") -> Table:
    """Time or memory of forward and backward through one layer, attentions down, lengths across.

    Args:
        cost: the measurements.
        quantity: "time" or "memory".
    """
    lengths = sorted({p.length for p in cost.points})[-_LENGTHS:]
    table = _table()
    table.add_column("attention", no_wrap=True)
    for length in lengths:
        table.add_column(short(length), justify="right", no_wrap=True)
    for name in dict.fromkeys(p.attention for p in cost.points):
        here = {p.length: p for p in cost.of(name)}
        said = [
            "–"
            if n not in here
            else seconds_in_words(here[n].both)
            if quantity == "time"
            else bytes_in_words(here[n].memory)
            for n in lengths
        ]
        table.add_row(name, *said)
    return table
