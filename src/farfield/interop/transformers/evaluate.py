"""What a converted model loses and saves: perplexity by context length, passkeys, seconds, keys and state."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from farfield.interop.transformers import cores, layers
from farfield.interop.transformers.divergence import ROWS, Head, divergence
from farfield.interop.transformers.keys import context, kept_vectors, keys_by_head
from farfield.interop.transformers.texts import first_token
from farfield.recipes import Parts, Setting
from farfield.recipes import get as recipe_of

__all__ = ["Answers", "Cost", "Passkey", "Result", "cost_of", "loss", "measure", "passkey", "passkey_prompt", "timed"]

_HEADED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Entries of a config that change logits after the output embedding."""


_STRETCH = 5
"""Characters of text for each token of a prompt, from where one trial's text begins to where the next one's does."""


@dataclass
class Result:
    """What one model gave on the windows of one text at one length.

    Attributes:
        windows: number of windows.
        losses: mean nats per scored token, by window.
        seconds: of the whole model, in all.
        attention: of these, in attention (between the projections).
        divergences: mean nats per scored token from another model's answers, KL(other || this), by window; empty where
            there is no other.
    """

    windows: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    attention: float = 0.0
    divergences: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """Over all windows, which score equally many tokens."""
        return math.exp(sum(self.losses) / len(self.losses))

    @property
    def divergence(self) -> float | None:
        """Mean over all windows, nats per token."""
        return sum(self.divergences) / len(self.divergences) if self.divergences else None


class Answers(NamedTuple):
    """What a model says of every token of a window but the first.

    Attributes:
        rows: [N - 1, width] what the output embedding reads, or [N - 1, vocabulary] logits.
        head: from rows to logits.
    """

    rows: Tensor
    head: Head

    def logits(self) -> Iterator[tuple[int, Tensor]]:
        """Pieces [n, vocabulary] in float32 that predict the tokens from ``start`` on, in order."""
        for start in range(0, len(self.rows), ROWS):
            yield start + 1, self.head(self.rows[start : start + ROWS]).float()


class Cost(NamedTuple):
    """Counted, not measured.

    Attributes:
        keys: read per query, as a share of the mean causal context.
        state: bytes that decoding at this length has to keep, in the model's dtype.
    """

    keys: float
    state: int


