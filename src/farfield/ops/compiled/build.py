"""Builds tiles.cpp into a shared library on first use, keeps it in the user's cache, and loads it.

The library has a C interface and needs nothing of torch's headers, so that it builds in seconds and outlives upgrades.
Its name holds a hash of everything that decides its contents: source, compiler, flags and the processor (it is compiled
for the machine at hand, and homes are shared between machines). It is written under a temporary name and renamed, so
that processes which build at once do not disturb each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Built", "library", "report", "why_not"]

log = logging.getLogger("farfield")

SOURCE = Path(__file__).with_name("tiles.cpp")
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
    """The command of the C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path."""
    asked = os.environ.get("CXX")
    if asked and shlex.split(asked):
        return asked if shutil.which(shlex.split(asked)[0]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def cache_folder() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/farfield, or ~/.cache/farfield."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "farfield"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = ("flags", "Features", "CPU part", "model name")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(known)}))


def _name(command: list[str]) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    parts = (SOURCE.read_text(), version, *command, *FLAGS, _processor())
    return f"tiles-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"


def _writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, which is made when missing, and it is this user's alone to write."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid") and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def build(folder: Path) -> Path:
    """The library in ``folder``, compiled unless it is there; OSError with the reason where that fails."""
    command = compiler()
    if command is None:
        raise OSError(
            f"there is no C++ compiler (CXX={os.environ['CXX']!r} was not found)"
            if os.environ.get("CXX")
            else "there is no C++ compiler on the path (looked for c++, g++ and clang++)"
        )
    words = shlex.split(command)
    path = folder / _name(words)
    if path.exists():
        return path
    if not _writable(folder):
        other = Path(tempfile.mkdtemp(prefix="farfield-"))
        log.warning(
            "farfield: %s cannot be written; the compiled engine is built in %s for this process", folder, other
        )
        path = other / path.name
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    start = time.perf_counter()
    try:
        done = subprocess.run([*words, *FLAGS, str(SOURCE), "-o", temporary], capture_output=True, timeout=SECONDS)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
            raise OSError(f"{command} failed with exit status {done.returncode}: {first}")
        os.replace(temporary, path)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command} took longer than {SECONDS} s") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    log.info("farfield: the compiled engine was built in %.0f s (%s)", time.perf_counter() - start, path)
    return path


@cache
def report() -> Built:
    """The library, built or taken from the cache once per process; a failure is said once, in a line of the log."""
    try:
        path = build(cache_folder())
        found = ctypes.CDLL(str(path))
        return Built(found, None, path)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
        log.warning("farfield: the compiled engine cannot be built, the torch engine is used instead: %s", reason)
        return Built(None, reason, None)


def why_not() -> str | None:
    """None where the library can be had, otherwise the reason in one sentence; builds it on first use."""
    return report().reason


def library() -> ctypes.CDLL:
    """The library; RuntimeError with the reason where it cannot be had."""
    built = report()
    if built.library is None:
        raise RuntimeError(f"the compiled engine is not available: {built.reason}")
    return built.library
