"""StreamCache: decode states in place of keys and values, in tiny random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")

from farfield.interop.transformers import StreamCache, configure, register  # noqa: E402
from farfield.interop.transformers.streams import ARGUMENT  # noqa: E402
from support.tiny_models import make, tokens  # noqa: E402 (needs what was checked above)

register()

SMALL = {"block": 8, "rank": 2, "sinks": 2}
LEFT = torch.ones(2, 60, dtype=torch.long)
LEFT[0, :23] = 0


def small(kind: str = "Llama", recipe: str = "fma", **options: Any) -> Any:
    model = make(kind)
    configure(
        model, recipe=recipe, **({**SMALL, "summary": "mean", "bias": None, **options} if recipe == "fma" else {})
    )
    model.set_attn_implementation("farfield")
    return model.double()


def stepped(model: Any, ids: torch.Tensor, cache: Any, sizes: tuple[int, ...], **inputs: Any) -> torch.Tensor:
    """Logits of the prompt (the first size), then of chunks; the last size repeats."""
    outs, done, mask = [], 0, inputs.get("attention_mask")
    while done < ids.shape[1]:
        size = sizes[min(len(outs), len(sizes) - 1)]
        given = {} if mask is None else {"attention_mask": mask[:, : done + size]}
        with torch.no_grad():
            outs.append(model(ids[:, done : done + size], use_cache=True, **{ARGUMENT: cache}, **given).logits)
        done += size
    return torch.cat(outs, 1)


@pytest.mark.parametrize("sizes", [(1,), (33, 1), (40, 7, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"open": 2, "share": 2, "choose": "bounds"}], ids=["fma", "opened"])
def test_steps_equal_the_prefill(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    model, ids = small(**options), tokens(2, 60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(stepped(model, ids, StreamCache(model), sizes), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["Mistral", "Gemma3Text"])
def test_sliding_layers(kind: str) -> None:
    model, ids = small(kind), tokens(2, 60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(stepped(model, ids, StreamCache(model), (21, 1)), whole, rtol=0, atol=1e-9)


def test_rows_padded_on_the_left() -> None:
    model, ids = small(), tokens(2, 60)
    out = stepped(model, ids, StreamCache(model), (41, 1), attention_mask=LEFT)
    with torch.no_grad():
        alone = model(ids[:1, 23:], use_cache=False).logits
        full = model(ids[1:], use_cache=False).logits
    # Rotary positions count from the left edge, which shifts queries and keys alike; Transformers' tables are float32.
    torch.testing.assert_close(out[:1, 23:], alone, rtol=0, atol=60 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(out[1:], full, rtol=0, atol=1e-9)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams: int) -> None:
    model, ids = small(), tokens(2, 60)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "num_beams": beams,
        "eos_token_id": None,
        "attention_mask": LEFT,
    }
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **{ARGUMENT: StreamCache(model)}, **options), expected)


def test_crop_takes_tokens_back() -> None:
    model, ids = small(), tokens(1, 60)
    cache = StreamCache(model, rewind=5)
    before = stepped(model, ids[:, :50], cache, (50,))
    stepped(model, tokens(1, 4) + 1, cache, (4,))
    cache.crop(50)
    assert cache.get_seq_length() == 50
    after = stepped(model, ids[:, 50:], cache, (1,))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat([before, after], 1), whole, rtol=0, atol=1e-9)


def test_assisted_generation() -> None:
    model, ids = small(), tokens(1, 30)
    # It takes no token back where all guesses were right, and this assistant's are.
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    cache = StreamCache(model, rewind=8)
    assert torch.equal(model.generate(ids, assistant_model=small(), **{ARGUMENT: cache}, **options), expected)


def test_crop_of_nothing() -> None:
    model, ids = small(), tokens(1, 60)
    cache = StreamCache(model, rewind=8)
    with torch.no_grad():
        whole = model(ids[:, :7], use_cache=False).logits
    before = stepped(model, ids[:, :6], cache, (6,))
    cache.crop(0)
    assert cache.get_seq_length() == 6
    after = stepped(model, ids[:, 6:7], cache, (1,))
    torch.testing.assert_close(torch.cat([before, after], 1), whole, rtol=0, atol=1e-9)


def test_a_cache_holds_no_weights() -> None:
    """Reset, it serves another model; a copy goes on with the weights of the model that it is given to."""
    first, second, ids = small(bias=-1.0), small(bias=-1.0), tokens(1, 60)
    cache = StreamCache(first)
    stepped(first, ids, cache, (60,))
    cache.reset()
    for name, weight in second.named_parameters():
        if "level_bias" in name:
            weight.data.normal_()
    with torch.no_grad():
        whole = second(ids, use_cache=False).logits
    torch.testing.assert_close(stepped(second, ids, cache, (50, 1)), whole, rtol=0, atol=1e-9)
    assert not any(isinstance(x, torch.nn.Module) for x in vars(cache.layers[0]).values())


def test_bytes_grow_by_a_level_when_the_context_doubles() -> None:
    model, sizes = small(), []
    for length in (128, 256, 512):
        cache = StreamCache(model)
        stepped(model, tokens(1, length), cache, (length,))
        sizes.append(cache.nbytes)
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


def test_refusals() -> None:
    model, ids = small(), tokens(1, 20)
    with pytest.raises(ValueError, match=r"StreamCache for attn_implementation='sdpa'.*register"):
        StreamCache(make("Llama"))
    cache = StreamCache(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="only farfield's attention reads it"):
        model(ids, **{ARGUMENT: cache})
    model.set_attn_implementation("farfield")
    with pytest.raises(ValueError, match="keeps no gradients"):
        model(ids, **{ARGUMENT: StreamCache(model)})


def test_what_is_refused_leaves_the_cache_as_it_was() -> None:
    """Learned positions, which would show a length that has moved."""
    model, ids = small("GPT2"), tokens(2, 60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    cache = StreamCache(model)
    with pytest.raises(ValueError, match="keeps no gradients"):
        model(ids[:, :30], **{ARGUMENT: cache})
    assert cache.get_seq_length() == 0
    first = stepped(model, ids[:, :30], cache, (30,))
    with pytest.raises(ValueError, match="rows"):
        stepped(model, ids[:1, 30:], cache, (1,))
    assert cache.get_seq_length() == 30
    rest = stepped(model, ids[:, 30:], cache, (7, 1))
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=0, atol=1e-9)


def test_a_call_that_was_refused_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(), tokens(2, 60)
    cache = StreamCache(model)
    stepped(model, ids[:, :20], cache, (20,))

    def refuse(*_: Any) -> None:
        raise ValueError("not today")

    with monkeypatch.context() as patched:
        patched.setattr(cache.layers[1], "attend", refuse)
        with pytest.raises(ValueError, match="not today"):
            stepped(model, ids[:, 20:27], cache, (7,))
    for size in (7, 1):
        with pytest.raises(ValueError, match="refused half-way"):
            stepped(model, ids[:, 20 : 20 + size], cache, (size,))
    cache.reset()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(stepped(model, ids, cache, (33, 1)), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("before", [None, LEFT[:, :30]], ids=["all", "padded"])
@pytest.mark.parametrize("recipe", ["fma", "dense"])
def test_a_mask_that_changes_what_is_held_is_refused(recipe: str, before: Any) -> None:
    model, ids, cache = small(recipe=recipe), tokens(2, 60), None
    cache = StreamCache(model)
    given = {} if before is None else {"attention_mask": before}
    stepped(model, ids[:, :30], cache, (30,), **given)
    later = torch.ones(2, 40, dtype=torch.long) if before is None else LEFT[:, :40].clone()
    later[1, 11:14] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="cannot hide again"):
        model(ids[:, 30:40], attention_mask=later, use_cache=True, **{ARGUMENT: cache})
    if before is not None:
        with torch.no_grad(), pytest.raises(ValueError, match=r"hid \[23, 0\] .* hides none now"):
            model(ids[:, 30:40], use_cache=True, **{ARGUMENT: cache})
    assert cache.get_seq_length() == 30
    given = {} if before is None else {"attention_mask": LEFT}
    with torch.no_grad():
        rest = model(ids[:, 30:], use_cache=True, **{ARGUMENT: cache}, **given).logits
        whole = model(ids, use_cache=False, **given).logits[:, 30:]
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-9)


def test_padding_between_tokens() -> None:
    """Places in a prefill, none in a stream: refused, but where a token sees by distance alone."""
    mask = LEFT.clone()
    mask[1, 20:24] = 0
    for recipe in ("dense", "fma"):
        model, ids = small(recipe=recipe), tokens(2, 60)
        cache = StreamCache(model)
        if recipe == "fma":
            with pytest.raises(ValueError, match="padding between the tokens of a row"):
                stepped(model, ids, cache, (40, 1), attention_mask=mask)
            assert cache.get_seq_length() == 0
            # At the end of a row it is none yet: a hole when a token follows.
            mask = torch.ones(2, 60, dtype=torch.long)
            mask[1, 20:30] = 0
            stepped(model, ids[:, :30], cache, (30,), attention_mask=mask)
            with torch.no_grad(), pytest.raises(ValueError, match="padding between the tokens of a row"):
                model(ids[:, 30:31], attention_mask=mask[:, :31], use_cache=True, **{ARGUMENT: cache})
        else:
            with torch.no_grad():
                whole = model(ids, attention_mask=mask, use_cache=False).logits
            out = stepped(model, ids, cache, (40, 1), attention_mask=mask)
            shown = mask.bool()
            torch.testing.assert_close(out[shown], whole[shown], rtol=0, atol=60 * torch.finfo(torch.float32).eps)


def test_held_masks_follow_rows_and_lengths() -> None:
    model, ids = small(), tokens(2, 60)
    cache = StreamCache(model, rewind=4)
    stepped(model, ids[:, :40], cache, (40,), attention_mask=LEFT[:, :40])
    cache.crop(37)
    cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        rest = model(ids.flip(0)[:, 37:], attention_mask=LEFT.flip(0), use_cache=True, **{ARGUMENT: cache}).logits
        whole = model(ids.flip(0), attention_mask=LEFT.flip(0), use_cache=False).logits[:, 37:]
    torch.testing.assert_close(rest, whole, rtol=0, atol=60 * torch.finfo(torch.float32).eps)
    with pytest.raises(ValueError, match="rewind=-1"):
        StreamCache(model, rewind=-1)


@pytest.mark.parametrize("rows", [torch.tensor([1]), [1]], ids=["tensor", "list"])
@pytest.mark.parametrize("given", [{}, {"attention_mask": torch.ones(1, 60, dtype=torch.long)}], ids=["none", "all"])
def test_rows_without_padding_may_go_on_alone(rows: Any, given: dict[str, Any]) -> None:
    model, ids = small(), tokens(2, 60)
    cache = StreamCache(model)
    stepped(model, ids[:, :40], cache, (40,), attention_mask=LEFT[:, :40])
    cache.batch_select_indices(rows)
    with torch.no_grad():
        rest = model(ids[1:, 40:], use_cache=True, **{ARGUMENT: cache}, **given).logits
        whole = model(ids[1:], use_cache=False).logits[:, 40:]
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-9)


def test_crop_takes_padding_back_without_tokens() -> None:
    """Row 1 ends three columns early, row 0 begins one column before the end."""
    model, ids = small(), tokens(2, 60)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 27:] = 0
    mask[0, :29] = 0
    cache = StreamCache(model, rewind=4)
    stepped(model, ids[:, :30], cache, (30,), attention_mask=mask)
    cache.crop(27)
    assert cache.get_seq_length() == 27 and cache.layers[0].state.lengths == [0, 27]
    with torch.no_grad():
        rest = model(ids[1:, 27:], use_cache=True, **{ARGUMENT: _alone(cache, 1)}).logits
        whole = model(ids[1:], use_cache=False).logits[:, 27:]
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-9)


def _alone(cache: StreamCache, row: int) -> StreamCache:
    cache.batch_select_indices(torch.tensor([row]))
    return cache


def test_holes_are_refused_by_the_first_layer_for_all() -> None:
    """A sliding layer first, which would take them."""
    model, ids = small("Gemma3Text"), tokens(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 20:24] = 0
    cache = StreamCache(model)
    with pytest.raises(ValueError, match="padding between the tokens of a row"):
        stepped(model, ids, cache, (40,), attention_mask=mask)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0]


def test_a_first_call_that_was_refused_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(), tokens(2, 60)
    cache = StreamCache(model)

    def refuse(*_: Any) -> None:
        raise ValueError("not today")

    with monkeypatch.context() as patched:
        patched.setattr(cache.layers[1], "attend", refuse)
        with pytest.raises(ValueError, match="not today"):
            stepped(model, ids[:, :20], cache, (20,))
    with pytest.raises(ValueError, match="hold 0 and 40 tokens: a call was refused half-way"):
        stepped(model, ids[:, 20:40], cache, (20,))
