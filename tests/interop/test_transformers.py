"""attn_implementation="farfield" in tiny random models: exact where it must be, right with caches, or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")

import farfield as ff  # noqa: E402
from farfield.interop.transformers import configure, load, register  # noqa: E402
from farfield.interop.transformers.streams import ARGUMENT  # noqa: E402
from support.tiny_models import DECODERS, SIZES, answer, make, tokens  # noqa: E402 (needs what was checked above)

register()

# torch.compile itself instantiates autograd functions to trace them, and warns that this is deprecated.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

EXACT = ("farfield", "farfield:dense", "farfield:blocks")
"""Implementations that equal exact attention on 70 tokens: two blocks of 64 and no far field, or none at all."""

LEFT_AND_RIGHT = torch.ones(2, 70, dtype=torch.long)
LEFT_AND_RIGHT[0, :20] = 0
LEFT_AND_RIGHT[1, 60:] = 0


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the order of sums in float32, relative to the size of the numbers."""
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.detach().abs().max().item())


def test_farfield_alone_imports_none_of_it() -> None:
    code = "import sys, farfield; assert not {'transformers', 'gguf', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_twice_changes_nothing() -> None:
    before = dict(transformers.AttentionInterface._global_mapping)
    assert {name.partition(":")[2] for name in register()} == {"", *ff.recipes.names()} - {"flashvggt"}
    # Transformers takes a name with this word in it for one of its own kernels.
    assert not [name for name in register() if "flash" in name]
    assert dict(transformers.AttentionInterface._global_mapping) == before


@pytest.mark.parametrize("kind", DECODERS)
def test_exact_limits_equal_eager(kind: str) -> None:
    """Without padding, with padding on both sides, and with packed sequences; in sliding layers, too."""
    model, ids = make(kind), tokens(2, 70)
    position = torch.cat([torch.arange(30), torch.arange(40)])[None].expand(2, -1)
    packed = {"position_ids": position, "use_cache": False}
    plain = answer(model, "eager", input_ids=ids)
    padded = answer(model, "eager", input_ids=ids, attention_mask=LEFT_AND_RIGHT)
    alone = answer(model, "eager", input_ids=ids, **packed)
    assert not torch.allclose(plain, alone, atol=1e-3)
    here = LEFT_AND_RIGHT.bool()
    for name in EXACT:
        close(answer(model, name, input_ids=ids), plain)
        close(answer(model, name, input_ids=ids, attention_mask=LEFT_AND_RIGHT)[here], padded[here])
        close(answer(model, name, input_ids=ids, **packed), alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma3Text"])
def test_generate_gives_the_tokens_of_eager(kind: str, cache: str) -> None:
    model, ids = make(kind), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, attention_mask=mask, **options)
    assert expected.shape == (2, 52)
    for name in EXACT:
        model.set_attn_implementation(name)
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected), name


@pytest.mark.parametrize("recipe", ["fma", "blocks", "window", "dense", "l2vit", "gna", "swin", "focal"])
def test_a_cache_gives_what_a_prefill_gives(recipe: str) -> None:
    """The last token's logits at every length, where every row is far beyond the exact limit."""
    given = {"fma": {"block": 4, "rank": 2, "sinks": 2}, "blocks": {"block": 4}, "window": {"size": 5},
             "gna": {"size": 6, "stride": 3}}.get(recipe, {})  # fmt: skip
    model = configure(make("Llama", num_hidden_layers=1), recipe, **given)
    ids, cache = tokens(2, 44), transformers.DynamicCache(config=model.config)
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[1, :7] = 0
    with torch.no_grad():
        for start, stop in [(0, 17), (17, 18), (18, 25), *((i, i + 1) for i in range(25, 44))]:
            seen = mask[:, :stop]
            position = (seen.cumsum(-1) - 1).clamp(min=0)
            cached = model(
                ids[:, start:stop], attention_mask=seen, position_ids=position[:, start:], **{ARGUMENT: cache}
            ).logits
            whole = model(ids[:, :stop], attention_mask=seen, position_ids=position, use_cache=False).logits
            close(cached[:, -1], whole[:, -1])


def test_padding_does_not_move_blocks_and_sinks() -> None:
    """A sequence padded on the left gives what it gives alone, with far field and all."""
    model = configure(make("Llama"), block=4, rank=2, sinks=2)
    ids = tokens(1, 60)
    alone = model(ids).logits
    padded = torch.cat([torch.full((1, 3), 0), ids], 1)
    mask = (torch.arange(63) >= 3)[None].long()
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    close(model(padded, attention_mask=mask, position_ids=position).logits[:, 3:], alone)
    assert not torch.allclose(alone, answer(model, "eager", input_ids=ids), atol=1e-3)


