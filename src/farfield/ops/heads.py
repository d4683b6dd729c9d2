"""Some heads of a tensor, and states of some heads put where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from farfield.ops.state import AttentionState, merge_states

__all__ = ["index_of", "merge_heads", "take"]


def take(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """[B, H, N, D] -> the heads of these numbers; the same tensor where these are all."""
    if heads == tuple(range(x.shape[1])):
        return x
    return x.index_select(1, index_of(heads, x.device))


def merge_heads(state: AttentionState, others: Sequence[AttentionState], heads: tuple[int, ...]) -> AttentionState:
    """A state of all heads, with states of some heads, one after the other of ``heads``, merged into theirs."""
    if not others:
        return state
    every = others[0]
    if len(others) > 1:
        every = AttentionState(torch.cat([x.out for x in others], 1), torch.cat([x.lse for x in others], 1))
    if heads == tuple(range(state.out.shape[1])):  # every head in its place: nothing to pick and put back
        return merge_states(state, every)
    index = index_of(heads, state.out.device)
    joint = merge_states(AttentionState(state.out.index_select(1, index), state.lse.index_select(1, index)), every)
    return AttentionState(
        state.out.index_copy(1, index, joint.out.to(state.out.dtype)), state.lse.index_copy(1, index, joint.lse)
    )


def index_of(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on a device; kept, except while tracing, since a step of decoding has little else to do."""
    traced = torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor
    return (_kept_index.__wrapped__ if traced else _kept_index)(heads, device)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _kept_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, device=device)
