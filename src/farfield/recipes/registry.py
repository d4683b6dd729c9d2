"""The table of recipes: what a recipe is, and how one is found and built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from farfield.attention import Attention
from farfield.merge import Merge
from farfield.parts import FarPart, NearPart

__all__ = ["Parts", "Recipe", "Setting"]


@dataclass(frozen=True)
class Setting:
    """Where a recipe's layer will stand.

    Attributes:
        causal: whether the layer must be causal.
        layer: index of the layer in its model; some recipes alternate.
        dims: 1, 2 or 3.
    """

    causal: bool = False
    layer: int = 0
    dims: int = 1


@dataclass(frozen=True)
class Parts:
    """The three parts that a recipe chooses for one setting."""

    near: NearPart | None = None
    far: FarPart | None = None
    merge: str | Merge = "softmax"


@dataclass(frozen=True)
class Recipe:
    """A paper's attention as a composition of parts.

    Attributes:
        name: the key in the registry.
        title: what it is, in a few words.
        citation: authors, title, venue, arXiv id.
        near: the near field, for tables.
        far: the far field, for tables.
        merge: the merge, for tables.
        cost: score computations per head for n tokens.
        dims: dimensions in which it works.
        causal: whether it can be built causal.
        proof: id of the test that proves it right.
        parts: `parts(setting, **options) -> Parts`; its keyword arguments are the recipe's options.
        status: "tested" when the proof runs in the suite.
    """

    name: str
    title: str
    citation: str
    near: str
    far: str
    merge: str
    cost: str
    dims: tuple[int, ...]
    causal: bool
    proof: str
    parts: Callable[..., Parts]
    status: str = "tested"

    def options(self) -> dict[str, Any]:
        """The options that `build` accepts beside the layer's own arguments, with their defaults."""
        parameters = list(inspect.signature(self.parts).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def build(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        layer: int = 0,
        dims: int = 1,
        rope: float | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        qk_norm: bool = False,
        dropout: float = 0.0,
        **options: Any,
    ) -> Attention:
        """The layer of this recipe.

        Args:
            dim, num_heads, causal, dims, rope, num_kv_heads, head_dim, qkv_bias, proj_bias, qk_norm, dropout: as in
                :class:`farfield.attention.Attention`.
            layer: index of the layer in its model; recipes that alternate choose by it.
            **options: of the recipe, see `options()`.

        Raises:
            TypeError: for an option that the recipe does not have.
            ValueError: when the recipe cannot be causal or does not work in that many dimensions, or the layer refuses.
        """
        known = self.options()
        for name in options:
            if name not in known:
                accepted = ", ".join(f"{key}={value!r}" for key, value in known.items()) or "none"
                given = f"{name}={options[name]!r}"
                raise TypeError(f"recipe {self.name!r} has no option {given}; its options: {accepted}")
        if dims not in self.dims:
            works = ", ".join(f"{d}-D" for d in self.dims)
            raise ValueError(f"recipe {self.name!r} works in {works}; dims={dims!r} was asked for")
        if causal and not self.causal:
            raise ValueError(f"recipe {self.name!r} cannot be causal: its far field reads the whole sequence")
        parts = self.parts(Setting(causal=causal, layer=layer, dims=dims), **options)
        return Attention(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            causal=causal,
            near=parts.near,
            far=parts.far,
            merge=parts.merge,
            dims=dims,
            rope=rope,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            qk_norm=qk_norm,
            dropout=dropout,
        )


class Registry:
    """Recipes by name, in the order in which they were added."""

    def __init__(self, *recipes: Recipe) -> None:
        self._recipes = {recipe.name: recipe for recipe in recipes}

    def names(self) -> list[str]:
        """All names."""
        return list(self._recipes)

    def get(self, name: str) -> Recipe:
        """The recipe of that name.

        Raises:
            ValueError: for an unknown name, listing the known ones.
        """
        if name not in self._recipes:
            close = difflib.get_close_matches(str(name), self._recipes, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown recipe {name!r}{hint} Known recipes: {', '.join(self._recipes)}")
        return self._recipes[name]
