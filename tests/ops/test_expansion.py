"""Everything far in one cell, and what centres keep out of it: definition, gradients, what neither depends on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farfield.ops.compiled import build
from farfield.ops.compiled import expansion as compiled
from farfield.ops.expansion import Asked, ExpansionStream, api, expansion_state, nearest, sift, with_expansions
from farfield.ops.state import AttentionState, merge_states

needs_compiled = pytest.mark.skipif(build.why_not() is not None, reason=f"no compiled engine: {build.why_not()}")


def case(length: int, width: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Queries, keys, values, centres and biases: 2 rows, 6 heads, 2 key heads, 3 centres."""
    q = torch.randn(2, 6, length, width, dtype=dtype)
    k, v = (torch.randn(2, 2, length, width, dtype=dtype) for _ in range(2))
    return q, k, v, torch.randn(6, 3, width, dtype=dtype), torch.randn(6, dtype=dtype)


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, centres: Tensor, bias: Tensor, block: int, mask: Tensor | None, sinks: int,
    open: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loops over queries; scale 0.7."""
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        far = [j for j in range(sinks, max(sinks, (i // block - 1) * block)) if mask is None or mask[b, j]]
        if not far:
            continue
        keys, values = k[b, h // 3, far], v[b, h // 3, far]
        centre = centres[h][(q[b, h, i] - centres[h]).square().sum(-1).argmin()]
        x, scores = 0.7 * (q[b, h, i] - centre), 0.7 * keys @ centre
        order = scores.argsort(descending=True)
        kept, left = order[:open], order[open:]
        joint, rows = 0.7 * keys[kept] @ q[b, h, i], values[kept]
        if len(left):
            keys, values, scores = keys[left], values[left], scores[left]
            weight = scores.softmax(0)
            mean = weight @ keys
            joint = torch.cat([joint, (scores.logsumexp(0) + x @ mean + bias[h])[None]])
            rows = torch.cat([rows, (weight @ values + (weight * ((keys - mean) @ x)) @ values)[None]])
        lse[b, h, i], out[b, h, i] = joint.logsumexp(0), joint.softmax(0) @ rows
    return out, lse


@pytest.mark.parametrize("length", [3, 8, 13, 37, 151])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sinks", "open"), [(0, 0), (3, 0), (7, 0), (0, 1), (3, 6), (7, 50)])
def test_it_is_its_definition(length: int, masked: bool, sinks: int, open: int) -> None:
    q, k, v, centres, bias = case(length)
    for x in (q, k, v):
        x.requires_grad_()
    mask = torch.rand(2, length) < 0.8 if masked else None
    got = expansion_state(q, k, v, centres, bias, block=4, key_mask=mask, scale=0.7, sinks=sinks, open=open)
    out, lse = by_hand(q, k, v, centres, bias, 4, mask, sinks, open)
    torch.testing.assert_close(got.out, out)
    torch.testing.assert_close(got.lse, lse)
    some = lse.isfinite()
    if some.any():
        upstream, of_lse = torch.randn_like(out), torch.randn_like(lse)[some]
        grads = [
            torch.autograd.grad((o * upstream).sum() + (s[some] * of_lse).sum(), (q, k, v))
            for o, s in (got, (out, lse))
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_it_is_exact_to_first_order() -> None:
    """The error against exact attention to what is far falls with the square of the distance from the centre."""
    q, k, v, centres, _ = case(40)
    errors = []
    for size in (0.1, 0.05):
        near = centres.gather(1, nearest(q, centres)[0, :, :, None].expand(-1, -1, 5))
        query = (near + size * (q[:1] - near)).contiguous()
        got = expansion_state(query, k[:1], v[:1], centres, torch.zeros(6), block=4, key_mask=None, scale=0.7, sinks=0)
        scores = 0.7 * query @ k[:1].repeat_interleave(3, 1).mT
        index = torch.arange(40)
        scores = scores.masked_fill(index >= (index // 4 - 1)[:, None] * 4, -torch.inf)[:, :, 8:]
        exact = scores.softmax(-1) @ v[:1].repeat_interleave(3, 1)
        errors.append(
            torch.stack([(got.out[:, :, 8:] - exact).norm(), (got.lse[:, :, 8:] - scores.logsumexp(-1)).norm()])
        )
    ratio = errors[0] / errors[1]
    assert ((ratio > 3.5) & (ratio < 4.5)).all()


@needs_compiled
@pytest.mark.parametrize("shift", [0.0, 50.0], ids=["centred", "shifted"])
@pytest.mark.parametrize(("width", "length"), [(32, 130), (64, 1997), (96, 997)])
@pytest.mark.parametrize("open", [0, 33])
def test_the_compiled_engine_is_as_exact_as_torch(
    width: int, length: int, shift: float, open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, at most twice the error of torch in float32, also where all keys share a large part."""
    given = [2 * x for x in case(length, width, torch.float32)]
    given[1][..., :4] += shift
    mask = torch.rand(2, length) < 0.7

    def run(*tensors: Tensor) -> Tensor:
        q, k, v, centres, bias = tensors
        got = expansion_state(q, k, v, centres, bias, block=64, key_mask=mask, scale=width**-0.5, sinks=4, open=open)
        return torch.cat([got.out, got.lse[..., None]], -1)[:, :, 128:].double()

    calls: list[int] = []
    real = api.expand
    monkeypatch.setattr(api, "expand", lambda **given: (calls.append(1), real(**given))[1])
    exact = run(*(x.double() for x in given))
    assert not calls
    fast = run(*given)
    assert len(calls) == 1
    monkeypatch.setattr(compiled, "WIDTH", 1000)
    slow = run(*given)
    assert len(calls) == 1
    for part in (slice(0, width), slice(width, None)):
        error, of_torch = ((x - exact)[..., part].abs().max().item() for x in (fast, slow))
        assert 0 < error <= 2 * of_torch


