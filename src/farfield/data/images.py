"""Images by class, and images with a label per pixel: folders, and ``.npz`` files of encoded images.

Images are decoded when they are needed, in whatever process needs them. One that cannot be decoded is a
:class:`farfield.data.examples.BadExample`, which names it; whoever reads goes on without it. Needs the extra ``vision``
(Pillow).

An ``.npz`` file of images has ``jpeg`` (uint8, the files one after the other) and ``offsets`` (int64, one more than
there are images), and either ``labels`` (integers, with ``classes`` for their names) or ``mask_png`` and
``mask_offsets`` (label images; optional ``classes``, and ``names`` of the images).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farfield.data.arrays import read_arrays
from farfield.data.examples import BadExample, Example, Source, VisionData, size_in_words

__all__ = ["SUFFIXES", "ImageSource", "decode", "is_image_archive", "is_image_folder", "open_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Names of files that are taken for images."""

_HELD_OUT = ("test", "val", "valid", "validation")
_MOST_PIXELS = 100_000_000
_SAMPLE = 256
"""Training images from which mean and standard deviation are taken, evenly spread."""
_LARGEST_DEFAULT = 224
CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
"""The 11 classes of CamVid in SegNet's order; label 11 is void."""

Pixels = npt.NDArray[np.uint8]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "images need the extra `vision`: pip install 'farfield[vision]'", name="PIL"
        ) from error
    return Image


def decode(data: bytes, name: str) -> Any:
    """An image file as a Pillow image of mode RGB, turned upright.

    Grey, palette and CMYK images are converted, 16 bits per channel become 8, what is transparent becomes white, and of
    several frames the first is taken.

    Args:
        data: the file.
        name: of the file, for errors.

    Raises:
        BadExample: when it is no image, is damaged or cut off, or has more than 100 million pixels.
    """
    image_module = _pillow()
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, which do not matter here, and of bombs, which the limit below is for.
            warnings.simplefilter("ignore")
            with image_module.open(io.BytesIO(data)) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise BadExample(name, f"{image.width} x {image.height} pixels are too many")
                image.load()
                return _as_rgb(ImageOps.exif_transpose(image), name)
    except BadExample:
        raise
    except Exception as error:  # decoders raise whatever their parsers meet: OSError, SyntaxError, struct.error, ...
        reason = "not an image" if isinstance(error, image_module.UnidentifiedImageError) else str(error)
        raise BadExample(name, reason.splitlines()[0] if reason else type(error).__name__) from error


