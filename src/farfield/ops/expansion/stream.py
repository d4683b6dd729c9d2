"""Expansions one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from farfield.geometry import EMPTY
from farfield.ops.cache import Cache, exactly
from farfield.ops.compiled.expansion import StepPart, advance, takes
from farfield.ops.compiled.expansion import step as compiled_step
from farfield.ops.expansion.moments import Moments, evenly_read, moments_of, moments_of_listed, nearest, through
from farfield.ops.expansion.sift import admitted
from farfield.ops.expansion.torch import RUN, attend_cell
from farfield.ops.heads import index_of, merge_heads, take
from farfield.ops.state import AttentionState, merge_states, state_from_scores
from farfield.ops.tiles import compute_dtype

__all__ = ["Asked", "ExpansionStream", "with_expansions"]


@dataclass(frozen=True)
class ExpansionStream:
    """The same one step at a time: moments up to the ends of the last few blocks. 1-D and causal.

    A cache holds ``lse`` [B, H, R, C], ``key`` [B, H, R, C, D] and ``rows`` [B, H, R, C, D + 1, D]: place b % R has
    those of all tokens before block b, sinks left out, which is what the queries of block b + 1 see. Where centres keep
    tokens out of them it also holds where they lie, ``kept``, and ``scores``, [B, H, R, C, open]: rows of keys and
    values that somebody else has, all of them or those that are kept (:mod:`farfield.ops.kept`). R counts the blocks
    that can be asked for after tokens were taken back.
    """

    block: int
    sinks: int
    rewind: int = 0
    open: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of a cache's tensors."""
        return (*Moments._fields, "kept", "scores") if self.open else Moments._fields

    @property
    def places(self) -> int:
        """R."""
        return 1 + -(-self.rewind // self.block)

    def empty(self, batch: int, centres: Tensor, dtype: torch.dtype, device: torch.device) -> Cache:
        """A cache of nothing."""
        with torch.inference_mode(False):
            like = torch.zeros(batch, len(centres), self.places, dtype=compute_dtype(dtype), device=device)
            number, dim = centres.shape[1:]
            cache = {
                "lse": like.new_full((*like.shape, number), -torch.inf),
                "key": like.new_zeros(*like.shape, number, dim),
                "rows": like.new_zeros(*like.shape, number, dim + 1, dim),
            }
            if self.open:
                kept = like.new_full((*like.shape, number, self.open), EMPTY, dtype=torch.int64)
                scores = torch.full(kept.shape, -torch.inf, dtype=torch.float32, device=device)
                cache |= {"kept": kept, "scores": scores}
        return cache

    def fill(self, cache: Cache, key: Tensor, value: Tensor, read: Tensor, centres: Tensor, scale: float) -> None:
        """A whole prefix [B, Hkv, N, D] into an empty cache; ``read`` [H] says which key head is whose."""
        if not key.shape[2]:
            return
        self._advance(cache, 0, max(0, key.shape[2] // self.block - 1), key, value, read, centres, scale, 0)

    def close(
        self, cache: Cache, number: int, key: Tensor, value: Tensor, read: Tensor, centres: Tensor, scale: float,
        first: int,
    ) -> None:  # fmt: skip
        """Adds the block before block ``number``, once that has its last token: the next one sees it as far.

        Keys and values [B, Hkv, N, D] have token i of that block in row i - ``first``. Where centres keep tokens, their
        rows come in front of it, in the order of the tokens: all from token 0 on (``first`` 0), or kept ones alone
        (``first`` may then be negative). ``read`` [H] says which key head is whose.
        """
        if not number:
            return
        if self.open:
            last = int(cache["kept"][:, :, (number - 1) % self.places].amax())
            front = (number - 1) * self.block - first
            if last >= front:
                raise ValueError(
                    f"tokens are kept in rows up to {last}: rows in front of block {number - 1} of {self.block} tokens "
                    f"are 0 to {front - 1}"
                )
        self._advance(cache, number - 1, number, key, value, read, centres, scale, first)

    def _advance(
        self, cache: Cache, first: int, last: int, key: Tensor, value: Tensor, read: Tensor, centres: Tensor,
        scale: float, before: int,
    ) -> None:  # fmt: skip
        """Adds blocks ``first`` to ``last``, the last left out, of which token i lies in row i - ``before``."""
        if before > first * self.block or last * self.block - before > key.shape[2]:
            raise ValueError(
                f"blocks {first} to {last} of {self.block} tokens, of keys {tuple(key.shape)} in which token 0 has row "
                f"{-before}: all tokens of these blocks are needed"
            )
        centres = centres.to(cache["lse"].dtype)
        if takes(key, centres.dtype):
            sums = cache["lse"], cache["key"], cache["rows"]
            advance(
                sums, cache.get("kept"), cache.get("scores"), key.float(), value.float(), read, centres, scale,
                block=self.block, sinks=self.sinks, before=before, first=first, last=last,
            )  # fmt: skip
            return
        once = torch.tensor(evenly_read(read.tolist()), device=key.device)
        key, value = key.index_select(1, once), value.index_select(1, once)
        carry, done = self._at(cache, first), first
        while done < last:
            # Those whose sums nobody will ask for may come together.
            number = 1 if self.open else max(1, min(RUN, last + 1 - self.places - done))
            joins = self._sift(cache, done, key, centres, scale, before) if self.open else None
            carry = self._with(carry, key, value, centres, scale, done, number, joins, before)
            done += number
            self._put(cache, done, carry)

    def _sift(self, cache: Cache, number: int, key: Tensor, centres: Tensor, scale: float, before: int) -> Tensor:
        """Writes what is kept after block ``number``; what joins the sums with it, [B, H, 1, C, M]."""
        start, at, to = number * self.block - before, number % self.places, (number + 1) % self.places
        with exactly(key.device):
            seen = torch.arange(start, start + self.block, device=key.device) + before >= self.sinks
            kept, joins, scores = admitted(
                cache["kept"][:, :, at], cache["scores"][:, :, at], key[:, :, start : start + self.block], start, seen,
                centres, scale,
            )  # fmt: skip
        cache["kept"][:, :, to], cache["scores"][:, :, to] = kept, scores
        return joins[:, :, None]

    def _at(self, cache: Cache, number: int) -> Moments:
        return Moments(*(cache[name][:, :, number % self.places].clone() for name in Moments._fields))

    def _put(self, cache: Cache, number: int, made: Moments) -> None:
        for name, x in made._asdict().items():
            cache[name][:, :, number % self.places] = x

    def _with(
        self, carry: Moments, key: Tensor, value: Tensor, centres: Tensor, scale: float, first: int, number: int,
        joins: Tensor | None, before: int,
    ) -> Moments:  # fmt: skip
        """The carry and ``number`` blocks from ``first`` on, or what joins with them."""
        tokens = slice(first * self.block - before, (first + number) * self.block - before)
        repeat, pieces = len(centres) // key.shape[1], []
        with exactly(key.device):
            index = torch.arange(tokens.start, tokens.stop, device=key.device) + before
            shown = (index >= self.sinks).view(1, 1, number, -1)
            for of_key in range(key.shape[1]):
                one, heads = slice(of_key, of_key + 1), slice(of_key * repeat, (of_key + 1) * repeat)
                about = centres[heads].to(carry.lse.dtype)
                if joins is None:
                    of_block, of_value = (x[:, one, tokens].unflatten(2, (number, -1)) for x in (key, value))
                    parts = moments_of(of_block, of_value, about, shown, scale)
                else:
                    parts = moments_of_listed(key[:, one], value[:, one], about, joins[:, heads], scale)
                pieces.append(through(carry.map(lambda x, heads=heads: x[:, heads]), parts)[-1])
        return Moments(*(torch.cat(x, 1) for x in zip(*pieces, strict=True)))

    def attend(
        self,
        cache: Cache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        read: Tensor,
        centres: Tensor,
        bias: Tensor,
        number: int,
        scale: float,
    ) -> AttentionState:
        """Of queries [B, H, T, D] that all lie in block ``number``.

        Where centres keep tokens, ``key`` and ``value`` [B, Hkv, N, D] have these, and ``read`` [H] says which key head
        is whose.
        """
        wide = cache["lse"].dtype
        with exactly(query.device):
            if number < 1:
                lse = query.new_full(query.shape[:-1], -torch.inf, dtype=wide)
                return AttentionState(query.new_zeros(query.shape, dtype=wide), lse)
            place = (number - 1) % self.places
            far = Moments(*(cache[name][:, :, place, None] for name in Moments._fields))
            query, centres = query.to(wide), centres.to(wide)
            own = nearest(query, centres)
            out, score = attend_cell(query[:, :, None], own[:, :, None], far, centres, bias.to(wide), scale)
            cell = AttentionState(out[:, :, 0], score[:, :, 0])
            if not self.open:
                return cell
            tokens = cache["kept"][:, :, place].gather(2, own[..., None].expand(-1, -1, -1, self.open))
            row = torch.arange(len(query), device=query.device)[:, None, None, None]
            rows = (x[row, read[:, None, None], tokens.clamp(min=0)].to(wide) for x in (key, value))
            keys, values = rows  # [B, H, T, open, D]
            scores = (keys @ query[..., None]).squeeze(-1) * scale
            exact = state_from_scores(scores.masked_fill(tokens < 0, -torch.inf)[..., None, :], values)
            return merge_states(cell, AttentionState(exact.out.squeeze(-2), exact.lse.squeeze(-1)))


class Asked(NamedTuple):
    """An expansion that some of a layer's heads are asked for.

    Attributes:
        stream, cache: of it.
        centres, bias: [H, C, D], [H].
        heads: which of all heads these are.
        key, value, read: what the centres keep, as :meth:`ExpansionStream.attend` takes it.
    """

    stream: ExpansionStream
    cache: Cache
    centres: Tensor
    bias: Tensor
    heads: tuple[int, ...]
    key: Tensor
    value: Tensor
    read: Tensor


def with_expansions(
    near: AttentionState, query: Tensor, asked: Sequence[Asked], number: int, scale: float
) -> AttentionState:
    """The state of queries [B, H, T, D] in block ``number``, which may be changed, with their expansions merged in.

    ``asked`` has every head at most once; their caches have equally many places. One token on the CPU in float32 is one
    compiled call.
    """
    if not asked or number < 1:
        return near
    first = asked[0]
    place, wide = (number - 1) % first.stream.places, {near.out.dtype, near.lse.dtype, query.dtype}
    wide |= {x.key.dtype for x in asked if x.stream.open}
    if query.shape[2] == 1 and wide == {torch.float32} and takes(query, first.centres.dtype):
        out, lse = near.out[:, :, 0].contiguous(), near.lse[:, :, 0].contiguous()
        parts = [
            StepPart(
                x.centres, x.bias, index_of(x.heads, query.device),
                (x.cache["lse"], x.cache["key"], x.cache["rows"]), x.cache.get("kept"), x.key, x.value, x.read,
            )
            for x in asked
        ]  # fmt: skip
        compiled_step(query[:, :, 0], out, lse, parts, place, scale)
        return AttentionState(out[:, :, None], lse[:, :, None])
    far = [
        x.stream.attend(x.cache, take(query, x.heads), x.key, x.value, x.read, x.centres, x.bias, number, scale)
        for x in asked
    ]
    return merge_heads(near, far, tuple(head for x in asked for head in x.heads))
