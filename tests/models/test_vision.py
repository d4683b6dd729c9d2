from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from farfield import recipes
from farfield.bench.flops import count_flops
from farfield.models.vision import SIZES, TASKS, VisionConfig, VisionModel, preset
from farfield.models.vision.backbone import sampled
from farfield.models.vision.model import Examples, relative_errors

NAMES = [name for name in recipes.names() if 2 in recipes.get(name).dims]
VOLUMES = [name for name in recipes.names() if 3 in recipes.get(name).dims]


def small(attention: str = "dense", **changes: object) -> VisionConfig:
    settings: dict[str, object] = {
        "attention": attention, "widths": (16, 32), "depths": (1, 2), "head_dim": 16, "patch": 2, "outputs": 5,
        "decoder": 8, **changes,
    }  # fmt: skip
    return VisionConfig(**settings)  # type: ignore[arg-type]


def known(attention: str, dims: int = 2, **options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if name in recipes.options(attention, dims)}


def model_of(attention: str = "dense", **changes: object) -> VisionModel:
    """A model with weights large enough for every part to matter."""
    model = VisionModel(small(attention, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def targets(config: VisionConfig, x: Tensor) -> Tensor:
    if config.task == "classify":
        return torch.zeros(len(x), dtype=torch.int64)
    if config.task == "segment":
        return torch.zeros(len(x), *x.shape[2:], dtype=torch.int64)
    return torch.ones(len(x), config.outputs, *x.shape[2:])


@pytest.mark.parametrize("attention", NAMES)
@pytest.mark.parametrize("size", [(37, 53), (1, 1), (3, 40)])
def test_every_recipe_takes_any_size(attention: str, size: tuple[int, int]) -> None:
    config = small(attention, task="segment", options=known(attention, block=4, rank=2))
    model = VisionModel(config)
    x = torch.randn(2, 3, *size)
    assert model(x).shape == (2, 5, *size)
    model.loss(Examples(x, targets(config, x))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("position", ["none", "conv", "waves", "table"])
def test_every_parameter_is_used(task: str, stem: str, position: str) -> None:
    config = small(task=task, stem=stem, position=position)
    model = VisionModel(config)
    x = torch.randn(2, 3, 14, 10)
    model.loss(Examples(x, targets(config, x))).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    if task == "classify":  # nothing reads the finer maps directly
        missing = [name for name in missing if not name.startswith("backbone.norms.0")]
    assert missing == []


def test_three_axes_with_strides_of_their_own() -> None:
    config = small("fma", dims=3, task="operator", patch=(1, 4, 4), downsample=(1, 2, 2), options={"block": (2, 4, 4)})
    model = VisionModel(config)
    assert model(torch.randn(2, 3, 5, 17, 9)).shape == (2, 5, 5, 17, 9)
    maps = model.backbone(torch.randn(1, 3, 5, 17, 9))
    assert [tuple(f.map.shape[2:]) for f in maps] == [(5, 5, 3), (5, 3, 2)]


@pytest.mark.parametrize("attention", VOLUMES)
def test_every_recipe_for_volumes_reads_nothing_that_is_masked_out(attention: str) -> None:
    """On (T, H, W), with parts so small that near and far fields both have something to read."""
    parts = {"block": 2, "rank": 1, "size": 3, "stride": 2, "window": 3, "ring": 1, "reach": 1, "cell": 2, "every": 2,
             "count": 2}  # fmt: skip
    options = known(attention, 3, **parts)
    # The second stage has an odd and an even layer.
    model = model_of(
        attention, dims=3, task="segment", patch=(1, 2, 2), downsample=(1, 2, 2), options=options, depths=(1, 2)
    )
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 5, 13, 9, generator=generator) < 0.5
    mask[1, 3:] = False  # whole frames
    x = torch.randn(2, 3, 5, 13, 9, generator=generator)
    other = torch.where(mask[:, None], x, torch.full_like(x, float("nan"))).requires_grad_()
    hidden = model(other, mask)
    assert hidden.shape == (2, 5, 5, 13, 9) and bool(hidden.isfinite().all())
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask), hidden, rtol=0, atol=0)
        assert not torch.allclose(hidden, model(x))
    hidden.square().mean().backward()
    assert other.grad is not None
    kept = mask[:, None].expand_as(other)
    assert bool(other.grad.isfinite().all()) and bool((other.grad[~kept] == 0).all())
    assert bool((other.grad[kept] != 0).any())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_volumes_include_the_recipe_for_frames_alone() -> None:
    assert "flashvggt" in VOLUMES and "flashvggt" not in NAMES
    with pytest.raises(ValueError, match="'flashvggt' works in 3-D; this model has dims=2"):
        small("flashvggt")


