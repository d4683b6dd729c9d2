"""The figures of the comparison's report. Needs the extra ``cli`` (matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from farfield.bench.compare import RunResult
from farfield.bench.cost import Cost
from farfield.bench.verdict import Summary
from farfield.explain.show import INK, MUTED, STYLE

# Okabe and Ito's colours, told apart under any colour vision; markers differ too.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31")
# Then Tol's muted ones: with as many lines as that, markers have to help.
_MORE = ("#332288", "#882255", "#999933", "#44aa99", "#aa4499", "#ddcc77", "#661100")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_FIXED = {"dense": "#4b5563", "window": "#e69f00", "fma": "#0072b2", "sdpa": "#111827"}


def looks(attentions: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) per attention: dense, window and fma always look the same, others take what is free."""
    free = [colour for colour in (*_COLOURS, *_MORE) if colour not in _FIXED.values()]
    result = {}
    for i, name in enumerate(attentions):
        colour = _FIXED.get(name) or (free.pop(0) if free else _COLOURS[i % len(_COLOURS)])
        result[name] = (colour, _MARKERS[i % len(_MARKERS)])
    return result


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element for a page."""
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def tidy(axes: Axes) -> None:
    """Two spines and a quiet grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def length_axis(axes: Axes, values: Sequence[int]) -> None:
    """A logarithmic axis with ticks at the values themselves, thinned to at most nine, written 512, 1k, 64k."""
    axes.set_xscale("log", base=2)
    shown = sorted(set(values))
    shown = shown[:: -(-len(shown) // 9)]
    axes.xaxis.set_major_locator(FixedLocator([float(v) for v in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(int(v))))


def amount_axis(axes: Axes) -> None:
    """A logarithmic axis of amounts, ticks at 1, 2, 5 written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if v < 1000 else f"{v:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())


def short(value: int) -> str:
    """512, 1k, 64k, 1M for powers of two."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return f"{value:,}"


Looks = Mapping[str, tuple[str, str]]
"""(colour, marker) per attention, from :func:`looks`."""


def loss_figure(runs: Sequence[RunResult], yardsticks: Mapping[str, float], style: Looks) -> Figure:
    """Bits per byte while training, by time and by step; the ring at the end is the held-out text."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.7), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        low, high = _loss_limits(runs)
        for axes, column, label in ((panels[0], 1, "training time in seconds"), (panels[1], 0, "step")):
            for run in runs:
                colour, marker = style[run.attention]
                x = [point[column] for point in run.curve]
                y = [point[2] for point in run.curve]
                axes.plot(x, smooth(y), color=colour, linewidth=1.8)
                axes.plot(x[-1], run.bits, marker=marker, markersize=7, color=colour, markerfacecolor="white",
                          markeredgewidth=1.8, clip_on=False, zorder=5)  # fmt: skip
            for name, bits in yardsticks.items():
                if low < bits < high:
                    axes.axhline(bits, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)))
                    # On the left, where the lines are still far above.
                    axes.text(0.012, bits, f"{name} on the held-out text", transform=axes.get_yaxis_transform(),
                              ha="left", va="bottom", fontsize=7.5, color=MUTED)  # fmt: skip
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            axes.set_ylim(low, high)
            tidy(axes)
        panels[0].set_ylabel("bits per byte")
        legend(figure, style, [run.attention for run in runs])
        return figure


def _loss_limits(runs: Sequence[RunResult]) -> tuple[float, float]:
    """From below the best to what the slowest run had after a tenth of its budget: the first steps fall from 8."""
    curves = [smooth([point[2] for point in run.curve]) for run in runs]
    late = [value for curve in curves for value in curve[len(curve) // 10 :]] + [run.bits for run in runs]
    room = max(max(late) - min(late), 0.2)
    return max(0.0, min(late) - 0.08 * room), max(late) + 0.08 * room


def smooth(values: Sequence[float]) -> list[float]:
    """Means over the last eighth of the curve up to each point: windows of text differ far more than steps do."""
    total = np.cumsum([0.0, *values])
    index = np.arange(1, len(values) + 1)
    start = np.maximum(0, index - np.maximum(1, np.minimum(index // 3, len(values) // 8)))
    return [float(v) for v in (total[index] - total[start]) / (index - start)]


def legend(figure: Figure, style: Looks, shown: Sequence[str], extra: Sequence[Any] = ()) -> None:
    """The names that are shown, above the figure, in as many columns as its width has room for."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=colour, marker=marker, markerfacecolor="white", markeredgewidth=1.8, linewidth=1.8, label=name
        )
        for name, (colour, marker) in style.items()
        if name in shown
    ]
    longest = max(len(str(handle.get_label())) for handle in [*handles, *extra])
    columns = max(1, min(8, int(figure.get_figwidth() / (0.75 + 0.08 * longest))))
    figure.legend(handles=[*handles, *extra], loc="outside upper left", ncols=columns, handlelength=2.2)


def position_figure(summaries: Sequence[Summary], style: Looks) -> Figure:
    """Held-out bits by position in the context, and the same as the difference to the first, the best one."""
    best = summaries[0]
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        edges = [best.positions[0][0], *(high for _, high, _ in best.positions)]
        names = [f"{short(a)}–{short(b)}" for a, b, _ in best.positions]
        places = np.arange(len(names))
        reference = np.array([bits for _, _, bits in best.positions])
        for summary in summaries:
            colour, marker = style[summary.attention]
            bits = np.array([value for _, _, value in summary.positions])
            look = {
                "color": colour,
                "marker": marker,
                "markerfacecolor": "white",
                "markeredgewidth": 1.6,
                "linewidth": 1.8,
            }
            left.plot(places, bits, **look)
            right.plot(places, bits - reference, **look)
        left.set_ylabel("bits per byte")
        right.set_ylabel(f"bits per byte above {best.attention}")
        right.axhline(0, color=INK, linewidth=0.8, zorder=1)
        for axes in (left, right):
            axes.set_xlabel("position in the context (bytes already seen)")
            axes.set_xticks(
                places, names, rotation=30 if len(edges) > 6 else 0, ha="right" if len(edges) > 6 else "center"
            )
            tidy(axes)
        legend(figure, style, [s.attention for s in summaries])
        return figure


def cost_figure(cost: Cost, style: Looks, lengths_of: str = "") -> Figure:
    """Time and memory by length, both axes logarithmic: of one layer, or of what ``lengths_of`` are lengths of."""
    names = list(dict.fromkeys(point.attention for point in cost.points))
    measured = any(point.memory is not None for point in cost.points)
    with rc_context(STYLE):
        from matplotlib.lines import Line2D

        figure = Figure(figsize=(9.6 if measured else 5.6, 3.9), layout="constrained")
        panels = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
        for name in names:
            colour, marker = style[name]
            points = cost.of(name)
            lengths = [p.length for p in points]
            look = {
                "color": colour,
                "marker": marker,
                "markerfacecolor": "white",
                "markeredgewidth": 1.5,
                "markersize": 5,
            }
            panels[0].plot(lengths, [p.both for p in points], linewidth=1.8, **look)
            panels[0].plot(lengths, [p.forward for p in points], color=colour, linewidth=1.1, linestyle=(0, (4, 2)))
            if measured:
                memory = [(p.length, p.memory / 2**20) for p in points if p.memory]
                panels[1].plot([a for a, _ in memory], [b for _, b in memory], linewidth=1.8, **look)
        panels[0].set_ylabel("seconds" if lengths_of else "seconds for one sequence")
        if measured:
            panels[1].set_ylabel("peak memory in MiB")
        for axes in panels:
            amount_axis(axes)
            length_axis(axes, [p.length for p in cost.points])
            axes.set_xlabel(lengths_of or "length in tokens")
            tidy(axes)
        kinds = [
            Line2D([], [], color=INK, linewidth=1.8, label="forward and backward"),
            Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label="forward"),
        ]
        legend(figure, style, names, kinds)
        return figure
