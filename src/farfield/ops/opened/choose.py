"""The choice: from the coarsest cells to pages of tokens, the largest mass first. Nothing in here is differentiable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farfield.geometry import EMPTY
from farfield.ops.compiled import choice as compiled
from farfield.ops.opened.tree import Tree
from farfield.ops.tiles import compute_dtype

__all__ = ["Bank", "Cells", "Choice", "descend", "make_bank", "top"]


@dataclass(frozen=True)
class Bank:
    """What the choice scores: per level (pages first, so that ``keys[level]`` is that of ``level``) keys and biases.

    Attributes:
        keys: [G', cells, D or 2 D] float32 each, G' = batch * key heads; twice as wide where the choice is by bounds,
            which a page of one token does not have.
        bias: [G' or 1, cells] each, float32 or wider: log(count), 0 without count bias, -inf in an empty cell.
    """

    keys: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]

    def queries(self, query: Tensor, level: int) -> Tensor:
        """Scaled queries [G, U, D] as a level's keys take them: for bounds, positive and negative channels apart."""
        if self.keys[level].shape[-1] == query.shape[-1]:
            return query
        return torch.cat([query.clamp(min=0), query.clamp(max=0)], -1)


@dataclass(frozen=True)
class Cells:
    """Cells of one level that stay closed: [G or 1, U, n] numbers and [G, U, n] bool, which are seen."""

    level: int
    number: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Choice:
    """What every unit reads beside its near field.

    Attributes:
        pages: [G, U, open] pages opened, ``EMPTY`` where there are fewer.
        rest: the closed cells, coarsest level first; level 0 are pages. Empty where the rest is dropped.
    """

    pages: Tensor
    rest: tuple[Cells, ...]


def make_bank(
    tree: Tree, pages: Tensor, valid: Tensor, summaries: tuple[Tensor, ...], choose: str, count: bool
) -> Bank:
    """The bank for one call.

    Args:
        tree: the tables.
        pages: [G', pages, page tokens, D] keys in pages, 0 where not valid.
        valid: [G' or 1, pages, page tokens] bool, tokens that lie in cells.
        summaries: per level, level 1 first, [G', cells, D] key summaries; read where ``choose`` is "mean".
        choose: "mean" (the score of the summary) or "bounds" (half of it the mean, half the least upper bound).
        count: add log(count).
    """
    number = valid.sum(-1).to(compute_dtype(pages.dtype))  # [G' or 1, pages]
    pages = pages.float()
    total = pages.sum(2)  # 0 at tokens that are not valid
    high, low = total, total
    if choose == "bounds":
        hidden = None if bool(valid.all()) else ~valid[..., None]
        high = (pages if hidden is None else pages.masked_fill(hidden, -torch.inf)).amax(2)
        low = (pages if hidden is None else pages.masked_fill(hidden, torch.inf)).amin(2)
    keys, bias = [], []
    for level in range(len(tree.children) + 1):
        if level:
            children = tree.children[level - 1]
            used = children != EMPTY
            index = children.clamp(min=0)
            number = (number[:, index] * used).sum(-1)
            total = (total[:, index] * used[..., None]).sum(2)
            if choose == "bounds":
                high = high[:, index].masked_fill(~used[..., None], -torch.inf).amax(2)
                low = low[:, index].masked_fill(~used[..., None], torch.inf).amin(2)
        some = number > 0
        mean = total / number.clamp(min=1.0)[..., None].float()
        if choose == "bounds" and (level or pages.shape[2] > 1):
            key = torch.cat([(high + mean) / 2, (low + mean) / 2], -1)
            keys.append(key.masked_fill(~some[..., None], 0.0))
        else:
            keys.append(summaries[level - 1].float() if level else mean)
        log = number.clamp(min=1.0).log() if count else torch.zeros_like(number)
        bias.append(log.masked_fill(~some, -torch.inf))
    return Bank(tuple(keys), tuple(bias))


def _compiled(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and compiled.why_not() is None


def top(scores: Tensor, count: int) -> Tensor:
    """[.., count] places of the largest of [.., n] scores, rising; ``EMPTY`` where fewer lie above -inf.

    Of equal scores the first are taken, on every device. O(n) for each row.
    """
    if _compiled(scores):
        return compiled.top(scores, count)
    n = scores.shape[-1]
    take = min(count, n)
    bits = (scores.float() + 0.0).view(torch.int32).long()
    rank = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    # A number of its own for every place: the order does not hang on how a device breaks ties.
    unique = (rank << 32) + torch.arange(n - 1, -1, -1, device=scores.device)
    index = unique.topk(take, -1, sorted=False).indices
    index = index.masked_fill(scores.gather(-1, index) == -torch.inf, n).sort(-1).values
    if take < count:
        index = torch.nn.functional.pad(index, (0, count - take), value=n)
    return index.masked_fill(index == n, EMPTY)


def _score(query: Tensor, bank: Bank, level: int, number: Tensor) -> Tensor:
    """[G, U, n] scores of cells ``number`` [G or 1, U, n] of ``level``, -inf where it is ``EMPTY``."""
    keys, bias = bank.keys[level], bank.bias[level].to(query.dtype)
    if _compiled(query):
        return compiled.score(query, keys, bias, number)
    groups, used = query.shape[0], number != EMPTY
    repeat = groups // len(keys)
    keys = keys.repeat_interleave(repeat, 0)
    bias = bias.repeat_interleave(repeat, 0) if len(bias) > 1 else bias
    number = number.clamp(min=0).expand(groups, -1, -1)
    flat = number + torch.arange(groups, device=query.device)[:, None, None] * keys.shape[1]
    rows = keys.reshape(-1, keys.shape[-1]).index_select(0, flat.reshape(-1)).view(*number.shape, keys.shape[-1])
    scores = (rows @ query[..., None]).squeeze(-1)
    scores = scores + bias.expand(groups, -1).gather(1, number.flatten(1)).view(number.shape)
    return scores.masked_fill(~used, -torch.inf)


def _below(table: Tensor, chosen: Tensor) -> Tensor:
    """Children [G, U, k c] of ``chosen`` [G, U, k] cells."""
    number = table[chosen.clamp(min=0)]
    return torch.where((chosen != EMPTY)[..., None], number, EMPTY).flatten(2)


def _levels(tree: Tree, bank: Bank, open: int, beam: int) -> list[compiled.Level]:
    """What the compiled descent goes through, from the top down."""
    top, last = len(tree.children), 1 if tree.pages_per_cell == 1 else 0
    return [
        compiled.Level(
            bank.keys[level],
            bank.bias[level],
            tree.lists[level - 1] if 0 < level < top else None,
            tree.children[level - 1] if level else None,
            open if level == last else beam,
        )
        for level in range(top, last - 1, -1)
    ]


def descend(
    tree: Tree, bank: Bank, query: Tensor, block: Tensor, open: int, beam: int, keep: bool, finer: Tensor | None = None
) -> Choice:
    """Opens up to ``beam`` cells of every level, from the top down, and in the end ``open`` pages of tokens.

    Args:
        tree, bank: the tables and what is scored.
        query: [G, U, D] float32, one scaled query for every unit, G a multiple of the bank's groups.
        block: [U] the leaf block of each unit.
        open: pages opened.
        beam: cells opened at every level; on level 1, where its cells are the pages, it is ``open``.
        keep: list the closed cells.
        finer: [G, U n, D], who makes the last choice, n in turn for every unit; None for ``query``.

    Returns:
        The choice, for as many units as make the last one. Every token in a cell is seen once: in an opened page or in
        one closed cell.
    """
    level, bottom = len(tree.children), 1 if tree.pages_per_cell == 1 else 0
    finer = bank.queries(query if finer is None else finer, bottom)
    if level == bottom:  # one choice, the last
        block = block.repeat_interleave(finer.shape[1] // query.shape[1])
        query = finer
    else:
        query = bank.queries(query, level)
    if not keep and _compiled(query):
        return Choice(compiled.descend(query, finer, _levels(tree, bank, open, beam), tree.top, block), ())
    each = finer.shape[1] // query.shape[1]
    seen = tree.top[block]  # [U, cells]
    by_key = query.reshape(len(bank.keys[level]), -1, query.shape[-1])
    scores = by_key @ bank.keys[level].mT
    scores += bank.bias[level][:, None]
    scores = scores.view(len(query), len(block), -1).masked_fill_(~seen, -torch.inf)
    number = torch.arange(scores.shape[-1], device=query.device)[None, None].expand(1, len(block), -1)
    rest = []
    while True:
        last = level == bottom
        chosen = top(scores, min(open if last else beam, scores.shape[-1]))
        if keep:
            closed = scores != -torch.inf  # one that is not a number is not lost
            spare = torch.nn.functional.pad(closed, (0, 1))
            spare.scatter_(-1, torch.where(chosen == EMPTY, scores.shape[-1], chosen), False)
            rest.append(Cells(level, number, spare[..., :-1]))
        opened = torch.where(chosen == EMPTY, EMPTY, number.expand(len(query), -1, -1).gather(-1, chosen.clamp(min=0)))
        if level == 0:
            break
        number = _below(tree.children[level - 1], opened)
        if last:  # one page to a cell: nothing is left to choose
            opened = number
            break
        level -= 1
        if level:
            own = tree.lists[level - 1][block][None].expand(len(query), -1, -1)
            number = torch.cat([own, number], -1)
        if level == bottom:
            query = finer
        if level == bottom and each > 1:
            number = number.repeat_interleave(each, 1)
            rest = [Cells(c.level, *(x.repeat_interleave(each, 1) for x in (c.number, c.seen))) for c in rest]
        scores = _score(query, bank, level, number)
    return Choice(opened, tuple(rest))
