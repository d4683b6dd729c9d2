"""Building on first use: several at once, no compiler, a broken one, a slow one, and nowhere to keep the library."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest

from farfield.ops.compiled import build

CALL = (
    "import logging, torch, farfield as ff; logging.basicConfig(level='INFO', format='%(message)s')\n"
    "x = torch.randn(1, 1, 40, 8)\n"
    "a, b = (ff.multipole_attention(x, x, x, block=4, rank=2, impl=i) for i in (None, 'torch'))\n"
    "torch.testing.assert_close(a, b); print('right')\n"
)


def run(cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    return subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, env=environment, timeout=300)


def libraries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler here")


@pytest.fixture
def quick(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that hands over what the machine's own has built already: for what is not about compiling."""
    built = build.report().path
    assert built is not None
    script = tmp_path_factory.mktemp("bin") / "quick++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\nfor last; do :; done\nexec cp "{built}" "$last"\n')
    script.chmod(0o700)
    return str(script)


@needs_compiler
def test_two_processes_build_at_once_and_a_third_finds_it(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", CALL], env=environment, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and out == "right\n", err
    assert len(libraries(tmp_path / "farfield")) == 1
    third = run(tmp_path)
    assert third.stdout == "right\n" and "built" not in third.stderr


@needs_compiler
@pytest.mark.parametrize("part", ["engine.cpp", "vectors.h", "expansion.h"])
def test_every_part_decides_what_is_built(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = build.compiler()
    assert command is not None
    here = build._key(command.split())
    for path in build.SOURCE.parent.glob("*.[hc]*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCE", tmp_path / build.SOURCE.name)
    assert build._key(command.split()) == here
    with (tmp_path / part).open("a") as file:
        file.write("// changed\n")
    assert build._key(command.split()) != here


@needs_compiler
def test_a_damaged_library_is_built_again(tmp_path: Path, quick: str) -> None:
    assert run(tmp_path, CXX=quick).returncode == 0
    folder = tmp_path / "farfield"
    (name,) = libraries(folder)
    path, key = folder / name, name.split("-")[1]
    whole = path.read_bytes()
    for size in (len(whole), 0, 4096, 60000):
        path.write_bytes(whole[:size])
        path.chmod(0o700)
        # What is damaged counts as not there, and does not stay.
        assert build._kept(folder, key) == (path if size == len(whole) else None)
        assert path.exists() == (size == len(whole))
    path.write_bytes(whole[:4096])
    again = run(tmp_path, CXX=quick)
    assert again.stdout == "right\n" and "built in" in again.stderr
    assert [p.read_bytes()[:4] for p in (tmp_path / "farfield").iterdir()] == [whole[:4]]


@needs_compiler
def test_a_library_of_other_things_is_not_used(tmp_path: Path) -> None:
    """The right name, the right hash, and none of the functions."""
    (tmp_path / "empty.cpp").write_text("int nothing;\n")
    command = build.compiler()
    assert command is not None
    subprocess.run(
        [*command.split(), "-shared", "-fPIC", str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "x.so")], check=True
    )
    with pytest.raises(OSError, match="not this engine"):
        build._load(tmp_path / "x.so")


def test_no_compiler(tmp_path: Path) -> None:
    done = run(tmp_path, PATH=str(tmp_path), CXX="")
    assert done.stdout == "right\n"
    assert "there is no C++ compiler" in done.stderr and "the torch engine is used instead" in done.stderr
    assert libraries(tmp_path / "farfield") == []


def test_a_compiler_that_is_named_and_missing(tmp_path: Path) -> None:
    done = run(tmp_path, CXX="nonesuch++ -m64")
    assert done.stdout == "right\n" and "nonesuch++" in done.stderr


def test_a_compiler_that_is_no_command_line(tmp_path: Path) -> None:
    done = run(tmp_path, CXX="g++ 'x")
    assert done.stdout == "right\n" and "no command line" in done.stderr and "torch engine" in done.stderr


@needs_compiler
def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert build.cache_folder() is None and not build._usable(None)


def test_threads_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def slow() -> build.Built:
        built.append(1)
        time.sleep(0.1)
        return build.Built(None, "no", None)

    monkeypatch.setattr(build, "_report", cache(slow))
    threads = [threading.Thread(target=build.why_not) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    broken = tmp_path / "broken++"
    broken.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x.cpp:1: error: no such machine' >&2\nexit 3\n"
    )
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    done = run(tmp_path / "cache", CXX=str(broken))
    assert done.stdout == "right\n"
    assert "exit status 3" in done.stderr and "no such machine" in done.stderr and "torch engine" in done.stderr
    assert libraries(tmp_path / "cache" / "farfield") == []  # nothing half-written stays


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path: Path, quick: str) -> None:
    """A file stands where the folder should be, which stops root, too."""
    (tmp_path / "farfield").write_text("in the way")
    done = run(tmp_path, TMPDIR=str(tmp_path), CXX=quick)
    assert done.stdout == "right\n" and "nothing can be kept in" in done.stderr


@needs_compiler
def test_a_filled_cache_that_can_only_be_read_serves(
    tmp_path: Path, quick: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Root can write everywhere, so the file system says no here."""
    monkeypatch.setenv("CXX", quick)
    first = build.build(tmp_path)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("TemporaryFile", "mkstemp"):
        monkeypatch.setattr(build.tempfile, name, read_only)
    with caplog.at_level(logging.INFO, "farfield"):
        assert build.build(tmp_path) == first
    assert not caplog.text


@needs_compiler
def test_a_cache_that_others_can_write_is_not_trusted(tmp_path: Path, quick: str) -> None:
    folder = tmp_path / "farfield"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    done = run(tmp_path, TMPDIR=str(tmp_path), CXX=quick)
    assert done.stdout == "right\n" and "nothing can be kept in" in done.stderr
    assert libraries(folder) == []
    assert not list(tmp_path.glob("farfield-*"))  # nor does anything stay elsewhere


def test_a_slow_compiler_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = tmp_path / "slow++"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexec sleep 60\n')
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "SECONDS", 1)
    with caplog.at_level(logging.WARNING, "farfield"):
        built = build._report.__wrapped__()
    assert built.library is None and built.reason is not None and "longer than 1 s" in built.reason
    assert "torch engine" in caplog.text
