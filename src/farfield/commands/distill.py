"""``farfield distill``: the small parts of a converted model, fitted and trained to answer like the original."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farfield.commands.errors import INTERRUPTED
from farfield.commands.interrupt import Interruption
from farfield.commands.options import device_option, in_words, probe
from farfield.commands.progress import Stages

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from farfield.interop.transformers.distill import Distillation, Windows

__all__ = ["distill_command"]

_DEFAULT_STEPS = 100
_SETTINGS, _STATE = "distillation.json", "distillation.safetensors"
_SAVE_EVERY = 60.0
"""Seconds between two states saved."""

_ENDS = ("steps", "seconds", "keep_targets")
"""Settings that may be others when a run is resumed."""


def distill_command(
    converted: Annotated[Path, typer.Argument(metavar="CONVERTED", help="What farfield convert wrote.")],
    against: Annotated[Path, typer.Option(metavar="ORIGINAL", help="What it was made from: a folder or a GGUF file.")],
    text: Annotated[
        list[Path],
        typer.Option(
            "--text", help="Text like what the model will read, plain or .xz; the end is held out; repeatable."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the distilled model.")],
    length: Annotated[int, typer.Option(min=2, help="Tokens of every window.")] = 8192,
    held_out: Annotated[int, typer.Option(min=1, help="Windows from the end of every text, to judge by.")] = 1,
    refit: Annotated[bool, typer.Option(help="Fit output projections, in closed form, before training.")] = True,
    refit_windows: Annotated[int, typer.Option(min=1, help="Windows of every text to fit to.")] = 2,
    refit_target: Annotated[
        str, typer.Option(help="state: the state after attention, earlier drift included; output: attention's alone.")
    ] = "state",
    steps: Annotated[
        int | None,
        typer.Option(min=0, help=f"Steps of training, 0 for none; {_DEFAULT_STEPS} where --minutes is not given."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Of training, at most.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of every text to train on, one a step.")] = 32,
    recall: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of these, windows of every text whose end repeats what stood far before: plain text hardly asks for "
            "it.",
        ),
    ] = 0,
    lora: Annotated[int, typer.Option(min=0, help="Rank of changes to attention projections; 0 for none.")] = 8,
    lr: Annotated[float, typer.Option(help="Highest rate of Adam.")] = 2e-3,
    layer_weight: Annotated[
        float, typer.Option(help="Weight of the layers' relative squared error beside the divergence.")
    ] = 1.0,
    recompute: Annotated[bool, typer.Option(help="Less memory: compute layers again for the gradient.")] = True,
    precision: Annotated[
        str,
        typer.Option(
            help="Of products in training: float32, or bfloat16, several times faster where the hardware has it."
        ),
    ] = "float32",
    keep_targets: Annotated[
        bool,
        typer.Option(
            help="Keep the original's answers for windows that come again: the states of all layers and tokens. Memory "
            "for time."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of windows, their order, and the low-rank changes.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")] = None,
) -> None:
    """Bring a converted model nearer to its original: refit output projections, then train low-rank changes.

    Far-field parameters are trained too, where the model has some. Judged by the divergence from the original on text
    that is held out; a stage that does not lower it is undone. The folder is one that from_pretrained reads like
    CONVERTED, and conversion.json says what was done.
    """
    from rich.console import Console

    from farfield.interop.transformers.distill import Distillation, save
    from farfield.interop.transformers.pretrained import read
    from farfield.interop.transformers.tuning import TuneConfig

    if steps is None and minutes is None:
        steps = _DEFAULT_STEPS
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise ValueError(f"--minutes {minutes:g}: minutes > 0 would be accepted; --steps 0 leaves training out")
    tune = None
    if steps != 0:
        seconds = None if minutes is None else 60.0 * minutes
        tune = TuneConfig(
            steps, seconds, lora, lr, layer_weight=layer_weight, recompute=recompute, precision=precision,
            keep_targets=keep_targets, seed=seed,
        )  # fmt: skip
    if recall > windows:
        raise ValueError(f"--recall {recall}: at most all windows to train on, --windows {windows}, would be accepted")
    if recall and tune is None:
        raise ValueError(f"--recall {recall} --steps 0: only windows to train on repeat; leave out one of them")
    if tune is None and not refit:
        raise ValueError("--no-refit --steps 0: nothing is left to do; leave out one of them")
    _check_out(out, resume)
    place = device_option(device)
    contents = _contents(text)
    probe(out)
    console = Console(highlight=False)
    ours, theirs = read(converted, place), read(against, place)
    sample = next(iter(contents.values()))[:2000]
    if ours.tokenizer(sample).input_ids != theirs.tokenizer(sample).input_ids:
        raise ValueError(f"the tokenizers of {converted} and {against} divide text differently; one model is needed")
    wanted = {"refit": refit_windows if refit else 0, "train": windows if tune else 0, "held": held_out}
    spans, repeats = _windows(ours.tokenizer, contents, length, wanted, recall, seed, console)
    work = Distillation(ours.model, theirs.model, spans, tune, target=refit_target)
    settings = {
        "converted": converted.name,
        "original": against.name,
        "texts": [path.name for path in text],
        "length": length,
        "windows": {"refit": len(spans.refit), "train": len(spans.train), "held": len(spans.held)},
        "recall": repeats,
        "refit": refit_target if refit else None,
        "training": None if tune is None else {k: v for k, v in vars(tune).items() if k not in _ENDS},
        "fingerprint": _fingerprint(ours.model, theirs.model, spans),
    }
    states = _States(out, work)
    if resume:
        states.load(settings)
    states.begin(settings)
    try:
        with Interruption() as interruption, Stages(console) as told:
            report = work.run(told, interruption, states.save)
    except BaseException:
        states.remove_empty()
        raise
    named = {name: settings[name] for name in ("original", "texts", "length", "windows", "recall")}
    save(ours.model, ours.tokenizer, report, out, converted, **named, seed=seed)
    console.print(_sentence(report), soft_wrap=True)
    console.print(f"written to {out}; measure it with: farfield eval {out} --against {against}", soft_wrap=True)
    if any(stage and stage["stopped"] for stage in (report["refit"], report["training"])):
        console.print(f"stopped before the end; the same command with --resume goes on in {out}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    states.remove()


def _check_out(out: Path, resume: bool) -> None:
    if resume and not (out / _SETTINGS).is_file():
        raise ValueError(f"{out} holds no distillation to resume ({_SETTINGS} is missing); leave out --resume")
    if resume or not out.exists():
        return
    if (out / _SETTINGS).is_file():
        raise ValueError(f"{out} holds a distillation that was stopped; add --resume to go on, or give another --out")
    if not out.is_dir() or any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another --out")


def _contents(paths: Sequence[Path]) -> dict[Path, str]:
    from farfield.interop.transformers import texts

    return {path: texts.read_text(path) for path in paths}


def _windows(
    tokenizer: Any,
    contents: dict[Path, str],
    length: int,
    wanted: dict[str, int],
    recall: int,
    seed: int,
    console: Console,
) -> tuple[Windows, int]:
    """So many windows of each text for every use; those to judge by are from where the others end.

    Of those to train on, ``recall`` of each text, equally far apart, end in what stood far before, or the same share
    where a text has fewer. How many these are comes with them.
    """
    import torch

    from farfield.interop.transformers import texts
    from farfield.interop.transformers.distill import Windows

    found: dict[str, list[Tensor]] = {use: [] for use in wanted}
    generator, repeated = torch.Generator().manual_seed(seed), 0
    for path, content in contents.items():
        begin, end = texts.apart(content, length, wanted["held"])
        for shift, (use, number) in enumerate(wanted.items()):
            if not number:
                continue
            part, name = (end, f"the end of {path}, held out,") if use == "held" else (begin, _rest(path))
            possible = min(number, texts.room(tokenizer, part, length))
            if possible < number:
                console.print(
                    f"{name} has room for {possible} of {number} windows of {length:,} tokens", soft_wrap=True
                )
            taken = texts.spread(tokenizer, part, length, possible, seed + shift, name)
            if use == "train":
                repeats = round(recall * possible / number)
                repeated += repeats
                for place in (i * possible // repeats for i in range(repeats)):
                    taken[place], _ = texts.repeating(taken[place], generator)
            found[use] += taken
    return Windows(**found), repeated


def _rest(path: Path) -> str:
    return f"{path} without what is held out"


def _fingerprint(model: Any, original: Any, windows: Windows) -> str:
    """Of both models' weights and all windows, as far as sums can tell."""
    sums = [float(p.detach().double().sum()) for each in (model, original) for p in each.parameters()]
    ids = [ids.tolist() for part in (windows.refit, windows.train, windows.held) for ids in part]
    return hashlib.sha256(json.dumps([sums, ids]).encode()).hexdigest()


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of training each by its own name; what an older version did not know was as by default."""
    from farfield.interop.transformers.tuning import TuneConfig

    settings = {"recall": 0, **settings}
    training = settings.get("training")
    if not isinstance(training, dict):
        return settings
    plain = {name: value for name, value in vars(TuneConfig(steps=1)).items() if name not in _ENDS}
    named = {f"training {name}": value for name, value in {**plain, **training}.items()}
    return {**{name: value for name, value in settings.items() if name != "training"}, **named}


class _States:
    """The state of a run in its folder: settings as JSON, and one safetensors file that is replaced at once."""

    def __init__(self, folder: Path, work: Distillation) -> None:
        self.settings, self.state, self.work = folder / _SETTINGS, folder / _STATE, work
        self.saved = time.monotonic()

    def begin(self, settings: dict[str, Any]) -> None:
        from farfield.training.files import write_json

        write_json(self.settings, settings)

    def save(self, now: bool) -> None:
        import safetensors.torch

        from farfield.training.files import write_atomically

        if not now and time.monotonic() - self.saved < _SAVE_EVERY:
            return
        tensors, told = self.work.state()
        plain = {name: t.cpu().contiguous() for name, t in tensors.items()}
        write_atomically(self.state, safetensors.torch.save(plain, metadata={"farfield": json.dumps(told)}))
        self.saved = time.monotonic()

    def load(self, settings: dict[str, Any]) -> None:
        """Takes up the state, if one was saved; a run that was stopped before that begins again.

        Raises:
            ValueError: when the run in the folder was another one, or its files are damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            before = json.loads(self.settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.settings} is damaged: {error}") from error
        now, then = _flat(settings), _flat(before)
        others = [f"{name} {now[name]!r} (was {then.get(name)!r})" for name in now if now[name] != then.get(name)]
        if others:
            raise ValueError(
                f"cannot resume with another {', '.join(others)}; leave these as they were, or give another --out"
            )
        if not self.state.is_file():
            return
        try:
            with safe_open(self.state, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                told = json.loads(file.metadata()["farfield"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.state} is damaged: {error}") from error
        self.work.load_state(tensors, told)

    def remove_empty(self) -> None:
        """Leaves nothing behind where there is nothing to go on from."""
        if not self.state.is_file():
            self.remove()

    def remove(self) -> None:
        """Takes the files away: the run is done."""
        for path in (self.settings, self.state):
            path.unlink(missing_ok=True)


def _sentence(report: dict[str, Any]) -> str:
    apart = report["divergence"]
    undone = [name for name in ("refit", "training") if report[name] and not report[name]["kept"]]
    told = (
        f"divergence from the original on held-out text: {apart['before']:.5f} nats per token before, "
        f"{apart['after']:.5f} after ({report['tokens']:,} tokens, {in_words(report['seconds'])})"
    )
    if undone:
        gave = ", ".join(f"{name} gave {report[name]['divergence']:.5f}" for name in undone)
        told += f"; undone, since it was no better: {gave}"
    return told if apart["after"] < apart["before"] else f"{told}; the model is as it was"
