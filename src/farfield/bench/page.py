"""The page ``report.html``: one file with its style, figures (inline SVG and PNG) and numbers; it fetches nothing.

Needs the extra ``cli`` (matplotlib).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from farfield.bench import html
from farfield.bench.compare import Outcome
from farfield.bench.cost import Cost
from farfield.bench.memory import why_unmeasured
from farfield.bench.pictures import picture_length, pictures
from farfield.bench.plots import Looks, cost_figure, looks, loss_figure, png, position_figure, short, svg
from farfield.bench.tables import COLUMNS, SPREAD, rows_of
from farfield.bench.verdict import Summary, ranked, verdict_of, yardsticks_of
from farfield.explain.show import describe, pattern_figure


def to_html(outcome: Outcome) -> str:
    """The whole page."""
    settings, text, machine = outcome.settings, outcome.text, outcome.machine
    verdict = verdict_of(outcome)
    summaries = ranked(outcome.runs)
    style = looks(settings.attentions)
    parts = [
        "<h1>Which attention for this text?</h1>",
        f'<p class="sub">{html.text(text["source"])}: {text["train_bytes"]:,} bytes to train on, '
        f"{text['valid_bytes']:,} held out. "
        f"Context {settings.context:,} bytes, {html.text(settings.budget_in_words)}, "
        f"{settings.seeds} seed{'s' * (settings.seeds != 1)}.</p>",
        '<div class="answer">'
        f"<strong>{html.text(verdict.headline)}</strong>"
        f"<ul>{''.join(f'<li>{html.text(detail)}</li>' for detail in verdict.details)}</ul></div>",
        *(f'<div class="warn">{html.text(warning)}</div>' for warning in verdict.warnings),
        *(f'<div class="warn">{html.text(note)}</div>' for note in outcome.notes),
        *(
            f'<div class="warn">{html.text(f"{f.attention}, seed {f.seed}, gave no result: {f.reason}.")}</div>'
            for f in outcome.failures
        ),
    ]
    if summaries:
        parts += _results_html(outcome, summaries, style)
    if outcome.cost is not None and outcome.cost.points:
        parts += _cost_html(outcome.cost, settings.options, style)
    parts += _pattern_html(outcome)
    parts += [
        "<h2>Settings</h2>",
        html.definitions(
            [
                ("attentions", ", ".join(settings.attentions)),
                (
                    "model",
                    f"byte-level transformer, {settings.depth} layers of width {settings.dim}, {settings.heads} heads",
                ),
                ("options", ", ".join(f"{k} {v}" for k, v in settings.options.items())),
                (
                    "context",
                    f"{settings.context:,} bytes, {settings.batch} sequence{'s' * (settings.batch != 1)} per step",
                ),
                ("budget", settings.budget_in_words),
                ("seeds", ", ".join(str(settings.first_seed + k) for k in range(settings.seeds))),
                ("peak learning rate", f"{settings.train_config(settings.first_seed).lr:g}"),
                ("text", f"{text['source']}, {text['files']:,} files, SHA-256 {text['fingerprint'][:16]}…"),
                (
                    "held-out text",
                    f"{text['zlib_bits']:.3f} bits per byte by zlib (level 9), "
                    f"{text['byte_frequencies_bits']:.3f} by byte frequencies alone"
                    + (
                        f" (both over its first {text['simple_bytes']:,} bytes)"
                        if text["simple_bytes"] < text["valid_bytes"]
                        else ""
                    ),
                ),
            ]
        ),
        "<h2>Machine</h2>",
        html.definitions([(name, value) for name, value in machine.items()]),
        "<h2>Do it again</h2>",
        f"<pre>{html.text(outcome.command)}</pre>",
        '<p class="note">The numbers of this page are in results.json beside it, those of each run in runs/.'
        + (
            " With a number of steps, the same seed gives the same bits on the same machine."
            if settings.steps is not None
            else " With a budget of time, the bits depend on how fast the machine is, and vary a little by run."
        )
        + "</p>",
    ]
    title = "farfield compare: " + (verdict.best or "nothing finished")
    return html.document(title, parts)


def _results_html(outcome: Outcome, summaries: Sequence[Summary], style: Looks) -> list[str]:
    dots = [style[s.attention][0] for s in summaries]
    windows = len(outcome.runs[0].windows)
    unmeasured = why_unmeasured(outcome.settings.device)
    note = (
        f"Bits per byte on held-out text, fewer is better: the mean over {windows} window{'s' * (windows != 1)} of "
        f"{outcome.settings.context:,} bytes, the same for every run"
        + ("; ± is the standard deviation over seeds" if any(s.runs > 1 for s in summaries) else "")
        + ". Tokens per second and peak memory are those of training; memory is what training adds to the idle process"
        + (f" (not measured here: {unmeasured})" if unmeasured else "")
        + "."
    )
    headings = [f"{short(low)}–{short(high)}" for low, high, _ in summaries[0].positions]
    several = any(s.runs > 1 for s in summaries)
    keep = [i for i, name in enumerate(COLUMNS) if several or name != SPREAD]
    rows = [[row[i] for i in keep] for row in rows_of(summaries)]
    position_rows = [[s.attention, *(f"{bits:.3f}" for _, _, bits in s.positions)] for s in summaries]
    return [
        "<h2>Results</h2>",
        html.table([COLUMNS[i] for i in keep], rows, dots, len(summaries) > 1),
        f'<p class="note">{html.text(note)}</p>',
        "<h2>Loss by time</h2>",
        html.figure(
            svg(loss_figure(outcome.runs, yardsticks_of(outcome), style)),
            "Bits per byte on the training text, smoothed; the marker at the end of a line is the held-out text. "
            "Every attention reads the same windows in the same order. Left at equal time, right at equal steps.",
        ),
        "<h2>Loss by position in the context</h2>",
        html.figure(
            svg(position_figure(summaries, style)),
            "Held-out bits per byte of predictions that have that many bytes before them in the window. Where a line "
            "stops falling, more context no longer helps that model. Right: the difference to the best attention "
            "overall, which shows the small differences; above zero is worse.",
        ),
        html.table(["attention", *headings], position_rows, dots, False),
    ]


def _cost_html(cost: Cost, options: Mapping[str, Any], style: Looks) -> list[str]:
    ends = "; ".join(f"{name}: {reason}" for name, reason in cost.stopped.items())
    chosen = ", ".join(f"{name} {value}" for name, value in options.items())
    return [
        "<h2>Cost of one attention layer by length</h2>",
        html.figure(
            svg(cost_figure(cost, style)),
            f"One causal layer (the first of the model) of width {cost.dim} with {cost.heads} heads ({chosen}), "
            f"one sequence, projections included; all attentions in one run, turn by turn. Why the lines end: {ends}.",
        ),
    ]


def _pattern_html(outcome: Outcome) -> list[str]:
    patterns, _ = pictures(outcome.settings)  # what has no picture stands among the outcome's notes
    if not patterns:
        return []
    alternative = "; ".join(f"{p.name}: {describe(p)}" for p in patterns)
    return [
        "<h2>Who sees whom</h2>",
        html.figure(
            html.image(png(pattern_figure(patterns)), alternative),
            f"One layer over the first {picture_length(outcome.settings):,} tokens. Rows are queries, columns the keys "
            "they read. Stripes inside a level are its single summaries.",
        ),
    ]
