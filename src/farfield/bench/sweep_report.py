"""What ``farfield bench`` leaves behind: ``bench.html``, ``results.json`` and one PNG per kind of case.

Needs the extra ``cli`` (matplotlib, rich).

The JSON file, format ``farfield-bench/1``::

    format     "farfield-bench/1"
    status     "finished" or "interrupted"
    command    the command line that reproduces it
    key        what decides the numbers: labels, repeats, limit, machine; cases of equal keys may be put together
    machine    processor, cores, threads, device, system, python, torch, farfield
    memory_rate  bytes per second of a copy, or null
    rows       one per attention, case and mode: label, level ("core": on ready q, k, v; "layer": with its projections),
               engine, case {grid, dtype, causal, batch, heads, head_dim, device}, mode (forward, backward: forward and
               backward together, decode), seconds (median), low, high (quartiles), repeats, memory (bytes), flops,
               bytes, floor (s), ceiling (FLOPs per second of the matrix product in this case), share (of the ceiling),
               over_floor (seconds / floor), error, error_from, reason (why there are no numbers, or null)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.markup import escape
from rich.table import Table

from farfield.bench import html
from farfield.bench.case import Case
from farfield.bench.plots import Looks, amount_axis, legend, length_axis, looks, png, svg, tidy
from farfield.bench.sweep import EXACT_LENGTH, FORMAT, MODE_NAMES, Prediction, Row, Sweep
from farfield.bench.tables import bytes_in_words, seconds_in_words
from farfield.explain.show import STYLE
from farfield.training.files import write_atomically, write_json

__all__ = [
    "PAGE_FILE",
    "RESULTS_FILE",
    "groups",
    "left_out",
    "plan_table",
    "read_rows",
    "result_table",
    "save",
    "title",
    "write",
]

RESULTS_FILE = "results.json"
PAGE_FILE = "bench.html"
_WIDE = 96
"""Columns of a terminal from which FLOP/s are shown."""
_YARDSTICKS = ("sdpa", "dense")
"""Against whom speed is told, where one of them was measured."""

Group = tuple[Case, str, list[Row]]


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows by case and mode, in order."""
    found: dict[tuple[Case, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.case, row.mode), []).append(row)
    return [(case, mode, several) for (case, mode), several in found.items()]


def yardstick(rows: Sequence[Row]) -> Row | None:
    """Torch's own exact attention, or None where it was not measured."""
    by_label = {row.label: row for row in rows if row.seconds is not None}
    return next((by_label[name] for name in _YARDSTICKS if name in by_label), None)


def flops_in_words(value: float | None) -> str:
    """12.3 GFLOP, 4.1 TFLOP, or a dash."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def time_in_words(value: float | None) -> str:
    """840 µs, 12 ms, 1.3 s, or a dash."""
    if value is None:
        return "–"
    return f"{value * 1e6:.3g} µs" if value < 1e-3 else seconds_in_words(value)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _headings(against: Row | None) -> list[str]:
    faster = [] if against is None else [f"× {against.label}"]
    return ["attention", "time", "±", *faster, "memory", "FLOP/s", "of peak", "× floor", "error"]


def _cells(row: Row, against: Row | None) -> list[str]:
    rate = None if row.flops is None or row.seconds is None else row.flops / row.seconds
    faster = [] if against is None else [_number(_ratio(against, row), ".2f")]
    return [
        row.label + (" (layer)" if row.level == "layer" else ""),
        time_in_words(row.seconds),
        _number(row.spread, ".0%"),
        *faster,
        bytes_in_words(row.memory),
        flops_in_words(rate),
        _number(row.share, ".0%"),
        _number(row.over_floor, ".1f"),
        _number(row.error, ".2g"),
    ]


def _ratio(against: Row, row: Row) -> float | None:
    if against.seconds is None or row.seconds is None:
        return None
    return against.seconds / row.seconds


def title(case: Case, mode: str, rows: Sequence[Row]) -> str:
    """What a table is of, and the ceiling that was measured beside it."""
    ceiling = next((row.ceiling for row in rows if row.ceiling is not None), None)
    peak = "" if ceiling is None else f" (peak: {flops_in_words(ceiling)}FLOP/s in a matrix product)"
    return f"{case.name}, {MODE_NAMES[mode]}{peak}"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def result_table(rows: Sequence[Row], width: int) -> Table:
    """The measured rows of one case for a terminal of that width; a narrow one goes without FLOP/s."""
    against = yardstick(rows)
    headings = _headings(against)
    shown = [n for n, heading in enumerate(headings) if width >= _WIDE or heading != "FLOP/s"]
    table = _table()
    for n in shown:
        table.add_column(headings[n], justify="right" if n else "left", no_wrap=n > 0, overflow="fold")
    for row in rows:
        if row.reason is None:
            cells = _cells(row, against)
            table.add_row(*(escape(cells[n]) for n in shown))
    return table


def left_out(rows: Sequence[Row] | Sequence[Prediction]) -> dict[str, list[str]]:
    """Reasons, each with the labels that it keeps out."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.reason is not None:
            found.setdefault(row.reason, []).append(row.label)
    return found


