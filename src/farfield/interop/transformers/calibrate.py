"""What every setting costs every head in accuracy, on text: errors of sampled queries, weighed by how much they matter.

The estimate for a head is 0.5 E[d' F d]: d is the change of the head's output at a sampled query, F the Fisher
information of that output, E[g g'] with g the gradient of the log-probability of labels drawn from the model itself.
Summed over heads it estimates the Kullback-Leibler divergence per token between the original and the converted model,
in nats, as far as errors do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from farfield.far import Pyramid
from farfield.ops.opened.choose import Bank, descend, make_bank
from farfield.ops.opened.leaders import leaders_at
from farfield.ops.opened.tree import Tree, make_tree
from farfield.parts import repeat_heads

__all__ = ["fisher", "menu_errors", "near_tokens", "opened_tokens", "sampled", "watched", "window_errors"]

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


def window_errors(
    model: Any,
    ids: Tensor,
    menu: Sequence[Pyramid | None],
    weight: Tensor,
    *,
    positions: Tensor,
    block: int,
    sinks: int,
    biases: Sequence[float | None] = (None,),
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
        biases: of a background cell beside the setting; None for no such cell.
        progress: called after each layer.
    """
    errors: dict[int, Tensor] = {}

    def measure(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        errors[layer] = menu_errors(
            q[0], k[0], v[0], menu, weight[layer], positions=positions, block=block, sinks=sinks, scale=scale,
            biases=biases,
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
    menu: Sequence[Pyramid | None],
    weight: Tensor,
    *,
    positions: Tensor,
    block: int,
    sinks: int,
    scale: float,
    biases: Sequence[float | None] = (None,),
) -> Tensor:
    """[settings, biases, heads] the estimate 0.5 mean(d' F d) over sampled queries of one layer.

    Args:
        q: [Hq, N, D] queries.
        k, v: [Hkv, N, D].
        menu: settings; None is the near field and the sinks alone.
        weight: [Hq, D, D] F of every head.
        positions: [n] sampled queries.
        block, sinks, scale: of the near field and of the scores.
        biases: of a background cell beside the setting; None for no such cell.
    """
    heads, length = q.shape[:2]
    keys, values = (repeat_heads(x[None].float(), heads)[0] for x in (k, v))
    index = torch.arange(length, device=q.device)
    scores = q[:, positions].float() * scale @ keys.mT
    scores = scores.masked_fill(index > positions[:, None], -torch.inf)
    chances = scores.softmax(-1)  # [Hq, n, N]
    exact = chances @ values
    # The background relative to all that exact attention sees: log mass without bias, and its value.
    mass, mean = _background(q, k, v, positions, block, sinks, scale)
    mass = mass - scores.logsumexp(-1)
    other = mean - exact
    weighed = torch.einsum("hde,hne->hnd", weight.float(), other)
    near = near_tokens(length, positions, block, sinks)
    banks: dict[Any, tuple[Tree, Bank] | None] = {}
    errors = []
    for setting in menu:
        seen = near[None]
        if setting is not None:
            seen = seen | opened_tokens(q, k, setting, positions=positions, block=block, scale=scale, banks=banks)
        left = chances * seen
        total = left.sum(-1)
        lost = left @ values - total[..., None] * exact
        # d = (lost + e other) / (total + e) for a background of mass e, so that three products give every bias.
        plain = torch.einsum("hnd,hde,hne->hn", lost, weight.float(), lost)
        cross, own = ((x * weighed).sum(-1) for x in (lost, other))
        row = []
        for bias in biases:
            e = torch.zeros_like(mass) if bias is None else (mass + bias).exp()
            row.append(0.5 * ((plain + e * (2 * cross + e * own)) / (total + e).square()).mean(-1))
        errors.append(torch.stack(row))
    return torch.stack(errors)


def _background(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, block: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """[Hq, n] score and [Hq, n, D] value of the background cell, -inf and 0 where nothing is far."""
    start = ((positions // block - 1) * block).clamp(min=sinks)
    count = (start - sinks).float()
    means = []
    for x in (k, v):
        sums = torch.nn.functional.pad(x.double().cumsum(1), (0, 0, 1, 0))
        mean = (sums[:, start] - sums[:, sinks, None]) / count.clamp(min=1)[:, None]
        means.append(repeat_heads(mean.float()[None], len(q))[0])
    score = (q[:, positions].float() * means[0]).sum(-1) * scale + count.log()
    return score, means[1]


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
