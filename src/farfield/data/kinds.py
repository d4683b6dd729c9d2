"""What a path on the command line holds: text, images or fields."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from farfield.data.arrays import ARRAY_SUFFIXES, array_names
from farfield.data.images import is_image_archive, is_image_folder

__all__ = ["KINDS", "kind_of"]

KINDS = ("text", "images", "fields")


def kind_of(paths: Sequence[str | os.PathLike[str]]) -> str:
    """One of :data:`KINDS`.

    Arrays (``.npz``, ``.npz.xz``, ``.nc``) are images where they hold encoded ones, otherwise fields. A single folder
    with more image files than others is images. Everything else, also what does not exist, is text.

    Raises:
        ValueError: for arrays beside other files, encoded images beside fields, or a damaged archive.
    """
    given = [Path(path) for path in paths]
    arrays = [path for path in given if path.name.lower().endswith(ARRAY_SUFFIXES)]
    if arrays:
        if len(arrays) < len(given):
            other = next(path for path in given if path not in arrays)
            raise ValueError(f"{arrays[0]} holds arrays and {other} does not; compare them one after the other")
        missing = [path for path in arrays if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"no such file: {missing[0]}")
        kinds = {"images" if is_image_archive(array_names(path)) else "fields" for path in arrays}
        if len(kinds) > 1:
            raise ValueError("some files hold images and others fields; compare them one after the other")
        return kinds.pop()
    if len(given) == 1 and given[0].is_dir() and is_image_folder(given[0]):
        return "images"
    return "text"
