"""The public function: a choice without gradients, then near field, pages and closed cells in one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from farfield.geometry import EMPTY, per_axis
from farfield.ops.cache import exactly
from farfield.ops.listed import attend_lists
from farfield.ops.multipole import multipole_attention
from farfield.ops.multipole.api import normalise
from farfield.ops.multipole.plan import make_plan
from farfield.ops.multipole.summarise import summarise
from farfield.ops.multipole.summary import Summary
from farfield.ops.opened.choose import Bank, Choice, descend, make_bank
from farfield.ops.opened.leaders import leaders, means
from farfield.ops.opened.tree import Tree, make_tree
from farfield.ops.state import AttentionState, merge_states
from farfield.ops.tiles import Store, compute_dtype

__all__ = ["attend_choice", "check_options", "opened_attention", "opened_far"]

CHUNK = 1 << 24
"""Places of lists held at once; the lists of a call without gradients never take more than this."""


def check_options(
    block: tuple[int, ...],
    rank: tuple[int, ...],
    open: int,
    beam: int | None,
    page: int | Sequence[int] | None,
    share: int,
    beam_share: int | None,
    recent: int,
    rest: str,
    choose: str,
    causal: bool,
) -> tuple[int, ...]:
    """Checks the options of a choice; the page per axis.

    Raises:
        ValueError: with what was given and what would be accepted.
    """
    given = (("open", open, 0), ("beam", open if beam is None else beam, 0), ("share", share, 1), ("recent", recent, 0))
    for name, value, least in given:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: an integer >= {least} would be accepted")
    if rest not in ("keep", "drop"):
        raise ValueError(f"rest={rest!r}: 'keep' (closed cells are seen) or 'drop' (they are not) would be accepted")
    if choose not in ("mean", "bounds"):
        raise ValueError(f"choose={choose!r}: 'mean' or 'bounds' would be accepted")
    cell = tuple(m // p for m, p in zip(block, rank, strict=True))
    pages = cell if page is None else per_axis(page, len(block), "page")
    for axis, (size, of) in enumerate(zip(pages, cell, strict=True)):
        if of % size:
            raise ValueError(
                f"page={size} does not divide the cell of {of} tokens (block / rank, axis {axis}): "
                f"one of {[d for d in range(1, of + 1) if of % d == 0]} would be accepted"
            )
    if prod(block) % share:
        raise ValueError(f"share={share} does not divide the {prod(block)} tokens of a leaf block")
    if beam_share is not None and (
        isinstance(beam_share, bool)
        or not isinstance(beam_share, int)
        or beam_share < share
        or beam_share % share
        or prod(block) % beam_share
    ):
        fits = [n for n in range(share, prod(block) + 1, share) if prod(block) % n == 0]
        raise ValueError(
            f"beam_share={beam_share!r}: a multiple of share={share} that divides the {prod(block)} tokens of a leaf "
            f"block would be accepted, one of {fits}"
        )
    if recent and not (causal and len(block) == 1):
        raise ValueError(
            f"recent={recent} with causal={causal} on {len(block)} axes: queries have others before them in causal "
            "sequences; recent=0 would be accepted here"
        )
    return pages


def opened_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int] | None = None,
    block: int | Sequence[int] = 64,
    rank: int | Sequence[int] = 8,
    levels: int | None = None,
    open: int = 32,
    beam: int | None = None,
    page: int | Sequence[int] | None = None,
    share: int = 1,
    beam_share: int | None = None,
    recent: int = 0,
    rest: str = "keep",
    choose: str = "mean",
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    count_bias: bool = True,
    sinks: int = 0,
    summary: Summary = "mean",
    level_bias: Tensor | None = None,
    page_bias: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
    part: str = "both",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multipole attention whose far field looks closer where the mass is.

    From the coarsest level down, the cells with the largest mass on each level are opened: they leave the sum, and
    their children (on level 1 their tokens, page by page) take their place. So every token is still seen exactly once,
    itself or in one summary, and the choice is the only thing that has no gradient.

    Args:
        query, key, value, grid, block, rank, levels, causal, key_mask, scale, count_bias, sinks, summary, level_bias,
            return_lse, part: as in :func:`farfield.multipole_attention`.
        open: pages of tokens that are opened for a query. 0 is multipole attention; at least the number of pages is
            exact attention.
        beam: cells opened on every level on the way there; None for ``open``.
        page: tokens of a page per axis; divides the cell of level 1 (block / rank), which is the default. Smaller pages
            are chosen by their means (or bounds) under the opened cells.
        share: queries that share a choice: runs of so many in a leaf block. Causal, the first of them chooses (a mean
            would let a query depend on later ones); otherwise their mean does.
        beam_share: queries that share the cells opened on the way to the pages, a multiple of ``share``; None for
            ``share``. A generous beam hardly loses by it, and the cells cost that much less.
        recent: causal sequences alone: who chooses is averaged with the mean of this many queries before it, which
            foretells what the others of its run look for. 0: it chooses alone.
        rest: "keep" the cells that stay closed, as summaries, or "drop" them: then only tokens are seen.
        page_bias: [Hq], added to the scores of opened tokens, and to nothing that the choice sees. None: opened tokens
            weigh what they weigh in exact attention.
        choose: "mean", by the score of a cell's summary; "bounds", by the mean of that of its tokens' average and the
            least upper bound of theirs (channel by channel).
        impl: "compiled" (CPU), "torch", "reference" (differentiable to any order), None: the fastest.

    Returns:
        Output [B, Hq, N, D]; with ``return_lse`` also lse [B, Hq, N].

    Raises:
        ValueError, TypeError: with what was given and what would be accepted.

    Of equal masses the cell with the lowest number is opened, on every device. The choice is made in float32. Every
    query head chooses for itself. Complexity: with the published number of levels the choice scores O(beam log N) cells
    for each ``share`` queries; with ``levels=1`` it scores all cells of level 1. O(N (block + open page)) time beside
    that. Causal-safe with ``causal=True``.

    Sources: the choice of HiP (arXiv 2406.09827) and QuadTree attention (arXiv 2201.02767) with ``rest="drop"``; MRA-2
    (arXiv 2207.10284) with ``levels=1``, ``rest="keep"``; the bounds are those of Quest (arXiv 2406.10774).
    """
    call = normalise(
        query, key, value, grid, block, rank, levels, causal, key_mask, None, scale, None, sinks, 0.0, summary,
        level_bias, part,
    )  # fmt: skip
    pages = check_options(
        call["block"], call["rank"], open, beam, page, share, beam_share, recent, rest, choose, causal
    )
    if impl not in (None, "compiled", "torch", "reference"):
        raise ValueError(f"impl={impl!r}: 'compiled', 'torch', 'reference' or None would be accepted")
    shared: dict[str, Any] = {
        "grid": call["grid"], "block": call["block"], "rank": call["rank"], "causal": causal, "key_mask": key_mask,
        "scale": call["scale"], "sinks": sinks, "impl": impl,
    }  # fmt: skip
    if page_bias is not None and not isinstance(page_bias, Tensor):
        raise TypeError(f"page_bias={page_bias!r}: a tensor [Hq] would be accepted")
    if page_bias is not None and page_bias.shape != query.shape[1:2]:
        raise ValueError(
            f"page_bias has shape {list(page_bias.shape)}: [{query.shape[1]}] would be accepted, a number "
            "for each query head"
        )
    far: dict[str, Any] = {
        **shared,
        "levels": levels,
        "count_bias": count_bias,
        "summary": summary,
        "level_bias": level_bias,
    }
    q, k, v = call["query"], call["key"], call["value"]
    if (open == 0 and rest == "keep") or len(q) == 0:
        return multipole_attention(q, k, v, **far, return_lse=return_lse, part=part)
    states = []
    if part != "far":
        states.append(AttentionState(*multipole_attention(q, k, v, **shared, return_lse=True, part="near")))
    if part != "near" and open:
        opened: dict[str, Any] = {
            "open": open, "beam": open if beam is None else beam, "page": pages, "share": share,
            "beam_share": share if beam_share is None else beam_share, "recent": recent,
        }  # fmt: skip
        with exactly(q.device):
            state = opened_far(q, k, v, **far, **opened, page_bias=page_bias, rest=rest, choose=choose)
        states += [] if state is None else [state]
    if not states:
        wide = compute_dtype(query.dtype)
        nothing = call["query"].new_full(query.shape[:-1], -torch.inf, dtype=wide)
        states = [AttentionState(torch.zeros_like(call["query"]), nothing)]
    joint = merge_states(*states)
    return (joint.out, joint.lse) if return_lse else joint.out


