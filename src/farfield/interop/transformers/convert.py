"""Converting a pretrained model to multipole attention without training: calibrate, allocate, configure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield import __version__
from farfield.far import Expansion, Pyramid
from farfield.interop.transformers import cores
from farfield.interop.transformers.budget import allocate
from farfield.interop.transformers.calibration import BIASES, RECALL, Calibration, Progress, calibrate
from farfield.interop.transformers.keys import context, expansion_keys, keys_of, near_keys
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
    centres: int = 0,
    recall_weight: float = 0.5,
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
        centres: offer every setting also with everything far in one more cell, expanded about so many centres of each
            head's queries (:class:`farfield.far.Expansion`); 0 for no expansions. With a calibration, its number, or 0.
        recall_weight: how much errors in ends that repeat what stood far before count, beside plain text, of 1.

    Returns:
        The choice. Deterministic for equal arguments on one machine.

    Raises:
        ValueError: when the model cannot be converted so, or no choice keeps the budget or the bound.
    """
    _check_target(keys, error)
    if not 0 <= recall_weight <= 1:
        raise ValueError(f"recall_weight={recall_weight}: a share from 0 to 1 would be accepted")
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
            model, windows, menu=offered, biases=BIASES, block=block, sinks=sinks, centres=centres,
            recall=recall, queries=queries, pieces=pieces, seed=seed, progress=progress,
        )  # fmt: skip
    if calibration.errors.shape[3:] != shape:
        raise ValueError(
            f"the calibration is of {list(calibration.errors.shape[3:])} layers and heads, the model has {list(shape)}"
        )
    made = calibration
    if centres not in (0, made.centres.shape[2]):
        raise ValueError(
            f"centres={centres}: the calibration has {made.centres.shape[2]} centres for each head; that number, or 0, "
            "would be accepted"
        )
    length, block, sinks = made.length, made.block, made.sinks
    few = [i for i, p in enumerate(made.menu) if _allowed(p, max_share)]
    kept = [made.menu[i] for i in few]
    by_bias = made.weighed(recall_weight)[few]
    plain = made.biases.index(None)
    biases = [i for i, bias in enumerate(made.biases) if bias is not None and centres]
    near = near_keys(length, block, sinks)
    read, vectors = (
        torch.tensor([near + (keys_of(p, length, block, bounds) if p else 0.0) for p in kept]) for bounds in (1, 2)
    )
    errors = by_bias[:, plain]
    if biases:
        # Every setting once more, with the bias that suits the head.
        better, best = by_bias[:, biases].min(1)
        more = [expansion_keys(made.centres.shape[2], made.centres.shape[3], bounds) for bounds in (1, 2)]
        errors = torch.cat([errors, better])
        read, vectors = (torch.cat([x, x + n]) for x, n in zip((read, vectors), more, strict=True))
    budget = None if keys is None else _left(keys, context(length), number, len(dense), float(read.min()))
    free = [layer for layer in range(number) if layer not in dense]
    choice = torch.full(errors.shape[1:], -1, dtype=torch.long)
    if free:
        choice[free] = allocate(errors[:, free], read, budget=budget, bound=error)
    expanded = choice >= len(kept)
    options: dict[str, Any] = {"block": block, "sinks": sinks, "layers": _entries(choice, kept, dense)}
    if expanded.any():
        chosen_bias = torch.tensor([made.biases[i] for i in biases])[best]  # [settings, layers, heads]
        options["expansions"] = [
            _expansion(row, own, bias, of_layer)
            for row, own, bias, of_layer in zip(
                expanded, choice % len(kept), chosen_bias.unbind(1), made.centres, strict=True
            )
        ]
    spent = read[choice.clamp(min=0)]
    report = {
        "farfield": __version__,
        "asked": {
            "keys": keys, "error": error, "dense_layers": dense, "max_share": max_share, "centres": centres,
            "recall_weight": recall_weight,
        },
        "length": length,
        "calibration": made.effort,
        **_summary(choice, errors, spent, context(length)),
        # What is read where a cell that is scored by its bounds counts as two vectors.
        "vectors": float(_shares(choice, spent + (vectors - read)[choice.clamp(min=0)], context(length)).mean()),
        "menu": [
            {
                "setting": None if p is None else _setting(p), "expansion": expansion, "keys": k / context(length),
                "error": float(e.sum()),
            }
            for (expansion, p), k, e in zip(
                ((more, p) for more in (False, True)[: 2 if biases else 1] for p in kept), read.tolist(), errors,
                strict=True,
            )
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
    """The settings of every layer, as the config holds them; numbers beyond the menu's are those with an expansion."""
    entries: list[Any] = []
    for layer, row in enumerate((choice % len(menu)).tolist()):
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


def _expansion(expanded: Tensor, choice: Tensor, bias: Tensor, centres: Tensor) -> dict[str, Any] | None:
    """The expansion of a layer, as the config holds it.

    Args:
        expanded: [heads] bool, which have one.
        choice: [heads] numbers of settings.
        bias: [settings, heads] of the expansion beside each setting.
        centres: [heads, C, D].
    """
    heads = expanded.nonzero()[:, 0]
    if not len(heads):
        return None
    made = Expansion.of(tuple(heads.tolist()), tuple(bias[choice[heads], heads].tolist()), centres[heads])
    return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(made).items()}


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
