"""Arrays from files: ``.npz``, ``.npz.xz`` and NetCDF (classic). Nothing is unpickled."""

from __future__ import annotations

import io
import lzma
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ARRAY_SUFFIXES", "array_names", "read_arrays"]

ARRAY_SUFFIXES = (".npz", ".npz.xz", ".nc")
"""Names of files that hold arrays."""


def array_names(path: Path) -> list[str]:
    """The names of the arrays in a file, without reading them where the format allows it.

    Raises:
        ValueError: as :func:`read_arrays`.
    """
    if path.name.lower().endswith(".npz"):
        with path.open("rb") as stream, _opened(path, stream) as archive:
            return list(archive.files)
    return list(read_arrays(path))


def read_arrays(path: Path) -> dict[str, Any]:
    """All arrays of a file by name, in memory.

    Of a NetCDF file these are the variables that are no coordinates, scaled as it says, with NaN where values are
    missing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another format, or holds Python objects.
        ModuleNotFoundError: for NetCDF without scipy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    name = path.name.lower()
    if name.endswith(".nc"):
        return _netcdf(path)
    if not name.endswith((".npz", ".npz.xz")):
        raise ValueError(f"{path} is not one of {', '.join(ARRAY_SUFFIXES)}")
    with path.open("rb") as file:
        stream: Any = file
        if name.endswith(".xz"):
            try:
                stream = io.BytesIO(lzma.decompress(file.read()))
            except (lzma.LZMAError, EOFError) as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        return _all(path, stream)


def _all(path: Path, stream: Any) -> dict[str, Any]:
    with _opened(path, stream) as archive:
        arrays = {}
        for key in archive.files:
            try:
                arrays[key] = archive[key]
            except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(f"{path}: cannot read the array {key!r}: {error}") from error
            except Exception as error:  # zlib.error is none of the above
                raise ValueError(f"{path} is damaged at the array {key!r}: {error}") from error
        return arrays


def _opened(path: Path, stream: Any) -> Any:
    try:
        archive = np.load(stream, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or no .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is a single array, not an .npz file of named ones")
    return archive


def _netcdf(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"\x89HDF":
        raise ValueError(f"{path} is NetCDF-4 (HDF5); make it classic first: nccopy -k classic {path.name} new.nc")
    if not start.startswith(b"CDF"):
        raise ValueError(f"{path} is no NetCDF file")
    try:
        from scipy.io import netcdf_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "NetCDF files need the extra `vision` (scipy): pip install 'farfield[vision]'", name="scipy"
        ) from error
    arrays = {}
    try:
        with netcdf_file(str(path), "r", mmap=False, maskandscale=True) as file:
            for name, variable in file.variables.items():
                if name in file.dimensions or variable.typecode() in ("c", "S"):
                    continue
                values = variable[:]
                floats = np.ma.asarray(values, dtype=np.float32)
                arrays[name] = np.array(floats.filled(np.nan))
    except (ValueError, OSError, TypeError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return arrays
