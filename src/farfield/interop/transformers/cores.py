"""Which attention a layer computes: a recipe and its options, from the model's config to modules."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from farfield import recipes
from farfield.attention import ReadyAttention
from farfield.interop.transformers import layers
from farfield.near import Window
from farfield.parts import LayerSpec
from farfield.recipes import Setting

__all__ = ["DEFAULTS", "attention_layers", "build", "has_parameters", "of_layer", "setting_of", "shared", "window"]

DEFAULTS: dict[str, dict[str, Any]] = {"fma": {"summary": "mean", "bias": None, "sinks": 16}}
"""Options whose default differs from the recipe's: a pretrained model has no far-field parameters to start from.

Its attention sink must stay exact, too: averaged into a cell it misleads every layer.
"""

NAME = "farfield"
"""The attribute of an attention layer that holds its parts, and of a config that holds recipe and options."""


def options_of(recipe: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of a recipe, those given over the defaults here.

    Raises:
        ValueError: for an unknown recipe, or an option that needs keys before their rotation.
        TypeError: for an option that the recipe does not have.
    """
    if recipe == layers.CONVERTED:
        return layers.check(given)
    options = {**recipes.options(recipe), **DEFAULTS.get(recipe, {})}
    for name, value in given.items():
        if name not in options:
            accepted = ", ".join(f"{key}={default!r}" for key, default in options.items()) or "none"
            raise TypeError(f"recipe {recipe!r} has no option {name}={value!r}; its options: {accepted}")
        options[name] = tuple(value) if isinstance(value, list) else value
    if options.get("rotate", "tokens") != "tokens":
        raise ValueError(
            f"rotate={options['rotate']!r}: Transformers hands over keys that are rotated already; "
            "rotate='tokens' would be accepted"
        )
    return options


def setting_of(config: Any, recipe: str | None) -> tuple[str, dict[str, Any]]:
    """Recipe and given options for a model: what its config says, if anything, under the name that was asked for.

    Args:
        config: the model's.
        recipe: from "farfield:<recipe>"; None for plain "farfield".

    Raises:
        ValueError: when the config has options for another recipe, or for a grid of patches.
    """
    saved = getattr(config, NAME, None)
    if saved is None:
        return recipe or "fma", {}
    if saved.get("dims", 1) != 1:
        raise ValueError(
            f"the model's config was made for a grid of patches ({saved}), and the attention interface does not say "
            "where patches lie: read the model with farfield.interop.transformers.load, or call configure(model, ..., "
            "dims=2) again"
        )
    if recipe is not None and recipe != saved["recipe"]:
        raise ValueError(
            f"attn_implementation='farfield:{recipe}', but the model's config was made for {saved['recipe']!r} with "
            f"options {saved['options']}: use attn_implementation='farfield', or configure(model, recipe={recipe!r})"
        )
    return saved["recipe"], saved["options"]


def of_layer(recipe: str, options: dict[str, Any], layer: int) -> dict[str, Any]:
    """The options that count in one layer: those of the recipe, or, of settings by layer, its own."""
    return layers.setting_of_layer(options, layer) if recipe == layers.CONVERTED else options


def build(recipe: str, options: dict[str, Any], spec: LayerSpec, layer: int) -> ReadyAttention:
    """The parts of one layer, from the options that count in it.

    Raises:
        ValueError: when the recipe cannot work on ready queries, keys and values in this layer, with the reason.
    """
    if recipe == layers.CONVERTED:
        parts = layers.layer_parts(**options)
    else:
        entry = recipes.get(recipe)
        if spec.causal and not entry.causal:
            raise ValueError(f"recipe {recipe!r} cannot be causal: it reads later tokens")
        parts = entry.parts(Setting(causal=spec.causal, layer=layer), **options_of(recipe, options))
    try:
        return ReadyAttention(spec, near=parts.near, far=parts.far, merge=parts.merge)
    except ValueError as error:
        raise ValueError(f"recipe {recipe!r} in a Transformers model: {error}") from error


def window(size: int) -> ReadyAttention:
    """A sliding layer: each token sees itself and the `size - 1` before it."""
    return ReadyAttention(LayerSpec(1, 1, 1, 1, causal=True), near=Window(size))


def has_parameters(core: nn.Module) -> bool:
    """Whether there is anything to learn or to save."""
    return next(core.parameters(), None) is not None


class _Shared:
    """Modules without parameters, one attribute each, made when they are first needed."""


_NAMES: dict[Any, str] = {}


@torch.compiler.assume_constant_result
def _name(kind: str, arguments: tuple[Any, ...]) -> str:
    """The attribute that holds a module; makes it, also while a compiler traces the caller."""
    key = (kind, arguments)
    if key not in _NAMES:
        if kind == "window":
            core = window(*arguments)
        else:
            recipe, options, causal, heads, kv_heads, width, layer = arguments
            spec = LayerSpec(heads * width, heads, kv_heads, width, causal=causal)
            core = build(recipe, dict(options), spec, layer)
        if has_parameters(core):
            learned = ", ".join(name for name, _ in core.named_parameters())
            raise ValueError(
                f"recipe {arguments[0]!r} with options {dict(arguments[1])} has parameters ({learned}), and this model "
                "has no place for them: farfield.interop.transformers.configure(model, ...) makes one in every layer, "
                "and farfield.interop.transformers.load(path) reads a model that was saved with them"
            )
        name = f"core{len(_NAMES)}"
        setattr(_Shared, name, core.eval())
        _NAMES[key] = name
    return _NAMES[key]


def shared(kind: str, *arguments: Any) -> ReadyAttention:
    """A module without parameters, for every layer that asks for the same.

    Raises:
        ValueError: as :func:`build`, and for a recipe that has parameters.
    """
    core: ReadyAttention = getattr(_Shared, _name(kind, arguments))
    return core


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules of a Transformers model that call its attention interface, by name."""

    def calls(module: nn.Module) -> bool:
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names

    return {name: module for name, module in model.named_modules() if calls(module)}
