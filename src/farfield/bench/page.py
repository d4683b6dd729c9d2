"""The page ``report.html``: one file with its style, figures (inline SVG and PNG) and numbers; it fetches nothing.

Needs the extra ``cli`` (matplotlib).
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from farfield.bench.compare import Outcome
from farfield.bench.cost import Cost
from farfield.bench.memory import why_unmeasured
from farfield.bench.pictures import picture_length, pictures
from farfield.bench.plots import Looks, cost_figure, looks, loss_figure, png, position_figure, short, svg
from farfield.bench.tables import COLUMNS, SPREAD, rows_of
from farfield.bench.verdict import Summary, ranked, verdict_of, yardsticks_of
from farfield.explain.show import describe, pattern_figure

_CSS = """
:root { --ink: #22262b; --muted: #5d6673; --line: #e2e5ea; --paper: #fff; --ground: #f6f7f9; --accent: #0072b2 }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px }
h2 { font-size: 20px; margin: 44px 0 6px }
p { margin: 6px 0 10px; max-width: 88ch }
.sub, figcaption, .note { color: var(--muted) }
figcaption, .note { font-size: 14px; max-width: 110ch }
.answer { background: var(--paper); border: 1px solid var(--line); border-left: 6px solid var(--accent);
  border-radius: 8px; padding: 18px 22px; margin: 24px 0 14px }
.answer strong { display: block; font-size: 20px; line-height: 1.35; margin-bottom: 8px; font-weight: 650 }
.answer ul { margin: 0; padding-left: 20px }
.warn { background: #fff7e6; border: 1px solid #f0d9a8; border-radius: 8px; padding: 10px 18px; margin: 10px 0;
  font-size: 15px }
figure { margin: 10px 0 0; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 16px }
figure svg, figure img { display: block; width: 100%; height: auto }
figcaption { margin-top: 10px }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  margin-top: 10px }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums }
th, td { padding: 8px 14px; text-align: right; border-top: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; color: var(--muted); font-size: 13px; border-top: 0 }
th:first-child, td:first-child { text-align: left }
tr.best td { font-weight: 650 }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 8px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 10px 0; font-size: 15px }
dt { color: var(--muted) }
dd { margin: 0; overflow-wrap: anywhere }
pre { background: #22262b; color: #f3f4f6; border-radius: 8px; padding: 14px 18px; font-size: 14px;
  white-space: pre-wrap; overflow-wrap: anywhere }
""".strip()


def _text(value: object) -> str:
    return html.escape(str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>"


def _image(data: bytes, alternative: str) -> str:
    return f'<img alt="{_text(alternative)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _rows_html(headings: Sequence[str], rows: Sequence[Sequence[str]], dots: Sequence[str], best: bool) -> str:
    head = "".join(f"<th>{_text(h)}</th>" for h in headings)
    lines = []
    for n, (row, dot) in enumerate(zip(rows, dots, strict=True)):
        first = f'<td><span class="dot" style="background:{dot}"></span>{_text(row[0])}</td>'
        kind = ' class="best"' if best and n == 0 else ""
        lines.append(f"<tr{kind}>{first}{''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _definitions(pairs: Sequence[tuple[str, object]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in pairs)}</dl>"


def to_html(outcome: Outcome) -> str:
    """The whole page."""
    settings, text, machine = outcome.settings, outcome.text, outcome.machine
    verdict = verdict_of(outcome)
    summaries = ranked(outcome.runs)
    style = looks(settings.attentions)
    parts = [
        "<h1>Which attention for this text?</h1>",
        f'<p class="sub">{_text(text["source"])}: {text["train_bytes"]:,} bytes to train on, '
        f"{text['valid_bytes']:,} held out. "
        f"Context {settings.context:,} bytes, {_text(settings.budget_in_words)}, "
        f"{settings.seeds} seed{'s' * (settings.seeds != 1)}.</p>",
        '<div class="answer">'
        f"<strong>{_text(verdict.headline)}</strong>"
        f"<ul>{''.join(f'<li>{_text(detail)}</li>' for detail in verdict.details)}</ul></div>",
        *(f'<div class="warn">{_text(warning)}</div>' for warning in verdict.warnings),
        *(f'<div class="warn">{_text(note)}</div>' for note in outcome.notes),
        *(
            f'<div class="warn">{_text(f"{f.attention}, seed {f.seed}, gave no result: {f.reason}.")}</div>'
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
        _definitions(
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
        _definitions([(name, value) for name, value in machine.items()]),
        "<h2>Do it again</h2>",
        f"<pre>{_text(outcome.command)}</pre>",
        '<p class="note">The numbers of this page are in results.json beside it, those of each run in runs/.'
        + (
            " With a number of steps, the same seed gives the same bits on the same machine."
            if settings.steps is not None
            else " With a budget of time, the bits depend on how fast the machine is, and vary a little by run."
        )
        + "</p>",
    ]
    title = "farfield compare: " + (verdict.best or "nothing finished")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_CSS}</style></head><body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


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
        _rows_html([COLUMNS[i] for i in keep], rows, dots, len(summaries) > 1),
        f'<p class="note">{_text(note)}</p>',
        "<h2>Loss by time</h2>",
        _figure(
            svg(loss_figure(outcome.runs, yardsticks_of(outcome), style)),
            "Bits per byte on the training text, smoothed; the marker at the end of a line is the held-out text. "
            "Every attention reads the same windows in the same order. Left at equal time, right at equal steps.",
        ),
        "<h2>Loss by position in the context</h2>",
        _figure(
            svg(position_figure(summaries, style)),
            "Held-out bits per byte of predictions that have that many bytes before them in the window. Where a line "
            "stops falling, more context no longer helps that model. Right: the difference to the best attention "
            "overall, which shows the small differences; above zero is worse.",
        ),
        _rows_html(["attention", *headings], position_rows, dots, False),
    ]


def _cost_html(cost: Cost, options: Mapping[str, Any], style: Looks) -> list[str]:
    ends = "; ".join(f"{name}: {reason}" for name, reason in cost.stopped.items())
    chosen = ", ".join(f"{name} {value}" for name, value in options.items())
    return [
        "<h2>Cost of one attention layer by length</h2>",
        _figure(
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
        _figure(
            _image(png(pattern_figure(patterns)), alternative),
            f"One layer over the first {picture_length(outcome.settings):,} tokens. Rows are queries, columns the keys "
            "they read. Stripes inside a level are its single summaries.",
        ),
    ]
