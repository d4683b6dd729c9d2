"""The pictures of a comparison on images or fields: predictions beside the truth, errors, and where an answer looks.

Needs the extra ``cli`` (matplotlib).
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from farfield import recipes
from farfield.bench.plots import Looks, legend, smooth, tidy
from farfield.bench.samples import Samples
from farfield.bench.vision import VisionOutcome, VisionRun
from farfield.data.examples import size_in_words
from farfield.explain.pattern import MOST_TOKENS, Pattern, pattern
from farfield.explain.show import STYLE, draw_grid, legend_entries

__all__ = ["looks_figure", "loss_by_time_figure", "patterns_figure", "patterns_of", "predictions_figure"]

Image = npt.NDArray[Any]

_RIGHT, _WRONG = "#009e73", "#d55e00"
_SIDE = 1.75
"""Inches of one small picture."""
_VOID = (0.92, 0.93, 0.95)
_REACH_DECADES = -3


def predictions_figure(outcome: VisionOutcome, samples: Mapping[str, Samples]) -> Figure:
    """The input, the truth and what every attention made of it, beside it where it is wrong, a row per example."""
    draw = {"classify": _classes, "segment": _pixels, "operator": _fields}[outcome.data.task]
    with rc_context(STYLE):
        return draw(outcome, samples)


def _panels(rows: int, columns: int, shape: tuple[int, ...], extra: float = 0.5) -> tuple[Figure, Any]:
    height, width = shape[-2:]
    # All pictures alike, wide ones flatter; the gaps hold the titles.
    tall = min(max(_SIDE * height / width, 0.7), 2 * _SIDE)
    size = (max(_SIDE * columns + 0.4, 4.5), (tall + 0.26) * rows + extra)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.reshape(-1):
        one.set_xticks([])
        one.set_yticks([])
        one.title.set_fontsize(8)
    return figure, axes


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=8, loc="left")


def _rgb(outcome: VisionOutcome, x: Image) -> Image:
    return np.asarray(np.clip(x.transpose(1, 2, 0), 0, 1))


def _classes(outcome: VisionOutcome, samples: Mapping[str, Samples]) -> Figure:
    first = next(iter(samples.values()))
    names = outcome.data.classes
    figure, axes = _panels(1, len(first.x), first.x.shape, 0.35 + 0.16 * (len(samples) + 1))
    for column, one in enumerate(axes[0]):
        one.imshow(_rgb(outcome, first.x[column]), interpolation="nearest")
        one.set_anchor("N")  # what the models say has the room below
        _title(one, textwrap.shorten(names[first.y[column]], 22))
        for line, (attention, found) in enumerate(samples.items()):
            said = int(found.predicted[column])
            text = f"{attention}: {textwrap.shorten(names[said], 14)} {100 * found.confidence[column]:.0f} %"
            colour = _RIGHT if said == first.y[column] else _WRONG
            one.text(0, -0.03 - 0.12 * line, text, transform=one.transAxes, fontsize=6.8, va="top", color=colour)
    return figure


def class_colours(count: int) -> Image:
    """[count, 3] colours of classes."""
    shades = colormaps["tab20"](np.arange(count) % 20)[:, :3]
    return np.asarray(shades)


def _pixels(outcome: VisionOutcome, samples: Mapping[str, Samples]) -> Figure:
    first = next(iter(samples.values()))
    data = outcome.data
    colours = np.concatenate((class_colours(data.outputs), [_VOID]))

    def painted(labels: Image) -> Image:
        return np.asarray(colours[np.where((labels < 0) | (labels >= data.outputs), data.outputs, labels)])

    figure, axes = _panels(len(first.x), 2 + 2 * len(samples), first.x.shape, 0.9)
    for row, line in enumerate(axes):
        truth = first.y[row]
        known = truth != data.ignore
        line[0].imshow(_rgb(outcome, first.x[row]))
        line[1].imshow(painted(truth), interpolation="nearest")
        if row == 0:
            _title(line[0], "image")
            _title(line[1], "truth")
        for number, (attention, found) in enumerate(samples.items()):
            here = line[2 + 2 * number : 4 + 2 * number]
            here[0].imshow(painted(found.predicted[row]), interpolation="nearest")
            wrong = np.where((found.predicted[row] != truth)[..., None], (0.84, 0.37, 0.0), (0.0, 0.62, 0.45))
            here[1].imshow(np.where(known[..., None], wrong, _VOID), interpolation="nearest")
            share = float((found.predicted[row] == truth)[known].mean()) if known.any() else 0.0
            _title(here[0], attention if row == 0 else "")
            _title(here[1], f"right {100 * share:.0f} %")
    entries = [Patch(facecolor=colours[k], label=name) for k, name in enumerate(data.classes)]
    entries.append(Patch(facecolor=_VOID, label="void"))
    figure.legend(handles=entries, loc="outside lower center", ncols=min(6, len(entries)), fontsize=7, handlelength=1.0)
    return figure


def _fields(outcome: VisionOutcome, samples: Mapping[str, Samples]) -> Figure:
    first = next(iter(samples.values()))
    rows = min(len(first.x), 3)
    figure, axes = _panels(rows, 2 + 2 * len(samples), first.x.shape, 0.4)
    for row, line in enumerate(axes):
        mask = _last(first.mask[row][: first.y.shape[2]])
        x, truth = _last(first.x[row, 0]), np.where(mask, _last(first.y[row, 0]), np.nan)
        x = np.where(_last(first.mask[row]), x, np.nan)
        low, high = float(np.nanmin(truth)), float(np.nanmax(truth))
        errors = {
            name: np.where(mask, np.abs(_last(found.predicted[row, 0]) - truth), np.nan)
            for name, found in samples.items()
        }
        top = max(float(np.nanmax(e)) for e in errors.values()) or 1.0
        line[0].imshow(x, cmap="Greys", interpolation="nearest")
        shown = line[1].imshow(truth, vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
        if row == 0:
            _title(line[0], "input")
            _title(line[1], "truth")
        figure.colorbar(shown, ax=line[1], fraction=0.05, pad=0.02).ax.tick_params(labelsize=6)
        for number, (name, found) in enumerate(samples.items()):
            here = line[2 + 2 * number : 4 + 2 * number]
            values = np.where(mask, _last(found.predicted[row, 0]), np.nan)
            here[0].imshow(values, vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
            error = here[1].imshow(errors[name], vmin=0, vmax=top, cmap="magma", interpolation="nearest")
            _title(here[0], name if row == 0 else "")
            size = np.sqrt(np.nansum(truth**2)) or 1.0
            _title(here[1], f"error, {np.sqrt(np.nansum(errors[name] ** 2)) / size:.3f} in all")
            if number == len(samples) - 1:
                figure.colorbar(error, ax=here[1], fraction=0.05, pad=0.02).ax.tick_params(labelsize=6)
    return figure


def _last(values: Image) -> Image:
    """The plane that is drawn: of three axes the last frame."""
    return values if values.ndim == 2 else values[-1]


def looks_figure(outcome: VisionOutcome, samples: Mapping[str, Samples]) -> Figure:
    """How strongly an answer depends on each pixel, per attention, logarithmic, on two examples."""
    first = next(iter(samples.values()))
    rows = min(len(first.x), 2)
    with rc_context(STYLE):
        figure, axes = _panels(rows, 1 + len(samples), first.x.shape, 0.5)
        shown: Any = None
        for row, line in enumerate(axes):
            if outcome.data.task == "operator":
                line[0].imshow(_last(first.x[row, 0]), cmap="Greys", interpolation="nearest")
            else:
                line[0].imshow(_rgb(outcome, first.x[row]))
            if row == 0:
                _title(line[0], "input")
            for one, (name, found) in zip(line[1:], samples.items(), strict=True):
                logs = np.log10(np.maximum(_strongest(found.reach[row]), 10.0**_REACH_DECADES))
                shown = one.imshow(logs, vmin=_REACH_DECADES, vmax=0, cmap="inferno", interpolation="nearest")
                _title(one, name if row == 0 else "")
            if first.query[0] >= 0:
                for one in line:
                    one.plot(first.query[-1], first.query[-2], marker="o", markersize=4, color="white",
                             markeredgecolor="black")  # fmt: skip
        bar = figure.colorbar(shown, ax=axes, fraction=0.03, pad=0.01, ticks=[-3, -2, -1, 0])
        bar.ax.set_yticklabels(["0.001", "0.01", "0.1", "1"], fontsize=7)
        return figure


def _strongest(reach: Image) -> Image:
    """One plane of a dependence: of three axes the strongest over the frames, any of which may matter most."""
    return reach if reach.ndim == 2 else np.asarray(reach.max(0))


def patterns_of(outcome: VisionOutcome) -> tuple[list[Pattern], list[str]]:
    """Who sees whom in the first layer that can be drawn (two axes), and notes on what cannot be.

    Where the next layer of the model sees otherwise (recipes that alternate), it is drawn as well, on its own grid.
    """
    settings = outcome.settings
    notes: list[str] = []
    found: list[Pattern] = []
    depths = settings.model_config(settings.attentions[0], outcome.data).depths
    grids = [grid for grid, depth in zip(outcome.grids, depths, strict=True) for _ in range(depth)]
    first = next((layer for layer, grid in enumerate(grids) if int(np.prod(grid)) <= MOST_TOKENS // 2), None)
    if first is None:
        return found, ["No stage is small enough to draw who sees whom."]
    if len(grids[first]) != 2:
        return found, []
    for name in settings.attentions:
        try:
            found += _layers_of(name, grids, first, settings.recipe_options(name))
        except (ValueError, TypeError) as error:
            notes.append(f"There is no picture of who sees whom under {name}: {error}")
    whole = [p.name for p in found if p.name != "dense" and p.grid == grids[first] and bool((p.codes == 0).all())]
    if whole:
        notes.append(
            f"At {size_in_words(grids[first])} tokens, the grid that is drawn, {', '.join(whole)} see every token "
            "exactly, as dense does; a smaller --block, or larger images, would tell them apart."
        )
    return found, notes


def _layers_of(name: str, grids: Sequence[tuple[int, ...]], first: int, options: Mapping[str, Any]) -> list[Pattern]:
    """The pattern of layer ``first``, and that of the next one if there is one whose parts are others."""
    parts = []
    for layer in range(first, min(first + 2, len(grids))):
        built = recipes.build(name, 16, 1, dims=2, layer=layer, **options)
        parts.append((built.near_spec, built.far_spec))
    if len(set(parts)) == 1:
        return [pattern(name, grids[first], False, layer=first, **options)]
    found = []
    for layer in (first, first + 1):
        grid = grids[layer]
        where = "" if grid == grids[first] else f" ({size_in_words(grid)})"
        one = pattern(name, grid, False, layer=layer, **options)
        found.append(dataclasses.replace(one, name=f"{name}, layer {layer + 1}{where}"))
    return found


def patterns_figure(patterns: Sequence[Pattern]) -> Figure:
    """What one query sees in one layer, attention by attention."""
    with rc_context(STYLE):
        across = min(4, len(patterns))
        down = -(-len(patterns) // across)
        height, width = patterns[0].grid
        side = 2.7
        figure = Figure(figsize=(side * across, (side * min(height / width, 1.6) + 0.3) * down + 0.6), dpi=130,
                        layout="constrained")  # fmt: skip
        places = figure.subplots(down, across, squeeze=False).reshape(-1)
        for axes, one in zip(places, patterns, strict=False):
            rows, columns = one.grid
            draw_grid(axes, one, (rows // 3) * columns + columns // 3)
            axes.set_title(one.name, fontsize=9)
            axes.tick_params(labelsize=7)
        for axes in places[len(patterns) :]:
            axes.set_axis_off()
        handles = [
            Patch(facecolor=c, edgecolor="#9aa1ab", linewidth=0.5, label=text) for text, c in legend_entries(patterns)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(2 * across, len(handles)), fontsize=8,
                      handlelength=1.1)  # fmt: skip
        return figure


def loss_by_time_figure(outcome: VisionOutcome, style: Looks) -> Figure:
    """The training loss by time and by step."""
    runs: Sequence[VisionRun] = outcome.runs
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, column, label in ((panels[0], 1, "training time in seconds"), (panels[1], 0, "step")):
            for run in runs:
                values = smooth([point[2] * float(np.log(2)) for point in run.curve])
                axes.plot([p[column] for p in run.curve], values, color=style[run.attention][0], linewidth=1.8)
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            tidy(axes)
        panels[0].set_ylabel("relative L2" if outcome.data.task == "operator" else "cross-entropy in nats")
        legend(figure, style, [run.attention for run in runs])
        return figure
