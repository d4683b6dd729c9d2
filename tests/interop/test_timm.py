"""timm's vision transformers with farfield attention, and farfield's backbones by name; where timm is installed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from support.torchvision_stub import timm as timm_or_skip

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    timm = timm_or_skip()

from farfield.interop.timm import FarfieldAttention, configure, register

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 32, "patch_size": 4,
        "dynamic_img_size": True}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "class token": ("vit_tiny_patch16_224", {}, 1),
    "registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 1.0}, 5),
    "none": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
    "qk norm": ("vit_tiny_patch16_224", {"qk_norm": True}, 1),
    "deit3": ("deit3_small_patch16_224", {"init_values": 1.0}, 1),
}


def make(kind: str, **changes: Any) -> Any:
    """A random model in evaluation mode, its weights large enough that attention is far from uniform."""
    name, options, _ = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **options, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_exact_limit_and_weights(kind: str) -> None:
    """The same parameters under the same names; blocks of half the image give the model's own answer."""
    model, x = make(kind), torch.randn(2, 3, 32, 32)
    want, weights = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    configure(model, "fma2d", block=4)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    model.load_state_dict(weights, strict=True)
    configure(model, "fma2d", block=2, rank=1)
    got = model(x)
    assert (got - want).abs().max() > 1e-3
    assert {m.core.prefix for m in model.modules() if isinstance(m, FarfieldAttention)} == {KINDS[kind][2]}
    got.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "qkv" in n)


@pytest.mark.parametrize("size", [(40, 96), (96, 64)])
def test_another_size_of_image(size: tuple[int, int]) -> None:
    model, x = make("registers"), torch.randn(1, 3, *size)
    want = model(x)
    configure(model, "dense")
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    configure(model, "fma2d", block=2, rank=1)
    assert (model(x) - want).abs().max() > 1e-3
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1


def test_recipes_with_parameters_train() -> None:
    """Averaged over patches: of the last block's answer a class token alone would take its own row, which is exact."""
    model = make("class token", global_pool="avg")
    configure(model, "fma2d", block=2, rank=1, summary="shared", bias=-2.0)
    own = {name for name, _ in model.named_parameters() if ".core." in name}
    assert own
    model.train()(torch.randn(2, 3, 64, 64))[:, 0].sum().backward()
    moved = {n for n, p in model.named_parameters() if n in own and p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == own


def test_dropout() -> None:
    """In training the answers differ from draw to draw, and on average they are those of evaluation."""
    model = configure(make("class token", attn_drop_rate=0.3, depth=1), "fma2d", block=2, rank=1)
    attention, x = model.blocks[0].attn, torch.randn(1, 3, 32, 32)
    model(x)  # tells the grid
    tokens = torch.randn(1, 65, 32)
    want = attention.eval()(tokens)
    draws = torch.stack([attention.train()(tokens).detach() for _ in range(400)])
    spread = draws.std(0)
    assert (spread > 0).all()
    assert ((draws.mean(0) - want).abs() < 5 * spread / 20).float().mean() > 0.999


def test_refused() -> None:
    model = make("class token")
    with pytest.raises(ValueError, match="softmax runs over channels"):
        configure(model, "davit")
    assert not any(isinstance(m, FarfieldAttention) for m in model.modules())
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 1, 1, 1),
                             num_heads=(1, 1, 1, 1))  # fmt: skip
    with pytest.raises(ValueError, match="WindowAttention"):
        configure(swin)
    with pytest.raises(ValueError, match="dropped patches leave no grid"):
        configure(make("class token", patch_drop_rate=0.5))
    configure(model)
    with pytest.raises(ValueError, match=r"attn_mask of shape \[65, 65\]"):
        model.blocks[0].attn(torch.randn(1, 65, 32), attn_mask=torch.zeros(65, 65))
    dropping = configure(make("class token", attn_drop_rate=0.1), "fma2d", open=1, block=2, rank=1).train()
    with pytest.raises(ValueError, match=r"dropout=0\.1 in training"):
        dropping(torch.randn(1, 3, 32, 32))


