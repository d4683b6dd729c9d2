"""The layer: a near field, a far field, and a way to merge them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from farfield.merge import AttentionState, Merge, merge_states, resolve_merge
from farfield.parts import FarPart, Inputs, LayerSpec, NearPart, OutputModule, Part
from farfield.position_bias import PositionBias, places
from farfield.rope import Rope, segment_positions
from farfield.streaming import Decoder, StreamSpec, StreamState, row_positions

__all__ = ["Attention", "ReadyAttention"]

MOST_OCTAVES = 16
"""Of a position bias: waves of 131,072 tokens."""


class _Mixing(nn.Module):
    """A near field, a far field and their merge, on ready queries, keys and values."""

    spec: LayerSpec
    near: nn.Module | None
    far: nn.Module | None
    merge: nn.Module | None

    def _assemble(self, spec: LayerSpec, near: NearPart | None, far: FarPart | None, merge: Merge) -> None:
        """Builds the three parts, which :func:`_check` has accepted."""
        self.spec, self.near_spec, self.far_spec, self.merge_spec = spec, near, far, merge
        self.fused = far is not None and far.fuses(near, merge.name)
        self.near = None if near is None or self.fused else near.build(spec)
        self.far = None if far is None else far.build_fused(spec, near) if self.fused else far.build(spec, near)
        both = self.near is not None and self.far is not None
        self.merge = merge.build(spec) if both else None

    def attend(self, inputs: Inputs) -> Tensor:
        """The layer between its projections, for whoever has queries, keys and values already: `[B, Hq, N, D]`.

        A position bias is part of the projections: its waves are the last channels of D.

        Raises:
            ValueError: when they are missing.
        """
        self._check_width(inputs)
        if self.near is not None and self.far is not None and self.merge is not None:
            out: Tensor = self.merge(self.near(inputs), self.far(inputs), inputs.x)
            return out
        return self._only(inputs)

    @property
    def why_no_state(self) -> str | None:
        """Why :meth:`state` cannot work; None when it can."""
        for role, part in (("near", self.near_spec), ("far", self.far_spec)):
            if part is not None and not part.gives_state:
                return f"{role}={part!r} gives no attention state, {part.why_no_state}"
        if self.near_spec is not None and self.far_spec is not None and self.merge_spec.name != "softmax":
            return f"merge={self.merge_spec.name!r} adds outputs that are normalised on their own"
        return None

    def state(self, inputs: Inputs) -> AttentionState:
        """As :meth:`attend`, with the log-sum-exp, so that further keys can join the softmax.

        Raises:
            ValueError: for parts or a merge without one, with the reason.
        """
        why = self.why_no_state
        if why is not None:
            raise ValueError(f"there is no log-sum-exp of this attention: {why}")
        self._check_width(inputs)
        states: list[AttentionState] = [part(inputs) for part in (self.near, self.far) if part is not None]
        return merge_states(*states)

    def _check_width(self, inputs: Inputs) -> None:
        """Without a position bias parts take any width; with one its waves must be there."""
        given, wanted, waves = inputs.q.shape[-1], self.spec.head_dim, self.spec.waves
        if waves and given != wanted:
            raise ValueError(
                f"queries have {given} channels per head, the layer works on {wanted}, the last {waves} of them the "
                "waves of its position bias"
            )

    def _only(self, inputs: Inputs) -> Tensor:
        """The output of the one part there is; some have a faster way to it when nobody needs the log-sum-exp."""
        part = self.near if self.near is not None else self.far
        assert part is not None
        if isinstance(part, OutputModule):
            return part.output(inputs)
        result: AttentionState | Tensor = part(inputs)
        return result.out if isinstance(result, AttentionState) else result

    def extra_repr(self) -> str:
        """The three parts, as given."""
        spec = self.spec
        text = f"dim={spec.dim}, num_heads={spec.num_heads}, num_kv_heads={spec.num_kv_heads}, causal={spec.causal}"
        return f"{text}, near={self.near_spec}, far={self.far_spec}, merge={self.merge_spec}, dims={spec.dims}"


class ReadyAttention(_Mixing):
    """A near field, a far field and their merge without projections: for queries, keys and values made elsewhere.

    Call :meth:`attend`. Its `Inputs.x` may be any `[B, N, 0]`: parts that read the layer's input are refused.

    Args:
        spec: heads, widths, order and dimensions; `dim` is not used.
        near, far, merge: as in :class:`Attention`.
        dropout: the highest that will be asked for.

    Raises:
        ValueError: for a combination that makes no sense, or a part that reads the layer's input, with the reason.
        TypeError: for parts or merges that are none.
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        near: NearPart | None = None,
        far: FarPart | None = None,
        merge: str | Merge = "softmax",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        chosen = resolve_merge(merge)
        _check(spec, near, far, chosen, None, dropout)
        mixture = chosen if near is not None and far is not None else None
        for role, part in (("near", near), ("far", far), ("merge", mixture)):
            if part is not None and part.reads_input:
                raise ValueError(
                    f"{role}={part!r} reads the layer's input x, and here are only queries, keys and values; "
                    "use farfield.Attention, or another part"
                )
        self._assemble(spec, near, far, chosen)


