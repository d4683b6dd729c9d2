"""Variants of attentions by a name of one's own: LABEL=RECIPE[:OPTION=VALUE...]."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from farfield import recipes

__all__ = ["Variant", "parse_variant"]

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Variant:
    """An attention as it is studied.

    Attributes:
        label: its name in tables and files.
        recipe: name of the recipe.
        options: of the recipe.
    """

    label: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_variant(text: str) -> Variant:
    """``fma+open=fma:block=64:open=16:choose=bounds``; ``window`` alone is ``window=window``.

    Values that read as Python literals become them, others stay text.

    Raises:
        ValueError: for another form, a label that cannot be part of a file's name, or an unknown recipe or option.
    """
    head, *pairs = text.split(":")
    label, equals, recipe = head.partition("=")
    recipe = recipe if equals else label
    if not _LABEL.fullmatch(label):
        raise ValueError(
            f"{text!r} is not a variant: write LABEL=RECIPE[:OPTION=VALUE...], such as mean=fma:summary=mean, with a "
            "label of letters, digits and . _ + -"
        )
    recipes.get(recipe)
    known = recipes.options(recipe)
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"{pair!r} in variant {text!r} is no option of {recipe}; it takes {', '.join(known) or 'none'}"
            )
        if name in options:
            raise ValueError(f"option {name!r} comes twice in variant {text!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return Variant(label, recipe, options)
