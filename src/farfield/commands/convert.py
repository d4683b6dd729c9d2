"""``farfield convert``: a pretrained model on multipole attention, without training."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farfield.commands.options import device_option, in_words, probe
from farfield.commands.progress import Stages

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["convert_command"]

_DEFAULT_KEYS = 0.12
_EFFORT = {"length": 8192, "windows": 1, "recall": 2, "queries": 64, "seed": 0}


def convert_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder of Transformers, or a GGUF file of a Llama.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the converted model.")],
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Calibration text like what the model will read, plain or .xz; repeatable."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Instead of --text: calibration.safetensors of an earlier conversion, for another budget."),
    ] = None,
    keys: Annotated[
        float | None,
        typer.Option(help=f"Keys read per query, as a share of the mean context. (default: {_DEFAULT_KEYS})"),
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Instead of --keys: the highest estimated divergence, in nats per token.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of context to calibrate and count at. (default: 8192)")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of --length tokens from every text. (default: 1)")
    ] = None,
    recall: Annotated[
        int | None,
        typer.Option(
            min=0, help="Windows taken once more, with an end that repeats what stood far before. (default: 2)"
        ),
    ] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Queries sampled in each window. (default: 64)")] = None,
    dense_layers: Annotated[str, typer.Option(metavar="N,N", help="Layers that stay exact.")] = "",
    share: Annotated[
        int | None, typer.Option(min=1, help="Most queries that share a choice; 1 allows decoding with a cache.")
    ] = None,
    centres: Annotated[
        str,
        typer.Option(
            metavar="N,N",
            help="Offer expansions about so many centres of a head's queries: those that keep tokens, and, about the "
            "fewest, one beside every other setting.",
        ),
    ] = "",
    retrieval: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Most key heads that may keep all tokens when decoding, as a share; of others the last blocks are "
            "kept, and what centres keep (--centres).",
        ),
    ] = None,
    exact_heads: Annotated[bool, typer.Option(help="Offer every head to see all tokens exactly.")] = True,
    recall_weight: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="How much ends that repeat count, beside plain text.")
    ] = 0.5,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the sampled queries; equal seeds choose alike. (default: 0)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")] = None,
) -> None:
    """Give every head the cheapest far field that keeps the model's answers, as calibration text shows them.

    Writes a folder that from_pretrained reads (attn_implementation="farfield"), with conversion.json: the settings
    offered and chosen, keys read and estimated errors by layer. Nothing is trained.
    """
    from rich.console import Console

    from farfield.interop.transformers import texts
    from farfield.interop.transformers.calibration import Calibration
    from farfield.interop.transformers.convert import CALIBRATION, convert, save
    from farfield.interop.transformers.pretrained import read

    if keys is None and error is None:
        keys = _DEFAULT_KEYS
    exact, numbers = _numbers(dense_layers, "layers"), _numbers(centres, "numbers of centres")
    if 0 in numbers:
        raise ValueError(f"--centres {centres}: numbers from 1 on would be accepted; leave it out for no expansions")
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ValueError(f"{out} is not empty; give another --out")
    place = device_option(device)
    if bool(text) == (calibration is not None):
        raise ValueError("give --text FILE (repeatable), or --calibration FILE of an earlier conversion")
    effort = {"length": length, "windows": windows, "recall": recall, "queries": queries, "seed": seed}
    given = [f"--{name}" for name, value in effort.items() if value is not None]
    if calibration is not None and given:
        raise ValueError(f"{', '.join(given)} beside --calibration: it was made with its own; leave them out")
    chosen = {**_EFFORT, **{name: value for name, value in effort.items() if value is not None}}
    earlier = None if calibration is None else Calibration.load(calibration)
    read_texts = {path: texts.read_text(path) for path in text or ()}
    probe(out)
    console = Console(highlight=False)
    start = time.perf_counter()
    with console.status("reading the model") if console.is_terminal else nullcontext():
        pretrained = read(model, place)
    spans: list[Tensor] = []
    for path, content in read_texts.items():
        spans += texts.spread(
            pretrained.tokenizer, content, chosen["length"], chosen["windows"], chosen["seed"], str(path)
        )
    kept = out / CALIBRATION
    try:
        with Stages(console) as told:
            conversion = convert(
                pretrained.model, spans, calibration=earlier, keys=keys, error=error, dense_layers=exact,
                max_share=share, retrieval=retrieval, exact_heads=exact_heads, centres=numbers,
                recall_weight=recall_weight, recall=chosen["recall"], queries=chosen["queries"], seed=chosen["seed"],
                progress=lambda stage, done, total: told(stage, done / total, f"{done} of {total}"),
                calibrated=lambda made: made.save(kept),
            )  # fmt: skip
    except ValueError as refused:
        if not kept.exists():
            raise
        raise ValueError(f"{refused}. What was calibrated is kept: --calibration {kept} --out ANOTHER") from refused
    pretrained.model.to(pretrained.dtype)  # as it was: nothing was trained
    save(pretrained.model, pretrained.tokenizer, conversion, out, source=model.name, texts=[p.name for p in text or ()])
    report = conversion.report
    heads = [len(layer["settings"]) for layer in report["layers"]]
    nothing = {i for i, offer in enumerate(report["menu"]) if offer["setting"] is None and not offer["expansion"]}
    alone = sum(number in nothing for layer in report["layers"] for number in layer["settings"])
    console.print(
        f"{report['keys']:.1%} of {conversion.calibration.length:,} tokens' keys are read, estimated divergence "
        f"{report['estimated_divergence']:.4f} nats per token; {alone} of {sum(heads)} heads see no far field, "
        f"{report['retrieval']:.0%} of key heads keep all tokens "
        f"({in_words(time.perf_counter() - start)})",
        soft_wrap=True,
    )
    console.print(f"written to {out}; measure it with: farfield eval {out} --against {model}", soft_wrap=True)


def _numbers(text: str, what: str) -> list[int]:
    """[0, 1] from ``0,1``."""
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if not all(piece.isdecimal() for piece in pieces):
        raise ValueError(f"{text!r} are no {what}; write them like 8,16")
    return [int(piece) for piece in pieces]
