"""Builds engine.cpp and its parts into a shared library on first use, keeps it in the user's cache, and loads it.

The library has a C interface and needs nothing of torch's headers, so that it builds in seconds and outlives upgrades.
Its name holds a hash of everything that decides its contents (sources, compiler, flags, and the processor, since it is
compiled for the machine at hand and homes are shared between machines) and a hash of its own bytes: a damaged one is
built again. It is written under a temporary name and renamed, so that processes which build at once do not disturb
each other. Nothing is loaded from a folder that others can write.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Built", "check", "library", "report", "why_not"]

log = logging.getLogger("farfield")

SOURCE = Path(__file__).with_name("engine.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
SECONDS = 120
"""A compiler that takes longer is given up."""


@dataclass(frozen=True)
class Built:
    """The outcome of looking for the library: it, or the reason why there is none.

    Attributes:
        library: the loaded library, or None.
        reason: in one sentence why there is none, or None.
        path: the file, or None.
    """

    library: ctypes.CDLL | None
    reason: str | None
    path: Path | None


def compiler() -> str | None:
    """The command of the C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path, or None.

    Raises:
        OSError: for a $CXX that is no command line.
    """
    asked = os.environ.get("CXX")
    if asked:
        try:
            words = shlex.split(asked)
        except ValueError as error:
            raise OSError(f"CXX={asked!r} is no command line: {error}") from None
        return asked if words and shutil.which(words[0]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def cache_folder() -> Path | None:
    """Where libraries are kept: $XDG_CACHE_HOME/farfield, or ~/.cache/farfield; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "farfield"
    except RuntimeError:
        return None


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = ("flags", "features", "Features", "CPU part", "model name", "isa")
    return (
        platform.machine() + platform.processor() + "".join(sorted({line for line in lines if line.startswith(known)}))
    )


def _key(command: list[str]) -> str:
    """A hash of everything that decides what is built."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = (*sources, version, *command, *FLAGS, _processor())
    return _hash("|".join(parts).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _own(path: Path) -> bool:
    """Whether ``path`` is this user's and nobody else can write it."""
    found = path.stat()
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


def _trusted(folder: Path) -> bool:
    """Whether it is a folder in which no other user can put files."""
    try:
        return folder.is_dir() and _own(folder)
    except OSError:
        return False


def _usable(folder: Path | None) -> bool:
    """Whether files can be kept in ``folder``, which is made when missing, and no other user can put files there."""
    if folder is None:
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return _trusted(folder)
    except OSError:
        return False


def _kept(folder: Path, key: str) -> Path | None:
    """The library that was built before, undamaged, or None."""
    for path in folder.glob(f"engine-{key}-*.so"):
        if _own(path) and path.stem.endswith(_hash(path.read_bytes())):
            return path
        with suppress(OSError):
            path.unlink()
    return None


def build(folder: Path | None) -> Path:
    """The library in ``folder``, compiled unless it is there; OSError with the reason where that fails."""
    command = compiler()
    if command is None:
        asked = os.environ.get("CXX")
        raise OSError(
            f"there is no C++ compiler (CXX={asked!r} was not found)"
            if asked
            else "there is no C++ compiler on the path (looked for c++, g++ and clang++)"
        )
    words = shlex.split(command)
    key = _key(words)
    # A folder that was filled before and can only be read by now still serves.
    kept = _kept(folder, key) if folder is not None and _trusted(folder) else None
    if kept is not None:
        return kept
    if not _usable(folder):
        other = Path(tempfile.mkdtemp(prefix="farfield-"))
        atexit.register(shutil.rmtree, other, ignore_errors=True)
        log.warning(
            "farfield: nothing can be kept in %s (not writable, or not by this user alone); the compiled engine is "
            "built in %s for this process",
            folder, other,
        )  # fmt: skip
        folder = other
    assert folder is not None
    return _compile(words, folder, key)


def _compile(words: list[str], folder: Path, key: str) -> Path:
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    temporary, start = Path(name), time.perf_counter()
    try:
        done = subprocess.run([*words, *FLAGS, str(SOURCE), "-o", name], capture_output=True, timeout=SECONDS)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
            raise OSError(f"{shlex.join(words)} failed with exit status {done.returncode}: {first}")
        temporary.chmod(0o700)
        path = folder / f"engine-{key}-{_hash(temporary.read_bytes())}.so"
        os.replace(temporary, path)
    except subprocess.TimeoutExpired:
        raise OSError(f"{shlex.join(words)} took longer than {SECONDS} s") from None
    finally:
        temporary.unlink(missing_ok=True)
    log.info("farfield: the compiled engine was built in %.0f s (%s)", time.perf_counter() - start, path)
    return path


def _load(path: Path) -> ctypes.CDLL:
    """The library with its signatures; OSError where it is not what this code expects."""
    from farfield.ops.compiled.choice import Descent, Rung
    from farfield.ops.compiled.expansion import Advance, Expansion, ExpansionStep
    from farfield.ops.compiled.heads import Step
    from farfield.ops.compiled.pyramid import Reduction
    from farfield.ops.compiled.tiles import Call, Store

    found = ctypes.CDLL(str(path))
    address, number = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "farfield_attend": [ctypes.POINTER(Call)],
        "farfield_attend_backward": [ctypes.POINTER(Call)],
        "farfield_reduce": [ctypes.POINTER(Reduction), number],
        "farfield_reduce_down": [ctypes.POINTER(Reduction)],
        "farfield_delta": [address, address, address, address, number, number, number, number],
        "farfield_top": [address, number, number, number, address, number],
        "farfield_score": [address, address, address, address, address, *[number] * 9],
        "farfield_descend": [ctypes.POINTER(Descent)],
        "farfield_step": [ctypes.POINTER(Step)],
        "farfield_expand": [ctypes.POINTER(Expansion)],
        "farfield_expand_backward": [ctypes.POINTER(Expansion)],
        "farfield_advance": [ctypes.POINTER(Advance)],
        "farfield_step_expansions": [ctypes.POINTER(ExpansionStep), ctypes.c_int64, ctypes.c_int64],
        "farfield_size": [number],
    }
    try:
        for name, arguments in signatures.items():
            getattr(found, name).argtypes = arguments
    except AttributeError as error:
        raise OSError(f"{path} is not this engine: {error}") from None
    found.farfield_size.restype = number
    for i, structure in enumerate((Store, Call, Reduction, Rung, Descent, Step, Expansion, Advance, ExpansionStep)):
        if found.farfield_size(i) != ctypes.sizeof(structure):
            raise OSError(f"{path} has another layout of {structure.__name__}")
    return found


@cache
def _report() -> Built:
    try:
        path = build(cache_folder())
        return Built(_load(path), None, path)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
        log.warning("farfield: the compiled engine cannot be built, the torch engine is used instead: %s", reason)
        return Built(None, reason, None)


_once = threading.Lock()


def report() -> Built:
    """The library, built or taken from the cache once per process; a failure is said once, in a line of the log."""
    with _once:
        return _report()


def why_not() -> str | None:
    """None where the library can be had, otherwise the reason in one sentence; builds it on first use."""
    return report().reason


def library() -> ctypes.CDLL:
    """The library; RuntimeError with the reason where it cannot be had."""
    built = report()
    if built.library is None:
        raise RuntimeError(f"the compiled engine is not available: {built.reason}")
    return built.library


def check(status: int) -> None:
    """Raises MemoryError unless a call of the library returned 0."""
    if status:
        raise MemoryError("the compiled engine ran out of memory; impl='torch' needs less beside its results")
