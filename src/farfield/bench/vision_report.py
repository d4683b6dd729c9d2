"""What a comparison on images or fields leaves behind: ``report.html``, ``results.json`` and its pictures as PNG.

Needs the extra ``cli`` (matplotlib).

The JSON file, format ``farfield-vision-compare/1``::

    format        "farfield-vision-compare/1"
    status        "finished" or "interrupted"
    command       the command line that reproduces it
    answer        best (name or null), headline, details [sentences], warnings [sentences],
                  pairs [{best, other, difference (how much worse), yardstick, kind, clear}]
    settings      of the command, see farfield.bench.vision.VisionSettings
    data          source, fingerprint, task, metric, classes, train and tests {resolution: examples}, grid, channels,
                  outputs, yardsticks {answer that needs no training: score}, skipped [files left out], bad
                  [examples that could not be read, with the reason]
    model         grids (of tokens, by stage)
    machine       processor, cores, threads, device, system, python, torch, farfield
    summary       per attention, see farfield.bench.vision_verdict.VisionSummary
    runs          per run, see farfield.bench.vision.VisionRun
    notes         [sentences]
    failures      [{attention, seed, reason}]
    unfinished    [attention, seed] of the run under way at an interruption, or null
    cost          null, or as in farfield.bench.report; lengths are pixels of one image, the model as a whole
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from farfield.bench import html
from farfield.bench.memory import why_unmeasured
from farfield.bench.plots import cost_figure, looks, png, svg
from farfield.bench.samples import Samples
from farfield.bench.vision import RESULTS_FORMAT, VisionOutcome, load_samples, samples_file
from farfield.bench.vision_pictures import (
    looks_figure,
    loss_by_time_figure,
    patterns_figure,
    patterns_of,
    predictions_figure,
)
from farfield.bench.vision_tables import class_rows, headings, resolution_rows, rows_of_vision, yardstick_rows
from farfield.bench.vision_verdict import ranked_vision, summarise_vision, verdict_of_vision
from farfield.data.examples import size_in_words
from farfield.training.files import write_atomically, write_json

__all__ = ["PICTURES", "drawn", "to_json", "write_vision"]

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
PICTURES = ("predictions.png", "looks.png", "pattern.png")


def to_json(outcome: VisionOutcome) -> dict[str, Any]:
    """The contents of ``results.json``; the schema stands at the top of this module."""
    data = outcome.data
    return {
        "format": RESULTS_FORMAT,
        "status": "interrupted" if outcome.interrupted else "finished",
        "command": outcome.command,
        "answer": dataclasses.asdict(verdict_of_vision(outcome)),
        "settings": dataclasses.asdict(outcome.settings),
        "data": {
            "source": data.source,
            "fingerprint": data.fingerprint,
            "task": data.task,
            "metric": outcome.metric.name,
            "classes": data.classes,
            "train": len(data.train),
            "tests": {name: len(source) for name, source in data.tests.items()},
            "grid": data.train.grid,
            "channels": data.channels,
            "outputs": data.outputs,
            "yardsticks": data.yardsticks,
            "skipped": data.skipped,
            "bad": outcome.bad,
        },
        "model": {"grids": outcome.grids},
        "machine": outcome.machine,
        "summary": [dataclasses.asdict(s) for s in summarise_vision(outcome.runs)],
        "runs": [dataclasses.asdict(run) for run in outcome.runs],
        "notes": list(outcome.notes),
        "failures": [dataclasses.asdict(failure) for failure in outcome.failures],
        "unfinished": outcome.unfinished,
        "cost": None if outcome.cost is None else dataclasses.asdict(outcome.cost),
    }


def drawn(outcome: VisionOutcome, folder: Path) -> dict[str, bytes]:
    """The pictures that can be drawn, by file name; what is missing becomes a note of the outcome."""
    samples: dict[str, Samples] = {}
    for name in outcome.settings.attentions:
        found = load_samples(samples_file(folder, name, outcome.settings.first_seed))
        if found is not None and any(run.attention == name for run in outcome.runs):
            samples[name] = found
    missing = [n for n in dict.fromkeys(run.attention for run in outcome.runs) if n not in samples]
    if missing and outcome.runs:
        outcome.notes.append(f"There are no saved predictions of {', '.join(missing)} to draw.")
    result = {}
    if samples:
        result["predictions.png"] = png(predictions_figure(outcome, samples))
        result["looks.png"] = png(looks_figure(outcome, samples))
    patterns, notes = patterns_of(outcome)
    outcome.notes += [note for note in notes if note not in outcome.notes]
    if patterns:
        result["pattern.png"] = png(patterns_figure(patterns))
    return result


def write_vision(outcome: VisionOutcome, folder: Path) -> Path:
    """Writes everything, each file whole or not at all, the numbers first.

    Returns:
        The path of the report.

    Raises:
        OSError: when one cannot be written.
    """
    pictures = drawn(outcome, folder)
    write_json(folder / RESULTS_FILE, to_json(outcome))
    for name, data in pictures.items():
        write_atomically(folder / name, data)
    report = folder / REPORT_FILE
    write_atomically(report, to_html(outcome, pictures).encode("utf-8", "surrogateescape"))
    return report


_CAPTIONS = {
    "classify": "Held-out images with their class, and what each model says, with its probability: green is right.",
    "segment": "Held-out images, the truth, and what each model says; beside it green where it is right.",
    "operator": "Held-out inputs (the first channel), the true output, what each model says, and how far off it is, on "
    "one scale per row.",
}
_LOOKS = {
    "classify": "How strongly the largest logit depends on each pixel",
    "segment": "How strongly the largest logit at the marked pixel depends on each pixel",
    "operator": "How strongly the output at the marked point depends on each point of the input (of several "
    "frames, the strongest)",
}


def to_html(outcome: VisionOutcome, pictures: dict[str, bytes]) -> str:
    """The whole page."""
    settings, data = outcome.settings, outcome.data
    verdict = verdict_of_vision(outcome)
    summaries = ranked_vision(outcome)
    style = looks(settings.attentions)
    fields = data.task == "operator"
    things = "fields" if fields else "images"
    parts = [
        f"<h1>Which attention for these {things}?</h1>",
        f'<p class="sub">{html.text(data.source)}: {len(data.train):,} examples of {size_in_words(data.train.grid)} to '
        f"train on, {', '.join(f'{len(s):,} of {n}' for n, s in data.tests.items())} held out. "
        f"{html.text(settings.budget_in_words)}, {settings.seeds} seed{'s' * (settings.seeds != 1)}.</p>",
        '<div class="answer">'
        f"<strong>{html.text(verdict.headline)}</strong>"
        f"<ul>{''.join(f'<li>{html.text(detail)}</li>' for detail in verdict.details)}</ul></div>",
        *(f'<div class="warn">{html.text(line)}</div>' for line in (*verdict.warnings, *outcome.notes)),
        *(
            f'<div class="warn">{html.text(f"{f.attention}, seed {f.seed}, gave no result: {f.reason}.")}</div>'
            for f in outcome.failures
        ),
    ]
    left_out = [*data.skipped, *outcome.bad]
    if left_out:
        shown = "".join(f"<li>{html.text(line)}</li>" for line in left_out[:50])
        more = f"<li>and {len(left_out) - 50:,} more</li>" if len(left_out) > 50 else ""
        parts.append(f'<div class="warn">Left out:<ul>{shown}{more}</ul></div>')
    if summaries:
        dots = [style[s.attention][0] for s in summaries]
        unmeasured = why_unmeasured(settings.device)
        simple = yardstick_rows(outcome)
        note = (
            f"{outcome.metric.name} on held-out examples, {'more' if outcome.metric.higher else 'less'} is better; "
            "images per second and peak memory are those of training; memory is what training adds to the idle "
            "process" + (f" (not measured here: {unmeasured})" if unmeasured else "")
            + (". Rows without a colour are answers that need no training, on all held-out examples" if simple else "")
            + "."
        )  # fmt: skip
        parts += [
            "<h2>Results</h2>",
            html.table(
                headings(outcome),
                [*rows_of_vision(outcome, summaries), *simple],
                [*dots, *["transparent"] * len(simple)],
                len(summaries) > 1,
            ),
            f'<p class="note">{html.text(note)}</p>',
        ]
        heads, rows = resolution_rows(outcome, summaries)
        if len(heads) > 2:
            parts += ["<h2>By resolution</h2>", html.table(heads, rows, dots, False)]
        if data.classes and len(data.classes) <= 24:
            word = "Accuracy" if data.task == "classify" else "IoU"
            heads, rows = class_rows(outcome, summaries)
            parts += [f"<h2>{word} by class, in percent</h2>", html.table(heads, rows, dots, False)]
        parts += [
            "<h2>Loss by time</h2>",
            html.figure(
                svg(loss_by_time_figure(outcome, style)),
                "Training loss, smoothed. Every attention reads the same examples in the same order, augmented alike.",
            ),
        ]
    if "predictions.png" in pictures:
        parts += [
            "<h2>Predictions</h2>",
            html.figure(html.image(pictures["predictions.png"], "predictions"), _CAPTIONS[data.task]),
            "<h2>Where an answer looks</h2>",
            html.figure(
                html.image(pictures["looks.png"], "dependence on the input"),
                f"{_LOOKS[data.task]}: the norm of its gradient, relative to the largest, of the whole trained model.",
            ),
        ]
    if "pattern.png" in pictures:
        parts += [
            "<h2>Who sees whom</h2>",
            html.figure(
                html.image(pictures["pattern.png"], "what a query sees"),
                "What one query (the dot) sees in the first layer whose grid can be drawn: tokens, and summaries "
                "outlined. Of an attention whose layers alternate the next layer stands beside it.",
            ),
        ]
    if outcome.cost is not None and outcome.cost.points:
        ends = "; ".join(f"{name}: {reason}" for name, reason in outcome.cost.stopped.items())
        parts += [
            "<h2>Cost of the model by resolution</h2>",
            html.figure(
                svg(cost_figure(outcome.cost, style, "pixels of one image" if not fields else "points of one field")),
                f"One example, the whole model, all attentions in one run, turn by turn. Why the lines end: {ends}.",
            ),
        ]
    config = settings.model_config(settings.attentions[0], data)
    parts += [
        "<h2>Settings</h2>",
        html.definitions(
            [
                ("attentions", ", ".join(settings.attentions)),
                (
                    "model",
                    f"{settings.size}: widths {config.widths}, depths {config.depths}, heads of {config.head_dim}, "
                    f"patches of {size_in_words(config.patches)}, positions: {config.position}; grids of tokens "
                    f"{', '.join(size_in_words(g) for g in outcome.grids)}",
                ),
                ("options", ", ".join(f"{k} {v}" for k, v in settings.options.items()) or "the recipes' own"),
                ("batch", settings.batch_of(data.task)),
                ("budget", settings.budget_in_words),
                ("seeds", ", ".join(str(settings.first_seed + k) for k in range(settings.seeds))),
                ("peak learning rate", f"{settings.train_config(data, settings.first_seed).lr:g}"),
                ("data", f"{data.source}, SHA-256 {data.fingerprint[:16]}…"),
            ]
        ),
        "<h2>Machine</h2>",
        html.definitions([(name, value) for name, value in outcome.machine.items()]),
        "<h2>Do it again</h2>",
        f"<pre>{html.text(outcome.command)}</pre>",
        '<p class="note">The numbers of this page are in results.json beside it, those of each run in runs/.</p>',
    ]
    return html.document("farfield compare: " + (verdict.best or "nothing finished"), parts)