class Attention(_Mixing):
    """Multi-head attention made of a near field, a far field and a merge.

    Everything that can be refused is refused at construction, with the reason.

    Args:
        dim: width of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads; must divide num_heads. Default num_heads.
        head_dim: channels per head. Default dim // num_heads.
        causal: token i depends on tokens 0..i only. 1-D.
        near: which tokens a query sees exactly: `near.Blocks`, `near.Window`, `near.Dense`, ...; None for none.
        far: through what it sees the rest: `far.Pyramid`, `far.Landmarks`, `far.Linear`, ...; None for none.
        merge: "softmax" (one joint softmax), "gate", "sum", or a merge with options such as `Gate(per="channel")`.
            Without effect when only one part is given.
        dims: 1 (sequence), 2 (image) or 3 (video, volume).
        rope: base of a rotary embedding of queries and keys, such as 10000.0; 1-D. None for no rotation.
        position_bias: octaves of a learned bias per head by offset along every axis, which starts at 0, see
            :class:`farfield.position_bias.PositionBias`: waves of 4 to 2 ** (position_bias + 1) tokens, after which it
            repeats. Each costs two more channels of a head per axis. For parts that score tokens or means of them.
            None for no bias.
        qkv_bias: biases in the projection to queries, keys and values.
        proj_bias: biases in the output projection.
        qk_norm: an RMSNorm over the channels of every query and key head.
        dropout: probability of dropping an attention weight in training.
        device: where to make the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a combination that makes no sense; the message says why and what would be accepted.
        TypeError: for parts or merges that are none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        near: NearPart | None = None,
        far: FarPart | None = None,
        merge: str | Merge = "softmax",
        dims: int = 1,
        rope: float | None = None,
        position_bias: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        qk_norm: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spec = _layer_spec(dim, num_heads, num_kv_heads, head_dim, causal, dims)
        chosen = resolve_merge(merge)
        _check(spec, near, far, chosen, rope, dropout, position_bias)
        self.dropout = dropout
        self.head_dim = spec.head_dim
        self.rope = None if rope is None else Rope(float(rope))
        self.scale = 1 / math.sqrt(spec.head_dim)
        with torch.device(device) if device is not None else nullcontext():
            width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
            self.qkv = nn.Linear(dim, width + 2 * kv_width, bias=qkv_bias)
            self.proj = nn.Linear(width, dim, bias=proj_bias)
            self.q_norm = nn.RMSNorm(spec.head_dim) if qk_norm else None
            self.k_norm = nn.RMSNorm(spec.head_dim) if qk_norm else None
            self.position_bias = None
            if position_bias is not None:
                self.position_bias = PositionBias(spec.num_heads, spec.dims, position_bias)
                waves = self.position_bias.channels
                spec = replace(spec, head_dim=spec.head_dim + waves, waves=waves)
            self._assemble(spec, near, far, chosen)
        self._description = f"{self.extra_repr()}, head_dim={spec.head_dim}, rope={self.rope}"
        if position_bias is not None:
            self._description += f", position_bias={position_bias}"
        if dtype is not None:
            self.to(dtype)

    def forward(
        self,
        x: Tensor,
        *,
        grid: tuple[int, ...] | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: `[B, N, dim]`, tokens in row-major order over the grid.
            grid: lengths of the axes, with product N. Default `(N,)` in 1-D; needed in 2-D and 3-D.
            key_mask: bool `[B, N]`, True = the token is visible to others. Outputs at hidden tokens are computed too.
                Hidden tokens may hold anything: what is not finite there is read as 0.
            cu_seqlens: int `[S + 1]`, 0 = first < ... < last = N: packed segments that do not see each other, the same
                in every batch entry; rotary positions restart in each. With a key_mask too, cu_seqlens wins. 1-D.

        Returns:
            `[B, N, dim]`.

        Raises:
            ValueError: when shapes, grid, mask or segments do not fit; the message repeats what was given.
        """
        return self._mixed(self.attend(self._inputs(x, grid, key_mask, cu_seqlens)))

    def stream(
        self,
        batch_size: int = 1,
        *,
        rewind: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StreamState:
        """A state of rows without tokens, for :meth:`step`.

        Args:
            batch_size: rows.
            rewind: tokens that ``state.rewind`` may take back; each needs a little room.
            dtype: of queries, keys and values. Default: of the parameters.
            device: default: of the parameters.

        Raises:
            ValueError: when the layer cannot be streamed, with the reason.
        """
        if not self.spec.causal:
            raise ValueError("a stream takes tokens in as they come, and this layer reads later ones; use causal=True")
        weight = self.qkv.weight
        spec = StreamSpec(
            batch_size=batch_size,
            num_heads=self.spec.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            rewind=rewind,
            rope=self.rope is not None,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else torch.device(device),
        )
        return self._decoder().stream(spec)

    @torch.no_grad()
    def step(self, x: Tensor, state: StreamState, *, present: Tensor | None = None) -> Tensor:
        """Takes the next tokens in and attends from each; a prompt is a step with many tokens.

        Equals the last T rows of ``layer(tokens so far and x)``. Whole prompts run through the layer's fast operator.

        Args:
            x: `[B, T, dim]`, T >= 1.
            state: of :meth:`stream`; changed in place.
            present: bool `[B, T]`, True where the row has a token; padding on either side takes no place in the
                sequence, and its outputs mean nothing. Default: everywhere.

        Returns:
            `[B, T, dim]`, without gradients and without dropout.

        Raises:
            ValueError: when x or the state does not fit.
        """
        self._check_tokens(x)
        state.check(self._description, x.shape[0], x.device)
        positions = None
        if self.rope is not None or self.position_bias is not None:
            positions = row_positions(state.lengths, x.shape[1], present, x.device)
        return self._mixed(self.attend_step(self._project(x, (x.shape[1],), positions, 0.0), state, present=present))

    def attend_step(self, inputs: Inputs, state: StreamState, *, present: Tensor | None = None) -> Tensor:
        """The step between the projections: `[B, Hq, T, D]`; see :meth:`farfield.streaming.Decoder.step`."""
        self._check_width(inputs)
        return self._decoder().step(inputs, state, present)

    def _mixed(self, out: Tensor) -> Tensor:
        """The output projection of `[B, Hq, N, D]`, without the channels of a position bias."""
        mixed: Tensor = self.proj(out[..., : self.head_dim].transpose(1, 2).flatten(2))
        return mixed

    def _decoder(self) -> Decoder:
        return Decoder(self.near, self.far, self.merge, self._description)

    def _check_tokens(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[2] != self.spec.dim:
            raise ValueError(f"x must be [B, N, {self.spec.dim}] (batch, tokens, dim), got shape {tuple(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError(f"x holds no tokens: shape {tuple(x.shape)}; give at least one")

    def _inputs(
        self, x: Tensor, grid: tuple[int, ...] | None, key_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Inputs:
        spec = self.spec
        self._check_tokens(x)
        batch, tokens = x.shape[:2]
        grid = _check_grid(grid, tokens, spec.dims)
        if cu_seqlens is not None:
            _check_segments(cu_seqlens, tokens, spec.dims)
            key_mask = None
        if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, tokens)):
            raise ValueError(
                f"key_mask must be a bool tensor [B, N] = {(batch, tokens)} (True = visible), "
                f"got {key_mask.dtype} {tuple(key_mask.shape)}"
            )
        if key_mask is not None:
            # Also for the gradients of weights, where 0 times NaN would be NaN.
            x = torch.where(key_mask[..., None] | x.isfinite(), x, torch.zeros_like(x))
        placed = self.rope is not None or (self.position_bias is not None and spec.dims == 1)
        positions = segment_positions(tokens, cu_seqlens, x.device) if placed else None
        return self._project(x, grid, positions, self.dropout if self.training else 0.0, key_mask, cu_seqlens)

    def _project(
        self,
        x: Tensor,
        grid: tuple[int, ...],
        positions: Tensor | None,
        dropout: float,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Inputs:
        spec = self.spec
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        qkv = self.qkv(x).unflatten(-1, (heads + 2 * kv_heads, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.position_bias is not None:
            where = places(grid, x.device) if positions is None else positions.unsqueeze(-1)
            q, k, v = self.position_bias(q, k, v, where, self.scale)
        return Inputs(
            q=q,
            k=k,
            v=v,
            x=x,
            grid=grid,
            causal=spec.causal,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            scale=self.scale,
            dropout=dropout,
            rope=self.rope,
            positions=positions,
        )


def _layer_spec(
    dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None, causal: bool, dims: int
) -> LayerSpec:
    given = {"dim": dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}")
    if causal and dims != 1:
        raise ValueError(f"causal=True with dims={dims}: only a sequence has an order to respect; use dims=1")
    if head_dim is None:
        if dim % num_heads:
            raise ValueError(
                f"dim={dim} does not divide among num_heads={num_heads}; give a multiple of num_heads, or head_dim"
            )
        head_dim = dim // num_heads
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    return LayerSpec(dim, num_heads, num_kv_heads, head_dim, bool(causal), dims)


def _check(
    spec: LayerSpec,
    near: Part | None,
    far: Part | None,
    merge: Merge,
    rope: float | None,
    dropout: float,
    position_bias: int | None = None,
) -> None:
    if near is None and far is None:
        raise ValueError("near=None and far=None: the layer would see nothing; near=Dense() sees every token exactly")
    if near is not None and not isinstance(near, NearPart):
        hint = f"; {type(near).__name__} is a far field, pass it as far=" if isinstance(near, FarPart) else ""
        raise TypeError(f"near must be a near field such as near.Window(128), got {near!r}{hint}")
    if far is not None and not isinstance(far, FarPart):
        hint = f"; {type(far).__name__} is a near field, pass it as near=" if isinstance(far, NearPart) else ""
        raise TypeError(f"far must be a far field such as far.Pyramid(rank=8), got {far!r}{hint}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
    if rope is not None:
        if spec.dims != 1:
            raise ValueError(f"rope={rope!r} with dims={spec.dims}: the rotary embedding is 1-D; leave rope=None")
        if spec.head_dim % 2:
            raise ValueError(f"rope={rope!r} turns channels in pairs: head_dim={spec.head_dim} must be even")
        if not rope > 0:
            raise ValueError(f"rope={rope!r}: the base must be positive, such as 10000.0")
    if position_bias is not None:
        _check_position_bias(position_bias, near, far, rope)
    for role, part in (("near", near), ("far", far)):
        if part is not None:
            _check_part(spec, role, part, merge, dropout, joint=near is not None and far is not None)
    if near is not None:
        near.check(spec)
    if far is not None:
        far.check(spec, near)


def _check_part(spec: LayerSpec, role: str, part: Part, merge: Merge, dropout: float, joint: bool) -> None:
    if spec.dims not in part.dims:
        works = ", ".join(f"{d}-D" for d in part.dims)
        raise ValueError(f"{role}={part!r} works in {works}; dims={spec.dims} was asked for")
    if spec.causal and not part.causal_safe:
        raise ValueError(f"{role}={part!r} is not causal-safe: {part.why_not_causal}; use causal=False or another part")
    if joint and merge.needs_state and not part.gives_state:
        raise ValueError(
            f"merge={merge.name!r} needs attention states from both parts, but {role}={part!r} gives none: "
            f"{part.why_no_state}; use merge='gate' or merge='sum'"
        )
    if dropout and not part.takes_dropout:
        raise ValueError(f"dropout={dropout}: {role}={part!r} has no attention dropout; use dropout=0.0")


def _check_position_bias(octaves: int, near: Part | None, far: Part | None, rope: float | None) -> None:
    if isinstance(octaves, bool) or not isinstance(octaves, int) or not 1 <= octaves <= MOST_OCTAVES:
        raise ValueError(f"position_bias={octaves!r}: a number of octaves from 1 to {MOST_OCTAVES}, or None, would do")
    if rope is not None:
        raise ValueError(f"position_bias={octaves} with rope={rope!r}: a rotation turns all channels; use one of both")
    for role, part in (("near", near), ("far", far)):
        if part is not None and not part.takes_position_bias:
            raise ValueError(
                f"position_bias={octaves}: {role}={part!r} does not score tokens or means of them by their keys alone, "
                "so a bias by offset would not be one there; use position_bias=None"
            )


def _check_grid(grid: tuple[int, ...] | None, tokens: int, dims: int) -> tuple[int, ...]:
    if grid is None:
        if dims != 1:
            raise ValueError(f"a {dims}-D layer needs grid=, the lengths of its {dims} axes with product {tokens}")
        return (tokens,)
    grid = tuple(grid)
    if len(grid) != dims or math.prod(grid) != tokens:
        raise ValueError(
            f"grid={grid} must hold {dims} axis length(s) with product N = {tokens}; its product is {math.prod(grid)}"
        )
    return grid


def _check_segments(cu_seqlens: Tensor, tokens: int, dims: int) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens={cu_seqlens!r}: an int32 or int64 tensor [S + 1] would be accepted")
    if dims != 1:
        raise ValueError(f"cu_seqlens packs 1-D sequences; this layer has dims={dims}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be an int32 or int64 tensor [S + 1] of at least 2 bounds, got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens must rise from 0 to N = {tokens}, got {bounds}")