def test_one_stage_is_a_plain_transformer() -> None:
    config = small(widths=(32,), depths=(2,), patch=5, stem="patch", position="table", table=3)
    model = VisionModel(config)
    assert model(torch.randn(1, 3, 31, 16)).shape == (1, 5)
    assert [tuple(f.map.shape[2:]) for f in model.backbone(torch.randn(1, 3, 31, 16))] == [(7, 4)]


@pytest.mark.parametrize("attention", NAMES)
@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_what_is_masked_out_is_not_read(attention: str, stem: str) -> None:
    model = model_of(attention, stem=stem, task="segment", options=known(attention, block=4, rank=2, window=3))
    mask = torch.rand(2, 21, 18) < 0.5
    mask[1, :, 9:] = False
    x = torch.randn(2, 3, 21, 18)
    other = torch.where(mask[:, None], x, torch.full_like(x, float("nan")))
    with torch.no_grad():
        first, second = model(x, mask), model(other, mask)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.allclose(first, model(x))


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_padding_with_a_mask_changes_nothing(stem: str) -> None:
    model = model_of(stem=stem).double()
    x = torch.randn(2, 3, 13, 10, dtype=torch.float64)
    padded = torch.full((2, 3, 24, 20), float("nan"), dtype=torch.float64)
    padded[..., :13, :10] = x
    mask = torch.zeros(2, 24, 20, dtype=torch.bool)
    mask[:, :13, :10] = True
    with torch.no_grad():
        torch.testing.assert_close(model(padded, mask), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", NAMES)
def test_checkpointing_keeps_less_and_changes_no_gradient(attention: str) -> None:
    model = model_of(
        attention, depths=(2, 2), options=known(attention, block=4, rank=2, size=3, stride=2, window=3)
    ).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 21, 18, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 21, 18, generator=generator) < 0.7
    kept: list[int] = []
    grads: list[dict[str, Tensor]] = []
    for enable in (False, True):
        model.backbone.checkpointing = enable
        model.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss = model(x, mask).square().sum()
        loss.backward()
        kept.append(sum(sizes))
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert kept[1] < kept[0] / 2
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_an_image_that_is_masked_out_entirely_gives_numbers() -> None:
    model = VisionModel(small("fma", options={"block": 2, "rank": 1}, task="operator"))
    x = torch.randn(2, 3, 12, 12)
    mask = torch.zeros(2, 12, 12, dtype=torch.bool)
    mask[1] = True
    loss = model.loss(Examples(x, torch.ones(2, 5, 12, 12), mask))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_without_places_patches_may_be_shuffled() -> None:
    """Dense attention over patches knows no order: a plain transformer without positions classifies a shuffled image
    alike, and one with positions does not."""
    config = {"widths": (32,), "depths": (2,), "stem": "patch", "patch": 4}
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(1, 3, 16, 4, 4)
    moved = patches[:, :, torch.randperm(16)].view(1, 3, 4, 4, 4, 4).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 16, 16)
    for position, equal in (("none", True), ("conv", False), ("waves", False), ("table", False)):
        model = model_of(position=position, **config).double()
        with torch.no_grad():
            assert torch.allclose(model(x), model(moved), rtol=0, atol=1e-10) is equal, position


