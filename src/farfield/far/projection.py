"""Projection: landmarks as learned, content-dependent mixtures of tokens (Transformer-LS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farfield.ops.state import AttentionState, attend_dense
from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment, head_norm

__all__ = ["Projection"]

SCORES = 1 << 22
"""Scores held at once by the causal form; the backward pass computes them again."""


@dataclass(frozen=True)
class Projection(FarPart):
    """Each head mixes tokens into `rank` landmarks: weights P = softmax over tokens of `x W`, keys P^T K, values P^T V.

    Without `chunk` all tokens share `rank` landmarks, which every query sees: O(N rank), not causal-safe. With `chunk`
    every chunk of that many tokens has its own, and a query sees those of the chunks strictly before its own (causal)
    or of all chunks: O(N rank N / chunk) time, O(N) memory when causal; causal-safe. Keys are used as they are before
    any rotary embedding.

    Args:
        rank: landmarks per head, in all or per chunk.
        chunk: tokens per chunk, or None for one over everything.
        norm: a LayerNorm over the channels of all heads for landmark keys and values, the same one for both (the far
            half of DualLN; the near half is `Window(kv_norm=True)`).

    Source: Transformer-LS, NeurIPS 2021, arXiv 2107.02192.
    """

    rank: int = 8
    chunk: int | None = None
    norm: bool = True

    reads_input = True
    why_not_causal = "without chunk= its landmarks mix the whole sequence, later tokens included"

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("chunk", 1 if self.chunk is None else self.chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Projection({name}={value!r}): {name} must be a positive integer")

    @property
    def dims(self) -> tuple[int, ...]:  # type: ignore[override]
        """Chunks are runs of a sequence."""
        return (1, 2, 3) if self.chunk is None else (1,)

    @property
    def causal_safe(self) -> bool:
        """With chunks."""
        return self.chunk is not None

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "n·rank" if self.chunk is None else "n·rank·n/chunk"

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Projection(self, spec)


class _Projection(nn.Module):
    def __init__(self, part: Projection, spec: LayerSpec) -> None:
        super().__init__()
        self.rank, self.chunk = part.rank, part.chunk
        self.weights = nn.Linear(spec.dim, spec.num_kv_heads * part.rank, bias=False)
        self.norm = nn.LayerNorm(spec.num_kv_heads * spec.head_dim) if part.norm else None

    def forward(self, inputs: Inputs) -> AttentionState:
        """What the queries read from the landmarks they see."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        keys, values, present = self.landmarks(inputs)
        if not inputs.causal:
            seen = None if present is None else present.flatten(1)[:, None, None, :]
            return attend_dense(inputs.q, keys, values, scale=inputs.scale, visible=seen)
        return self._past(inputs, keys, values, present)

    def landmarks(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values `[B, Hkv, chunks * rank, D]`; bool `[B, chunks, rank]`, those with a token, or None."""
        batch, tokens = inputs.x.shape[:2]
        chunk = tokens if self.chunk is None else self.chunk
        spare = -tokens % chunk
        kv_heads, head_dim = inputs.k.shape[1], inputs.k.shape[3]
        logits = self.weights(inputs.x).unflatten(-1, (kv_heads, self.rank)).permute(0, 2, 3, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = F.pad(logits.to(wide), (0, spare)).unflatten(3, (-1, chunk))  # B, Hkv, rank, chunks, chunk
        mask = inputs.key_mask
        present = None
        if mask is None and spare:
            mask = torch.ones(batch, tokens, dtype=torch.bool, device=logits.device)
        if mask is not None:
            valid = F.pad(mask, (0, spare)).unflatten(1, (-1, chunk))
            some = valid.any(-1)
            # A chunk without tokens takes even weights, which keep the softmax finite; nobody sees its landmarks.
            hidden = ~valid & some[..., None]
            logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
            if inputs.key_mask is not None:
                present = some[..., None].expand(-1, -1, self.rank)
        weights = logits.softmax(-1).to(inputs.v.dtype).permute(0, 1, 3, 2, 4)  # B, Hkv, chunks, rank, chunk

        def mix(x: Tensor) -> Tensor:
            mixed = weights @ F.pad(x, (0, 0, 0, spare)).unflatten(2, (-1, chunk))
            mixed = mixed.reshape(batch, kv_heads, -1, head_dim)
            return mixed if self.norm is None else head_norm(self.norm, mixed)

        return mix(inputs.k), mix(inputs.v), present

    def _past(self, inputs: Inputs, keys: Tensor, values: Tensor, present: Tensor | None) -> AttentionState:
        """Landmarks of strictly earlier chunks, by spans of chunks whose scores fit a fixed buffer."""
        assert self.chunk is not None
        q, chunk, rank = inputs.q, self.chunk, self.rank
        tokens = q.shape[2]
        chunks = -(-tokens // chunk)
        per_chunk = max(1, q.shape[0] * q.shape[1] * chunk * chunks * rank)
        span = max(1, min(chunks, SCORES // per_chunk))
        index = torch.arange(tokens, device=q.device) // chunk

        def part(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
            return attend_dense(q, keys, values, scale=inputs.scale, visible=seen)

        states = []
        for first in range(0, chunks, span):
            rows = slice(first * chunk, min((first + span) * chunk, tokens))
            reach = max(1, min(first + span, chunks) - 1)
            of_landmark = torch.arange(reach * rank, device=q.device) // rank
            seen = (of_landmark < index[rows, None])[None, None]
            if present is not None:
                seen = seen & present.flatten(1)[:, None, None, : reach * rank]
            pieces = q[:, :, rows], keys[:, :, : reach * rank], values[:, :, : reach * rank], seen
            if torch.is_grad_enabled():
                states.append(checkpoint(part, *pieces, use_reentrant=False, preserve_rng_state=False))
            else:
                states.append(part(*pieces))
        outs, lses = zip(*states, strict=True)
        return AttentionState(torch.cat(outs, 2), torch.cat(lses, 2))
