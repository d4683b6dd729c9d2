"""Vision transformers of Transformers with farfield over their grid of patches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from farfield.interop.grids import GridAttention, grid_options  # noqa: E402
from farfield.interop.transformers import configure, load  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
KINDS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "vit": ("ViTConfig", "ViTModel", {}, 1),
    "deit": ("DeiTConfig", "DeiTModel", {}, 2),
    "dinov2": ("Dinov2Config", "Dinov2Model", {"mlp_ratio": 2}, 1),
    "registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"num_register_tokens": 3}, 4),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 2}, 3),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", {}, 1),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {}, 0),
    "ijepa": ("IJepaConfig", "IJepaModel", {}, 0),
}


def make(kind: str, **changes: Any) -> Any:
    """A random model in evaluation mode, its weights large enough that attention is far from uniform."""
    config, name, options, _ = KINDS[kind]
    transformers.set_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**{**SIZES, **options, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def hidden(model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
    """The last hidden state."""
    with torch.no_grad():
        out: Tensor = model(pixel_values=pixels, **arguments).last_hidden_state
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_exact_limit_and_prefix(kind: str) -> None:
    """Blocks of half the image leave no far field: the model's own answer. Smaller ones change it."""
    model, pixels = make(kind), torch.randn(2, 3, 32, 32)
    want = hidden(model, pixels)
    configure(model, "fma2d", dims=2, block=4)
    torch.testing.assert_close(hidden(model, pixels), want, rtol=1e-4, atol=1e-4)
    configure(model, "fma2d", dims=2, block=2, rank=1)
    assert (hidden(model, pixels) - want).abs().max() > 1e-3
    attention = model.get_submodule(next(n for n, m in model.named_modules() if n.endswith("farfield"))).attention
    assert attention.prefix == KINDS[kind][3]


@pytest.mark.parametrize("recipe", ["dense", "window", "na", "swin", "fma2d", "fma"])
def test_another_size_of_image(recipe: str) -> None:
    """A wider image has another grid; `dense` stays the model's own attention there."""
    model, pixels = make("vit"), torch.randn(1, 3, 40, 96)
    want = hidden(model, pixels, interpolate_pos_encoding=True)
    options = {"window": {"size": 7}, "fma": {"block": 2, "rank": 1}, "fma2d": {"block": 2, "rank": 1}}
    configure(model, recipe, dims=2, **options.get(recipe, {}))
    got = hidden(model, pixels, interpolate_pos_encoding=True)
    assert got.shape == (1, 1 + 10 * 24, 32) and got.isfinite().all()
    if recipe == "dense":
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    else:
        assert (got - want).abs().max() > 1e-3


