"""Fields on grids: pairs of input and output, series in time, and single large fields.

What a file holds decides the question that is asked of it:

- *pairs* ``x`` and ``y``, or ``<name>_x`` and ``<name>_y`` with "train" or "test" in the name: predict y from x. Test
  pairs may lie on other grids than those of training. An x with one axis less than y is the same all along y's first
  axis.
- *a series* of fields `[T, H, W]`, all of one shape: predict the next frame, or the next ``frames`` frames (or
  fewer, ``ahead``), from as many before them. The last fifth of the time is held out.
- *a field* `[H, W]`, or with ``fill`` the frames of a series with missing cells: fill in squares that are hidden, in
  crops of it. The right fifth is held out.

Values that are not finite are masked: no model reads them, and no error counts there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farfield.data.arrays import read_arrays
from farfield.data.examples import Example, Source, VisionData, size_in_words
from farfield.data.yardsticks import crop_yardsticks, pair_yardsticks, series_yardsticks

__all__ = ["Crops", "Pairs", "Series", "open_grids"]

Floats = npt.NDArray[np.float32]

_HELD_OUT = 5
"""One part in this many of a series or a field is held out."""
_CROP = 128
_CROPS = 16
"""Test crops at most, and the factor by which training crops outnumber the whole field."""
_SQUARES = 4


@dataclass(frozen=True)
class Pairs:
    """Inputs `[n, C, *grid]` and outputs `[n, C', *grid]` of one grid.

    With ``transpose`` half of the training examples, drawn at random, have their last two axes exchanged.
    """

    x: Floats
    y: Floats
    label: str
    transpose: bool = False

    @property
    def grid(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(self.x.shape[2:])

    def __len__(self) -> int:
        return len(self.x)

    def name(self, index: int) -> str:
        """Which pair."""
        return f"{self.label}, pair {index}"

    def get(self, index: int, rng: np.random.Generator | None = None) -> Example:
        """See :class:`farfield.data.examples.Source`; augmented by ``transpose`` alone."""
        x, y = self.x[index], self.y[index]
        if self.transpose and rng is not None and rng.random() < 0.5:
            x, y = x.swapaxes(-1, -2), y.swapaxes(-1, -2)
        return _example(x, y)


@dataclass(frozen=True)
class Series:
    """Frames `[T, C, H, W]`: ``frames`` of them are the input, the next ones the output.

    With one frame examples lie on (H, W), with more on (frames, H, W). With ``ahead`` the output is only that many
    frames, each at the step of the input that lies ``frames`` before it (of monthly fields and frames=12 the same month
    a year ago).
    """

    values: Floats
    frames: int
    label: str
    start: int = 0
    ahead: int | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        plane = tuple(self.values.shape[2:])
        return plane if self.frames == 1 else (self.frames, *plane)

    def __len__(self) -> int:
        return max(0, len(self.values) - self.frames - (self.ahead or self.frames) + 1)

    def name(self, index: int) -> str:
        """Which frames."""
        return f"{self.label}, from frame {self.start + index}"

    def get(self, index: int, rng: np.random.Generator | None = None) -> Example:
        """See :class:`farfield.data.examples.Source`; nothing is augmented."""
        first, middle, last = index, index + self.frames, index + self.frames + (self.ahead or self.frames)
        x, y = self.values[first:middle].swapaxes(0, 1), self.values[middle:last].swapaxes(0, 1)
        return _example(x[:, 0], y[:, 0]) if self.frames == 1 else _example(x, y)


@dataclass(frozen=True)
class Crops:
    """Crops of fields `[T, H, W]` with hidden squares: the input is what is left and where it is, the output all of it.

    Training crops (``rng`` given) lie anywhere; test crops are spread evenly, with squares of their own each.
    """

    values: Floats
    grid: tuple[int, ...]
    fill: float
    label: str
    count: int

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """Which crop."""
        return f"{self.label}, crop {index}"

    def get(self, index: int, rng: np.random.Generator | None = None) -> Example:
        """See :class:`farfield.data.examples.Source`."""
        chosen = np.random.default_rng((7, index)) if rng is None else rng
        spare = [n - s for n, s in zip(self.values.shape[1:], self.grid, strict=True)]
        if rng is None:
            across = max(1, math.ceil(math.sqrt(self.count)))
            place = [
                spare[0] * (index // across) // max(across - 1, 1),
                spare[1] * (index % across) // max(across - 1, 1),
            ]
            upper, left = (min(p, s) for p, s in zip(place, spare, strict=True))
            frame = index % len(self.values)
        else:
            frame = int(chosen.integers(0, len(self.values))) if len(self.values) > 1 else 0
            upper, left = (int(chosen.integers(0, s, endpoint=True)) for s in spare)
        height, width = self.grid
        whole = self.values[frame, upper : upper + height, left : left + width]
        seen = np.ones_like(whole)
        for _ in range(_SQUARES):
            side = (max(1, height // 4), max(1, width // 4))
            y, x = (int(chosen.integers(0, n - s, endpoint=True)) for n, s in zip(self.grid, side, strict=True))
            seen[y : y + side[0], x : x + side[1]] = 0
        shown = np.where(seen > 0, whole, np.where(np.isfinite(whole), np.float32(self.fill), np.float32(np.nan)))
        return _example(np.stack((shown, seen)).astype(np.float32), whole[None])


def _example(x: Floats, y: Floats) -> Example:
    known: npt.NDArray[np.bool_] = np.asarray(np.isfinite(x).all(0))
    known[: y.shape[1]] &= np.isfinite(y).all(0)  # targets may have fewer steps
    if known.all():
        return Example(np.ascontiguousarray(x), np.ascontiguousarray(y))
    clean = [np.nan_to_num(a, nan=0.0, posinf=0.0, neginf=0.0) for a in (x, y)]
    return Example(clean[0], clean[1], known)


def open_grids(
    paths: Sequence[Path],
    *,
    variables: Sequence[str] = (),
    frames: int = 1,
    ahead: int | None = None,
    fill: bool = False,
    transpose: bool = False,
    size: tuple[int, int] | None = None,
    held_out: float = 0.1,
    seed: int = 0,
) -> VisionData:
    """A data set of fields.

    Args:
        paths: one ``.npz``, ``.npz.xz`` or ``.nc`` file.
        variables: names of the arrays to take of a series or of several fields; all that fit together by default.
        frames: of a series, how many frames are read and predicted; above 1 the grid is (frames, H, W).
        ahead: of a series, how many frames are predicted, at most ``frames``; as many by default. Where it is given
            and ``frames`` above 1, test examples may read frames of the training part, and are asked about later ones
            only.
        fill: of a series of one variable with missing cells (values that are not finite, such as land), fill holes in
            its frames instead of predicting the next ones.
        transpose: of pairs on square grids whose law is the same along both axes: exchange the axes of training
            examples at random, which doubles them.
        size: of a single field (or with ``fill``), height and width of the crops; 128 x 128 by default, less where it
            is smaller.
        held_out: part of the pairs that is held out where there are no test pairs.
        seed: of that choice.

    Raises:
        FileNotFoundError: if a path names nothing.
        ValueError: when the file holds nothing of the kinds above, or something else than the options are for; the
            message lists what it holds.
        ModuleNotFoundError: for NetCDF, and for holes, without scipy.
    """
    if len(paths) != 1:
        raise ValueError(f"give one file of fields, got {len(paths)}: {', '.join(str(p) for p in paths)}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    path = paths[0]
    arrays = {name: values for name, values in read_arrays(path).items() if values.dtype.kind in "bifu"}
    listed = ", ".join(f"{name} {list(values.shape)}" for name, values in arrays.items()) or "nothing"
    unknown = [name for name in variables if name not in arrays]
    if unknown:
        raise ValueError(f"{path} has no variable {', '.join(unknown)}; it holds {listed}")
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    # Other choices from the same arrays are other data, where neither grid nor channels would tell.
    digest.update("".join(f"only {name}\n" for name in variables).encode() + b"transposed\n" * transpose)
    about: dict[str, Any] = {"source": str(path), "fingerprint": digest.hexdigest()}
    asked = {
        "frames": None if frames == 1 else frames,
        "ahead": ahead,
        "fill": fill or None,
        "transpose": transpose or None,
        "size": None if size is None else size_in_words(size),
    }
    pairs = _pair_names(arrays)
    if pairs and not variables:
        _refuse_others(asked, ("transpose",), f"{path} holds pairs ({', '.join(pairs)})")
        return _open_pairs(arrays, pairs, path, held_out, seed, transpose, about)
    wanted = {name: arrays[name] for name in (variables or arrays)}
    series = _alike(wanted, 3, bool(variables))
    if series and fill:
        _refuse_others(asked, ("fill", "size"), f"of {path} fill asks what is hidden, not what comes next")
        if len(series) != 1:
            raise ValueError(f"fill takes one variable; {path} has {', '.join(series)}: name one of them (--variables)")
        return _open_field(*next(iter(series.items())), path, size, fill, about)
    if series:
        _refuse_others(asked, ("frames", "ahead"), f"{path} holds a series ({', '.join(series)}), taken whole")
        return _open_series(series, path, frames, ahead, about)
    fields = _alike(wanted, 2, bool(variables))
    if len(fields) == 1:
        _refuse_others(asked, ("fill", "size"), f"{path} holds a single field ({', '.join(fields)})")
        return _open_field(*next(iter(fields.items())), path, size, fill, about)
    raise ValueError(
        f"{path} holds {listed}; needed are pairs (x and y, or NAME_x and NAME_y), fields [T, H, W] of one shape, or "
        "one field [H, W] (named by --variables where there are several)"
    )


_USES = {
    "frames": "a series [T, H, W], to predict the next ones",
    "ahead": "a series [T, H, W], to predict the next ones",
    "fill": "fields with missing cells",
    "transpose": "pairs",
    "size": "crops (of a single field [H, W], or with fill)",
}


def _refuse_others(asked: dict[str, Any], accepted: Sequence[str], what: str) -> None:
    """Options that these data have no use for."""
    for name, value in asked.items():
        if value is not None and name not in accepted:
            listed = ", ".join(accepted)
            raise ValueError(f"{what}; {name}={value} is for {_USES[name]}; accepted here: {listed}")


def _alike(arrays: dict[str, Any], axes: int, named: bool) -> dict[str, Any]:
    """The arrays with that many axes and the shape of the largest of them; named ones must all be such."""
    found = {name: values for name, values in arrays.items() if values.ndim == axes and min(values.shape) > 1}
    if not found:
        return {}
    shape = max((values.shape for values in found.values()), key=math.prod)
    odd = [name for name, values in arrays.items() if values.shape != shape]
    if named and odd:
        raise ValueError(f"the variables have different shapes: {', '.join(odd)} beside {list(shape)}")
    return {name: values for name, values in found.items() if values.shape == shape}


def _pair_names(arrays: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Prefix -> the names of x and y."""
    found = {}
    for name in arrays:
        if name == "x" or name.endswith("_x"):
            other = name[:-1] + "y"
            if other in arrays:
                found[name[:-1].rstrip("_")] = (name, other)
    return found


