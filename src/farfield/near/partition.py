"""Partition: tiles that share no token, of neighbouring or of spread tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farfield.geometry import integers, per_axis
from farfield.ops.cache import Cache, attend_few, exactly, join_rows, write_ring
from farfield.ops.state import AttentionState
from farfield.ops.tiles import compute_dtype
from farfield.ops.tiling import Tiling, attend_tiles, offsets, tile_output, tiling
from farfield.parts import Inputs, LayerSpec, NearPart, OutputModule, Part, by_segment
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["Partition", "TileBias"]


@dataclass(frozen=True)
class Partition(NearPart):
    """Each query sees the tokens of its own tile of `size` places per axis; causal: those up to itself.

    Tiles share no token, unlike those of `Window(size, stride=size)`, which move inside at the borders. Where `size`
    does not divide an axis some tiles are smaller: nothing is padded, so nothing that is not there is seen. O(N size)
    time and memory. Causal-safe without `spread`.

    Args:
        size: places of a tile per axis; one integer or one per axis. An axis that is not longer is one tile (except
            that a causal shift stays where it is, so that a prefix is cut as the whole is).
        shift: tokens before the first boundary, 0 to size - 1 (0: none), one integer or one per axis. Swin's cyclic
            shift with its mask: tiles at the two ends are the pieces that the mask leaves.
        spread: a tile holds every d-th token, d = ceil(length / size), instead of neighbours (MaxViT's grid). As d
            depends on the length, not causal-safe.
        bias: add a learned bias per head for every offset within a tile, counted in places (about N(0, 0.02) at first).

    Source: Swin, arXiv 2103.14030 (shift, bias); MaxViT, arXiv 2204.01697 (spread).
    """

    size: int | tuple[int, ...]
    shift: int | tuple[int, ...] = 0
    spread: bool = False
    bias: bool = False

    takes_dropout = True
    why_not_causal = "spread=True takes its spacing from the length of the whole sequence"

    @property
    def causal_safe(self) -> bool:
        """Without spread."""
        return not self.spread

    @property
    def takes_position_bias(self) -> bool:
        """Always; beside its own bias within a tile."""
        return True

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        return "n·size per axis"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """Raises ValueError when size and shift do not fit each other or the dimensions."""
        sizes, shifts = per_axis(self.size, spec.dims, "size"), self._shifts(spec.dims)
        if any(not 0 <= s < size for s, size in zip(shifts, sizes, strict=True)):
            raise ValueError(f"shift={self.shift!r} with size={self.size!r}: give 0 to size - 1")
        if self.spread and any(shifts):
            raise ValueError(f"shift={self.shift!r} with spread=True: spread tiles have no boundary; use shift=0")

    def _shifts(self, dims: int) -> tuple[int, ...]:
        given = integers(self.shift, "shift")
        shifts = given if isinstance(self.shift, tuple) else given * dims
        if len(shifts) != dims:
            raise ValueError(f"shift={self.shift!r} does not fit a {dims}-D grid: give one integer, or {dims} of them")
        return shifts

    def tiling(self, grid: tuple[int, ...], device: torch.device, causal: bool = False) -> Tiling:
        """The tiles of a grid."""
        size, fixed = per_axis(self.size, len(grid), "size"), self.fixed(len(grid), causal)
        return tiling(grid, size, self._shifts(len(grid)), self.spread, device, fixed)

    def fixed(self, dims: int, causal: bool) -> bool:
        """Whether tiles are cut without regard to the length."""
        return causal and any(self._shifts(dims))

    def first(self) -> int:
        """Places of the first tile of a sequence that are left empty by the shift."""
        (size,), (shift,) = per_axis(self.size, 1, "size"), self._shifts(1)
        return (size - shift) % size

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """See :class:`farfield.parts.Part`."""
        return _Partition(self, spec)


class TileBias(nn.Module):
    """A learned bias per head for every offset between two places of a tile.

    Args:
        size: places of a full tile per axis.
        heads: query heads.
    """

    def __init__(self, size: tuple[int, ...], heads: int) -> None:
        super().__init__()
        self.size = size
        entries = 1
        for side in size:
            entries *= 2 * side - 1
        self.table = nn.Parameter(torch.empty(heads, entries))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As Swin starts it."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """`[heads, M, M]` for the M places of a tile of this grid."""
        sides = tuple(min(s, n) for s, n in zip(self.size, grid, strict=True))
        return self.table[:, offsets(self.size, sides, self.table.device)]


class _Partition(OutputModule, StreamModule):
    def __init__(self, part: Partition, spec: LayerSpec) -> None:
        super().__init__()
        self.part = part
        self.bias = TileBias(per_axis(part.size, spec.dims, "size"), spec.num_heads) if part.bias else None

    def forward(self, inputs: Inputs) -> AttentionState:
        """Attention with its log-sum-exp."""
        if inputs.cu_seqlens is not None:
            return by_segment(inputs, self.forward)
        return attend_tiles(
            inputs.rotated_q,
            inputs.rotated_k,
            inputs.v,
            self.part.tiling(inputs.grid, inputs.q.device, inputs.causal),
            scale=inputs.scale,
            bias=self._bias(inputs),
            causal=inputs.causal,
            key_mask=inputs.key_mask,
            dropout=inputs.dropout,
        )

    def output(self, inputs: Inputs) -> Tensor:
        """The output alone, by torch's fused kernels where no row can be empty."""
        if inputs.cu_seqlens is not None or inputs.key_mask is not None or inputs.causal:
            return self(inputs).out
        return tile_output(
            inputs.rotated_q,
            inputs.rotated_k,
            inputs.v,
            self.part.tiling(inputs.grid, inputs.q.device),
            scale=inputs.scale,
            bias=self._bias(inputs),
            dropout=inputs.dropout,
        )

    def _bias(self, inputs: Inputs) -> Tensor | None:
        """[Hq, M, M] for the places of a tile."""
        if self.bias is None:
            return None
        whole = self.part.fixed(len(inputs.grid), inputs.causal)
        return self.bias(self.bias.size if whole else inputs.grid)

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """The present tile, and earlier ones as far as tokens can be taken back."""
        (size,) = per_axis(self.part.size, 1, "size")
        places = size * (1 + -(-spec.rewind // size))
        return {"keys": spec.zeros(places), "values": spec.zeros(places)}

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`. O(T size)."""
        query, key, value = inputs.rotated_q, inputs.rotated_k, inputs.v
        (size,), first = per_axis(self.part.size, 1, "size"), self.part.first()
        if length == 0 and query.shape[2] > 1:
            write_ring(cache["keys"], key, first)
            write_ring(cache["values"], value, first)
            return self(inputs) if need_lse else self.output(inputs)
        bias = None if self.bias is None else self.bias((size,))
        done, pieces = 0, []
        while done < query.shape[2]:
            tile, place = divmod(first + length + done, size)
            stop = min(query.shape[2], done + size - place)
            for name, x in (("keys", key), ("values", value)):
                write_ring(cache[name], x[:, :, done:stop], first + length + done)
            pieces.append(self._in_tile(query[:, :, done:stop], cache, tile, place, bias, inputs.scale, need_lse))
            done = stop
        return join_rows(pieces)

    def _in_tile(
        self, query: Tensor, cache: Cache, tile: int, place: int, bias: Tensor | None, scale: float, need_lse: bool
    ) -> AttentionState | Tensor:
        """Queries that have the places of a tile from ``place``; their keys are in the cache."""
        (size,), stop = per_axis(self.part.size, 1, "size"), place + query.shape[2]
        start, begin = tile * size % cache["keys"].shape[2], self.part.first() if tile == 0 else 0
        keys, values = (cache[name][:, :, start + begin : start + stop] for name in ("keys", "values"))
        dtype = compute_dtype(keys.dtype)
        with exactly(query.device):
            added = None if bias is None else bias[:, place:stop, begin:stop].to(dtype)
            if query.shape[2] > 1:  # one query sees everything
                seen = torch.ones(query.shape[2], stop - begin, dtype=torch.bool, device=query.device)
                hidden = ~seen.tril(place - begin)
                none = torch.zeros(hidden.shape, dtype=dtype, device=query.device) if added is None else added
                added = none.masked_fill(hidden, -torch.inf)
            return attend_few(query, keys, values, scale=scale, bias=added, dtype=dtype, need_lse=need_lse)
