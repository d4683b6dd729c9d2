"""Settings by layer and head in a model's config: saved, read by plain from_pretrained, and computed as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")

from farfield.far import Expansion, Pyramid  # noqa: E402
from farfield.interop.transformers import StreamCache, configure, load, register  # noqa: E402
from farfield.interop.transformers.layers import check, group_of  # noqa: E402
from farfield.interop.transformers.streams import ARGUMENT  # noqa: E402
from support.tiny_models import answer, make, tokens  # noqa: E402 (needs what was checked above)

register()

OPENED = {"rank": 4, "levels": 1, "open": 3, "page": 1, "beam": 2, "rest": "drop", "choose": "bounds"}
EVERYTHING = {**OPENED, "open": 4096, "beam": 4096}
"""Opens all pages, which is exact attention."""
EXPANSION = {
    name: list(x) if isinstance(x, tuple) else x
    for name, x in vars(Expansion.of((0, 2, 3), (0.5, 2.0, -1.0), 2 * torch.randn(3, 2, 8))).items()
}
"""As a config holds it."""
KEEPING = {
    name: list(x) if isinstance(x, tuple) else x
    for name, x in vars(Expansion.of((0, 2), (0.5, 2.0), 2 * torch.randn(2, 3, 8), 5)).items()
}
"""One that keeps tokens."""


def converted(*entries: Any, expansions: Any = None, **changes: Any) -> Any:
    model = make("Llama", num_hidden_layers=len(entries), **changes)
    return configure(model, "converted", block=8, sinks=2, layers=list(entries), expansions=expansions)


def test_dense_layers_and_whole_openings_are_exact() -> None:
    ids = tokens(2, 100)
    model = converted("dense", [{"heads": [0, 2], **EVERYTHING}, {"heads": [3, 1], **EVERYTHING, "share": 4}])
    got = answer(model, "farfield", input_ids=ids, use_cache=False)
    torch.testing.assert_close(got, answer(model, "eager", input_ids=ids), rtol=0, atol=1e-4 * got.abs().max().item())


def test_every_layer_has_its_own_settings() -> None:
    ids = tokens(1, 100)
    some, none = [{"heads": [0, 1, 2, 3], **OPENED}], []  # type: ignore[var-annotated]
    outs = [answer(converted(*e), "farfield", input_ids=ids) for e in ((some, none), (none, some), (some, some))]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(outs, outs[1:] + outs[:1], strict=True))


def test_plain_from_pretrained_reads_them(tmp_path: Path) -> None:
    model = converted([{"heads": [0, 3], **OPENED, "share": 2}], "dense", expansions=[[EXPANSION], []])
    ids = tokens(1, 100)
    expected = answer(model, "farfield", input_ids=ids, use_cache=False)
    without = converted([{"heads": [0, 3], **OPENED, "share": 2}], "dense")
    assert not torch.allclose(answer(without, "farfield", input_ids=ids, use_cache=False), expected, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="farfield").eval()
    assert torch.equal(answer(again, "farfield", input_ids=ids, use_cache=False), expected)
    assert torch.equal(answer(load(tmp_path), "farfield", input_ids=ids, use_cache=False), expected)


@pytest.mark.parametrize("expansions", [[], [EXPANSION], [KEEPING]], ids=["alone", "expansion", "kept"])
@pytest.mark.parametrize(
    "entry",
    [[], [{"heads": [1, 2], "rank": 2}], [{"heads": [1, 2], "rank": 2}, {"heads": [3], **OPENED}]],
    ids=["none", "plain", "opened"],
)
def test_a_cache_gives_what_a_prefill_gives(entry: Any, expansions: Any) -> None:
    if expansions == [KEEPING]:
        entry = [{**group, "heads": [h for h in group["heads"] if h not in KEEPING["heads"]]} for group in entry]
    model, ids = converted(entry, expansions=[expansions]), tokens(2, 44)
    cache = transformers.DynamicCache(config=model.config)
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[1, :7] = 0
    with torch.no_grad():
        for start, stop in [(0, 27), (27, 28), (28, 35), *((i, i + 1) for i in range(35, 44))]:
            seen = mask[:, :stop]
            position = (seen.cumsum(-1) - 1).clamp(min=0)
            given = {"attention_mask": seen, "position_ids": position[:, start:]}
            cached = model(ids[:, start:stop], **{ARGUMENT: cache}, **given).logits[:, -1]
            given["position_ids"] = position
            whole = model(ids[:, :stop], use_cache=False, **given).logits[:, -1]
            torch.testing.assert_close(cached, whole, rtol=0, atol=2e-5 * whole.abs().max().item())


def test_a_cached_step_cannot_repeat_a_shared_choice() -> None:
    model, ids = converted([{"heads": [1], **OPENED, "share": 4}]), tokens(1, 40)
    model(ids, use_cache=False)
    with pytest.raises(ValueError, match=r"share=4, recent=0.*StreamCache.*use_cache=False"):
        model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)


def test_decode_states_repeat_a_shared_choice() -> None:
    """The tokens of a cache of decode states are those of whole prefills."""
    some = [{"heads": [1], **OPENED, "share": 4}, {"heads": [0, 3], "rank": 2}]
    model, ids = converted(some, "dense", [], expansions=[[EXPANSION], [], [KEEPING]]), tokens(2, 40)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **{ARGUMENT: StreamCache(model)}, **options), expected)


def test_groups_hold_what_differs_from_the_defaults() -> None:
    far = Pyramid(4, summary="mean", bias=None, sinks=2, levels=1, open=3, rest="drop")
    assert group_of([1, 2], far) == {"heads": [1, 2], "rank": 4, "levels": 1, "open": 3, "rest": "drop"}
    with pytest.raises(ValueError, match="summary='mean', bias=None"):
        group_of([1], Pyramid(4))
    with pytest.raises(ValueError, match="open_bias=None and query_rank=None would be accepted"):
        group_of([1], Pyramid(4, summary="mean", bias=None, open=3, open_bias=-8.0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [[{"heads": [0], "ranks": 2}]]}, ValueError, r"settings \['ranks'\]"),
        ({"layers": ["sparse"]}, ValueError, "'sparse': 'dense' or a list"),
        ({"layers": [[[0, 1]]]}, TypeError, r"\[0, 1\]: a dict with 'heads'"),
        ({"layers": "dense"}, TypeError, "layers of type str"),
        ({"layers": [], "rank": 3}, TypeError, "'rank'"),
        ({"layers": [[]], "expansions": [None, None]}, ValueError, "a list of 1 entries"),
        ({"layers": ["dense"], "expansions": [[EXPANSION]]}, ValueError, "nothing is far there"),
        ({"layers": [[]], "expansions": [EXPANSION]}, TypeError, "are dict: a list of them would be accepted"),
        ({"layers": [[]], "expansions": [[{**EXPANSION, "centres": "?"}]]}, ValueError, "is no base64"),
        (
            {"layers": [[]], "expansions": [[{"heads": [0]}]]},
            ValueError,
            r"has \['heads'\]: heads, bias, number, centres",
        ),
        ({"layers": [[]], "background": [[1.0, None]]}, ValueError, "convert the model again"),
        ({"layers": [[{"heads": [0]}, {"heads": [0]}]]}, ValueError, "more than one place"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check(options)


def test_a_layer_without_settings_is_an_error() -> None:
    model = make("Llama")
    with pytest.raises(ValueError, match="has a layer 1, and settings for 1 layers"):
        configure(model, "converted", layers=["dense"])
