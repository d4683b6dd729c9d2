from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from farfield.data.examples import BadExample, Batches, in_order
from farfield.data.images import ImageSource, decode, open_images
from farfield.data.kinds import kind_of
from support.vision_data import encoded, folder_by_class, labelled_archive, mask_archive, packed, picture, real

GREY = np.full((5, 7), 100, dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.fromarray(GREY), "PNG", (100, 100, 100)),
        (Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE), "PNG", (0, 0, 0)),
        (Image.new("RGB", (7, 5), (10, 200, 30)).convert("P"), "GIF", (0, 204, 51)),
        (Image.new("RGBA", (7, 5), (0, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (7, 5), (0, 255)), "PNG", (0, 0, 0)),
        (Image.new("CMYK", (7, 5), (0, 0, 0, 0)), "JPEG", (255, 255, 255)),
        (Image.fromarray(np.full((5, 7), 100 * 257, dtype=np.uint16)), "PNG", (100, 100, 100)),
        (Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", (9, 8, 7)),
    ],
    ids=["grey", "bits", "palette", "transparent", "grey-alpha", "cmyk", "16-bit", "one-pixel"],
)
def test_odd_images_become_rgb(image: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    found = decode(encoded(image, kind), "odd")
    assert found.mode == "RGB"
    assert found.size == image.size
    assert np.abs(np.asarray(found)[0, 0].astype(int) - expected).max() <= 6  # palettes are coarse


def test_images_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert decode(encoded(picture((9, 9, 9), (8, 4)), "JPEG", exif=exif), "turned").size == (4, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"no image at all", "not an image"),
        (encoded(picture((1, 2, 3), (64, 64)))[:300], "truncated"),
        (encoded(picture((1, 2, 3), (64, 64)), "JPEG")[:200], "."),
        (encoded(Image.new("1", (10_001, 10_000))), "too many"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    ],
)
def test_what_cannot_be_read_is_named(data: bytes, message: str) -> None:
    with pytest.raises(BadExample, match=rf"^the file: .*{message}"):
        decode(data, "the file")


def test_a_bad_example_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadExample("a", "b")))
    assert (error.name, error.reason, str(error)) == ("a", "b", "a: b")


def test_a_folder_by_class(tmp_path: Path) -> None:
    root = folder_by_class(tmp_path / "set")
    (root / "reds" / "notes.txt").write_text("no image")
    (root / "reds" / ".hidden.png").write_text("no image")
    assert kind_of([root]) == "images"
    data = open_images([root])
    assert data.classes == ("blues", "reds")
    assert data.task == "classify"
    assert data.train.grid == (10, 10)
    assert len(data.train) == 10
    assert len(data.tests["10x10"]) == 2
    assert [line.partition(": ")[0].rpartition("/")[2] for line in data.skipped] == ["notes.txt"]
    example = data.train.get(0)
    assert example.x.shape == (3, 10, 10)
    assert example.x.dtype == np.float32
    assert example.x[2].mean() > 0.6 > example.x[0].mean() + 0.3  # blue, of values from 0 to 1
    assert data.yardsticks == {"most frequent class": 0.5}


def test_given_halves_are_taken(tmp_path: Path) -> None:
    folder_by_class(tmp_path / "set" / "train", 3)
    folder_by_class(tmp_path / "set" / "val", 2)
    data = open_images([tmp_path / "set"], size=(6, 8), test_sizes=[(12, 16)])
    assert len(data.train) == 6
    assert {name: (len(s), s.grid) for name, s in data.tests.items()} == {"6x8": (4, (6, 8)), "12x16": (4, (12, 16))}
    (tmp_path / "set" / "val" / "greens").mkdir()
    with pytest.raises(ValueError, match=r"classes that .* has not: greens"):
        open_images([tmp_path / "set"])


def test_corrupt_images_are_told_by_name_and_left_out(tmp_path: Path) -> None:
    root = folder_by_class(tmp_path / "set", 5)
    broken = root / "reds" / "broken.png"
    broken.write_bytes(encoded(picture((200, 40, 40), (64, 64)))[:200])
    data = open_images([root], seed=1)
    train = data.train
    assert isinstance(train, ImageSource)
    assert broken in train.files
    told: list[str] = []
    batches = list(
        itertools.islice(Batches(train, 4, on_bad=lambda name, _: told.append(name)).stream(1), 2 * len(train))
    )
    assert all(batch.x.shape == (4, 3, 10, 10) for batch in batches)
    assert told == [str(broken)]
    seen = [i for _, indices in in_order(train, 3, on_bad=lambda name, _: told.append(name)) for i in indices]
    assert len(seen) == len(train) - 1
    assert told == [str(broken)] * 2


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(2):
            (tmp_path / "set" / name / f"{k}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none of 2 images can be read; the first says .*not an image"):
        open_images([tmp_path / "set"])


