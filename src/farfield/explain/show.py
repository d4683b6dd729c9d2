"""Drawings of who sees whom and of attention weights: matplotlib figures, and half blocks for the terminal.

Needs the extra ``cli`` (matplotlib, rich).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.color import Color
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from farfield.explain.pattern import EXACT, GLOBAL, UNSEEN, Pattern

Image = npt.NDArray[np.float64]

INK = "#22262b"
MUTED = "#6b7280"
STYLE: Any = {  # matplotlib types its keys as several hundred literals
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1ab",
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "farfield",
}
"""One look for all figures of the library."""

# Okabe and Ito's vermilion for what is exact; blues from dark (near, fine) to pale (far, coarse) for levels: hue and
# lightness both differ, so the picture survives any colour vision and a grey printer.
_EXACT_COLOUR = "#d55e00"
_GLOBAL_COLOUR = "#b48ead"
_UNSEEN_COLOUR = "#f3f4f6"
_DECADES = -4
"""Weights are drawn on a logarithmic scale, from this power of ten of the largest one up."""
_WEIGHT_SHADES = "magma_r"
_CELL_SHADE = 0.13
"""How much lighter every other cell is drawn, so that single summaries can be told apart."""


def level_colours(levels: int) -> list[tuple[float, float, float]]:
    """Colours of levels 1..levels, dark to pale."""
    ramp = colormaps["YlGnBu"]
    places = np.linspace(0.92, 0.38, max(levels, 1)) if levels > 1 else [0.78]
    return [to_rgb(ramp(place)) for place in places]


def colour_of(code: int, levels: int) -> tuple[float, float, float]:
    """The colour of one code of :mod:`farfield.explain.pattern`."""
    special = {EXACT: _EXACT_COLOUR, GLOBAL: _GLOBAL_COLOUR, UNSEEN: _UNSEEN_COLOUR}
    return to_rgb(special[code]) if code in special else level_colours(levels)[code - 1]


def paint(pattern: Pattern, rows: slice | Sequence[int] = slice(None)) -> Image:
    """[rows, N, 3] the colours of some rows (queries) of a pattern, every other cell of a level a little lighter."""
    codes = pattern.codes[rows]
    levels = len(pattern.cells)
    image = np.empty((*codes.shape, 3))
    image[:] = to_rgb(_UNSEEN_COLOUR)
    image[codes == EXACT] = to_rgb(_EXACT_COLOUR)
    image[codes == GLOBAL] = to_rgb(_GLOBAL_COLOUR)
    for level in pattern.levels:
        odd = _parity(pattern, level)
        colour = np.array(colour_of(level, levels))
        shades = np.where(odd[:, None], colour + (1 - colour) * _CELL_SHADE, colour)
        image = np.where((codes == level)[..., None], shades[None], image)
    return image


def _parity(pattern: Pattern, level: int) -> npt.NDArray[np.bool_]:
    """[N] a chessboard over the cells of a level."""
    cell = pattern.cells[level - 1].reshape(pattern.grid)
    odd = np.zeros(pattern.grid, dtype=bool)
    for axis in range(len(pattern.grid)):
        border = np.diff(cell, axis=axis) != 0  # cell numbers change along an axis exactly at a border
        steps = np.concatenate([np.zeros_like(np.take(cell, [0], axis), dtype=bool), border], axis)
        odd ^= np.cumsum(steps, axis) % 2 == 1
    return odd.reshape(-1)


def legend_entries(patterns: Sequence[Pattern]) -> list[tuple[str, tuple[float, float, float]]]:
    """(text, colour) of everything that occurs in some of the patterns."""
    levels = max(len(p.cells) for p in patterns)
    entries = []
    if any((p.codes == EXACT).any() for p in patterns):
        entries.append(("exact", colour_of(EXACT, levels)))
    for level in sorted({level for p in patterns for level in p.levels}):
        sizes = {_cell_size(p, level) for p in patterns if level in p.levels}
        entries.append((f"level {level}: {' or '.join(sorted(sizes))} in one", colour_of(level, levels)))
    if any(p.has_global for p in patterns):
        entries.append(("mixed into landmarks or a state", colour_of(GLOBAL, levels)))
    if any((p.codes == UNSEEN).any() for p in patterns):
        entries.append(("not seen", colour_of(UNSEEN, levels)))
    return entries


def _cell_size(pattern: Pattern, level: int) -> str:
    size = int(np.bincount(pattern.cells[level - 1]).max())
    return f"{size} token{'s' * (size != 1)}"


def describe(pattern: Pattern) -> str:
    """One line: how much a query reads on average, and for how many tokens that stands."""
    said = f"a query sees {pattern.exact_per_query:.0f} tokens"
    if pattern.levels:
        said += f" + {pattern.summaries_per_query:.0f} summaries"
    if pattern.has_global:
        said += f" + {pattern.landmarks:.0f} landmarks" if pattern.landmarks else " + a state"
    seen = (pattern.codes != UNSEEN).sum(1).mean()
    return f"{said} for {seen:.0f} (means)" if pattern.levels or pattern.has_global else said


def draw_pattern(axes: Axes, pattern: Pattern, title: str | None = None) -> None:
    """The N x N picture, queries downwards, keys to the right."""
    n = pattern.tokens
    axes.imshow(paint(pattern), extent=(0, n, n, 0), interpolation="nearest" if n <= 640 else "antialiased")
    axes.set_title(pattern.name if title is None else title, pad=20)
    _note(axes, describe(pattern))
    axes.set_xlabel("key (what is read)")
    axes.set_ylabel("query (who reads)")
    ticks = np.linspace(0, n, 5).round().astype(int)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.tick_params(length=3)


def _note(axes: Axes, text: str) -> None:
    note = axes.text(0, 1.02, text, transform=axes.transAxes, fontsize=7.4, color=MUTED, va="bottom")
    note.set_in_layout(False)  # a long note must not make the panel narrower


def draw_grid(axes: Axes, pattern: Pattern, query: int) -> None:
    """What one query of an image sees, as the image of the grid, every summary outlined."""
    height, width = pattern.grid
    axes.imshow(
        paint(pattern, [query])[0].reshape(height, width, 3), extent=(0, width, height, 0), interpolation="nearest"
    )
    codes = pattern.codes[query].reshape(height, width)
    group = codes.astype(np.int64) * (pattern.tokens + 1)
    for level in pattern.levels:
        group = np.where(codes == level, group + pattern.cells[level - 1].reshape(height, width), group)
    for y, x in zip(*np.nonzero(np.diff(group, axis=0)), strict=True):
        axes.plot([x, x + 1], [y + 1, y + 1], color="white", linewidth=0.9, solid_capstyle="butt")
    for y, x in zip(*np.nonzero(np.diff(group, axis=1)), strict=True):
        axes.plot([x + 1, x + 1], [y, y + 1], color="white", linewidth=0.9, solid_capstyle="butt")
    row, column = divmod(query, width)
    axes.plot(column + 0.5, row + 0.5, marker="o", markersize=7, color="white", markeredgecolor="black", clip_on=False)
    axes.set_title(f"{pattern.name}: query at row {row}, column {column}")
    axes.set_xticks(np.linspace(0, width, 5).round())
    axes.set_yticks(np.linspace(0, height, 5).round())


def pattern_figure(patterns: Sequence[Pattern]) -> Figure:
    """Several attentions side by side with one legend: the picture of the comparison's report."""
    with rc_context(STYLE):
        across = len(patterns) if len(patterns) <= 4 else 3
        down = -(-len(patterns) // across)
        width = 3.75 if across > 1 else 5.6
        figure = Figure(figsize=(width * across, (width + 0.25) * down + 0.45), dpi=160, layout="constrained")
        places = figure.subplots(down, across, squeeze=False).reshape(-1)
        for place, (axes, pattern) in enumerate(zip(places, patterns, strict=False)):
            draw_pattern(axes, pattern)
            if place % across:
                axes.set_ylabel("")
        for axes in places[len(patterns) :]:
            axes.set_axis_off()
        _legend(figure, patterns, (2, 4, 6, 8)[across - 1])
        return figure


def _legend(figure: Figure, patterns: Sequence[Pattern], columns: int) -> None:
    handles = [
        Patch(facecolor=c, edgecolor="#9aa1ab", linewidth=0.5, label=text) for text, c in legend_entries(patterns)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), handlelength=1.1)