def test_a_shift_by_whole_windows_shifts_the_features() -> None:
    """Blocked windows, patches and no positions: moving an image by a window moves its map."""
    model = model_of(
        "window", options={"size": 4, "stride": 4}, position="none", stem="patch", widths=(16,), depths=(1,)
    ).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        here = model.backbone(x)[0].map
        there = model.backbone(x.roll((8, 16), (2, 3)))[0].map
    torch.testing.assert_close(here.roll((4, 8), (2, 3)), there)


def test_an_operator_takes_other_resolutions_and_knows_the_limit() -> None:
    """The same weights at a finer grid of the same smooth field: with waves and one token per point, outputs agree."""
    model = model_of(task="operator", channels=1, outputs=1, patch=1, stem="patch", position="waves", widths=(16,),
                     depths=(1,)).double()  # fmt: skip

    def field(n: int) -> Tensor:
        y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for _ in range(2))
        return (torch.sin(3 * y)[:, None] * torch.cos(2 * x))[None, None]

    def apart(a: int, b: int) -> float:
        with torch.no_grad():
            tokens = [model.backbone(field(n))[0].map for n in (a, b)]
        coarse = torch.nn.functional.avg_pool2d(tokens[1], b // a)
        return float((coarse - tokens[0]).norm() / tokens[0].norm())

    # Sums over all tokens become integrals, so the difference falls with the resolution.
    assert apart(8, 24) < 0.15
    assert apart(16, 48) < 0.5 * apart(8, 24)
    with torch.no_grad():
        assert model(field(31)).shape == (1, 1, 31, 31)


def test_recipes_begin_from_the_same_numbers() -> None:
    first, second = (VisionModel(small(name), seed=3) for name in ("dense", "agent"))
    others = {n: p for n, p in second.named_parameters() if ".attention." not in n}
    assert others
    for name, parameter in first.named_parameters():
        if ".attention." not in name:
            assert torch.equal(parameter, others.pop(name)), name
    assert others == {}
    third = VisionModel(small(), seed=4)
    assert not torch.equal(first.head.out.weight, third.head.out.weight)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    VisionModel(small())
    assert torch.equal(before, torch.get_rng_state())


def test_stages_may_have_recipes_of_their_own() -> None:
    config = small(("window", "dense"), options=({"size": 3}, {}))  # type: ignore[arg-type]
    model = VisionModel(config)
    near = [str(model.get_submodule(f"backbone.stages.{i}.0.attention").near_spec) for i in range(2)]  # type: ignore[union-attr]
    assert "Window" in near[0]
    assert "Dense" in near[1]
    again = VisionConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config


def test_statistics_normalise_inputs_and_scale_outputs_back() -> None:
    plain = VisionModel(small(task="operator", outputs=2))
    scaled = VisionModel(
        small(task="operator", outputs=2, mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 4.0),
              target_mean=(5.0, 6.0), target_std=(10.0, 20.0))
    )  # fmt: skip
    x = torch.randn(1, 3, 8, 8)
    raw = x * torch.tensor([2.0, 2.0, 4.0]).view(3, 1, 1) + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    with torch.no_grad():
        out = plain(x) * torch.tensor([10.0, 20.0]).view(2, 1, 1) + torch.tensor([5.0, 6.0]).view(2, 1, 1)
        torch.testing.assert_close(scaled(raw), out, rtol=1e-4, atol=1e-4)


def test_a_residual_operator_begins_with_its_input() -> None:
    model = VisionModel(small(task="operator", outputs=3, residual=True))
    x = torch.randn(1, 3, 8, 8)
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    mask[:, :2] = False
    with torch.no_grad():
        torch.testing.assert_close(model(x), x, rtol=0, atol=0.05)
        hidden = torch.where(mask[:, None], x, torch.full_like(x, float("nan")))
        assert model(hidden, mask).isfinite().all()
    with pytest.raises(ValueError, match="channels 3 must be at least outputs 5"):
        small(task="operator", residual=True)


def test_a_residual_operator_may_read_further_channels() -> None:
    model = VisionModel(small(task="operator", outputs=2, residual=True))
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), x[:, :2], rtol=0, atol=0.05)