def _left_out(root: Path, skipped: tuple[str, ...]) -> dict[str, str]:
    """Path from the root to reason."""
    pairs = (line.split(": ", 1) for line in skipped)
    return {str(Path(path).relative_to(root)): reason for path, reason in pairs}


def test_whatever_is_left_out_is_named(tmp_path: Path) -> None:
    root = folder_by_class(tmp_path / "set")
    stray = (root / "reds" / "0.jpeg").read_bytes()
    (root / "stray.JPG").write_bytes(stray)
    (root / "README.md").write_text("about the images")
    (root / "elsewhere").symlink_to(tmp_path / "gone")
    reds = root / "reds"
    (reds / "lost.png").symlink_to(tmp_path / "gone.png")
    (reds / "loop.png").symlink_to(reds / "loop.png")
    (reds / "folder.png").mkdir()
    (reds / "folder.png" / "inside.jpeg").write_bytes(stray)
    (reds / "more").mkdir()
    (reds / "more" / "deep.jpeg").write_bytes(stray)
    (reds / "kept.jpeg").symlink_to(reds / "0.jpeg")
    (reds / ".thumbnails").mkdir()
    (reds / ".thumbnails" / "small.png").write_bytes(stray)
    (tmp_path / "others").mkdir()
    (reds / "others").symlink_to(tmp_path / "others")
    (root / "empty").mkdir()
    data = open_images([root])
    assert _left_out(root, data.skipped) == {
        "stray.JPG": "lies beside the folders of classes, not in one of them",
        "elsewhere": "a link that leads nowhere",
        "reds/lost.png": "a link that leads nowhere",
        "reds/loop.png": "a link that leads nowhere",
        "reds/folder.png": "a folder, not an image",
        "reds/others": "a link to a folder, which is not followed",
        "empty": "a class without images",
    }
    assert isinstance(data.train, ImageSource)
    (test,) = data.tests.values()
    assert isinstance(test, ImageSource)
    read = {str(Path(file).relative_to(root)) for file in (*data.train.files, *test.files)}
    assert len(read) == 12 + 3
    assert {"reds/folder.png/inside.jpeg", "reds/more/deep.jpeg", "reds/kept.jpeg"} < read


