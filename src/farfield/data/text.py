"""Text as bytes: the user's files, or the running interpreter's standard library.

Nothing is decoded. A byte-level model reads any encoding, and bits per byte compare across encodings and tokenisers.

Of files with equal bytes one is kept. Files that differ in as little as one byte are all kept: near copies (versions of
a file, the same licence or template over and over) can fall on both sides of the split, and a model that remembers the
one then predicts the other. Take such copies out before, or read the bits as those of text like that.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import lzma
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["SEPARATOR", "Corpus", "Split", "TextFile", "collect", "read_bytes"]

SEPARATOR = b"\f"
"""What stands between two files: a form feed, which source code and prose hardly ever contain themselves."""

# Folders that hold no text of their own: caches, installed packages, test suites of the standard library.
_CACHES = frozenset({"__pycache__", "node_modules"})
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
_WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_SNIFFED = 8000


class TextFile(NamedTuple):
    """One file of a corpus: its name, relative to the folder that was asked for, and its bytes."""

    name: str
    data: bytes


class Split(NamedTuple):
    """Training and held-out bytes, each a one-dimensional read-only array of uint8."""

    train: npt.NDArray[np.uint8]
    valid: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Corpus:
    """Files read into memory, in a fixed order, without exact duplicates.

    Attributes:
        files: The files, at least one, none of them empty.
        source: In words, where they came from.
        skipped: One line for every file of a folder that was left out, with the reason.
    """

    files: tuple[TextFile, ...]
    source: str
    skipped: tuple[str, ...] = field(default=(), repr=False)

    @property
    def size(self) -> int:
        """Number of bytes in all files together."""
        return sum(len(file.data) for file in self.files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and contents: two corpora with one fingerprint split alike."""
        digest = hashlib.sha256()
        for name, data in self.files:
            digest.update(f"{len(name.encode('utf-8', 'surrogateescape'))}:{len(data)}:".encode())
            digest.update(name.encode("utf-8", "surrogateescape"))
            digest.update(data)
        return digest.hexdigest()

    def split(self, context: int, valid_fraction: float = 0.05, seed: int = 0) -> Split:
        """Cut the corpus into training and held-out bytes.

        Files are shuffled by a hash of ``(seed, name)``, so that neighbours in a folder, which resemble each other,
        fall on both sides by chance. Whole files are held out, from the front of that order, until they make up
        ``valid_fraction`` of all bytes; a file that would more than double this is passed over. Where no such choice
        leaves ``context + 1`` bytes on either side (few files, or one), the tail of the text is held out instead.

        Args:
            context: Tokens that the model sees at once; each side gets at least ``context + 1`` bytes.
            valid_fraction: Part of the bytes to hold out, between 0 and 1 (both excluded).
            seed: Seed of the shuffle.

        Returns:
            The two arrays. Files are joined by `SEPARATOR`.

        Raises:
            ValueError: If the text is too short for this context, or an argument is out of range.
        """
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        if not 0.0 < valid_fraction < 1.0:
            raise ValueError(f"valid_fraction must lie between 0 and 1, both excluded, got {valid_fraction}")
        window = context + 1
        order = sorted(self.files, key=lambda file: _shuffle_key(seed, file.name))
        joined = len(SEPARATOR.join(file.data for file in order))
        if joined < 2 * window:
            raise ValueError(
                f"the text has {joined:,} bytes, but context {context:,} needs at least {2 * window:,}: {window:,} to "
                f"train on and {window:,} held out. Give more text"
                + (f" or a context of at most {joined // 2 - 1:,}." if joined >= 4 else ".")
            )
        wanted = max(round(valid_fraction * joined), window)
        train, valid = _hold_out_files(order, wanted)
        if len(train) < window or len(valid) < window:
            text = SEPARATOR.join(file.data for file in order)
            cut = max(len(text) - wanted, window)
            train, valid = text[:cut], text[cut:]
        return Split(np.frombuffer(train, dtype=np.uint8), np.frombuffer(valid, dtype=np.uint8))


