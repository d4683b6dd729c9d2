"""Filling holes in monthly fields with land masks: air temperature over the oceans, crops with hidden squares.

    python benchmarks/climatology.py coads_climatology.npz.xz --steps 300 --out runs/climatology

Land holds no value: no model reads it, and no error counts there. The right fifth of the map (the Atlantic) is held
out, in all months. Yardsticks in results.json: the mean of training in the holes, and the value of the nearest shown
point of the sea. Finished runs in --out are kept.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.ndimage import distance_transform_edt
from vision import arguments, settings_of, study

from farfield.data.grids import Crops, open_grids


def nearest(source: Crops) -> float:
    """Relative L2 of taking the nearest shown point, the mean over test crops."""
    errors = []
    for index in range(len(source)):
        example = source.get(index)
        known = np.ones(source.grid, dtype=bool) if example.mask is None else np.asarray(example.mask)
        truth = np.asarray(example.y)[0]
        shown = known & ~source.hidden(index)
        places = distance_transform_edt(~shown, return_distances=False, return_indices=True)
        guess = truth[tuple(places)]
        errors.append(np.linalg.norm((guess - truth)[known]) / np.linalg.norm(truth[known]))
    return float(np.mean(errors))


def main() -> None:
    parser = arguments("holes in fields with land masks", 300, "fma2d,window,dense")
    parser.add_argument("--variables", default="airt")
    given = parser.parse_args()
    data = open_grids(given.data, variables=given.variables.split(","), fill=True)
    test = next(iter(data.tests.values()))
    assert isinstance(test, Crops)
    told = {**data.yardsticks, "nearest shown point": nearest(test)}
    print(told, flush=True)
    study(settings_of(given), dataclasses.replace(data, yardsticks=told), given.out)


if __name__ == "__main__":
    main()