def plan_table(predictions: Sequence[Prediction]) -> Table:
    """What the cost model says of one case."""
    table = _table()
    for n, heading in enumerate(("attention", "FLOP", "bytes", "floor", "bound by")):
        table.add_column(heading, justify="right" if n else "left", no_wrap=n > 0, overflow="fold")
    bounds = {"matrix": "matrix products", "memory": "memory", None: "–"}
    for p in predictions:
        if p.flops is None and p.reason is None:
            table.add_row(escape(p.label), "–", "–", "–", "not counted")
        elif p.flops is not None:
            table.add_row(
                escape(p.label), flops_in_words(p.flops), bytes_in_words(p.bytes), time_in_words(p.floor),
                bounds[p.bound],
            )  # fmt: skip
    return table


def to_json(result: Sweep, key: Mapping[str, Any], machine: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The contents of ``results.json``; the schema stands at the top of this module."""
    return {
        "format": FORMAT,
        "status": "interrupted" if result.interrupted else "finished",
        "command": command,
        "key": dict(key),
        "machine": dict(machine),
        "memory_rate": result.memory_rate,
        "rows": [
            {**dataclasses.asdict(row), "share": row.share, "over_floor": row.over_floor} for row in result.rows
        ],
    }  # fmt: skip


def save(result: Sweep, key: Mapping[str, Any], machine: Mapping[str, Any], command: str, folder: Path) -> Path:
    """Writes ``results.json``, whole or not at all."""
    path = folder / RESULTS_FILE
    write_json(path, to_json(result, key, machine, command))
    return path


def read_rows(folder: Path, key: Mapping[str, Any]) -> list[Row]:
    """The rows of an earlier run with the same key; none when the folder holds no results.

    Raises:
        ValueError: when the results there are of another kind or another key, with what differs.
    """
    import json

    path = folder / RESULTS_FILE
    if not path.exists():
        return []
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError("another format")
        rows = [Row.from_json(row) for row in values["rows"]]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not from farfield bench ({error}); give another --out") from error
    there, now = values["key"], json.loads(json.dumps(key))
    different = [f"{name} {there.get(name)} there, {now.get(name)} now" for name in now if there.get(name) != now[name]]
    if different:
        raise ValueError(f"cannot resume {folder}: it has other settings ({'; '.join(different)}); give another --out")
    return rows


def write(result: Sweep, key: Mapping[str, Any], machine: Mapping[str, Any], command: str, folder: Path) -> Path:
    """Writes everything, each file whole or not at all, the numbers first.

    Returns:
        The path of the page.

    Raises:
        OSError: when a file cannot be written.
    """
    save(result, key, machine, command, folder)
    for name, figure in figures(result.rows):
        write_atomically(folder / f"{name}.png", png(figure))
    page = folder / PAGE_FILE
    write_atomically(page, to_html(result, machine, command).encode("utf-8", "surrogateescape"))
    return page


def figures(rows: Sequence[Row]) -> list[tuple[str, Figure]]:
    """A figure per dimensions and dtype, with its name: time, memory and share of the peak by length and mode."""
    style = looks(list(dict.fromkeys(row.label for row in rows)))
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row.seconds is not None:
            kinds.setdefault(f"bench-{row.case.dims}d-{row.case.dtype}", []).append(row)
    return [(name, kind_figure(several, style)) for name, several in kinds.items()]


def kind_figure(rows: Sequence[Row], style: Looks) -> Figure:
    """Time, memory and share of the peak by length, for every mode."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    labels = list(dict.fromkeys(row.label for row in rows))
    amounts = [
        ("seconds", lambda row: row.seconds),
        ("peak memory in MiB", lambda row: row.memory / 2**20 if row.memory else None),
        ("share of a matrix product", lambda row: row.share),
    ]
    amounts = [(name, value) for name, value in amounts if any(value(row) is not None for row in rows)]
    across = len(modes) > 1  # a single mode has its amounts side by side, to fill the width
    size = (4.8 * len(modes), 0.5 + 3.1 * len(amounts)) if across else (max(5.6, 4.2 * len(amounts)), 3.9)
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        shape = (len(amounts), len(modes)) if across else (1, len(amounts))
        panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey="row" if across else False)
        if not across:
            panels = panels.T
        for line, (name, value) in zip(panels, amounts, strict=True):
            for axes, mode in zip(line, modes, strict=True):
                for label in labels:
                    colour, marker = style[label]
                    own = [r for r in rows if r.label == label and r.mode == mode and value(r) is not None]
                    own.sort(key=lambda row: row.case.tokens)
                    axes.plot([r.case.tokens for r in own], [value(r) for r in own], color=colour, marker=marker,
                              markerfacecolor="white", markeredgewidth=1.5, markersize=5, linewidth=1.8)  # fmt: skip
                if name.startswith("share"):
                    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
                else:
                    amount_axis(axes)
                length_axis(axes, [row.case.tokens for row in rows])
                tidy(axes)
            if name.startswith("share"):  # when all is drawn: a limit that is set is no longer moved by what follows
                for axes in line:
                    axes.set_ylim(bottom=0)
            line[0].set_ylabel(name)
        for axes, mode in zip(panels[0], modes, strict=True):
            axes.set_title(MODE_NAMES[mode], fontsize=10, loc="left")
        for axes in panels[-1] if across else panels[:, 0]:
            axes.set_xlabel("length in tokens")
        legend(figure, style, labels)
        return figure


