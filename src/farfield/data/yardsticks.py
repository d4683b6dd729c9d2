"""Answers about fields that need no training: persistence, climatology, the nearest point.

A trained model should be ahead of them. All scores are relative L2 as of
:func:`farfield.models.vision.model.relative_errors`, a mean over the test examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from farfield.data.examples import Example, Source

__all__ = ["crop_yardsticks", "pair_yardsticks", "relative_l2", "series_yardsticks"]

Floats = npt.NDArray[np.float32]


def relative_l2(predicted: Any, target: Any, mask: Any = None) -> float:
    """The mean over examples of |predicted - target| / |target|, a mean over channels.

    Args:
        predicted, target: `[n, C, *grid]`; points where either is not finite do not count.
        mask: bool, broadcast over the targets, True = the point counts; None when every finite one does.
    """
    keep = np.isfinite(target) & np.isfinite(predicted)
    if mask is not None:
        keep = keep & mask
    shape = (*target.shape[:2], -1)
    difference = np.where(keep, predicted - np.where(keep, target, 0), 0).reshape(shape)
    size = np.linalg.norm(np.where(keep, target, 0).reshape(shape), axis=2)
    return float(np.mean(np.linalg.norm(difference, axis=2) / np.where(size > 0, size, 1)))


def pair_yardsticks(mean: Floats, outputs: Floats) -> dict[str, float]:
    """Of pairs: the mean of the training outputs.

    Args:
        mean: one number per channel `[C]`.
        outputs: the test outputs `[n, C, *grid]`.
    """
    guess = mean.reshape(-1, *(1,) * (outputs.ndim - 2))
    return {"mean of the training outputs": relative_l2(np.broadcast_to(guess, outputs.shape), outputs)}


def series_yardsticks(training: Floats, test: Source, start: int, frames: int, mean: Floats) -> dict[str, float]:
    """Of a series, what its past says.

    - *persistence*: the last frame that is read, again;
    - *the frame N before*, for ``frames`` N above 1: of monthly fields and 12 frames the same month a year ago;
    - *climatology, period N*, for ``frames`` N above 1: at every point the mean of the frames of training that lie a
      whole number of periods away, of monthly fields and 12 frames that of the month;
    - *mean of training*: one number per channel.

    Args:
        training: the frames that are trained on, `[T, C, H, W]`, from frame 0 of the series.
        test: the test examples, inputs `[C, H, W]` for one frame and `[C, frames, H, W]` for several; example ``i``
            reads from frame ``start + i``.
        start: see ``test``.
        frames: that an example reads.
        mean: of training, `[C]`.
    """
    examples = [test.get(index) for index in range(len(test))]

    def score(guess: Callable[[int, Example, int], Any]) -> float:
        found = []
        for index, example in enumerate(examples):
            y = np.asarray(example.y)
            steps = y.shape[1]
            mask = None if example.mask is None else example.mask[:steps]  # targets may have fewer steps
            found.append(relative_l2(np.broadcast_to(guess(index, example, steps), y.shape)[None], y[None], mask))
        return float(np.mean(found))

    found = {"persistence": score(lambda _, e, __: e.x if frames == 1 else e.x[:, -1:])}
    if frames > 1:
        found[f"the frame {frames} before"] = score(lambda _, e, steps: e.x[:, :steps])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # points without any value stay NaN, and count nowhere
            phases = np.stack([np.nanmean(training[k::frames], 0) for k in range(frames)], 1)

        def phase(index: int, example: Example, steps: int) -> Any:
            return phases[:, [(start + index + k) % frames for k in range(steps)]]

        found[f"climatology, period {frames}"] = score(phase)
    flat = mean.reshape(-1, *(1,) * (training.ndim - 2 + (frames > 1)))
    found["mean of training"] = score(lambda _, __, ___: flat)
    return found


def crop_yardsticks(test: Source) -> dict[str, float]:
    """Of crops with hidden squares: their mean in the holes, as the input has it there, and the nearest shown point.

    Args:
        test: examples whose input is `[what is shown, where]` and whose output is all of it.

    Raises:
        ModuleNotFoundError: without scipy.
    """
    try:
        from scipy.ndimage import distance_transform_edt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "filling holes needs the extra `vision` (scipy): pip install 'farfield[vision]'", name="scipy"
        ) from error
    flat, nearest = [], []
    for index in range(len(test)):
        example = test.get(index)
        truth, given = np.asarray(example.y)[None], np.asarray(example.x)
        flat.append(relative_l2(given[None, :1], truth, example.mask))
        shown = given[1] > 0 if example.mask is None else (given[1] > 0) & np.asarray(example.mask)
        if shown.any():
            places = distance_transform_edt(~shown, return_distances=False, return_indices=True)
            nearest.append(relative_l2(truth[:, :, places[0], places[1]], truth, example.mask))
        else:  # nothing is near
            nearest.append(flat[-1])
    return {"mean in the holes": float(np.mean(flat)), "nearest shown point": float(np.mean(nearest))}
