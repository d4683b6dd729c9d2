"""Low-rank changes of the attention projections, by peft, for the time of training. Needs the extra ``distill``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from farfield.interop.transformers.structure import blocks

__all__ = ["Adapters", "projections", "require_peft"]


def projections(model: Any) -> dict[str, nn.Linear]:
    """The linear layers in a model's attention layers (queries, keys, values, output), by name.

    Raises:
        ValueError: when there are none that peft's low-rank changes can be merged into here.
    """
    owners = {id(block.attention) for block in blocks(model)}
    found = {
        f"{name}.{child}": module
        for name, attention in model.named_modules()
        if id(attention) in owners
        for child, module in attention.named_children()
        if isinstance(module, nn.Linear) and module.weight.is_floating_point()
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__}: its attention layers have no nn.Linear of floating point numbers that low-rank "
            "changes could be added to; lora=0 would be accepted"
        )
    return found


def require_peft(rank: int) -> Any:
    """The package peft.

    Raises:
        ModuleNotFoundError: where it is missing, naming the extra.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"lora={rank} needs peft ({error.name} is missing): pip install 'farfield[distill]' brings it; "
            "lora=0 trains far-field parameters alone",
            name=error.name,
        ) from error
    return peft


class Adapters:
    """Low-rank changes beside the projections of a model, 0 at first.

    Args:
        model: changed in place; its own parameters are frozen.
        rank: of the changes.
        seed: of their first factors.

    Raises:
        ModuleNotFoundError: without peft, naming the extra.
        ValueError: see :func:`projections`.
    """

    def __init__(self, model: Any, rank: int, seed: int) -> None:
        peft = require_peft(rank)
        self.model = model
        # Scaled by 1: the rate of learning then says how fast weights change, whatever the rank.
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(projections(model)), lora_dropout=0.0)
        devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            self._tuner: Any = peft.LoraModel(model, config, "default")

    def parameters(self) -> dict[str, nn.Parameter]:
        """The factors, by name."""
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    def merge(self) -> None:
        """Adds the changes to the weights, and takes the adapters out."""
        self._tuner.merge_and_unload()
        self._clean()

    def remove(self) -> None:
        """Takes the adapters out; the weights are what they were."""
        self._tuner.unload()
        self._clean()

    def _clean(self) -> None:
        # peft's own notes on the model, which would otherwise be taken for adapters to save.
        self.model.__dict__.pop("peft_config", None)