def test_what_lies_beside_given_halves_is_named(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for half in ("train", "test", "val"):
        folder_by_class(root / half, 2)
    for place in (root, root / "train", root / "test"):
        (place / "stray.png").write_bytes(encoded(picture((1, 2, 3))))
    data = open_images([root])
    assert _left_out(root, data.skipped) == {
        "stray.png": "lies beside train and test, not in one of them",
        "val": "lies beside train and test, not in one of them",
        "train/stray.png": "lies beside the folders of classes, not in one of them",
        "test/stray.png": "lies beside the folders of classes, not in one of them",
    }
    assert len(data.train) == 4


def test_a_test_set_that_nobody_can_read_is_refused(tmp_path: Path) -> None:
    folder_by_class(tmp_path / "set" / "train", 3)
    folder_by_class(tmp_path / "set" / "test", 3)
    files = sorted((tmp_path / "set" / "test").rglob("*.*"))
    for file in files[:-1]:
        file.write_bytes(b"nothing")
    assert len(open_images([tmp_path / "set"]).tests["10x10"]) == 6  # one is enough
    files[-1].write_bytes(b"nothing")
    message = r"none of 6 images to test on can be read; the first says .*not an image"
    for size in (None, (8, 8)):
        with pytest.raises(ValueError, match=message):
            open_images([tmp_path / "set"], size=size)


def test_batches_depend_on_seed_and_step_only(tmp_path: Path) -> None:
    data = open_images([labelled_archive(tmp_path / "some.npz")])
    first = list(itertools.islice(Batches(data.train, 5, 3).stream(1), 6))
    resumed = next(Batches(data.train, 5, 3).stream(5))
    assert torch.equal(first[4].x, resumed.x)
    assert torch.equal(first[4].y, resumed.y)
    assert not torch.equal(first[4].x, next(Batches(data.train, 5, 4).stream(5)).x)
    stream = Batches(data.train, 5, 3, workers=2).stream(1)
    try:
        for batch in first:
            there = next(stream)
            assert torch.equal(batch.x, there.x)
    finally:
        stream.close()


def test_an_epoch_holds_every_example_once(tmp_path: Path) -> None:
    data = open_images([labelled_archive(tmp_path / "some.npz", 30)])
    steps = Batches(data.train, len(data.train), 0)._steps
    first, second = (steps[step].indices for step in (1, 2))
    assert sorted(first) == sorted(second) == list(range(len(data.train)))
    assert first != second


def test_only_training_examples_are_augmented(tmp_path: Path) -> None:
    data = open_images([labelled_archive(tmp_path / "some.npz")], size=(16, 16))
    plain = data.train.get(0).x
    assert np.array_equal(plain, data.train.get(0).x)
    moved = [data.train.get(0, np.random.default_rng(k)).x for k in range(4)]
    assert any(not np.array_equal(plain, x) for x in moved)
    assert all(x.shape == plain.shape for x in moved)


def test_masks_move_with_their_images(tmp_path: Path) -> None:
    data = open_images([mask_archive(tmp_path / "set.npz")])
    assert data.task == "segment"
    assert data.train.grid == (12, 16)
    assert data.ignore == 2
    for k in range(8):
        example = data.train.get(0, np.random.default_rng(k))
        assert isinstance(example.y, np.ndarray)
        red = example.x[0] > example.x[2]
        known = example.y != 2
        assert (red[known] == (example.y[known] == 0)).mean() > 0.9
        assert known.any()
    whole = data.train.get(0)
    assert isinstance(whole.y, np.ndarray)
    assert (whole.y[:2] == 2).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "beside the images 'labels' or 'mask_png' is needed"),
        ({"labels": np.zeros(3, dtype=int)}, "3 labels from 0 for 12 images"),
        ({"labels": np.full(12, 7)}, "label 7 among 2 classes"),
        ({"offsets": np.array([0, 5, 3])}, "must rise"),
        ({"labels": np.array([None] * 12)}, "Object arrays cannot be loaded"),
    ],
)
def test_bad_archives_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = labelled_archive(tmp_path / "set.npz")
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        open_images([path])


def test_bad_paths_are_named(tmp_path: Path) -> None:
    path = labelled_archive(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="has 'train' in its name"):
        open_images([path, labelled_archive(tmp_path / "a.npz")])
    (tmp_path / "damaged.npz").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"damaged\.npz"):
        kind_of([tmp_path / "damaged.npz"])
    with pytest.raises(FileNotFoundError):
        kind_of([tmp_path / "none.npz"])
    with pytest.raises(ValueError, match="does not"):
        kind_of([path, tmp_path / "text.txt"])
    (tmp_path / "one" / "only").mkdir(parents=True)
    with pytest.raises(ValueError, match="one folder per class"):
        open_images([tmp_path / "one"])
    assert kind_of([tmp_path / "one"]) == "text"


def test_masks_with_unknown_labels_are_bad_examples(tmp_path: Path) -> None:
    path = mask_archive(tmp_path / "set.npz")
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    files = [encoded(Image.fromarray(np.full((12, 16), 7, dtype=np.uint8)))] * 6
    arrays["mask_png"], arrays["mask_offsets"] = packed(files)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="none of the images can be read"):
        open_images([path])


def test_real_images() -> None:
    train, test = real("images/cifar10_train_jpeg.npz"), real("images/cifar10_test_jpeg.npz")
    data = open_images([train, test])
    assert (len(data.train), len(data.tests["32x32"])) == (50_000, 10_000)
    assert data.yardsticks == {"most frequent class": 0.1}
    batch = next(Batches(data.train, 8).stream(1))
    assert batch.x.shape == (8, 3, 32, 32)
    assert data.classes[0] == "airplane"


def test_real_masks() -> None:
    data = open_images([real("images/camvid_train.npz"), real("images/camvid_val.npz")], size=(90, 120))
    assert (len(data.train), len(data.tests["90x120"])) == (367, 101)
    batch = next(Batches(data.train, 2).stream(1))
    assert batch.y.shape == (2, 90, 120)
    assert batch.y.max() <= 11