@contextmanager
def timed(model: Any, device: torch.device) -> Iterator[Callable[[], float]]:
    """While open, counts the seconds in attention; gives a function that says how many."""
    name = model.config._attn_implementation
    before = ALL_ATTENTION_FUNCTIONS[name]
    spent = 0.0

    def attend(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        start = _now(device)
        result = before(*args, **kwargs)
        spent += _now(device) - start
        return result

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield lambda: spent
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = before


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Mean nats per token of [N] ids, all but the first."""
    return float(_token_losses(_answers(model, ids), ids).mean())


def _token_losses(answers: Answers, ids: Tensor) -> Tensor:
    """[N - 1] nats of every token after the first."""
    return torch.cat(
        [
            F.cross_entropy(logits, ids[start : start + len(logits)], reduction="none")
            for start, logits in answers.logits()
        ]
    )


def _answers(model: Any, ids: Tensor) -> Answers:
    head = model.get_output_embeddings()
    if head is None or any(getattr(model.config, name, None) is not None for name in _HEADED):
        return Answers(model(ids[None], use_cache=False).logits[0, :-1], lambda rows: rows)
    return Answers(model.base_model(ids[None], use_cache=False).last_hidden_state[0, :-1], head)


@torch.no_grad()
def measure(model: Any, ids: Tensor, result: Result, original: Answers | None = None) -> Answers:
    """Adds one window to a result.

    Args:
        model: a causal language model.
        ids: [N] token ids.
        result: of this model; changed.
        original: another model's answers to these ids, to say how far the model's own are from them; not timed.

    Returns:
        The answers.
    """
    device = next(model.parameters()).device
    ids = ids.to(device)
    with timed(model, device) as spent:
        start = _now(device)
        answers = _answers(model, ids)
        result.losses.append(float(_token_losses(answers, ids).mean()))
        result.seconds += _now(device) - start
        result.attention += spent()
    result.windows += 1
    if original is not None:
        apart = divergence(answers.rows, original.rows, answers.head, original.head)
        result.divergences.append(float(apart) / len(answers.rows))
    return answers


def cost_of(model: Any, length: int) -> Cost | None:
    """Keys and state of a model at a length, by its settings; None where they are not counted.

    Raises:
        ValueError: for a model without attention layers that Transformers' interface knows.
    """
    modules = cores.attention_layers(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no layer that uses Transformers' attention interface")
    shares, vectors, width = [], 0, 0
    for number, module in enumerate(modules.values()):
        config: Any = module.config
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
        if getattr(module, "sliding_window", None) is not None:
            return None
        try:
            parts = _parts(config, model.config._attn_implementation, getattr(module, "layer_idx", number) or 0)
            shares.append(keys_by_head(parts, heads, length).mean() / context(length))
            vectors += kept_vectors(parts, heads, kv_heads, length)
        except ValueError:
            return None
    size = next(model.parameters()).element_size()
    return Cost(float(sum(shares) / len(shares)), vectors * width * size)


def _parts(config: Any, implementation: str, layer: int) -> Parts:
    if not implementation.startswith("farfield"):
        return recipe_of("dense").parts(Setting(causal=True))
    name, options = cores.setting_of(config, implementation.partition(":")[2] or None)
    if name == layers.CONVERTED:
        return layers.layer_parts(**layers.setting_of_layer(options, layer))
    return recipe_of(name).parts(Setting(causal=True, layer=layer), **cores.options_of(name, options))


class Passkey(NamedTuple):
    """How well hidden keys were read back.

    Attributes:
        length: tokens of the prompt.
        depth: where the key lay, 0 = at the start, 1 = at the end.
        digits: share of the key's tokens that the model ranked first, each after the right ones before it.
        keys: share of keys with all tokens right.
        nats: mean loss of a token of the key after the right ones before it; where each digit is a token, ln 10 = 2.30
            knows no more than that it is one.
    """

    length: int
    depth: float
    digits: float
    keys: float
    nats: float


@torch.no_grad()
def passkey(
    model: Any, tokenizer: Any, filler: str, length: int, depths: Sequence[float], trials: int, seed: int
) -> list[Passkey]:
    """Hides keys of five digits in text, and asks for them; nothing is generated, the answer is scored.

    Args:
        model, tokenizer: to ask.
        filler: text to hide keys in: every trial its own stretch, from the beginning on where it is short.
        length: tokens of prompt and answer together.
        depths: where, from 0 to 1.
        trials: keys for each depth.
        seed: of the keys.
    """
    device = next(model.parameters()).device
    found = []
    for depth in depths:
        right: list[Tensor] = []
        nats: list[float] = []
        for trial in range(trials):
            stretch = filler[trial * _STRETCH * length % max(len(filler), 1) :] + filler
            ids, answer = passkey_prompt(tokenizer, stretch, length, depth, f"{seed}/{depth}/{trial}")
            ids = ids.to(device)
            answers = _answers(model, ids)
            logits = answers.head(answers.rows[-answer:]).float()
            right.append((logits.argmax(-1) == ids[-answer:]).float().cpu())
            nats.append(float(F.cross_entropy(logits, ids[-answer:])))
        mean = sum(float(r.mean()) for r in right) / trials
        found.append(Passkey(length, depth, mean, sum(float(r.all()) for r in right) / trials, sum(nats) / trials))
    return found


def passkey_prompt(tokenizer: Any, filler: str, length: int, depth: float, seed: str) -> tuple[Tensor, int]:
    """[length] ids that end in the answer, and how many of them the answer has.

    Raises:
        ValueError: when the question alone is longer, or there is no filler.
    """
    key = str(random.Random(seed).randrange(10000, 100000))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    hidden = ids(f"\nThe pass key is {key}. Remember it: {key} is the pass key.\n")
    question = ids("\nWhat is the pass key? The pass key is")
    answer = ids(f" {key}")
    begin = first_token(tokenizer)
    room = length - len(begin) - len(hidden) - len(question) - len(answer)
    stuff = ids(filler[: 8 * max(room, 1) + 100])
    if room < 0 or not stuff:
        raise ValueError(
            f"a passkey in {length} tokens: key, question and answer need {length - room}, and filler text between"
        )
    stuff = (stuff * (room // len(stuff) + 1))[:room]
    cut = round(depth * room)
    whole = begin + stuff[:cut] + hidden + stuff[cut:] + question + answer
    # The space before the first digit may be a token of its own, which is no part of the key.
    digits = sum(1 for token in answer if tokenizer.decode([token]).strip())
    return torch.tensor(whole), digits