def grid_figure(pattern: Pattern, queries: Sequence[int]) -> Figure:
    """What some queries of an image see, one panel each.

    Raises:
        ValueError: for a grid that is not 2-D, or a query outside it.
    """
    if len(pattern.grid) != 2:
        raise ValueError(f"the picture per query is of images (2-D); the grid is {pattern.grid}")
    check_queries(queries, pattern.tokens)
    with rc_context(STYLE):
        across = min(3, len(queries))
        down = -(-len(queries) // across)
        figure = Figure(figsize=(4.2 * across, 4.4 * down + 0.6), dpi=160, layout="constrained")
        places = figure.subplots(down, across, squeeze=False).reshape(-1)
        for axes, query in zip(places, queries, strict=False):
            draw_grid(axes, pattern, query)
        for axes in places[len(queries) :]:
            axes.set_axis_off()
        _legend(figure, [pattern], 2 * across)
        return figure


def check_queries(queries: Sequence[int], tokens: int) -> None:
    """Raises ValueError for a query that is no token."""
    for query in queries:
        if not 0 <= query < tokens:
            raise ValueError(f"query {query} is outside; there are {tokens:,} tokens, 0 to {tokens - 1}")


def weights_figure(
    pattern: Pattern, exact: Image, effective: Image, source: str, query: int | None = None, drawn: str = ""
) -> Figure:
    """Pattern, exact softmax weights, effective weights, and one query's row of both.

    Args:
        pattern: who sees whom.
        exact: [N, N] softmax weights over all visible tokens.
        effective: [N, N] the weights that the operator applies.
        source: in words, where queries and keys are from.
        query: the row to draw; None takes one at seven eighths.
        drawn: in words, of which settings the effective weights are.
    """
    n = pattern.tokens
    check_queries([] if query is None else [query], n)
    row = (7 * n) // 8 if query is None else query
    top = float(max(exact.max(), effective.max(), 1e-12))
    with rc_context(STYLE):
        figure = Figure(figsize=(12.6, 7.4), dpi=150, layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=(4.7, 2.7))
        upper, lower = halves
        panels = upper.subplots(1, 3)
        draw_pattern(panels[0], pattern, f"{pattern.name}: who sees whom")
        handles = [
            Patch(facecolor=c, edgecolor="#9aa1ab", linewidth=0.5, label=t) for t, c in legend_entries([pattern])
        ]
        panels[0].legend(handles=handles, loc="upper right" if pattern.causal else "lower left", fontsize=7.5,
                         handlelength=1.1, frameon=True, framealpha=0.93, edgecolor="none")  # fmt: skip
        shades = colormaps[_WEIGHT_SHADES].with_extremes(bad=_UNSEEN_COLOUR)
        for axes, weights, title, note in (
            (panels[1], exact, "exact softmax weights", source),
            (panels[2], effective, "effective weights", _distance(exact, effective)),
        ):
            logs = np.where(pattern.codes == UNSEEN, np.nan, np.log10(np.clip(weights / top, 10.0**_DECADES, 1)))
            image = axes.imshow(logs, cmap=shades, vmin=_DECADES, vmax=0, extent=(0, n, n, 0), interpolation="nearest")
            axes.set_title(title, pad=20)
            _note(axes, note)
            axes.set_xlabel("key")
            axes.set_xticks(np.linspace(0, n, 5).round())
            axes.set_yticks(np.linspace(0, n, 5).round(), [])
            axes.axhline(row + 0.5, color="#0072b2", linewidth=1)
        bar = upper.colorbar(image, ax=panels.tolist(), shrink=0.7, pad=0.01, ticks=[-4, -3, -2, -1, 0])
        bar.ax.set_yticklabels(["0.0001", "0.001", "0.01", "0.1", "1"])
        bar.set_label("weight, relative to the largest")
        line = lower.subplots()
        line.fill_between(np.arange(n) + 0.5, exact[row], step="mid", color="#b9bec6", label="exact softmax")
        line.step(np.arange(n) + 0.5, effective[row], where="mid", color="#0072b2", linewidth=1.3, label="effective")
        line.set_title(f"the row of query {row}", loc="left")
        line.set_title(drawn, loc="right", fontsize=8.5, fontweight="normal", color=MUTED)
        line.set_xlabel("key")
        line.set_ylabel("weight")
        line.set_xlim(0, n)
        line.set_ylim(bottom=0)
        line.spines[["top", "right"]].set_visible(False)
        line.legend(loc="upper left")
        return figure


def _distance(exact: Image, effective: Image) -> str:
    moved = 0.5 * np.abs(exact - effective).sum(1).mean()
    return f"{100 * moved:.1f} % of a row's weight sits elsewhere than in exact softmax"


def exact_weights(query: Image, key: Image, causal: bool) -> Image:
    """[N, N] softmax weights of [N, D] queries and keys, scale 1 / sqrt(D)."""
    scores = query @ key.T / np.sqrt(query.shape[1])
    if causal:
        scores = np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def example_vectors(kind: str, grid: tuple[int, ...], dim: int = 32, seed: int = 0) -> tuple[Image, Image]:
    """Queries and keys [N, dim] to draw weights of.

    ``random``: independent normal numbers, the worst case for any summary. ``smooth``: random Fourier features of the
    position, so that nearby tokens resemble each other and scores fall with distance, as in text and images.

    Raises:
        ValueError: for another kind.
    """
    rng = np.random.default_rng(seed)
    tokens = prod(grid)
    if kind == "random":
        return rng.normal(size=(tokens, dim)), rng.normal(size=(tokens, dim))
    if kind != "smooth":
        raise ValueError(f"vectors {kind!r} are not known; give 'smooth' or 'random'")
    place = np.indices(grid).reshape(len(grid), -1).T / max(grid)
    waves = rng.normal(scale=1.0, size=(len(grid), dim // 2)) * np.geomspace(0.5, 40.0, dim // 2)
    angles = place @ waves
    features = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    wobble = 0.2 * rng.normal(size=(2, tokens, dim))
    strength = 1.5  # peaks stand out, tails stay visible
    return strength * features + wobble[0], strength * features + wobble[1]


def terminal_picture(pattern: Pattern, columns: int = 64, query: int | None = None) -> Segments:
    """The pattern in half blocks: two rows of pixels per line of the terminal.

    Args:
        pattern: what to draw; a 2-D grid with ``query`` gives the image that this query sees, else the N x N picture.
        columns: width in characters.
        query: see ``pattern``.
    """
    if query is not None and len(pattern.grid) == 2:
        image = paint(pattern, [query])[0].reshape(*pattern.grid, 3)
        image[divmod(query, pattern.grid[1])] = (0, 0, 0)
    else:
        image = paint(pattern)
    return _half_blocks(_shrink(image, columns))


def terminal_weights(pattern: Pattern, weights: Image, columns: int = 64) -> Segments:
    """Attention weights in half blocks, with the shades of :func:`weights_figure`.

    A pixel is the mean weight of the keys and queries in it, over those that see each other.

    Args:
        pattern: who sees whom; what nobody sees stays empty.
        weights: [N, N], rows are queries.
        columns: width in characters.
    """
    seen = (pattern.codes != UNSEEN).astype(np.float64)
    number = _pooled(seen, columns)
    mean = np.divide(_pooled(weights * seen, columns), number, out=np.zeros_like(number), where=number > 0)
    logs = np.log10(np.clip(mean / max(float(mean.max()), 1e-300), 10.0**_DECADES, 1))
    image = np.asarray(colormaps[_WEIGHT_SHADES](1 - logs / _DECADES))[..., :3]
    image[number == 0] = to_rgb(_UNSEEN_COLOUR)
    return _half_blocks(_shrink(image, columns))


def _pooled(image: Image, columns: int) -> Image:
    """Sums over the squares that become one pixel; the image itself when it is small enough."""
    n = len(image)
    if n <= columns:
        return image
    edges = np.arange(columns) * n // columns
    return np.asarray(np.add.reduceat(np.add.reduceat(image, edges, axis=0), edges, axis=1))


def weights_legend() -> Text:
    """The shades of :func:`terminal_weights` in one line."""
    text = Text()
    for power in range(0, _DECADES - 1, -1):
        shade = np.array(colormaps[_WEIGHT_SHADES](1 - power / _DECADES))[:3]
        text.append("██ ", Style(color=_rich_colour(shade)))
        text.append(f"{10.0**power:g}   ")
    text.append("of the largest weight drawn")
    return text


def _half_blocks(image: Image) -> Segments:
    """Two rows of pixels per line of the terminal."""
    if len(image) % 2:
        image = np.concatenate([image, np.ones_like(image[:1])])
    segments = []
    for upper, lower in zip(image[::2], image[1::2], strict=True):
        for a, b in zip(upper, lower, strict=True):
            segments.append(Segment("▀", Style(color=_rich_colour(a), bgcolor=_rich_colour(b))))
        segments.append(Segment.line())
    return Segments(segments)


def _shrink(image: Image, columns: int) -> Image:
    """The nearest pixel of each place; an image that is small enough is drawn larger by a whole factor."""
    height, width = image.shape[:2]
    if width <= columns:
        factor = columns // width
        return image.repeat(factor, 0).repeat(factor, 1)
    rows = max(1, round(height * columns / width))
    y = ((np.arange(rows) + 0.5) * height / rows).astype(int)
    x = ((np.arange(columns) + 0.5) * width / columns).astype(int)
    return image[np.ix_(y, x)]


def _rich_colour(rgb: Image) -> Color:
    red, green, blue = (round(255 * float(c)) for c in rgb)
    return Color.from_rgb(red, green, blue)


def terminal_legend(pattern: Pattern) -> Text:
    """The legend in one line."""
    text = Text()
    for label, colour in legend_entries([pattern]):
        text.append("██ ", Style(color=_rich_colour(np.array(colour))))
        text.append(f"{label}   ")
    return text
