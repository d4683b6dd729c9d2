"""Farfield's vision models through the Auto classes of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from farfield.interop.transformers import FarfieldBackbone, FarfieldVisionConfig, register  # noqa: E402
from farfield.models.vision import VisionModel, preset  # noqa: E402

SMALL: dict[str, Any] = {"vision": {"widths": [16, 32], "depths": [1, 1], "head_dim": 16, "patch": 2},
                         "options": {"block": 4, "rank": 2}}  # fmt: skip


def test_backbone() -> None:
    register()
    config = FarfieldVisionConfig(out_features=["stage1", "stage2"], **SMALL)
    model = transformers.AutoBackbone.from_config(config).eval()
    x = torch.randn(2, 3, 18, 30)
    out = model(x, output_hidden_states=True)
    want = VisionModel(preset("tiny", attention="fma2d", widths=(16, 32), depths=(1, 1), head_dim=16, patch=2,
                              options={"block": 4, "rank": 2})).backbone(x)  # fmt: skip
    assert model.channels == [16, 32]
    for got, hidden, expected in zip(out.feature_maps, out.hidden_states, want, strict=True):
        torch.testing.assert_close(got, expected.map)
        assert got is hidden
    last = transformers.AutoBackbone.from_config(FarfieldVisionConfig(**SMALL))
    (only,) = last(x).feature_maps
    assert only.shape == out.feature_maps[1].shape
    with pytest.raises(ValueError, match="never computed"):
        model(x, output_attentions=True)


def test_classification_trains_and_is_read_again(tmp_path: Path) -> None:
    register()
    config = FarfieldVisionConfig(
        num_labels=4, attention="na", num_channels=2, vision={**SMALL["vision"], "mean": [0.5, 0.2], "std": [2.0, 0.5]}
    )
    model = transformers.AutoModelForImageClassification.from_config(config)
    x, labels = torch.randn(3, 2, 20, 20), torch.tensor([0, 3, 1])
    out = model(pixel_values=x, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        optimiser.zero_grad()
        model(x, labels=labels).loss.backward()
        optimiser.step()
    trained = model.eval()(x, labels=labels)
    assert trained.loss < out.loss
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(again(x).logits, trained.logits)
    assert again.config.attention == "na" and again.config.num_labels == 4
    maps = FarfieldBackbone.from_pretrained(tmp_path, out_indices=[0, 1])
    for got, want in zip(maps(x).feature_maps, model.model.backbone(x), strict=True):
        torch.testing.assert_close(got, want.map)
    maps.save_pretrained(tmp_path / "maps")
    fresh = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "maps")
    assert fresh(x).logits.shape == (3, 4) and 0 < fresh.model.head.out.weight.std() < 0.1
    torch.testing.assert_close(fresh.model.backbone(x)[0].map, maps(x).feature_maps[0])


def test_a_backbone_for_somebody_elses_head() -> None:
    """UperNet builds its decoder on any backbone that AutoBackbone knows."""
    register()
    backbone = FarfieldVisionConfig(out_features=["stage1", "stage2", "stage3", "stage4"],
                                    vision={"widths": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "head_dim": 16},
                                    attention="na", options={"size": 3})  # fmt: skip
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=3, use_auxiliary_head=False
    )
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    assert model(torch.randn(1, 3, 64, 48)).logits.shape == (1, 3, 64, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": {"colour": 1}}, r"unknown attributes \['colour'\]"),
        ({"size": "huge"}, "unknown size 'huge'"),
        ({"out_features": ["stage9"]}, "stage9"),
        ({"attention": "none"}, "none"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FarfieldVisionConfig(**options)
