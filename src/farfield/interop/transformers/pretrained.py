"""Reading models for the command line: a folder of Transformers, converted or not, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from farfield.interop.transformers.cores import NAME
from farfield.interop.transformers.loading import load

__all__ = ["Pretrained", "read"]


class Pretrained(NamedTuple):
    """A causal language model in evaluation mode.

    Attributes:
        model: in float32.
        tokenizer: its own.
        dtype: float16 or bfloat16 where all weights are kept in it, otherwise float32.
    """

    model: Any
    tokenizer: Any
    dtype: torch.dtype


def read(path: str | Path, device: str = "cpu") -> Pretrained:
    """Reads a model in float32: with the attention that its config names, or exact attention where it names none.

    Args:
        path: a folder that `save_pretrained` wrote (tokenizer included), or a GGUF file of a Llama.
        device: where to put it.

    Raises:
        FileNotFoundError: when there is nothing of that name.
        ValueError: for what cannot be read, with the reason.
    """
    path = Path(path)
    if path.is_file():
        from farfield.interop.gguf import load_llama

        model, tokenizer = load_llama(path)
        return Pretrained(model.to(device).eval(), tokenizer, torch.float32)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder or GGUF file {path}")
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.glob("*.gguf"))) or "none"
        raise ValueError(f"{path} has no config.json: a model's folder is needed, or a GGUF file (here: {found})")
    config = AutoConfig.from_pretrained(path)
    if getattr(config, NAME, None) is not None:
        model = load(path, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return Pretrained(model.to(device).eval(), AutoTokenizer.from_pretrained(path), _kept_in(path))


def _kept_in(folder: Path) -> torch.dtype:
    """The 16 bits that all weights of a folder are kept in; float32 where they are not."""
    found = set()
    for file in folder.glob("*.safetensors"):
        if file.name == "calibration.safetensors":
            continue
        with safe_open(file, framework="pt") as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (it is no dict)
    return {("F16",): torch.float16, ("BF16",): torch.bfloat16}.get(tuple(found), torch.float32)
