"""Window: a sliding, strided, blocked or dilated neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from farfield.near.dense import dense_output
from farfield.ops.cache import Cache
from farfield.ops.state import AttentionState
from farfield.ops.window import window_attention
from farfield.ops.window.api import check_rule
from farfield.ops.window.stream import WindowStream
from farfield.parts import Inputs, LayerSpec, NearPart, OutputModule, Part, by_segment, head_norm
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["Window"]


@dataclass(frozen=True)
class Window(NearPart):
    """Each query sees `size` keys per axis around itself; causal: itself and the `size - 1` tokens before it.

    The index rule is NATTEN's, see :func:`farfield.ops.window.window_attention`. A window longer than its axis is the
    whole axis (with dilation 1), so short inputs work. Linear time and memory. Causal-safe.

    Args:
        size: keys per axis; one integer or one per axis.
        stride: this many neighbouring queries share a window; `stride=size` is blocked attention.
        dilation: a window holds every dilation-th token; one integer or one per axis. None for the widest that fits,
            floor(length / size) on every axis of the grid at hand (DiNAT's sparse layers). It depends on the length, so
            that a sequence and its prefix differ: not causal-safe.
        kv_norm: keys and values pass a LayerNorm over the channels of all heads first, the same one for both (the near
            half of Transformer-LS's DualLN, arXiv 2107.02192).

    Source: arXiv 2204.07143, 2209.15001 (dilation), 2504.16922 (stride).
    """

    size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] | None = 1
    kv_norm: bool = False

    takes_dropout = True
    why_not_causal = "dilation=None takes it from the length of the whole sequence"

    @property
    def causal_safe(self) -> bool:
        """With a dilation that is given."""
        return self.dilation is not None

    @property
    def takes_position_bias(self) -> bool:
        """Without kv_norm, which would mix the channels."""
        return not self.kv_norm

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "n·size" if isinstance(self.size, int) else f"n·{'·'.join(map(str, self.size))}"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError when size, stride and dilation do not fit each other or the dimensions."""
        check_rule(self.size, self.stride, 1 if self.dilation is None else self.dilation, spec.dims)

    def rule(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Window, stride and dilation per axis of a grid."""
        given = 1 if self.dilation is None else self.dilation
        sizes, strides, dilations = check_rule(self.size, self.stride, given, len(grid))
        if self.dilation is None:
            dilations = tuple(max(1, n // size) for n, size in zip(grid, sizes, strict=True))
        return sizes, strides, dilations

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Window(self, spec)


class _Window(OutputModule, StreamModule):
    def __init__(self, part: Window, spec: LayerSpec) -> None:
        super().__init__()
        self.part = part
        self.norm = nn.LayerNorm(spec.num_kv_heads * spec.head_dim) if part.kv_norm else None

    def forward(self, inputs: Inputs) -> AttentionState:
        """Attention with its log-sum-exp."""
        return self._attend(self._normed(inputs))

    def output(self, inputs: Inputs) -> Tensor:
        """The output alone; a window over everything is dense attention, for which torch has faster kernels."""
        inputs = self._normed(inputs)
        sizes, _, dilations = self.part.rule(inputs.grid)
        whole = max(dilations) == 1 and all(n <= size for n, size in zip(inputs.grid, sizes, strict=True))
        if whole and inputs.cu_seqlens is None:
            return dense_output(inputs)
        return self._attend(inputs).out

    def _attend(self, inputs: Inputs) -> AttentionState:
        if self.part.dilation is None and inputs.cu_seqlens is not None:
            return by_segment(inputs, self._attend)  # each has a dilation of its own
        sizes, strides, dilations = self.part.rule(inputs.grid)
        return window_attention(
            inputs.rotated_q,
            inputs.rotated_k,
            inputs.v,
            window=sizes,
            grid=inputs.grid,
            stride=strides,
            dilation=dilations,
            causal=inputs.causal,
            key_mask=inputs.key_mask,
            cu_seqlens=inputs.cu_seqlens,
            scale=inputs.scale,
            dropout=inputs.dropout,
            return_lse=True,
        )

    def _stream(self, rewind: int) -> WindowStream:
        (size,), (stride,), (dilation,) = self.part.rule((1,))
        return WindowStream(size, stride, dilation, rewind)

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """As many tokens as the window reaches back, and those that can be taken back."""
        return self._stream(spec.rewind).empty(
            spec.batch_size, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device
        )

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`."""
        stream = self._stream(rewind)
        if length == 0 and inputs.q.shape[2] > 1:
            out = self(inputs) if need_lse else self.output(inputs)
            inputs = self._normed(inputs)
            stream.fill(cache, inputs.rotated_k, inputs.v)
            return out
        inputs = self._normed(inputs)
        tokens = inputs.rotated_q, inputs.rotated_k, inputs.v
        return stream.step(cache, *tokens, length, scale=inputs.scale, need_lse=need_lse)

    def _normed(self, inputs: Inputs) -> Inputs:
        if self.norm is None:
            return inputs
        return replace(inputs, k=head_norm(self.norm, inputs.k), v=head_norm(self.norm, inputs.v))