def test_each_packed_sequence_gives_what_it_gives_alone() -> None:
    model = configure(make("Llama"), block=4, rank=2, sinks=1)
    ids = tokens(1, 80)
    bounds = torch.tensor([0, 25, 32, 80], dtype=torch.int32)
    position = torch.cat([torch.arange(int(n)) for n in bounds.diff()])[None]
    parts = torch.cat([model(x, use_cache=False).logits for x in ids.split(bounds.diff().tolist(), 1)], 1)
    close(model(ids, position_ids=position, use_cache=False).logits, parts)
    known = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 48, "max_length_k": 48}
    close(model(ids, position_ids=position, use_cache=False, **known).logits, parts)


def test_a_sliding_layer_stays_a_window_whatever_the_recipe() -> None:
    model, ids = make("Mistral"), tokens(1, 300)
    expected = answer(model, "eager", input_ids=ids)
    close(answer(model, "farfield", input_ids=ids), expected)
    close(answer(model, "farfield:blocks", input_ids=ids), expected)


def encoder(kind: str) -> tuple[Any, dict[str, Any]]:
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    transformers.set_seed(0)
    if kind == "BERT":
        config = transformers.BertConfig(vocab_size=50, attention_probs_dropout_prob=0.0, **sizes)
        inputs = {"input_ids": tokens(2, 70), "attention_mask": LEFT_AND_RIGHT}
        return transformers.BertModel(config).eval(), inputs
    if kind == "ViT":
        config = transformers.ViTConfig(image_size=32, patch_size=4, **sizes)
        return transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    inputs = {"input_ids": tokens(2, 70), "attention_mask": LEFT_AND_RIGHT}
    return transformers.T5EncoderModel(config).eval(), inputs


@pytest.mark.parametrize(
    ("kind", "names"), [("BERT", EXACT), ("ViT", EXACT), ("T5", ("farfield:dense",))], ids=["BERT", "ViT", "T5"]
)
def test_encoders_equal_eager_in_the_exact_limit(kind: str, names: tuple[str, ...]) -> None:
    model, inputs = encoder(kind)
    expected = answer(model, "eager", **inputs)
    here = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
    for name in names:
        close(answer(model, name, **inputs)[here], expected[here])


def test_every_token_is_seen_once() -> None:
    """Values that are all alike come out as they went in: weights sum to one, in a model that is far from exact."""
    model, inputs = encoder("ViT")
    configure(model, block=4, rank=2, sinks=1)
    for layer in model.encoder.layer if hasattr(model, "encoder") else model.layers:
        value = next(m for n, m in layer.named_modules() if n.endswith(("value", "v_proj")))
        value.weight.data.zero_()
        value.bias.data.fill_(1.0)
    close(answer(model, "farfield", **inputs), answer(model, "eager", **inputs))


@traced
def test_one_graph_for_every_length() -> None:
    """torch.compile without a break, forward and backward; a new length compiles nothing new."""
    model = configure(make("Llama", num_hidden_layers=1), block=8, rank=2, summary="shared", bias=-4.0).train()
    count = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    graphs = []
    for n in (33, 50, 77):
        ids = tokens(2, n)
        mask = torch.ones(2, n, dtype=torch.long)
        mask[0, :5] = 0
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
        close(logits, model(ids, attention_mask=mask, use_cache=False).logits)
        logits.sum().backward()
        graphs.append(count.frame_count)
    assert graphs[0] == graphs[-1]
    assert model.model.layers[0].self_attn.farfield.far.level_bias.grad.abs().sum() > 0


@traced
def test_packed_sequences_compile() -> None:
    model = configure(make("Mistral", num_hidden_layers=1), block=8, rank=2)
    ids, position = tokens(1, 70), torch.cat([torch.arange(30), torch.arange(40)])[None]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        close(
            compiled(ids, position_ids=position, use_cache=False).logits,
            answer(model, "eager", input_ids=ids, position_ids=position, use_cache=False),
        )


def test_parameters_are_saved_and_read_back(tmp_path: Path) -> None:
    model = configure(make("Llama"), block=8, rank=2, summary="shared", bias=-4.0)
    far = {name: p for name, p in model.named_parameters() if ".farfield." in name}
    assert len(far) == 2 * 5
    with torch.no_grad():
        for parameter in far.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = tokens(1, 90)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.farfield["options"]["block"] == 8
    assert torch.equal(again(ids).logits, expected)
    with pytest.raises(ValueError, match="was made for 'fma'"):
        answer(again, "farfield:window", input_ids=ids)


