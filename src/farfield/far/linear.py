"""Linear: attention without a softmax over tokens, through a state of sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield.ops.cache import Cache, exactly, write_ring
from farfield.ops.state import AttentionState
from farfield.ops.tiles import compute_dtype
from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["FEATURES", "Linear", "centred_attention", "linear_attention"]


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _identity(x: Tensor) -> Tensor:
    return x


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"elu": _elu, "relu": F.relu, "softmax": _softmax}
"""Feature maps phi, none of them negative: elu(x) + 1, max(x, 0), softmax over the channels of a token."""

_MAPS = {**FEATURES, "identity": _identity}

NORMALISERS = ("divide", "subtract")

CHUNK = 64
"""Tokens of a causal chunk: within it scores are written out, before it the state of sums stands for all."""


@dataclass(frozen=True)
class Linear(FarPart):
    """Normalised linear attention: phi(q_i) S / (phi(q_i) z) with S = sum_j phi(k_j) v_j and z = sum_j phi(k_j).

    With `normalise="subtract"` the weights of n tokens are a_ij = 1 / n + (s_ij - mean_m s_im) / n instead, where
    s_ij = scale phi(q_i) phi(k_j): rows sum to 1 without a division, weights may be negative, and different queries
    give different rows wherever keys span the channels. n is the number of tokens that are seen. (Released code for
    pooled keys divides by the number of queries there; rows then no longer sum to 1.)

    The sums run over all tokens, causal over the past and the token itself. O(N) time and memory, also causal (by
    chunks). Queries and keys are used as they are before any rotary embedding, which would make features negative.
    Works in any dimension: positions do not enter. Causal-safe. A row without any mass gives 0.

    Args:
        feature: the map phi, "elu" (elu + 1, arXiv 2006.16236), "relu", "softmax" (over channels) or "identity", which
            may be negative and needs `normalise="subtract"`.
        floor: the denominator is at least this. L2ViT uses 100, which leaves rows with less mass smaller than a mean.
            0 for plain normalisation.
        temperature: multiply each head by a learned factor that starts at head_dim ** -0.5 (L2ViT's tau).
        normalise: "divide" or "subtract".

    Source: Katharopoulos et al., arXiv 2006.16236; floor and temperature from L2ViT, arXiv 2501.16182; subtraction from
    InLine attention, NeurIPS 2024, arXiv 2412.06590.
    """

    feature: str = "elu"
    floor: float = 0.0
    temperature: bool = False
    normalise: str = "divide"

    why_no_state = "its weights are not a softmax over tokens, so there is no log-sum-exp to weigh it by"

    def __post_init__(self) -> None:
        if self.feature not in _MAPS:
            raise ValueError(f"Linear(feature={self.feature!r}): known feature maps are {', '.join(_MAPS)}")
        if not self.floor >= 0:
            raise ValueError(f"Linear(floor={self.floor!r}): the least denominator cannot be negative")
        if self.normalise not in NORMALISERS:
            raise ValueError(f"Linear(normalise={self.normalise!r}): known ways are {', '.join(NORMALISERS)}")
        if self.normalise == "subtract" and self.floor:
            raise ValueError(
                f"Linear(floor={self.floor!r}, normalise='subtract'): there is no denominator; use floor=0"
            )
        if self.normalise == "divide" and self.feature == "identity":
            raise ValueError("Linear(feature='identity'): its sums may vanish; use normalise='subtract'")

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
        return _Linear(self, spec)


class _Linear(StreamModule):
    def __init__(self, part: Linear, spec: LayerSpec) -> None:
        super().__init__()
        self.part = part
        start = torch.full((spec.num_heads,), 1 / math.sqrt(spec.head_dim))
        self.tau = nn.Parameter(start) if part.temperature else None

    def forward(self, inputs: Inputs) -> Tensor:
        """The output `[B, Hq, N, D]`."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        # Sums over all tokens need the range of float32.
        with torch.autocast(inputs.q.device.type, enabled=False):
            q, k, v = self._features(inputs)
            if inputs.key_mask is not None:
                k = k.masked_fill(~inputs.key_mask[:, None, :, None], 0.0)
            if self._centred:
                out = self._scaled(
                    centred_attention(q, k, v, inputs.key_mask, causal=inputs.causal, scale=inputs.scale)
                )
            else:
                out = self._scaled(linear_attention(q, k, v, causal=inputs.causal, floor=self.part.floor))
        return out.to(inputs.v.dtype)

    def _features(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k), v in float32 or wider."""
        feature = _MAPS[self.part.feature]
        wide = torch.promote_types(inputs.q.dtype, torch.float32)
        return feature(inputs.q.to(wide)), feature(inputs.k.to(wide)), inputs.v.to(wide)

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.tau is None else out * self.tau[:, None, None]

    @property
    def _centred(self) -> bool:
        return self.part.normalise == "subtract"

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """The state before the present chunk of 64 tokens, and the features of the chunk.

        Where tokens can be taken back, also the states before earlier chunks, and their tokens.
        """
        kept, wide, width = 1 + -(-spec.rewind // CHUNK), compute_dtype(spec.dtype), spec.head_dim
        rows = width + 1 if self._centred else width
        return {
            "keys": spec.zeros(kept * CHUNK, rows, wide),
            "values": spec.zeros(kept * CHUNK, width + 1, wide),
            "states": spec.zeros(kept * rows, width + 1, wide).unflatten(2, (kept, rows)),
        }

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`. Time and memory do not depend on the length."""
        whole = length == 0 and inputs.k.shape[2] > CHUNK
        out = self(inputs) if whole else None
        with exactly(inputs.q.device):
            q, k, v = self._features(inputs)
            # A last channel of ones makes the denominator one more output.
            v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
            if self._centred:
                # And of keys makes the sum of the values, and their number, one more row of the state.
                k = torch.cat((k, torch.ones_like(k[..., :1])), -1)
            if out is not None:
                _fill(cache, k, v)
                return out
            q = q.unflatten(1, (k.shape[1], -1))
            if self._centred:
                # One more query per key head reads that row, and the others do not.
                reader = F.pad(torch.zeros_like(q[:, :, :1]), (0, 1), value=1.0)
                q = torch.cat((F.pad(q, (0, 1)), reader), 2)
            done, pieces = 0, []
            while done < k.shape[2]:
                stop = min(k.shape[2], done + CHUNK - (length + done) % CHUNK)
                span = slice(done, stop)
                pieces.append(_advance(cache, q[..., span, :], k[:, :, span], v[:, :, span], length + done))
                done = stop
            joint = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 3)
            if self._centred:
                out = self._scaled(_centred_rows(joint, inputs.scale))
            else:
                out = self._scaled(_normalised(joint.flatten(1, 2), self.part.floor))
        return out.to(inputs.v.dtype)


