"""ByHead: every group of heads has a pyramid of its own, and some heads have none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from farfield.far.by_head_stream import Home, homes_of, shares_tokens, within
from farfield.far.expansion import Expansion
from farfield.far.pyramid import Pyramid
from farfield.geometry import integers, per_axis
from farfield.near.blocks import Blocks, near_state
from farfield.near.dense import DenseModule
from farfield.ops.cache import Cache
from farfield.ops.expansion import evenly_read, expansion_state
from farfield.ops.heads import index_of, merge_heads, take
from farfield.ops.state import AttentionState
from farfield.parts import FarPart, Inputs, LayerSpec, OutputModule, Part, by_segment
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["ByHead", "Group"]

Group = tuple[tuple[int, ...], Pyramid]
"""Query heads and the far field that they share the settings of."""


@dataclass(frozen=True)
class ByHead(FarPart):
    """Groups of query heads, each with its own :class:`farfield.far.Pyramid`, beside one near field of blocks.

    Heads differ in how much of the context they read and how sharply, so equal settings for all of them waste keys on
    some and starve others. A head that is in nothing of this sees the near field and the sinks only. Needs
    ``near=Blocks(...)`` and ``merge="softmax"``. Causal-safe where its pyramids are.

    Args:
        groups: pairs of query heads and their pyramid; no head twice. Parameters of a pyramid (learned summaries, a
            level bias) are made for the heads of its group.
        sinks: leading tokens that every head sees exactly; all pyramids must have the same number. None for theirs (0
            without groups).
        expansions: one more cell for some heads, which holds every token beyond the near field, expanded about the
            centre that is nearest to the query; no head in two of them. Beside a pyramid it is a correction of what
            opened cells leave out: what is opened is in it as well. An expansion whose centres keep tokens out of it
            (``open``) is a far field of its own, in which every token is seen once; its heads have no pyramid. For
            causal sequences.
        exact: heads that see every token exactly, as with ``near=Dense()``: few heads of a pretrained model find again
            what was said long ago (retrieval heads: Wu et al., arXiv 2404.15574; DuoAttention, 2410.10819).
    """

    groups: tuple[Group, ...] = ()
    sinks: int | None = None
    expansions: tuple[Expansion, ...] = ()
    exact: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        groups = []
        for entry in self.groups:
            if len(entry) != 2 or not isinstance(entry[1], Pyramid):
                raise TypeError(f"ByHead(groups=...): pairs (heads, far.Pyramid(...)) would be accepted, got {entry!r}")
            heads = integers(entry[0], "heads of a ByHead group")
            if not heads or min(heads) < 0:
                raise ValueError(f"ByHead: a group's heads are {heads}; one or more numbers from 0 on are needed")
            groups.append((heads, entry[1]))
        object.__setattr__(self, "groups", tuple(groups))
        given = self.expansions
        if not isinstance(given, list | tuple) or not all(isinstance(x, Expansion) for x in given):
            raise TypeError(f"ByHead(expansions={given!r}): a tuple of far.Expansion would be accepted")
        object.__setattr__(self, "expansions", tuple(given))
        exact = integers(self.exact, "exact heads of a ByHead")
        if list(exact) != sorted(set(exact)) or (exact and exact[0] < 0):
            raise ValueError(f"ByHead(exact={self.exact!r}): rising numbers from 0 on would be accepted")
        object.__setattr__(self, "exact", exact)
        in_groups = [h for heads, _ in groups for h in heads]
        apart = [h for x in self.expansions if x.open for h in x.heads]
        for places in (in_groups + apart + list(exact), [*(h for x in self.expansions for h in x.heads), *exact]):
            twice = sorted(head for head, times in Counter(places).items() if times > 1)
            if twice:
                raise ValueError(f"ByHead: heads {twice} are in more than one place; a head has one far field")
        sinks = {pyramid.sinks for _, pyramid in groups} | (set() if self.sinks is None else {self.sinks})
        if len(sinks) > 1:
            raise ValueError(
                f"ByHead: sinks of {sorted(sinks)} tokens; the near field sees them once for all heads, so all "
                "pyramids (and sinks=) need the same number"
            )
        (count,) = sinks or {0}
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"ByHead(sinks={count!r}): a number of leading tokens >= 0 would be accepted")
        object.__setattr__(self, "sinks", count)

    @property
    def opens(self) -> bool:
        """Whether any group opens cells."""
        return any(pyramid.open for _, pyramid in self.groups)

    @property
    def takes_dropout(self) -> bool:  # type: ignore[override]
        """Where nothing is opened, and there is no expansion."""
        return not self.opens and not self.expansions

    @property
    def causal_safe(self) -> bool:
        """Whether no output depends on a later token when built causal."""
        return all(pyramid.causal_safe for _, pyramid in self.groups)

    why_not_causal = Pyramid.why_not_causal

    @property
    def cost(self) -> str:
        """Score computations for n tokens."""
        parts = [f"{len(heads)} heads: {pyramid.cost}" for heads, pyramid in self.groups]
        parts += [f"{len(x.heads)} heads: n·({x.number}·D + {x.open})" for x in self.expansions]
        parts += [f"{len(self.exact)} heads: n²"] if self.exact else []
        return " + ".join(parts) or "0"

    def fuses(self, near: Part | None, merge: str) -> bool:
        """The near field is computed once, and every group's far field is merged into its heads."""
        return isinstance(near, Blocks) and merge == "softmax"

    def check(self, spec: LayerSpec, near: Part | None = None) -> None:
        """See :class:`farfield.parts.Part`."""
        if not isinstance(near, Blocks):
            raise ValueError(
                f"far={self!r} with near={near!r}: its interaction lists are the complement of leaf blocks; "
                "use near=Blocks(...)"
            )
        named = [h for heads, _ in self.groups for h in heads] + list(self.exact)
        beyond = sorted(h for h in named if h >= spec.num_heads)
        if beyond:
            raise ValueError(f"ByHead names heads {beyond} in a layer of {spec.num_heads}: 0 to {spec.num_heads - 1}")
        for expansion in self.expansions:
            _check_expansion(expansion, spec)
        for _, pyramid in self.groups:
            pyramid.check(spec, near)

    def build(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """Refused: heads without a group have no far field that could stand alone.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"far={self!r} is computed together with its near field: use merge='softmax'")

    def build_fused(self, spec: LayerSpec, near: Part | None = None) -> nn.Module:
        """Near and far field together."""
        self.check(spec, near)
        assert isinstance(near, Blocks)
        return _ByHead(self, spec, near)


class _ByHead(OutputModule, StreamModule):
    def __init__(self, options: ByHead, spec: LayerSpec, near: Blocks) -> None:
        super().__init__()
        self.options, self.spec = options, spec
        self.block = per_axis(near.block, spec.dims, "Blocks.block")
        self.heads = [list(heads) for heads, _ in options.groups]
        self.kv_heads = [_key_heads(heads, spec.num_heads // spec.num_kv_heads) for heads in self.heads]
        self.parts = nn.ModuleList()
        self.dense = DenseModule()
        self._homes: dict[int, tuple[Home, ...]] = {}
        for heads, kv_heads, (_, pyramid) in zip(self.heads, self.kv_heads, options.groups, strict=True):
            alone = replace(spec, num_heads=len(heads), num_kv_heads=len(kv_heads))
            self.parts.append(pyramid.build_far(alone, near))

    def forward(self, inputs: Inputs) -> AttentionState:
        """The attention state of near and far field. With exact heads O(N²) memory, for their log-sum-exp."""
        return self._with_exact(self._inexact(inputs), inputs, True)

    def output(self, inputs: Inputs) -> Tensor:
        """The output alone, when nobody needs the log-sum-exp."""
        return self._with_exact(self._inexact(inputs), inputs, False).out

    def _with_exact(self, state: AttentionState, inputs: Inputs, need_lse: bool) -> AttentionState:
        """With exact heads in their places; without ``need_lse`` theirs is left as it was."""
        if not self.options.exact:
            return state
        kv_heads = _key_heads(list(self.options.exact), self.spec.num_heads // self.spec.num_kv_heads)
        own = self._of_heads(inputs, list(self.options.exact), kv_heads)
        index = index_of(self.options.exact, state.out.device)
        lse = state.lse
        if need_lse:
            out, of_exact = self.dense(own)
            lse = lse.index_copy(1, index, of_exact.to(lse.dtype))
        else:
            out = self.dense.output(own)
        return AttentionState(state.out.index_copy(1, index, out.to(state.out.dtype)), lse)

    def _inexact(self, inputs: Inputs) -> AttentionState:
        """Of all heads but the exact ones."""
        far = [
            part(self._of_heads(inputs, heads, kv_heads))
            for heads, kv_heads, part in zip(self.heads, self.kv_heads, self.parts, strict=True)
        ]
        return merge_heads(self._all_heads(inputs), far, tuple(head for heads in self.heads for head in heads))

    def _all_heads(self, inputs: Inputs) -> AttentionState:
        """What needs no group: the near field and the expansions."""
        near = near_state(inputs, self.block, self.options.sinks or 0)
        states = [self._expansion(inputs, x) for x in self.options.expansions]
        return merge_heads(near, states, tuple(head for x in self.options.expansions for head in x.heads))

    def _expansion(self, inputs: Inputs, expansion: Expansion) -> AttentionState:
        """Everything far, for the heads that have this expansion."""
        if inputs.cu_seqlens is not None:
            state = by_segment(inputs, lambda part: self._expansion(part, expansion))
            assert isinstance(state, AttentionState)
            return state
        read = tuple(_key_heads(list(expansion.heads), self.spec.num_heads // self.spec.num_kv_heads))
        query, key, value = take(inputs.rotated_q, expansion.heads), take(inputs.rotated_k, read), take(inputs.v, read)
        centres, bias = expansion.on(query.device)
        return expansion_state(
            query, key, value, centres, bias, block=self.block[0], key_mask=inputs.key_mask, scale=inputs.scale,
            sinks=self.options.sinks or 0, open=expansion.open,
        )  # fmt: skip

    def _of_heads(self, inputs: Inputs, heads: list[int], kv_heads: list[int]) -> Inputs:
        """The inputs of a group: its queries, and the keys and values that they read."""
        return replace(
            inputs,
            q=take(inputs.q, tuple(heads)),
            k=take(inputs.k, tuple(kv_heads)),
            v=take(inputs.v, tuple(kv_heads)),
        )

    def _parts(self) -> list[tuple[str, StreamModule, list[int], list[int]]]:
        """Name in a cache, module, query heads and key heads of every group."""
        parts = []
        for number, (part, heads, kv_heads) in enumerate(zip(self.parts, self.heads, self.kv_heads, strict=True)):
            assert isinstance(part, StreamModule)
            parts.append((f"{number}/", part, heads, kv_heads))
        return parts

    def _apart(self) -> list[tuple[str, StreamModule, list[int], list[int]]]:
        """Those of :meth:`_parts` that have a cache of their own."""
        return [
            entry
            for entry, (_, pyramid) in zip(self._parts(), self.options.groups, strict=True)
            if not shares_tokens(pyramid)
        ]

    def _kept(self, rewind: int) -> tuple[Home, ...]:
        """Near field, sinks, expansions, and all groups that open cells of one level."""
        if rewind not in self._homes:
            self._homes[rewind] = homes_of(
                self.options.groups, self.options.expansions, self.options.exact, block=self.block[0],
                sinks=self.options.sinks or 0, num_heads=self.spec.num_heads, num_kv_heads=self.spec.num_kv_heads,
                rewind=rewind,
            )  # fmt: skip
        return self._homes[rewind]

    def why_no_stream(self, spec: StreamSpec) -> str | None:
        """See :class:`farfield.streaming.StreamModule`."""
        if spec.rewind > self.block[0]:
            return f"rewind={spec.rewind}: tokens of one block={self.block[0]} can be taken back"
        reasons = [part.why_no_stream(spec) for _, part, _, _ in self._parts()]
        return next((reason for reason in reasons if reason is not None), None)

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """What the homes keep, and beside them every other pyramid for its heads."""
        cache: Cache = {}
        for home in self._kept(spec.rewind):
            cache |= home.empty(spec.batch_size, spec.head_dim, spec.dtype, spec.device)
        for prefix, part, heads, kv_heads in self._apart():
            own = part.empty_cache(replace(spec, num_heads=len(heads), num_kv_heads=len(kv_heads)))
            cache |= {prefix + name: x for name, x in own.items()}
        return cache

    def reserve(self, cache: Cache, length: int, rewind: int) -> None:
        """See :class:`farfield.streaming.StreamModule`."""
        for home in self._kept(rewind):
            home.reserve(cache, length)
        for prefix, part, _, _ in self._apart():
            with within(cache, prefix) as own:
                part.reserve(own, length, rewind)

    def resume(self, cache: Cache, length: int, rewind: int) -> None:
        """See :class:`farfield.streaming.StreamModule`."""
        for home in self._kept(rewind):
            home.resume(cache, length)
        for prefix, part, _, _ in self._apart():
            with within(cache, prefix) as own:
                part.resume(own, length, rewind)

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`."""
        tokens = inputs.rotated_q, inputs.rotated_k, inputs.v
        whole, homes = length == 0 and inputs.q.shape[2] > 1, self._kept(rewind)
        if whole:
            for home in homes:
                home.fill(cache, tokens, inputs.scale)
            common = self._with_exact(self._all_heads(inputs), inputs, need_lse)
        else:
            common = _in_order(homes, [home.step(cache, tokens, length, inputs.scale) for home in homes])
        far, index = [], []
        for (prefix, part, heads, kv_heads), (_, pyramid) in zip(self._parts(), self.options.groups, strict=True):
            if shares_tokens(pyramid):
                if not whole:
                    continue
                of_group = part(self._of_heads(inputs, heads, kv_heads))
            else:
                with within(cache, prefix) as own:
                    of_group = part.step(self._of_heads(inputs, heads, kv_heads), own, length, rewind, True)
            assert isinstance(of_group, AttentionState)
            far.append(of_group)
            index += heads
        state = merge_heads(common, far, tuple(index))
        return state if need_lse else state.out

    def extra_repr(self) -> str:
        """What was asked for."""
        return f"{self.options!r}"


def _in_order(homes: tuple[Home, ...], states: list[AttentionState]) -> AttentionState:
    """The states of all homes, their heads in the layer's order."""
    if len(states) == 1:
        return states[0]
    heads = [head for home in homes for head in home.heads]
    index = index_of(tuple(heads.index(head) for head in range(len(heads))), states[0].out.device)
    return AttentionState(*(torch.cat(x, 1).index_select(1, index) for x in zip(*states, strict=True)))


def _check_expansion(expansion: Expansion, spec: LayerSpec) -> None:
    if not spec.causal or spec.dims != 1:
        raise ValueError(
            f"ByHead(expansions=...) in a layer with causal={spec.causal}, dims={spec.dims}: its sums run along a "
            "causal sequence; causal=True and dims=1 would be accepted"
        )
    if expansion.heads[-1] >= spec.num_heads or expansion.width != spec.head_dim:
        raise ValueError(
            f"{expansion!r} in a layer of {spec.num_heads} heads of width {spec.head_dim}: heads 0 to "
            f"{spec.num_heads - 1} and centres of that width would be accepted"
        )


def _key_heads(heads: list[int], group: int) -> list[int]:
    """The key heads of a selection, so that consecutive query heads share them evenly."""
    return evenly_read([head // group for head in heads])
