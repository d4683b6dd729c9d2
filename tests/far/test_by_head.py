"""Pyramids by head: one group of all heads is a plain pyramid, no group is the near field, and heads stay apart."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import farfield as ff
from farfield.attention import ReadyAttention
from farfield.far import ByHead, Expansion, Pyramid
from farfield.near import Blocks
from farfield.ops.expansion import expansion_state
from farfield.ops.multipole import multipole_attention
from farfield.ops.state import merge_states
from farfield.parts import Inputs, LayerSpec

SPEC = LayerSpec(dim=24, num_heads=6, num_kv_heads=2, head_dim=4, causal=True, dims=1)
PLAIN = Pyramid(2, summary="mean", bias=None, sinks=3)
OPENED = Pyramid(
    2, summary="mean", bias=None, sinks=3, levels=1, open=3, beam=2, page=2, share=2, rest="drop", choose="bounds"
)


def inputs(number: int = 90, causal: bool = True, **more: Any) -> Inputs:
    q = torch.randn(2, 6, number, 4, dtype=torch.float64)
    k, v = (torch.randn(2, 2, number, 4, dtype=torch.float64) for _ in range(2))
    return Inputs(q=q, k=k, v=v, x=q.new_empty(2, number, 0), grid=(number,), causal=causal, scale=0.9, **more)


def attend(far: Any, given: Inputs) -> Tensor:
    spec = LayerSpec(24, 6, 2, 4, causal=given.causal)
    return ReadyAttention(spec, near=Blocks(8), far=far).double().attend(given)


def cases() -> list[Inputs]:
    mask = torch.rand(2, 90) < 0.8
    bounds = torch.tensor([0, 37, 90])
    return [
        inputs(),
        inputs(causal=False),
        inputs(11),
        inputs(key_mask=mask),
        inputs(cu_seqlens=bounds),
    ]


@pytest.mark.parametrize("pyramid", [PLAIN, OPENED], ids=["plain", "opened"])
def test_one_group_of_all_heads_is_a_plain_pyramid(pyramid: Pyramid) -> None:
    for given in cases():
        expected = attend(pyramid, given)
        torch.testing.assert_close(attend(ByHead((((0, 1, 2, 3, 4, 5), pyramid),)), given), expected)
        # In another order, keys are repeated instead of shared.
        torch.testing.assert_close(attend(ByHead((((5, 0, 2, 1, 4, 3), pyramid),)), given), expected)


def test_every_head_gets_its_own() -> None:
    """Heads of one key head in different groups, some in none."""
    far = ByHead((((4, 0), OPENED), ((3, 1), PLAIN)))
    for given in cases():
        out = attend(far, given)
        near = multipole_attention(
            given.q, given.k, given.v, block=8, rank=1, causal=given.causal, key_mask=given.key_mask,
            cu_seqlens=given.cu_seqlens, scale=given.scale, sinks=3, part="near",
        )  # fmt: skip
        for heads, expected in (([0, 4], attend(OPENED, given)), ([1, 3], attend(PLAIN, given)), ([2, 5], near)):
            torch.testing.assert_close(out[:, heads], expected[:, heads])
        if given.q.shape[2] > 16:
            assert not torch.allclose(out[:, [0, 1, 3, 4]], near[:, [0, 1, 3, 4]])
    torch.testing.assert_close(attend(ByHead(sinks=3), given), near)


def test_gradients_are_those_of_the_heads_alone() -> None:
    given = inputs()
    leaves = [x.requires_grad_() for x in (given.q, given.k, given.v)]
    weight = torch.randn_like(given.q)
    got = torch.autograd.grad((attend(ByHead((((4, 0), OPENED), ((3, 1), PLAIN))), given) * weight).sum(), leaves)
    total: list[Tensor] = []
    for heads, far in (([0, 4], OPENED), ([1, 3], PLAIN), ([2, 5], ByHead(sinks=3))):
        alone = (attend(far, given)[:, heads] * weight[:, heads]).sum()
        grads = torch.autograd.grad(alone, leaves)
        total = list(grads) if not total else [a + b for a, b in zip(total, grads, strict=True)]
    for a, b in zip(got, total, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kept", [False, True], ids=["cell", "kept"])
def test_no_head_sees_the_future(kept: bool) -> None:
    groups = (((4, 0), OPENED), ((1,), PLAIN)) if kept else (((4, 0), OPENED), ((3, 1), PLAIN))
    given, far = inputs(), ByHead(groups, expansions=KEEPING if kept else (EXPANSION,))
    before = attend(far, given)
    given.k[:, :, 50:] += 5.0
    given.v[:, :, 50:] -= 3.0
    after = attend(far, given)
    torch.testing.assert_close(after[:, :, :50], before[:, :, :50])
    assert not torch.allclose(after[:, :, 50:], before[:, :, 50:])


EXPANSION = Expansion.of(
    (0, 2, 3, 5), (0.5, -1.0, 0.0, 1.5), torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(3))
)
KEEPING = (
    Expansion.of((2, 5), (-1.0, 1.5), 2 * torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(4)), 9),
    Expansion.of((3,), (0.0,), torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(5)), 2),
)
"""Centres of two kinds that keep tokens."""


def test_an_expansion_is_one_more_cell_for_its_heads() -> None:
    """Beside near field and groups, in one softmax; the other heads are as without it; packed sequences are apart."""
    far = ByHead((((4, 0), OPENED), ((3, 1), PLAIN)), expansions=(EXPANSION,))
    given = inputs()
    got, without = attend(far, given), attend(replace(far, expansions=()), given)
    torch.testing.assert_close(got[:, [1, 4]], without[:, [1, 4]])
    torch.testing.assert_close(got[:, :, :16], without[:, :, :16])
    assert all(not torch.allclose(got[:, h, 20:], without[:, h, 20:]) for h in EXPANSION.heads)
    packed = attend(far, replace(given, cu_seqlens=torch.tensor([0, 37, 90])))
    for start, stop in ((0, 37), (37, 90)):
        alone = {name: getattr(given, name)[:, :, start:stop] for name in ("q", "k", "v")}
        part = replace(given, **alone, x=given.x[:, start:stop], grid=(stop - start,))
        torch.testing.assert_close(packed[:, :, start:stop], attend(far, part))


@pytest.mark.parametrize("heads", [(0,), (0, 1, 3), (1, 2, 3), (0, 2, 3, 5), (2, 4, 5)], ids=str)
@pytest.mark.parametrize("keep", [0, 7])
def test_a_head_of_a_selection_reads_its_own_keys(heads: tuple[int, ...], keep: int) -> None:
    """Each as if it were the only one that has an expansion, its key head the only one there is."""
    given, centres = inputs(), torch.randn(6, 3, 4)
    far = ByHead(sinks=3, expansions=(Expansion.of(heads, (0.5,) * len(heads), centres[list(heads)], keep),))
    got = attend(far, given)
    for h in heads:
        q, (k, v) = given.q[:, h : h + 1], (x[:, h // 3 : h // 3 + 1] for x in (given.k, given.v))
        near = ReadyAttention(LayerSpec(4, 1, 1, 4, causal=True), near=Blocks(8), far=ByHead(sinks=3))
        alone = replace(given, q=q, k=k, v=v)
        centre = Expansion.of((0,), (0.5,), centres[h : h + 1]).tensor().double()
        states = [
            near.far(alone),
            expansion_state(
                q, k, v, centre, torch.tensor([0.5]), block=8, key_mask=None, scale=0.9, sinks=3, open=keep
            ),
        ]  # type: ignore[misc]
        torch.testing.assert_close(got[:, h], merge_states(*states).out[:, 0])


def test_states_of_other_centres_are_other_states() -> None:
    """A decode state holds sums about the centres, so a layer of others refuses it."""
    layers = [
        ff.Attention(24, 6, num_kv_heads=2, near=Blocks(8), far=ByHead(expansions=(x,)), causal=True).eval()
        for x in (EXPANSION, Expansion.of(EXPANSION.heads, EXPANSION.bias, EXPANSION.tensor() + 1))
    ]
    state = layers[0].stream()
    layers[0].step(torch.randn(1, 30, 24), state)
    with pytest.raises(ValueError, match="state"):
        layers[1].step(torch.randn(1, 1, 24), state)


def test_an_expansion_is_exact_where_far_keys_are_one() -> None:
    """Far keys that are all alike have no spread to expand: the joint softmax is that of exact attention."""
    given = inputs()
    given.k[:] = given.k[:, :, :1]
    far = ByHead(sinks=3, expansions=(Expansion.of(tuple(range(6)), (0.0,) * 6, torch.randn(6, 2, 4)),))
    torch.testing.assert_close(attend(far, given), ReadyAttention(SPEC, near=ff.near.Dense()).attend(given))


def test_an_expansion_is_exact_where_everything_is_kept() -> None:
    given = inputs()
    far = ByHead(sinks=3, expansions=(Expansion.of(tuple(range(6)), (3.0,) * 6, torch.randn(6, 2, 4), 90),))
    torch.testing.assert_close(attend(far, given), ReadyAttention(SPEC, near=ff.near.Dense()).attend(given))


@pytest.mark.parametrize("exact", [(3,), (0, 2, 5), tuple(range(6))], ids=str)
def test_exact_heads_see_everything(exact: tuple[int, ...]) -> None:
    """In every case, and the other heads what they saw without them."""
    others = [head for head in range(6) if head not in exact]
    groups = tuple((tuple(h for h in heads if h in others), p) for heads, p in (((4, 0), OPENED), ((3, 1), PLAIN)))
    groups = tuple((heads, p) for heads, p in groups if heads)
    for given in cases():
        far = ByHead(groups, sinks=3, exact=exact)
        found, plain = attend(far, given), attend(ByHead(groups, sinks=3), given)
        dense = ReadyAttention(LayerSpec(24, 6, 2, 4, causal=given.causal), near=ff.near.Dense()).attend(given)
        torch.testing.assert_close(found[:, list(exact)], dense[:, list(exact)])
        torch.testing.assert_close(found[:, others], plain[:, others])
        module = ReadyAttention(LayerSpec(24, 6, 2, 4, causal=given.causal), near=Blocks(8), far=far).double().far
        state = module(given)
        torch.testing.assert_close(state.out, found)
        weight = (given.q @ given.k.repeat_interleave(3, 1).mT * given.scale).exp()
        order = torch.ones(weight.shape[-2:], dtype=torch.bool).tril() if given.causal else torch.ones(())
        if given.cu_seqlens is None and given.key_mask is None:
            lse = (weight * order).sum(-1).log()
            torch.testing.assert_close(state.lse[:, list(exact)], lse[:, list(exact)])


def test_gradients_of_exact_heads() -> None:
    given = inputs(30)
    for x in (given.q, given.k, given.v):
        x.requires_grad_()
    far, dense = ByHead((((4, 0), OPENED),), exact=(2, 5)), ff.near.Dense()
    of_exact = torch.randn(2, 2, 30, 4, dtype=torch.float64)
    found = [
        torch.autograd.grad(layer.attend(given)[:, [2, 5]], (given.q, given.k, given.v), of_exact)
        for layer in (ReadyAttention(SPEC, near=Blocks(8), far=far).double(), ReadyAttention(SPEC, near=dense).double())
    ]
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def _wide(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


WIDE = {
    "cell": (Expansion.of((0, 2, 3, 5), (0.5, -1.0, 0.0, 1.5), _wide(4, 3, 32)),),
    "kept": (Expansion.of((2, 5), (-1.0, 1.5), _wide(2, 2, 32), 9), Expansion.of((3,), (0.0,), _wide(1, 5, 32), 2)),
    "all heads": (Expansion.of(tuple(range(6)), (0.0,) * 6, _wide(6, 3, 32), 9),),
}
"""For a width that the compiled engine takes."""


@pytest.mark.parametrize("opened", ["none", "opened", "exact"])
@pytest.mark.parametrize("sinks", [0, 3, 11])
@pytest.mark.parametrize("chunk", [1, 5, 33])
@pytest.mark.parametrize("expansions", WIDE.values(), ids=WIDE)
def test_an_expansion_streams_compiled(opened: str, sinks: int, chunk: int, expansions: tuple[Expansion, ...]) -> None:
    """In float32, with tokens taken back across the border of a block, and other ones in their place meanwhile."""
    if opened != "none" and any(1 in x.heads for x in expansions):
        expansions = tuple(x.only(tuple(h for h in x.heads if h != 1)) for x in expansions)
    groups = (((1,), replace(OPENED, sinks=sinks)),) if opened == "opened" else ()
    far = ByHead(groups, sinks=sinks, expansions=expansions, exact=(1,) if opened == "exact" else ())
    layer = ff.Attention(192, 6, num_kv_heads=2, near=Blocks(8), far=far, causal=True, rope=1e4).eval()
    x = torch.randn(2, 75, 192)
    with torch.no_grad():
        whole = layer(x)
        for prompt in (0, 30):
            state, at = layer.stream(2, rewind=7), prompt
            if prompt:
                torch.testing.assert_close(layer.step(x[:, :prompt], state), whole[:, :prompt], rtol=1e-4, atol=1e-5)
            while at < 75:
                if at > 7:
                    layer.step(torch.randn_like(x[:, :7]), state)
                    state.rewind(7)
                stop = min(75, at + chunk)
                got = layer.step(x[:, at:stop], state)
                torch.testing.assert_close(got, whole[:, at:stop], rtol=1e-4, atol=1e-5)
                at = stop


@pytest.mark.parametrize(
    "groups",
    [(), (((4, 0), OPENED), ((3, 1), PLAIN)), (((1,), OPENED), ((4, 0), PLAIN))],
    ids=["near", "opened", "one key head opened"],
)
@pytest.mark.parametrize("sinks", [0, 3, 11])
@pytest.mark.parametrize("chunk", [1, 5, 16, 33])
@pytest.mark.parametrize("expansions", [(EXPANSION,), KEEPING], ids=["cell", "kept"])
def test_an_expansion_streams(groups: Any, sinks: int, chunk: int, expansions: tuple[Expansion, ...]) -> None:
    """In chunks from the first token on, with tokens taken back across the border of a block."""
    apart = {head for x in expansions for head in x.heads if x.open}
    groups = tuple((tuple(h for h in heads if h not in apart), replace(p, sinks=sinks)) for heads, p in groups)
    far = ByHead(groups, sinks=sinks, expansions=expansions)
    layer = ff.Attention(24, 6, num_kv_heads=2, near=Blocks(8), far=far, causal=True, rope=1e4).double().eval()
    x = torch.randn(2, 75, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        for prompt in (0, 30):
            state, at = layer.stream(2, rewind=7), prompt
            if prompt:
                torch.testing.assert_close(layer.step(x[:, :prompt], state), whole[:, :prompt])
            while at < 75:
                if at > 10:
                    layer.step(torch.randn_like(x[:, :7]), state)
                    state.rewind(7)
                stop = min(75, at + chunk)
                torch.testing.assert_close(layer.step(x[:, at:stop], state), whole[:, at:stop])
                at = stop


def test_decoding_keeps_what_somebody_reads() -> None:
    """All tokens of a key head whose cells are opened; of another what is on its heads' lists, at any length."""
    lists = (Expansion.of((3, 4), (0.0, 0.0), _wide(2, 3, 32), 5), Expansion.of((1, 5), (0.0, 0.0), _wide(2, 2, 32), 7))
    groups = (((0,), replace(OPENED, sinks=3)),)
    layer = ff.Attention(192, 6, num_kv_heads=2, near=Blocks(8), far=ByHead(groups, expansions=lists), causal=True)
    sizes = {}
    for length in (40, 400, 4000):
        state = layer.eval().stream()
        layer.step(torch.randn(1, length, 192), state)
        for _ in range(9):
            layer.step(torch.randn(1, 1, 192), state)
        cache = state.caches["far"]
        assert cache["tokens/keys"].shape[1] == 1 and cache["tokens/keys"].shape[2] >= length
        assert cache["near/keys"].shape[1:3] == (1, 3 + 2 * 8)
        # Lists of 2 heads with 3 centres that keep 5 tokens, and of 1 with 2 that keep 7.
        listed = [cache[f"expansion{number}/kept"][0].flatten().tolist() for number in (1, 2)]
        assert [cache[f"expansion{number}/kept"].shape[1] for number in range(3)] == [1, 2, 1]
        kept = {row for rows in listed for row in rows if row >= 0}
        assert sorted(kept) == list(range(cache["kept/keys"].shape[2]))
        sizes[length] = len(kept)
    assert sizes[40] <= 37 and 14 <= sizes[400] <= 44 and 14 <= sizes[4000] <= 44


