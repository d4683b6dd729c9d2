"""Darcy flow: trained at 16 x 16, tested at 16 x 16 and 32 x 32 with the same weights (resolution transfer).

    python benchmarks/darcy.py darcy.npz.xz --steps 2000 --seeds 3 --out runs/darcy

Finished runs in --out are kept. results.json has relative L2 and relative MSE at both resolutions.
"""

from __future__ import annotations

from vision import arguments, settings_of, study

from farfield.data.grids import open_grids


def main() -> None:
    parser = arguments("Darcy flow at two resolutions", 2000)
    parser.add_argument("--transpose", action="store_true", help="exchange the axes of training examples at random")
    given = parser.parse_args()
    study(settings_of(given), open_grids(given.data, transpose=given.transpose), given.out)


if __name__ == "__main__":
    main()