def _as_rgb(image: Any, name: str) -> Any:
    image_module = _pillow()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        wide = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) // 257
        return image_module.fromarray(wide.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadExample(name, "floating-point pixels have no agreed range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = image_module.new("RGBA", layer.size, (255, 255, 255, 255))
        return image_module.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class _Packed:
    """Encoded files one after the other in one array."""

    data: Pixels
    offsets: npt.NDArray[np.int64]
    label: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


@dataclass(frozen=True)
class ImageSource:
    """Images with labels, read and scaled to one size on demand.

    Attributes:
        files: paths, or places in ``packed``.
        labels: one class per file; empty when there are masks.
        grid: height and width that every image is brought to.
        packed: the encoded images, where they lie in one array.
        masks: the encoded label images.
        ignore: the label of pixels that count for nothing.
        classes: how many there are; larger labels of a mask are an error of that image, unless they are ``ignore``.

    A training example (``rng`` given) is a random part of the image, moved and flipped; a test example of a class is
    the largest centred part of the right shape, one with labels per pixel the whole image.
    """

    files: tuple[Path, ...] | tuple[int, ...]
    labels: tuple[int, ...]
    grid: tuple[int, ...]
    packed: _Packed | None = None
    masks: _Packed | None = None
    names: tuple[str, ...] = ()
    ignore: int = -1
    classes: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The path, or file and number."""
        file = self.files[index]
        if self.packed is None:
            return str(file)
        assert isinstance(file, int)
        known = f" ({self.names[file]})" if self.names else ""
        return f"{self.packed.label}, image {file}{known}"

    def image(self, index: int) -> Any:
        """The whole image, decoded.

        Raises:
            BadExample: when it cannot be.
        """
        file = self.files[index]
        if self.packed is not None:
            assert isinstance(file, int)
            return decode(self.packed.read(file), self.name(index))
        assert isinstance(file, Path)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise BadExample(str(file), error.strerror or str(error)) from error
        return decode(data, str(file))

    def get(self, index: int, rng: np.random.Generator | None = None) -> Example:
        """See :class:`farfield.data.examples.Source`."""
        image = self.image(index)
        height, width = self.grid
        mask = None if self.masks is None else self._mask(index, image.size)
        box = _part(image.size, (width, height), rng, whole=mask is not None and rng is None)
        resampling = _pillow().Resampling
        x = np.asarray(image.resize((width, height), resampling.BILINEAR, box=box, reducing_gap=2.0))
        y = None if mask is None else np.asarray(mask.resize((width, height), resampling.NEAREST, box=box))
        if rng is not None:
            x, y = _moved(x, y, rng, self.ignore)
        pixels = np.ascontiguousarray(x.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)
        if y is None:
            return Example(pixels, self.labels[index])
        return Example(pixels, np.ascontiguousarray(y, dtype=np.int64))

    def _mask(self, index: int, size: tuple[int, int]) -> Any:
        assert self.masks is not None
        file, name = self.files[index], f"the labels of {self.name(index)}"
        assert isinstance(file, int)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mask = _pillow().open(io.BytesIO(self.masks.read(file)))
                mask.load()
        except Exception as error:  # as in `decode`
            raise BadExample(name, str(error) or type(error).__name__) from error
        if mask.mode not in ("L", "P") or mask.size != size:
            raise BadExample(name, f"mode {mask.mode} and size {mask.size}; needed are 8 bits and {size}")
        found = np.unique(np.asarray(mask))
        wrong = [int(v) for v in found if v >= self.classes and v != self.ignore]
        if wrong:
            raise BadExample(name, f"labels {wrong[:4]} among {self.classes} classes (and {self.ignore} for none)")
        return mask if mask.mode == "L" else _pillow().fromarray(np.asarray(mask))


def _part(
    size: tuple[int, int], wanted: tuple[int, int], rng: np.random.Generator | None, whole: bool
) -> tuple[float, float, float, float]:
    """The part (left, upper, right, lower) of an image that is scaled to the wanted size (width, height)."""
    width, height = size
    if whole:
        return (0.0, 0.0, float(width), float(height))
    scale = min(width / wanted[0], height / wanted[1])
    if rng is not None and scale > 1:  # only where pixels are to spare
        scale = max(1.0, scale * float(rng.uniform(0.75, 1.0)))
    inner = (min(wanted[0] * scale, width), min(wanted[1] * scale, height))
    spare = (width - inner[0], height - inner[1])
    share = (0.5, 0.5) if rng is None else tuple(rng.uniform(0.0, 1.0, 2))
    left, upper = spare[0] * share[0], spare[1] * share[1]
    return (float(left), float(upper), float(left + inner[0]), float(upper + inner[1]))


def _moved(x: Pixels, y: Pixels | None, rng: np.random.Generator, ignore: int) -> tuple[Pixels, Pixels | None]:
    """Moved by up to an eighth, reflected at the borders, where there are no labels; and flipped half of the time."""
    height, width = x.shape[:2]
    reach = (height // 8, width // 8)
    down, right = (int(rng.integers(0, 2 * r, endpoint=True)) for r in reach)
    window = (slice(down, down + height), slice(right, right + width))
    around = ((reach[0], reach[0]), (reach[1], reach[1]))
    x = np.pad(x, (*around, (0, 0)), mode="reflect")[window]
    if y is not None:
        y = np.pad(y, around, constant_values=ignore % 256)[window]
    if rng.random() < 0.5:
        x, y = x[:, ::-1], None if y is None else y[:, ::-1]
    return x, y


def is_image_folder(path: Path) -> bool:
    """Whether a folder holds images, and more of them than other files, among its first 2,000 files."""
    images = others = 0
    for _, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            image = name.lower().endswith(SUFFIXES)
            images, others = images + image, others + (not image)
        if images + others > 2000:
            break
    return images > others


def is_image_archive(names: Sequence[str]) -> bool:
    """Whether arrays of these names are encoded images."""
    return "jpeg" in names and "offsets" in names


def open_images(
    paths: Sequence[Path],
    *,
    size: tuple[int, int] | None = None,
    test_sizes: Sequence[tuple[int, int]] = (),
    held_out: float = 0.1,
    seed: int = 0,
) -> VisionData:
    """A data set of images.

    Args:
        paths: one folder with a folder per class (or with ``train`` and ``test`` or ``val`` folders of such), or one or
            two ``.npz`` files (see the module), of which one has "train" and the other "test" or "val" in its name.
        size: height and width of training; None takes those of the first image, at most 224 on the shorter side.
        test_sizes: further sizes to test at.
        held_out: part of the images, of every class alike, that is held out where no test images are given.
        seed: of that choice.

    Raises:
        FileNotFoundError: if a path names nothing.
        ValueError: when there are no images, classes or labels as described, or none to train on or none to test on
            can be read; the message says what was found.
        ModuleNotFoundError: without Pillow.
    """
    _pillow()
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, both excluded, got {held_out}")
    if len(paths) == 1 and paths[0].is_dir():
        found = _folder(paths[0], held_out, seed)
    else:
        found = _archives(paths, held_out, seed)
    grid = _default_size(found.train) if size is None else size
    train = replace(found.train, grid=grid)
    tests: dict[str, Source] = {
        size_in_words(g): replace(found.test, grid=g) for g in dict.fromkeys((grid, *test_sizes))
    }
    mean, std = _statistics(train)
    _some_readable(next(iter(tests.values())))
    yardsticks = {} if train.masks is not None else _guess(train, found.test)
    return VisionData(
        task="classify" if train.masks is None else "segment",
        train=train,
        tests=tests,
        channels=3,
        outputs=len(found.classes),
        classes=found.classes,
        ignore=train.ignore,
        mean=mean,
        std=std,
        yardsticks=yardsticks,
        source=", ".join(str(path) for path in paths),
        fingerprint=found.fingerprint,
        skipped=found.skipped,
    )


@dataclass(frozen=True)
class _Found:
    train: ImageSource
    test: ImageSource
    classes: tuple[str, ...]
    fingerprint: str
    skipped: tuple[str, ...] = ()


def _folder(root: Path, held_out: float, seed: int) -> _Found:
    children = _folders(root)
    names = [child.name for child in children]
    held = next((name for name in _HELD_OUT if name in names), None)
    skipped: list[str] = []
    if "train" in names and held is not None:
        classes = tuple(child.name for child in _folders(root / "train"))
        _beside(root, ("train", held), f"train and {held}", skipped)
        for half in ("train", held):
            _beside(root / half, [child.name for child in _folders(root / half)], "the folders of classes", skipped)
        train = _by_class(root / "train", classes, skipped)
        unknown = [child.name for child in _folders(root / held) if child.name not in classes]
        if unknown:
            raise ValueError(f"{root / held} has classes that {root / 'train'} has not: {', '.join(unknown[:5])}")
        test = _by_class(root / held, classes, skipped)
    else:
        classes = tuple(names)
        if len(classes) < 2:
            raise ValueError(
                f"{root} holds {len(classes)} folder{'s' * (len(classes) != 1)}; images by class need one folder per "
                "class, at least two, or such folders in train/ and test/ (or val/)"
            )
        _beside(root, classes, "the folders of classes", skipped)
        train, test = _hold_out(_by_class(root, classes, skipped), held_out, seed)
    if not train or not test:
        reasons = "; ".join(skipped[:3]) or "its folders are empty"
        raise ValueError(f"found no images to train on and test in {root} ({reasons})")
    digest = hashlib.sha256()
    for path, label in (*train, *test):
        digest.update(f"{path.relative_to(root)}\0{label}\0{path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
    sources = [
        ImageSource(tuple(p for p, _ in part), tuple(label for _, label in part), (0, 0), classes=len(classes))
        for part in (train, test)
    ]
    return _Found(sources[0], sources[1], classes, digest.hexdigest(), tuple(skipped))


def _folders(root: Path) -> list[Path]:
    return sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))


def _by_class(root: Path, classes: Sequence[str], skipped: list[str]) -> list[tuple[Path, int]]:
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        here = root / name
        before = len(found)
        for path in sorted(here.rglob("*")) if here.is_dir() else ():
            if any(part.startswith(".") for part in path.relative_to(here).parts):
                continue
            reason = _why_no_image(path)
            if reason is None:
                found.append((path, label))
            elif not path.is_dir() or path.is_symlink() or _is_named_image(path):
                skipped.append(f"{path}: {reason}")
        if here.is_dir() and len(found) == before:
            skipped.append(f"{here}: a class without images")
    return found


def _is_named_image(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _why_no_image(path: Path) -> str | None:
    """None for a file with the name of an image."""
    if path.is_dir():
        return "a link to a folder, which is not followed" if path.is_symlink() else "a folder, not an image"
    if not path.exists():
        return "a link that leads nowhere"
    if not path.is_file():
        return "not a file"
    return None if _is_named_image(path) else "not the name of an image"


def _beside(root: Path, read: Sequence[str], what: str, skipped: list[str]) -> None:
    """Names the images, links without an end and folders that lie beside what is read."""
    for path in sorted(root.iterdir()):
        if path.name in read or path.name.startswith("."):
            continue
        if not path.exists():
            skipped.append(f"{path}: a link that leads nowhere")
        elif path.is_dir() or _is_named_image(path):
            skipped.append(f"{path}: lies beside {what}, not in one of them")


def _hold_out(
    found: list[tuple[Path, int]], share: float, seed: int
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """The files of every class by a hash of (seed, name), the first part of each held out; one at least."""
    test: set[Path] = set()
    for label in {label for _, label in found}:
        members = [path for path, other in found if other == label]
        members.sort(key=lambda p: hashlib.sha256(f"{seed}\0{p.name}".encode("utf-8", "surrogateescape")).digest())
        if len(members) > 1:
            test.update(members[: max(1, round(share * len(members)))])
    return [f for f in found if f[0] not in test], [f for f in found if f[0] in test]


def _archives(paths: Sequence[Path], held_out: float, seed: int) -> _Found:
    roles: dict[str, Path] = {}
    for path in paths:
        role = "train" if len(paths) == 1 or "train" in path.name else "test"
        if role in roles or len(paths) > 2:
            raise ValueError(
                f"give one .npz file of images, or two of which one has 'train' in its name, got "
                f"{', '.join(str(p) for p in paths)}"
            )
        roles[role] = path
    if "train" not in roles:
        raise ValueError(f"none of {', '.join(str(p) for p in paths)} has 'train' in its name")
    digest = hashlib.sha256()
    opened: dict[str, tuple[ImageSource, tuple[str, ...]]] = {}
    for role, path in roles.items():
        arrays = read_arrays(path)
        opened[role] = _archive(path, arrays)
        for name in sorted(arrays):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data if arrays[name].size else b"")
    train, classes = opened["train"]
    if "test" in opened:
        test = opened["test"][0]
        if opened["test"][1] != classes:
            raise ValueError(f"{roles['test']} has other classes than {roles['train']}")
        return _Found(train, test, classes, digest.hexdigest())
    order = np.random.default_rng((seed, len(train))).permutation(len(train))
    cut = max(1, round(held_out * len(train)))
    if len(train) < 2:
        raise ValueError(f"{roles['train']} holds {len(train)} image; at least two are needed")
    halves = [_chosen(train, sorted(int(i) for i in part)) for part in (order[cut:], order[:cut])]
    return _Found(halves[0], halves[1], classes, digest.hexdigest())


def _chosen(source: ImageSource, places: list[int]) -> ImageSource:
    files: Any = tuple(source.files[i] for i in places)
    return replace(source, files=files, labels=tuple(source.labels[i] for i in places) if source.labels else ())


def _archive(path: Path, arrays: dict[str, Any]) -> tuple[ImageSource, tuple[str, ...]]:
    if not is_image_archive(list(arrays)):
        raise ValueError(f"{path} holds {', '.join(arrays)}; images need 'jpeg' and 'offsets'")
    packed = _packed(path, arrays, "jpeg", "offsets")
    count = len(packed)
    names = tuple(str(n) for n in arrays["names"]) if "names" in arrays else ()
    if names and len(names) != count:
        raise ValueError(f"{path}: {len(names)} names for {count} images")
    given = tuple(str(c) for c in arrays["classes"]) if "classes" in arrays else ()
    if "mask_png" in arrays and "mask_offsets" in arrays:
        masks = _packed(path, arrays, "mask_png", "mask_offsets")
        if len(masks) != count:
            raise ValueError(f"{path}: {len(masks)} label images for {count} images")
        classes = given or CAMVID
        source = ImageSource(
            tuple(range(count)), (), (0, 0), packed, masks, names, ignore=len(classes), classes=len(classes)
        )
        return source, classes
    if "labels" not in arrays:
        raise ValueError(f"{path} holds {', '.join(arrays)}; beside the images 'labels' or 'mask_png' is needed")
    labels = tuple(int(v) for v in arrays["labels"])
    if len(labels) != count or (labels and min(labels) < 0):
        raise ValueError(f"{path}: {len(labels)} labels from {min(labels, default=0)} for {count} images")
    classes = given or tuple(str(k) for k in range(max(labels, default=0) + 1))
    if max(labels, default=0) >= len(classes):
        raise ValueError(f"{path}: label {max(labels)} among {len(classes)} classes")
    return ImageSource(tuple(range(count)), labels, (0, 0), packed, names=names, classes=len(classes)), classes


def _packed(path: Path, arrays: dict[str, Any], data: str, offsets: str) -> _Packed:
    bounds = np.asarray(arrays[offsets])
    whole = bounds.ndim == 1 and len(bounds) > 1 and np.issubdtype(bounds.dtype, np.integer)
    if not whole or bounds[0] < 0 or bounds[-1] > len(arrays[data]) or bool((np.diff(bounds) < 0).any()):
        raise ValueError(f"{path}: {offsets!r} must rise from 0 to the length of {data!r}, {len(arrays[data]):,}")
    return _Packed(np.asarray(arrays[data], dtype=np.uint8), bounds.astype(np.int64), path.name)


def _default_size(source: ImageSource) -> tuple[int, int]:
    """The size of the first image that can be read, scaled down to 224 on the shorter side."""
    errors = []
    for index in range(len(source)):
        try:
            width, height = source.image(index).size
        except BadExample as error:
            errors.append(str(error))
            continue
        scale = min(1.0, _LARGEST_DEFAULT / min(width, height))
        if source.masks is None:  # of classes the centre is taken: a square wastes nothing
            side = round(min(width, height) * scale)
            return (side, side)
        return (round(height * scale), round(width * scale))
    raise ValueError(f"none of {len(source)} images can be read; the first says {errors[0] if errors else 'nothing'}")


def _some_readable(source: Source) -> None:
    """Raises ValueError when no example can be read: better known before training than after it."""
    errors = []
    for index in range(len(source)):
        try:
            source.get(index)
        except BadExample as error:
            errors.append(str(error))
        else:
            return
    raise ValueError(
        f"none of {len(source)} images to test on can be read; the first says {errors[0] if errors else 'nothing'}"
    )


def _statistics(source: ImageSource) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over a sample."""
    total = np.zeros((2, 3))
    count = 0
    for index in range(0, len(source), max(1, len(source) // _SAMPLE)):
        try:
            x = source.get(index).x.astype(np.float64)
        except BadExample:
            continue  # told by name when it is its turn to be trained on
        total += np.stack((x.mean((1, 2)), (x**2).mean((1, 2))))
        count += 1
    if count == 0:
        raise ValueError("none of the images can be read")
    mean, square = total / count
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))
    return tuple(float(v) for v in mean), tuple(float(v) for v in std)


def _guess(train: ImageSource, test: ImageSource) -> dict[str, float]:
    """Accuracy of always naming the class that is most frequent in training."""
    counts = np.bincount(np.asarray(train.labels), minlength=train.classes)
    share = float(np.mean(np.asarray(test.labels) == int(counts.argmax())))
    return {"most frequent class": share if math.isfinite(share) else 0.0}