def random(prefix: int, grid: tuple[int, int], heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    tokens = prefix + grid[0] * grid[1]
    return tuple(torch.randn(1, heads, tokens, 8, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def weights(attention: GridAttention, q: Tensor, k: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1, H, N, N] effective weights: the answer to one-hot values."""
    tokens = q.shape[2]
    one = torch.eye(tokens, dtype=q.dtype).expand(1, k.shape[1], tokens, tokens)
    padded = torch.nn.functional.pad(one, (0, -tokens % 8))
    pieces = [attention(q, k, piece, grid, 0.35) for piece in padded.split(8, -1)]
    return torch.cat(pieces, -1)[..., :tokens]


def test_windows_and_class_tokens_in_one_softmax() -> None:
    """Against dense attention with a mask: the window's patches and the prefix, and for the prefix everything."""
    prefix, grid, size = 2, (5, 6), 3
    q, k, _ = random(prefix, grid)
    options = grid_options("na", {"size": size})
    attention = GridAttention("na", options, num_heads=2, head_dim=8, prefix=prefix)
    seen = torch.ones(32, 32, dtype=torch.bool)
    for a in range(30):
        for b in range(30):
            near = True
            for n, i, j in zip(grid, divmod(a, 6), divmod(b, 6), strict=True):
                first = min(max(i - size // 2, 0), n - size)
                near &= first <= j < first + size
            seen[prefix + a, prefix + b] = near
    want = (q @ k.transpose(2, 3) * 0.35).masked_fill(~seen, float("-inf")).softmax(-1)
    torch.testing.assert_close(weights(attention, q, k, grid), want)


def test_every_token_is_seen_once() -> None:
    """With constant keys all weights are equal: summaries stand for as many tokens as they hold, the prefix for one."""
    prefix, grid = 3, (9, 16)
    q, k, _ = random(prefix, grid)
    k = k[:, :, :1].expand_as(k)
    attention = GridAttention("fma2d", grid_options("fma2d", {"block": 2, "rank": 1}), num_heads=2, head_dim=8,
                              prefix=prefix)  # fmt: skip
    got = weights(attention, q, k, grid)
    torch.testing.assert_close(got, torch.full_like(got, 1 / (prefix + 9 * 16)))


TAKEN = (
    "window", "fma", "fma2d", "blocks", "na", "dina", "gna", "swin", "maxvit", "gcvit", "focal", "s2a", "scale_dit",
    "relay",
)  # fmt: skip
"""Recipes that can meet prefix tokens in one softmax."""


@pytest.mark.parametrize("recipe", TAKEN)
@pytest.mark.parametrize("layer", [0, 1])
def test_one_softmax_over_prefix_and_patches(recipe: str, layer: int) -> None:
    """Ones give ones, in every row; and prefix keys that draw all the weight leave none for the patches."""
    prefix, grid = 2, (14, 14)
    q, k, v = random(prefix, grid)
    attention = GridAttention(recipe, grid_options(recipe, {}), num_heads=2, head_dim=8, layer=layer, prefix=prefix)
    attention = attention.double()
    ones = attention(q, k, torch.ones_like(v), grid, 0.35)
    torch.testing.assert_close(ones, torch.ones_like(v))
    k, v = k.clone(), torch.zeros_like(v)
    k[:, :, :prefix], v[:, :, :prefix] = 10 * q.mean(2, keepdim=True).sign(), 1.0
    q = q.abs() * k[:, :, :1].sign() * 10
    torch.testing.assert_close(attention(q, k, v, grid, 5.0), torch.ones_like(v))


def test_prefix_rows_are_exact_and_gradients_flow() -> None:
    prefix, grid = 2, (8, 8)
    q, k, v = (t.requires_grad_() for t in random(prefix, grid))
    attention = GridAttention("fma2d", grid_options("fma2d", {"block": 2, "rank": 1}), num_heads=2, head_dim=8,
                              prefix=prefix)  # fmt: skip
    out = attention(q, k, v, grid, 0.35)
    want = (q @ k.transpose(2, 3) * 0.35).softmax(-1) @ v
    torch.testing.assert_close(out[:, :, :prefix], want[:, :, :prefix])
    assert (out[:, :, prefix:] - want[:, :, prefix:]).abs().max() > 1e-3
    out[:, :, prefix:].square().sum().backward()
    assert all(t.grad is not None and (t.grad[:, :, :prefix] != 0).all() for t in (k, v))
    assert q.grad is not None and (q.grad[:, :, :prefix] == 0).all()


def test_saved_and_read_again(tmp_path: Path) -> None:
    """With parameters of its own; and plain from_pretrained says what to do."""
    model = make("registers")
    configure(model, "fma2d", dims=2, block=2, rank=1, summary="shared", bias=-2.0)
    own = {name for name, _ in model.named_parameters() if ".farfield." in name}
    assert own
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in own:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    pixels = torch.randn(1, 3, 48, 32)
    want = hidden(model, pixels)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, transformers.AutoModel)
    assert torch.equal(hidden(again, pixels), want)
    plain = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="farfield")
    with pytest.raises(ValueError, match=r"farfield\.interop\.transformers\.load"):
        plain(pixel_values=pixels)


def test_copies_and_changes_of_mind() -> None:
    model, pixels = make("vit"), torch.randn(1, 3, 32, 32)
    want = hidden(model, pixels)
    configure(model, "fma2d", dims=2, block=2, rank=1)
    changed = hidden(model, pixels)
    copied = copy.deepcopy(model)
    small, large = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 32, 48)
    hidden(model, small, interpolate_pos_encoding=True)
    hidden(copied, large, interpolate_pos_encoding=True)
    assert torch.equal(hidden(model, pixels), changed) and torch.equal(hidden(copied, pixels), changed)
    configure(model, "dense", dims=2)
    configure(model, "dense", dims=2)
    torch.testing.assert_close(hidden(model, pixels), want, rtol=1e-4, atol=1e-4)
    hooks = [len(m._forward_hooks) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert hooks == [1]
    configure(model, "dense")
    assert all(not m._forward_hooks for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    torch.testing.assert_close(hidden(model, pixels), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "recipe", "options", "message"),
    [
        ("vit", "mano", {}, "every level has a softmax of its own"),
        ("vit", "davit", {}, "softmax runs over channels"),
        ("vit", "transformer_ls", {}, "reads the layer's input"),
        ("vit", "fma", {"sinks": 4}, "sinks=0 would be accepted"),
        ("vit", "fma2d", {"colour": 1}, "no option colour=1"),
        ("vit", "fma2d", {"dims": 3}, "dims=1, or dims=2"),
        ("vit", "fma2d", {"prefix": -1}, "prefix=-1"),
    ],
)
def test_refused(kind: str, recipe: str, options: dict[str, Any], message: str) -> None:
    model = make(kind)
    before = {name for name, _ in model.named_modules()}
    with pytest.raises((ValueError, TypeError), match=message):
        configure(model, recipe, **{"dims": 2, **options})
    assert {name for name, _ in model.named_modules()} == before
    assert not any(m._forward_hooks for m in model.modules())


def test_models_without_prefix_take_recipes_without_state() -> None:
    model, pixels = make("siglip"), torch.randn(1, 3, 32, 32)
    want = hidden(model, pixels)
    configure(model, "mano", dims=2, size=2, sampling="mean")
    got = hidden(model, pixels)
    assert got.isfinite().all() and (got - want).abs().max() > 1e-3


def test_wrong_prefix_and_unknown_models() -> None:
    model = make("vit")
    configure(model, "fma2d", dims=2, prefix=2)
    with pytest.raises(ValueError, match="65 tokens are not 2 class and register tokens and then 8 x 8 patches"):
        hidden(model, torch.randn(1, 3, 32, 32))
    bert = transformers.BertModel(transformers.BertConfig(**{k: v for k, v in SIZES.items() if "_size" not in k},
                                                          hidden_size=32, intermediate_size=40))  # fmt: skip
    with pytest.raises(ValueError, match="'bert' stand is not known here"):
        configure(bert, "fma2d", dims=2)
