"""Small images and archives, made on the fly, and the real data beside the repository where they are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def real(name: str) -> Path:
    """A file of real data; skips the test where it is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name} beside the repository")
    return path


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (12, 10), seed: int = 0) -> Image.Image:
    """An image of about one colour, with noise."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def folder_by_class(root: Path, count: int = 6) -> Path:
    """Two classes of images that differ in colour, PNG and JPEG by turns."""
    for name, colour in (("reds", (200, 40, 40)), ("blues", (40, 40, 200))):
        (root / name).mkdir(parents=True)
        for k in range(count):
            kind = "PNG" if k % 2 else "JPEG"
            (root / name / f"{k}.{kind.lower()}").write_bytes(encoded(picture(colour, (12 + k, 10), k), kind))
    return root


def packed(files: list[bytes]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Files one after the other, and where each begins."""
    offsets = np.cumsum([0, *map(len, files)])
    return np.frombuffer(b"".join(files), dtype=np.uint8), offsets


def labelled_archive(path: Path, count: int = 12) -> Path:
    """An archive in the form of CIFAR-10."""
    colours = ((220, 30, 30), (30, 220, 30))
    data, offsets = packed([encoded(picture(colours[k % 2], (8, 8), k), "JPEG") for k in range(count)])
    labels = np.arange(count) % 2
    np.savez(path, jpeg=data, offsets=offsets, labels=labels, classes=np.array(["red", "green"]))
    return path


def mask_archive(path: Path, count: int = 6, classes: tuple[str, ...] = ("left", "right")) -> Path:
    """An archive in the form of CamVid: the left half of every image is another class than the right one."""
    images, masks = [], []
    for k in range(count):
        cut = 4 + k
        pixels = np.zeros((12, 16, 3), dtype=np.uint8)
        labels = np.full((12, 16), len(classes), dtype=np.uint8)
        pixels[:, :cut], pixels[:, cut:] = (250, 20, 20), (20, 20, 250)
        labels[2:, :cut], labels[2:, cut:] = 0, 1
        images.append(encoded(Image.fromarray(pixels), "JPEG", quality=95))
        masks.append(encoded(Image.fromarray(labels)))
    data, offsets = packed(images)
    mask_data, mask_offsets = packed(masks)
    np.savez(path, jpeg=data, offsets=offsets, mask_png=mask_data, mask_offsets=mask_offsets, classes=np.array(classes))
    return path