def test_models_whose_images_differ_within_a_batch_are_refused() -> None:
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, depth=1, num_heads=2)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"NaFlexVit: its images have sizes of their own within a batch"):
        configure(model)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("attention", ["fma2d", "swin", "focal"])
def test_own_models_checkpoint_their_blocks(attention: str) -> None:
    """The same gradients with less kept: what a block holds is computed again."""
    register()
    kept, grads = [], []
    for enable in (False, True):
        model = timm.create_model("farfield_tiny", num_classes=3, attention=attention, seed=1)
        model.set_grad_checkpointing(enable)
        x = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss = model(x).square().sum()
        loss.backward()
        kept.append(sum(sizes))
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert kept[1] < kept[0] / 3
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize(("attention", "table"), [("swin", "near.bias.table"), ("fma2d", "far.level_bias")])
def test_own_models_are_trained_by_timms_optimisers(attention: str, table: str) -> None:
    from timm.models._manipulate import group_parameters
    from timm.optim import create_optimizer_v2

    register()
    model = timm.create_model("farfield_tiny", num_classes=3, attention=attention, position="table")
    spared = model.no_weight_decay()
    positions = {"backbone.place.table"} | {
        f"backbone.stages.{stage}.{block}.attention.{table}"
        for stage, depth in enumerate((1, 1, 2, 1))
        for block in range(depth)
    }
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert positions <= spared & matrices
    assert matrices - spared == {
        n
        for n in matrices
        if n.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight", "head.weight"))
        or ".stem." in n
        or ".steps." in n
    }
    of = {name: layer for layer, names in group_parameters(model, model.group_matcher()).items() for name in names}
    assert of.keys() == dict(model.named_parameters()).keys()
    assert of["backbone.place.table"] == 0 and {v for k, v in of.items() if ".stem." in k} == {0}
    firsts = [
        of[f"backbone.stages.{stage}.{block}.up.weight"] for stage, block in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))
    ]
    assert firsts == [1, 2, 3, 4, 5]
    assert [{v for k, v in of.items() if f".steps.{step}." in k} for step in range(3)] == [{1}, {2}, {4}]
    assert [of[f"backbone.norms.{stage}.weight"] for stage in range(4)] == [1, 2, 4, 5]
    assert of["head.weight"] == of["head.bias"] == 6
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 1 + 4 + 1

    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert (group["weight_decay"] == 0) == (name in spared), name
            assert group["lr_scale"] == 0.5 ** (6 - of[name])


def test_own_models_by_name() -> None:
    names = register()
    assert register() == names and "farfield_tiny" in names
    assert set(names) <= set(timm.list_models("farfield_*"))
    model = timm.create_model("farfield_tiny", num_classes=7, in_chans=2, attention="fma2d",
                              options={"block": 4, "rank": 2})  # fmt: skip
    x = torch.randn(2, 2, 50, 34)
    assert model(x).shape == (2, 7)
    assert model.forward_features(x).shape[1] == model.num_features == 256
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    model.reset_classifier(0)
    assert model(x).shape == (2, 256)
    maps = timm.create_model("farfield_tiny", features_only=True, out_indices=(1, 3), attention="na")
    found = maps(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in found] == maps.feature_info.channels() == [64, 256]
    assert [64 // m.shape[2] for m in found] == maps.feature_info.reduction() == [8, 32]


def test_own_models_equal_farfields() -> None:
    from farfield.models.vision import VisionModel, preset

    register()
    theirs = timm.create_model("farfield_tiny", num_classes=3, attention="na").eval()
    ours = VisionModel(preset("tiny", attention="na", outputs=3)).eval()
    x = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(theirs(x), ours(x))


def test_own_models_refused() -> None:
    register()
    with pytest.raises(ValueError, match="no published weights"):
        timm.create_model("farfield_tiny", pretrained=True)
    with pytest.raises(TypeError, match="drop_path_rate"):
        timm.create_model("farfield_tiny", drop_path_rate=0.1)
