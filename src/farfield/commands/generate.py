"""``farfield generate``: what a trained model writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["generate_command"]


def generate_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `farfield train --out` wrote.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    length: Annotated[int, typer.Option("--bytes", min=0, help="Bytes to write after the prompt.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte, 1 samples from the model.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds write equal text.")] = 0,
) -> None:
    """Continue a prompt with a trained model. The bytes go to standard output as they are made."""
    from farfield.training.checkpoint import load
    from farfield.training.generate import generate

    # What the terminal sent in another encoding than UTF-8 arrives as surrogates, and leaves as the same bytes.
    start = prompt.encode("utf-8", "surrogateescape")
    model = load(folder).build_model()
    continuation = generate(model, start, length, temperature=temperature, seed=seed)
    out = sys.stdout.buffer
    out.write(start)
    for byte in continuation:
        out.write(bytes([byte]))
        out.flush()
    out.write(b"\n")
    out.flush()
