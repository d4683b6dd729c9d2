"""Recipes: published attentions as compositions of a near field, a far field and a merge. One short file each."""

from __future__ import annotations

from typing import Any

from farfield.attention import Attention
from farfield.recipes import (
    agent,
    blocks,
    davit,
    dense,
    dina,
    flashvggt,
    fma,
    fma2d,
    focal,
    gcvit,
    gfnet,
    gna,
    inline,
    l2vit,
    mano,
    maxvit,
    na,
    relay,
    s2a,
    scale_dit,
    swin,
    transformer_ls,
    window,
)
from farfield.recipes.registry import Parts, Recipe, Registry, Setting

__all__ = ["Parts", "Recipe", "Setting", "build", "get", "names", "options"]

_REGISTRY = Registry(
    dense.RECIPE,
    window.RECIPE,
    fma.RECIPE,
    fma2d.RECIPE,
    blocks.RECIPE,
    transformer_ls.RECIPE,
    agent.RECIPE,
    l2vit.RECIPE,
    na.RECIPE,
    dina.RECIPE,
    gna.RECIPE,
    swin.RECIPE,
    maxvit.RECIPE,
    gcvit.RECIPE,
    davit.RECIPE,
    mano.RECIPE,
    focal.RECIPE,
    s2a.RECIPE,
    inline.RECIPE,
    gfnet.RECIPE,
    scale_dit.RECIPE,
    relay.RECIPE,
    flashvggt.RECIPE,
)


def names() -> list[str]:
    """The names of all recipes."""
    return _REGISTRY.names()


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    return _REGISTRY.get(name)


def options(name: str, dims: int | None = None) -> dict[str, Any]:
    """The options of a recipe with their defaults in `dims` dimensions (by default the first in which it works).

    Raises:
        ValueError: for an unknown name.
    """
    return get(name).options(dims)


def build(name: str, dim: int, num_heads: int, *, causal: bool = False, **arguments: Any) -> Attention:
    """The layer of a recipe.

    Args:
        name: of the recipe.
        dim: width of input and output.
        num_heads: query heads.
        causal: token i depends on tokens 0..i only.
        **arguments: `layer`, `dims`, `rope` and the other arguments of :meth:`Recipe.build`, and the recipe's options.

    Raises:
        ValueError: for an unknown name, or a recipe that cannot be built so.
        TypeError: for an option that the recipe does not have, naming those it has.
    """
    return get(name).build(dim, num_heads, causal=causal, **arguments)
