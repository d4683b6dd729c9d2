"""Sampling from a language model, byte by byte."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from farfield.data.text import SEPARATOR
from farfield.models.language import LanguageModel

__all__ = ["generate"]


def generate(
    model: LanguageModel,
    prompt: bytes,
    length: int,
    *,
    temperature: float = 0.8,
    seed: int = 0,
) -> Iterator[int]:
    """Continue a prompt.

    The prompt, or its last ``config.context`` bytes, is read in one pass; every further byte is one step of the
    model's streaming state (:meth:`LanguageModel.step`), whose cost does not depend on what went before, as far as the
    recipe's state is bounded. Up to ``config.context`` bytes, prompt included, the logits are those of the whole text.
    No byte is computed from more than ``config.context`` bytes: when the state holds that many, it begins again with
    the last half of them.

    Args:
        model: A trained model over bytes. Put into evaluation mode.
        prompt: What to continue; an empty one starts a new file.
        length: Number of bytes to sample.
        temperature: Divides the logits; 0 takes the likeliest byte, 1 samples from what the model believes.
        seed: Equal seeds give equal bytes.

    Yields:
        The bytes after the prompt, as they are made.

    Raises:
        ValueError: If ``length`` is negative or ``temperature`` is negative or not finite.
    """
    if length < 0:
        raise ValueError(f"the number of bytes must not be negative, got {length}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return _sample(model, list(prompt or SEPARATOR), length, temperature, seed)


def _sample(model: LanguageModel, text: list[int], length: int, temperature: float, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.eval()
    context = model.config.context
    state, unread = model.stream(), text[-context:]
    for _ in range(length):
        if state.lengths[0] + len(unread) > context:
            # Positions beyond the context were never trained. Half of it, so that reading again costs O(1) per byte.
            state, unread = model.stream(), text[-max(1, context // 2) :]
        logits = model.step(torch.tensor([unread], device=device), state)[0, -1].double().cpu()
        if temperature == 0:
            byte = int(logits.argmax())
        else:
            byte = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        text.append(byte)
        unread = [byte]
        yield byte
