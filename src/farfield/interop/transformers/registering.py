"""Making Transformers know the names "farfield" and "farfield:<recipe>"."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from farfield import recipes
from farfield.interop.transformers.attention import attention_function
from farfield.interop.transformers.backbone import register_vision
from farfield.interop.transformers.masks import mask

__all__ = ["register"]


def register() -> tuple[str, ...]:
    """Makes `attn_implementation="farfield"` and "farfield:<recipe>" work for every model; any number of times.

    Recipes for three dimensions alone are left out: no layer of a model has such a grid. The Auto classes learn
    farfield's own vision models, too.

    Returns:
        The names.
    """
    names = ("farfield", *(f"farfield:{name}" for name in recipes.names() if min(recipes.get(name).dims) < 3))
    known = AttentionInterface().valid_keys()
    for name in names:
        if name not in known:
            AttentionInterface.register(name, attention_function(name.partition(":")[2] or None))
            AttentionMaskInterface.register(name, mask)
    register_vision()
    return names
