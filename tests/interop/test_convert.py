"""Conversion: the budget, what is counted, errors by the operator's own choice, and models that come out of it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")

from farfield.far import ByHead, Expansion, Pyramid  # noqa: E402 (needs what was checked above)
from farfield.interop.transformers import StreamCache, configure, register  # noqa: E402
from farfield.interop.transformers.budget import allocate  # noqa: E402
from farfield.interop.transformers.calibrate import (  # noqa: E402
    centres_of,
    clusters,
    fisher,
    menu_errors,
    near_tokens,
    opened_tokens,
    sampled,
    watched,
)
from farfield.interop.transformers.calibration import Calibration, entry_of  # noqa: E402
from farfield.interop.transformers.convert import convert, save  # noqa: E402
from farfield.interop.transformers.evaluate import Result, cost_of, loss, measure  # noqa: E402
from farfield.interop.transformers.keys import (  # noqa: E402
    context,
    expansion_keys,
    kept_vectors,
    keys_by_head,
    keys_of,
    near_keys,
)
from farfield.interop.transformers.menu import (  # noqa: E402
    BLOCK,
    MENU,
    SINKS,
    Keeps,
    keys_of_setting,
    menu_for,
    setting,
)
from farfield.interop.transformers.streams import ARGUMENT  # noqa: E402
from farfield.interop.transformers.texts import repeating  # noqa: E402
from farfield.near import Blocks, Dense  # noqa: E402
from farfield.ops.expansion import expansion_state  # noqa: E402
from farfield.ops.opened import opened_attention  # noqa: E402
from farfield.ops.opened.tree import make_tree  # noqa: E402
from farfield.ops.state import AttentionState, merge_states  # noqa: E402
from farfield.recipes import Parts  # noqa: E402
from support.tiny_models import answer, make, tokens  # noqa: E402

register()

SMALL = tuple(
    replace(p, sinks=3)
    for p in (
        setting(2, 1, 3),
        setting(2, 4, 3, beam=4, page=1),
        setting(4, 2, 5),
        setting(2, 2, 7, beam=2, page=2),
        setting(2, 2, 5, beam=3, page=1, beam_share=8, recent=12),
    )
)
EXACT = replace(setting(4, 1, 500), sinks=3)
"""Opens everything."""


def heads(number: int, length: int, width: int = 8) -> Tensor:
    return torch.randn(number, length, width)


# The budget


def test_what_is_left_of_a_budget_is_spent() -> None:
    """One dear head does not fit any more; cheaper ones get what is left, most gain for a key first."""
    keys = torch.tensor([1.0, 2.0, 7.0])
    errors = torch.tensor([[9.0, 3.0, 2.0, 9.0], [8.9, 2.9, 1.5, 8.95], [0.0, 2.8, 1.4, 0.0]])[:, None]
    # 4 for all to begin with, 6 more for one of the two dear ones, and 2 that do not buy the other.
    assert allocate(errors, keys, budget=12.0 / 4).tolist() == [[2, 1, 1, 0]]
    assert allocate(errors, keys, budget=11.0 / 4).tolist() == [[2, 0, 1, 0]]


def test_the_allocation_is_the_best_for_what_it_spends() -> None:
    """No choice of all has less error at no more keys; and the budget is used."""
    keys = torch.tensor([1.0, 3.0, 4.0, 9.0])
    errors = torch.rand(4, 2, 2) * torch.tensor([8.0, 3.0, 2.0, 0.0])[:, None, None]
    every = torch.tensor(list(itertools.product(range(4), repeat=4))).view(-1, 2, 2)
    spent = keys[every].mean((1, 2))
    lost = errors[None].expand(len(every), -1, -1, -1).gather(1, every[:, None]).sum((1, 2, 3))
    for budget in (1.0, 2.0, 3.5, 5.0, 9.0):
        choice = allocate(errors, keys, budget=budget)
        used, error = keys[choice].mean(), errors.gather(0, choice[None]).sum()
        assert used <= budget
        assert error <= lost[spent <= used].min() + 1e-6
    for bound in (0.5, 3.0, 20.0):
        choice = allocate(errors, keys, bound=bound)
        used, error = keys[choice].mean(), errors.gather(0, choice[None]).sum()
        assert error <= bound
        assert used <= spent[lost <= error + 1e-6].min() + 1e-6
    assert (allocate(errors, keys, budget=9.0) == 3).all()


def test_few_groups_of_heads_have_what_is_set_apart() -> None:
    """Never more than asked, those that gain most; with budget for all of them, more of them lose less."""
    keys = torch.tensor([1.0, 2.0, 4.0, 5.0])
    errors = torch.rand(4, 2, 4) * torch.tensor([8.0, 6.0, 1.0, 0.0])[:, None, None]
    errors[:2, 0, :2] = 20.0  # one group needs what is set apart
    apart = torch.tensor([False, False, True, True])
    lost = []
    for most in range(5):
        choice = allocate(errors, keys, budget=5.0, apart=apart, shared=2, most=most)
        groups = apart[choice].unflatten(1, (-1, 2)).any(-1)
        assert groups.sum() <= most and (groups[0, 0] or not most)
        lost.append(float(errors.gather(0, choice[None]).sum()))
    assert lost == sorted(lost, reverse=True) and lost[4] < lost[0]
    assert torch.equal(choice, allocate(errors, keys, budget=5.0))
    for budget in (1.5, 2.0, 3.0):
        choice = allocate(errors, keys, budget=budget, apart=apart, shared=2, most=1)
        assert keys[choice].mean() <= budget and apart[choice].unflatten(1, (-1, 2)).any(-1).sum() <= 1
    limited = allocate(errors, keys, bound=45.0, apart=apart, shared=2, most=1)
    assert errors.gather(0, limited[None]).sum() <= 45.0
    with pytest.raises(ValueError, match="least that these settings reach is"):
        allocate(errors, keys, bound=1.0, apart=apart, shared=2, most=1)
    with pytest.raises(ValueError, match="most=1: every setting is apart"):
        allocate(errors, keys, budget=5.0, apart=torch.ones(4, dtype=torch.bool), shared=2, most=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0.5}, "least that can be had is 1.0"),
        ({"bound": 0.5}, "least that these settings reach is 4"),
        ({}, "exactly one"),
        ({"budget": 1.0, "bound": 1.0}, "exactly one"),
    ],
)
def test_what_cannot_be_kept_is_an_error(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(torch.ones(2, 2, 2), torch.tensor([1.0, 2.0]), **given)


# What is counted


@pytest.mark.parametrize("pyramid", SMALL, ids=lambda p: f"{p.rank}-{p.share}-{p.beam_share}-{p.page}")
@pytest.mark.parametrize("length", [5, 40, 101])
def test_keys_are_those_that_the_operator_reads(pyramid: Pyramid, length: int) -> None:
    """Tokens by the masks, cells by the tables of the descent, choices once for every run of queries."""
    pyramid = replace(pyramid, sinks=4)  # a multiple of every page: the count is exact
    positions = torch.arange(length)
    near = near_tokens(length, positions, 8, 4)
    assert near_keys(length, 8, 4) == pytest.approx(near.sum().item() / length)
    q, k = heads(2, length), heads(1, length)
    opened = opened_tokens(q, k, pyramid, positions=positions, block=8, scale=0.5)
    assert not (opened & near).any()
    tokens, cells_read = opened[0].sum().item(), 0
    cell = 8 // pyramid.rank
    page = pyramid.page or cell
    if length > 16:
        tree = make_tree((length,), (8,), (pyramid.rank,), 1, (page,), True, torch.device("cpu"))
        assert tree is not None
        for first in range(length):
            cells = int(tree.top[first // 8].sum())
            if first % (pyramid.beam_share or pyramid.share if page < cell else pyramid.share) == 0:
                cells_read += cells
            if page < cell and first % pyramid.share == 0:
                entered = min(pyramid.beam, cells - min(cells, 4 // cell))
                cells_read += entered * cell // page
    for bounds in (1, 2):
        expected = (tokens + bounds * cells_read) / length
        assert keys_of(pyramid, length, 8, bounds) == pytest.approx(expected)


def test_plain_pyramids_and_layers_are_counted() -> None:
    """A cell of one token each: everything is read once."""
    whole = Pyramid(8, summary="mean", bias=None, levels=1)
    assert near_keys(90, 8, 0) + keys_of(whole, 90, 8) == pytest.approx(context(90))
    parts = Parts(Blocks(8), ByHead((((1,), whole),), sinks=0))
    assert keys_by_head(parts, 3, 90).tolist() == pytest.approx([near_keys(90, 8, 0), context(90), near_keys(90, 8, 0)])
    assert keys_by_head(Parts(Dense()), 2, 90).tolist() == [45.5, 45.5]
    with pytest.raises(ValueError, match="opened on 3 levels"):
        keys_of(replace(SMALL[0], levels=3), 300, 8)


def test_an_expansion_is_counted() -> None:
    """Tokens scored by 3 centres, centres by the query, a cell; as vectors also 3 + 1 matrices of 8 by 8."""
    expansion = Expansion.of((1,), (0.5,), torch.zeros(1, 3, 8))
    alone, some = (Parts(Blocks(8), ByHead(sinks=3, expansions=x)) for x in ((), (expansion,)))
    assert expansion_keys(3, 8) == 3 + 3 + 1
    assert expansion_keys(3, 8, bounds=2) == 3 + 3 + 1 + 4 * 4
    for bounds, expected in ((1, 7.0), (2, 23.0)):
        more = keys_by_head(some, 2, 90, bounds) - keys_by_head(alone, 2, 90, bounds)
        assert more.tolist() == pytest.approx([0.0, expected])
    assert kept_vectors(some, 2, 1, 90) == kept_vectors(alone, 2, 1, 90) + 3 * (8 + 2)


def test_what_centres_keep_is_counted() -> None:
    """Every query its centre's tokens, or all that are far; a decode has them, near ones, and lists of numbers."""
    keeping = Expansion.of((1,), (0.5,), torch.zeros(1, 3, 8), 16)
    alone, some = (Parts(Blocks(8), ByHead(sinks=3, expansions=x)) for x in ((), (keeping,)))
    far = [min(16, max(0, (i // 8 - 1) * 8 - 3)) for i in range(90)]
    more = keys_by_head(some, 2, 90) - keys_by_head(alone, 2, 90)
    assert more.tolist() == pytest.approx([0.0, 7 + sum(far) / 90])
    setting = keys_of_setting(Keeps(3, 16), 90, 8, 3)
    assert keys_by_head(some, 2, 90)[1] == pytest.approx(setting)
    assert kept_vectors(some, 2, 1, 900) == 2 * (3 + 16 + 3 * 16) + 3 * (8 + 2 + 6)
    assert kept_vectors(some, 2, 1, 40) == 2 * (3 + 16 + 29) + 3 * (8 + 2 + 6)  # all that are far
    opened = Parts(Blocks(8), ByHead((((0,), SMALL[1]),), expansions=(keeping,)))
    # Of two key heads each keeps as much as the one with more.
    assert kept_vectors(some, 2, 2, 900) == 2 * 2 * (3 + 16 + 3 * 16) + 3 * (8 + 2 + 6)
    assert kept_vectors(opened, 2, 1, 900) == 2 * 900 + 2 * 225 + 3 * (8 + 2 + 6)


def test_state_is_kept_where_cells_are_opened() -> None:
    parts = Parts(Blocks(8), ByHead((((0, 1), SMALL[1]),), sinks=3))
    # Key head 0 is read by heads 0 and 1: all tokens, bounds of cells of 4 (pages of 1 are the keys themselves); of the
    # other key head sinks and two blocks.
    assert kept_vectors(parts, 4, 2, 800) == 2 * 800 + 2 * 200 + 2 * (3 + 16)
    assert kept_vectors(Parts(Dense()), 4, 2, 800) == 2 * 2 * 800


# Errors


@pytest.mark.parametrize("pyramid", [*SMALL, EXACT], ids=lambda p: f"{p.rank}-{p.share}-{p.beam_share}-{p.page}")
@pytest.mark.parametrize("length", [100, 117])
def test_the_menu_sees_what_the_operator_opens(pyramid: Pyramid, length: int) -> None:
    """Scores and values under the mask give the operator's output and log-sum-exp at the sampled queries."""
    q, k, v = heads(4, length), heads(2, length), heads(2, length)
    positions = sampled(length, 40, torch.Generator().manual_seed(1))
    mask = opened_tokens(q, k, pyramid, positions=positions, block=8, scale=0.7)
    out, lse = opened_attention(
        q[None], k[None], v[None], block=8, rank=pyramid.rank, levels=1, open=pyramid.open, beam=pyramid.beam,
        page=pyramid.page, share=pyramid.share, beam_share=pyramid.beam_share, recent=pyramid.recent, rest="drop",
        choose="bounds", causal=True, scale=0.7, sinks=3, return_lse=True, part="far",
    )  # fmt: skip
    scores = q[:, positions] * 0.7 @ k.repeat_interleave(2, 0).mT
    scores = scores.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(scores.logsumexp(-1), lse[0][:, positions])
    weights = scores.softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 0), out[0][:, positions], rtol=1e-4, atol=1e-5)


def test_errors_are_those_of_the_converted_output() -> None:
    """0.5 d' F d with d from the operator itself; 0 where everything is opened."""
    length = 100
    q, k, v = heads(4, length), heads(2, length), heads(2, length)
    positions = torch.arange(length)
    half = torch.randn(4, 8, 8)
    weight = half @ half.mT
    menu = (None, *SMALL, EXACT, Keeps(3, 5), Keeps(2, 17), Keeps(2, 100))
    biases, centres = (None, 0.7, -2.0), {3: torch.randn(4, 3, 8), 2: torch.randn(4, 2, 8)}
    errors = menu_errors(
        q, k, v, menu, weight, positions=positions, block=8, sinks=3, scale=0.7, biases=biases, centres=centres
    )
    exact = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=0.7, enable_gqa=True
    )
    for row, p in zip(errors, menu, strict=True):
        names = ("rank", "beam", "page", "share", "beam_share", "recent")
        opens = isinstance(p, Pyramid)
        options = {name: getattr(p, name) for name in names} if opens else {}
        of = p if isinstance(p, Keeps) else Keeps(2, 0)
        state = AttentionState(*opened_attention(
            q[None], k[None], v[None], block=8, levels=1, open=p.open if opens else 0, rest="drop",
            choose="bounds", causal=True, scale=0.7, sinks=3, return_lse=True, **options,
        ))  # fmt: skip
        for error, bias in zip(row, biases, strict=True):
            joint = state
            if bias is None and isinstance(p, Keeps):
                assert (error == torch.inf).all()
                continue
            if bias is not None:
                far = expansion_state(
                    q[None], k[None], v[None], centres[of.number], torch.full((4,), bias), block=8, key_mask=None,
                    scale=0.7, sinks=3, open=of.open,
                )  # fmt: skip
                joint = merge_states(state, far)
            d = joint.out[0] - exact[0]
            expected = 0.5 * torch.einsum("hnd,hde,hne->h", d, weight, d) / length
            torch.testing.assert_close(error, expected, rtol=1e-3, atol=1e-5)
    assert (errors[0] > 1e-3).all()
    assert errors[-1, 1:].max() < 1e-6
    with pytest.raises(ValueError, match="without centres"):
        menu_errors(q, k, v, menu, weight, positions=positions, block=8, sinks=3, scale=0.7, biases=biases)


def test_centres_are_means_of_clusters_of_queries() -> None:
    """Points in clumps are found again, whatever is drawn; a head's centres are of its own queries."""
    clumps = torch.tensor([[0.0, 9.0], [7.0, -3.0], [-8.0, -2.0]])
    points = clumps.repeat_interleave(50, 0) + 0.3 * torch.randn(150, 2)
    found = [clusters(points, 3, torch.Generator().manual_seed(seed)) for seed in range(8)]
    exact = [x for x in found if torch.cdist(clumps, x).amin(1).max() < 0.2]
    assert len(exact) >= 4  # a start with two of three points in one clump may stay there
    torch.testing.assert_close(clusters(points, 1, torch.Generator())[0], points.mean(0))
    assert clusters(points[:2], 5, torch.Generator()).isfinite().all()
    model, ids = make("Llama"), [tokens(60), tokens(60)]
    queries: dict[int, list[Tensor]] = {}
    got = centres_of(model, ids, [1], torch.Generator().manual_seed(0))[1]
    with watched(model, lambda layer, q, k, v, out, scale: queries.setdefault(layer, []).append(q[0])):
        for window in ids:
            model(window[None])
    assert got.shape == (2, 4, 1, 8)
    # Fewer queries than are sampled: all of them are.
    expected = torch.stack([torch.cat(queries[layer], 1).mean(1, keepdim=True) for layer in (0, 1)])
    torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-5)


