from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from farfield.data.examples import Batches, VisionData, in_order
from farfield.data.grids import open_grids
from farfield.data.images import open_images
from farfield.models.vision import VisionConfig, VisionModel
from farfield.models.vision.model import Examples
from farfield.training.loop import TrainConfig, Trainer
from farfield.training.metrics import evaluate_vision, iou
from support.vision_data import folder_by_class, labelled_archive, mask_archive


def model_for(data: VisionData, attention: str = "dense", seed: int = 0) -> VisionModel:
    config = VisionConfig(
        attention, task=data.task, dims=data.dims, channels=data.channels, outputs=data.outputs, widths=(16, 16),
        depths=(1, 1), head_dim=16, patch=2, decoder=16, mean=data.mean, std=data.std, target_mean=data.target_mean,
        target_std=data.target_std, ignore=data.ignore,
    )  # fmt: skip
    return VisionModel(config, seed=seed)


def trainer_for(data: VisionData, steps: int = 12, workers: int = 0, attention: str = "dense") -> Trainer:
    return Trainer(
        model_for(data, attention),
        Batches(data.train, 4, workers=workers),
        TrainConfig(context=int(np.prod(data.train.grid)), batch=4, steps=steps, lr=3e-3),
    )


def test_classes_are_learnt(tmp_path: Path) -> None:
    data = open_images([folder_by_class(tmp_path / "set", 8)], size=(8, 8))
    trainer = trainer_for(data, 40)
    test = next(iter(data.tests.values()))
    trainer.run()
    after = evaluate_vision(trainer.model, in_order(test, 3))  # type: ignore[arg-type]
    assert after.score == 1.0
    assert after.examples == (1.0,) * len(test)
    assert trainer.history[-1].loss < 0.5 * trainer.history[0].loss
    assert trainer.history[0].loss == pytest.approx(np.log(2), abs=0.1)
    assert trainer.history[-1].tokens == 40 * 4 * 64


def test_pixels_are_learnt(tmp_path: Path) -> None:
    data = open_images([mask_archive(tmp_path / "set.npz")])
    trainer = trainer_for(data, 50)
    trainer.run()
    result = evaluate_vision(trainer.model, in_order(next(iter(data.tests.values())), 2))  # type: ignore[arg-type]
    assert result.score > 0.7
    assert len(result.classes) == 2
    assert result.pixels is not None and result.pixels > 0.8


def test_an_operator_is_learnt_and_moves_to_another_grid(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, n, count in (("train", 8, 40), ("test", 8, 6), ("test_fine", 16, 6)):
        wave = np.sin(np.pi * (np.arange(n) + 0.5) / n)
        x = rng.uniform(1, 2, (count, 1, 1)) * np.ones((1, n, n))
        arrays[f"{name}_x"], arrays[f"{name}_y"] = x, x * wave[:, None] * wave
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    data = open_grids([path])
    trainer = trainer_for(data, 120)
    before = trainer.history
    trainer.run()
    scores = {
        name: evaluate_vision(trainer.model, in_order(source, 3))  # type: ignore[arg-type]
        for name, source in data.tests.items()
    }
    assert before == trainer.history
    assert scores["8x8"].score < 0.3 * data.yardsticks["mean of the training outputs"]
    assert scores["16x16"].score < data.yardsticks["mean of the training outputs"]
    assert scores["8x8"].relative_mse == pytest.approx(np.mean(np.square(scores["8x8"].examples)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_ends_where_a_whole_one_does(tmp_path: Path, workers: int) -> None:
    data = open_images([labelled_archive(tmp_path / "set.npz")])
    whole = trainer_for(data, 8)
    whole.run()
    first = trainer_for(data, 8, workers)
    first.run(should_stop=lambda: first.step >= 3)
    assert first.step == 3
    second = trainer_for(data, 8, workers)
    second.load_state_dict(first.state_dict())
    second.run()
    for (name, p), q in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name


class Fixed(VisionModel):
    """A model that says what it is told to."""

    def __init__(self, config: VisionConfig, said: Tensor) -> None:
        super().__init__(config)
        self.said = said

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.nn.functional.one_hot(self.said, self.config.outputs).movedim(-1, 1).float()


def test_mean_iou_leaves_void_and_absent_classes_out() -> None:
    config = VisionConfig("dense", task="segment", outputs=4, widths=(16,), depths=(1,), head_dim=16, ignore=9)
    truth = torch.tensor([[[0, 0, 1, 1], [9, 9, 1, 1]]])
    said = torch.tensor([[[0, 1, 1, 1], [3, 3, 1, 0]]])
    result = evaluate_vision(Fixed(config, said), [(Examples(torch.zeros(1, 3, 2, 4), truth), [5])])
    assert result.classes[:2] == (pytest.approx(1 / 3), pytest.approx(3 / 5))
    assert np.isnan(result.classes[2]) and np.isnan(result.classes[3])  # 3 was said at void pixels only
    assert result.score == pytest.approx((1 / 3 + 3 / 5) / 2)
    assert result.pixels == result.examples[0] == pytest.approx(4 / 6)
    assert result.indices == (5,)


def test_a_class_that_is_never_true_has_no_intersection() -> None:
    assert iou(torch.tensor([[2, 1], [0, 0]])).tolist() == [pytest.approx(2 / 3), 0.0]


def test_accuracy_by_class() -> None:
    config = VisionConfig("dense", outputs=3, widths=(16,), depths=(1,), head_dim=16)
    batch = Examples(torch.zeros(4, 3, 2, 2), torch.tensor([0, 0, 1, 1]))
    result = evaluate_vision(Fixed(config, torch.tensor([0, 1, 1, 1])), [(batch, [0, 1, 2, 3])])
    assert result.score == 0.75
    assert result.examples == (1.0, 0.0, 1.0, 1.0)
    assert result.classes[:2] == (0.5, 1.0)
    with pytest.raises(ValueError, match="no held-out example"):
        evaluate_vision(Fixed(config, torch.tensor([0])), [])
