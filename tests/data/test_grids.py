from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farfield.data.arrays import read_arrays
from farfield.data.examples import Batches, in_order
from farfield.data.grids import Crops, Pairs, open_grids
from farfield.data.kinds import kind_of
from support.vision_data import real


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_pairs_with_other_resolutions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((10, 8, 6)) > 0.5, rng.random((10, 8, 6))
    finer = rng.random((4, 16, 12))
    path = saved(tmp_path / "a.npz", f_train_x=x, f_train_y=y, f_test_fine_x=finer, f_test_fine_y=finer,
                 f_test_x=x[:3], f_test_y=y[:3])  # fmt: skip
    assert kind_of([path]) == "fields"
    data = open_grids([path])
    assert {name: len(s) for name, s in data.tests.items()} == {"8x6": 3, "16x12": 4}
    assert (data.channels, data.outputs, data.dims) == (1, 1, 2)
    assert data.mean == (pytest.approx(float(x.mean())),)
    assert data.target_std == (pytest.approx(float(y.std())),)
    example = data.train.get(2)
    assert np.array_equal(example.x[0], x[2].astype(np.float32))
    assert np.array_equal(example.y[0], y[2].astype(np.float32))  # type: ignore[index]
    guess = [np.linalg.norm(a - y.mean()) / np.linalg.norm(a) for a in y[:3]]
    assert data.yardsticks["mean of the training outputs"] == pytest.approx(np.mean(guess), rel=1e-4)


def test_pairs_alone_are_cut(tmp_path: Path) -> None:
    x = np.arange(20, dtype=float)[:, None, None] * np.ones((1, 4, 4))
    data = open_grids([saved(tmp_path / "a.npz", x=x, y=2 * x)], held_out=0.25)
    held = data.tests["4x4"]
    sides = [{float(s.get(i).x[0, 0, 0]) for i in range(len(s))} for s in (data.train, held)]
    assert [len(side) for side in sides] == [15, 5]
    assert sides[0] | sides[1] == set(range(20))


def test_an_input_with_one_axis_less_is_repeated(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).random((5, 8)), np.zeros((5, 3, 8))
    data = open_grids([saved(tmp_path / "a.npz", x=x, y=y)])
    example = data.train.get(0)
    assert example.x.shape == (1, 3, 8)
    assert (example.x[0] == example.x[0, :1]).all()