@pytest.mark.parametrize("open", [0, 5, 70])
@pytest.mark.parametrize("length", [15, 150, 401])
def test_gradients_of_the_compiled_engine(open: int, length: int) -> None:
    """Those of the same in float64; queries, keys and values alone have any."""
    given = case(length, 32, torch.float32)
    mask = torch.rand(2, length) < 0.8
    grads = []
    for dtype in (torch.float32, torch.float64):
        q, k, v, centres, bias = (x.to(dtype) for x in given)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        got = expansion_state(q, k, v, centres, bias, block=8, key_mask=mask, scale=0.2, sinks=3, open=open)
        weight = torch.randn(got.out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        total = (got.out * weight).sum() + got.lse.masked_fill(got.lse.isinf(), 0.0).square().sum()
        grads.append([g.double() for g in torch.autograd.grad(total, (q, k, v))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@needs_compiled
@pytest.mark.parametrize("shift", [0.0, 50.0], ids=["centred", "shifted"])
@pytest.mark.parametrize(("width", "block", "length"), [(64, 64, 517), (96, 20, 203)])
@pytest.mark.parametrize("open", [0, 33])
def test_gradients_are_as_exact_as_those_of_torch(
    width: int, block: int, length: int, shift: float, open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, at most twice the error of torch in float32, also where all keys share a large part."""
    given = case(length, width, torch.float32)
    given[1][..., :4] += shift
    weight, of_lse = torch.randn(2, 6, length, width), torch.randn(2, 6, length)

    def run(dtype: torch.dtype) -> list[Tensor]:
        q, k, v, centres, bias = (x.to(dtype) for x in given)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        got = expansion_state(q, k, v, centres, bias, block=block, key_mask=None, scale=0.1, sinks=4, open=open)
        total = (got.out * weight.to(dtype)).sum() + (got.lse.masked_fill(got.lse.isinf(), 0.0) * of_lse).sum()
        return [x.double() for x in torch.autograd.grad(total, (q, k, v))]

    exact, fast = run(torch.float64), run(torch.float32)
    monkeypatch.setattr(compiled, "WIDTH", 1000)
    for x, y, of_torch in zip(exact, fast, run(torch.float32), strict=True):
        assert 0 < (y - x).square().mean() <= 4 * (of_torch - x).square().mean()


@needs_compiled
def test_it_does_not_depend_on_the_number_of_threads() -> None:
    """Bit by bit: outputs, gradients, and what a stream is filled with."""
    q, k, v, centres, bias = case(333, 64, torch.float32)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            got = expansion_state(q, k, v, centres, bias, block=32, key_mask=None, scale=0.2, sinks=3, open=20)
            grads = torch.autograd.grad(got.out.sum(), (q, k, v))
            stream = ExpansionStream(32, 3, open=20)
            cache = stream.empty(2, centres, torch.float32, torch.device("cpu"))
            stream.fill(cache, k.detach(), v.detach(), torch.arange(6) // 3, centres, 0.2)
            found.append([*got, *grads, *cache.values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("open", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, open: int) -> None:
    """Of rounded inputs what the same numbers give in float32, to a rounding of float32."""
    given = [x.to(dtype) for x in case(90, 32, torch.float32)]
    options = {"block": 8, "key_mask": None, "scale": 0.2, "sinks": 3, "open": open}
    got = expansion_state(*given, **options)  # type: ignore[arg-type]
    expected = expansion_state(*(x.float() for x in given), **options)  # type: ignore[arg-type]
    assert got.out.dtype == got.lse.dtype == torch.float32
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("open", [0, 9])
def test_values_may_be_of_less_precision(open: int) -> None:
    """As autocast leaves them."""
    q, k, v, centres, bias = case(90, 32, torch.float32)
    options = {"block": 8, "key_mask": None, "scale": 0.2, "sinks": 3, "open": open}
    got = expansion_state(q, k, v.bfloat16(), centres, bias, **options)  # type: ignore[arg-type]
    expected = expansion_state(q, k, v.bfloat16().float(), centres, bias, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_values_of_one_stay_one() -> None:
    q, k, v, centres, bias = case(90)
    v = torch.ones_like(v)
    out = expansion_state(q, k, v, centres, bias, block=8, key_mask=None, scale=0.7, sinks=3).out
    torch.testing.assert_close(out[:, :, 16:], torch.ones_like(out[:, :, 16:]))


def test_one_vector_added_to_all_keys_changes_no_value() -> None:
    q, k, v, centres, bias = case(90)
    first, second = (
        expansion_state(q, x, v, centres, bias, block=8, key_mask=None, scale=0.7, sinks=3) for x in (k, k + 3.0)
    )
    torch.testing.assert_close(first.out, second.out)
    torch.testing.assert_close(second.lse[:, :, 16:], (first.lse + 0.7 * 3.0 * q.sum(-1))[:, :, 16:])


@pytest.mark.parametrize(("width", "dtype"), [(5, torch.float64), (32, torch.float32)], ids=["torch", "compiled"])
@pytest.mark.parametrize("what", [1e6, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("open", [0, 6])
def test_nothing_hangs_on_later_tokens(width: int, dtype: torch.dtype, what: float, open: int) -> None:
    """Bit by bit, though later scores are far larger, or no numbers; and what is hidden may hold anything."""
    q, k, v, centres, bias = case(150, width, dtype)
    mask = torch.rand(2, 150) < 0.8
    options = {"block": 4, "scale": 0.7, "sinks": 2, "open": open}
    first = expansion_state(q, k, v, centres, bias, key_mask=mask, **options)  # type: ignore[arg-type]
    k[:, :, 100:] *= 40
    v[:, :, 100:] = what
    hidden = ~mask[:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)
    second = expansion_state(q, k, v, centres, bias, key_mask=mask, **options)  # type: ignore[arg-type]
    assert torch.equal(first.out[:, :, :108], second.out[:, :, :108])
    assert torch.equal(first.lse[:, :, :108], second.lse[:, :, :108])
    assert second.out.isfinite().all() == (what == 1e6)


@pytest.mark.parametrize("width", [5, 32], ids=["torch", "scores compiled"])
def test_what_is_kept_has_the_largest_scores(width: int) -> None:
    """Among equals the first; every token that is seen is kept or has joined once, and none joins twice."""
    _, k, _, centres, _ = case(90, width, torch.float32)
    k = (2 * k).round() / 2
    k[:, :, 40:60] = k[:, :, 20:40]
    centres = (2 * centres).round() / 2  # sums without rounding: equal scores are equal
    shown = torch.rand(2, 90) < 0.7
    kept, joins = sift(k, centres, shown, block=8, open=5, scale=0.5, units=13)
    for b, h, c in torch.cartesian_prod(*(torch.arange(n) for n in (2, 6, 3))).tolist():
        scores, joined = 0.5 * k[b, h // 3] @ centres[h, c], []
        for unit in range(13):
            far = [j for j in range(max(0, min(90, (unit - 1) * 8))) if shown[b, j]]
            best = sorted(sorted(far, key=lambda j: (-scores[j].item(), j))[:5])
            assert kept[b, h, unit, c].tolist() == best + [-1] * (5 - len(best))
            joined += [j for j in joins[b, h, unit, c].tolist() if j >= 0]
            assert sorted(joined + best) == far


@pytest.mark.parametrize("width", [5, 32], ids=["torch", "compiled"])
@pytest.mark.parametrize("open", [0, 3, 10])
def test_tokens_without_weight_change_nothing(width: int, open: int) -> None:
    """Scores of -inf at the start, in blocks of nothing else, and beside others: no list has them, and no cell."""
    q, k, v, centres, bias = case(90, width, torch.float32)
    centres[..., 0] = 1.0
    q[..., 0] = 1.0
    gone = torch.zeros(90, dtype=torch.bool)
    gone[:20], gone[37:60:2] = True, True
    k[:, :, gone, 0] = -3e38
    kept, joins = sift(k, centres, torch.ones(1, 90) > 0, block=8, open=10, scale=200.0, units=13)
    assert not gone[kept.clamp(min=0)].masked_fill(kept < 0, False).any()
    assert sorted(joins[0, 0, :, 0][joins[0, 0, :, 0] >= 0].tolist() + kept[0, 0, -1, 0].tolist()) == list(range(88))
    options = {"block": 8, "scale": 2.0, "sinks": 0, "open": open}
    got = expansion_state(q, k, v, centres, bias, key_mask=None, **options)  # type: ignore[arg-type]
    expected = expansion_state(q, k, v, centres, bias, key_mask=~gone.expand(2, -1), **options)  # type: ignore[arg-type]
    assert expected.lse[:, :, 16:24].isinf().all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hidden_token_may_hold_anything(dtype: torch.dtype) -> None:
    q, k, v, centres, bias = case(60, 32, dtype)
    mask = torch.rand(2, 60) < 0.8
    mask[:, 0] = False
    options = {"block": 8, "scale": 0.3, "sinks": 0, "open": 6, "key_mask": mask}
    expected = expansion_state(q, k, v, centres, bias, **options)  # type: ignore[arg-type]
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    torch.testing.assert_close(expansion_state(q, k, v, centres, bias, **options), expected)  # type: ignore[arg-type]


def test_the_default_dtype_is_nobodys_business() -> None:
    given = case(60, 32, torch.float32)
    results = []
    for default in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            q, k, v, centres, bias = given
            q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
            got = expansion_state(q, k, v, centres, bias, block=8, key_mask=None, scale=0.3, sinks=0, open=6)
            results.append([*got, *torch.autograd.grad(got.out.sum(), (q, k, v))])
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_compiled
@pytest.mark.parametrize("open", [0, 6])
def test_gradients_of_torch_func(open: int) -> None:
    q, k, v, centres, bias = case(60, 32, torch.float32)

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return expansion_state(q, k, v, centres, bias, block=8, key_mask=None, scale=0.3, sinks=0, open=open).out.sum()

    got = torch.func.grad(total, (0, 1, 2))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for a, b in zip(got, torch.autograd.grad(total(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("prompt", [0, 40])
def test_a_stream_keeps_the_first_of_equal_keys(prompt: int) -> None:
    """As a prefill does, though their values differ."""
    q, k, v, centres, bias = case(151, 64, torch.float32)
    k = k[:, :, torch.randint(5, (151,))]
    options = {"block": 4, "key_mask": None, "scale": 0.2, "sinks": 3, "open": 7}
    whole = expansion_state(q, k, v, centres, bias, **options)  # type: ignore[arg-type]
    in_torch = expansion_state(*(x.double() for x in (q, k, v, centres, bias)), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(whole.out.double(), in_torch.out, rtol=1e-4, atol=1e-5)
    stream, read = ExpansionStream(4, 3, open=7), torch.arange(6) // 3
    cache = stream.empty(2, centres, torch.float32, torch.device("cpu"))
    stream.fill(cache, k[:, :, :prompt], v[:, :, :prompt], read, centres, 0.2)
    for at in range(prompt, 151):
        got = stream.attend(cache, q[:, :, at : at + 1], k, v, read, centres, bias, at // 4, 0.2)
        torch.testing.assert_close(got.out[:, :, 0], whole.out[:, :, at], rtol=1e-4, atol=1e-5)
        if (at + 1) % 4 == 0:
            stream.close(cache, at // 4, k[:, :, : at + 1], v[:, :, : at + 1], read, centres, 0.2, 0)


@pytest.mark.parametrize("prompt", [0, 1, 4, 11, 90, 151])
@pytest.mark.parametrize("open", [0, 1, 7, 200])
@pytest.mark.parametrize(("width", "dtype"), [(5, torch.float64), (32, torch.float32)], ids=["torch", "compiled"])
def test_a_stream_has_the_same_sums(prompt: int, open: int, width: int, dtype: torch.dtype) -> None:
    q, k, v, centres, bias = case(151, width, dtype)
    scale = 0.7 if width == 5 else 0.2
    near = {} if width == 5 else {"rtol": 1e-5, "atol": 1e-5}
    whole = expansion_state(q, k, v, centres, bias, block=4, key_mask=None, scale=scale, sinks=3, open=open)
    stream, read = ExpansionStream(4, 3, open=open), torch.arange(6) // 3
    cache = stream.empty(2, centres, dtype, torch.device("cpu"))
    stream.fill(cache, k[:, :, :prompt], v[:, :, :prompt], read, centres, scale)
    for at in range(prompt, 151):
        got = stream.attend(cache, q[:, :, at : at + 1], k, v, read, centres, bias, at // 4, scale)
        torch.testing.assert_close(got.out[:, :, 0], whole.out[:, :, at], **near)
        torch.testing.assert_close(got.lse[:, :, 0], whole.lse[:, :, at], **near)
        # All heads in one call, into what they have seen already: nothing, and more of the same.
        nothing = AttentionState(torch.zeros_like(got.out), torch.full_like(got.lse, -torch.inf))
        asked = [
            Asked(stream, {n: x[:, of] for n, x in cache.items()}, centres[of], bias[of], tuple(of), k, v, read[of])
            for of in ([1, 4], [0, 2, 3, 5])
        ]
        for before in (nothing, AttentionState(got.out + 1, torch.full_like(got.lse, 0.3))):
            seen = AttentionState(*(x.clone() for x in before))
            joint = with_expansions(seen, q[:, :, at : at + 1], asked, at // 4, scale)
            expected = merge_states(before, got)
            torch.testing.assert_close(joint.out, expected.out, **near)
            torch.testing.assert_close(joint.lse, expected.lse, **near)
        if (at + 1) % 4 == 0:
            first = 0 if open else max(0, at - 7)
            stream.close(cache, at // 4, *(x[:, :, first : at + 1] for x in (k, v)), read, centres, scale, first)


@pytest.mark.parametrize("length", [3, 9, 78])
@pytest.mark.parametrize("open", [0, 6])
@pytest.mark.parametrize(("width", "dtype"), [(5, torch.float64), (32, torch.float32)], ids=["torch", "compiled"])
def test_a_prefix_and_its_blocks_one_by_one_leave_the_same(
    length: int, open: int, width: int, dtype: torch.dtype
) -> None:
    """At every place that can be asked for after tokens were taken back; the largest scores are kept."""
    _, k, v, centres, _ = case(length, width, dtype)
    stream, read = ExpansionStream(4, 3, rewind=9, open=open), torch.arange(6) // 3
    assert stream.places == 4
    filled, closed = (stream.empty(2, centres, dtype, torch.device("cpu")) for _ in range(2))
    stream.fill(filled, k, v, read, centres, 0.2)
    for number in range(length // 4):
        first = 0 if open else max(0, number - 1) * 4
        stream.close(closed, number, k[:, :, first:], v[:, :, first:], read, centres, 0.2, first)
    near = {} if width == 5 else {"rtol": 1e-5, "atol": 1e-5}
    for name, x in filled.items():
        torch.testing.assert_close(x, closed[name], **near)
    blocks = length // 4
    for number in range(max(0, blocks - 4), max(1, blocks)) if open else ():
        tokens, scores = (filled[name][:, :, number % 4] for name in ("kept", "scores"))
        of_all = 0.2 * torch.einsum("bhnd,hcd->bhcn", k.repeat_interleave(3, 1), centres)[..., 3 : max(3, number * 4)]
        best = of_all.topk(min(open, of_all.shape[-1])).values
        assert (tokens >= 0).sum(-1).eq(best.shape[-1]).all()
        torch.testing.assert_close(scores.sort(-1, descending=True).values[..., : best.shape[-1]], best.float())
        found = of_all.gather(-1, tokens[..., : best.shape[-1]] - 3)
        torch.testing.assert_close(found.float(), scores[..., : best.shape[-1]])


def test_a_stream_wants_the_tokens_that_it_adds() -> None:
    _, k, v, centres, _ = case(40, 32, torch.float32)
    read, stream = torch.arange(6) // 3, ExpansionStream(8, 0)
    cache = stream.empty(2, centres, torch.float32, torch.device("cpu"))
    for number, first, stop in ((3, 24, 32), (3, 16, 20)):
        with pytest.raises(ValueError, match=r"blocks 2 to 3 of 8 tokens, of keys \(2, 2, [48], 32\)"):
            stream.close(cache, number, k[:, :, first:stop], v[:, :, first:stop], read, centres, 0.2, first)
    stream = ExpansionStream(8, 0, open=4)
    cache = stream.empty(2, centres, torch.float32, torch.device("cpu"))
    stream.fill(cache, k[:, :, :24], v[:, :, :24], read, centres, 0.2)
    with pytest.raises(ValueError, match=r"kept in rows up to 1[0-5]: rows in front of block 2 of 8 tokens are 0 to 5"):
        stream.close(cache, 3, k[:, :, 10:], v[:, :, 10:], read, centres, 0.2, 10)


@pytest.mark.parametrize("open", [0, 6])
def test_a_stream_reads_tokens_however_they_lie(open: int) -> None:
    """Parts of a larger buffer, tokens before heads, one row for all."""
    _, k, v, centres, _ = case(40, 32, torch.float32)
    stream, read = ExpansionStream(8, 3, open=open), torch.tensor([0, 1, 1, 0, 0, 1])
    k, v = k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1)
    room = [torch.cat([x, torch.full_like(x, torch.nan)], 2)[:, :, :40] for x in (k, v)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    found = []
    for keys, values in ((k.contiguous(), v.contiguous()), room, turned, (k, v)):
        cache = stream.empty(2, centres, torch.float32, torch.device("cpu"))
        for number in range(5):
            stream.close(cache, number, keys, values, read, centres, 0.2, 0)
        found.append(list(cache.values()))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert found[0][0].isfinite().all()


def test_what_the_compiled_step_would_misread_is_refused() -> None:
    q, k, v, centres, bias = case(40, 32, torch.float32)
    stream, read = ExpansionStream(8, 3, open=6), torch.arange(6) // 3
    cache = stream.empty(2, centres, torch.float32, torch.device("cpu"))
    stream.fill(cache, k, v, read, centres, 0.2)
    state = AttentionState(torch.zeros(2, 6, 1, 32), torch.full((2, 6, 1), -torch.inf))
    for name in ("lse", "kept"):
        strided = {**cache, name: torch.stack([cache[name]] * 2, -1)[..., 0]}
        asked = [Asked(stream, strided, centres, bias, tuple(range(6)), k, v, read)]
        if build.why_not() is None:
            with pytest.raises(TypeError, match="contiguous"):
                with_expansions(state, q[:, :, :1], asked, 4, 0.2)