def test_points_of_a_finer_grid_are_points_of_the_coarse_one() -> None:
    x = torch.randn(2, 3, 12, 20)
    torch.testing.assert_close(sampled(x, (4, 10)), x[:, :, ::3, ::2])
    back = sampled(sampled(x, (6, 10)), (12, 20))
    torch.testing.assert_close(back[:, :, ::2, ::2], x[:, :, ::2, ::2])
    torch.testing.assert_close(back[:, :, 1, 0], (x[:, :, 0, 0] + x[:, :, 2, 0]) / 2)
    torch.testing.assert_close(back[:, :, 11, 0], x[:, :, 10, 0])
    assert sampled(x, (12, 20)) is x


def test_a_latent_grid_answers_on_finer_grids_as_on_its_own() -> None:
    """At the points that both grids have; a model without it answers otherwise."""
    options = {"task": "operator", "channels": 1, "outputs": 1, "patch": 1}
    model = VisionModel(small(**options, latent=8))
    own = VisionModel(small(**options))
    torch.nn.init.normal_(model.head.out.weight, std=1.0)  # type: ignore[arg-type, union-attr]
    own.load_state_dict(model.state_dict())
    fine = torch.randn(2, 1, 16, 16)
    coarse = fine[:, :, ::2, ::2]
    torch.testing.assert_close(model(fine)[:, :, ::2, ::2], model(coarse))
    torch.testing.assert_close(model(coarse), own(coarse))
    assert (own(fine)[:, :, ::2, ::2] - own(coarse)).abs().max() > 1e-2
    mask = torch.ones(2, 16, 16, dtype=torch.bool)
    mask[:, 3:6, 2:9] = False
    hidden = torch.where(mask[:, None], fine, torch.full_like(fine, float("nan")))
    torch.testing.assert_close(model(hidden, mask), model(torch.where(mask[:, None], fine, 7.0), mask))
    with pytest.raises(ValueError, match="latent=8 is for task 'operator'"):
        small(latent=8)


def test_an_operator_may_answer_at_leading_steps_alone() -> None:
    settings = {"task": "operator", "dims": 3, "channels": 2, "outputs": 2, "patch": (1, 2, 2), "downsample": (1, 2, 2),
                "residual": True}  # fmt: skip
    whole, first = (VisionModel(small(**settings, **more)) for more in ({}, {"ahead": 2}))
    x, y = torch.randn(1, 2, 5, 8, 8), torch.randn(1, 2, 2, 8, 8)
    torch.testing.assert_close(first(x), whole(x)[:, :, :2])
    mask = torch.ones(1, 5, 8, 8, dtype=torch.bool)
    mask[:, 0, 3] = False
    y[:, :, 0, 3] = float("nan")
    loss = first.loss(Examples(x, y, mask))
    loss.backward()
    assert loss.isfinite()
    with pytest.raises(ValueError, match="ahead=2 is for an operator with dims=3"):
        small(ahead=2)


def test_ignored_labels_count_in_no_loss() -> None:
    model = VisionModel(small(task="segment", ignore=11))
    x, y = torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)
    y[:, 4:] = 11
    half = model.loss(Examples(x, y))
    logits = model(x)[:, :, :4]
    torch.testing.assert_close(half, -logits.log_softmax(1)[:, 0].mean())
    nothing = model.loss(Examples(x, torch.full_like(y, 11)))
    assert nothing.item() == 0.0


