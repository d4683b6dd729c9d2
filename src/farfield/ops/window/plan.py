"""Which tiles of queries read which keys, axis by axis, for the fast engine. Integers and masks only.

An axis is cut into *strands*: the tokens that can see each other, in order (the residues of a dilation, the segments
of a packed sequence). A strand is cut into tiles of queries; a tile reads one contiguous run of keys of its strand,
from the first to the last that any of its queries sees, all runs equally long. What single queries see of the run is a
mask, and masks repeat, so they are kept by class. In n-D everything is the product over the axes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Plan", "check_bounds", "check_fit", "strands_of", "visible_places", "window_plan"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_TILES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ROWS = (1, 2, 4, 8, 16)
_MOST_EARLY = 4


@dataclass(frozen=True)
class _Axis:
    """The plan of one axis."""

    tokens: Ints  # [tiles, t] token at each query place; places beyond the end of a strand repeat its last token
    place: Ints  # [L] query place of each token
    keys: Ints  # [P] token at each key place, strands padded to whole rows
    key_place: Ints  # [L] key place of each token
    rows: Ints  # [tiles, S] rows of key places that a tile reads
    before: Bools  # [tiles, K] key places of a run that lie before its strand
    masks: Bools  # [classes, t, K] what each query sees of its tile's run
    classes: Ints  # [tiles]


@dataclass(frozen=True)
class Plan:
    """The plan of a grid on one device.

    Attributes:
        units: U, tiles of queries.
        rows: M, queries in a tile.
        width: key places in a row of the store.
        query_token: [U * M] token of each query place, None for the identity.
        query_place: [N] query place of each token, None for the identity.
        spare: query places that hold no token of their own (they repeat one), None when there are none.
        key_token: [P] token of each key place, None for the identity.
        key_place: [N] key place of each token, None for the identity.
        table: [U, S] rows of the store that a tile reads.
        outside: bool [U, K], key places that lie outside the strand, None when there are none.
        row_bias: float32 [C, M, K], 0 or -inf, None when every query sees the whole run of its tile.
        row_class: class of each tile.
    """

    units: int
    rows: int
    width: int
    query_token: Tensor | None
    query_place: Tensor | None
    spare: Tensor | None
    key_token: Tensor | None
    key_place: Tensor | None
    table: Tensor
    outside: Tensor | None
    row_bias: Tensor | None
    row_class: tuple[int, ...]


def check_bounds(bounds: tuple[int, ...], tokens: int) -> None:
    """Raises ValueError unless the bounds of packed segments rise from 0 to the number of tokens."""
    if bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens={list(bounds)}: it must rise from 0 to N={tokens}")


def check_fit(
    axes: tuple[int, ...],
    bounds: tuple[int, ...] | None,
    window: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
) -> None:
    """A dilated window that is not causal must fit: there is no whole axis to fall back to that keeps the rule."""
    for a, (length, size, step, order) in enumerate(zip(axes, window, dilation, causal, strict=True)):
        if order or step == 1:
            continue
        shortest = length
        if bounds is not None:
            shortest = min(end - start for start, end in zip(bounds, bounds[1:], strict=False) if end > start)
        if size * step > shortest:
            raise ValueError(
                f"window={size} with dilation={step} spans {size * step} tokens, but axis {a} has {shortest}; "
                f"use a dilation of at most {max(shortest // size, 1)} or a smaller window"
            )


def strands_of(length: int, dilation: int, bounds: tuple[int, ...] | None) -> list[tuple[int, int, int]]:
    """(first token, step, tokens) of every set of tokens that can see each other."""
    pieces = [(0, length)] if bounds is None else list(zip(bounds, bounds[1:], strict=False))
    strands = []
    for a, b in pieces:
        for residue in range(min(dilation, b - a)):
            strands.append((a + residue, dilation, -(-(b - a - residue) // dilation)))
    return strands


def visible_places(place: Ints, places: int, window: int, stride: int, causal: bool) -> tuple[Ints, Ints]:
    """First and last place that the query at each place sees, in a strand of `places`.

    The first may be negative when causal: what lies there is hidden apart, so that masks repeat. Query places beyond
    the end of the strand go on in the same manner.
    """
    if causal:
        leader = place // stride * stride + stride - 1
        leader = np.where(place < places, np.minimum(leader, places - 1), leader)
        return leader - window + 1, place
    left, right = window // 2, window // 2 + window % 2 - 1
    leader = np.minimum(place // stride * stride + stride // 2, places - 1)
    centre = np.clip(leader, left, places - 1 - right)
    return centre - left, centre + right


def _tile_candidates(stride: int, longest: int) -> list[int]:
    """Sizes of tiles worth trying: parts and multiples of the stride keep masks alike."""
    sizes = set(_TILES)
    if stride > 1:
        sizes |= {d for d in range(1, min(stride, _TILES[-1]) + 1) if stride % d == 0}
        sizes |= {stride * t for t in _TILES if stride * t <= _TILES[-1]}
    return sorted(size for size in sizes if size < 2 * longest)


def _run_length(tile: int, row: int, window: int, stride: int, longest: int, causal: bool) -> int:
    """About how many key places a tile reads."""
    if stride == 1:
        span = window + tile - 1
    elif tile % stride == 0:
        span = window + tile - stride
    elif stride % tile == 0:
        span = window
    else:
        span = window + -(-tile // stride) * stride
    span = min(span, longest)
    aligned = causal and tile % row == 0 and (window - 1) % row == 0
    return -(-(span if aligned else span + row - 1) // row) * row


@lru_cache(maxsize=256)
def _sizes(
    longest: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...], causal: tuple[bool, ...]
) -> tuple[tuple[int, ...], int]:
    """Tile per axis and row width: the cheapest by a rough count of the work of one query.

    It pays for every key place of its run, and for its share in gathering them, which is dearer in short rows.
    """
    best: tuple[float, tuple[int, ...], int] | None = None
    candidates = [_tile_candidates(s, n) for s, n in zip(stride, longest, strict=True)]
    for tile in itertools.product(*candidates):
        if prod(tile) > _TILES[-1]:
            continue
        used = prod(-(-n // t) * t / n for n, t in zip(longest, tile, strict=True))
        for row in _ROWS:
            rows = (1,) * (len(tile) - 1) + (row,)
            keys = prod(map(_run_length, tile, rows, map(min, window, longest), stride, longest, causal))
            cost = used * keys * (1 + (40 + 40 / row) / prod(tile))
            if best is None or cost < best[0]:
                best = (cost, tile, row)
    assert best is not None
    return best[1], best[2]


def _axis(
    strands: list[tuple[int, int, int]],
    window: int,
    stride: int,
    dilation: int,
    causal: bool,
    tile: int,
    row: int,
) -> _Axis:
    seen = []
    for _, _, places in strands:
        reach = min(window, places) if dilation == 1 else window
        query = np.arange(-(-places // tile) * tile).reshape(-1, tile)
        low, high = visible_places(query, places, reach, min(stride, reach), causal)
        real = query < places
        start = np.where(real, low, places).min(1)
        # A causal run ends with its tile, so that the masks of all tiles are alike.
        end = query[:, -1] + 1 if causal else np.where(real, high, -1).max(1) + 1
        seen.append((query, low, high, start, end))
    # A few runs that would begin before their strand are moved inside and get masks of their own. If they are many (a
    # long causal window) they stay, and the places before the strand are hidden.
    move = sum(int((start < 0).sum()) for _, _, _, start, _ in seen) <= _MOST_EARLY
    if move:
        seen = [(query, low, high, np.maximum(start, 0), end) for query, low, high, start, end in seen]
    span = max(int((-(-end // row) - start // row).max()) for _, _, _, start, end in seen)

    parts: dict[str, list[Ints]] = {name: [] for name in ("tokens", "keys", "rows")}
    before, limits, own_tokens, own_places, own_keys = [], [], [], [], []
    queries, key_rows = 0, 0
    for (begin, step, places), (query, low, high, start, end) in zip(strands, seen, strict=True):
        strand_rows = -(-places // row)
        place = np.arange(places)
        own_tokens.append(begin + step * place)
        own_places.append(queries + place)
        own_keys.append(key_rows * row + place)
        parts["tokens"].append(begin + step * np.minimum(query, places - 1))
        parts["keys"].append(begin + step * np.minimum(np.arange(strand_rows * row), places - 1))
        first = -(-end // row) - span if causal else np.minimum(start // row, strand_rows - span)
        if move:
            first = np.maximum(first, 0)
        rows = first[:, None] + np.arange(span)
        parts["rows"].append(key_rows + np.clip(rows, 0, strand_rows - 1))
        begins = first[:, None] * row
        before.append(begins + np.arange(span * row) < 0)
        limits.append(np.stack((np.maximum(low - begins, 0), np.minimum(high - begins, span * row - 1)), 1))
        queries += query.size
        key_rows += strand_rows
    token = np.concatenate(own_tokens)
    place_of, key_of = np.empty_like(token), np.empty_like(token)
    place_of[token], key_of[token] = np.concatenate(own_places), np.concatenate(own_keys)
    limit = np.concatenate(limits)
    kinds, classes = np.unique(limit.reshape(len(limit), -1), axis=0, return_inverse=True)
    lows, highs = np.split(kinds[:, :, None], 2, axis=1)
    run = np.arange(span * row)
    return _Axis(
        tokens=np.concatenate(parts["tokens"]),
        place=place_of,
        keys=np.concatenate(parts["keys"]),
        key_place=key_of,
        rows=np.concatenate(parts["rows"]),
        before=np.concatenate(before),
        masks=(run >= lows) & (run <= highs),
        classes=classes.reshape(-1),
    )


def _outer(arrays: list[Ints], sizes: list[int]) -> Ints:
    """Row-major combination of per-axis indices into axes of the given sizes; [a, b] and [c, d] give [a * c, b * d]."""
    total = arrays[0].reshape(len(arrays[0]), -1)
    for array, size in zip(arrays[1:], sizes[1:], strict=True):
        flat = array.reshape(len(array), -1)
        joined = total[:, None, :, None] * size + flat[None, :, None, :]
        total = joined.reshape(len(total) * len(flat), -1)
    return total


def _any(arrays: list[Bools]) -> Bools:
    """The row-major combination of per-axis conditions, true where one of them is."""
    total = arrays[0]
    for array in arrays[1:]:
        total = (total[:, None, :, None] | array[None, :, None, :]).reshape(len(total) * len(array), -1)
    return total


def _product(masks: list[Bools]) -> Bools:
    """[t, K] per axis to [prod t, prod K]."""
    total = masks[0]
    for mask in masks[1:]:
        total = (total[:, None, :, None] & mask[None, :, None, :]).reshape(total.shape[0] * mask.shape[0], -1)
    return total


@lru_cache(maxsize=64)
def window_plan(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    bounds: tuple[int, ...] | None,
    device: torch.device,
) -> Plan:
    """The plan for checked arguments; kept, since layers and steps ask for the same again.

    Args:
        grid: lengths of the axes.
        window, stride, dilation, causal: per axis.
        bounds: bounds of packed segments (1-D), or None.
        device: of the tensors.
    """
    strands = [strands_of(n, d, bounds) for n, d in zip(grid, dilation, strict=True)]
    longest = tuple(max(places for _, _, places in axis) for axis in strands)
    tile, row = _sizes(longest, window, stride, causal)
    widths = (1,) * (len(grid) - 1) + (row,)
    axes = [_axis(*rule) for rule in zip(strands, window, stride, dilation, causal, tile, widths, strict=True)]

    # Query places are counted tile by tile, so the place of a token is (its tile, its place in the tile) over all axes.
    units, rows = [len(a.tokens) for a in axes], prod(tile)
    unit = _outer([a.place // t for a, t in zip(axes, tile, strict=True)], units).reshape(-1)
    offset = _outer([a.place % t for a, t in zip(axes, tile, strict=True)], list(tile)).reshape(-1)
    query_place = unit * rows + offset
    query_token = _outer([a.tokens for a in axes], list(grid)).reshape(-1)
    key_token = _outer([a.keys for a in axes], list(grid)).reshape(-1)
    key_place = _outer([a.key_place for a in axes], [len(a.keys) for a in axes]).reshape(-1)
    table = _outer([a.rows for a in axes], [len(a.keys) // w for a, w in zip(axes, widths, strict=True)])
    outside = _any([a.before for a in axes]) if any(a.before.any() for a in axes) else None

    combined = _outer([a.classes for a in axes], [len(a.masks) for a in axes]).reshape(-1)
    used, row_class = np.unique(combined, return_inverse=True)
    kinds = zip(*np.unravel_index(used, [len(a.masks) for a in axes]), strict=True)
    masks = np.stack([_product([a.masks[i] for a, i in zip(axes, kind, strict=True)]) for kind in kinds])

    def tensor(array: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    spare = np.delete(np.arange(len(query_token)), query_place)

    def unless_identity(array: Ints, places: int) -> Tensor | None:
        return None if places == prod(grid) and np.array_equal(array, np.arange(places)) else tensor(array)

    # Kept tensors must serve later calls under autograd too.
    with torch.inference_mode(False):
        bias = None
        if not masks.all():
            bias = (
                torch.zeros(masks.shape, dtype=torch.float32)
                .masked_fill_(~torch.from_numpy(masks), float("-inf"))
                .to(device)
            )
        return Plan(
            units=prod(units),
            rows=rows,
            width=row,
            query_token=unless_identity(query_token, len(query_token)),
            query_place=unless_identity(query_place, len(query_token)),
            spare=tensor(spare) if len(spare) else None,
            key_token=unless_identity(key_token, len(key_token)),
            key_place=unless_identity(key_place, len(key_token)),
            table=tensor(table),
            outside=None if outside is None else torch.from_numpy(outside).to(device),
            row_bias=bias,
            row_class=tuple(row_class.reshape(-1).tolist()),
        )
