"""What every setting costs every head in accuracy, on text: errors of sampled queries, weighed by how much they matter.

The estimate for a head is 0.5 E[d' F d]: d is the change of the head's output at a sampled query, F the Fisher
information of that output, E[g g'] with g the gradient of the log-probability of labels drawn from the model itself.
Summed over heads it estimates the Kullback-Leibler divergence per token between the original and the converted model,
in nats, as far as errors do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from farfield.far import Pyramid
from farfield.interop.transformers.menu import Keeps, Setting
from farfield.ops.expansion import nearest
from farfield.ops.opened.choose import Bank, descend, make_bank
from farfield.ops.opened.leaders import leaders_at
from farfield.ops.opened.tree import Tree, make_tree
from farfield.parts import repeat_heads

__all__ = [
    "centres_of", "clusters", "fisher", "menu_errors", "near_tokens", "opened_tokens", "sampled", "watched",
    "window_errors",
]  # fmt: skip

EACH = 8192
"""Queries of a head, over all windows, that centres are found among."""

_ROUNDS = 20
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")

Visit = Callable[[int, Tensor, Tensor, Tensor, Tensor, float], None]
"""Called with layer, q [1, Hq, N, D], k and v [1, Hkv, N, D], the layer's output as q, and the scale."""


@contextmanager
def watched(model: Any, visit: Visit) -> Iterator[None]:
    """While open, the model attends exactly, and hands queries, keys, values and outputs of every layer to ``visit``.

    Raises (in the forward pass):
        ValueError: for a layer that does not see its whole causal context (a window, a mask, cross attention).
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        layer = getattr(module, "layer_idx", None)
        asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
        causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
        if asked or attention_mask is not None or layer is None or not causal or query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{type(module).__name__} (layer {layer}) is no plain causal attention over its whole context "
                f"({', '.join(asked) or 'masks, windows or two sequences'}); models of such layers alone are converted"
            )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        visit(layer, query, key, value, out, scale)
        return out.transpose(1, 2), None

    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = function
        model.set_attn_implementation(before)


def fisher(
    model: Any, pieces: Sequence[Tensor], generator: torch.Generator, progress: Callable[[], None] | None = None
) -> Tensor:
    """The Fisher information of every head's output, [layers, heads, D, D] float32.

    Args:
        model: a causal language model.
        pieces: token ids [N] each; gradients of a whole piece are held at once.
        generator: draws the labels.
        progress: called after each piece.
    """
    outs: dict[int, Tensor] = {}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        outs[layer] = out

    total, tokens = None, 0
    needed = [p for p in model.parameters() if p.requires_grad]
    for p in needed:
        p.requires_grad_(False)
    try:
        for ids in pieces:
            outs.clear()
            embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
            with watched(model, keep), torch.enable_grad():
                logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
                chances = logits.detach().softmax(-1)
                labels = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(logits.device)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                grads = torch.autograd.grad(loss, [outs[layer] for layer in sorted(outs)])
            part = torch.stack([torch.einsum("hnd,hne->hde", g[0].float(), g[0].float()) for g in grads])
            total = part if total is None else total + part
            tokens += len(ids)
            if progress is not None:
                progress()
    finally:
        for p in needed:
            p.requires_grad_(True)
    if total is None:
        raise ValueError("no text to calibrate on: at least one piece of token ids is needed")
    return total / tokens


def sampled(length: int, number: int, generator: torch.Generator, start: int = 0) -> Tensor:
    """[number] positions, one drawn from each of as many equal stretches of start .. length - 1, rising."""
    number = min(number, length - start)
    bounds = torch.linspace(start, length, number + 1, dtype=torch.float64)
    place = bounds[:-1] + torch.rand(number, generator=generator, dtype=torch.float64) * bounds.diff()
    return place.long().clamp(max=length - 1)


@torch.no_grad()
def centres_of(
    model: Any,
    windows: Sequence[Tensor],
    numbers: Sequence[int],
    generator: torch.Generator,
    progress: Callable[[], None] | None = None,
) -> dict[int, Tensor]:
    """The centres of every head's queries, [layers, heads, C, D] float32 for every number C of them.

    Args:
        model: a causal language model.
        windows: token ids [N] each; queries from every part of every window are among those clustered.
        numbers: C, centres of a head.
        generator: draws where clusters begin.
        progress: called after each window.
    """
    seen: dict[int, list[Tensor]] = {}
    each = -(-EACH // len(windows))

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        seen.setdefault(layer, []).append(q[0, :, sampled(q.shape[2], each, generator).to(q.device)].float())

    for ids in windows:
        with watched(model, keep):
            model.base_model(ids[None], use_cache=False)
        if progress is not None:
            progress()
    every = [torch.cat(seen[layer], 1) for layer in sorted(seen)]
    return {
        number: torch.stack(
            [torch.stack([clusters(of_head, number, generator) for of_head in of_layer]) for of_layer in every]
        )
        for number in numbers
    }


def clusters(points: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """[number, D] means of clusters of points [n, D]: k-means, from points drawn by ``generator``.

    A cluster that loses all its points keeps its mean; points fewer than clusters come more than once.
    """
    start = torch.randperm(len(points), generator=generator)
    means = points[start.to(points.device)][torch.arange(number) % len(points)]
    for _ in range(_ROUNDS):
        own = nearest(points[None], means[None])[0]
        members = F.one_hot(own, number).to(points.dtype)  # a product: sums in one order on every run
        count, total = members.sum(0)[:, None], members.mT @ points
        means = torch.where(count > 0, total / count.clamp(min=1), means)
    return means


def window_errors(
    model: Any,
    ids: Tensor,
    menu: Sequence[Setting],
    weight: Tensor,
    *,
    positions: Tensor,
    block: int,
    sinks: int,
    biases: Sequence[float | None] = (None,),
    centres: Mapping[int, Tensor] | None = None,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """The estimate of every setting, bias and head on one window, [settings, biases, layers, heads], nats per token.

    Layer by layer inside one forward pass; no queries, keys or values are kept.

    Args:
        model: a causal language model.
        ids: [N] token ids.
        menu: the settings.
        weight: of :func:`fisher`.
        positions: [n] sampled queries.
        block, sinks: of the near field.
        biases, centres: as in :func:`menu_errors`, centres of all layers.
        progress: called after each layer.
    """
    errors: dict[int, Tensor] = {}

    def measure(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        errors[layer] = menu_errors(
            q[0], k[0], v[0], menu, weight[layer], positions=positions, block=block, sinks=sinks, scale=scale,
            biases=biases, centres={number: of[layer].to(q.device) for number, of in (centres or {}).items()},
        )  # fmt: skip
        if progress is not None:
            progress()

    # The body alone: what follows the last layer is not needed.
    with watched(model, measure), torch.no_grad():
        model.base_model(ids[None], use_cache=False)
    return torch.stack([errors[layer] for layer in sorted(errors)], 2)


def menu_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    menu: Sequence[Setting],
    weight: Tensor,
    *,
    positions: Tensor,
    block: int,
    sinks: int,
    scale: float,
    biases: Sequence[float | None] = (None,),
    centres: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """[settings, biases, heads] the estimate 0.5 mean(d' F d) over sampled queries of one layer.

    Args:
        q: [Hq, N, D] queries.
        k, v: [Hkv, N, D].
        menu: settings; None is the near field and the sinks alone.
        weight: [Hq, D, D] F of every head.
        positions: [n] sampled queries.
        block, sinks, scale: of the near field and of the scores.
        biases: of an expansion: of everything far, beside a pyramid or nothing, or of what its centres do not keep.
            None for no expansion, which where centres keep tokens is no setting and has the error inf.
        centres: for every number C of them [Hq, C, D]; the fewest are those of expansions beside pyramids.
    """
    heads, length = q.shape[:2]
    keys, values = (repeat_heads(x[None].float(), heads)[0] for x in (k, v))
    index = torch.arange(length, device=q.device)
    centres = centres or {}
    if not centres and any(bias is not None for bias in biases):
        raise ValueError(f"biases={biases} without centres: an expansion is about something; None would be accepted")
    missing = sorted({p.number for p in menu if isinstance(p, Keeps)} - set(centres))
    if missing:
        raise ValueError(f"settings of {missing} centres, and centres of {sorted(centres)} are given: those are needed")
    query = q[:, positions].float()
    scores = query * scale @ keys.mT
    scores = scores.masked_fill(index > positions[:, None], -torch.inf)
    chances = scores.softmax(-1)  # [Hq, n, N]
    exact = chances @ values
    weight = weight.float()
    near = near_tokens(length, positions, block, sinks)
    far = (index < ((positions // block - 1) * block)[:, None]) & (index >= sinks)
    whole = scores.logsumexp(-1)
    about = {number: _Centred(query, keys, values, of, far, scale) for number, of in centres.items()}
    beside = about[min(about)].left(far.expand_as(scores)) if about else None
    banks: dict[Any, tuple[Tree, Bank] | None] = {}
    errors = []
    for setting in menu:
        seen, cell = near[None], beside
        if isinstance(setting, Keeps):
            kept = about[setting.number].kept(setting.open)
            seen, cell = seen | kept, about[setting.number].left(far & ~kept)
        elif setting is not None:
            seen = seen | opened_tokens(q, k, setting, positions=positions, block=block, scale=scale, banks=banks)
        left = chances * seen
        total = left.sum(-1)
        lost = left @ values - total[..., None] * exact
        # d = (lost + e other) / (total + e) for a cell of mass e, so that three products give every bias.
        plain = torch.einsum("hnd,hde,hne->hn", lost, weight, lost)
        mass, other = (whole.new_full(whole.shape, -torch.inf), torch.zeros_like(exact)) if cell is None else cell
        mass, other = mass - whole, other - exact
        weighed = torch.einsum("hde,hne->hnd", weight, other)
        cross, own = ((x * weighed).sum(-1) for x in (lost, other))
        row = []
        for bias in biases:
            e = torch.zeros_like(mass) if bias is None else (mass + bias).exp()
            of_bias = (0.5 * (plain + e * (2 * cross + e * own)) / (total + e).square()).mean(-1)
            row.append(torch.full_like(of_bias, torch.inf) if bias is None and isinstance(setting, Keeps) else of_bias)
        errors.append(torch.stack(row))
    return torch.stack(errors)


class _Centred:
    """Far tokens about the nearest of some centres of each query, query by query: as farfield.ops.expansion does it.

    Args:
        query: [H, n, D].
        key, value: [H, N, D].
        centres: [H, C, D].
        far: [n, N] bool.
        scale: of the scores.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, centres: Tensor, far: Tensor, scale: float) -> None:
        own = centres.gather(1, nearest(query, centres)[..., None].expand_as(query))
        self.value = value
        self.along = (query - own) * scale @ key.mT
        self.scores = (own * scale @ key.mT).masked_fill(~far, -torch.inf)  # [H, n, N]

    def kept(self, number: int) -> Tensor:
        """[H, n, N] bool: the far tokens with the largest scores at the centre."""
        best = self.scores.topk(min(number, self.scores.shape[-1]), -1).indices
        return torch.zeros_like(self.scores, dtype=torch.bool).scatter_(-1, best, True) & (self.scores > -torch.inf)

    def left(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[H, n] score and [H, n, D] value of the cell of some tokens [H, n, N]; -inf and 0 where there are none."""
        scores = self.scores.masked_fill(~tokens, -torch.inf)
        lse = scores.logsumexp(-1)
        weight = (scores - lse[..., None]).exp().masked_fill(~tokens, 0.0)
        common = (weight * self.along).sum(-1, keepdim=True)
        return lse + common.squeeze(-1), (weight * (1 - common + self.along)) @ self.value


def near_tokens(length: int, positions: Tensor, block: int, sinks: int) -> Tensor:
    """[n, N] bool: what the queries see of blocks and sinks."""
    index = torch.arange(length, device=positions.device)
    row = positions[:, None]
    return (index <= row) & ((index // block >= row // block - 1) | (index < sinks))


def opened_tokens(
    q: Tensor,
    k: Tensor,
    setting: Pyramid,
    *,
    positions: Tensor,
    block: int,
    scale: float,
    banks: dict[Any, tuple[Tree, Bank] | None] | None = None,
) -> Tensor:
    """[Hq, n, N] bool: the tokens that the operator opens for the queries at ``positions``, by its own descent.

    Args:
        q, k: [Hq, N, D], [Hkv, N, D].
        setting: one level, the rest dropped.
        positions, block, scale: as in :func:`menu_errors`.
        banks: remembers what settings with equal cells share, between calls with the same keys.

    Raises:
        ValueError: for a setting that keeps closed cells or has more levels.
    """
    if setting.rest != "drop" or setting.levels != 1 or setting.choose != "bounds" or not setting.open:
        raise ValueError(f"{setting!r}: open > 0, levels=1, rest='drop' and choose='bounds' would be accepted")
    heads, length = q.shape[:2]
    name = setting.rank, setting.page, setting.sinks
    banks = {} if banks is None else banks
    if name not in banks:
        banks[name] = _bank(k, setting, block)
    made = banks[name]
    if made is None:
        return torch.zeros(heads, len(positions), length, dtype=torch.bool, device=q.device)
    tree, bank = made
    beam, beam_share = setting.way
    ahead, own = (leaders_at(q, positions, share, setting.recent) * scale for share in (beam_share, setting.share))
    with torch.no_grad():
        pages = descend(tree, bank, ahead, positions // block, setting.open, beam, False, own).pages
    opened = torch.zeros(heads, len(positions), tree.pages + 1, dtype=torch.bool, device=q.device)
    opened.scatter_(-1, torch.where(pages < 0, tree.pages, pages), True)
    tokens = opened[..., :-1].repeat_interleave(tree.page_tokens, -1)[..., :length]
    return tokens & (torch.arange(length, device=q.device) >= setting.sinks)


def _bank(k: Tensor, setting: Pyramid, block: int) -> tuple[Tree, Bank] | None:
    """What the choice scores, as the operator makes it; None where nothing is far."""
    length = k.shape[1]
    (rank,) = (setting.rank,) if isinstance(setting.rank, int) else setting.rank
    page = (block // rank if setting.page is None else setting.page,)
    if length <= 2 * block:
        return None
    tree = make_tree((length,), (block,), (rank,), 1, page, True, k.device)
    if tree is None:
        return None
    readable = torch.arange(length, device=k.device) >= setting.sinks
    valid = tree.to_pages(readable[None, None].float())[0] > 0
    plain = tree.to_pages(k[None])[0].masked_fill(~valid[..., None], 0.0)
    return tree, make_bank(tree, plain, valid, (), "bounds", setting.count_bias)
