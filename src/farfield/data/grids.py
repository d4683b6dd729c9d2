"""Fields on grids: pairs of input and output, series in time, and single large fields.

What a file holds decides the question that is asked of it:

- *pairs* ``x`` and ``y``, or ``<name>_x`` and ``<name>_y`` with "train" or "test" in the name: predict y from x. Test
  pairs may lie on other grids than those of training. An x with one axis less than y is the same all along y's first
  axis.
- *a series* of fields `[T, H, W]`, all of one shape: predict the next frame, or the next ``frames`` frames (or
  fewer, ``ahead``), from as many before them. The last fifth of the time is held out.
- *a field* `[H, W]`, or with ``fill`` the frames of a series: fill in squares that are hidden, in crops of it. The
  right fifth is held out.

Values that are not finite are masked: no model reads them, and no error counts there.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farfield.data.arrays import read_arrays
from farfield.data.examples import Example, Source, VisionData, size_in_words

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

    def hidden(self, index: int) -> npt.NDArray[np.bool_]:
        """The points `[H, W]` of a test crop that are hidden and known."""
        example = self.get(index)
        known = np.ones(self.grid, dtype=bool) if example.mask is None else np.asarray(example.mask)
        return known & (np.asarray(example.x)[1] == 0)

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
        ahead: of a series, how many of them are predicted; all by default. Test examples may read frames of the
            training part then, and are asked about later ones only.
        fill: of a series of one variable, fill holes in its frames instead of predicting the next ones.
        transpose: of pairs on square grids whose law is the same along both axes: exchange the axes of training
            examples at random, which doubles them.
        size: of a single field (or with ``fill``), height and width of the crops; 128 x 128 by default, less where it
            is smaller.
        held_out: part of the pairs that is held out where there are no test pairs.
        seed: of that choice.

    Raises:
        FileNotFoundError: if a path names nothing.
        ValueError: when the file holds nothing of the kinds above; the message lists what it holds.
    """
    if len(paths) != 1:
        raise ValueError(f"give one file of fields, got {len(paths)}: {', '.join(str(p) for p in paths)}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    if ahead is not None and not (1 <= ahead <= frames and frames > 1):
        raise ValueError(f"ahead={ahead} with frames={frames}: 1 to frames would be accepted, of at least 2 frames")
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
    about: dict[str, Any] = {"source": str(path), "fingerprint": digest.hexdigest()}
    pairs = _pair_names(arrays)
    if pairs and not variables:
        if frames != 1 or size is not None or fill:
            raise ValueError(f"{path} holds pairs ({', '.join(pairs)}), which have neither frames nor crops")
        return _open_pairs(arrays, pairs, path, held_out, seed, transpose, about)
    if transpose:
        raise ValueError(f"transpose=True is for pairs; {path} holds {listed}")
    wanted = {name: arrays[name] for name in (variables or arrays)}
    series = _alike(wanted, 3, bool(variables))
    if series and fill:
        if len(series) != 1 or frames != 1:
            raise ValueError(
                f"filling holes takes one variable and no frames; {path} has {', '.join(series)}, frames={frames}"
            )
        return _open_field(*next(iter(series.items())), path, size, about)
    if series:
        if size is not None:
            raise ValueError(f"{path} holds a series ({', '.join(series)}), which is taken whole; leave out the size")
        return _open_series(series, path, frames, ahead, about)
    fields = _alike(wanted, 2, bool(variables))
    if len(fields) == 1:
        if frames != 1:
            raise ValueError(f"{path} holds a single field ({', '.join(fields)}), which has no frames")
        return _open_field(*next(iter(fields.items())), path, size, about)
    raise ValueError(
        f"{path} holds {listed}; needed are pairs (x and y, or NAME_x and NAME_y), fields [T, H, W] of one shape, or "
        "one field [H, W] (named by --variables where there are several)"
    )


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
    mean = np.asarray(statistics["target_mean"], dtype=np.float32).reshape(-1, *(1,) * len(train.grid))
    first = next(iter(tests.values()))
    assert isinstance(first, Pairs)
    yardsticks = {"mean of the training outputs": _relative(np.broadcast_to(mean, first.y.shape), first.y)}
    return VisionData(
        task="operator", train=train, tests=tests, channels=train.x.shape[1], outputs=train.y.shape[1],
        yardsticks=yardsticks, **statistics, **about,
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
    with np.errstate(over="ignore"):
        values = np.stack([np.asarray(a, dtype=np.float32) for a in arrays.values()], 1)
    values[~np.isfinite(values)] = np.nan
    cut = len(values) - max(2 * frames, len(values) // _HELD_OUT)
    if ahead is not None:
        cut = len(values) - max(1, len(values) // _HELD_OUT)
    # Where the outputs are few, the inputs of a test may be of the training part: all frames of the other are outputs.
    begin = max(cut if ahead is None else cut - frames, 0)
    train = Series(values[: max(cut, 0)], frames, path.name, ahead=ahead)
    test = Series(values[begin:], frames, path.name, start=begin, ahead=ahead)
    if len(train) < 1:
        raise ValueError(f"{path} has {len(values)} frames; frames={frames} needs at least {4 * frames}")
    known = [_example(values[t], values[t]) for t in range(len(values))]
    if all(e.mask is not None and not e.mask.any() for e in known):
        raise ValueError(f"{path}: no point of {', '.join(arrays)} is finite in all variables")
    statistics = _both_statistics(train.values, train.values)
    told = [test.get(i) for i in range(len(test))]
    mean = np.asarray(statistics["target_mean"], dtype=np.float32).reshape(-1, *(1,) * len(train.grid))

    def score(guess: Callable[[int, Example], Any]) -> float:
        found = []
        for index, example in enumerate(told):
            y = np.asarray(example.y)
            mask = None if example.mask is None else example.mask[: y.shape[1]]
            found.append(_relative(np.broadcast_to(guess(index, example), y.shape)[None], y[None], mask))
        return float(np.mean(found))

    yardsticks = {"the same again": score(lambda _, e: e.x[:, : np.asarray(e.y).shape[1]])}
    if ahead is not None:
        yardsticks["the last frame again"] = score(lambda _, e: e.x[:, -1:])
    if frames > 1 and len(train.values) >= frames:
        # The mean of all frames of training that lie a whole number of ``frames`` away: of 12 months, of that month.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # points without any value stay NaN, and count nowhere
            phases = np.stack([np.nanmean(train.values[k::frames], 0) for k in range(frames)], 1)

        def phase(index: int, example: Example) -> Any:
            steps = np.asarray(example.y).shape[1]
            return phases[:, [(test.start + index + k) % frames for k in range(steps)]]

        yardsticks[f"mean of training, every {frames}th frame"] = score(phase)
    yardsticks["mean of training"] = score(lambda _, e: mean)
    channels = len(arrays)
    return VisionData(
        task="operator", train=train, tests={size_in_words(test.grid): test}, channels=channels, outputs=channels,
        residual=True, ahead=ahead, yardsticks=yardsticks, **statistics, **about,
    )  # fmt: skip


def _open_field(name: str, raw: Any, path: Path, size: tuple[int, int] | None, about: dict[str, Any]) -> VisionData:
    """Crops of a field `[H, W]`, or of the frames of a series `[T, H, W]`."""
    with np.errstate(over="ignore"):
        values = np.asarray(raw, dtype=np.float32)
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
    told = [test.get(i) for i in range(len(test))]
    flat = [_relative(e.x[None, :1], np.asarray(e.y)[None], e.mask) for e in told]
    return VisionData(
        task="operator", train=train, tests={size_in_words(grid): test}, channels=2, outputs=1,
        mean=(mean, 0.0), std=(std, 1.0), target_mean=(mean,), target_std=(std,), residual=True,
        yardsticks={"mean in the holes": float(np.mean(flat))}, **about,
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


def _relative(predicted: Any, target: Any, mask: Any = None) -> float:
    """As :func:`farfield.models.vision.model.relative_errors`, the mean over examples."""
    keep = np.isfinite(target) & np.isfinite(predicted)
    if mask is not None:
        keep = keep & mask
    shape = (*target.shape[:2], -1)
    difference = np.where(keep, predicted - np.where(keep, target, 0), 0).reshape(shape)
    size = np.linalg.norm(np.where(keep, target, 0).reshape(shape), axis=2)
    return float(np.mean(np.linalg.norm(difference, axis=2) / np.where(size > 0, size, 1)))
