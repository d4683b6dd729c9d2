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

__all__ = ["BLOCK", "RANK", "ByDims", "Parts", "Recipe", "Setting"]


@dataclass(frozen=True)
class ByDims:
    """A default that depends on the dimensions: the value in 1-D, in 2-D and in 3-D."""

    line: int
    plane: int
    volume: int

    def of(self, dims: int) -> int:
        """The default in that many dimensions."""
        return (self.line, self.plane, self.volume)[dims - 1]


BLOCK: Any = ByDims(64, 8, 4)
"""The default side of a block, 64 tokens or pixels in 1-D, 2-D and 3-D. Any, to stand as the default of an int."""

RANK: Any = ByDims(8, 2, 1)
"""The default rank per axis of a block of the default side."""


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
        parts: `parts(setting, **options) -> Parts`; its keyword arguments are the recipe's options. A default may be a
            :class:`ByDims`; the function is given its value.
        departures: where this differs from the paper or its released code, and why: the reading that was chosen where
            the two disagree or leave something open, and what is left out. Empty when there is nothing to say.
            docs/layer.md repeats it, and a test compares.
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
    departures: str = ""
    status: str = "tested"

    def options(self, dims: int | None = None) -> dict[str, Any]:
        """The options that `build` accepts beside the layer's arguments, with their defaults in `dims` dimensions.

        Without `dims`, in the first dimension in which the recipe works.
        """
        dims = self.dims[0] if dims is None else dims
        defaults = {p.name: p.default for p in list(inspect.signature(self.parts).parameters.values())[1:]}
        return {name: value.of(dims) if isinstance(value, ByDims) else value for name, value in defaults.items()}

    def build(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        layer: int = 0,
        dims: int | None = None,
        **arguments: Any,
    ) -> Attention:
        """The layer of this recipe.

        Args:
            dim, num_heads, causal: as in :class:`farfield.attention.Attention`.
            dims: 1, 2 or 3. Default: the first in which the recipe works, 1 for most.
            layer: index of the layer in its model; recipes that alternate choose by it.
            **arguments: options of the recipe, see `options()`, and the other arguments of the layer: `rope`,
                `num_kv_heads`, `head_dim`, `dropout`, `device`, `dtype`, ...

        Raises:
            TypeError: for an option that neither the recipe nor the layer has.
            ValueError: when the recipe cannot be causal or does not work in that many dimensions, or the layer refuses.
        """
        dims = self.dims[0] if dims is None else dims
        if dims not in self.dims:
            works = ", ".join(f"{d}-D" for d in self.dims)
            raise ValueError(f"recipe {self.name!r} works in {works}; dims={dims!r} was asked for")
        options, of_layer = self.options(dims), {}
        for name, value in arguments.items():
            if name in options:
                options[name] = value
            elif name in _LAYER_ARGUMENTS:
                of_layer[name] = value
            else:
                accepted = ", ".join(f"{key}={default!r}" for key, default in self.options(dims).items()) or "none"
                raise TypeError(f"recipe {self.name!r} has no option {name}={value!r}; its options: {accepted}")
        if causal and not self.causal:
            raise ValueError(f"recipe {self.name!r} cannot be causal: it reads later tokens")
        parts = self.parts(Setting(causal=causal, layer=layer, dims=dims), **options)
        return Attention(
            dim, num_heads, causal=causal, near=parts.near, far=parts.far, merge=parts.merge, dims=dims, **of_layer
        )


_LAYER_ARGUMENTS = frozenset(inspect.signature(Attention).parameters) - {
    "dim", "num_heads", "causal", "near", "far", "merge", "dims"
}  # fmt: skip
"""What a caller may say about the layer; the rest the recipe decides, or `build` names."""


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