def test_options_without_parameters_need_no_loader(tmp_path: Path) -> None:
    model = configure(make("Llama"), block=8, rank=2)
    assert not [name for name, _ in model.named_parameters() if "farfield" in name]
    ids = tokens(1, 90)
    expected = answer(model, "farfield", input_ids=ids)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="farfield")
    assert torch.equal(answer(again, "farfield", input_ids=ids), expected)
    assert torch.equal(answer(load(tmp_path), "farfield", input_ids=ids), expected)
    assert not torch.allclose(expected, answer(model, "eager", input_ids=ids), atol=1e-3)


def test_a_model_with_parameters_read_without_them_is_refused(tmp_path: Path) -> None:
    configure(make("Llama"), block=8, rank=2, summary="shared").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="farfield")
    with pytest.raises(ValueError, match=r"load\(path\) reads a model that was saved with them"):
        model(tokens(1, 20))


def test_dropout_is_drawn_in_training() -> None:
    model = configure(make("Llama", attention_dropout=0.5), block=8, rank=2).train()
    ids = tokens(1, 90)
    first, second = (model(ids, use_cache=False).logits for _ in range(2))
    assert not torch.equal(first, second)


LLAMA_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()}, "every pair of tokens"),
    ({"attention_mask": torch.zeros(2, 1, 20, 20)}, "every pair of tokens"),
    ({"output_attentions": True}, "output_attentions=True .*never computed"),
    ({"my_own_thing": 3}, "my_own_thing=3 .*does not know this argument"),
    ({"head_mask": torch.ones(4)}, "head_mask"),
]


@pytest.mark.parametrize(
    ("asked", "message"), LLAMA_REFUSALS, ids=[next(iter(a)) + str(i) for i, (a, _) in enumerate(LLAMA_REFUSALS)]
)
def test_what_cannot_be_honoured_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer(make("Llama", num_hidden_layers=1), "farfield", input_ids=tokens(2, 20), **asked)


def test_models_that_ask_for_other_scores_or_orders_are_refused() -> None:
    ids = tokens(2, 40)
    with pytest.raises(ValueError, match="softcap=50"):
        answer(make("Gemma2", attn_logit_softcapping=50.0), "farfield", input_ids=ids)
    with pytest.raises(ValueError, match="position_bias, as T5 does"):
        answer(encoder("T5")[0], "farfield", input_ids=ids)
    sizes = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    heads = {"decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    bart = transformers.BartModel(transformers.BartConfig(**sizes, **heads)).eval()
    with pytest.raises(ValueError, match="cross attention"):
        answer(bart, "farfield", input_ids=ids)
    close(answer(bart, "farfield:dense", input_ids=ids), answer(bart, "eager", input_ids=ids))
    modern = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    tokens_of = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}
    config = transformers.ModernBertConfig(**modern, **tokens_of, num_hidden_layers=2, local_attention=16)
    with pytest.raises(ValueError, match="a window that looks both ways"):
        answer(transformers.ModernBertModel(config).eval(), "farfield", input_ids=ids)


def test_recipes_that_cannot_work_here_are_refused() -> None:
    ids = tokens(1, 20)
    model = make("Llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="reads the layer's input x"):
        answer(model, "farfield:transformer_ls", input_ids=ids)
    with pytest.raises(ValueError, match="'agent' cannot be causal"):
        answer(model, "farfield:agent", input_ids=ids)
    with pytest.raises(ValueError, match=r"configure\(model, ...\) makes one"):
        answer(encoder("BERT")[0], "farfield:agent", input_ids=ids)


def test_configure_refuses_and_leaves_the_model_alone() -> None:
    model = make("Llama")
    with pytest.raises(TypeError, match="recipe 'fma' has no option blok=4"):
        configure(model, blok=4)
    with pytest.raises(ValueError, match="keys that are rotated already"):
        configure(model, rotate="cells")
    with pytest.raises(ValueError, match="unknown recipe 'fmaa'"):
        configure(model, "fmaa")
    with pytest.raises(ValueError, match="mixes later tokens in"):
        configure(model, query_rank=4)
    assert not hasattr(model.config, "farfield")
    assert model.config._attn_implementation != "farfield"


def test_recipes_with_parameters_work_in_an_encoder() -> None:
    model, inputs = encoder("BERT")
    configure(model, "agent", count=4)
    model.train()
    model(**inputs)[0].sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if ".farfield." in name]
    assert len(grads) == 4 and all(g is not None and g.abs().sum() > 0 for g in grads)


def test_a_models_own_cache_is_no_paged_one() -> None:
    """Transformers 5.24 calls it `cache`, as continuous batching calls its pages."""
    from transformers import DynamicCache

    from farfield.interop.transformers.attention import _refuse

    _refuse({"cache": DynamicCache()})
    with pytest.raises(ValueError, match="paged cache"):
        _refuse({"cache": object()})
