"""Windowed attention: the index rule, the fast engine against the reference, gradients, operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from farfield.ops.compiled import build
from farfield.ops.state import AttentionState
from farfield.ops.window import window_attention
from farfield.ops.window.plan import window_plan
from farfield.ops.window.reference import axis_mask, window_mask
from farfield.ops.window.torch import window, window_backward

# torch.compile itself instantiates autograd functions to trace them, and warns that this is deprecated.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def _qkv(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, h, tokens, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    return q, k, v


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    dims = draw(st.sampled_from([1, 1, 2, 3]))
    longest = {1: 140, 2: 13, 3: 6}[dims]
    grid = tuple(draw(st.integers(1, longest)) for _ in range(dims))
    window, stride, dilation, causal = [], [], [], []
    for length in grid:
        order = draw(st.booleans())
        step = draw(st.integers(1, 4 if order else min(4, length)))
        size = draw(st.integers(1, length + 5 if order or step == 1 else length // step))
        window.append(size)
        stride.append(draw(st.integers(1, size)))
        dilation.append(step)
        causal.append(order)
    tokens = math.prod(grid)
    bounds = None
    if dims == 1 and (causal[0] or dilation[0] == 1) and draw(st.booleans()):
        bounds = sorted([0, tokens, *draw(st.lists(st.integers(0, tokens), max_size=4))])
    return {
        "grid": grid,
        "window": window,
        "stride": stride,
        "dilation": dilation,
        "causal": causal,
        "bounds": bounds,
        "masked": draw(st.booleans()),
        "dim": draw(st.sampled_from((4, 16))),  # copied, and read in place by the compiled engine
        "heads": draw(st.sampled_from([(1, 1), (2, 1), (4, 2)])),
        "seed": draw(st.integers(0, 10**6)),
    }


@settings(max_examples=160, deadline=None)
@given(_cases(), st.sampled_from(("torch", "compiled")))
def test_the_fast_engines_equal_the_reference(case: dict[str, Any], impl: str) -> None:
    assume(impl == "torch" or build.why_not() is None)
    # One engine computes in float64, the other in float32: errors of a few hundred roundings of sums of O(1) terms.
    dtype = torch.float64 if impl == "torch" else torch.float32
    within = {} if impl == "torch" else {"rtol": 1e-4, "atol": 5e-5}
    heads, kv_heads = case["heads"]
    tokens = math.prod(case["grid"])
    g = torch.Generator().manual_seed(case["seed"])
    q, k, v = _qkv(2, heads, kv_heads, tokens, dim=case["dim"], seed=case["seed"])
    options: dict[str, Any] = {name: case[name] for name in ("grid", "window", "stride", "dilation", "causal")}
    options["key_mask"] = torch.rand(2, tokens, generator=g) < 0.5 if case["masked"] else None
    options["cu_seqlens"] = None if case["bounds"] is None else torch.tensor(case["bounds"])
    want = window_attention(q, k, v, **options, return_lse=True, impl="reference")
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    got = window_attention(*leaves, **options, return_lse=True, impl=impl)
    weights = torch.randn(want.out.shape, generator=g, dtype=torch.float64)
    weights_lse = torch.randn(want.lse.shape, generator=g, dtype=torch.float64)
    empty = want.lse == -torch.inf

    def gradients(state: AttentionState, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        loss = (state.out * weights).sum() + (state.lse.masked_fill(empty, 0.0) * weights_lse).sum()
        return torch.autograd.grad(loss, of)

    torch.testing.assert_close(got.out.double(), want.out, **within)
    torch.testing.assert_close(got.lse.double(), want.lse, **within)
    for a, b in zip(gradients(got, leaves), gradients(want, (q, k, v)), strict=True):
        torch.testing.assert_close(a.double(), b, **within)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 6))
def test_every_row_that_is_not_causal_sees_exactly_the_window(length: int, window: int, stride: int, step: int) -> None:
    step = min(step, length)
    window = min(window, length // step)
    mask = axis_mask(length, window, min(stride, window), step, causal=False)
    assert mask.sum(1).tolist() == [window] * length
    assert mask.diagonal().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(1, 40), st.integers(1, 6))
def test_causal_rows_see_themselves_and_no_future(length: int, window: int, stride: int, step: int) -> None:
    mask = axis_mask(length, window, min(stride, window), step, causal=True)
    assert mask.diagonal().all() and not mask.triu(1).any()
    assert int(mask.sum(1).max()) <= window


def test_known_masks() -> None:
    sliding = axis_mask(6, 3, 1, 1, causal=False)
    assert [row.nonzero().flatten().tolist() for row in sliding] == [
        [0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [3, 4, 5],
    ]  # fmt: skip
    even = axis_mask(6, 2, 1, 1, causal=False)
    assert even[3].nonzero().flatten().tolist() == [2, 3]
    dilated = axis_mask(7, 2, 1, 3, causal=True)
    assert dilated[6].nonzero().flatten().tolist() == [3, 6]
    strided = axis_mask(8, 4, 2, 1, causal=True)
    assert strided[6].nonzero().flatten().tolist() == [4, 5, 6]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_full_window_is_dense_attention(impl: str, causal: bool) -> None:
    q, k, v = _qkv(2, 4, 2, 37)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    for size in (37, 50):
        torch.testing.assert_close(window_attention(q, k, v, window=size, causal=causal, impl=impl), want)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_stride_equal_to_the_window_is_blocked_attention(impl: str) -> None:
    q, k, v = _qkv(1, 2, 2, 8 * 12)
    got = window_attention(q, k, v, grid=(8, 12), window=(4, 3), stride=(4, 3), impl=impl)

    def blocks(x: Tensor) -> Tensor:
        return x.view(1, 2, 2, 4, 4, 3, 4).transpose(3, 4).reshape(1, 2, 8, 12, 4)

    want = F.scaled_dot_product_attention(blocks(q), blocks(k), blocks(v))
    torch.testing.assert_close(blocks(got), want)


def test_dilation_of_length_over_window_is_grid_attention() -> None:
    mask = axis_mask(12, 4, 1, 3, causal=False)
    index = torch.arange(12)
    assert torch.equal(mask, index[:, None] % 3 == index[None, :] % 3)


def test_a_mask_in_2d_is_the_product_of_its_axes() -> None:
    rows, columns = axis_mask(4, 2, 1, 2, False), axis_mask(5, 3, 3, 1, True)
    mask = window_mask((4, 5), (2, 3), (1, 3), (2, 1), (False, True)).view(4, 5, 4, 5)
    assert torch.equal(mask, rows[:, None, :, None] & columns[None, :, None, :])


def test_segments_are_sequences_of_their_own() -> None:
    q, k, v = _qkv(2, 2, 1, 50)
    bounds = [0, 3, 3, 30, 50]
    for causal in (False, True):
        packed = window_attention(q, k, v, window=8, stride=3, causal=causal, cu_seqlens=torch.tensor(bounds))
        alone = [
            window_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], window=8, stride=3, causal=causal)
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
            if b > a
        ]
        torch.testing.assert_close(packed, torch.cat(alone, 2))


def test_hidden_keys_do_not_reach_anybody_and_segments_win() -> None:
    q, k, v = _qkv(1, 1, 1, 20)
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[:, :5] = False
    out, lse = window_attention(q, k, v, window=4, causal=True, key_mask=mask, return_lse=True)
    assert (lse[..., :5] == -torch.inf).all() and not out[:, :, :5].any()
    (grad,) = torch.autograd.grad(out.sum(), v)
    assert not grad[:, :, :5].any() and torch.isfinite(grad).all()
    cu = torch.tensor([0, 20])
    both = window_attention(q, k, v, window=4, causal=True, key_mask=mask, cu_seqlens=cu)
    torch.testing.assert_close(both, window_attention(q, k, v, window=4, causal=True))


def test_long_causal_windows_hide_what_lies_before_the_start() -> None:
    # Enough early tiles to take the path where runs begin before the sequence.
    q, k, v = _qkv(1, 1, 1, 1500, dim=2)
    plan = window_plan((1500,), (1400,), (1,), (1,), (True,), None, torch.device("cpu"))
    assert plan.outside is not None
    got = window_attention(q, k, v, window=1400, causal=True, return_lse=True)
    want = window_attention(q, k, v, window=1400, causal=True, return_lse=True, impl="reference")
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)
    mine = torch.autograd.grad(got.out.square().sum(), (q, k, v))
    for a, b in zip(mine, torch.autograd.grad(want.out.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_masks_are_few_and_work_is_linear() -> None:
    sizes = {}
    for tokens in (1 << 14, 1 << 16):
        plan = window_plan((tokens,), (96,), (1,), (1,), (True,), None, torch.device("cpu"))
        assert plan.row_bias is not None and plan.row_bias.shape[0] <= 4
        sizes[tokens] = plan.table.numel()
        assert plan.table.shape[1] * plan.width <= 2 * 96
        assert plan.query_token is None and plan.key_token is None
    assert sizes[1 << 16] == 4 * sizes[1 << 14]


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "causal": True},
        {"window": 4, "stride": 2, "grid": (3, 4)},
        {"window": 2, "dilation": 2, "key_mask": torch.tensor([[True] * 6 + [False] * 6])},
        {"window": 5, "causal": True, "cu_seqlens": torch.tensor([0, 5, 12])},
    ],
)
def test_gradcheck_with_the_lse(options: dict[str, Any]) -> None:
    q, k, v = _qkv(1, 2, 1, 12, dim=3)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = window_attention(q, k, v, return_lse=True, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    tensors = [x.detach() for x in _qkv(1, 2, 1, 11, dim=4, dtype=torch.float32)]
    tensors += [torch.rand(1, 11) < 0.7 if masked else None, None, None]
    settings = ([11], [4], [1], [1], [True], 0.5, 0.0, "torch")
    torch.library.opcheck(window, (*tensors, *settings))
    out, lse = window(*tensors, *settings)
    grads = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(window_backward, (*grads, out, lse, *tensors, *settings))


@traced
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, False, False)])
@pytest.mark.parametrize("inference", [False, True])
def test_compiles_into_one_graph_with_and_without_gradients(wanted: tuple[bool, ...], inference: bool) -> None:
    mask = torch.rand(1, 20) < 0.7
    tensors = [
        x.detach().requires_grad_(want) for x, want in zip(_qkv(1, 2, 2, 20, dtype=torch.float32), wanted, strict=True)
    ]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = window_attention(q, k, v, window=5, key_mask=mask)
        return window_attention(hidden, hidden, hidden, window=5, causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(not inference):
        got, want = compiled(*tensors), run(*tensors)
    torch.testing.assert_close(got, want)
    assert got.requires_grad == want.requires_grad == (wanted[0] and not inference)
    if got.requires_grad:
        leaves = [x for x in tensors if x.requires_grad]
        mine = torch.autograd.grad(got.square().sum(), leaves)
        for a, b in zip(mine, torch.autograd.grad(want.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_composes_with_torch_func(impl: str) -> None:
    tensors = _qkv(3, 2, 1, 17)
    mask = torch.rand(3, 17) < 0.7

    def loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = window_attention(q, k, v, window=5, causal=True, key_mask=mask, impl=impl)
        return out.square().sum()

    want = torch.autograd.grad(loss(*tensors, mask), tensors)
    plain = [x.detach() for x in tensors]
    by_entry = [x[:, None] for x in (*plain, mask)]

    def total(*tensors: Tensor) -> Tensor:
        return torch.func.vmap(loss)(*(x[:, None] for x in tensors), by_entry[3]).sum()

    found = {
        "grad": torch.func.grad(loss, (0, 1, 2))(*plain, mask),
        "vmap of grad": [g[:, 0] for g in torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*by_entry)],
        "grad of vmap": torch.func.grad(total, (0, 1, 2))(*plain),
        "backward of vmap": torch.autograd.grad(total(*tensors), tensors),
    }
    for name, grads in found.items():
        for a, b in zip(grads, want, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    shared = torch.func.vmap(lambda q: loss(q, plain[1], plain[2], mask))(torch.stack([plain[0], 2 * plain[0]]))
    torch.testing.assert_close(shared[1], loss(2 * plain[0], plain[1], plain[2], mask))


@traced
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 50, 64], "window=9 with dilation=4 spans 36 tokens, but axis 0 has 14"),
        ([0, 50, 60], "must rise from 0 to N=64"),
        ([0, 70, 64], "must rise from 0 to N=64"),
        ([0, 0, 0], "must rise from 0 to N=64"),
    ],
)
def test_compiled_calls_refuse_segments_as_eager_ones_do(bounds: list[int], message: str, grad: bool) -> None:
    q, k, v = (x.detach().requires_grad_(grad) for x in _qkv(1, 1, 1, 64, dtype=torch.float32))

    def run(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return window_attention(q, k, v, window=9, dilation=4, cu_seqlens=cu)

    torch._dynamo.reset()
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        with pytest.raises(Exception, match=message):
            call(q, k, v, torch.tensor(bounds))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("options", [{"causal": True}, {"grid": (5, 8)}, {"dilation": 3}])
def test_hidden_keys_may_hold_anything(impl: str, options: dict[str, Any]) -> None:
    q, k, v = _qkv(2, 2, 1, 40)
    mask = torch.rand(2, 40) < 0.7
    hidden = ~mask[:, None, :, None]

    def run(*tensors: Tensor) -> list[Tensor]:
        state = window_attention(*tensors, window=4, key_mask=mask, impl=impl, return_lse=True, **options)
        loss = state.out.square().sum() + state.lse[state.lse > -torch.inf].sum()
        return [*state, *torch.autograd.grad(loss, tensors)]

    want = run(q, k, v)
    for bad in (torch.nan, torch.inf):
        spoilt = (x.detach().masked_fill(hidden, bad).requires_grad_() for x in (k, v))
        for a, b in zip(run(q, *spoilt), want, strict=True):
            torch.testing.assert_close(a, b)


@traced
def test_one_compiled_graph_for_many_lengths() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return window_attention(q, k, v, window=8, causal=True, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (33, 40, 57):
            q, k, v = _qkv(1, 2, 1, tokens, dtype=torch.float32)
            out, lse = compiled(q, k, v)
            want = run(q, k, v)
            torch.testing.assert_close(out, want[0])
            grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
            for a, b in zip(grads, torch.autograd.grad(want[0].sum() + want[1].sum(), (q, k, v)), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_within_the_error_of_plain_torch(dtype: torch.dtype) -> None:
    q, k, v = _qkv(1, 2, 2, 200, dim=16, dtype=torch.float32)
    mask = axis_mask(200, 40, 1, 1, causal=True)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    low = [x.detach().to(dtype) for x in (q, k, v)]
    plain = F.scaled_dot_product_attention(*low, attn_mask=mask)
    got = window_attention(*low, window=40, causal=True)
    assert got.dtype == dtype
    error, budget = (got - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * budget


def test_autocast_lowers_its_inputs() -> None:
    q, k, v = _qkv(1, 1, 1, 20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        state = window_attention(q, k, v, window=4, return_lse=True)
    assert state.out.dtype == torch.bfloat16 and state.lse.dtype == torch.float32


def test_dropout_is_unbiased_reproducible_and_has_the_right_gradient() -> None:
    q, k, _ = _qkv(1, 2, 2, 64)
    v = torch.ones(1, 2, 64, 4, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    out = window_attention(q, k, v, window=32, dropout=0.5)
    torch.manual_seed(0)
    again = window_attention(q, k, v, window=32, dropout=0.5)
    assert torch.equal(out, again) and not torch.allclose(out, torch.ones_like(out))
    torch.testing.assert_close(out.mean(), torch.ones((), dtype=torch.float64), atol=0.05, rtol=0)
    (grad,) = torch.autograd.grad(out.sum(), v)
    # The output is linear in the values, so the gradient of its sum, weighed by the values, is the sum itself.
    torch.testing.assert_close((grad * v).sum(), out.sum())


def test_uninitialised_buffers_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv(1, 2, 1, 45)
    with torch.no_grad():
        want = window_attention(q, k, v, window=7, stride=3, grid=(9, 5), return_lse=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        state = window_attention(q, k, v, window=7, stride=3, grid=(9, 5), return_lse=True)
        grads = torch.autograd.grad(state.out.sum() + state.lse.sum(), (q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(state.out, want.out)
    assert all(torch.isfinite(g).all() for g in grads)


def _bad(message: str, kind: type[Exception] = ValueError, tokens: int = 12, **options: Any) -> None:
    q, k, v = _qkv(1, 2, 1, tokens)
    with pytest.raises(kind, match=message):
        window_attention(q, k, v, **options)


def test_bad_input_is_refused_with_the_reason() -> None:
    _bad(r"stride=5 exceeds window=4", window=4, stride=5)
    _bad(r"window=\(2, 2\)", window=(2, 2))
    _bad(r"window=0", window=0)
    _bad(r"grid=\(5, 5\) must hold .* product N=12", window=2, grid=(5, 5))
    _bad(
        r"window=4 with dilation=4 spans 16 tokens, but axis 0 has 12; use a dilation of at most 3",
        window=4,
        dilation=4,
    )
    _bad(r"shortest|axis 0 has 4", window=4, dilation=2, cu_seqlens=torch.tensor([0, 8, 12]))
    _bad(r"causal=\(True, False\)", window=2, causal=(True, False))
    _bad(r"dropout=1\.0", window=2, dropout=1.0)
    _bad(r"'reference' has no dropout", window=2, dropout=0.1, impl="reference")
    _bad(r"impl='cuda' is not an engine: reference, torch", window=2, impl="cuda")
    _bad(r"key_mask must be bool \[B, N\] = \[1, 12\]", window=2, key_mask=torch.ones(1, 12))
    _bad(r"cu_seqlens=\[0, 5\]: it must rise from 0 to N=12", window=2, cu_seqlens=torch.tensor([0, 5]))
    _bad(r"must be int32 or int64", window=2, cu_seqlens=torch.tensor([0.0, 12.0]))
    _bad(r"packs 1-D sequences", window=2, grid=(3, 4), cu_seqlens=torch.tensor([0, 12]))
    _bad(r"N >= 1 is needed", window=2, tokens=0)
    q, k, v = _qkv(1, 3, 2, 5)
    with pytest.raises(ValueError, match="Hq must be a multiple of Hkv"):
        window_attention(q, k, v, window=2)
    with pytest.raises(ValueError, match="one shape"):
        window_attention(k, k, v[:, :, :2], window=2)
    with pytest.raises(TypeError, match="give one for all"):
        window_attention(k, k.float(), v, window=2)
    with pytest.raises(ValueError, match=r"\[B, H, N, D\] is needed"):
        window_attention(k[0], k, v, window=2)


@pytest.mark.skipif(build.why_not() is not None, reason=f"no compiled engine: {build.why_not()}")
def test_the_compiled_engine_is_chosen_where_it_can_run() -> None:
    q, k, v = (x.detach() for x in _qkv(1, 2, 1, 200, dim=16, dtype=torch.float32))
    chosen, compiled, plain = (
        window_attention(q, k, v, window=32, causal=True, impl=i) for i in (None, "compiled", "torch")
    )
    assert torch.equal(chosen, compiled) and not torch.equal(chosen, plain)
    with pytest.raises(ValueError, match="float64"):
        window_attention(q.double(), k.double(), v.double(), window=32, impl="compiled")