CONVENTIONS = (
    "Time is the median of calls timed in turn with all others of the table; ± is half the distance of the quartiles. "
    "Memory is how far it rises in one call above inputs and weights. FLOP/s are useful ones: 4·D per pair of a query "
    "and a token (or summary) that the rule wants, 14·D forward and backward, whatever a kernel touches. Of peak: over "
    "a square matrix product in the same dtype, timed in the same turns. × floor: over the least time that FLOPs and "
    "bytes allow on this machine. Error: relative RMS distance to exact attention (float64) on the same random queries "
    f"and keys, up to {EXACT_LENGTH:,} tokens; how far an approximation is from softmax attention there, not a fault. "
    "Layer: it has projections of its own, which are timed with it."
)
"""How to read the columns."""


_STYLE = """
main { max-width: 1320px }
table { font-size: 14px }
th, td { padding: 7px 8px }
td:last-child, th:last-child { white-space: normal; text-align: left; min-width: 180px; font-size: 13px }
"""
"""Wider tables than other pages, whose last column is text."""


def to_html(result: Sweep, machine: Mapping[str, Any], command: str) -> str:
    """The page."""
    style = looks(list(dict.fromkeys(row.label for row in result.rows)))
    parts = ["<h1>farfield bench</h1>"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    sub = f"{machine['processor']}, {threads}, {machine['device']}, torch {machine['torch']}"
    parts.append(f'<p class="sub">{html.text(sub)}</p>')
    if result.interrupted:
        parts.append('<div class="warn">Interrupted: only the finished cases are here.</div>')
    for name, figure in figures(result.rows):
        _, dims, dtype = name.split("-")
        parts.append(f"<h2>{html.text(f'{dims[0]}-D, {dtype}')}</h2>")
        parts.append(html.figure(svg(figure), "By length; what ends early is explained below its table."))
    for case, mode, rows in groups(result.rows):
        parts.append(f"<h2>{html.text(title(case, mode, rows))}</h2>")
        parts += _group_html(rows, style)
    parts += [
        "<h2>How to read this</h2>",
        f"<p>{html.text(CONVENTIONS)}</p>",
        "<h2>Machine</h2>",
        html.definitions(list(machine.items())),
        "<h2>Do it again</h2>",
        f"<pre>{html.text(command)}</pre>",
        '<p class="note">The numbers of this page are in results.json beside it.</p>',
    ]
    return html.document("farfield bench", parts, _STYLE)


def _group_html(rows: Sequence[Row], style: Looks) -> list[str]:
    against = yardstick(rows)
    headings = _headings(against)
    headings = [*headings[:1], "engine", *headings[1:-1], "FLOP", "floor", "error", "error from"]
    measured = [row for row in rows if row.reason is None]
    cells = []
    for row in measured:
        first, *middle, error = _cells(row, against)
        more = [flops_in_words(row.flops), time_in_words(row.floor)]
        cells.append([first, row.engine or "–", *middle, *more, error, row.error_from])
    parts = []
    if cells:
        parts.append(html.table(headings, cells, [style[row.label][0] for row in measured], False))
    missing = left_out(rows)
    if missing:
        said = [f"{', '.join(who)}: {why}" for why, who in missing.items()]
        listed = "".join(f"<li>{html.text(line)}</li>" for line in said)
        parts.append(f'<ul class="note">{listed}</ul>')
    return parts