def _open_pairs(
    arrays: dict[str, Any],
    names: dict[str, tuple[str, str]],
    path: Path,
    held_out: float,
    seed: int,
    transpose: bool,
    about: dict[str, Any],
) -> VisionData:
    parts = {
        prefix: _pairs(arrays[x], arrays[y], f"{path.name}, {prefix or 'x and y'}") for prefix, (x, y) in names.items()
    }
    training = [prefix for prefix in parts if "train" in prefix] or (list(parts) if len(parts) == 1 else [])
    if len(training) != 1:
        raise ValueError(
            f"{path} holds pairs named {', '.join(parts)}; of several, one and only one must have 'train' in its name"
        )
    train = parts.pop(training[0])
    if not parts:
        order = np.random.default_rng((seed, len(train))).permutation(len(train))
        cut = max(1, round(held_out * len(train)))
        if len(train) < 2:
            raise ValueError(f"{path} holds {len(train)} pair; at least two are needed")
        parts["held out"] = Pairs(train.x[order[:cut]], train.y[order[:cut]], f"{train.label}, held out")
        train = Pairs(train.x[order[cut:]], train.y[order[cut:]], train.label)
    if transpose:
        if train.grid[-1] != train.grid[-2]:
            raise ValueError(f"transpose=True needs square grids, got {size_in_words(train.grid)}")
        train = replace(train, transpose=True)
    # The resolution of training first, then others from coarse to fine.
    tests: dict[str, Source] = {}
    for part in sorted(parts.values(), key=lambda p: (p.grid != train.grid, math.prod(p.grid))):
        if (
            len(part.grid) != len(train.grid)
            or part.x.shape[1] != train.x.shape[1]
            or part.y.shape[1] != train.y.shape[1]
        ):
            raise ValueError(f"{part.label} has other axes or channels than {train.label}")
        base = size_in_words(part.grid)
        tests[base if base not in tests else f"{base} ({part.label})"] = part
    statistics = _both_statistics(train.x, train.y)
    first = next(iter(tests.values()))
    assert isinstance(first, Pairs)
    return VisionData(
        task="operator", train=train, tests=tests, channels=train.x.shape[1], outputs=train.y.shape[1],
        yardsticks=pair_yardsticks(_target_mean(statistics), first.y), **statistics, **about,
    )  # fmt: skip


