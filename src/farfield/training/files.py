"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["SaveError", "write_atomically", "write_json"]


class SaveError(OSError):
    """A file could not be written; nothing stands under its final name that did not stand there before."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees the old contents or the new ones, never a part.

    The bytes go to a temporary file in the same folder, reach the disk, and take the final name in one step. Missing
    folders are made.

    Args:
        path: Final name.
        data: Contents.

    Raises:
        SaveError: If that fails (full disk, no permission, a file where a folder is needed). The temporary file is
            removed.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise _explain(error, path, len(data)) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Raises:
        SaveError: As `write_atomically`.
        ValueError: If the value holds NaN or infinity, which JSON cannot express.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode("utf-8", "surrogateescape"))


def _umask() -> int:
    mask = os.umask(0)  # the only portable way to read it is to set it
    os.umask(mask)
    return mask


def _explain(error: OSError, path: Path, needed: int) -> SaveError:
    reason = error.strerror or str(error)
    room = ""
    folder = next((parent for parent in path.parents if parent.is_dir()), None)
    if folder is not None:
        room = f"; it needs {needed:,} bytes, {shutil.disk_usage(folder).free:,} are free there"
    explained = SaveError(f"cannot save {path}: {reason}{room}. Make room or choose another folder")
    explained.errno = error.errno
    return explained