def test_relative_errors_are_per_example_and_leave_out_hidden_points() -> None:
    target = torch.tensor([[[[3.0, 4.0]]], [[[1.0, float("nan")]]], [[[0.0, 0.0]]]])
    mask = torch.tensor([[[True, True]], [[True, False]], [[True, True]]])
    predicted = torch.tensor([[[[3.0, 9.0]]], [[[3.0, 7.0]]], [[[2.0, 0.0]]]])
    torch.testing.assert_close(relative_errors(predicted, target, mask), torch.tensor([1.0, 2.0, 2.0]))
    with pytest.raises(ValueError, match="differ in shape"):
        relative_errors(predicted[0], target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "dens"}, "did you mean 'dense'"),
        ({"attention": ("dense",)}, "attention names 1 stages"),
        ({"options": ({}, {}, {})}, "options names 3 stages"),
        ({"head_dim": 24}, "head_dim must divide every width"),
        ({"patch": 3}, "power of two"),
        ({"patch": (2, 2, 2)}, "patch"),
        ({"dims": 1}, "dims must be 2"),
        ({"task": "detect"}, "classify, segment, operator"),
        ({"position": "rope"}, "position must be one of"),
        ({"depths": (1,)}, "one number per stage"),
        ({"widths": (16, 0)}, "at least 1"),
        ({"mean": (1.0,)}, "mean needs one number for each of 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"outputs": 0}, "outputs must be an integer"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)  # type: ignore[arg-type]


def test_bad_input_is_named() -> None:
    model = VisionModel(small())
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\].*got \(1, 4, 8, 8\)"):
        model(torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"mask must be a bool tensor of shape \(1, 8, 8\)"):
        model(torch.randn(1, 3, 8, 8), torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        preset("huge")
    with pytest.raises(ValueError, match="unknown model settings"):
        VisionConfig.from_dict({"colour": 1})


def test_sizes_grow() -> None:
    with torch.device("meta"):
        counts = {name: VisionModel(preset(name, outputs=1000)).parameter_count() for name in SIZES}
    assert list(counts) == ["tiny", "small", "base", "vit-tiny", "vit-small", "vit-base"]
    assert counts["tiny"] < 2e6 < counts["small"] < 12e6 < counts["base"] < 30e6
    # Twice the width is four times the blocks, less the embeddings and norms that are linear in it.
    assert 3.7 * counts["vit-tiny"] < counts["vit-small"] < 4 * counts["vit-tiny"]
    assert 3.7 * counts["vit-small"] < counts["vit-base"] < 4 * counts["vit-small"] < 100e6


@pytest.mark.parametrize("size", SIZES)
def test_every_size_works_at_any_size_of_image(size: str) -> None:
    model = VisionModel(preset(size, attention="fma2d", options={"block": 2, "rank": 1}, outputs=3)).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 50, 70))
        features = model.backbone(torch.randn(1, 3, 50, 70))
    assert out.shape == (1, 3) and out.isfinite().all()
    patch, stages = model.config.patches[0], len(model.config.widths)
    assert [f.map.shape[1] for f in features] == list(model.config.widths)
    sides = [(-(-50 // patch), -(-70 // patch))]
    for _ in range(stages - 1):
        sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
    assert [tuple(f.map.shape[2:]) for f in features] == sides


@pytest.mark.parametrize("name", NAMES)
def test_shapes_alone_give_the_same_count_and_change_nothing(name: str) -> None:
    """On the meta device the pass is one of shapes; what it leaves behind must not disturb a real one."""
    config = small(attention=name, depths=(2, 1))
    with torch.device("meta"):
        shapes = VisionModel(config)
    counted = count_flops(shapes, 3, (18, 22))
    real = VisionModel(config)
    assert count_flops(real, 3, (18, 22)) == counted
    assert counted.flops is not None
    assert all(p.device.type == "meta" for p in shapes.parameters())
    real(torch.randn(2, 3, 18, 22)).sum().backward()


def test_shapes_do_not_tell_what_opened_cells_read() -> None:
    with torch.device("meta"):
        model = VisionModel(small(attention="fma2d", options={"block": 2, "rank": 1, "open": 1}))
    count = count_flops(model, 3, (18, 22))
    assert count.parameters == model.parameter_count()
    assert count.maps is None and count.flops is None


def test_flops_are_those_of_the_formula() -> None:
    model = VisionModel(small(widths=(16,), depths=(1,), stem="patch", patch=2, position="none"))
    count = count_flops(model, 3, (8, 6))
    tokens = 12
    linear = 2 * tokens * (12 * 16 + 16 * 48 + 16 * 16 + 2 * 16 * 64) + 2 * 16 * 5
    assert count.maps == linear
    assert count.attention == 4 * 16 * tokens * tokens
    assert count.flops == linear + 4 * 16 * tokens * tokens
    assert count.parameters == model.parameter_count()
