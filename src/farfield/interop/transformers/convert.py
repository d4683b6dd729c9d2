"""Converting a pretrained model to multipole attention without training: calibrate, allocate, configure.

A head is offered every setting of the calibration, alone and with an expansion, and to see all tokens exactly, which
reads the whole context and errs nowhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farfield import __version__
from farfield.far import Expansion, Pyramid
from farfield.interop.transformers import cores
from farfield.interop.transformers.budget import allocate
from farfield.interop.transformers.calibration import (
    BIASES,
    RECALL,
    Calibration,
    Progress,
    calibrate,
    common_length,
    entry_of,
    fingerprint,
)
from farfield.interop.transformers.keys import context, expansion_keys
from farfield.interop.transformers.layers import CONVERTED, group_of
from farfield.interop.transformers.loading import configure
from farfield.interop.transformers.menu import BLOCK, SINKS, Keeps, Setting, keys_of_setting, menu_for

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
    retrieval: float | None = None,
    exact_heads: bool = True,
    menu: Sequence[Setting] | None = None,
    block: int = BLOCK,
    sinks: int = SINKS,
    centres: Sequence[int] = (),
    recall_weight: float = 0.5,
    recall: int = RECALL,
    queries: int = 64,
    pieces: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
    calibrated: Callable[[Calibration], None] | None = None,
) -> Conversion:
    """Gives every head of a model the setting that the budget or the bound allows, and configures the model so.

    Args:
        model: a Transformers causal language model whose layers see their whole causal context; changed in place.
        windows, block, sinks, recall, queries, pieces, seed, progress: of the calibration, see
            :func:`farfield.interop.transformers.calibration.calibrate`.
        menu: settings to choose from, None for :func:`farfield.interop.transformers.menu.menu_for` this length.
        calibration: one that was made before, of this model; instead of all of these.
        calibrated: called with a calibration as soon as it is made: what is asked of it may still be refused.
        keys: keys read per query, as a share of the mean causal context, over all layers and heads.
        error: instead of ``keys``, the highest estimated divergence from the original, in nats per token.
        dense_layers: layers that stay exact; they count as a whole context each.
        max_share: leave out settings whose choice more queries share; with 1 those that hang on earlier queries at all,
            so that the model can be decoded with a cache.
        retrieval: most key heads that may keep all their tokens when decoding, as a share of all of them, those of
            layers that stay exact among them: cells are opened by the heads that read these alone. Others keep the last
            blocks and what centres keep (``centres``), which does not grow with the context. None for no limit.
        exact_heads: offer every head to see all tokens exactly.
        centres: offer expansions about so many centres of each head's queries (:class:`farfield.far.Expansion`): those
            that keep tokens as settings of their own, and, about the fewest, one of everything far beside every other
            setting. Empty for no expansions. With a calibration, some of its numbers; beside other settings it knows
            expansions about its own fewest alone.
        recall_weight: how much errors in ends that repeat what stood far before count, beside plain text, of 1.

    Returns:
        The choice. Deterministic for equal arguments on one machine.

    Raises:
        ValueError: when the model cannot be converted so, or no choice keeps the budget or the bound.
    """
    _check_target(keys, error)
    if isinstance(centres, int):
        raise TypeError(f"centres={centres}: a sequence of numbers, such as (8, 16, 32), would be accepted")
    numbers = sorted(set(centres))
    if not 0 <= recall_weight <= 1:
        raise ValueError(f"recall_weight={recall_weight}: a share from 0 to 1 would be accepted")
    shape = _heads(model)
    number = shape[0]
    dense = sorted(set(dense_layers))
    if any(not 0 <= layer < number for layer in dense):
        raise ValueError(f"dense layers {dense}: the model has layers 0 to {number - 1}")
    each, most = _retrieval(model, retrieval, number, len(dense))
    if calibration is None:
        chosen = menu_for(max(map(len, windows), default=0), numbers) if menu is None else menu
        with_sinks = [replace(p, sinks=sinks) if isinstance(p, Pyramid) else p for p in chosen]
        offered = [p for p in with_sinks if _allowed(p, max_share)]
        length = common_length(windows, block)
        several = _offers(offered, numbers, numbers, None, exact_heads)
        _check_offers(several, centres, max_share)
        if keys is not None:  # before the long work: what is read does not hang on it
            least = min(offer.keys(length, block, sinks, 0, 1) for offer in several)
            _left(keys, context(length), number, len(dense), least)
        calibration = calibrate(
            model, windows, menu=offered, biases=BIASES, block=block, sinks=sinks, centres=numbers,
            recall=recall, queries=queries, pieces=pieces, seed=seed, progress=progress,
        )  # fmt: skip
        if calibrated is not None:
            calibrated(calibration)
    elif calibration.model != fingerprint(model):
        raise ValueError(
            f"the calibration is of another model: its weights and config have the fingerprint {calibration.model}, "
            f"those of this one {fingerprint(model)}. Convert from text"
        )
    made = calibration
    if not set(numbers) <= set(made.centres):
        known = ", ".join(map(str, sorted(made.centres))) or "no"
        raise ValueError(
            f"centres={tuple(centres)}: the calibration has {known} centres for each head; some of these numbers, or "
            "none, would be accepted"
        )
    length, block, sinks = made.length, made.block, made.sinks
    offers = _offers(made.menu, tuple(made.centres), numbers, max_share, exact_heads)
    _check_offers(offers, centres, max_share)
    by_bias = made.weighed(recall_weight)
    plain = made.biases.index(None)
    biases = [i for i, bias in enumerate(made.biases) if bias is not None]
    # Beside every setting the bias that suits the head.
    better, best = by_bias[:, biases].min(1) if biases else (by_bias[:, plain], None)
    nothing = torch.zeros(shape)
    errors = torch.stack(
        [nothing if o.exact else better[o.place] if o.expansion else by_bias[o.place, plain] for o in offers]
    )
    read, vectors = (
        torch.tensor([o.keys(length, block, sinks, made.width, bounds) for o in offers]) for bounds in (1, 2)
    )
    budget = None if keys is None else _left(keys, context(length), number, len(dense), float(read.min()))
    free = [layer for layer in range(number) if layer not in dense]
    choice = torch.full(errors.shape[1:], -1, dtype=torch.long)
    opens = torch.tensor([o.opens for o in offers])
    if free:
        choice[free] = allocate(errors[:, free], read, budget=budget, bound=error, apart=opens, shared=each, most=most)
    whole = opens[choice.clamp(min=0)] | (choice < 0)
    options: dict[str, Any] = {"block": block, "sinks": sinks, "layers": _entries(choice, offers, dense)}
    exact = [[head for head, i in enumerate(row) if i >= 0 and offers[i].exact] for row in choice.tolist()]
    if any(exact):
        options["exact"] = exact
    if best is not None and any(offers[i].expansion for i in set(choice.flatten().tolist()) if i >= 0):
        chosen_bias = torch.tensor([made.biases[i] for i in biases])[best]  # [settings, layers, heads]
        options["expansions"] = [
            _expansions(row, offers, chosen_bias[:, layer], {n: x[layer] for n, x in made.centres.items()})
            for layer, row in enumerate(choice.tolist())
        ]
    spent = read[choice.clamp(min=0)]
    report = {
        "farfield": __version__,
        "asked": {
            "keys": keys, "error": error, "dense_layers": dense, "max_share": max_share, "centres": numbers,
            "recall_weight": recall_weight, "retrieval": retrieval, "exact_heads": exact_heads,
        },
        "length": length,
        "calibration": made.effort,
        **_summary(choice, errors, spent, context(length)),
        # What is read where a cell that is scored by its bounds counts as two vectors.
        "vectors": float(_shares(choice, spent + (vectors - read)[choice.clamp(min=0)], context(length)).mean()),
        # Key heads all of whose tokens decoding keeps, as a share.
        "retrieval": float(whole.unflatten(1, (-1, each)).any(-1).float().mean()),
        "menu": [
            {
                "setting": {"exact": True} if o.exact else _named(o.setting), "expansion": o.expansion,
                "keys": k / context(length),
                "error": float(e.sum()),
            }
            for o, k, e in zip(offers, read.tolist(), errors, strict=True)
        ],
    }  # fmt: skip
    configure(model, CONVERTED, **options)
    return Conversion(options, report, made)


@dataclass(frozen=True)
class _Offer:
    """What a head can be given: a setting of the menu, at ``place`` there, alone or with an expansion; or everything.

    Beside a pyramid, or nothing, the expansion is one of ``number`` centres; that of a setting that keeps tokens is its
    own. With ``exact`` there is no setting.
    """

    place: int
    setting: Setting
    expansion: bool
    number: int = 0
    exact: bool = False

    @property
    def opens(self) -> bool:
        """Whether decoding has to keep all tokens."""
        return self.exact or (isinstance(self.setting, Pyramid) and bool(self.setting.open))

    def keys(self, length: int, block: int, sinks: int, dim: int, bounds: int) -> float:
        """Mean keys read, see :mod:`farfield.interop.transformers.keys`."""
        if self.exact:
            return context(length)
        own = keys_of_setting(self.setting, length, block, sinks, dim, bounds)
        return own + (expansion_keys(self.number, dim, bounds) if self.number else 0.0)


def _offers(
    menu: Sequence[Setting], known: Sequence[int], numbers: Sequence[int], max_share: int | None, exact: bool
) -> list[_Offer]:
    """Settings of a calibration that are asked for, first without, then with expansions, and to see everything.

    Of the numbers of centres that it knows ``numbers`` are asked for.
    """
    few = [(i, p) for i, p in enumerate(menu) if _allowed(p, max_share)]
    others = [(i, p) for i, p in few if not isinstance(p, Keeps)]
    offers = [_Offer(i, p, False) for i, p in others]
    fewest = min(known, default=0)
    if fewest in numbers:
        offers += [_Offer(i, p, True, fewest) for i, p in others]
    offers += [_Offer(i, p, True) for i, p in few if isinstance(p, Keeps) and p.number in numbers]
    return [*offers, _Offer(-1, None, False, exact=True)] if exact else offers


def _check_offers(offers: Sequence[_Offer], centres: Sequence[int], max_share: int | None) -> None:
    if not offers:
        raise ValueError(
            f"nothing is offered with centres={tuple(centres)}, max_share={max_share}, exact_heads=False: more of them "
            "is needed"
        )


def _heads(model: Any) -> tuple[int, int]:
    """Layers and query heads."""
    return len(cores.attention_layers(model)), model.config.num_attention_heads


def _retrieval(model: Any, share: float | None, layers: int, dense: int) -> tuple[int, int | None]:
    """How many heads read a key head, and how many key heads of layers that do not stay exact may keep all tokens."""
    heads = model.config.num_attention_heads
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    if share is None:
        return heads // kv_heads, None
    if not 0 <= share <= 1:
        raise ValueError(f"retrieval={share}: a share of key heads from 0 to 1 would be accepted")
    most = int(share * layers * kv_heads + 1e-9) - dense * kv_heads
    if most < 0:
        raise ValueError(
            f"retrieval={share:g} with {dense} exact layers of {layers}, whose key heads keep all tokens: at least "
            f"{math.ceil(1000 * dense / layers) / 1000:.3f} would be accepted"
        )
    return heads // kv_heads, most


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


def _allowed(setting: Setting, max_share: int | None) -> bool:
    """Whether no more queries than that share its choice; with 1, whether it needs no queries but its own."""
    if setting is None or max_share is None:
        return True
    if isinstance(setting, Keeps):  # centres choose, and hang on no query
        return True
    if max_share == 1:
        return not setting.needs_queries
    return setting.way[1] <= max_share


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


def _entries(choice: Tensor, offers: Sequence[_Offer], dense: Sequence[int]) -> list[Any]:
    """The pyramids of every layer, as the config holds them."""
    entries: list[Any] = []
    for layer, row in enumerate(choice.tolist()):
        if layer in dense:
            entries.append("dense")
            continue
        settings = [offers[number].setting for number in row]
        pyramids = dict.fromkeys(p for p in settings if isinstance(p, Pyramid))
        entries.append([group_of([h for h, own in enumerate(settings) if own == p], p) for p in pyramids])
    return entries


def _expansions(
    row: Sequence[int], offers: Sequence[_Offer], bias: Tensor, centres: dict[int, Tensor]
) -> list[dict[str, Any]]:
    """The expansions of a layer, as the config holds them.

    Args:
        row: [heads] numbers of offers; -1 for a layer that stays exact.
        bias: [settings, heads] of the expansion beside each setting.
        centres: [heads, C, D] for every number C of them.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for head, number in enumerate(row):
        offer = offers[number] if number >= 0 else None
        if offer is not None and offer.expansion:
            own = offer.setting if isinstance(offer.setting, Keeps) else Keeps(offer.number, 0)
            alike.setdefault((own.number, own.open), []).append(head)
    made = [
        Expansion.of(
            tuple(heads), tuple(float(bias[offers[row[h]].place, h]) for h in heads), centres[number][heads], open
        )
        for (number, open), heads in alike.items()
    ]
    return [{name: list(x) if isinstance(x, tuple) else x for name, x in asdict(one).items()} for one in made]


def _named(setting: Setting) -> dict[str, Any] | None:
    entry = entry_of(setting)
    return None if entry is None else {name: value for name, value in entry.items() if name != "heads"}


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
