"""Converting a pretrained model to multipole attention without training: calibrate, allocate, configure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield import __version__
from farfield.far import Pyramid
from farfield.interop.transformers import cores
from farfield.interop.transformers.budget import allocate
from farfield.interop.transformers.calibrate import fisher, sampled, window_errors
from farfield.interop.transformers.keys import context, keys_of, near_keys
from farfield.interop.transformers.layers import CONVERTED, group_of
from farfield.interop.transformers.loading import configure
from farfield.interop.transformers.menu import BLOCK, MENU, SINKS

__all__ = ["Conversion", "Progress", "convert", "save"]

PIECE = 1024
"""Tokens of a piece on which gradients are taken."""

Progress = Callable[[str, int, int], None]
"""Called with the stage in words, the steps done and all of them."""


@dataclass(frozen=True)
class Conversion:
    """What was chosen.

    Attributes:
        options: of ``configure(model, "converted", **options)``.
        report: the menu, the choice by layer, keys and estimated errors; JSON-able.
    """

    options: dict[str, Any]
    report: dict[str, Any]


def convert(
    model: Any,
    windows: Sequence[Tensor],
    *,
    keys: float | None = None,
    error: float | None = None,
    dense_layers: Sequence[int] = (),
    max_share: int | None = None,
    menu: Sequence[Pyramid | None] = MENU,
    block: int = BLOCK,
    sinks: int = SINKS,
    queries: int = 64,
    pieces: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Conversion:
    """Gives every head of a model the setting that the budget or the bound allows, and configures the model so.

    Args:
        model: a Transformers causal language model whose layers see their whole causal context; changed in place.
        windows: token ids [N] each, of one length, of calibration text like that which the model will read.
        keys: keys read per query, as a share of the mean causal context, over all layers and heads.
        error: instead of ``keys``, the highest estimated divergence from the original, in nats per token.
        dense_layers: layers that stay exact; they count as a whole context each.
        max_share: leave out settings whose choice more queries share; with 1 the model can be decoded with a cache.
        menu: settings to choose from; None is the near field and the sinks alone.
        block, sinks: of the near field.
        queries: sampled in each window.
        pieces: of :data:`PIECE` tokens, for the gradients.
        seed: of the sampled queries and labels.
        progress: told of every step.

    Returns:
        The choice. Deterministic for equal arguments on one machine.

    Raises:
        ValueError: when the model cannot be converted so, or no choice keeps the budget or the bound.
    """
    length = _common_length(windows, block)
    _check_target(keys, error)
    number = len(cores.attention_layers(model))
    dense = sorted(set(dense_layers))
    if any(not 0 <= layer < number for layer in dense):
        raise ValueError(f"dense layers {dense}: the model has layers 0 to {number - 1}")
    offered = [
        p if p is None else replace(p, sinks=sinks) for p in menu if p is None or p.share <= (max_share or p.share)
    ]
    read = torch.tensor([near_keys(length, block, sinks) + (keys_of(p, length, block) if p else 0.0) for p in offered])
    budget = None if keys is None else _left(keys, context(length), number, len(dense), float(read.min()))
    generator = torch.Generator().manual_seed(seed)
    errors = _calibrate(model, windows, offered, block, sinks, queries, pieces, generator, progress)
    free = [layer for layer in range(number) if layer not in dense]
    choice = torch.full(errors.shape[1:], -1, dtype=torch.long)
    if free:
        choice[free] = allocate(errors[:, free], read, budget=budget, bound=error)
    options: dict[str, Any] = {"block": block, "sinks": sinks, "layers": _entries(choice, offered, dense)}
    report = {
        "farfield": __version__,
        "asked": {"keys": keys, "error": error, "dense_layers": dense, "max_share": max_share},
        "length": length,
        "calibration": {"windows": len(windows), "queries": queries, "pieces": pieces, "seed": seed},
        **_summary(choice, errors, read, context(length)),
        "menu": [
            {"setting": None if p is None else _setting(p), "keys": k / context(length), "error": float(e.sum())}
            for p, k, e in zip(offered, read.tolist(), errors, strict=True)
        ],
    }
    configure(model, CONVERTED, **options)
    return Conversion(options, report)


def save(model: Any, tokenizer: Any, conversion: Conversion, folder: str | Path, **more: Any) -> None:
    """Writes model, tokenizer and `conversion.json` to a folder, which plain `from_pretrained` reads.

    Args:
        model, conversion: after and of :func:`convert`.
        tokenizer: the model's; None to write none.
        folder: made where it does not exist.
        **more: further entries of `conversion.json`.
    """
    path = Path(folder)
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    report = {**more, **conversion.report}
    (path / "conversion.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _common_length(windows: Sequence[Tensor], block: int) -> int:
    lengths = {len(ids) for ids in windows}
    if len(lengths) != 1:
        raise ValueError(f"calibration needs windows of one length, got lengths {sorted(lengths)}")
    (length,) = lengths
    if length <= 3 * block:
        raise ValueError(
            f"calibration windows of {length} tokens have no far field beside blocks of {block}: "
            f"more than {3 * block} tokens are needed"
        )
    return length


def _check_target(keys: float | None, error: float | None) -> None:
    if (keys is None) == (error is None):
        raise ValueError(f"keys={keys}, error={error}: exactly one of them would be accepted")
    if keys is not None and not 0 < keys <= 1:
        raise ValueError(f"keys={keys}: a share of the context in (0, 1], such as 0.12, would be accepted")
    if error is not None and not error > 0:
        raise ValueError(f"error={error}: a divergence > 0 in nats per token, such as 0.02, would be accepted")


def _left(keys: float, whole: float, layers: int, dense: int, least: float) -> float:
    """Keys per query for the heads of layers that do not stay dense."""
    free = layers - dense
    left = (keys * layers - dense) / free * whole if free else 0.0
    if left < least or (not free and keys < 1):
        reachable = (dense + free * least / whole) / layers
        raise ValueError(
            f"keys={keys:g} with {dense} dense layers of {layers}: the least that can be read is {reachable:.4f}"
        )
    return left


def _calibrate(
    model: Any,
    windows: Sequence[Tensor],
    menu: Sequence[Pyramid | None],
    block: int,
    sinks: int,
    queries: int,
    pieces: int,
    generator: torch.Generator,
    progress: Progress | None,
) -> Tensor:
    """[settings, layers, heads] mean errors over the windows."""
    layers = len(cores.attention_layers(model))
    device = next(model.parameters()).device
    done = {"gradients": 0, "settings": 0}
    steps = {"gradients": pieces, "settings": layers * len(windows)}

    def step(stage: str) -> None:
        done[stage] += 1
        if progress is not None:
            progress(stage, done[stage], steps[stage])

    # Equally far apart, so that text from every window and every place is among them.
    size = min(PIECE, len(windows[0]))
    chosen = [windows[i % len(windows)] for i in range(pieces)]
    starts = [round(i / max(1, pieces - 1) * (len(windows[0]) - size)) for i in range(pieces)]
    short = [ids[start : start + size].to(device) for ids, start in zip(chosen, starts, strict=True)]
    weight = fisher(model, short, generator, lambda: step("gradients"))
    total: Tensor | None = None
    for ids in windows:
        positions = sampled(len(ids), queries, generator).to(device)
        part = window_errors(
            model, ids.to(device), menu, weight, positions=positions, block=block, sinks=sinks,
            progress=lambda: step("settings"),
        )  # fmt: skip
        total = part if total is None else total + part
    assert total is not None
    return total.cpu() / len(windows)


def _entries(choice: Tensor, menu: Sequence[Pyramid | None], dense: Sequence[int]) -> list[Any]:
    """The settings of every layer, as the config holds them."""
    entries: list[Any] = []
    for layer, row in enumerate(choice.tolist()):
        if layer in dense:
            entries.append("dense")
            continue
        groups = []
        for number in sorted(set(row)):
            pyramid = menu[number]
            if pyramid is not None:
                groups.append(group_of([head for head, own in enumerate(row) if own == number], pyramid))
        entries.append(groups)
    return entries


def _setting(pyramid: Pyramid) -> dict[str, Any]:
    return {name: value for name, value in group_of([], pyramid).items() if name != "heads"}


def _summary(choice: Tensor, errors: Tensor, read: Tensor, whole: float) -> dict[str, Any]:
    """Keys and errors of the choice, in all and by layer; -1 is exact."""
    exact = choice < 0
    index = choice.clamp(min=0)
    keys = torch.where(exact, torch.tensor(whole), read[index]) / whole
    lost = errors.gather(0, index[None])[0].masked_fill(exact, 0.0)
    layers = [
        {"keys": k, "error": e, "settings": row}
        for k, e, row in zip(keys.mean(1).tolist(), lost.sum(1).tolist(), choice.tolist(), strict=True)
    ]
    return {"keys": float(keys.mean()), "estimated_divergence": float(lost.sum()), "layers": layers}
