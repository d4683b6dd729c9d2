"""Settings by layer and head, as a converted model's config holds them: numbers and lists that JSON can say.

``config.farfield`` is then ``{"recipe": "converted", "options": {"block": 64, "sinks": 16, "layers": [...]}}`` with one
entry per layer: "dense", or a list of groups ``{"heads": [0, 4], "rank": 2, "open": 64, ...}``. Heads that are named
nowhere see the near field and the sinks only. ``"expansions"``, where it is there, has one entry per layer too: a list
of the fields of each :class:`farfield.far.Expansion`, ``{"heads": [..], "bias": [..], "number": 8, "centres":
"<base64>", "open": 0}``; and ``"exact"`` lists the heads of each layer that see everything. No group has parameters,
so that plain ``from_pretrained`` reads such a model.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from farfield.far import ByHead, Expansion, Pyramid
from farfield.near import Blocks, Dense
from farfield.recipes import Parts

__all__ = ["CONVERTED", "check", "group_of", "layer_parts", "pyramid_of", "setting_of_layer"]

CONVERTED = "converted"
"""The name that stands where a recipe's does."""

_OPTIONS = ("block", "sinks", "layers", "expansions", "exact")
_SETTINGS = (
    "rank", "levels", "count_bias", "open", "beam", "page", "share", "beam_share", "recent", "rest", "choose",
)  # fmt: skip
_DEFAULTS = {f.name: f.default for f in fields(Pyramid) if f.name in _SETTINGS}


def group_of(heads: list[int], pyramid: Pyramid) -> dict[str, Any]:
    """A group as the config holds it: what differs from the pyramid's defaults.

    Raises:
        ValueError: for a pyramid with parameters, which has no place there.
    """
    without = (pyramid.bias, pyramid.open_bias, pyramid.query_rank)
    if pyramid.summary != "mean" or any(value is not None for value in without):
        raise ValueError(
            f"{pyramid!r}: summary='mean', bias=None, open_bias=None and query_rank=None would be accepted"
        )
    named = {name: getattr(pyramid, name) for name in _SETTINGS}
    return {"heads": list(heads), **{k: v for k, v in named.items() if v != _DEFAULTS[k]}}


def pyramid_of(group: dict[str, Any], sinks: int) -> tuple[tuple[int, ...], Pyramid]:
    """Heads and pyramid of a group as the config holds it: the inverse of :func:`group_of`.

    Raises:
        ValueError, TypeError: for settings that make no sense, with the reason.
    """
    unknown = sorted(set(group) - {"heads", *_SETTINGS})
    if unknown:
        raise ValueError(f"a group of heads has settings {unknown}; heads and {', '.join(_SETTINGS)} are known")
    own = {name: value for name, value in group.items() if name != "heads"}
    return tuple(group.get("heads", ())), Pyramid(summary="mean", bias=None, sinks=sinks, **own)


def check(options: dict[str, Any]) -> dict[str, Any]:
    """The options with defaults filled in.

    Raises:
        TypeError: for an unknown option, or layers that are no list.
        ValueError: for a layer that makes no sense.
    """
    _refuse_background(options)
    options = {name: value for name, value in options.items() if name != "background"}
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown or not isinstance(options.get("layers"), list | tuple):
        raise TypeError(
            "settings by layer are block=, sinks=, layers= (a list, one entry per layer), expansions= and exact= (the "
            "same); "
            f"got {sorted(options)}, layers of type {type(options.get('layers')).__name__}"
        )
    whole = {"block": 64, "sinks": 16, "expansions": None, "exact": None, **options}
    for name in ("expansions", "exact"):
        more = whole[name]
        if more is not None and (not isinstance(more, list | tuple) or len(more) != len(whole["layers"])):
            given = f"{len(more)} entries" if isinstance(more, list | tuple) else repr(more)
            raise ValueError(f"{name}={given}: a list of {len(whole['layers'])} entries, one per layer, is needed")
    for layer in range(len(whole["layers"])):
        layer_parts(**setting_of_layer(whole, layer))
    return whole


def setting_of_layer(options: dict[str, Any], layer: int) -> dict[str, Any]:
    """What :func:`layer_parts` takes for one layer; hashable where its items are.

    Raises:
        ValueError: for a layer that the settings do not have.
    """
    _refuse_background(options)
    entries = options["layers"]
    if layer >= len(entries):
        raise ValueError(f"the model has a layer {layer}, and settings for {len(entries)} layers only")
    entry = entries[layer]
    groups = entry if isinstance(entry, str) else tuple(tuple(_frozen(group).items()) for group in entry)
    expansions = (options.get("expansions") or [[]] * len(entries))[layer]
    if not isinstance(expansions, list | tuple):
        raise TypeError(
            f"expansions of a layer are {type(expansions).__name__}: a list of them would be accepted; a model that an "
            "earlier version converted has to be converted again"
        )
    exact = (options.get("exact") or [[]] * len(entries))[layer]
    if not isinstance(exact, list | tuple):
        raise TypeError(f"exact heads of a layer are {exact!r}: a list of numbers would be accepted")
    return {
        "block": options.get("block", 64),
        "sinks": options.get("sinks", 16),
        "groups": groups,
        "expansions": tuple(tuple(_frozen(expansion).items()) for expansion in expansions),
        "exact": tuple(exact),
    }


def _refuse_background(options: dict[str, Any]) -> None:
    """Of what earlier versions wrote, a cell of means beside the settings is no longer there."""
    if any(row is not None for row in options.get("background") or ()):
        raise ValueError(
            "the settings have background=, which earlier versions wrote and this one replaced by expansions: convert "
            "the model again, from text"
        )


def _frozen(group: Any) -> dict[str, Any]:
    if not isinstance(group, dict):
        raise TypeError(f"a group or an expansion is {group!r}: a dict with 'heads' and settings is needed")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}


def _expansion_of(given: dict[str, Any]) -> Expansion:
    names = tuple(f.name for f in fields(Expansion))
    if set(given) != set(names):
        raise ValueError(f"an expansion has {sorted(given)}: {', '.join(names)} are needed")
    return Expansion(**given)


def layer_parts(
    block: int,
    sinks: int,
    groups: str | tuple[Any, ...],
    expansions: tuple[Any, ...] = (),
    exact: tuple[int, ...] = (),
) -> Parts:
    """The parts of one layer.

    Args:
        block: tokens of a leaf block.
        sinks: leading tokens that are always seen.
        groups: "dense", or for every group the items of its settings.
        expansions: the items of every :class:`farfield.far.Expansion`.
        exact: heads that see every token.

    Raises:
        ValueError, TypeError: for settings that make no sense, with the reason.
    """
    if isinstance(groups, str):
        if groups != "dense":
            raise ValueError(f"settings of a layer are {groups!r}: 'dense' or a list of groups would be accepted")
        if expansions or exact:
            raise ValueError(
                "a dense layer with expansions or exact heads: nothing is far there; an empty list is needed"
            )
        return Parts(near=Dense(), far=None, merge="softmax")
    made = [pyramid_of(dict(items), sinks) for items in groups]
    summed = tuple(_expansion_of(dict(items)) for items in expansions)
    far = ByHead(tuple(made), sinks=sinks, expansions=summed, exact=exact)
    return Parts(near=Blocks(block), far=far, merge="softmax")
