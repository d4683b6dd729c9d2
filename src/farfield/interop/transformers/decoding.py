"""Time per token and bytes of state when models go on from a prompt, token by token, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from farfield.interop.transformers.streams import ARGUMENT, StreamCache

__all__ = ["Decoding", "decode"]

WARM = 2
"""Steps before those that are measured."""


@dataclass
class Decoding:
    """What one model took.

    Attributes:
        length: tokens of the prompt.
        seconds: of every step, the whole model.
        state: bytes of the cache at the end.
    """

    length: int
    seconds: list[float] = field(default_factory=list)
    state: int = 0

    @property
    def median(self) -> float:
        """Seconds per token."""
        return statistics.median(self.seconds)


@torch.no_grad()
def decode(models: Sequence[Any], ids: Tensor, tokens: int) -> list[Decoding]:
    """Reads all but the last tokens of a text as a prompt, and the last ones one by one, each model in turn.

    A model on farfield's attention decodes with :class:`StreamCache`, another one with Transformers' DynamicCache.

    Args:
        models: causal language models.
        ids: [N] token ids, the prompt and what follows it.
        tokens: steps that are measured; before them come :data:`WARM` others.

    Raises:
        ValueError: for a text without room for a prompt.
    """
    length = len(ids) - tokens - WARM
    if tokens < 1 or length < 1:
        raise ValueError(f"{tokens} tokens one by one after a prompt, in a text of {len(ids)}: {WARM} more are needed")
    caches = [_cache(model) for model in models]
    found = [Decoding(length) for _ in models]
    for model, cache in zip(models, caches, strict=True):
        device = next(model.parameters()).device
        model.base_model(ids[None, :length].to(device), use_cache=True, **{ARGUMENT: cache})
    for step in range(WARM + tokens):
        at = length + step
        for model, cache, result in zip(models, caches, found, strict=True):
            device = next(model.parameters()).device
            token = ids[None, at : at + 1].to(device)
            _wait(device)
            start = time.perf_counter()
            model(token, use_cache=True, **{ARGUMENT: cache})
            _wait(device)
            if step >= WARM:
                result.seconds.append(time.perf_counter() - start)
    for cache, result in zip(caches, found, strict=True):
        result.state = _bytes(cache)
    return found


def _cache(model: Any) -> Any:
    if model.config._attn_implementation.startswith("farfield"):
        return StreamCache(model)
    return DynamicCache(config=model.config)


def _bytes(cache: Any) -> int:
    if isinstance(cache, StreamCache):
        return cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
