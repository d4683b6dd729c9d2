"""How far one model's answers are from another's: the Kullback-Leibler divergence of their next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from farfield.ops.customop import differentiable_once

__all__ = ["ROWS", "Head", "Yardstick", "divergence", "final_states", "head_of"]

ROWS = 512
"""Tokens whose logits over the vocabulary are held at once."""

FEW = 16
"""Of these, tokens whose chances are compared at once."""

Head = Callable[[Tensor], Tensor]
"""From final hidden states `[n, width]` to logits `[n, vocabulary]`, newly made: they are written to."""


def final_states(model: Any, ids: Tensor) -> Tensor:
    """What the output embedding reads, `[N, width]`, for token ids `[N]`."""
    hidden: Tensor = model.base_model(ids[None], use_cache=False).last_hidden_state[0]
    return hidden


def head_of(model: Any) -> Head:
    """What makes logits of final hidden states.

    Raises:
        ValueError: for a model that does more than is known here between its hidden states and its logits.
    """
    embedding, config = model.get_output_embeddings(), model.config
    cap = getattr(config, "final_logit_softcapping", None)
    times = getattr(config, "logit_scale", None)
    over = getattr(config, "logits_scaling", None)

    def head(rows: Tensor) -> Tensor:
        logits: Tensor = embedding(rows)
        if times is not None:
            logits = logits * times
        if over is not None:
            logits = logits / over
        return logits if cap is None else torch.tanh(logits / cap) * cap

    with torch.no_grad():
        ids = torch.arange(8, device=embedding.weight.device) % embedding.weight.shape[0]
        own, ours = model(ids[None], use_cache=False).logits[0], head(final_states(model, ids))
    same = own.shape == ours.shape and torch.allclose(own.float(), ours.float(), rtol=1e-3, atol=1e-4, equal_nan=True)
    if not same:
        raise ValueError(
            f"{type(model).__name__} makes its logits in a way that is not known here: an output embedding of the "
            "final hidden states, scaled or soft-capped, would be accepted"
        )
    return head


class _Divergence(torch.autograd.Function):
    """The sum over rows, and its gradient piece by piece in the forward pass: logits are made once, and never all."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: Head, target_head: Head, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        grads: list[Tensor] = []
        for start in range(0, len(states), rows):
            with torch.no_grad():
                expected = _wide(target_head(targets[start : start + rows]))
            with torch.set_grad_enabled(wanted):
                piece = states[start : start + rows].detach().requires_grad_(wanted)
                logits = head(piece)
            given = _wide(logits.detach())
            total += _between(expected, given)
            if wanted:
                grads += torch.autograd.grad(logits, piece, given.to(logits.dtype))
        ctx.save_for_backward(*([torch.cat(grads), states] if wanted else []))
        # At least float32: a sum over a window is beyond what float16 holds, and bfloat16 knows three digits of it.
        return total.to(torch.promote_types(states.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, states = ctx.saved_tensors
        (found,) = differentiable_once(
            lambda: (grad * upstream,), (upstream, states), "KL divergence from all logits at once is to any order."
        )
        return found, None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _between(expected: Tensor, given: Tensor) -> Tensor:
    """The divergence of logits `[n, vocabulary]` from others, summed; its gradient takes the place of ``given``.

    A few rows at a time: they stay in the cache, and the memory that they are made in is used again.
    """
    total = torch.zeros((), dtype=torch.float64, device=given.device)
    for wanted, got in zip(expected.split(FEW), given.split(FEW), strict=True):
        log_p, log_q = wanted.log_softmax(-1), got.log_softmax(-1)
        p = log_p.exp()
        torch.sub(log_q.exp(), p, out=got)
        total += log_p.sub_(log_q).mul_(p).sum(dtype=torch.float64)
    return total


def divergence(states: Tensor, targets: Tensor, head: Head, target_head: Head, rows: int = ROWS) -> Tensor:
    """Sum over tokens of KL(original || model) in nats, with a gradient for ``states`` alone.

    Logits of ``rows`` tokens are held at once, and each is made once: the gradient comes out of the forward pass.

    Args:
        states: `[N, width]` final hidden states of the model.
        targets: `[N, width]` of the original.
        head, target_head: of :func:`head_of`; their parameters get no gradient.
        rows: tokens of a piece.
    """
    total: Tensor = _Divergence.apply(states, targets, head, target_head, rows)
    return total


class Yardstick:
    """Windows of held-out text, and the original's answers to them.

    Args:
        original: a causal language model.
        windows: token ids [N] each; `[N, width]` final states of each are kept.
    """

    @torch.no_grad()
    def __init__(self, original: Any, windows: Sequence[Tensor]) -> None:
        self.device = next(original.parameters()).device
        self.windows = [ids.to(self.device) for ids in windows]
        self.head = head_of(original)
        self.targets = [final_states(original, ids) for ids in self.windows]

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        """Mean divergence of a model from the original, in nats per token."""
        head = head_of(model)
        total = sum(
            float(divergence(final_states(model, ids), target, head, self.head))
            for ids, target in zip(self.windows, self.targets, strict=True)
        )
        return total / sum(len(ids) for ids in self.windows)
