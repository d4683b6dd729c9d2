"""Projection: landmarks as learned, content-dependent mixtures of tokens (Transformer-LS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farfield.ops.cache import Cache, attend_few, exactly, grown, join_rows, write_ring
from farfield.ops.state import AttentionState, attend_dense
from farfield.ops.tiles import compute_dtype
from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment, head_norm
from farfield.streaming import StreamModule, StreamSpec

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


class _Projection(StreamModule):
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
        logits = self._logits(inputs)
        logits = F.pad(logits, (0, spare)).unflatten(3, (-1, chunk))  # B, Hkv, rank, chunks, chunk
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

        keys, values = (self._mixed(weights, F.pad(x, (0, 0, 0, spare))) for x in (inputs.k, inputs.v))
        return keys, values, present

    def _logits(self, inputs: Inputs) -> Tensor:
        """[B, Hkv, rank, N] of every token for every landmark of its chunk, float32 or wider."""
        logits = self.weights(inputs.x).unflatten(-1, (inputs.k.shape[1], self.rank)).permute(0, 2, 3, 1)
        wide: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide

    def why_no_stream(self, spec: StreamSpec) -> str | None:
        """See :class:`farfield.streaming.StreamModule`."""
        return None if self.chunk is not None else "without chunk= its landmarks mix the whole sequence"

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """The present chunk, earlier ones as far as tokens can be taken back, and all landmarks: these grow."""
        assert self.chunk is not None
        places = self.chunk * (1 + -(-spec.rewind // self.chunk))
        return {
            "keys": spec.zeros(places),
            "values": spec.zeros(places),
            "logits": spec.zeros(places, self.rank, compute_dtype(spec.dtype)),
            "landmark_keys": spec.zeros(0),
            "landmark_values": spec.zeros(0),
        }

    def reserve(self, cache: Cache, length: int, rewind: int) -> None:
        """Twice the room for landmarks when it is used up."""
        assert self.chunk is not None
        need, have = length // self.chunk * self.rank, cache["landmark_keys"].shape[2]
        if need > have:
            for name in ("landmark_keys", "landmark_values"):
                cache[name] = grown(cache[name], max(need, 2 * have))

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`. O(T rank n / chunk)."""
        assert self.chunk is not None
        tokens = inputs.q.shape[2]
        if length == 0 and tokens > 1:
            self._fill(inputs, cache)
            return self(inputs)
        logits, done = self._logits(inputs).mT, 0
        states: list[AttentionState | Tensor] = []
        while done < tokens:
            chunk, place = divmod(length + done, self.chunk)
            stop = min(tokens, done + self.chunk - place)
            for name, x in (("keys", inputs.k), ("values", inputs.v), ("logits", logits)):
                write_ring(cache[name], x[:, :, done:stop], length + done)
            seen = slice(0, chunk * self.rank)
            keys, values = cache["landmark_keys"][:, :, seen], cache["landmark_values"][:, :, seen]
            with exactly(keys.device):
                query = inputs.q[:, :, done:stop]
                states.append(attend_few(query, keys, values, scale=inputs.scale, dtype=compute_dtype(keys.dtype)))
            if place + stop - done == self.chunk:
                self._complete(cache, chunk)
            done = stop
        return join_rows(states)

    def _fill(self, inputs: Inputs, cache: Cache) -> None:
        """A whole prefix into an empty cache."""
        assert self.chunk is not None
        logits, whole = self._logits(inputs).mT, inputs.q.shape[2] // self.chunk * self.chunk
        for name, x in (("keys", inputs.k), ("values", inputs.v), ("logits", logits)):
            write_ring(cache[name], x, 0)
        if whole:
            weights = logits[:, :, :whole].unflatten(2, (-1, self.chunk)).mT.softmax(-1).to(inputs.v.dtype)
            for name, x in (("landmark_keys", inputs.k), ("landmark_values", inputs.v)):
                cache[name][:, :, : whole // self.chunk * self.rank] = self._mixed(weights, x[:, :, :whole])

    def _complete(self, cache: Cache, chunk: int) -> None:
        """The landmarks of a chunk whose tokens are all there."""
        assert self.chunk is not None
        first = chunk * self.chunk % cache["keys"].shape[2]
        span, into = slice(first, first + self.chunk), slice(chunk * self.rank, (chunk + 1) * self.rank)
        weights = cache["logits"][:, :, None, span].mT.softmax(-1).to(cache["values"].dtype)
        for name in ("keys", "values"):
            cache[f"landmark_{name}"][:, :, into] = self._mixed(weights, cache[name][:, :, span])

    def _mixed(self, weights: Tensor, x: Tensor) -> Tensor:
        """[B, Hkv, chunks * rank, D] from weights [B, Hkv, chunks, rank, chunk] and the tokens of those chunks."""
        mixed = (weights @ x.unflatten(2, (-1, weights.shape[-1]))).flatten(2, 3)
        return mixed if self.norm is None else head_norm(self.norm, mixed)

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