def opened_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    rank: tuple[int, ...],
    levels: int | None,
    open: int,
    beam: int,
    page: tuple[int, ...],
    share: int,
    beam_share: int,
    recent: int,
    rest: str,
    choose: str,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    count_bias: bool,
    sinks: int,
    summary: Summary,
    level_bias: Tensor | None,
    page_bias: Tensor | None,
    impl: str | None,
) -> AttentionState | None:
    """Pages and closed cells alone, on checked arguments; None where nothing is far."""
    tree = make_tree(grid, block, rank, levels, page, causal, query.device)
    if tree is None:
        return None
    heads, kv_heads = query.shape[1], key.shape[1]
    keep = rest == "keep"
    cells: tuple[list[Tensor], list[Tensor]] = ([], [])
    if keep or choose == "mean":
        made = summarise(
            key, value, grid=grid, block=block, rank=rank, levels=levels, key_mask=key_mask, sinks=sinks,
            summary=summary,
        )  # fmt: skip
        cells = ([x.flatten(2, 3) for x in made.keys], [x.flatten(2, 3) for x in made.values])
    wide = compute_dtype(query.dtype)
    index = torch.arange(query.shape[2], device=query.device)
    readable = (index >= sinks)[None] if key_mask is None else key_mask & (index >= sinks)
    valid = tree.to_pages(readable[:, None].to(wide)) > 0  # [B', 1, pages, page tokens]
    paged = [tree.to_pages(x) for x in (key, value)]
    if key_mask is not None:
        paged = [x.masked_fill(~valid[..., None], 0.0) for x in paged]
    batch = query.shape[0]
    with torch.no_grad():
        shown = valid[:, 0] if len(valid) == 1 else valid[:, 0].repeat_interleave(kv_heads, 0)
        plain = paged[0].flatten(0, 1)
        if sinks and key_mask is None:
            plain = plain.masked_fill(~shown[..., None], 0.0)
        bank = make_bank(tree, plain, shown, tuple(x.flatten(0, 1) for x in cells[0]), choose, count_bias)
        # Where no page is partly valid, whether it was chosen says all.
        number = valid.sum(-1)
        partly = bool(((number > 0) & (number < tree.page_tokens)).any())
        spread = shown.repeat_interleave(heads // kv_heads, 0) if len(shown) > 1 else shown
    if keep and tree.pages_per_cell > 1:
        weight = valid[..., None].to(wide)
        for side, x in zip(cells, paged, strict=True):
            side.insert(0, (x.to(wide) * weight).sum(3) / weight.sum(3).clamp(min=1))
    plan = make_plan(grid, None, block, rank, levels, causal, sinks, query.device)
    laid = plan.to_blocks(query).flatten(0, 1)
    spare = tree.shape.blocks * tree.shape.block_tokens - laid.shape[1]
    laid = torch.nn.functional.pad(laid, (0, 0, 0, spare)) if spare else laid  # a pad of nothing would copy
    units = laid.unflatten(1, (-1, share))  # [G, U, M, D]
    with torch.no_grad():
        known: Tensor | None = None
        if recent and key_mask is not None:  # padding says nothing
            known = torch.nn.functional.pad(key_mask, (0, laid.shape[1] - key_mask.shape[1]))
            known = known.repeat_interleave(heads, 0)

        def choosers(run: int) -> Tensor:
            plain = laid.detach()
            if causal:
                return leaders(plain, run, recent, known) * scale
            return means(plain.unflatten(1, (-1, run)), plan.filled) * scale

        chooser = choosers(share)
        ahead = chooser if beam_share == share else choosers(beam_share)
    together = beam_share // share
    blocks = torch.arange(ahead.shape[1], device=query.device) // (tree.shape.block_tokens // beam_share)
    width = min(open, tree.pages) * tree.page_tokens + (
        sum(t.shape[1] for t in tree.lists) + tree.top.shape[1] if keep else 0
    )
    step = max(1, CHUNK // max(1, len(units) * width * together))
    parts = []
    for start in range(0, ahead.shape[1], step):
        run, span = slice(start, start + step), slice(start * together, (start + step) * together)
        with torch.no_grad():
            choice = descend(tree, bank, ahead[:, run], blocks[run], open, beam, keep, chooser[:, span])
        parts.append(
            attend_choice(
                tree,
                bank,
                choice,
                units[:, span],
                paged,
                cells,
                spread if partly else None,
                level_bias,
                page_bias,
                batch,
                scale,
                wide,
                impl,
            )
        )
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(side, 1) for side in zip(*parts, strict=True))
    split = (batch, heads)
    flat = out.flatten(1, 2).unflatten(0, split), lse.flatten(1, 2).unflatten(0, split)
    return AttentionState(*(plan.to_tokens(x).contiguous() for x in flat))


def attend_choice(
    tree: Tree,
    bank: Bank,
    choice: Choice,
    units: Tensor,
    paged: list[Tensor],
    cells: tuple[list[Tensor], list[Tensor]],
    valid: Tensor | None,
    level_bias: Tensor | None,
    page_bias: Tensor | None,
    batch: int,
    scale: float,
    wide: torch.dtype,
    impl: str | None,
) -> AttentionState:
    """The state [G, U, M, D], [G, U, M] of units over what was chosen for them."""
    groups = len(units)
    keys, values = (x.flatten(0, 1) for x in paged)
    stores = [Store(keys, values, choice.pages)]
    bias: Tensor | None = None
    width = choice.pages.shape[-1] * tree.page_tokens
    if valid is not None:
        index = choice.pages.clamp(min=0).flatten(1)[..., None].expand(-1, -1, tree.page_tokens)
        seen = valid.expand(groups, -1, -1).gather(1, index).view(groups, units.shape[1], width)
        bias = torch.zeros(seen.shape, dtype=wide, device=units.device).masked_fill_(~seen, -torch.inf)
    head_bias = None
    if choice.rest:
        first = 0 if tree.pages_per_cell > 1 else 1
        biases = [torch.zeros(groups, units.shape[1], width, dtype=wide, device=units.device) if bias is None else bias]
        for rest in choice.rest:
            number = rest.number.clamp(min=0).expand(groups, -1, -1)
            rows = [side[rest.level - first].flatten(0, 1).unsqueeze(2) for side in cells]
            stores.append(Store(rows[0], rows[1], number.masked_fill(~rest.seen, EMPTY)))
            of_cell = bank.bias[rest.level].to(wide)
            if len(of_cell) > 1:
                of_cell = of_cell.repeat_interleave(groups // len(of_cell), 0)
            biases.append(of_cell.expand(groups, -1).gather(1, number.flatten(1)).view(number.shape))
        bias = torch.cat(biases, -1)
        if level_bias is not None or page_bias is not None:
            row = torch.zeros(bias.shape[-1], dtype=torch.long, device=units.device)
            for rest in choice.rest:
                row[width : width + rest.number.shape[-1]] = max(rest.level, 1)
                width += rest.number.shape[-1]
            heads = groups // batch
            of_tokens = units.new_zeros(heads, dtype=wide) if page_bias is None else page_bias.to(wide)
            of_levels = units.new_zeros(len(tree.children) + 1, heads, dtype=wide)
            of_levels = of_levels if level_bias is None else level_bias.to(wide)
            ladder = torch.cat([of_tokens[:, None], of_levels.T], 1)  # [Hq, 1 + levels]
            head_bias = ladder[:, row][:, None].contiguous()
    state = attend_lists(units[:, None], stores, bias, head_bias, batch=batch, scale=scale, impl=impl)
    out, lse = state.out[:, 0], state.lse[:, 0]
    if page_bias is not None and not choice.rest:
        # Nothing but pages: the same number on all scores of a row moves its lse alone.
        lse = lse + page_bias.to(lse.dtype).repeat(batch)[:, None, None]
    return AttentionState(out, lse)
