"""Llama models from GGUF files: written here in llama.cpp's order, read back with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra 'transformers')")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")

from farfield.interop.gguf import load_llama  # noqa: E402 (needs what was checked above)

BYTES = [chr(b) for b in range(33, 127)] + ["Ġ", "Ċ"]
WORDS = ["<|end|>", *BYTES, "he", "Ġh", "ll"]
MERGES = ["Ġ h", "h e", "l l"]


def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's own permutation of query and key rows (convert_hf_to_gguf.py, `permute`)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, of: Any, quantised: bool = False, **extra: Any) -> Path:
    config = of.config
    writer = gguf.GGUFWriter(str(path), extra.pop("arch", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(extra.pop("pre", "smollm"))
    writer.add_token_list(WORDS)
    writer.add_token_types([3, *[1] * (len(WORDS) - 1)])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    for name, value in extra.items():
        writer.add_string(name.replace("__", "."), value)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for key, weight in of.state_dict().items():
        stem = key.removesuffix(".weight")
        if stem == "lm_head":
            continue  # tied
        if "layers" in stem:
            _, _, index, rest = stem.split(".", 3)
            name = f"blk.{index}.{names[rest]}.weight"
        else:
            name = f"{names[stem]}.weight"
        if "q_proj" in stem or "k_proj" in stem:
            weight = pairs(weight, 4 if "q_proj" in stem else 2)
        array = weight.numpy().astype(np.float32)
        if quantised and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_logits_are_those_of_the_model_that_was_written(tmp_path: Path) -> None:
    original = model()
    loaded, _ = load_llama(write(tmp_path / "m.gguf", original))
    ids = torch.randint(0, len(WORDS), (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, original(ids).logits)
    assert loaded.config.rope_parameters["rope_theta"] == 500.0
    assert loaded.config.eos_token_id == 0
    assert not loaded.training


def test_quantised_tensors_come_close(tmp_path: Path) -> None:
    original = model()
    loaded, _ = load_llama(write(tmp_path / "m.gguf", original, quantised=True))
    for name, weight in original.state_dict().items():
        # Q8_0 keeps 127 steps to the largest of 32 values.
        assert (loaded.state_dict()[name] - weight).abs().max() <= weight.abs().max() / 127, name


def test_the_tokenizer_reads_and_writes_text(tmp_path: Path) -> None:
    _, tokenizer = load_llama(write(tmp_path / "m.gguf", model()))
    ids = tokenizer("hell hell 12<|end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "ll", "Ġh", "e", "ll", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer.decode(ids) == "hell hell 12<|end|>"
    assert tokenizer.eos_token == "<|end|>"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"arch": "mamba"}, "architecture 'mamba'; 'llama' would be accepted"),
        ({"pre": "tekken"}, "pre='tekken'; byte-level BPE"),
        ({"llama__rope__scaling__type": "yarn"}, "scales its rotary frequencies"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(tmp_path: Path, extra: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_llama(write(tmp_path / "m.gguf", model(), **extra))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf"):
        load_llama(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match="begins with b'hell'"):
        load_llama(tmp_path / "text.gguf")
