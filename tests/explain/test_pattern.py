from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import farfield as ff
from farfield.explain.pattern import EXACT, GLOBAL, UNSEEN, pattern, pattern_of_parts, visibility
from farfield.far.pyramid import Pyramid
from farfield.near.blocks import Blocks
from farfield.near.window import Window
from farfield.ops.window import window_attention
from farfield.recipes import names


def test_dense_sees_all_of_the_past() -> None:
    assert (visibility("dense", 7) == np.where(np.tri(7, dtype=bool), EXACT, UNSEEN)).all()
    assert (visibility("dense", (2, 3), causal=False) == EXACT).all()


def test_a_causal_window_is_a_band() -> None:
    i, j = np.indices((20, 20))
    expected = np.where((j <= i) & (j > i - 6), EXACT, UNSEEN)
    assert (visibility("window", 20, size=6) == expected).all()


def test_the_default_window_reads_as_much_as_fma_reads_exactly() -> None:
    near, window = (pattern(name, 2048, block=16) for name in ("blocks", "window"))
    assert window.exact_per_query == pytest.approx(near.exact_per_query, rel=0.05)


def test_fma_written_out_by_hand() -> None:
    codes = visibility("fma", 32, causal=True, block=4, rank=2)
    # Query 25 is in block 6: blocks 5 and 6 exactly, block 4 (a child of the parent's neighbour) at level 1, blocks 0-3
    # at level 2.
    assert codes[25].tolist() == [2] * 16 + [1] * 4 + [0] * 6 + [-1] * 6


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 70),
    block=st.sampled_from([2, 4, 6]),
    causal=st.booleans(),
    sinks=st.integers(0, 3),
)
def test_fma_is_what_the_operator_computes(n: int, block: int, causal: bool, sinks: int) -> None:
    """Keys of one visible cell share one weight, exact keys have their softmax weight, unseen ones none."""
    seen = pattern_of_parts("fma", Blocks(block), Pyramid(2, sinks=sinks), (n,), causal)
    generator = torch.Generator().manual_seed(n)
    q, k = torch.randn(2, 1, 1, n, 8, dtype=torch.float64, generator=generator)
    weights = ff.effective_weights(q, k, block=block, rank=2, causal=causal, sinks=sinks)[0, 0].numpy()
    assert ((weights > 0) == (seen.codes != UNSEEN)).all()
    exact = (q[0, 0] @ k[0, 0].T / np.sqrt(8)).exp().numpy()
    for row in range(n):
        near = np.flatnonzero(seen.codes[row] == EXACT)
        ratio = weights[row, near] / exact[row, near]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
        for level in seen.levels:
            there = np.flatnonzero(seen.codes[row] == level)
            for cell in np.unique(seen.cells[level - 1][there]):
                together = weights[row, there[seen.cells[level - 1][there] == cell]]
                np.testing.assert_allclose(together, together[0], rtol=1e-9)


@pytest.mark.parametrize("grid", [(11, 7), (16, 16), (5, 6, 7)])
def test_every_token_is_seen_once_on_grids(grid: tuple[int, ...]) -> None:
    seen = pattern("fma", grid, causal=False, block=2, rank=1)
    assert (seen.codes >= 0).all()
    expected = ff.effective_weights(
        *torch.randn(2, 1, 1, seen.tokens, 4), grid=grid, block=2, rank=1, causal=False
    )  # fmt: skip
    assert (expected > 0).all()


@pytest.mark.parametrize(
    ("grid", "size", "stride", "dilation", "causal"),
    [
        ((23,), 5, 1, 1, True),
        ((23,), 6, 1, 1, False),
        ((23,), 6, 3, 1, True),
        ((23,), 4, 4, 1, False),
        ((23,), 5, 2, 3, False),
        ((23,), 3, 1, 4, True),
        ((9, 7), (3, 4), (1, 2), (2, 1), False),
        ((4, 5, 3), 3, 1, 1, False),
        ((4,), 9, 1, 1, False),
    ],
)
def test_windows_are_what_the_operator_reads(
    grid: tuple[int, ...], size: int, stride: int, dilation: int, causal: bool
) -> None:
    seen = pattern_of_parts("window", Window(size, stride, dilation), None, grid, causal).codes == EXACT
    n = len(seen)
    q, k = torch.randn(2, 1, 1, n, n)
    values = torch.eye(n)[None, None]
    out = window_attention(
        q, k, values, window=size, grid=grid, stride=stride, dilation=dilation, causal=causal
    )  # fmt: skip
    assert ((out[0, 0].numpy() > 0) == seen).all()