@pytest.mark.parametrize(("frames", "grid"), [(1, (4, 5)), (3, (3, 4, 5))])
def test_a_series_predicts_what_comes_next(tmp_path: Path, frames: int, grid: tuple[int, ...]) -> None:
    time = np.arange(30.0)[:, None, None] * np.ones((1, 4, 5))
    path = saved(tmp_path / "a.npz", u=time, v=-time, lat=np.arange(4), note=np.array("text"))
    data = open_grids([path], frames=frames)
    assert data.channels == data.outputs == 2
    assert data.train.grid == grid
    (test,) = data.tests.values()
    last_trained = 0.0
    for source in (data.train, test):
        for i in range(len(source)):
            example = source.get(i)
            assert isinstance(example.y, np.ndarray)
            assert (example.y[0] - example.x[0] == frames).all()
            assert (example.y[1] == -example.y[0]).all()
            if source is data.train:
                last_trained = max(last_trained, float(example.y[0].max()))
            else:
                assert example.x[0].min() > last_trained  # no frame is on both sides
    assert data.yardsticks["persistence"] < data.yardsticks["mean of training"]
    ends = [[test.get(i).x[0].max(), np.asarray(test.get(i).y)[0]] for i in range(len(test))]  # read, and asked about
    errors = [np.linalg.norm(y - last) / np.linalg.norm(y) for last, y in ends]
    assert data.yardsticks["persistence"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert open_grids([path], variables=["v"]).channels == 1


def test_what_is_not_finite_is_masked(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((10, 4, 5))
    values[:, 0] = np.nan
    values[3, 2, 2] = np.inf
    data = open_grids([saved(tmp_path / "a.npz", u=values)])
    batch = next(Batches(data.train, 3).stream(1))
    assert batch.mask is not None
    assert not batch.mask[:, 0].any()
    assert batch.mask[:, 3].all()
    assert batch.x.isfinite().all() and batch.y.isfinite().all()
    assert np.isfinite(data.mean + data.std + tuple(data.yardsticks.values())).all()


def test_one_field_is_filled_in(tmp_path: Path) -> None:
    field = np.random.default_rng(0).normal(5, 2, (40, 60)).astype(np.float32)
    data = open_grids([saved(tmp_path / "a.npz", relief=field)], size=(8, 8))
    (test,) = data.tests.values()
    example = test.get(3)
    shown, seen = example.x
    assert isinstance(example.y, np.ndarray)
    hidden = seen == 0
    assert 4 <= hidden.sum() < 32
    assert np.array_equal(shown[~hidden], example.y[0][~hidden])
    assert np.ptp(shown[hidden]) == 0
    assert np.array_equal(example.x, test.get(3).x)
    assert not np.array_equal(
        data.train.get(0, np.random.default_rng(1)).y, data.train.get(0, np.random.default_rng(2)).y
    )
    trained = {data.train.get(0, np.random.default_rng(k)).y[0].max() for k in range(50)}  # type: ignore[index]
    assert max(trained) <= field[:, :48].max()
    with pytest.raises(ValueError, match="do not fit"):
        open_grids([tmp_path / "a.npz"], size=(8, 20))
    bare = open_grids([tmp_path / "a.npz"], size=(1, 1)).yardsticks  # a crop of which nothing is shown
    assert bare["nearest shown point"] == bare["mean in the holes"] > 0


def test_netcdf(tmp_path: Path) -> None:
    from scipy.io import netcdf_file

    path = tmp_path / "a.nc"
    with netcdf_file(str(path), "w") as file:
        for name, length in (("time", 12), ("lat", 4), ("lon", 6)):
            file.createDimension(name, length)
        axis = file.createVariable("lat", "f", ("lat",))
        axis[:] = np.arange(4)
        variable = file.createVariable("sst", "h", ("time", "lat", "lon"))
        variable.scale_factor, variable.add_offset, variable.missing_value = 0.5, 10.0, np.int16(-99)
        raw = np.arange(12 * 24).reshape(12, 4, 6).astype(np.int16)
        raw[:, 1, 2] = -99
        variable[:] = raw
    arrays = read_arrays(path)
    assert list(arrays) == ["sst"]
    assert np.isnan(arrays["sst"][:, 1, 2]).all()
    assert arrays["sst"][0, 0, 3] == 11.5
    data = open_grids([path])
    assert data.train.get(0).mask is not None
    path.write_bytes(b"\x89HDF\r\n" + bytes(100))
    with pytest.raises(ValueError, match="nccopy"):
        read_arrays(path)
    path.write_bytes(b"CDF\x01" + bytes(3))
    with pytest.raises(ValueError, match="damaged"):
        read_arrays(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(4)}, r"holds a \[4\]; needed are pairs"),
        ({"x": np.zeros((3, 4, 4)), "y": np.zeros((2, 4, 4))}, "3 inputs and 2 outputs"),
        ({"x": np.zeros((3, 4, 4)), "y": np.zeros((3, 5, 4))}, "do not fit"),
        ({"p_x": np.zeros((3, 4, 4)), "p_y": np.zeros((3, 4, 4)), "q_x": np.zeros((3, 4, 4)),
          "q_y": np.zeros((3, 4, 4))}, "one and only one must have 'train'"),
        ({"u": np.zeros((2, 4, 4))}, "2 frames"),
        ({"u": np.full((9, 4, 4), np.nan)}, "no point of u is finite"),
    ],
)  # fmt: skip
def test_what_fits_nothing_is_described(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_grids([saved(tmp_path / "a.npz", **arrays)])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.npz", u=np.random.default_rng(0).random((30, 9, 9))).read_bytes()
    for name, data in (
        ("cut.npz", whole[:-200]),
        ("flipped.npz", whole[:9000] + bytes([whole[9000] ^ 255]) + whole[9001:]),
        ("cut.npz.xz", lzma.compress(whole)[:-50]),
        ("text.npz", b"hello"),
        ("single.npz", b""),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=name):
            open_grids([path])
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npz").write_bytes((tmp_path / "array.npy").read_bytes())
    with pytest.raises(ValueError, match="single array"):
        read_arrays(tmp_path / "array.npz")
    path = saved(tmp_path / "b.npz", u=np.zeros((9, 4, 4)), w=np.zeros((9, 5, 4)))
    with pytest.raises(ValueError, match="no variable z"):
        open_grids([path], variables=["z"])
    with pytest.raises(ValueError, match="different shapes"):
        open_grids([path], variables=["u", "w"])


@pytest.mark.parametrize(
    ("name", "grids", "channels"),
    [
        ("darcy", {"16x16": 50, "32x32": 50}, (1, 1)),
        ("burgers", {"17x16": 400}, (1, 1)),
        ("navy_winds_monthly", {"73x144": 25}, (2, 2)),
        ("coads_climatology", {"90x180": 1}, (7, 7)),
        ("etopo20", {"128x128": 16}, (2, 1)),
    ],
)
def test_real_fields(name: str, grids: dict[str, int], channels: tuple[int, int]) -> None:
    data = open_grids([real(f"physics/{name}.npz.xz")])
    assert {key: len(source) for key, source in data.tests.items()} == grids
    assert (data.channels, data.outputs) == channels
    for source in data.tests.values():
        batch, indices = next(in_order(source, 2))
        assert len(batch.x) == len(indices)
        assert batch.x.isfinite().all() and batch.y.isfinite().all()
        assert (batch.mask is not None) == (name == "coads_climatology")


def test_a_series_of_which_only_the_next_frame_is_asked(tmp_path: Path) -> None:
    """Read from months of both parts; every frame that is asked of a test lies after all of training."""
    time = np.arange(40.0)[:, None, None] + 100 * np.arange(2.0)[None, :, None] * np.ones((1, 1, 3))
    data = open_grids([saved(tmp_path / "a.npz", u=time)], frames=4, ahead=1)
    (test,) = data.tests.values()
    assert data.ahead == 1 and data.train.grid == test.grid == (4, 2, 3)
    assert (len(data.train), len(test)) == (28, 8)
    for source, frames in ((data.train, range(4, 32)), (test, range(32, 40))):
        for index, frame in enumerate(frames):
            example = source.get(index)
            assert isinstance(example.y, np.ndarray) and example.y.shape == (1, 1, 2, 3)
            assert example.y[0, 0, 0, 0] == frame
            assert example.x[0, :, 0, 0].tolist() == list(range(frame - 4, frame))
    said = data.yardsticks
    base = [np.linalg.norm(time[frame]) for frame in range(32, 40)]
    assert said["the frame 4 before"] == pytest.approx(np.mean([4 * 6**0.5 / b for b in base]))
    assert said["persistence"] == pytest.approx(np.mean([6**0.5 / b for b in base]))
    # The mean of the frames of training a whole number of fours before.
    means = [np.mean([k for k in range(32) if k % 4 == frame % 4]) for frame in range(32, 40)]
    errors = [(frame - mean) * 6**0.5 / b for frame, mean, b in zip(range(32, 40), means, base, strict=True)]
    assert said["climatology, period 4"] == pytest.approx(np.mean(errors))


def test_holes_in_the_frames_of_a_series(tmp_path: Path) -> None:
    """Land is masked, never counted and never hidden; training crops are of the left part, all frames among them."""
    rng = np.random.default_rng(0)
    values = rng.random((3, 20, 30)).astype(np.float32) + np.arange(3, dtype=np.float32)[:, None, None] * 10
    values[:, 8:12, 4:28] = np.nan
    data = open_grids([saved(tmp_path / "a.npz", t=values)], fill=True, size=(16, 6))
    (test,) = data.tests.values()
    assert isinstance(test, Crops)
    frames, rng = set(), np.random.default_rng(1)
    for source in (data.train, test):
        for index in range(12):
            example = source.get(index, rng if source is data.train else None)
            assert example.mask is not None and isinstance(example.y, np.ndarray)
            if source is data.train:
                frames.add(int(example.y[0][example.mask].mean() // 10))
            known = example.y[0][example.mask]
            assert np.isin(known, values[:, :, :24] if source is data.train else values[:, :, 24:]).all()
            shown = example.mask & (example.x[1] == 1)
            assert np.array_equal(example.x[0][shown], example.y[0][shown])
    assert frames == {0, 1, 2}
    first = test.get(0)
    assert first.mask is not None
    hidden = first.mask & (first.x[1] == 0)
    assert hidden.any() and (first.x[0][hidden] == np.float32(test.fill)).all()
    # The nearest shown point by looking at all of them; ties may fall either way, so the bounds are those of both.
    bounds = []
    for index in range(len(test)):
        example = test.get(index)
        assert example.mask is not None and isinstance(example.y, np.ndarray)
        truth, shown = example.y[0], example.mask & (example.x[1] == 1)
        low, high = 0.0, 0.0
        for place in np.argwhere(example.mask & ~shown):
            far = ((np.argwhere(shown) - place) ** 2).sum(1)
            errors = np.abs(truth[shown][far == far.min()] - truth[tuple(place)])
            low, high = low + float(errors.min()) ** 2, high + float(errors.max()) ** 2
        bounds.append(np.sqrt([low, high]) / np.linalg.norm(truth[example.mask]))
    low, high = np.mean(bounds, 0)
    assert low - 1e-6 <= data.yardsticks["nearest shown point"] <= high + 1e-6
    assert high < data.yardsticks["mean in the holes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 4, "ahead": 5}, "ahead=5 with frames=4: 1 to 4 would be accepted"),
        ({"ahead": 2}, "ahead=2 with frames=1: 1 would be accepted"),
        ({"frames": 20, "ahead": 9}, "30 frames; frames=20 with ahead=9 needs at least 38"),
        ({"frames": 8}, "30 frames; frames=8 needs at least 32"),
        ({"fill": True, "frames": 2}, "not what comes next; frames=2 is for a series"),
        ({"fill": True}, r"u \[30, 4, 5\] in .* has none; without fill the next frames are asked for"),
        ({"size": (2, 2)}, "size=2x2 is for crops"),
    ],
)
def test_wrong_questions_of_a_series(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = saved(tmp_path / "a.npz", u=np.zeros((30, 4, 5)))
    with pytest.raises(ValueError, match=message):
        open_grids([path], **options)


def test_axes_of_training_pairs_are_exchanged_together(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((10, 6, 6)).astype(np.float32)
    data = open_grids([saved(tmp_path / "a.npz", x=x, y=2 * x)], transpose=True)
    assert isinstance(data.train, Pairs)
    rng, exchanged = np.random.default_rng(1), 0
    for index in [*range(len(data.train))] * 4:
        plain, drawn = data.train.get(index), data.train.get(index, rng)
        assert np.array_equal(np.asarray(drawn.y), 2 * drawn.x)
        other = np.array_equal(drawn.x, plain.x.swapaxes(1, 2))
        assert other != np.array_equal(drawn.x, plain.x)
        exchanged += other
    assert 8 < exchanged < 28
    (test,) = data.tests.values()
    assert np.array_equal(test.get(0).x, test.get(0, rng).x)
    with pytest.raises(ValueError, match="transpose=True needs square grids, got 6x5"):
        open_grids([saved(tmp_path / "b.npz", x=x[:, :, 1:], y=x[:, :, 1:])], transpose=True)
    with pytest.raises(ValueError, match="transpose=True is for pairs"):
        open_grids([saved(tmp_path / "c.npz", u=np.zeros((9, 4, 4)))], transpose=True)


def test_the_next_frame_of_one_frame_is_the_usual_question(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", u=np.random.default_rng(0).random((30, 4, 5)))
    usual, asked = open_grids([path]), open_grids([path], ahead=1)
    assert asked.ahead is None and len(asked.train) == len(usual.train)
    assert asked.yardsticks == usual.yardsticks


@pytest.mark.parametrize(
    ("frames", "ahead", "fewest"), [(1, None, 4), (3, None, 12), (4, 1, 6), (12, 1, 16), (3, 3, 9)]
)
def test_a_series_of_the_fewest_frames_has_an_example_in_both_parts(
    tmp_path: Path, frames: int, ahead: int | None, fewest: int
) -> None:
    values = np.random.default_rng(0).random((fewest, 4, 5))
    data = open_grids([saved(tmp_path / "a.npz", u=values)], frames=frames, ahead=ahead)
    (test,) = data.tests.values()
    assert len(data.train) >= 1 and len(test) >= 1
    assert np.isfinite(list(data.yardsticks.values())).all()
    with pytest.raises(ValueError, match=f"{fewest - 1} frames; .*at least {fewest}"):
        open_grids([saved(tmp_path / "b.npz", u=values[1:])], frames=frames, ahead=ahead)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": np.zeros((9, 4, 4)), "y": np.ones((9, 4, 4))}, {"ahead": 1}, "ahead=1 is for a series"),
        ({"x": np.zeros((9, 4, 4)), "y": np.ones((9, 4, 4))}, {"fill": True}, "fill=True is for fields with missing"),
        ({"u": np.zeros((40, 40))}, {"frames": 2}, "single field .*frames=2 is for a series"),
        ({"u": np.zeros((40, 40))}, {"fill": True}, "without fill holes are filled all the same"),
        ({"u": np.full((9, 4, 4), np.nan), "v": np.zeros((9, 4, 4))}, {"fill": True}, "has u, v: name one of them"),
    ],
)  # fmt: skip
def test_questions_that_the_data_do_not_answer(
    tmp_path: Path, arrays: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_grids([saved(tmp_path / "a.npz", **arrays)], **options)


def test_a_choice_of_variables_and_exchanged_axes_are_other_data(tmp_path: Path) -> None:
    """Neither grid nor channels tell them apart, and finished runs of one are not those of the other."""
    rng = np.random.default_rng(0)
    series = saved(tmp_path / "a.npz", u=rng.random((9, 4, 4)), v=rng.random((9, 4, 4)))
    pairs = saved(tmp_path / "b.npz", x=rng.random((9, 4, 4)), y=rng.random((9, 4, 4)))
    marks = [open_grids([series], variables=names).fingerprint for names in ([], ["u"], ["v"], ["u"])]
    assert len(set(marks)) == 3 and marks[1] == marks[3]
    assert open_grids([pairs]).fingerprint != open_grids([pairs], transpose=True).fingerprint
