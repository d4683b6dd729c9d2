"""Monthly winds: the next month from one (2-D) or from twelve (3-D), or the next months from as many.

    python benchmarks/winds.py navy_winds_monthly.npz.xz --frames 1 --steps 500 --out runs/winds
    python benchmarks/winds.py navy_winds_monthly.npz.xz --frames 12 --ahead 1 --rank 1 --patch 4 \
        --attention fma,dense --steps 300 --out runs/winds12
    python benchmarks/winds.py navy_winds_monthly.npz.xz --frames 4 --rank 1 --steps 500 --out runs/winds4

Finished runs in --out are kept. The yardsticks in results.json: the same month again (of --frames 12 a year ago), the
last month again (persistence), the mean of that month in training (climatology), and the mean of training.
"""

from __future__ import annotations

from vision import arguments, settings_of, study

from farfield.data.grids import open_grids


def main() -> None:
    parser = arguments("the next months of the winds", 500, "dense,window,fma")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--ahead", type=int)
    parser.add_argument("--variables", default="uwnd,vwnd")
    given = parser.parse_args()
    data = open_grids(given.data, variables=given.variables.split(","), frames=given.frames, ahead=given.ahead)
    study(settings_of(given), data, given.out)


if __name__ == "__main__":
    main()
