"""Channels: attention between the channels of a head, each of which has seen every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment, repeat_heads

__all__ = ["Channels"]


@dataclass(frozen=True)
class Channels(FarPart):
    """Channels attend to channels: A = softmax(Q^T K / sqrt(n)) over the channels of a head, `[D, D]`, output A V^T.

    Every product sums over all n visible tokens, so each token's output is a mixture of its own value channels whose
    weights are global. The same for any order of the tokens. O(N D) per channel in time, O(N + D) memory. Not
    causal-safe. Queries and keys are used as they are before any rotary embedding.

    The first release divided by sqrt(D) although the sum runs over tokens, so that the softmax hardens with the image;
    and it mixed what it called the query. This is the second version's: sqrt(n), values mixed.

    Source: DaViT, ECCV 2022, arXiv 2204.03645.
    """

    why_not_causal = "its weights between channels are sums over the whole sequence, later tokens included"
    why_no_state = "its softmax runs over channels, not over tokens"

    @property
    def causal_safe(self) -> bool:
        """Never."""
        return False

    @property
    def gives_state(self) -> bool:
        """Never."""
        return False

    @property
    def cost(self) -> str:
        """Multiplications per channel for n tokens."""
        return "n·head_dim"

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Channels()


class _Channels(nn.Module):
    def forward(self, inputs: Inputs) -> Tensor:
        """The output `[B, Hq, N, D]`."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        heads = inputs.q.shape[1]
        wide = torch.promote_types(inputs.q.dtype, torch.float32)
        # Sums over all tokens need the range of float32.
        with torch.autocast(inputs.q.device.type, enabled=False):
            q, k = inputs.q.to(wide), repeat_heads(inputs.k, heads).to(wide)
            if inputs.key_mask is None:
                count = torch.tensor(float(q.shape[2]), dtype=wide, device=q.device)
            else:
                # A hidden key is 0 already, which takes its token out of the sum.
                count = inputs.key_mask.sum(1).clamp(min=1).to(wide)[:, None, None, None]
            weights = (q.mT @ k / count.sqrt()).softmax(-1)
            out = repeat_heads(inputs.v, heads).to(wide) @ weights.mT
        return out.to(inputs.v.dtype)
