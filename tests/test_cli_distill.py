"""farfield distill on a tiny model in a folder: what it says and writes, stopping and going on, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import Result

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")
pytest.importorskip("peft", reason="peft is not installed (extra 'distill')")

from farfield.commands import distill  # noqa: E402
from farfield.commands.interrupt import Interruption  # noqa: E402
from farfield.interop.transformers import configure, register  # noqa: E402
from farfield.interop.transformers.distill import Windows  # noqa: E402
from farfield.interop.transformers.texts import apart, room, spread  # noqa: E402
from support.tiny_models import make  # noqa: E402
from support.tiny_tokenizer import tokenizer  # noqa: E402

LINES = "near field, far field, level, group, cell; what is near is seen, what is far is summed\n" * 60


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "original"
    make("Llama", vocab_size=257).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every query sees two blocks of 8 and two first tokens, and a few opened cells in half of the heads of a layer."""
    path = tmp_path_factory.mktemp("models") / "converted"
    group = {"heads": [0, 2], "rank": 2, "levels": 1, "open": 3, "rest": "drop", "choose": "bounds"}
    configure(make("Llama", vocab_size=257), "converted", block=8, sinks=2, layers=[[group], []]).save_pretrained(path)
    tokenizer().save_pretrained(path)
    (path / "conversion.json").write_text(json.dumps({"keys": 0.2}))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    return path


SMALL = ("--length", 300, "--windows", 3, "--refit-windows", 1, "--lora", 2, "--lr", 0.01, "--device", "cpu")


