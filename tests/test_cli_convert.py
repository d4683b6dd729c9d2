"""farfield convert and farfield eval on a tiny model in a folder."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import Result

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")

from farfield.interop.transformers import evaluate  # noqa: E402
from farfield.interop.transformers.evaluate import passkey, passkey_prompt  # noqa: E402
from farfield.interop.transformers.texts import spread, windows  # noqa: E402
from support.tiny_models import make  # noqa: E402
from support.tiny_tokenizer import tokenizer  # noqa: E402

LINES = "near field, far field, level, group, cell; what is near is seen, what is far is summed\n" * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make("Llama", vocab_size=257).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt.xz"
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.write(LINES)
    return path


def test_converted_and_measured(folder: Path, text: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    out = tmp_path / "out"
    made = invoke(
        "convert", folder, "--text", text, "--keys", 0.85, "--length", 500, "--queries", 8, "--centres", "2,4",
        "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "settings: 4 of 4" in made.output
    report = json.loads((out / "conversion.json").read_text())
    assert report["keys"] <= 0.85
    assert report["asked"]["centres"] == [2, 4]
    assert {row["setting"]["number"] for row in report["menu"] if "number" in (row["setting"] or {})} == {2, 4}
    assert report["texts"] == ["text.txt.xz"]
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert again("far, near").input_ids == tokenizer()("far, near").input_ids

    more = invoke(
        "convert", folder, "--calibration", out / "calibration.safetensors", "--keys", 0.95, "--out",
        tmp_path / "more", "--device", "cpu",
    )  # fmt: skip
    few = invoke(
        "convert", folder, "--calibration", out / "calibration.safetensors", "--keys", 0.95, "--out",
        tmp_path / "few", "--retrieval", 0.25, "--no-exact-heads", "--device", "cpu",
    )  # fmt: skip
    assert few.exit_code == 0 and "25% of key heads keep all tokens" in few.output, few.output
    options = json.loads((tmp_path / "few" / "config.json").read_text())["farfield"]["options"]
    assert options["exact"] is None
    assert more.exit_code == 0, more.output
    assert report["keys"] < json.loads((tmp_path / "more" / "conversion.json").read_text())["keys"] <= 0.95

    with_its_own = invoke(
        "convert", folder, "--calibration", out / "calibration.safetensors", "--length", 300, "--seed", 4, "--out",
        tmp_path / "own",
    )  # fmt: skip
    assert with_its_own.exit_code == 2 and "--length, --seed beside --calibration" in with_its_own.output

    plot = tmp_path / "plot.png"
    said = invoke(
        "eval", out, "--against", folder, "--text", text, "--lengths", "300x2,500", "--windows", 1, "--passkey",
        "--trials", 1, "--decode", 3, "--json", "--plot", plot, "--device", "cpu",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert [(row["length"], row["windows"]) for row in found["texts"]] == [(300, 2), (500, 1)]
    for row in found["texts"]:
        assert row["original"]["keys"] == 1.0
        assert row["converted"]["keys"] < 1.0
        assert row["converted"]["perplexity"] == pytest.approx(row["original"]["perplexity"], rel=0.5)
        assert row["converted"]["perplexity"] != row["original"]["perplexity"]
        assert row["original"]["divergence"] is None
        assert 0 < row["converted"]["divergence"] < 1.0
        assert 0 < row["converted"]["attention_seconds"] < row["converted"]["seconds"]
        assert row["original"]["state_bytes"] == 2 * 2 * 2 * row["length"] * 8 * 4
    assert found["texts"][1]["converted"]["keys"] == pytest.approx(report["keys"], abs=1e-5)
    assert [key["depth"] for key in found["passkey"][0]["converted"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for row, length in zip(found["decoding"], (300, 500), strict=True):
        assert [row[name]["length"] for name in ("original", "converted")] == [length, length]
        assert all(len(row[name]["seconds"]) == 3 for name in row)
        assert row["original"]["state"] == 2 * 2 * 2 * (length + 5) * 8 * 4
        assert row["converted"]["state"] != row["original"]["state"]
    assert plot.stat().st_size > 1000


def test_a_table_for_one_model(folder: Path, text: Path, invoke: Callable[..., Result]) -> None:
    said = invoke("eval", folder, "--text", text, "--lengths", "40", "--passkey", "--trials", 1, "--device", "cpu")
    assert said.exit_code == 2
    assert "key, question and answer need" in said.output
    said = invoke("eval", folder, "--text", text, "--lengths", "40", "--windows", 2, "--decode", 1, "--device", "cpu")
    assert said.exit_code == 0, said.output
    assert "100.0%" in said.output
    assert "milliseconds per token" in said.output
    assert "original" not in said.output


def test_a_calibration_outlives_a_bound_that_is_not_met(
    folder: Path, text: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    said = invoke(
        "convert", folder, "--text", text, "--error", 1e-9, "--no-exact-heads", "--length", 300, "--queries", 4,
        "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert said.exit_code == 2 and f"--calibration {out / 'calibration.safetensors'}" in said.output, said.output
    assert [path.name for path in out.iterdir()] == ["calibration.safetensors"]
    again = invoke(
        "convert", folder, "--calibration", out / "calibration.safetensors", "--keys", 0.95, "--out", tmp_path / "more",
        "--device", "cpu",
    )  # fmt: skip
    assert again.exit_code == 0, again.output


def test_weights_stay_as_they_are(text: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    half, out = tmp_path / "half", tmp_path / "out"
    make("Llama", vocab_size=257).bfloat16().save_pretrained(half)
    tokenizer().save_pretrained(half)
    said = invoke("convert", half, "--text", text, "--keys", 0.85, "--length", 300, "--queries", 4, "--out", out)
    assert said.exit_code == 0, said.output
    before, after = (load_file(folder / "model.safetensors") for folder in (half, out))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == x.dtype and torch.equal(after[name], x) for name, x in before.items())

    # One that is kept wider keeps its digits: all are float32 then.
    before["model.norm.weight"] = before["model.norm.weight"].float() * 1.001
    save_file(before, half / "model.safetensors", metadata={"format": "pt"})
    wide = tmp_path / "wide"
    said = invoke("convert", half, "--text", text, "--keys", 0.85, "--length", 300, "--queries", 4, "--out", wide)
    assert said.exit_code == 0, said.output
    after = load_file(wide / "model.safetensors")
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], x.float()) for name, x in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "MODEL", "--text", "TEXT", "--lengths", "many"], "'many' is no length"),
        (["eval", "MODEL", "--text", "TEXT", "--plot", "plot.gif"], ".png, .svg or .pdf"),
        (["eval", "MODEL", "--text", "TEXT", "--lengths", "8192"], "8,192 are needed for one window"),
        (["eval", "nowhere", "--text", "TEXT"], "no folder or GGUF file nowhere"),
        (["eval", "MODEL", "--text", "nowhere.txt"], "no text file nowhere.txt"),
        (["eval", "EMPTY", "--text", "TEXT"], "has no config.json"),
        (["convert", "MODEL", "--text", "TEXT", "--out", "MODEL"], "is not empty"),
        (["convert", "MODEL", "--out", "NEW"], "give --text FILE"),
        (["convert", "MODEL", "--calibration", "TEXT", "--out", "NEW"], "is no calibration"),
        (["convert", "MODEL", "--text", "TEXT", "--out", "NEW", "--dense-layers", "last"], "'last' are no layers"),
        (["convert", "MODEL", "--text", "TEXT", "--out", "NEW", "--length", "100"], "more than 192 tokens"),
        (["convert", "MODEL", "--text", "TEXT", "--out", "NEW", "--length", "300", "--keys", "0"], "keys=0.0"),
        (["convert", "MODEL", "--text", "TEXT", "--out", "NEW", "--length", "300"], "the least that can be read is"),
        (["eval", "MODEL", "--text", "TORN", "--lengths", "300"], "is no whole .xz file"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, folder: Path, text: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "torn.txt.xz"
    torn.write_bytes(text.read_bytes()[:80])
    places = {"MODEL": folder, "TEXT": text, "NEW": tmp_path / "new", "EMPTY": tmp_path / "empty", "TORN": torn}
    said = invoke(*(places.get(word, word) for word in arguments))
    assert said.exit_code == 2, said.output
    assert message in said.output


# Text into windows, and keys into text


def test_windows_follow_each_other_and_begin_alike() -> None:
    plain = windows(tokenizer(), LINES, 50, 3)
    assert tokenizer().decode(torch.cat(plain)) == LINES[:150]
    begun = windows(tokenizer(begin=True), LINES, 50, 2)
    assert [int(ids[0]) for ids in begun] == [0, 0]
    assert tokenizer().decode(torch.cat([ids[1:] for ids in begun])) == LINES[:98]
    assert len(windows(tokenizer(), LINES, 2000, 9)) == len(LINES) // 2000


def test_windows_from_all_over_the_text() -> None:
    text = "".join(f"{i:04d}\n" for i in range(9999))
    found = spread(tokenizer(), text, 20, 4, seed=1)
    starts = [int(tokenizer().decode(ids)[:4]) for ids in found]
    assert all(2499 * i <= start <= 2500 * (i + 1) for i, start in enumerate(starts))
    again, other = (spread(tokenizer(), text, 20, 4, seed=seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


def test_a_passkey_lies_where_it_should() -> None:
    for depth in (0.0, 0.4, 1.0):
        ids, digits = passkey_prompt(tokenizer(), LINES, 600, depth, "seed")
        assert len(ids) == 600
        prompt = tokenizer().decode(ids)
        assert digits == 5
        assert prompt.count(prompt[-5:]) == 3
        asked = len("\nWhat is the pass key? The pass key is 12345")
        hidden = len("\nThe pass key is 12345. Remember it: 12345 is the pass key.\n")
        assert prompt.index("\nThe pass key is") == round(depth * (600 - asked - hidden))


class Mute(torch.nn.Module):
    """A model that finds every token equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
        return transformers.modeling_outputs.CausalLMOutput(logits=torch.zeros(*ids.shape, 257))


