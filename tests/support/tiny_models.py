"""Tiny random models of many kinds, and their answers under one attention implementation or another."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import set_seed

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NARROW = {**SIZES, "head_dim": 8}
LAYERS = ["sliding_attention", "full_attention"]

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", SIZES),
    "Qwen2": (
        "Qwen2ForCausalLM",
        {**SIZES, "use_sliding_window": True, "sliding_window": 16, "layer_types": LAYERS},
    ),
    "Qwen3": ("Qwen3ForCausalLM", NARROW),
    "Mistral": ("MistralForCausalLM", {**SIZES, "sliding_window": 16}),
    "Gemma2": (
        "Gemma2ForCausalLM",
        {**NARROW, "sliding_window": 16, "layer_types": LAYERS, "attn_logit_softcapping": None},
    ),
    "Gemma3Text": ("Gemma3ForCausalLM", {**NARROW, "sliding_window": 16, "layer_types": LAYERS}),
    "GPT2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        },
    ),
}  # fmt: skip
"""Language models: class and config. Those with sliding layers see 16 tokens there; GPT2 has learned positions."""


def make(kind: str, **changes: Any) -> Any:
    """A random model in evaluation mode, the same every time."""
    name, options = DECODERS[kind]
    set_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**options, **changes})
    model = getattr(transformers, name)(config).eval()
    # Larger than at the start of training, so that attention is far from uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def answer(model: Any, implementation: str, **inputs: Any) -> Tensor:
    """The first output: logits or hidden states."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        first: Tensor = model(**inputs)[0]
    return first


def tokens(*shape: int) -> Tensor:
    """Random ids without special ones."""
    return torch.randint(3, 50, shape)
