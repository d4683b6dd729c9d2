"""Llama models from GGUF files: a Transformers model and its tokenizer.

llama.cpp stores the rows of the query and key projections in another order (it turns neighbouring channels together,
Transformers turns halves); they are put back here. Quantised tensors become float32 first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    import gguf
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
except ImportError as error:
    raise ImportError(
        f"farfield.interop.gguf needs {error.name}: pip install 'farfield[transformers]' brings it"
    ) from error

__all__ = ["Loaded", "load_llama"]

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's tensors in the file and in the model."""

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_DIGITS = {"smollm": True, "gpt-2": False, "default": False}
"""Byte-level pre-tokenizers by their name in the file: whether every digit is a word of its own."""

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType


class Loaded(NamedTuple):
    """What a GGUF file holds.

    Attributes:
        model: a `LlamaForCausalLM`, in evaluation mode.
        tokenizer: a `PreTrainedTokenizerFast`, with the file's chat template.
    """

    model: Any
    tokenizer: Any


def load_llama(path: str | Path, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> Loaded:
    """Reads a Llama model and its tokenizer from a GGUF file.

    Args:
        path: the file; architecture "llama", any quantisation that the gguf package can undo.
        dtype: of the parameters.
        attn_implementation: as in Transformers' `from_pretrained`; "farfield" ones need
            :func:`farfield.interop.transformers.register` first.

    Returns:
        (model, tokenizer). Takes float32 memory for one copy of the model, beside the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is not GGUF, another architecture, or anything in the file that this loader would
            have to leave out (experts, scaled rotary frequencies, biases, another kind of tokenizer); the message
            names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path.name} is no GGUF file: it begins with {magic!r}, b'GGUF' is needed")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, {tensor.name for tensor in reader.tensors})
    tokenizer = _tokenizer(fields)
    state = _state(reader.tensors, config)
    model, info = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"{path.name} does not hold the whole model: {wrong}")
    return Loaded(model.eval(), tokenizer)


def _config(fields: dict[str, Any], tensors: set[str]) -> Any:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"the file holds architecture {architecture!r}; 'llama' would be accepted. Transformers reads others "
            "itself: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)"
        )

    def need(key: str) -> Any:
        if f"llama.{key}" not in fields:
            raise ValueError(f"the file has no llama.{key}, which a Llama model needs")
        return fields[f"llama.{key}"]

    if fields.get("llama.expert_count"):
        raise ValueError(f"the file holds a mixture of {fields['llama.expert_count']} experts; a dense Llama is needed")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ValueError(
            f"the file scales its rotary frequencies (llama.rope.scaling.type={scaling!r}"
            f"{', rope_freqs.weight' if 'rope_freqs.weight' in tensors else ''}): plain ones would be accepted"
        )
    heads, width = need("attention.head_count"), need("embedding_length")
    head_dim = fields.get("llama.attention.key_length", width // heads)
    turned = fields.get("llama.rope.dimension_count", head_dim)
    if turned != head_dim or fields.get("llama.attention.value_length", head_dim) != head_dim:
        raise ValueError(
            f"llama.rope.dimension_count={turned}, value_length={fields.get('llama.attention.value_length')}: "
            f"both must be the head width {head_dim}"
        )
    tokens = fields.get("tokenizer.ggml.tokens", ())
    ids = {
        f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return LlamaConfig(
        vocab_size=fields.get("llama.vocab_size", len(tokens)),
        hidden_size=width,
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=need("context_length"),
        rms_norm_eps=need("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in tensors,
        **ids,
    )


def _state(tensors: Any, config: Any) -> dict[str, Tensor]:
    """The tensors in float32 under the model's names; those that the model has no place for are an error."""
    state: dict[str, Tensor] = {}
    for tensor in tensors:
        name = _model_name(tensor.name)
        if name is None:
            raise ValueError(f"the file's tensor {tensor.name!r} has no place in a Llama model without biases")
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if name.endswith("q_proj.weight") else config.num_key_value_heads
            weight = _halves(weight, heads)
        state[name] = weight
    return state


def _model_name(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    if kind != "weight":
        return None
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.weight"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
    return None


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of every head from neighbouring pairs (llama.cpp) to two halves (Transformers)."""
    width = weight.shape[0] // heads
    return weight.view(heads, width // 2, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _tokenizer(fields: dict[str, Any]) -> Any:
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _DIGITS:
        raise ValueError(
            f"the file's tokenizer is model={kind!r}, pre={pre!r}; byte-level BPE, model='gpt2' with pre in "
            f"{sorted(_DIGITS)}, would be accepted. Transformers reads others itself: "
            "AutoTokenizer.from_pretrained(folder, gguf_file=name)"
        )
    if fields.get("tokenizer.ggml.add_bos_token"):
        raise ValueError("the file's tokenizer adds a first token (add_bos_token); one that adds none is needed")
    words: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("tokenizer.ggml.add_space_prefix", False)))
    digits = [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")] if _DIGITS[pre] else []
    built.pre_tokenizer = pre_tokenizers.Sequence([*digits, level])
    built.decoder = decoders.ByteLevel()
    for word, type_ in zip(words, fields.get("tokenizer.ggml.token_type", ()), strict=False):
        if type_ in (_CONTROL, _USER_DEFINED):
            built.add_tokens([AddedToken(word, normalized=False, special=type_ == _CONTROL)])
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            named[f"{name}_token"] = words[index]
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields.get("llama.context_length"),
        clean_up_tokenization_spaces=False,
        **named,
    )