def test_every_trial_hides_its_key_in_text_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []

    def seen(reader: Any, filler: str, length: int, depth: float, seed: str) -> tuple[torch.Tensor, int]:
        ids, digits = passkey_prompt(reader, filler, length, depth, seed)
        prompts.append(reader.decode(ids))
        return ids, digits

    monkeypatch.setattr(evaluate, "passkey_prompt", seen)
    text = "".join(f"{number:05d} " for number in range(1000))
    passkey(Mute(), tokenizer(), text, 300, [0.0], 4, seed=0)
    passkey(Mute(), tokenizer(), text, 300, [0.0], 1, seed=0)
    stretches = [prompt.split(" is the pass key.\n")[1].split("\nWhat")[0] for prompt in prompts]
    assert stretches[0] == stretches[4] and stretches[0].startswith("00000 ")
    assert len(set(stretches)) == 4 and [text.index(stretch) for stretch in stretches[1:4]] == [1500, 3000, 4500]


def test_who_knows_the_key_has_all_digits_right() -> None:
    """A model that repeats what followed the last two tokens the first time they were there."""

    class Copy(Mute):
        def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
            logits = torch.zeros(*ids.shape, 257)
            row = ids[0].tolist()
            for i in range(2, len(row)):
                before = next((j for j in range(2, i) if row[j - 2 : j + 1] == row[i - 2 : i + 1]), None)
                if before is not None:
                    logits[0, i, row[before + 1]] = 1.0
            return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    (found,) = passkey(Copy(), tokenizer(), "x" * 90, 200, [0.5], 2, seed=0)
    # The first digit follows "is ", which the key's sentence says; every other follows the digits before it.
    assert found.digits == 1.0
    assert found.keys == 1.0
    assert found.nats == pytest.approx(math.log(256 + math.e) - 1)
    (found,) = passkey(Mute(), tokenizer(), "x" * 90, 200, [0.5], 2, seed=0)
    assert found.digits == 0.0 and found.nats == pytest.approx(math.log(257))
