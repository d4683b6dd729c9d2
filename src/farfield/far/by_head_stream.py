"""What decoding keeps of a ByHead layer: all tokens for key heads that some head reads at will, few of the others.

Which key heads a query head reads is fixed, so every key head has one *home*: where any head that reads it opens cells
or is exact, that of all tokens; otherwise that of the last blocks and the sinks, and of the tokens that centres of
expansions keep. The second does not grow with the context beyond what lists hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from farfield.far.expansion import Expansion
from farfield.far.pyramid import Pyramid
from farfield.geometry import per_axis
from farfield.ops.cache import Cache, join_rows
from farfield.ops.expansion import Asked, ExpansionStream, with_expansions
from farfield.ops.heads import index_of, take
from farfield.ops.kept import compact
from farfield.ops.multipole.stream import MultipoleStream, Weights
from farfield.ops.opened.heads import HeadsStream, Opens
from farfield.ops.state import AttentionState

__all__ = ["Home", "homes_of", "shares_tokens", "within"]

Tokens = tuple[Tensor, Tensor, Tensor]
"""Queries [B, Hq, T, D], keys and values [B, Hkv, T, D] of a layer, rotated."""


def shares_tokens(pyramid: Pyramid) -> bool:
    """Whether decoding can keep one copy of the tokens for this group and others: see :class:`HeadsStream`."""
    plain = pyramid.choose == "bounds" or (pyramid.summary == "mean" and pyramid.rope == "tokens")
    return bool(pyramid.open) and pyramid.levels == 1 and pyramid.rest == "drop" and plain and pyramid.open_bias is None


class Sums(NamedTuple):
    """An expansion of some heads of a home.

    Attributes:
        prefix: of its names in a cache.
        options, stream: of the expansion.
        heads, read: numbers of its heads in the home, and of the key head there that each of them reads.
    """

    prefix: str
    options: Expansion
    stream: ExpansionStream
    heads: tuple[int, ...]
    read: tuple[int, ...]

    def of(self, cache: Cache) -> Cache:
        """Its part of a cache; its tensors are written in place."""
        return {name: cache[self.prefix + name] for name in self.stream.names}


@dataclass(frozen=True)
class Home:
    """Key heads whose tokens are kept in one way, and the query heads that read them.

    A cache holds what the stream has (``tokens/`` or ``near/``), for every expansion what its stream has, and where a
    centre keeps tokens and not all are there ``kept/keys`` and ``kept/values`` [B, key heads, M, D].

    Attributes:
        heads, key_heads: numbers in the layer, rising.
        stream: near field, sinks, and where all tokens are kept the cells that are opened.
        expansions: of these heads.
    """

    heads: tuple[int, ...]
    key_heads: tuple[int, ...]
    stream: HeadsStream | MultipoleStream
    expansions: tuple[Sums, ...]

    @property
    def whole(self) -> bool:
        """Whether all tokens are kept."""
        return isinstance(self.stream, HeadsStream)

    @property
    def prefix(self) -> str:
        """Of the stream's names in a cache."""
        return "tokens/" if self.whole else "near/"

    @property
    def keeps(self) -> bool:
        """Whether a centre keeps tokens."""
        return any(sums.stream.open for sums in self.expansions)

    def empty(self, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """The cache of rows without tokens."""
        if isinstance(self.stream, HeadsStream):
            own = self.stream.empty(batch, dim, dtype, device)
        else:
            own = self.stream.empty(batch, len(self.heads), len(self.key_heads), dim, dtype, device)
        cache = {self.prefix + name: x for name, x in own.items()}
        for sums in self.expansions:
            own = sums.stream.empty(batch, sums.options.tensor(), dtype, device)
            cache |= {sums.prefix + name: x for name, x in own.items()}
        if self.keeps and not self.whole:
            with torch.inference_mode(False):
                nothing = torch.zeros(batch, len(self.key_heads), 1, dim, dtype=dtype, device=device)
                cache |= {"kept/keys": nothing, "kept/values": nothing.clone()}
        return cache

    def reserve(self, cache: Cache, length: int) -> None:
        """Room for ``length`` tokens, where all are kept."""
        with within(cache, self.prefix) as own:
            self.stream.reserve(own, length)

    def resume(self, cache: Cache, length: int) -> None:
        """Hides what was taken back; of kept tokens nothing beyond the length is read."""
        if isinstance(self.stream, MultipoleStream):
            with within(cache, self.prefix) as own:
                self.stream.open_block(own, length, Weights())

    def _own(self, tokens: Tokens) -> Tokens:
        query, key, value = tokens
        return take(query, self.heads), take(key, self.key_heads), take(value, self.key_heads)

    def fill(self, cache: Cache, tokens: Tokens, scale: float) -> None:
        """A whole prefix into an empty cache."""
        query, key, value = self._own(tokens)
        with within(cache, self.prefix) as own:
            if isinstance(self.stream, HeadsStream):
                self.stream.fill(own, query, key, value)
            else:
                self.stream.fill(own, key, value)
        for sums in self.expansions:
            centres, _ = sums.options.on(key.device)
            sums.stream.fill(sums.of(cache), key, value, index_of(sums.read, key.device), centres, scale)
        self._compact(cache, key, value)

    def step(self, cache: Cache, tokens: Tokens, length: int, scale: float) -> AttentionState:
        """Near field, expansions and opened cells of the heads here, for [B, H, T, D] after ``length`` others."""
        tokens, block, done = self._own(tokens), self.stream.block, 0
        count, states = tokens[0].shape[2], []
        with within(cache, self.prefix) as own:
            while done < count:
                at = length + done
                stop = min(count, done + block - at % block) if self.expansions else count
                query, key, value = (x[:, :, done:stop] for x in tokens)
                near = self.stream.step(own, query, key, value, at, scale=scale)
                assert isinstance(near, AttentionState)
                done, number = stop, at // block
                states.append(with_expansions(near, query, self._asked(cache, own, query.device), number, scale))
                if self.expansions and number and (length + done) % block == 0:
                    self._close(cache, own, number, scale)
        rows = join_rows(states)
        assert isinstance(rows, AttentionState)
        return rows

    def _asked(self, cache: Cache, own: Cache, device: torch.device) -> list[Asked]:
        """The expansions with what they read; ``own`` is the stream's part of the cache."""
        where, name = (cache, "kept/") if self.keeps and not self.whole else (own, "")
        found = []
        for sums in self.expansions:
            centres, bias = sums.options.on(device)
            found.append(
                Asked(
                    sums.stream, sums.of(cache), centres, bias, sums.heads, where[name + "keys"],
                    where[name + "values"], index_of(sums.read, device),
                )
            )  # fmt: skip
        return found

    def _close(self, cache: Cache, own: Cache, number: int, scale: float) -> None:
        """Adds the block before block ``number`` to the sums, and to what is kept, now that this one is complete."""
        start, stop = (number - 1) * self.stream.block, number * self.stream.block
        # Of tokens that joined long ago those that centres keep may leave them now.
        first = 0 if self.keeps and self.whole else start
        key, value = self.stream.tokens(own, first, stop)
        if self.keeps and not self.whole:
            kept = cache["kept/keys"], cache["kept/values"]
            first -= kept[0].shape[2]
            key, value = (torch.cat([x, new.to(x.dtype)], 2) for x, new in zip(kept, (key, value), strict=True))
        for sums in self.expansions:
            centres, read = sums.options.on(key.device)[0], index_of(sums.read, key.device)
            sums.stream.close(sums.of(cache), number, key, value, read, centres, scale, first)
        self._compact(cache, key, value)

    def _compact(self, cache: Cache, key: Tensor, value: Tensor) -> None:
        """Keeps those of some tokens that are on a list, where not all are kept."""
        if not self.keeps or self.whole:
            return
        lists = [
            (cache[sums.prefix + "kept"], index_of(sums.read, key.device))
            for sums in self.expansions
            if sums.stream.open
        ]
        dtype = cache["kept/keys"].dtype
        cache["kept/keys"], cache["kept/values"] = compact(key.to(dtype), value.to(dtype), lists)


def homes_of(
    groups: tuple[tuple[tuple[int, ...], Pyramid], ...],
    expansions: tuple[Expansion, ...],
    exact: tuple[int, ...],
    *,
    block: int,
    sinks: int,
    num_heads: int,
    num_kv_heads: int,
    rewind: int,
) -> tuple[Home, ...]:
    """The homes of a layer's key heads; of the groups those count that share tokens."""
    each = num_heads // num_kv_heads
    heads: list[Opens | None] = [None] * num_heads
    for of_group, p in groups:
        if shares_tokens(p):
            (rank,) = per_axis(p.rank, 1, "Pyramid.rank")
            (page,) = per_axis(block // rank if p.page is None else p.page, 1, "Pyramid.page")
            beam, beam_share = p.way
            opens = Opens(block // rank, page, beam, p.open, p.share, beam_share, p.recent, p.choose, p.count_bias)
            for head in of_group:
                heads[head] = opens
    opening = sorted({head // each for head, opens in enumerate(heads) if opens is not None or head in exact})
    others = [key_head for key_head in range(num_kv_heads) if key_head not in opening]
    homes: list[Home] = []
    number = 0
    for key_heads in (opening, others):
        if not key_heads:
            continue
        own = tuple(head for key_head in key_heads for head in range(key_head * each, (key_head + 1) * each))
        stream: HeadsStream | MultipoleStream
        if key_heads is opening:
            everything = tuple(place for place, head in enumerate(own) if head in exact)
            stream = HeadsStream(block, sinks, tuple(heads[head] for head in own), len(key_heads), rewind, everything)
        else:
            stream = MultipoleStream(block, 1, None, False, sinks, "near", rewind)
        summed = []
        for x in expansions:
            here = tuple(head for head in x.heads if head in own)
            if here:
                places = tuple(own.index(head) for head in here)
                of = ExpansionStream(block, sinks, rewind, x.open)
                read = tuple(place // each for place in places)
                summed.append(Sums(f"expansion{number}/", x.only(here), of, places, read))
                number += 1
        homes.append(Home(own, tuple(key_heads), stream, tuple(summed)))
    return tuple(homes)


@contextmanager
def within(cache: Cache, prefix: str) -> Iterator[Cache]:
    """The part of a cache under a prefix; tensors that are put into it replace those of the whole."""
    own = {name.removeprefix(prefix): x for name, x in cache.items() if name.startswith(prefix)}
    yield own
    cache.update({prefix + name: x for name, x in own.items()})