def test_fisher_is_that_of_sampled_labels() -> None:
    """The sum over all tokens of squared gradients, found again for one head by hand."""
    model, ids = make("Llama"), tokens(40)
    got = fisher(model, [ids], torch.Generator().manual_seed(3))
    assert got.shape == (2, 4, 8, 8)
    outs: dict[int, Tensor] = {}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        outs[layer] = out

    with watched(model, keep):
        logits = model(ids[None]).logits[0]
        labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(3))[:, 0]
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        g = torch.autograd.grad(total, outs[1])[0][0, 2]
    torch.testing.assert_close(got[1, 2], g.T @ g / 40)
    assert all(p.requires_grad for p in model.parameters())


def test_models_that_do_not_see_everything_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 0.*no plain causal attention.*sliding_window"):
        convert(make("Mistral"), [tokens(100)], keys=0.5, menu=(None, *SMALL), block=8, queries=8, pieces=1)


# Whole models


def small(**arguments: Any) -> tuple[Any, Any]:
    model = make("Llama")
    menu = (None, *SMALL, EXACT, Keeps(5, 12))
    given: dict[str, Any] = {
        "menu": menu,
        "block": 8,
        "sinks": 3,
        "queries": 16,
        "pieces": 2,
        "centres": (3, 5),
        **arguments,
    }
    numbers = given["centres"]
    given["menu"] = tuple(p for p in given["menu"] if not isinstance(p, Keeps) or p.number in numbers)
    windows = [torch.randint(3, 50, (160,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return model, convert(model, windows, **given)


def test_a_converted_model_keeps_its_budget_and_loads_plainly(tmp_path: Path) -> None:
    steps = []
    model, made = small(keys=0.5, progress=lambda *step: steps.append(step))
    assert steps[0] == ("gradients", 1, 2)
    assert ("centres", 2, 2) in steps
    assert steps[-1] == ("settings", 8, 8)
    assert made.report["keys"] <= 0.5
    assert made.report["estimated_divergence"] == pytest.approx(sum(x["error"] for x in made.report["layers"]))
    cost = cost_of(model, 160)
    assert cost is not None
    assert cost.keys == pytest.approx(made.report["keys"], abs=1e-5)
    save(model, None, made, tmp_path / "out", source="tiny")
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["source"] == "tiny"
    assert report["layers"] == made.report["layers"]
    ids = tokens(1, 160)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="farfield").eval()
    got = answer(again, "farfield", input_ids=ids, use_cache=False)
    assert torch.equal(got, answer(model, "farfield", input_ids=ids, use_cache=False))
    assert not torch.allclose(got, answer(make("Llama"), "eager", input_ids=ids), atol=1e-3)


def test_the_end_of_a_window_repeats_what_stood_before() -> None:
    ids = torch.arange(1000)
    again, start = repeating(ids, torch.Generator().manual_seed(0), tail=0.3, span=32)
    assert start == 700 and len(again) == 1000
    assert torch.equal(again[:700], ids[:700])
    spans = again[700:].split(32)
    assert all(torch.equal(s, s[0] + torch.arange(len(s))) and int(s[-1]) < 700 for s in spans)
    assert len({int(s[0]) for s in spans}) > 5
    short, begin = repeating(ids[:40], torch.Generator().manual_seed(0))
    assert len(short) == 40 and begin == 30


def test_recall_is_counted_among_the_windows() -> None:
    """The estimate with it is a mean over more windows, and more than all windows are not taken again."""
    (_, none), (_, one), (_, all_) = (small(keys=0.5, recall=recall) for recall in (0, 1, 99))
    assert none.report["calibration"]["recall"] == 0 and one.report["calibration"]["recall"] == 1
    assert all_.report["calibration"]["recall"] == all_.report["calibration"]["windows"]
    assert [len(x.calibration.errors) for x in (none, one, all_)] == [1, 2, 2]


def test_recall_weighs_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plain windows of error 1 and one repeating window of error 3: means of the kinds, not of the windows."""
    seen: list[tuple[Tensor, Tensor]] = []

    def errors(
        model: Any, ids: Tensor, menu: Any, weight: Tensor, *, biases: Any, positions: Tensor, **_: Any
    ) -> Tensor:
        seen.append((ids, positions))
        return torch.full((len(menu), len(biases), 2, 4), 1.0 if len(seen) < 3 else 3.0)

    monkeypatch.setattr("farfield.interop.transformers.calibration.window_errors", errors)
    _, made = small(keys=0.5, recall=1)
    kept = made.calibration
    assert (kept.errors[0] == 1.0).all() and (kept.errors[1] == 3.0).all()
    assert [kept.weighed(x)[0, 0, 0, 0].item() for x in (0.0, 0.5, 0.75, 1.0)] == [1.0, 2.0, 2.5, 3.0]
    plain, again = seen[1], seen[2]
    assert torch.equal(plain[0][:120], again[0][:120]) and not torch.equal(plain[0], again[0])
    assert plain[1].min() < 120 <= again[1].min()
    for weight, lost in ((0.0, 1.0), (0.75, 2.5)):
        other = convert(make("Llama"), calibration=kept, keys=0.5, recall_weight=weight)
        inexact = 8 - sum(map(len, other.options["exact"]))
        assert 0 < inexact < 8 and other.report["estimated_divergence"] == pytest.approx(lost * inexact)
    with pytest.raises(ValueError, match=r"recall_weight=1.5: a share from 0 to 1"):
        convert(make("Llama"), calibration=kept, keys=0.5, recall_weight=1.5)


def test_equal_seeds_choose_alike_and_more_keys_lose_less() -> None:
    (_, a), (_, b), (_, c) = small(keys=0.5), small(keys=0.5), small(keys=0.8)
    assert (a.options, a.report) == (b.options, b.report)
    assert torch.equal(a.calibration.errors, b.calibration.errors)
    assert c.report["estimated_divergence"] < a.report["estimated_divergence"]


def test_a_calibration_serves_other_budgets(tmp_path: Path) -> None:
    """Read back, it chooses as the model's own would, whatever is left out of it."""
    _, first = small(keys=0.5)
    first.calibration.save(tmp_path / "c.safetensors")
    kept = Calibration.load(tmp_path / "c.safetensors")
    assert kept.menu == first.calibration.menu
    for changes in ({"keys": 0.5}, {"keys": 0.8}, {"keys": 0.7, "max_share": 1}, {"keys": 0.6, "centres": ()}):
        _, fresh = small(**changes)
        again = convert(make("Llama"), calibration=kept, **{"centres": (3, 5), **changes})
        assert again.options == fresh.options
        assert again.report["keys"] == pytest.approx(fresh.report["keys"])
        assert again.report["estimated_divergence"] == pytest.approx(fresh.report["estimated_divergence"], rel=1e-5)
    other = make("Llama")
    with torch.no_grad():
        next(other.parameters())[-1, -1] += 1
    for model in (other, make("Llama", num_hidden_layers=3), make("Llama", rms_norm_eps=0.1), make("Qwen3")):
        with pytest.raises(ValueError, match="the calibration is of another model"):
            convert(model, calibration=kept, keys=0.5)
    with pytest.raises(ValueError, match=r"centres=\(3, 8\): the calibration has 3, 5 centres"):
        convert(make("Llama"), calibration=kept, keys=0.5, centres=(3, 8))
    with pytest.raises(FileNotFoundError, match="there is no calibration"):
        Calibration.load(tmp_path / "d.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no calibration"):
        Calibration.load(tmp_path / "d.safetensors")
    save_file({"errors": torch.zeros(1)}, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match="is no calibration"):
        Calibration.load(tmp_path / "e.safetensors")
    about = {"farfield.calibration": "{}"}
    save_file({"errors": torch.zeros(1)}, tmp_path / "f.safetensors", metadata=about)
    with pytest.raises(ValueError, match="made by an earlier version; convert again from text"):
        Calibration.load(tmp_path / "f.safetensors")


def test_what_cannot_be_met_is_said_before_the_work_or_keeps_it() -> None:
    told: list[str] = []
    made: list[Calibration] = []
    for refused in ({"keys": 0.05}, {"keys": 0.9, "dense_layers": (0, 1)}, {"keys": 0.45, "dense_layers": (1,)}):
        with pytest.raises(ValueError, match="the least that can be read is"):
            small(**refused, progress=lambda stage, *_: told.append(stage), calibrated=made.append)
    with pytest.raises(ValueError, match=r"nothing is offered with centres=\(\), max_share=1, exact_heads=False"):
        small(
            keys=0.5, exact_heads=False, centres=(), max_share=1, menu=(replace(SMALL[0], share=4),),
            progress=lambda stage, *_: told.append(stage),
        )  # fmt: skip
    assert not told and not made
    with pytest.raises(ValueError, match="the least that these settings reach"):
        small(error=1e-9, exact_heads=False, menu=(None, SMALL[0]), calibrated=made.append)
    (kept,) = made
    again = convert(make("Llama"), calibration=kept, keys=0.6, centres=(3, 5))
    _, fresh = small(keys=0.6, menu=(None, SMALL[0]))
    assert again.report["keys"] == fresh.report["keys"]


def test_what_is_offered_is_what_was_asked_for() -> None:
    """Lists of centres hang on no other query; beside settings a calibration has expansions about its fewest alone."""
    kept = small(keys=0.5)[1].calibration

    def offered(**changes: Any) -> set[tuple[str, bool]]:
        _, made = small(calibration=kept, keys=0.9, **changes)
        kinds = [(row["setting"] or {}, row["expansion"]) for row in made.report["menu"]]
        assert made.report["asked"]["centres"] == sorted(changes.get("centres", (3, 5)))
        return {("keeps" if "number" in s else "share" if s.get("share", 1) > 1 else "own", more) for s, more in kinds}

    everything = {("keeps", True), ("share", True), ("share", False), ("own", True), ("own", False)}
    assert offered() == everything
    assert offered(max_share=1) == everything - {("share", True), ("share", False)}
    assert offered(centres=range(5, 6)) == {("keeps", True), ("share", False), ("own", False)}
    assert offered(centres=(3,)) == everything - {("keeps", True)}
    with pytest.raises(TypeError, match="centres=3: a sequence of numbers"):
        convert(make("Llama"), calibration=kept, keys=0.9, centres=3)
    with pytest.raises(ValueError, match=r"settings of \[4\] centres"):
        menu_errors(*(heads(n, 40) for n in (4, 2, 2)), (Keeps(4, 2),), torch.ones(4, 8, 8), positions=torch.arange(40),
                    block=8, sinks=3, scale=1.0)  # fmt: skip
    with pytest.raises(ValueError, match=r"Keeps\(number=0\): an integer >= 1"):
        Keeps(0, 3)


def test_heads_that_nothing_else_suits_stay_exact() -> None:
    """The dearest in error first, whole contexts in the count; what is left of the budget goes to others."""
    kept = small(keys=0.9)[1].calibration
    kept.errors[:] = torch.rand(kept.errors.shape, generator=torch.Generator().manual_seed(1)) / 100
    kept.errors[:, :, :, 1, 2] += 9.0
    kept.errors[:, :, :, 0, 3] += 5.0
    model, made = small(calibration=kept, keys=0.55)
    assert made.options["exact"][1] == [2] and made.options["exact"][0] == [3]
    number = made.report["layers"][1]["settings"][2]
    assert made.report["menu"][number] == {"setting": {"exact": True}, "expansion": False, "keys": 1.0, "error": 0.0}
    assert 0.5 < made.report["keys"] <= 0.55
    cost = cost_of(model, 160)
    assert cost is not None and cost.keys == pytest.approx(made.report["keys"], abs=1e-5)
    for layer, row in enumerate(made.options["exact"]):
        elsewhere = [h for group in made.options["layers"][layer] for h in group["heads"]]
        elsewhere += [h for x in (made.options.get("expansions") or [[], []])[layer] for h in x["heads"]]
        assert not set(row) & set(elsewhere)
    for declined in ({"retrieval": 0.0}, {"exact_heads": False}):
        _, none = small(calibration=kept, keys=0.55, **declined)
        assert "exact" not in none.options
    # A cache of states, and one of all keys in a model whose heads are all exact or see near tokens alone.
    ids = tokens(1, 160)
    with torch.no_grad():
        whole = model(ids).logits
        cache = StreamCache(model)
        pieces = [model(ids[:, a:b], **{ARGUMENT: cache}).logits for a, b in ((0, 100), (100, 101), (101, 160))]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
        configure(model, "converted", block=8, sinks=3, layers=[[], []], exact=[[3], [0, 2]])
        whole = model(ids).logits
        first = model(ids[:, :100], use_cache=True)
        second = model(
            ids[:, 100:], use_cache=True, **{ARGUMENT: getattr(first, ARGUMENT, None) or first.past_key_values}
        )
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_few_key_heads_keep_all_tokens() -> None:
    """As many as asked for; a cache of those that keep less does not grow with the context."""
    kept = small(keys=0.9)[1].calibration
    kept.errors[:, 1, 0] = 0.0  # a setting that opens cells has no error: every head would like it
    free, *limited = (small(calibration=kept, keys=0.9, retrieval=share) for share in (None, 0.5, 0.25, 0.0))
    found = [made.report["retrieval"] for _, made in limited]
    assert free[1].report["retrieval"] == 1.0 and found == [0.5, 0.25, 0.0]
    lost = [made.report["estimated_divergence"] for _, made in (free, *limited)]
    assert lost == sorted(lost) and lost[-1] > lost[0]
    model, made = limited[-1]
    assert made.options["layers"] == [[], []] and made.report["asked"]["retrieval"] == 0.0
    sizes = []
    for length in (100, 300, 900):
        cache = StreamCache(model)
        with torch.no_grad():
            model(tokens(1, length), **{ARGUMENT: cache})
        sizes.append(cache.nbytes)
    assert sizes[0] <= sizes[1] <= sizes[2] <= sizes[0] * 1.5
    _, made = small(calibration=kept, keys=0.9, retrieval=0.5, dense_layers=(1,))
    assert made.options["layers"] == [[], "dense"] and made.report["retrieval"] == 0.5
    for share, message in ((1.5, "a share of key heads"), (0.4, r"at least 0\.500 would be accepted")):
        with pytest.raises(ValueError, match=message):  # before anything is calibrated
            convert(make("Llama"), [], keys=0.9, retrieval=share, dense_layers=(1,))
    with pytest.raises(ValueError, match="nothing is offered"):
        small(
            calibration=replace(kept, menu=(Keeps(5, 12),) * len(kept.menu)), keys=0.9, centres=(3,), exact_heads=False
        )


def test_an_expansion_helps_and_can_be_left_out() -> None:
    (model, some), (plain, none) = small(keys=0.5, seed=5), small(keys=0.5, seed=5, centres=())
    assert any(some.options["expansions"])
    assert "expansions" not in none.options
    assert none.calibration.centres == {}
    assert some.report["estimated_divergence"] < none.report["estimated_divergence"]
    with torch.no_grad():
        assert not torch.allclose(model(tokens(1, 160)).logits, plain(tokens(1, 160)).logits, atol=1e-4)
    model, made = small(keys=0.7, dense_layers=(1,))
    assert made.options["expansions"][1] == []
    assert model(tokens(1, 30)).logits.isfinite().all()


def test_an_expansion_has_the_centres_and_the_bias_of_its_head() -> None:
    """Centres as calibrated, and the bias with the least error beside the setting that the head was given."""
    kept = small(keys=0.5)[1].calibration
    drawn = torch.rand(kept.errors.shape, generator=torch.Generator().manual_seed(2))
    drawn[:, :, 0, :, 0] = 0.0  # the first head of every layer does better without
    alone = [isinstance(p, Keeps) for p in kept.menu]
    drawn[:, alone, 0] = torch.inf
    drawn[:, alone, 1:, :, 1] = 0.0  # and the second with nothing but an expansion
    kept = replace(kept, errors=drawn)
    _, made = small(calibration=kept, keys=0.4)
    errors, kinds = kept.weighed(0.5), set()
    for layer, entries in enumerate(made.options["expansions"]):
        settings = made.report["layers"][layer]["settings"]
        for entry in entries:
            expansion = Expansion(**{k: tuple(x) if isinstance(x, list) else x for k, x in entry.items()})
            assert torch.equal(expansion.tensor(), kept.centres[expansion.number][layer, entry["heads"]])
            for head, bias in zip(entry["heads"], entry["bias"], strict=True):
                offer = made.report["menu"][settings[head]]
                (place,) = (i for i, p in enumerate(kept.menu) if entry_of(p) == _entry(offer["setting"]))
                assert offer["expansion"]
                assert (expansion.number, expansion.open) == ((5, 12) if alone[place] else (3, 0))
                kinds.add((alone[place], offer["setting"] is None))
                assert bias == kept.biases[1 + int(errors[place, 1:, layer, head].argmin())]
    assert {(True, False), (False, False)} <= kinds
    assert not any(0 in entry["heads"] for entries in made.options["expansions"] for entry in entries)
    assert all(any(1 in x["heads"] and x["open"] for x in entries) for entries in made.options["expansions"])


def _entry(named: dict[str, Any] | None) -> dict[str, Any] | None:
    """A setting of the report as a calibration writes it."""
    return named if named is None or "number" in named else {"heads": [], **named}


def test_a_bound_is_kept_and_dense_layers_stay_exact() -> None:
    model, made = small(error=1e-9, dense_layers=(1,))
    assert made.options["layers"][1] == "dense"
    assert made.report["layers"][1] == {"keys": 1.0, "error": 0.0, "settings": [-1] * 4}
    assert sum(x["error"] for x in made.report["layers"]) <= 1e-9
    _, looser = small(error=0.05, dense_layers=(1,))
    assert 0 < sum(x["error"] for x in looser.report["layers"]) <= 0.05
    ids = tokens(1, 160)
    expected = answer(make("Llama"), "eager", input_ids=ids)
    got = answer(model, "farfield", input_ids=ids)
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_choice_of_ones_own_can_be_decoded() -> None:
    model, _ = small(keys=0.6, max_share=1)
    model.generate(tokens(1, 30), max_new_tokens=2, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys": 0.01}, "least that can be read"),
        ({"keys": 0.5, "dense_layers": (0,)}, "with 1 dense layers of 2: the least that can be read is 0.5"),
        ({"keys": 0.5, "dense_layers": (2,)}, "layers 0 to 1"),
        ({"keys": 12.0}, "a share of the context"),
        ({"keys": 0.5, "error": 0.1}, "exactly one"),
        ({"error": -1.0}, "a divergence > 0"),
        ({"keys": 0.5, "block": 64}, "more than 192 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_perplexity_scores_all_tokens_but_the_first() -> None:
    model, ids = make("Llama"), tokens(700)
    logits = answer(model, "eager", input_ids=ids[None])[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()
    model.set_attn_implementation("sdpa")
    assert loss(model, ids) == pytest.approx(expected, rel=1e-4)
    result = Result()
    for _ in range(2):
        measure(model, ids, result)
    assert result.windows == 2
    assert math.log(result.perplexity) == pytest.approx(expected, rel=1e-4)
    assert 0 < result.attention < result.seconds
    assert result.divergence is None


def test_divergence_is_that_of_the_next_tokens_from_the_original() -> None:
    torch.manual_seed(1)
    original, model, ids = make("Llama"), make("Llama"), tokens(700)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs, ours = (answer(m, "eager", input_ids=ids[None])[0, :-1].log_softmax(-1) for m in (original, model))
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert expected > 1e-3
    result = Result()
    for own in (model, original):
        own.set_attn_implementation("sdpa")
    for own in (model, original):
        measure(own, ids, result, measure(original, ids, Result()))
    assert result.divergences == [pytest.approx(expected, rel=1e-3), pytest.approx(0.0, abs=1e-6)]
    assert result.divergence == pytest.approx(expected / 2, rel=1e-3)


def test_the_menu_is_counted_and_offers_choices_of_ones_own() -> None:
    assert all(p is None or keys_of(p, 8192, 64) > 0 for p in MENU)
    assert any(p is not None and not p.needs_queries for p in MENU)
    assert set(menu_for(8192)) <= set(MENU)
    short = menu_for(512)
    assert 1 < len(short) < len(MENU)
    assert all(p is None or near_keys(512, BLOCK, SINKS) + keys_of(p, 512, BLOCK) < context(512) for p in short)
