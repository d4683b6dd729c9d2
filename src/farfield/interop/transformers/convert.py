"""Converting a pretrained model to multipole attention without training: calibrate, allocate, configure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield import __version__
from farfield.far import Pyramid
from farfield.interop.transformers import cores
from farfield.interop.transformers.budget import allocate
from farfield.interop.transformers.calibration import BIASES, RECALL, Calibration, Progress, calibrate
from farfield.interop.transformers.keys import context, far_queries, keys_of, near_keys
from farfield.interop.transformers.layers import CONVERTED, group_of
from farfield.interop.transformers.loading import configure
from farfield.interop.transformers.menu import BLOCK, SINKS, menu_for

__all__ = ["Conversion", "Progress", "convert", "save"]

CALIBRATION = "calibration.safetensors"
"""The file of a converted model's folder that serves other budgets."""


@dataclass(frozen=True)
class Conversion:
    """What was chosen.

    Attributes:
        options: of ``configure(model, "converted", **options)``.
        report: the menu, the choice by layer, keys and estimated errors; JSON-able.
        calibration: what it was chosen by; serves other budgets too.
    """

    options: dict[str, Any]
    report: dict[str, Any]
    calibration: Calibration


def convert(
    model: Any,
    windows: Sequence[Tensor] = (),
    *,
    calibration: Calibration | None = None,
    keys: float | None = None,
    error: float | None = None,
    dense_layers: Sequence[int] = (),
    max_share: int | None = None,
    menu: Sequence[Pyramid | None] | None = None,
    block: int = BLOCK,
    sinks: int = SINKS,
    background: bool = False,
    recall: int = RECALL,
    queries: int = 64,
    pieces: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Conversion:
    """Gives every head of a model the setting that the budget or the bound allows, and configures the model so.

    Args:
        model: a Transformers causal language model whose layers see their whole causal context; changed in place.
        windows, block, sinks, recall, queries, pieces, seed, progress: of the calibration, see
            :func:`farfield.interop.transformers.calibration.calibrate`.
        menu: settings to choose from, None for :func:`farfield.interop.transformers.menu.menu_for` this length.
        calibration: one that was made before, of this model; instead of all of these.
        keys: keys read per query, as a share of the mean causal context, over all layers and heads.
        error: instead of ``keys``, the highest estimated divergence from the original, in nats per token.
        dense_layers: layers that stay exact; they count as a whole context each.
        max_share: leave out settings whose choice more queries share; with 1 those that hang on earlier queries at all,
            so that the model can be decoded with a cache.
        background: give every head for which the estimate falls a background cell (:class:`farfield.far.ByHead`).

    Returns:
        The choice. Deterministic for equal arguments on one machine.

    Raises:
        ValueError: when the model cannot be converted so, or no choice keeps the budget or the bound.
    """
    _check_target(keys, error)
    shape = _heads(model)
    number = shape[0]
    dense = sorted(set(dense_layers))
    if any(not 0 <= layer < number for layer in dense):
        raise ValueError(f"dense layers {dense}: the model has layers 0 to {number - 1}")
    if calibration is None:
        chosen = menu_for(max(map(len, windows), default=0)) if menu is None else menu
        with_sinks = [p if p is None else replace(p, sinks=sinks) for p in chosen]
        offered = [p for p in with_sinks if _allowed(p, max_share)]
        calibration = calibrate(
            model, windows, menu=offered, biases=BIASES, block=block, sinks=sinks, recall=recall,
            queries=queries, pieces=pieces, seed=seed, progress=progress,
        )  # fmt: skip
    if calibration.errors.shape[2:] != shape:
        raise ValueError(
            f"the calibration is of {list(calibration.errors.shape[2:])} layers and heads, the model has {list(shape)}"
        )
    made = calibration
    length, block, sinks = made.length, made.block, made.sinks
    few = [i for i, p in enumerate(made.menu) if _allowed(p, max_share)]
    some = [i for i, bias in enumerate(made.biases) if background or bias is None]
    kept, biases = [made.menu[i] for i in few], [made.biases[i] for i in some]
    errors, best = made.errors[few][:, some].min(1)
    near = near_keys(length, block, sinks)
    read, vectors = (
        torch.tensor([near + (keys_of(p, length, block, bounds) if p else 0.0) for p in kept]) for bounds in (1, 2)
    )
    more = far_queries(length, block, sinks) if len(biases) > 1 else 0.0
    budget = None if keys is None else _left(keys, context(length), number, len(dense), float(read.min()) + more)
    free = [layer for layer in range(number) if layer not in dense]
    choice = torch.full(errors.shape[1:], -1, dtype=torch.long)
    if free:
        # As if every head had a background.
        choice[free] = allocate(errors[:, free], read + more, budget=budget, bound=error)
    options: dict[str, Any] = {"block": block, "sinks": sinks, "layers": _entries(choice, kept, dense)}
    spent = read[choice.clamp(min=0)]
    if len(biases) > 1:
        rows = _biases(choice, best, biases, dense)
        options["background"] = rows
        spent = spent + more * torch.tensor([[b is not None for b in row or [None] * shape[1]] for row in rows])
    report = {
        "farfield": __version__,
        "asked": {
            "keys": keys, "error": error, "dense_layers": dense, "max_share": max_share, "background": background,
        },
        "length": length,
        "calibration": made.effort,
        **_summary(choice, errors, spent, context(length)),
        # What is read where a cell that is scored by its bounds counts as two vectors.
        "vectors": float(_shares(choice, spent + (vectors - read)[choice.clamp(min=0)], context(length)).mean()),
        "menu": [
            {"setting": None if p is None else _setting(p), "keys": k / context(length), "error": float(e.sum())}
            for p, k, e in zip(kept, read.tolist(), errors, strict=True)
        ],
    }  # fmt: skip
    configure(model, CONVERTED, **options)
    return Conversion(options, report, made)


def _heads(model: Any) -> tuple[int, int]:
    """Layers and query heads."""
    return len(cores.attention_layers(model)), model.config.num_attention_heads


def save(model: Any, tokenizer: Any, conversion: Conversion, folder: str | Path, **more: Any) -> None:
    """Writes model, tokenizer, `conversion.json` and `calibration.safetensors` to a folder for plain `from_pretrained`.

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
    conversion.calibration.save(path / CALIBRATION)


def _check_target(keys: float | None, error: float | None) -> None:
    if (keys is None) == (error is None):
        raise ValueError(f"keys={keys}, error={error}: exactly one of them would be accepted")
    if keys is not None and not 0 < keys <= 1:
        raise ValueError(f"keys={keys}: a share of the context in (0, 1], such as 0.12, would be accepted")
    if error is not None and not error > 0:
        raise ValueError(f"error={error}: a divergence > 0 in nats per token, such as 0.02, would be accepted")


def _allowed(pyramid: Pyramid | None, max_share: int | None) -> bool:
    """Whether no more queries than that share its choice; with 1, whether it needs no queries but its own."""
    if pyramid is None or max_share is None:
        return True
    if max_share == 1:
        return not pyramid.needs_queries
    return pyramid.way[1] <= max_share


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


def _biases(
    choice: Tensor, best: Tensor, biases: Sequence[float | None], dense: Sequence[int]
) -> list[list[float | None] | None]:
    """The bias of every head's background by layer, where ``best`` [settings, layers, heads] are the best numbers."""
    rows = best.gather(0, choice.clamp(min=0)[None])[0].tolist()
    return [None if layer in dense else [biases[i] for i in row] for layer, row in enumerate(rows)]


def _setting(pyramid: Pyramid) -> dict[str, Any]:
    return {name: value for name, value in group_of([], pyramid).items() if name != "heads"}


def _shares(choice: Tensor, spent: Tensor, whole: float) -> Tensor:
    """[layers, heads] of the whole context."""
    return torch.where(choice < 0, torch.tensor(whole), spent) / whole


def _summary(choice: Tensor, errors: Tensor, spent: Tensor, whole: float) -> dict[str, Any]:
    """Keys and errors of the choice, in all and by layer; -1 is exact. ``spent`` [layers, heads] keys per query."""
    keys = _shares(choice, spent, whole)
    lost = errors.gather(0, choice.clamp(min=0)[None])[0].masked_fill(choice < 0, 0.0)
    layers = [
        {"keys": k, "error": e, "settings": row}
        for k, e, row in zip(keys.mean(1).tolist(), lost.sum(1).tolist(), choice.tolist(), strict=True)
    ]
    return {"keys": float(keys.mean()), "estimated_divergence": float(lost.sum()), "layers": layers}