def _pairs(x: Any, y: Any, label: str) -> Pairs:
    x, y = np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.float32)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"{label}: {len(x)} inputs and {len(y)} outputs")
    if y.ndim == x.ndim + 1 and y.shape[2:] == x.shape[1:]:
        x = np.broadcast_to(x[:, None], y.shape)
    # [n, *grid] is one channel; [n, C, *grid] is told from it by the channels, which differ between input and output.
    if x.ndim == y.ndim and x.shape[2:] == y.shape[2:] and x.ndim in (4, 5) and x.shape[1] != y.shape[1]:
        return Pairs(x, y, label)
    if x.shape != y.shape or x.ndim not in (3, 4):
        raise ValueError(
            f"{label}: x {list(x.shape)} and y {list(y.shape)} do not fit; needed are [n, H, W] or [n, T, H, W] of one "
            "shape, or [n, C, ...] with different channels over one grid"
        )
    return Pairs(x[:, None], y[:, None], label)


def _open_series(
    arrays: dict[str, Any], path: Path, frames: int, ahead: int | None, about: dict[str, Any]
) -> VisionData:
    if ahead is not None and not 1 <= ahead <= frames:
        most = "1" if frames == 1 else f"1 to {frames}"
        raise ValueError(
            f"ahead={ahead} with frames={frames}: {most} would be accepted, no more than are read; give more frames"
        )
    if frames == 1:
        ahead = None  # the next frame from the last one: the same question
    with np.errstate(over="ignore"):
        values = np.stack([np.asarray(a, dtype=np.float32) for a in arrays.values()], 1)
    values[~np.isfinite(values)] = np.nan
    steps = frames if ahead is None else ahead
    # Where the outputs are few, the inputs of a test may be of the training part: all frames of the other are outputs.
    shared = 0 if ahead is None else frames
    cut = len(values) - max(frames - shared + steps, len(values) // _HELD_OUT)
    if cut < frames + steps:
        asked = f"frames={frames}" + ("" if ahead is None else f" with ahead={ahead}")
        raise ValueError(f"{path} has {len(values)} frames; {asked} needs at least {_fewest(frames, steps, shared)}")
    train = Series(values[:cut], frames, path.name, ahead=ahead)
    test = Series(values[cut - shared :], frames, path.name, start=cut - shared, ahead=ahead)
    known = [_example(values[t], values[t]) for t in range(len(values))]
    if all(e.mask is not None and not e.mask.any() for e in known):
        raise ValueError(f"{path}: no point of {', '.join(arrays)} is finite in all variables")
    statistics = _both_statistics(train.values, train.values)
    yardsticks = series_yardsticks(train.values, test, test.start, frames, _target_mean(statistics))
    channels = len(arrays)
    return VisionData(
        task="operator", train=train, tests={size_in_words(test.grid): test}, channels=channels, outputs=channels,
        residual=True, ahead=ahead, yardsticks=yardsticks, **statistics, **about,
    )  # fmt: skip


def _fewest(frames: int, steps: int, shared: int) -> int:
    """Frames that a series needs for an example in both parts, of which the later one is a fifth at least."""
    example = frames + steps
    return max(2 * example - shared, (example - 1) * _HELD_OUT // (_HELD_OUT - 1) + 1)


def _open_field(
    name: str, raw: Any, path: Path, size: tuple[int, int] | None, fill: bool, about: dict[str, Any]
) -> VisionData:
    """Crops of a field `[H, W]`, or of the frames of a series `[T, H, W]`."""
    with np.errstate(over="ignore"):
        values = np.asarray(raw, dtype=np.float32)
    if fill and np.isfinite(values).all():
        asked = "the next frames are asked for" if values.ndim == 3 else "holes are filled all the same"
        raise ValueError(
            f"fill is for missing cells (NaN, such as land); {name} {list(values.shape)} in {path} has none; without "
            f"fill {asked}"
        )
    values = values if values.ndim == 3 else values[None]
    height, width = values.shape[1:]
    border = width - max(1, width // _HELD_OUT)
    most = (height, min(border, width - border))
    grid = (min(_CROP, most[0]), min(_CROP, most[1])) if size is None else size
    if grid[0] > most[0] or grid[1] > most[1] or min(grid) < 1:
        raise ValueError(f"crops of {size_in_words(grid)} do not fit: {name} leaves {size_in_words(most)} to test on")
    left, right = values[:, :, :border], values[:, :, border:]
    known = left[np.isfinite(left)]
    if known.size == 0:
        raise ValueError(f"{path}: {name} has no finite value to train on")
    mean, std = float(known.mean()), max(float(known.std()), 1e-6)
    count = max(1, _CROPS * math.prod(left.shape) // math.prod(grid))
    train = Crops(left, grid, mean, f"{path.name}, {name}", count)
    test = Crops(right, grid, mean, f"{path.name}, {name}, held out", _CROPS)
    return VisionData(
        task="operator", train=train, tests={size_in_words(grid): test}, channels=2, outputs=1,
        mean=(mean, 0.0), std=(std, 1.0), target_mean=(mean,), target_std=(std,), residual=True,
        yardsticks=crop_yardsticks(test), **about,
    )  # fmt: skip


def _both_statistics(x: Floats, y: Floats) -> dict[str, Any]:
    """Mean and standard deviation per channel of inputs and outputs `[n, C, *grid]`, over what is finite."""
    found = {}
    for prefix, values in (("", x), ("target_", y)):
        wide = values.astype(np.float64)
        wide[~np.isfinite(wide)] = np.nan
        axes = (0, *range(2, wide.ndim))
        if np.isnan(wide).all(axes).any():
            raise ValueError("a channel of the training part has no finite value")
        found[f"{prefix}mean"] = tuple(float(v) for v in np.nanmean(wide, axes))
        found[f"{prefix}std"] = tuple(max(float(v), 1e-6) for v in np.nanstd(wide, axes))
    return found


def _target_mean(statistics: dict[str, Any]) -> Floats:
    return np.asarray(statistics["target_mean"], dtype=np.float32)
