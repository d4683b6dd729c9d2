"""ByHead: every group of heads has a pyramid of its own, and some heads have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from farfield.far.expansion import Expansion
from farfield.far.pyramid import Pyramid
from farfield.geometry import integers, per_axis
from farfield.near.blocks import Blocks, near_state
from farfield.ops.cache import Cache, join_rows
from farfield.ops.expansion import ExpansionStream, expansion_state
from farfield.ops.multipole.stream import MultipoleStream, Weights
from farfield.ops.opened.heads import HeadsStream, Opens
from farfield.ops.state import AttentionState, merge_states
from farfield.parts import FarPart, Inputs, LayerSpec, Part, by_segment
from farfield.streaming import StreamModule, StreamSpec

__all__ = ["ByHead", "Group"]

Group = tuple[tuple[int, ...], Pyramid]
"""Query heads and the far field that they share the settings of."""


@dataclass(frozen=True)
class ByHead(FarPart):
    """Groups of query heads, each with its own :class:`farfield.far.Pyramid`, beside one near field of blocks.

    Heads differ in how much of the context they read and how sharply, so equal settings for all of them waste keys on
    some and starve others. A head that is in no group sees the near field and the sinks only. Needs
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
    """

    groups: tuple[Group, ...] = ()
    sinks: int | None = None
    expansions: tuple[Expansion, ...] = ()

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
        in_groups = [h for heads, _ in groups for h in heads]
        apart = [h for x in self.expansions if x.open for h in x.heads]
        for places in (in_groups + apart, [h for x in self.expansions for h in x.heads]):
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
        beyond = sorted(h for heads, _ in self.groups for h in heads if h >= spec.num_heads)
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


class _ByHead(StreamModule):
    def __init__(self, options: ByHead, spec: LayerSpec, near: Blocks) -> None:
        super().__init__()
        self.options, self.spec = options, spec
        self.block = per_axis(near.block, spec.dims, "Blocks.block")
        self.heads = [list(heads) for heads, _ in options.groups]
        self.kv_heads = [_key_heads(heads, spec.num_heads // spec.num_kv_heads) for heads in self.heads]
        self.parts = nn.ModuleList()
        # Whether decoding keeps all tokens in one place.
        self.together = any(_together(pyramid) for _, pyramid in options.groups) or any(
            x.open for x in options.expansions
        )
        for heads, kv_heads, (_, pyramid) in zip(self.heads, self.kv_heads, options.groups, strict=True):
            alone = replace(spec, num_heads=len(heads), num_kv_heads=len(kv_heads))
            self.parts.append(pyramid.build_far(alone, near))

    def forward(self, inputs: Inputs) -> AttentionState:
        """The attention state of near and far field."""
        far = [
            part(self._of_heads(inputs, heads, kv_heads))
            for heads, kv_heads, part in zip(self.heads, self.kv_heads, self.parts, strict=True)
        ]
        return self._joined(self._all_heads(inputs), far, [head for heads in self.heads for head in heads])

    def _all_heads(self, inputs: Inputs) -> AttentionState:
        """What needs no group: the near field and the expansions."""
        near = near_state(inputs, self.block, self.options.sinks or 0)
        return self._with_expansions(near, [self._expansion(inputs, x) for x in self.options.expansions])

    def _with_expansions(self, near: AttentionState, states: list[AttentionState]) -> AttentionState:
        return self._joined(near, states, [head for x in self.options.expansions for head in x.heads])

    def _expansion(self, inputs: Inputs, expansion: Expansion) -> AttentionState:
        """Everything far, for the heads that have this expansion."""
        if inputs.cu_seqlens is not None:
            state = by_segment(inputs, lambda part: self._expansion(part, expansion))
            assert isinstance(state, AttentionState)
            return state
        query, key, value = self._of_expansion(expansion, inputs.rotated_q, inputs.rotated_k, inputs.v)
        centres, bias = expansion.on(query.device)
        return expansion_state(
            query, key, value, centres, bias, block=self.block[0], key_mask=inputs.key_mask, scale=inputs.scale,
            sinks=self.options.sinks or 0, open=expansion.open,
        )  # fmt: skip

    def _read_by(self, expansion: Expansion) -> list[int]:
        """The key heads of an expansion's heads."""
        return _key_heads(list(expansion.heads), self.spec.num_heads // self.spec.num_kv_heads)

    def _of_expansion(
        self, expansion: Expansion, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the heads that have it."""
        read = self._read_by(expansion)
        return _take(query, list(expansion.heads)), _take(key, read), _take(value, read)

    def _joined(self, near: AttentionState, far: list[AttentionState], heads: list[int]) -> AttentionState:
        """The far fields of groups, one after the other of ``heads``, merged into the near field of these heads."""
        if not far:
            return near
        joined = far[0]
        if len(far) > 1:
            joined = AttentionState(torch.cat([x.out for x in far], 1), torch.cat([x.lse for x in far], 1))
        if heads == list(range(near.out.shape[1])):  # every head in its place: nothing to pick and put back
            return merge_states(near, joined)
        index = _index(tuple(heads), near.out.device)
        joint = merge_states(AttentionState(near.out.index_select(1, index), near.lse.index_select(1, index)), joined)
        return AttentionState(
            near.out.index_copy(1, index, joint.out.to(near.out.dtype)), near.lse.index_copy(1, index, joint.lse)
        )

    def _of_heads(self, inputs: Inputs, heads: list[int], kv_heads: list[int]) -> Inputs:
        """The inputs of a group: its queries, and the keys and values that they read."""
        return replace(
            inputs,
            q=_take(inputs.q, heads),
            k=_take(inputs.k, kv_heads),
            v=_take(inputs.v, kv_heads),
        )

    def _parts(self) -> list[tuple[str, StreamModule, list[int], list[int]]]:
        """Name in a cache, module, query heads and key heads of every group."""
        parts = []
        for number, (part, heads, kv_heads) in enumerate(zip(self.parts, self.heads, self.kv_heads, strict=True)):
            assert isinstance(part, StreamModule)
            parts.append((f"{number}/", part, heads, kv_heads))
        return parts

    def _stream(self, rewind: int) -> MultipoleStream:
        """Near field and sinks, where no tokens are kept for opening."""
        assert self.options.sinks is not None
        return MultipoleStream(self.block[0], 1, None, False, self.options.sinks, "near", rewind)

    def _moments(self, rewind: int) -> list[tuple[str, Expansion, ExpansionStream]]:
        """Name in a cache, options and stream of every expansion."""
        sinks = self.options.sinks or 0
        return [
            (f"expansion{i}/", x, ExpansionStream(self.block[0], sinks, rewind, x.open))
            for i, x in enumerate(self.options.expansions)
        ]

    def _apart(self) -> list[tuple[str, StreamModule, list[int], list[int]]]:
        """Those of :meth:`_parts` that have a cache of their own."""
        return [
            entry
            for entry, (_, pyramid) in zip(self._parts(), self.options.groups, strict=True)
            if not _together(pyramid)
        ]

    def _kept(self, rewind: int) -> HeadsStream:
        """Near field, sinks, and all groups that open cells of one level, on one copy of the tokens."""
        return _heads_stream(self.options, self.block[0], self.spec.num_heads, self.spec.num_kv_heads, rewind)

    def why_no_stream(self, spec: StreamSpec) -> str | None:
        """See :class:`farfield.streaming.StreamModule`."""
        reasons = [self._stream(spec.rewind).why_not(), *(part.why_no_stream(spec) for _, part, _, _ in self._parts())]
        return next((reason for reason in reasons if reason is not None), None)

    def empty_cache(self, spec: StreamSpec) -> Cache:
        """All tokens where cells of one level are opened or centres keep any, otherwise the last blocks and the sinks.

        Beside them what every other pyramid keeps for its heads.
        """
        place = spec.dtype, spec.device
        if self.together:
            own = self._kept(spec.rewind).empty(spec.batch_size, spec.head_dim, *place)
            cache = {f"tokens/{name}": x for name, x in own.items()}
        else:
            sizes = spec.batch_size, spec.num_heads, spec.num_kv_heads, spec.head_dim
            cache = {f"near/{name}": x for name, x in self._stream(spec.rewind).empty(*sizes, *place).items()}
        for prefix, expansion, stream in self._moments(spec.rewind):
            own = stream.empty(spec.batch_size, expansion.tensor(), *place)
            cache |= {prefix + name: x for name, x in own.items()}
        for prefix, part, heads, kv_heads in self._apart():
            own = part.empty_cache(replace(spec, num_heads=len(heads), num_kv_heads=len(kv_heads)))
            cache |= {prefix + name: x for name, x in own.items()}
        return cache

    def reserve(self, cache: Cache, length: int, rewind: int) -> None:
        """See :class:`farfield.streaming.StreamModule`."""
        if self.together:
            with _within(cache, "tokens/") as own:
                self._kept(rewind).reserve(own, length)
        for prefix, part, _, _ in self._apart():
            with _within(cache, prefix) as own:
                part.reserve(own, length, rewind)

    def resume(self, cache: Cache, length: int, rewind: int) -> None:
        """Hides what was taken back; of kept tokens nothing beyond the length is read."""
        if not self.together:
            with _within(cache, "near/") as own:
                self._stream(rewind).open_block(own, length, Weights())
        for prefix, part, _, _ in self._apart():
            with _within(cache, prefix) as own:
                part.resume(own, length, rewind)

    def step(self, inputs: Inputs, cache: Cache, length: int, rewind: int, need_lse: bool) -> AttentionState | Tensor:
        """See :class:`farfield.streaming.StreamModule`."""
        tokens = inputs.rotated_q, inputs.rotated_k, inputs.v
        whole = length == 0 and inputs.q.shape[2] > 1
        if whole:
            self._fill(tokens, cache, rewind, inputs.scale)
            common = self._all_heads(inputs)
        else:
            common = self._step(tokens, cache, length, rewind, inputs.scale)
        far, index = [], []
        for (prefix, part, heads, kv_heads), (_, pyramid) in zip(self._parts(), self.options.groups, strict=True):
            if _together(pyramid):
                if not whole:
                    continue
                of_group = part(self._of_heads(inputs, heads, kv_heads))
            else:
                with _within(cache, prefix) as own:
                    of_group = part.step(self._of_heads(inputs, heads, kv_heads), own, length, rewind, True)
            assert isinstance(of_group, AttentionState)
            far.append(of_group)
            index += heads
        return self._joined(common, far, index)

    def _fill(self, tokens: tuple[Tensor, Tensor, Tensor], cache: Cache, rewind: int, scale: float) -> None:
        """A whole prefix [B, H, N, D] into an empty cache, but for groups that have their own."""
        if self.together:
            with _within(cache, "tokens/") as own:
                self._kept(rewind).fill(own, *tokens)
        else:
            with _within(cache, "near/") as own:
                self._stream(rewind).fill(own, *tokens[1:])
        for prefix, expansion, stream in self._moments(rewind):
            _, key, value = self._of_expansion(expansion, *tokens)
            with _within(cache, prefix) as own:
                stream.fill(own, key, value, expansion.on(key.device)[0], scale)

    def _step(
        self, tokens: tuple[Tensor, Tensor, Tensor], cache: Cache, length: int, rewind: int, scale: float
    ) -> AttentionState:
        """Near field, expansions and what is opened on common tokens, for [B, H, T, D] after ``length`` others."""
        sums, block = self._moments(rewind), self.block[0]
        stream = self._kept(rewind) if self.together else self._stream(rewind)
        states, done = [], 0
        with _within(cache, "tokens/" if self.together else "near/") as kept:
            while done < tokens[0].shape[2]:
                at = length + done
                stop = min(tokens[0].shape[2], done + block - at % block) if sums else tokens[0].shape[2]
                query, key, value = (x[:, :, done:stop] for x in tokens)
                state = stream.step(kept, query, key, value, at, scale=scale)
                assert isinstance(state, AttentionState)
                done, number = stop, at // block
                far = []
                for prefix, expansion, of in sums:
                    centres, bias = expansion.on(query.device)
                    asked = _take(query, list(expansion.heads))
                    every = (kept["keys"], kept["values"]) if of.open else (key, value)
                    read = _index(tuple(self._key_head(h) for h in expansion.heads), query.device)
                    with _within(cache, prefix) as own:
                        far.append(of.attend(own, asked, *every, read, centres, bias, number, scale))
                        if (length + done) % block == 0:
                            # Of tokens that joined long ago those that centres keep may leave them now.
                            first = 0 if of.open else max(0, number - 1) * block
                            closed = stream.tokens(kept, first, number * block)
                            of.close(own, number, *closed, read, centres, scale, first)
                states.append(self._with_expansions(state, far))
        joined = join_rows(states)
        assert isinstance(joined, AttentionState)
        return joined

    def _key_head(self, head: int) -> int:
        return head * self.spec.num_kv_heads // self.spec.num_heads

    def extra_repr(self) -> str:
        """What was asked for."""
        return f"{self.options!r}"


def _together(pyramid: Pyramid) -> bool:
    """Whether decoding can keep one copy of the tokens for this group and others: see :class:`HeadsStream`."""
    plain = pyramid.choose == "bounds" or (pyramid.summary == "mean" and pyramid.rope == "tokens")
    return bool(pyramid.open) and pyramid.levels == 1 and pyramid.rest == "drop" and plain and pyramid.open_bias is None


@lru_cache(maxsize=1024)
def _heads_stream(options: ByHead, block: int, num_heads: int, kv_heads: int, rewind: int) -> HeadsStream:
    heads: list[Opens | None] = [None] * num_heads
    for of_group, p in options.groups:
        if _together(p):
            (rank,) = per_axis(p.rank, 1, "Pyramid.rank")
            (page,) = per_axis(block // rank if p.page is None else p.page, 1, "Pyramid.page")
            beam, beam_share = p.way
            opens = Opens(block // rank, page, beam, p.open, p.share, beam_share, p.recent, p.choose, p.count_bias)
            for head in of_group:
                heads[head] = opens
    return HeadsStream(block, options.sinks or 0, tuple(heads), kv_heads, rewind)


@contextmanager
def _within(cache: Cache, prefix: str) -> Iterator[Cache]:
    """The part of a cache under a prefix; tensors that are put into it replace those of the whole."""
    own = {name.removeprefix(prefix): x for name, x in cache.items() if name.startswith(prefix)}
    yield own
    cache.update({prefix + name: x for name, x in own.items()})


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
    """The key heads of a selection, so that consecutive query heads share them evenly.

    Each once where all of them are read by equally many consecutive query heads; otherwise one for every query head.
    """
    read = [head // group for head in heads]
    once = list(dict.fromkeys(read))
    times = len(read) // len(once)
    return once if read == [head for head in once for _ in range(times)] else read


def _take(x: Tensor, heads: list[int]) -> Tensor:
    """[B, H, N, D] -> the heads of these numbers."""
    if heads == list(range(x.shape[1])):
        return x
    return x.index_select(1, _index(tuple(heads), x.device))


def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on a device; kept, except while tracing, since a step of decoding has little else to do."""
    traced = torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor
    return (_kept_index.__wrapped__ if traced else _kept_index)(heads, device)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _kept_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, device=device)
