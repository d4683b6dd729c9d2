"""Giving a Transformers model another attention, and reading back a model that was saved with one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from farfield.interop.transformers import cores
from farfield.interop.transformers.registering import register
from farfield.interop.transformers.vision import GridCore, grid_cores, grid_options
from farfield.parts import LayerSpec

__all__ = ["configure", "load"]


def configure(model: Any, recipe: str = "fma", *, dims: int = 1, prefix: int | None = None, **options: Any) -> Any:
    """Gives every attention layer of a model this recipe, with these options.

    The choice is written to `model.config.farfield`, so that `save_pretrained` keeps it. Where the recipe has
    parameters (`summary="shared"`, `bias=-8.0`, ...) every layer gets a submodule `farfield` for them, on the layer's
    device and in its dtype, trained and saved with the model; read such a model with :func:`load`. Sliding layers stay
    the exact windows that they are.

    Args:
        model: a Transformers model.
        recipe: a name of `farfield.recipes`, or "converted" for settings by layer and head: options `block`, `sinks`,
            `layers`, `expansions` and `exact`, as :mod:`farfield.interop.transformers.layers` has them and a conversion
            chooses them.
        dims: 1, a sequence; or 2 for a vision transformer: the recipe works over its grid of patches, whatever the size
            of the image, and class and register tokens stay exact.
        prefix: with `dims=2`, tokens before the patches, where the kind of model is not known here.
        **options: of the recipe (`farfield.recipes.options(recipe)`); for "fma" the defaults here are
            `summary="mean", bias=None, sinks=16`, which need no parameters, and with `dims=2` blocks of 8 by 8 with
            2 by 2 summaries, without sinks.

    Returns:
        The model itself, changed.

    Raises:
        ValueError: for a recipe that cannot work in this model, with the reason; the model is as it was.
        TypeError: for an option that the recipe does not have.
    """
    if dims not in (1, 2) or (prefix is not None and dims != 2):
        raise ValueError(f"dims={dims}, prefix={prefix}: dims=1, or dims=2 with or without a prefix, would be accepted")
    register()
    layers = cores.attention_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that uses Transformers' attention interface")
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
    everything = cores.options_of(recipe, given) if dims == 1 else grid_options(recipe, given)
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in everything.items()}
    saved: dict[str, Any] = {"recipe": recipe, "options": kept}
    built: dict[str, nn.Module]
    if dims == 1:
        built = {name: _core(layer, recipe, everything) for name, layer in layers.items() if not _sliding(layer)}
    else:
        saved |= {"dims": dims, "prefix": prefix}
        built = {**grid_cores(model, layers, recipe, everything, prefix)}
    for layer in layers.values():
        old = getattr(layer, cores.NAME, None)
        if old is not None:
            if isinstance(old, GridCore):
                old.forget()
            delattr(layer, cores.NAME)
    for name, core in built.items():
        if cores.has_parameters(core) or dims == 2:
            weight = next(layers[name].parameters())
            # The weights of a quantised layer may be integers.
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
            setattr(layers[name], cores.NAME, core.to(device=weight.device, dtype=dtype))
    for config in {id(c): c for c in (model.config, *(layer.config for layer in layers.values()))}.values():
        setattr(config, cores.NAME, saved)
    model.set_attn_implementation("farfield")
    return model


def load(path: str | Path, model_class: Any = AutoModelForCausalLM, **arguments: Any) -> Any:
    """Reads a model that was saved after :func:`configure`, its far-field parameters included.

    Args:
        path: the folder that `save_pretrained` wrote.
        model_class: the class or auto class to read it with.
        **arguments: of its `from_pretrained`.

    Returns:
        The model, in evaluation mode, with attn_implementation="farfield".

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: for a folder whose config says nothing of farfield, or whose weights do not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    register()
    config = arguments.pop("config", None) or AutoConfig.from_pretrained(folder)
    saved = getattr(config, cores.NAME, None)
    if saved is None:
        raise ValueError(
            f"the config in {folder} says nothing of farfield; read it with from_pretrained and call configure(model)"
        )
    weights = _farfield_weights(folder)
    with _without_report(bool(weights)):
        model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True, **arguments)
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v}
    unknown = sorted(set(wrong.pop("unexpected_keys", [])) - set(weights))
    if wrong or unknown:
        raise ValueError(f"the weights in {folder} do not fit the model: {wrong}, unexpected {unknown}")
    where = {name: saved[name] for name in ("dims", "prefix") if name in saved}
    configure(model, saved["recipe"], **where, **saved["options"])
    places = {name for name in model.state_dict() if _is_ours(name)}
    if places != set(weights):
        raise ValueError(
            f"far-field parameters in {folder} and in the model differ: only in the folder "
            f"{sorted(set(weights) - places)}, only in the model {sorted(places - set(weights))}"
        )
    model.load_state_dict(weights, strict=False)
    return model.eval()


@contextmanager
def _without_report(wanted: bool) -> Iterator[None]:
    """Keeps from_pretrained's table of tensors to itself: it would call ours unexpected; the caller checks them all."""

    def not_the_table(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    if wanted:
        logger.addFilter(not_the_table)
    try:
        yield
    finally:
        logger.removeFilter(not_the_table)


def _core(layer: nn.Module, recipe: str, options: dict[str, Any]) -> nn.Module:
    config: Any = layer.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(layer, "head_dim", None) or getattr(layer, "attention_head_size", None)
    width = width or getattr(config, "head_dim", None) or config.hidden_size // heads
    causal = bool(getattr(layer, "is_causal", True)) and bool(getattr(config, "is_causal", True))
    spec = LayerSpec(heads * width, heads, kv_heads, width, causal=causal)
    number = getattr(layer, "layer_idx", None) or 0
    return cores.build(recipe, cores.of_layer(recipe, options, number), spec, number)


def _sliding(layer: nn.Module) -> bool:
    return getattr(layer, "sliding_window", None) is not None


def _is_ours(name: str) -> bool:
    return f".{cores.NAME}." in f".{name}"


def _farfield_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The far-field parameters among the folder's safetensors."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    found = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            ours = [key for key in file.keys() if _is_ours(key)]  # noqa: SIM118 (it is no dict)
            found.update({key: file.get_tensor(key) for key in ours})
    return found
