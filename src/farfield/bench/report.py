"""What a comparison leaves behind: ``report.html`` (see :mod:`farfield.bench.page`) and ``results.json``.

Needs the extra ``cli`` (matplotlib).

The JSON file, format ``farfield-compare/1``::

    format        "farfield-compare/1"
    status        "finished" or "interrupted"
    command       the command line that reproduces it
    answer        best (name or null), headline, details [sentences], warnings [sentences],
                  pairs [{best, other, difference (bits per byte), yardstick, kind, clear}]: the best against
                  each other, closest first, then those others on which the headline rests
    settings      context, seconds or steps (the other is null), seeds, first_seed, dim, depth, heads, options, batch,
                  lr (null: default), eval_tokens, device, cost_seconds (null: left out), attentions [names]
    text          source, files, skipped, fingerprint (SHA-256), train_bytes, valid_bytes,
                  byte_frequencies_bits and zlib_bits: bits per byte that simple coders need for the first simple_bytes
                  bytes of the held-out text (all of it up to 4,000,000)
    machine       processor, cores, threads, device, system, python, torch, farfield
    summary       per attention: attention, runs, bits (mean held-out bits per byte), spread (max - min over seeds or
                  null), deviation (standard deviation, n - 1, or null), positions [[first, last + 1, bits]], steps,
                  tokens, tokens_per_second (training only), peak_bytes (or null), parameters
    runs          per run: attention, seed, bits, windows [bits per byte of each held-out window, the same windows for
                  all], positions, steps, tokens, seconds, peak_bytes, parameters, curve [[step, seconds, bits on
                  training text]], key (the settings that decide its numbers), machine (that made it: processor,
                  cores, threads, torch)
    notes         [sentences]: pictures and costs that could not be had, runs of several machines
    failures      [{attention, seed, reason}]
    unfinished    [attention, seed] of the run under way at an interruption, or null
    cost          null, or dim, heads, seconds (of the stage), stopped {attention: why it went no further}, interrupted,
                  points [{attention, length, forward (s), both (s: forward and backward), memory (bytes or null),
                  repeats}]
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from farfield.bench.compare import RESULTS_FORMAT, Outcome
from farfield.bench.page import to_html
from farfield.bench.verdict import summarise, verdict_of
from farfield.training.files import write_atomically, write_json

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"


def to_json(outcome: Outcome) -> dict[str, Any]:
    """The contents of ``results.json``; the schema stands at the top of this module."""
    return {
        "format": RESULTS_FORMAT,
        "status": "interrupted" if outcome.interrupted else "finished",
        "command": outcome.command,
        "answer": dataclasses.asdict(verdict_of(outcome)),
        "settings": dataclasses.asdict(outcome.settings),
        "text": outcome.text,
        "machine": outcome.machine,
        "summary": [dataclasses.asdict(s) for s in summarise(outcome.runs)],
        "runs": [dataclasses.asdict(run) for run in outcome.runs],
        "notes": list(outcome.notes),
        "failures": [dataclasses.asdict(failure) for failure in outcome.failures],
        "unfinished": outcome.unfinished,
        "cost": None if outcome.cost is None else dataclasses.asdict(outcome.cost),
    }


def write(outcome: Outcome, folder: Path) -> Path:
    """Writes both files, each whole or not at all, the numbers first.

    Returns:
        The path of the report.

    Raises:
        OSError: when one cannot be written.
    """
    write_json(folder / RESULTS_FILE, to_json(outcome))
    report = folder / REPORT_FILE
    write_atomically(report, to_html(outcome).encode("utf-8", "surrogateescape"))
    return report
