"""Decoding where every head opens cells in its own way: tokens are kept once for every key head, not for every group.

One level of cells, and what stays closed is dropped, so that a step reads two things in one softmax: the near field and
the sinks, and the tokens of the pages that a head's leader opens. What the choice scores depends on the key head and
the size of a cell alone, and is kept once for all that share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from farfield.geometry import EMPTY
from farfield.ops.cache import Cache, attend_few, exactly, grown, join_rows, room_for, write_ring
from farfield.ops.compiled import choice as compiled
from farfield.ops.compiled.heads import step_heads
from farfield.ops.opened.choose import top
from farfield.ops.opened.leaders import leader_of
from farfield.ops.state import AttentionState, state_from_scores
from farfield.ops.tiles import compute_dtype

__all__ = ["HeadsStream", "Opens"]


@dataclass(frozen=True)
class Opens:
    """How a head opens cells: the options of :func:`farfield.opened_attention` with ``levels=1, rest="drop"``.

    Attributes:
        cell, page: tokens of a cell (block / rank) and of a page.
        beam, open, share, beam_share, recent, choose, count_bias: as there.
    """

    cell: int
    page: int
    beam: int
    open: int
    share: int
    beam_share: int
    recent: int
    choose: str
    count_bias: bool

    @property
    def scored(self) -> tuple[int, ...]:
        """Tokens of what is scored, cells first; a page of one token is scored by its key."""
        return tuple(size for size in dict.fromkeys((self.cell, self.page)) if size > 1)


@dataclass(frozen=True)
class HeadsStream:
    """The stream of a layer whose heads open cells; causal, 1-D.

    A cache holds all ``keys`` and ``values``, the last ``queries``, for every size and kind of cell that is scored its
    bounds or means (``bounds 4``, ``mean 32``) for the key heads that need them; in ``chosen``, per head, one more
    than the number of the run of queries that the last choice is for (0: none), and its pages, ``EMPTY`` where there
    are fewer. A step costs the choice (all cells, then the pages under the best; compiled, once for a run), near field
    and opened tokens; when a block is complete, O(block).

    Attributes:
        block, sinks: of the near field.
        heads: per query head, how it opens cells; None for a head that opens none.
        kv_heads: key heads; query heads are their consecutive groups.
        rewind: tokens that can be taken back.
        exact: query heads that see all tokens; they open none.
    """

    block: int
    sinks: int
    heads: tuple[Opens | None, ...]
    kv_heads: int
    rewind: int = 0
    exact: tuple[int, ...] = ()

    def key_head(self, head: int) -> int:
        """The key head that a query head reads."""
        return head * self.kv_heads // len(self.heads)

    @cached_property
    def banks(self) -> dict[tuple[str, int], list[int]]:
        """Kind and tokens of what is scored -> the key heads that it is kept for."""
        found: dict[tuple[str, int], set[int]] = {}
        for head, opens in enumerate(self.heads):
            for size in () if opens is None else opens.scored:
                found.setdefault((opens.choose, size), set()).add(self.key_head(head))  # type: ignore[union-attr]
        return {bank: sorted(found[bank]) for bank in sorted(found)}

    @cached_property
    def groups(self) -> dict[Opens, list[int]]:
        """The query heads that open alike."""
        found: dict[Opens, list[int]] = {}
        for head, opens in enumerate(self.heads):
            if opens is not None:
                found.setdefault(opens, []).append(head)
        return found

    @property
    def ring(self) -> int:
        """Queries kept, so that every leader can be made after tokens were taken back."""
        return max((opens.beam_share + opens.recent for opens in self.groups), default=1) + self.rewind

    def empty(self, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """The cache of rows without tokens."""
        with torch.inference_mode(False):
            none = torch.zeros(batch, self.kv_heads, 0, dim, dtype=dtype, device=device)
            queries = torch.zeros(batch, len(self.heads), self.ring, dim, dtype=dtype, device=device)
            most = max((opens.open for opens in self.groups), default=0)
            chosen = torch.zeros(batch, len(self.heads), 1 + most, dtype=torch.int64, device=device)
            cache = {"keys": none, "values": none.clone(), "queries": queries, "chosen": chosen}
            for (kind, size), of in self.banks.items():
                width = 2 * dim if kind == "bounds" else dim
                cache[f"{kind} {size}"] = torch.zeros(batch, len(of), 0, width, dtype=torch.float32, device=device)
        return cache

    def reserve(self, cache: Cache, length: int) -> None:
        """A quarter more room when it is used up, in whole blocks."""
        have = cache["keys"].shape[2]
        if length <= have:
            return
        room = -(-room_for(length, have) // self.block) * self.block
        for name in ("keys", "values"):
            cache[name] = grown(cache[name], room)
        for kind, size in self.banks:
            cache[f"{kind} {size}"] = grown(cache[f"{kind} {size}"], room // size)

    def fill(self, cache: Cache, query: Tensor, key: Tensor, value: Tensor) -> None:
        """A whole prefix into an empty cache."""
        length = key.shape[2]
        cache["keys"][:, :, :length], cache["values"][:, :, :length] = key, value
        write_ring(cache["queries"], query, 0)
        cache["chosen"][:, :, 0] = 0
        self._score(cache, 0, length // self.block * self.block)

    def _score(self, cache: Cache, start: int, stop: int) -> None:
        """Bounds and means of the cells of whole blocks."""
        if start == stop:
            return
        with exactly(cache["keys"].device):
            shown = (torch.arange(start, stop, device=cache["keys"].device) >= self.sinks)[:, None]
            for (kind, size), of in self.banks.items():
                keys = cache["keys"][:, of, start:stop].float()
                some = shown.view(-1, size, 1)
                count = some.sum(1).clamp(min=1)
                cells = keys.unflatten(2, (-1, size))
                mean = cells.masked_fill(~some, 0.0).sum(3) / count
                if kind == "bounds":
                    high = cells.masked_fill(~some, -torch.inf).amax(3)
                    low = cells.masked_fill(~some, torch.inf).amin(3)
                    mean = torch.cat([(high + mean) / 2, (low + mean) / 2], -1)
                    mean = mean.masked_fill(~some.any(1), 0.0)
                cache[f"{kind} {size}"][:, :, start // size : stop // size] = mean

    def step(
        self, cache: Cache, query: Tensor, key: Tensor, value: Tensor, length: int, *, scale: float
    ) -> AttentionState:
        """Takes T tokens in, one after the other, and attends from each.

        Args:
            cache: changed; :meth:`reserve` made room for ``length + T`` tokens.
            query: [B, Hq, T, D].
            key, value: [B, Hkv, T, D].
            length: tokens in the cache.
            scale: factor of the scores.
        """
        states = []
        for t in range(query.shape[2]):
            at, now = length + t, slice(t, t + 1)
            cache["keys"][:, :, at], cache["values"][:, :, at] = key[:, :, t], value[:, :, t]
            cache["queries"][:, :, at % self.ring] = query[:, :, t]
            attend = self._compiled if self._can(cache) else self._torch
            asked = query[:, :, now].to(cache["keys"].dtype)  # autocast may have made it narrower
            states.append(attend(cache, asked, at, scale))
            if (at + 1) % self.block == 0:
                self._score(cache, at + 1 - self.block, at + 1)
        joined = join_rows(states)
        assert isinstance(joined, AttentionState)
        return joined

    def tokens(self, cache: Cache, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, stop - start, D] of these positions."""
        return cache["keys"][:, :, start:stop], cache["values"][:, :, start:stop]

    def _can(self, cache: Cache) -> bool:
        """Whether one compiled call does it: float32 on the CPU."""
        keys = cache["keys"]
        return keys.device.type == "cpu" and keys.dtype == torch.float32 and compiled.why_not() is None

    @cached_property
    def _table(self) -> Tensor:
        """[Hq, 14] what the compiled step knows of every head; see farfield.ops.compiled.heads."""
        names = list(self.banks)
        rows = []
        for head, opens in enumerate(self.heads):
            of = self.key_head(head)
            if opens is None:
                rows.append([of, -1, 0, -1, 0, 1, 1, 0, -1 if head in self.exact else 0, 1, 1, 0, 0, 0])
                continue
            places = []
            for size in (opens.cell, opens.page):
                name = (opens.choose, size)
                places += [names.index(name), self.banks[name].index(of)] if name in self.banks else [-1, 0]
            bounds = opens.choose == "bounds"
            rows.append(
                [of, *places, opens.cell, opens.page, opens.beam, opens.open, opens.share, opens.beam_share,
                 opens.recent, bounds, opens.count_bias]
            )  # fmt: skip
        return torch.tensor(rows, dtype=torch.int64)

    def _compiled(self, cache: Cache, query: Tensor, at: int, scale: float) -> AttentionState:
        out, lse = step_heads(
            query[:, :, 0], cache["queries"], cache["keys"], cache["values"], cache["chosen"],
            [cache[f"{kind} {size}"] for kind, size in self.banks], self._table, at=at, block=self.block,
            sinks=self.sinks, scale=scale,
        )  # fmt: skip
        return AttentionState(out[:, :, None], lse[:, :, None])

    def _torch(self, cache: Cache, query: Tensor, at: int, scale: float) -> AttentionState:
        """The same in torch: the tokens that each head sees, gathered; every step chooses anew."""
        cache["chosen"][:, :, 0] = 0
        wide = compute_dtype(query.dtype)
        number = at // self.block
        first = max(0, number - 1) * self.block
        device = query.device
        near = torch.cat([torch.arange(min(self.sinks, first)), torch.arange(first, at + 1)]).to(device)
        batch, heads = query.shape[:2]
        most = max((o.open * o.page for o in self.groups), default=0)
        seen = torch.full((batch, heads, most), EMPTY, device=device)
        with exactly(device):
            for opens, of in self.groups.items():
                tokens = self._tokens(cache, opens, of, at, scale)
                seen[:, of, : tokens.shape[-1]] = tokens
            tokens = torch.cat([near.expand(batch, heads, -1), seen], -1)
            own = torch.tensor([self.key_head(head) for head in range(heads)], device=device)
            rows = torch.arange(batch, device=device)[:, None, None]
            key, value = (cache[name][rows, own[:, None], tokens.clamp(min=0)].to(wide) for name in ("keys", "values"))
            scores = (key @ query[:, :, 0, :, None].to(wide)).squeeze(-1) * scale
            scores = scores.masked_fill(tokens == EMPTY, -torch.inf)
            state = state_from_scores(scores[:, :, None], value)
            out, lse = state.out.to(query.dtype), state.lse
            for head in self.exact:  # one at a time: its keys and values are read where they lie
                span = slice(self.key_head(head), self.key_head(head) + 1), slice(0, at + 1)
                whole = attend_few(
                    query[:, head : head + 1], *(cache[name][:, span[0], span[1]] for name in ("keys", "values")),
                    scale=scale, dtype=wide,
                )  # fmt: skip
                assert isinstance(whole, AttentionState)
                out[:, head : head + 1], lse[:, head : head + 1] = whole
            return AttentionState(out, lse)

    def _tokens(self, cache: Cache, opens: Opens, heads: list[int], at: int, scale: float) -> Tensor:
        """[B, heads, open page] tokens that heads open, ``EMPTY`` where there are fewer."""
        batch, device = cache["keys"].shape[0], cache["keys"].device
        own = [self.key_head(head) for head in heads]
        visible = max(0, (at // self.block - 1) * self.block)

        def chosen(size: int, number: Tensor, count: int, share: int) -> Tensor:
            """[B, heads, count] of cells ``number`` [B or 1, heads or 1, n], rising."""
            leader = leader_of(cache["queries"][:, heads], at, share, opens.recent) * scale
            number = number.expand(batch, len(heads), -1)
            if (opens.choose, size) in self.banks:
                bank, of = cache[f"{opens.choose} {size}"], self.banks[opens.choose, size]
            else:
                bank, of = cache["keys"], list(range(self.kv_heads))
            place = torch.tensor([of.index(head) for head in own], device=device)[:, None]
            rows = torch.arange(batch, device=device)[:, None, None]
            keys = bank[rows, place, number.clamp(min=0)].float()
            halves = leader
            if keys.shape[-1] > leader.shape[-1]:
                halves = torch.cat([leader.clamp(min=0), leader.clamp(max=0)], -1)
            score = (keys @ halves[..., None]).squeeze(-1)
            left = size - (self.sinks - number * size).clamp(0, size)
            if opens.count_bias:
                score = score + left.clamp(min=1).to(score.dtype).log()
            score = score.masked_fill((number == EMPTY) | (left == 0), -torch.inf)
            found = top(score, min(count, score.shape[-1]))
            return torch.where(found == EMPTY, EMPTY, number.gather(-1, found.clamp(min=0)))

        per = opens.cell // opens.page
        every = torch.arange(visible // opens.cell, device=device)[None, None]
        cells = chosen(opens.cell, every, *((opens.beam, opens.beam_share) if per > 1 else (opens.open, opens.share)))
        pages = cells
        if per > 1:
            under = cells[..., None] * per + torch.arange(per, device=device)
            under = torch.where(cells[..., None] == EMPTY, EMPTY, under).flatten(2)
            pages = chosen(opens.page, under, opens.open, opens.share)
        tokens = pages[..., None] * opens.page + torch.arange(opens.page, device=device)
        hidden = (pages[..., None] == EMPTY) | (tokens < self.sinks)
        return torch.where(hidden, EMPTY, tokens).flatten(2)