def test_parameters_belong_to_the_heads_of_a_group() -> None:
    far = ByHead((((0, 1, 3), Pyramid(2)), ((2,), Pyramid(4, summary="mean"))))
    layer = ff.Attention(24, 6, num_kv_heads=2, near=Blocks(8), far=far, causal=True, rope=1e4)
    shapes = {name: tuple(p.shape) for name, p in layer.far.named_parameters()}
    assert shapes["parts.0.level_bias"][1] == 3
    assert shapes["parts.1.level_bias"][1] == 1
    layer(torch.randn(2, 90, 24)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("far", [ByHead((((4, 0), OPENED), ((3, 1), PLAIN))), ByHead(sinks=3)], ids=["some", "none"])
def test_a_streamed_step_equals_the_prefill(far: ByHead) -> None:
    """After a prompt, in single steps and in a longer one, and after tokens were taken back."""
    layer = ff.Attention(24, 6, num_kv_heads=2, near=Blocks(8), far=far, causal=True, rope=1e4).double().eval()
    x = torch.randn(2, 70, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        state = layer.stream(2, rewind=3)
        torch.testing.assert_close(layer.step(x[:, :29], state), whole[:, :29])
        torch.testing.assert_close(layer.step(x[:, 29:41], state), whole[:, 29:41])
        layer.step(torch.randn_like(x[:, :3]), state)
        state.rewind(3)
        for i in range(41, 70):
            torch.testing.assert_close(layer.step(x[:, i : i + 1], state), whole[:, i : i + 1])


def test_parts_compare_and_print() -> None:
    far = ByHead([([0, 1], OPENED)])  # type: ignore[arg-type, list-item]
    assert far == ByHead((((0, 1), OPENED),), sinks=3)
    assert hash(far) == hash(ByHead((((0, 1), OPENED),)))
    assert eval(repr(far), {"ByHead": ByHead, "Pyramid": Pyramid}) == far


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByHead((((0, 1), PLAIN), ((1,), OPENED))), r"heads \[1\] are in more than one place"),
        (lambda: ByHead((((0,), PLAIN), ((1,), Pyramid(2)))), r"sinks of \[0, 3\]"),
        (lambda: ByHead((((0,), PLAIN),), sinks=4), r"sinks of \[3, 4\]"),
        (lambda: ByHead(sinks=-1), r"sinks=-1"),
        (lambda: ByHead((((), PLAIN),)), "one or more numbers"),
        (lambda: ByHead((((6,), PLAIN),)).check(SPEC, Blocks(8)), r"heads \[6\] in a layer of 6"),
        (lambda: ByHead((((0,), PLAIN),)).check(SPEC, ff.near.Dense()), r"use near=Blocks"),
        (lambda: ByHead((((0,), Pyramid(3)),)).check(SPEC, Blocks(8)), "rank=3"),
        (lambda: ByHead(expansions=(EXPANSION,)).check(replace(SPEC, causal=False), Blocks(8)), "causal=False, dims=1"),
        (lambda: ByHead(expansions=(EXPANSION,)).check(replace(SPEC, head_dim=8), Blocks(8)), "4 wide>.* of width 8"),
        (lambda: ByHead(expansions=(EXPANSION,)).check(replace(SPEC, num_heads=4), Blocks(8)), "a layer of 4 heads"),
        (lambda: Expansion.of((1, 0), (0.0, 0.0), torch.zeros(2, 1, 4)), r"heads=\(1, 0\)\): rising"),
        (lambda: Expansion((0,), 0.5, 1, "AAAA"), r"bias=0.5\): a finite number for each of 1 heads"),  # type: ignore[arg-type]
        (lambda: Expansion.of((0,), (math.inf,), torch.zeros(1, 1, 4)), "a finite number for each of 1 heads"),
        (lambda: Expansion.of((0,), (0.0,), torch.full((1, 1, 4), math.nan)), "no finite float16"),
        (lambda: Expansion((0,), (0.0,), 0, "AAAA"), "number=0"),
        (lambda: Expansion((0,), (0.0,), 1, "AAAA", -1), r"open=-1\): a number of tokens"),
        (lambda: ByHead(expansions=EXPANSION), "a tuple of far.Expansion"),  # type: ignore[arg-type]
        (lambda: ByHead(expansions=(EXPANSION, EXPANSION)), r"heads \[0, 2, 3, 5\] are in more than one place"),
        (lambda: ByHead((((3,), PLAIN),), expansions=KEEPING), r"heads \[3\] are in more than one place"),
        (lambda: Expansion((0,), (0.0,), 1, "no base64!"), "is no base64"),
        (lambda: Expansion((0, 1), (0.0, 0.0), 1, "AAAA"), "has 3 bytes.*a multiple of 4"),
        (lambda: ByHead(exact=(2, 1)), r"exact=\(2, 1\)\): rising numbers"),
        (lambda: ByHead((((1,), PLAIN),), exact=(1,)), r"heads \[1\] are in more than one place"),
        (lambda: ByHead(expansions=(EXPANSION,), exact=(2,)), r"heads \[2\] are in more than one place"),
        (lambda: ByHead(exact=(6,)).check(SPEC, Blocks(8)), r"heads \[6\] in a layer of 6"),
        (lambda: ByHead().build(SPEC, Blocks(8)), "merge='softmax'"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()
    with pytest.raises(TypeError, match="pairs"):
        ByHead((((0,), Blocks(8)),))  # type: ignore[arg-type]