def _fill(cache: Cache, k: Tensor, v: Tensor) -> None:
    """A whole prefix into an empty cache."""
    states = cache["states"]
    kept, last = states.shape[2], k.shape[2] // CHUNK
    first = max(0, last + 1 - kept)
    write_ring(cache["keys"], k, 0)
    write_ring(cache["values"], v, 0)
    total = k[:, :, : first * CHUNK].mT @ v[:, :, : first * CHUNK]
    for chunk in range(first, last + 1):
        states[:, :, chunk % kept] = total
        span = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        total = total + k[:, :, span].mT @ v[:, :, span]


def _advance(cache: Cache, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Tokens of one chunk, the first at position ``length``: [B, Hkv, r, T, D + 1] from the past and themselves."""
    states = cache["states"]
    kept, chunk, place = states.shape[2], length // CHUNK, length % CHUNK
    first, stop = chunk % kept * CHUNK, place + k.shape[2]
    cache["keys"][:, :, first + place : first + stop] = k
    cache["values"][:, :, first + place : first + stop] = v
    keys, values = (cache[name][:, :, first : first + stop] for name in ("keys", "values"))
    own = (q @ keys.mT.unsqueeze(2)).tril(place) @ values.unsqueeze(2)
    before = states[:, :, chunk % kept]
    out: Tensor = own + q @ before.unsqueeze(2)
    if stop == CHUNK:
        states[:, :, (chunk + 1) % kept] = before + keys.mT @ values
    return out


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, floor: float = 0.0) -> Tensor:
    """Normalised linear attention of ready features.

    Args:
        query: `[B, Hq, N, D]`, features phi(q), not negative.
        key: `[B, Hkv, N, D]`, features phi(k), not negative; 0 for a hidden token.
        value: `[B, Hkv, N, Dv]`.
        causal: sum over tokens j <= i only.
        floor: least denominator; 0 for none, then a row without mass gives 0.

    Returns:
        `[B, Hq, N, Dv]`. O(N D Dv) time, O(N (D + Dv) + N D Dv / 64) memory.
    """
    kv_heads = key.shape[1]
    q = query.unflatten(1, (kv_heads, query.shape[1] // kv_heads))
    k = key
    # A last channel of ones makes the denominator one more output.
    v = torch.cat((value, torch.ones_like(value[..., :1])), -1)
    joint = _causal(q, k, v) if causal else q @ (k.transpose(-1, -2) @ v).unsqueeze(2)
    return _normalised(joint.flatten(1, 2), floor)


def _normalised(joint: Tensor, floor: float) -> Tensor:
    """All channels but the last over the last, which is at least ``floor``; a row without mass gives 0."""
    top, mass = joint[..., :-1], joint[..., -1:]
    if floor > 0:
        return top / mass.clamp(min=floor)
    return top / torch.where(mass > 0, mass, torch.ones_like(mass))


def centred_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, *, causal: bool = False, scale: float
) -> Tensor:
    """Linear attention whose rows sum to 1 because their mean is subtracted, not divided by.

    Args:
        query: `[B, Hq, N, D]`, features phi(q) of any sign.
        key: `[B, Hkv, N, D]`, features phi(k) of any sign; 0 for a hidden token.
        value: `[B, Hkv, N, Dv]`; 0 for a hidden token.
        key_mask: bool `[B, N]`, tokens that are seen, or None for all.
        causal: sum over tokens j <= i only.
        scale: factor on phi(q) phi(k).

    Returns:
        `[B, Hq, N, Dv]`, 0 where nothing is seen. Complexity as :func:`linear_attention`.
    """
    kv_heads, tokens = key.shape[1], key.shape[2]
    q = query.unflatten(1, (kv_heads, query.shape[1] // kv_heads))
    if key_mask is None:
        seen = value.new_ones(1, tokens)
    else:
        seen = key_mask.to(value.dtype)
    if causal:
        count = seen.cumsum(1).clamp(min=1)[:, None, :, None]
        mean = (value.cumsum(2) / count).unsqueeze(2)
        joint = _causal(q, key, torch.cat((value, torch.ones_like(value[..., :1])), -1)) / count.unsqueeze(2)
        top, mass = joint[..., :-1], joint[..., -1:]
    else:
        count = seen.sum(1).clamp(min=1)[:, None, None, None]
        mean = (value.sum(2, keepdim=True) / count).unsqueeze(2)
        top = q @ (key.mT @ value / count).unsqueeze(2)
        mass = q @ (key.sum(2, keepdim=True) / count).mT.unsqueeze(2)
    return (mean + scale * (top - mass * mean)).flatten(1, 2)


def _centred_rows(joint: Tensor, scale: float) -> Tensor:
    """`[B, Hq, T, D]` from `[B, Hkv, r + 1, T, D + 1]`; the last query read the sum of the values and their number."""
    reader = joint[:, :, -1:]
    count = reader[..., -1:]
    mean, rest = reader[..., :-1] / count, joint[:, :, :-1] / count
    return (mean + scale * (rest[..., :-1] - rest[..., -1:] * mean)).flatten(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, Hkv, r, N, Dv]`: the chunk's own scores, and the state of all chunks before it."""
    tokens = q.shape[3]
    spare = -tokens % CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, spare)).unflatten(-2, (-1, CHUNK)) for x in (q, k, v))
    states = k.transpose(-1, -2) @ v
    # Shifted, not subtracted: what a chunk adds may not touch its own state even by rounding.
    before = F.pad(states.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    own = (q @ k.transpose(-1, -2).unsqueeze(2)).tril() @ v.unsqueeze(2)
    return (own + q @ before.unsqueeze(2)).flatten(3, 4)[:, :, :, :tokens]