def collect(paths: Sequence[str | os.PathLike[str]] | None = None) -> Corpus:
    """Read files into a corpus.

    Args:
        paths: Files, folders and globs (``**`` crosses folders), in any mixture. A folder gives all its files, except
            hidden ones, caches, empty ones and ones that look binary (a NUL byte near the start and no mark of a wide
            encoding); a file that is named itself is always taken. Files ``.xz`` are unpacked. ``None`` or an empty
            sequence reads the sources (``*.py``) of the running interpreter's standard library, without its test
            suites.

    Returns:
        The corpus, ordered by path; of files with equal contents only the first is kept.

    Raises:
        FileNotFoundError: If a path names nothing.
        PermissionError: If a file cannot be read.
        ValueError: If a named file is empty, a packed one damaged, or nothing is left.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths is a sequence of paths, got the single path {os.fspath(paths)!r}; write [{paths!r}]")
    skipped: list[str] = []
    if not paths:
        root = Path(sysconfig.get_path("stdlib"))
        found = [(str(path.relative_to(root)), path, False) for path in _library_sources(root)]
        source = f"sources of Python {sysconfig.get_python_version()}'s standard library"
        if not found:
            raise ValueError(f"this Python has no sources of its standard library in {root}; give a PATH of your own")
    else:
        found = [entry for path in paths for entry in _expand(path)]
        source = ", ".join(os.fspath(path) for path in paths)
    files: list[TextFile] = []
    seen_paths: set[Path] = set()
    seen_contents: set[bytes] = set()
    for name, path, named in found:
        resolved = path.resolve()
        if resolved in seen_paths:
            continue
        seen_paths.add(resolved)
        try:
            data = read_bytes(path)
        except ValueError as error:
            if named:
                raise
            skipped.append(str(error))
            continue
        if not data:
            if named:
                raise ValueError(f"{path} is empty; give a file with text in it")
            skipped.append(f"{path}: empty")
            continue
        if not named and _looks_binary(data):
            skipped.append(f"{path}: looks binary")
            continue
        content = hashlib.sha256(data).digest()
        if content in seen_contents:
            # A held-out copy of a training file would be remembered, not predicted.
            skipped.append(f"{path}: the same as another file")
            continue
        seen_contents.add(content)
        files.append(TextFile(name, data))
    if not files:
        reasons = "; ".join(skipped[:3]) or "the folder holds no files"
        raise ValueError(f"found no text in {source} ({reasons}); give files, folders or globs that hold some")
    return Corpus(tuple(files), source, tuple(skipped))


def _expand(path: str | os.PathLike[str]) -> list[tuple[str, Path, bool]]:
    """Resolve one argument to (name, path, was it named itself), sorted by path."""
    text = os.fspath(path)
    given = Path(text)
    if given.is_file():
        return [(given.name, given, True)]
    if given.is_dir():
        return [(str(found.relative_to(given)), found, False) for found in _walk(given)]
    if given.exists():
        raise ValueError(f"{text} is neither a file nor a folder; give files, folders or globs")
    if not glob.has_magic(text):
        raise FileNotFoundError(f"no such file or folder: {text}")
    matches = sorted(glob.glob(text, recursive=True))
    entries: list[tuple[str, Path, bool]] = []
    for match in map(Path, matches):
        if match.is_file():
            entries.append((str(match), match, False))
        elif match.is_dir() and not text.endswith("**"):
            entries.extend((str(found), found, False) for found in _walk(match))
    if not entries:
        raise FileNotFoundError(f"the pattern {text!r} matches no file")
    return entries


def _walk(root: Path, leave_out: Iterable[str] = ()) -> Iterator[Path]:
    """All visible files below ``root`` in sorted order, links to folders not followed."""
    excluded = _CACHES.union(leave_out)

    def fail(error: OSError) -> None:
        raise PermissionError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(name for name in folders if name not in excluded and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _library_sources(root: Path) -> list[Path]:
    return [path for path in _walk(root, leave_out=_NOT_LIBRARY) if path.suffix == ".py"]


def read_bytes(path: Path) -> bytes:
    """What a file holds, and of one that ends in ``.xz`` what is packed there.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is packed and damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise type(error)(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix != ".xz":
        return data
    try:
        return lzma.decompress(data)
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is no whole .xz file: {error}") from error


def _looks_binary(data: bytes) -> bool:
    return b"\0" in data[:_SNIFFED] and not data.startswith(_WIDE_BOMS)


def _shuffle_key(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()


def _hold_out_files(order: Sequence[TextFile], wanted: int) -> tuple[bytes, bytes]:
    """Join the files that train and those held out; either may come out empty or too short."""
    held: list[bytes] = []
    kept: list[bytes] = []
    size = 0
    for _, data in order:
        if size < wanted and size + len(data) <= 2 * wanted:
            held.append(data)
            size += len(data)
        else:
            kept.append(data)
    return SEPARATOR.join(kept), SEPARATOR.join(held)
