"""Attention on a grid of patches with class and register tokens before it, for vision transformers of other libraries.

The tokens of such a model are `prefix` tokens that have no place in the image (class token, registers), then the
patches in row-major order. Here

- every patch sees the patches through the recipe, and all prefix tokens exactly: one joint softmax over both;
- every prefix token sees all tokens exactly, which costs prefix * N.

So each token is seen once by each, as in the model's own attention, and no summary ever mixes a class token in.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield import recipes
from farfield.attention import ReadyAttention
from farfield.near.dense import Dense, dense_output
from farfield.ops.state import attend_dense, merge_states
from farfield.parts import Inputs, LayerSpec
from farfield.recipes import Setting

__all__ = ["DEFAULTS", "GridAttention", "PatchGrid", "grid_options"]

DEFAULTS: dict[str, dict[str, Any]] = {key: {"summary": "mean", "bias": None} for key in ("fma", "fma2d")}
"""Options whose default differs from the recipe's: a pretrained model has no far-field parameters to start from."""


def grid_options(recipe: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of a recipe on images, those given over the defaults here.

    Raises:
        ValueError: for an unknown recipe, one that does not work in 2-D, or sinks.
        TypeError: for an option that the recipe does not have.
    """
    entry = recipes.get(recipe)
    if 2 not in entry.dims:
        works = ", ".join(f"{d}-D" for d in entry.dims)
        raise ValueError(f"recipe {recipe!r} works in {works}; a grid of patches needs 2-D")
    options = {**entry.options(2), **DEFAULTS.get(recipe, {})}
    for name, value in given.items():
        if name not in options:
            accepted = ", ".join(f"{key}={default!r}" for key, default in options.items()) or "none"
            raise TypeError(f"recipe {recipe!r} has no option {name}={value!r}; its options: {accepted}")
        options[name] = tuple(value) if isinstance(value, list) else value
    if options.get("sinks"):
        raise ValueError(
            f"sinks={options['sinks']}: on a grid of patches the class and register tokens are seen exactly anyway; "
            "sinks=0 would be accepted"
        )
    return options


class PatchGrid:
    """The grid of patches of the image that a model reads at present, told by the convolution that makes them.

    Args:
        model: any module that holds one convolution whose stride is its kernel.

    Raises:
        ValueError: when there is none, or several.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [
            module
            for module in model.modules()
            if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size and module.stride[0] > 1
        ]
        if len(found) != 1:
            raise ValueError(
                f"{type(model).__name__} has {len(found)} convolutions that cut an image into patches (stride = "
                "kernel); exactly one is needed, to know the grid of its tokens"
            )
        self.sides: tuple[int, int] | None = None
        self._hook = found[0].register_forward_hook(self._told)

    def _told(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.sides = (output.shape[2], output.shape[3])

    def of(self, tokens: int, prefix: int) -> tuple[int, int]:
        """The grid of a sequence of so many tokens.

        Raises:
            ValueError: when no image was read, or the tokens are not the prefix and then the patches of the last one.
        """
        if self.sides is None:
            raise ValueError("the grid of patches is not known: no image went through the model's patch embedding yet")
        if prefix + math.prod(self.sides) != tokens:
            height, width = self.sides
            raise ValueError(
                f"{tokens} tokens are not {prefix} class and register tokens and then {height} x {width} patches; "
                "dropped, added or reordered tokens have no grid"
            )
        return self.sides

    def remove(self) -> None:
        """Takes the hook out of the model."""
        self._hook.remove()


class GridAttention(nn.Module):
    """A recipe on ready queries, keys and values of prefix tokens and a grid of patches, see the head of this file.

    Args:
        recipe: a name of `farfield.recipes`.
        options: of :func:`grid_options`.
        num_heads, num_kv_heads, head_dim: of the layer.
        layer: its index; some recipes alternate.
        prefix: class and register tokens before the patches.

    Raises:
        ValueError: for a recipe that needs more than queries, keys and values, or that gives no log-sum-exp where there
            are prefix tokens to join, with the reason.
    """

    def __init__(
        self,
        recipe: str,
        options: dict[str, Any],
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        layer: int = 0,
        prefix: int = 0,
    ) -> None:
        super().__init__()
        if prefix < 0:
            raise ValueError(f"prefix={prefix}: a number of class and register tokens >= 0 would be accepted")
        spec = LayerSpec(num_heads * head_dim, num_heads, num_kv_heads or num_heads, head_dim, dims=2)
        parts = recipes.get(recipe).parts(Setting(layer=layer, dims=2), **options)
        try:
            self.core = ReadyAttention(spec, near=parts.near, far=parts.far, merge=parts.merge)
        except ValueError as error:
            raise ValueError(f"recipe {recipe!r} in a vision transformer: {error}") from error
        self.prefix = prefix
        self.exact = isinstance(parts.near, Dense) and parts.far is None
        why = self.core.why_no_state
        if prefix and not self.exact and why is not None:
            raise ValueError(
                f"recipe {recipe!r} cannot meet {prefix} class or register token(s) in one softmax: {why}. A model "
                "without such tokens would be accepted, or a recipe such as fma2d, na, swin or window"
            )

    @property
    def takes_dropout(self) -> bool:
        """Whether attention weights can be dropped in training."""
        return all(p is None or p.takes_dropout for p in (self.core.near_spec, self.core.far_spec))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], scale: float, dropout: float = 0.0
    ) -> Tensor:
        """Attends: `[B, Hq, P + H W, D]` from queries of that shape and keys and values `[B, Hkv, P + H W, D]`.

        Raises:
            ValueError: for dropout in a recipe that has none.
        """
        if dropout and not self.takes_dropout:
            raise ValueError(f"dropout={dropout} in training: {self.core.extra_repr()} has none; set the model's to 0")
        own = self.prefix
        if self.exact:
            return dense_output(self._inputs(q, k, v, (q.shape[2],), scale, dropout))
        patches = self._inputs(q[:, :, own:], k[:, :, own:], v[:, :, own:], grid, scale, dropout)
        if not own:
            return self.core.attend(patches)
        keep = partial(F.dropout, p=dropout, training=True) if dropout else None
        seen = attend_dense(q[:, :, own:], k[:, :, :own], v[:, :, :own], scale=scale, keep=keep)
        out = merge_states(self.core.state(patches), seen).out
        first = attend_dense(q[:, :, :own], k, v, scale=scale, keep=keep).out
        return torch.cat((first, out), 2)

    def _inputs(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], scale: float, dropout: float) -> Inputs:
        x = k.new_empty(k.shape[0], k.shape[2], 0)
        return Inputs(q=q, k=k, v=v, x=x, grid=grid, scale=scale, dropout=dropout)