def test_distilled_written_and_measured(
    original: Path, converted: Path, text: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    made = invoke("distill", converted, "--against", original, "--text", text, *SMALL, "--steps", 8, "--out", out)
    assert made.exit_code == 0, made.output
    assert "refit: 2 of 2 layers" in made.output
    assert "training: step 8" in made.output
    report = json.loads((out / "conversion.json").read_text())
    assert report["keys"] == 0.2
    told = report["distillation"]
    assert told["texts"] == ["text.txt"]
    assert told["original"] == "original"
    assert told["windows"] == {"refit": 1, "train": 3, "held": 1} and told["recall"] == 0
    assert told["divergence"]["after"] < told["divergence"]["before"]
    assert f"{told['divergence']['before']:.5f} nats per token before" in made.output
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors"}
    assert not {"distillation.json", "distillation.safetensors"} & {path.name for path in out.iterdir()}
    register()
    plain = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="farfield")
    assert plain(torch.arange(3, 100)[None]).logits.isfinite().all()
    said = invoke("eval", out, "--against", original, "--text", text, "--lengths", "200", "--windows", 1, "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["texts"][0]["converted"]["keys"] < 1.0


def test_stopped_and_gone_on_with(
    original: Path,
    converted: Path,
    text: Path,
    tmp_path: Path,
    invoke: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights are those of an uninterrupted run, byte for byte; what was reached is written meanwhile."""
    given = ["distill", converted, "--against", original, "--text", text, *SMALL, "--steps", 6]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert invoke(*given, "--out", whole).exit_code == 0

    class Impatient(Interruption):
        """Ctrl-C in the third step: after as many questions as there are layers, and three steps begun."""

        asked = 0

        def __call__(self) -> bool:
            self.asked += 1
            return self.asked > 5

    with monkeypatch.context() as patch:
        patch.setattr(distill, "Interruption", Impatient)
        said = invoke(*given, "--out", out)
    assert said.exit_code == 130, said.output
    assert "--resume goes on" in said.output
    half = json.loads((out / "conversion.json").read_text())["distillation"]
    assert half["training"]["stopped"] and half["training"]["steps"] == 3
    assert (out / "model.safetensors").is_file()

    said = invoke(*given, "--out", out)
    assert said.exit_code == 2
    assert "add --resume" in said.output
    said = invoke(*given, "--out", out, "--resume", "--lr", 0.02)
    assert said.exit_code == 2
    assert "cannot resume with another training lr 0.02 (was 0.01); leave" in " ".join(said.output.split())

    # As a version without them wrote it: what it did not know was as by default.
    settings = json.loads((out / "distillation.json").read_text())
    del settings["training"]["precision"], settings["recall"]
    (out / "distillation.json").write_text(json.dumps(settings))
    said = invoke(*given, "--out", out, "--resume", "--precision", "bfloat16")
    assert "training precision 'bfloat16' (was 'float32')" in " ".join(said.output.split())
    said = invoke(*given, "--out", out, "--resume", "--recall", 1)
    assert "cannot resume with another recall 1 (was 0)" in " ".join(said.output.split())
    said = invoke(*given, "--out", out, "--resume", "--keep-targets")
    assert said.exit_code == 0, said.output
    assert "refit: " not in said.output
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_far_from_the_original_is_said(
    original: Path, text: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    """Nothing can be gained where nothing is lost: both figures, and the stage that was undone."""
    out = tmp_path / "out"
    said = invoke("distill", original, "--against", original, "--text", text, *SMALL, "--steps", 0, "--out", out)
    assert said.exit_code == 0, said.output
    assert "undone, since it was no better: refit gave 0.00000; the model is as it was" in said.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-refit", "--steps", "0"], "nothing is left to do"),
        (["--minutes", "0"], "minutes > 0 would be accepted"),
        (["--lr", "-1"], "lr=-1.0: a number > 0"),
        (["--refit-target", "logits"], "target='logits': one of 'state', 'output'"),
        (["--length", "4000"], "TEXT without what is held out has"),
        (["--length", "2600"], "the end of TEXT, held out, has"),
        (["--length", "100"], "256 tokens in each"),
        (["--no-refit", "--lora", "0"], "nothing to train"),
        (["--against", "nowhere"], "no folder or GGUF file nowhere"),
        (["--against", "LARGER"], "LARGER divide text differently"),
        (["--out", "ORIGINAL"], "is not empty; give another --out"),
        (["--resume"], "holds no distillation to resume"),
        (["--recall", "1", "--steps", "0"], "--recall 1 --steps 0: only windows to train on repeat"),
        (["--recall", "4"], "--recall 4: at most all windows to train on, --windows 3, would be accepted"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    original: Path,
    converted: Path,
    text: Path,
    tmp_path: Path,
    invoke: Callable[..., Result],
) -> None:
    places = {"ORIGINAL": original, "TEXT": text, "LARGER": tmp_path / "larger"}
    if "LARGER" in arguments:
        make("Llama", vocab_size=257).save_pretrained(places["LARGER"])
        tokenizer(begin=True).save_pretrained(places["LARGER"])
    options = {"--against": original, "--text": text, "--out": tmp_path / "out"}
    given = [word for pair in options.items() if pair[0] not in arguments for word in pair]
    said = invoke("distill", converted, *given, *SMALL, *(places.get(word, word) for word in arguments))
    for name, path in places.items():
        message = message.replace(name, str(path))
    assert said.exit_code == 2, said.output
    assert message in said.output
    assert "--out" in arguments or not list((tmp_path / "out").glob("*"))


def test_some_windows_end_in_what_stood_far_before(text: Path) -> None:
    """As many of each text as asked for, apart from each other; the rest, and what is fitted or judged, stays plain."""
    lines = "".join(f"line {number * number} of the text\n" for number in range(3000))
    wanted, console = {"refit": 1, "train": 4, "held": 1}, Console()

    def taken(recall: int) -> Windows:
        found, number = distill._windows(tokenizer(), {text: lines}, 400, wanted, recall, 0, console)
        assert number == recall
        return found

    plain, some = taken(0), taken(2)
    assert [torch.equal(a, b) for a, b in zip(plain.train, some.train, strict=True)] == [False, True, False, True]
    for before, now in zip((*plain.refit, *plain.held), (*some.refit, *some.held), strict=True):
        assert torch.equal(before, now)
    for before, now in zip(plain.train[::2], some.train[::2], strict=True):
        assert torch.equal(before[:300], now[:300])
        kept = now[:300].unfold(0, 32, 1)
        for start in (300, 332, 364):
            assert (kept == now[start : start + 32]).all(1).any()
    assert not torch.equal(some.train[0][300:], some.train[2][300:])
    # Of a text with room for fewer, the same share.
    short, number = distill._windows(tokenizer(), {text: lines[:9000]}, 400, {**wanted, "train": 40}, 20, 0, console)
    assert len(short.train) < 25 and number == round(len(short.train) / 2)


def test_windows_that_a_text_has_room_for() -> None:
    """As many as are asked for, or as lie apart; one at least is tried."""
    assert room(tokenizer(), LINES, 100) == len(LINES) // 125
    assert len(spread(tokenizer(), LINES, 100, room(tokenizer(), LINES, 100), 0)) == len(LINES) // 125
    assert room(tokenizer(), LINES, 10_000) == 1


def test_what_is_held_out_comes_last() -> None:
    long = "a line of text\n" * 1000
    begin, end = apart(long, 100, 1)
    assert begin + end == long
    assert begin.endswith("\n")
    assert len(end) == pytest.approx(len(long) / 10, abs=15)
    begin, end = apart(long, 1000, 2)
    assert len(end) == pytest.approx(len(long) / 2, abs=15)
