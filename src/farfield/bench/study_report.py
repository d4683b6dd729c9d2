"""What a study found: a table, a picture, and one JSON file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farfield.bench.pace import Pace
from farfield.bench.study import STUDY_FORMAT, Study, StudyOutcome, StudyRun
from farfield.training.files import write_atomically, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Row", "markdown", "pace_table", "rows_of", "study_figure", "write"]


@dataclass(frozen=True)
class Row:
    """The runs of one cell together.

    Attributes:
        label, context, batch: the cell.
        seeds: number of runs.
        bits, low, high: mean and range over seeds.
        last: mean over the last octave of positions.
        steps: mean.
        step_ms: milliseconds of a step while training, the median over runs.
        pace_ms: milliseconds of a step as measured in turn with the other variants; None where they were not.
        tokens_per_second: of training.
        peak_bytes: the largest; None where unmeasured.
        parameters: of the model.
    """

    label: str
    context: int
    batch: int
    seeds: int
    bits: float
    low: float
    high: float
    last: float
    steps: float
    step_ms: float
    tokens_per_second: float
    peak_bytes: int | None
    parameters: int
    pace_ms: float | None = None

    @property
    def step(self) -> float:
        """Milliseconds of a step: as measured in turn, where that was done."""
        return self.step_ms if self.pace_ms is None else self.pace_ms

    @property
    def rate(self) -> float:
        """Tokens per second of training, at that pace where it was measured."""
        return self.tokens_per_second if self.pace_ms is None else 1000 * self.batch * self.context / self.pace_ms


def rows_of(runs: Sequence[StudyRun]) -> list[Row]:
    """Cells by context and batch, the best variant first."""
    cells: dict[tuple[str, int, int], list[StudyRun]] = {}
    for run in runs:
        cells.setdefault((run.key["label"], run.key["context"], run.key["batch"]), []).append(run)
    rows = []
    for (label, context, batch), members in cells.items():
        bits = [run.bits for run in members]
        peaks = [run.peak_bytes for run in members if run.peak_bytes is not None]
        seconds = sum(run.seconds for run in members)
        rows.append(
            Row(
                label=label,
                context=context,
                batch=batch,
                seeds=len(members),
                bits=statistics.fmean(bits),
                low=min(bits),
                high=max(bits),
                last=statistics.fmean(run.positions[-1][2] for run in members),
                steps=statistics.fmean(run.steps for run in members),
                step_ms=statistics.median(1000 * run.seconds / run.steps for run in members),
                tokens_per_second=sum(run.tokens for run in members) / seconds if seconds > 0 else 0.0,
                peak_bytes=max(peaks) if peaks else None,
                parameters=members[0].parameters,
                pace_ms=None if members[0].pace is None else 1000 * members[0].pace,
            )
        )
    return sorted(rows, key=lambda row: (row.context, row.batch, row.bits))


def markdown(rows: Sequence[Row], unit: str) -> str:
    """The table. The last octave of positions is the second half of a context that is a power of two.

    Where the pace was measured, milliseconds per step are those, and tokens per second follow from them.
    """
    heads = ["context", "batch", "variant", "seeds", unit, "range", "last octave"]
    heads += ["steps", "ms per step", "tokens/s", "peak MiB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        spread = f"{row.low:.4f} to {row.high:.4f}" if row.seeds > 1 else ""
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        lines.append(
            f"| {row.context:,} | {row.batch} | {row.label} | {row.seeds} | {row.bits:.4f} | {spread} | {row.last:.4f} "
            f"| {row.steps:,.0f} | {row.step:,.0f} | {row.rate:,.0f} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def pace_table(plan: Study, paces: Mapping[str, Pace]) -> str:
    """Milliseconds per step as measured in turn, and how many times the first variant's they are."""
    lines = ["| context | batch | variant | ms per step | least | most | times the first |", "|---" * 7 + "|"]
    first = {(cell.context, cell.batch): paces[cell.name].median for cell in reversed(plan.cells)}
    for cell in plan.cells:
        pace = paces[cell.name]
        low, middle, high = (1000 * value for value in (min(pace.seconds), pace.median, max(pace.seconds)))
        lines.append(
            f"| {cell.context:,} | {cell.batch} | {cell.variant.label} | {middle:,.0f} | {low:,.0f} | {high:,.0f} "
            f"| {pace.median / first[cell.context, cell.batch]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def study_figure(rows: Sequence[Row], unit: str) -> Figure:
    """Quality and speed by context, or by batch; with one of each, a line for every variant. Needs matplotlib."""
    from matplotlib import figure as figures
    from matplotlib import rc_context

    from farfield.bench.plots import amount_axis, legend, length_axis, looks, tidy
    from farfield.explain.show import STYLE

    labels = list(dict.fromkeys(row.label for row in rows))
    style = looks(labels)
    contexts, batches = ({getattr(row, name) for row in rows} for name in ("context", "batch"))
    with rc_context(STYLE):
        figure = figures.Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        if len(contexts) == len(batches) == 1:
            best = sorted(rows, key=lambda row: row.bits)
            places = range(len(best))
            colours = [style[row.label][0] for row in best]
            # Points, not bars: this axis does not begin at 0.
            for place, row in enumerate(best):
                error = [[row.bits - row.low], [row.high - row.bits]]
                left.errorbar(row.bits, place, xerr=error, color=style[row.label][0], marker=style[row.label][1])
            right.barh(places, [row.step for row in best], color=colours)
            low, high = min(row.low for row in best), max(row.high for row in best)
            left.set_xlim(max(0.0, low - 0.3 * max(high - low, 0.05)), high + 0.1 * max(high - low, 0.05))
            for axes, name in ((left, f"{unit} (lines: range over seeds)"), (right, "ms per step")):
                axes.set_yticks(places, [row.label for row in best])
                axes.invert_yaxis()
                axes.set_xlabel(name)
                tidy(axes)
            return figure
        by = "context" if len(contexts) > 1 else "batch"
        fixed = "batch" if by == "context" else "context"
        for label in labels:
            colour, marker = style[label]
            for value in sorted({getattr(row, fixed) for row in rows}):
                line = sorted(
                    (row for row in rows if row.label == label and getattr(row, fixed) == value),
                    key=lambda row: getattr(row, by),
                )
                x = [getattr(row, by) for row in line]
                look: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": "white", "linewidth": 1.8}
                errors = [[row.bits - row.low for row in line], [row.high - row.bits for row in line]]
                left.errorbar(x, [row.bits for row in line], yerr=errors, **look)
                right.plot(x, [row.rate for row in line], **look)
        left.set_ylabel(f"{unit} (lines: range over seeds)")
        right.set_ylabel("tokens per second of training")
        amount_axis(right)
        for axes in (left, right):
            length_axis(axes, [getattr(row, by) for row in rows])
            axes.set_xlabel("context in bytes" if by == "context" else "sequences per step")
            tidy(axes)
        legend(figure, style, labels)
        return figure


def write(outcome: StudyOutcome, folder: Path, command: str) -> list[Path]:
    """Writes ``study.json``, ``table.md`` and, where matplotlib is installed and a run finished, ``study.png``.

    Raises:
        OSError: when that fails.
    """
    rows = rows_of(outcome.runs)
    write_json(
        folder / "study.json",
        {
            "format": STUDY_FORMAT,
            "command": command,
            "study": outcome.study.as_json(),
            "text": outcome.text,
            "machine": outcome.machine,
            "rows": [asdict(row) for row in rows],
            "failures": [asdict(failure) for failure in outcome.failures],
            "notes": outcome.notes,
            "interrupted": outcome.interrupted,
        },
    )
    table = markdown(rows, outcome.study.unit)
    write_atomically(folder / "table.md", f"    {command}\n\n{table}".encode())
    written = [folder / "study.json", folder / "table.md"]
    if rows:
        try:
            from farfield.bench.plots import png
        except ModuleNotFoundError:
            return written
        write_atomically(folder / "study.png", png(study_figure(rows, outcome.study.unit)))
        written.append(folder / "study.png")
    return written
