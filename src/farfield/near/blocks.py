"""Blocks: a query's leaf block and the blocks next to it, the near field of the multipole method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from farfield.geometry import per_axis
from farfield.ops.cache import Cache
from farfield.ops.multipole import multipole_attention
from farfield.ops.multipole.stream import MultipoleStream, Weights
from farfield.ops.state import AttentionState
from farfield.parts import Inputs, LayerSpec, NearPart, Part
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["Blocks"]


@dataclass(frozen=True)
class Blocks(NearPart):
    """Each query sees all tokens of its own leaf block and of the adjacent ones; causal: those up to itself.

    The complement of :class:`farfield.far.Pyramid`, with which it is computed in one operator. Alone it is a near field
    of 3 * block keys per axis (causal: 1.5 * block on average). Linear time and memory. Causal-safe.

    Args:
        block: side of a leaf block in tokens; one integer or one per axis.

    Source: Fast Multipole Attention, arXiv 2310.11960.
    """

    block: int | tuple[int, ...] = 64

    takes_dropout = True

    @property
    def takes_position_bias(self) -> bool:
        """Always."""
        return True

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "n·3·block per axis (causal: n·1.5·block)"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError when block does not fit the dimensions."""
        per_axis(self.block, spec.dims, "block")

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Blocks(per_axis(self.block, spec.dims, "block"))


def near_state(inputs: Inputs, block: tuple[int, ...], sinks: int = 0) -> AttentionState:
    """Attention to own and adjacent leaf blocks and the leading ``sinks`` tokens, with its log-sum-exp."""
    return AttentionState(
        *multipole_attention(
            inputs.rotated_q,
            inputs.rotated_k,
            inputs.v,
            grid=inputs.grid,
            block=block,
            rank=1,
            causal=inputs.causal,
            key_mask=inputs.key_mask,
            cu_seqlens=inputs.cu_seqlens,
            scale=inputs.scale,
            sinks=sinks,
            dropout=inputs.dropout,
            return_lse=True,
            part="near",
        )
    )


class _Blocks(StreamModule):
    def __init__(self, block: tuple[int, ...]) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: Inputs) -> AttentionState:
        """Attention with its log-sum-exp."""
        return near_state(inputs, self.block)

    def _stream(self, rewind: int) -> MultipoleStream:
        return MultipoleStream(self.block[0], 1, None, False, 0, "near", rewind)

    def why_no_stream(self, spec: StreamSpec) -> str | None:
        """See :class:`farfield.streaming.StreamModule`."""
        return self._stream(spec.rewind).why_not()

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """The last two blocks, and one more where tokens can be taken back."""
        stream = self._stream(spec.rewind)
        return stream.empty(spec.batch_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device)

    def resume(self, cache: Cache, length: int, rewind: int) -> None:
        """Hides what was taken back."""
        self._stream(rewind).open_block(cache, length, Weights())

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`."""
        stream = self._stream(rewind)
        if length == 0 and inputs.q.shape[2] > 1:
            state = self(inputs)
            stream.fill(cache, inputs.rotated_k, inputs.v)
            assert isinstance(state, AttentionState)
            return state
        tokens = inputs.rotated_q, inputs.rotated_k, inputs.v
        return stream.step(cache, *tokens, length, scale=inputs.scale, need_lse=need_lse)
