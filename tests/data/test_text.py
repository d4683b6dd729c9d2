from __future__ import annotations

import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from farfield.data import text
from farfield.data.text import Corpus, TextFile, collect


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def corpus_of(*sizes: int) -> Corpus:
    return Corpus(tuple(TextFile(f"f{i}", bytes([65 + i % 26]) * size) for i, size in enumerate(sizes)), "test")


def test_default_corpus_is_the_standard_library_without_its_tests() -> None:
    corpus = collect()
    names = [name for name, _ in corpus.files]
    assert corpus.size > 1_000_000
    assert names == sorted(names, key=lambda name: names.index(name))
    assert all(name.endswith(".py") for name in names)
    assert not any({"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(Path(n).parts) for n in names)
    assert "argparse.py" in names
    again = collect([])
    assert again.fingerprint == corpus.fingerprint


def test_default_corpus_says_when_there_are_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="no sources of its standard library"):
        collect()


def test_files_folders_and_globs_mix(tmp_path: Path) -> None:
    one = write(tmp_path / "one.txt", b"one")
    write(tmp_path / "folder/b.txt", b"bb")
    write(tmp_path / "folder/a/c.txt", b"c")
    write(tmp_path / "globbed/x.md", b"x")
    write(tmp_path / "globbed/deep/y.md", b"y")
    write(tmp_path / "globbed/z.rst", b"z")
    corpus = collect([one, tmp_path / "folder", str(tmp_path / "globbed/**/*.md")])
    assert [file.data for file in corpus.files] == [b"one", b"bb", b"c", b"y", b"x"]
    assert corpus.files[1].name == "b.txt"
    assert corpus.files[2].name == os.path.join("a", "c.txt")


def test_a_folder_leaves_out_hidden_cached_empty_binary_and_double_files(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"text")
    write(tmp_path / "copy.txt", b"text")
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / "image.bin", b"\x89PNG\0\0\0")
    write(tmp_path / "wide.txt", "wide".encode("utf-16"))
    write(tmp_path / ".hidden", b"hidden")
    write(tmp_path / ".git/config", b"hidden too")
    write(tmp_path / "__pycache__/a.pyc", b"cache")
    corpus = collect([tmp_path])
    assert [file.name for file in corpus.files] == ["a.txt", "wide.txt"]
    reasons = " ".join(corpus.skipped)
    assert "copy.txt: the same" in reasons
    assert "empty.txt: empty" in reasons
    assert "image.bin: looks binary" in reasons


def test_a_named_file_is_taken_whatever_it_holds(tmp_path: Path) -> None:
    data = bytes(range(256))
    assert collect([write(tmp_path / "all.bin", data)]).files[0].data == data


def test_the_same_file_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    assert len(collect([path, tmp_path, str(path)]).files) == 1


def test_fingerprint_tells_names_and_contents_apart() -> None:
    def fingerprint(*files: tuple[str, bytes]) -> str:
        return Corpus(tuple(TextFile(*file) for file in files), "").fingerprint

    all_different = {
        fingerprint(("a", b"xy")),
        fingerprint(("ax", b"y")),
        fingerprint(("a", b"x"), ("b", b"y")),
        fingerprint(("a", b"xz")),
    }
    assert len(all_different) == 4


def test_missing_files_and_patterns_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere\.txt"):
        collect([tmp_path / "nowhere.txt"])
    with pytest.raises(FileNotFoundError, match=r"pattern '.*\*\.nothing' matches no file"):
        collect([str(tmp_path / "*.nothing")])


def test_empty_files_and_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        collect([write(tmp_path / "empty.txt", b"")])
    with pytest.raises(ValueError, match=r"found no text in .*empty\.txt: empty"):
        collect([tmp_path])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        collect([tmp_path / "bare"])


def test_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "secret.txt", b"text")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    # By patching, because root may read everything.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match=r"cannot read .*secret\.txt: Permission denied"):
        collect([path])


def test_things_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        collect([tmp_path / "pipe"])


def test_one_path_instead_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="sequence of paths"):
        collect("README.md")


def test_split_holds_out_whole_files() -> None:
    corpus = corpus_of(*[1000] * 40)
    train, valid = corpus.split(context=100)
    assert train.dtype == valid.dtype == np.uint8
    assert 2000 <= len(valid) <= 3100
    assert len(train) + len(valid) == 40 * 1000 + 38
    contents = [bytes(side).split(text.SEPARATOR) for side in (train, valid)]
    assert sorted(len(piece) for side in contents for piece in side) == [1000] * 40


def test_split_depends_on_the_seed_and_on_nothing_else() -> None:
    corpus = corpus_of(*range(500, 900, 10))
    shuffled = Corpus(tuple(reversed(corpus.files)), "another order")
    np.testing.assert_array_equal(corpus.split(64, seed=3).valid, shuffled.split(64, seed=3).valid)
    np.testing.assert_array_equal(corpus.split(64, seed=3).train, shuffled.split(64, seed=3).train)
    assert not np.array_equal(corpus.split(64, seed=3).valid, corpus.split(64, seed=4).valid)


def test_split_passes_over_a_file_that_is_too_large() -> None:
    corpus = corpus_of(100_000, *[500] * 40)
    for seed in range(8):
        assert len(corpus.split(context=64, seed=seed).valid) < 20_000


def test_split_of_one_file_holds_out_its_tail() -> None:
    data = bytes(np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8))
    train, valid = Corpus((TextFile("only", data),), "").split(context=100)
    assert bytes(train) + bytes(valid) == data
    assert len(valid) == 500


@pytest.mark.parametrize("size", [2 * 129, 2 * 129 + 1, 1000])
def test_split_leaves_a_window_on_both_sides(size: int) -> None:
    for sizes in ([size], [size // 2, size - size // 2]):
        train, valid = corpus_of(*sizes).split(context=128)
        assert min(len(train), len(valid)) >= 129


def test_split_of_a_short_text_says_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"has 257 bytes, but context 128 needs at least 258.*context of at most 127"):
        corpus_of(257).split(context=128)
    corpus_of(257).split(context=127)


@pytest.mark.parametrize(
    ("context", "fraction", "message"), [(0, 0.1, "context"), (8, 0.0, "valid_"), (8, 1.0, "valid_")]
)
def test_split_refuses_arguments_out_of_range(context: int, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus_of(1000).split(context, fraction)


def test_packed_text_is_text(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a" / "t.txt", tmp_path / "b" / "t.txt.xz"
    for path, data in ((plain, b"near and far " * 40), (packed, lzma.compress(b"near and far " * 40))):
        path.parent.mkdir()
        path.write_bytes(data)
    assert [file.data for file in collect([packed]).files] == [plain.read_bytes()]
    assert [file.data for file in collect([packed.parent]).files] == [plain.read_bytes()]
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t\.txt\.xz is no whole \.xz file"):
        collect([packed])
    # In a folder it is passed over, as what else is no text.
    (packed.parent / "more.txt").write_bytes(b"text")
    found = collect([packed.parent])
    assert [file.name for file in found.files] == ["more.txt"]
    assert "no whole .xz file" in found.skipped[0]