def test_landmarks_and_states_are_marked() -> None:
    agents = pattern("agent", (6, 6), causal=False, count=2)
    assert set(np.unique(agents.codes)) == {EXACT, GLOBAL}
    assert agents.landmarks == 4
    assert (visibility("l2vit", 20, layer=1)[19] == GLOBAL).all()
    chunks = pattern("transformer_ls", 64, block=8, rank=2)
    assert chunks.codes[20, 3] == GLOBAL
    assert chunks.codes[20, 20] == EXACT
    assert chunks.landmarks == pytest.approx(2 * 3.5)


def test_summaries_are_counted() -> None:
    seen = pattern("fma", 64, causal=False, block=8, rank=2)
    # The first block: itself and its neighbour exactly, groups 2 and 3 of level 1, then groups 2 and 3 of level 2.
    assert seen.levels == [1, 2]
    row = seen.codes[0]
    assert [(row == code).sum() for code in (0, 1, 2)] == [16, 16, 32]
    single = pattern_of_parts("one", Blocks(8), Pyramid(2), (64,), False)
    assert single.summaries_per_query == pytest.approx(
        np.mean([sum(len(np.unique(single.cells[i - 1][r == i])) for i in (1, 2)) for r in single.codes])
    )


@pytest.mark.parametrize("name", names())
def test_every_recipe_has_a_picture(name: str) -> None:
    recipe = ff.recipes.get(name)
    for layer in (0, 1):
        shape = {1: 40, 2: (5, 8), 3: (2, 4, 5)}[recipe.dims[0]]
        codes = visibility(name, shape, causal=recipe.causal, layer=layer)
        assert (codes != UNSEEN).any(1).all()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", names())
def test_pictures_are_what_outputs_depend_on(name: str, layer: int) -> None:
    """A query's output depends on the keys or values of the tokens that its row shows, and on no others."""
    recipe = ff.recipes.get(name)
    grid = {1: (29,), 2: (9, 11), 3: (3, 5, 6)}[recipe.dims[-1] if recipe.dims != (1, 2, 3) else 2]
    small = {"size": 3, "block": 2, "rank": 1, "cell": 2, "reach": 1, "every": 2, "count": 2, "window": 3, "ring": 1}
    small["stride"] = 2
    known = recipe.options(len(grid))
    options = {option: value for option, value in small.items() if option in known}
    built = ff.recipes.build(name, 8, 2, dims=len(grid), layer=layer, **options).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # no start of zeros hides a path
    codes = visibility(name, grid, causal=False, layer=layer, **options)
    tokens = len(codes)
    inputs = built._inputs(torch.randn(1, tokens, 8, dtype=torch.float64), grid, None, None)
    # Of one sign, so that no feature map cuts a pair off.
    inputs.q = inputs.q.detach().abs()
    inputs.k, inputs.v = (t.detach().abs().requires_grad_() for t in (inputs.k, inputs.v))
    out = built.attend(inputs)
    for row in (0, tokens // 2, tokens - 1):
        loss = out[0, :, row].square().sum()
        grads = torch.autograd.grad(loss, (inputs.k, inputs.v), retain_graph=True, allow_unused=True)
        read = sum(g[0].abs().sum((0, 2)) for g in grads if g is not None)
        assert isinstance(read, torch.Tensor)
        # A Fourier transform leaves rounding errors where nothing is read.
        assert ((read > 1e-12 * read.max()).numpy() == (codes[row] != UNSEEN)).all()


def test_causal_pictures_hide_the_future() -> None:
    for name in names():
        if ff.recipes.get(name).causal:
            codes = visibility(name, 50, layer=0)
            assert (codes[~np.tri(50, dtype=bool)] == UNSEEN).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fmaa", 64), "did you mean 'fma'"),
        (("fma", 0), "axis lengths"),
        (("fma", 9000), "at most 8,192"),
        (("fma", (8, 8), True), "1-D"),
        (("agent", 64, True), "causal"),
    ],
)
def test_bad_input_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pattern(*arguments)  # type: ignore[arg-type]


def test_an_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(TypeError, match="rank"):
        pattern("fma", 64, blok=8)
