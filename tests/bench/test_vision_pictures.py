"""Which layers a report on images draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from farfield.bench.vision import VisionOutcome, VisionSettings
from farfield.bench.vision_pictures import patterns_figure, patterns_of
from farfield.data.images import open_images
from farfield.explain.pattern import pattern
from support.vision_data import folder_by_class


def _outcome(tmp_path: Path, grids: list[tuple[int, ...]], **settings: object) -> VisionOutcome:
    data = open_images([folder_by_class(tmp_path / "set")], size=(32, 32))
    return VisionOutcome(VisionSettings(**settings), data, {}, grids)  # type: ignore[arg-type]


def test_of_alternating_layers_both_are_drawn(tmp_path: Path) -> None:
    names = ("na", "swin", "davit")
    outcome = _outcome(
        tmp_path, [(16, 16), (8, 8)], attentions=names, widths=(32, 64), depths=(2, 1), options={"size": 4}
    )
    found, notes = patterns_of(outcome)
    assert [p.name for p in found] == ["na", "swin, layer 1", "swin, layer 2", "davit, layer 1", "davit, layer 2"]
    assert notes == []
    for one, (name, layer) in zip(
        found, (("na", 0), ("swin", 0), ("swin", 1), ("davit", 0), ("davit", 1)), strict=True
    ):
        assert (one.codes == pattern(name, (16, 16), False, layer=layer, size=4).codes).all()
    assert (found[1].codes != found[2].codes).any() and found[4].has_global
    titles = [axes.get_title("left") for axes in patterns_figure(found).axes if axes.get_title("left")]
    assert titles == [p.name for p in found]


def test_the_second_layer_is_drawn_on_its_own_grid(tmp_path: Path) -> None:
    outcome = _outcome(
        tmp_path, [(16, 16), (8, 8)], attentions=("maxvit",), widths=(32, 64), depths=(1, 1), options={"size": 4}
    )
    found, _ = patterns_of(outcome)
    assert [(p.name, p.grid) for p in found] == [("maxvit, layer 1", (16, 16)), ("maxvit, layer 2 (8x8)", (8, 8))]
    assert (found[1].codes == pattern("maxvit", (8, 8), False, layer=1, size=4).codes).all()
    patterns_figure(found)


def test_the_layer_drawn_is_that_of_the_stage_that_can_be(tmp_path: Path) -> None:
    """Where the first stage is too large, the picture shows the second stage's own layer, an odd one here."""
    outcome = _outcome(
        tmp_path, [(256, 256), (8, 8)], attentions=("swin",), widths=(32, 64), depths=(1, 1), options={"size": 4}
    )
    (one,), _ = patterns_of(outcome)
    assert (one.codes == pattern("swin", (8, 8), False, layer=1, size=4).codes).all()


@pytest.mark.parametrize(
    ("grids", "said"), [([(256, 256), (128, 128)], ["No stage is small enough"]), ([(4, 4, 4)] * 2, [])]
)
def test_what_cannot_be_drawn(tmp_path: Path, grids: list[tuple[int, ...]], said: list[str]) -> None:
    outcome = _outcome(tmp_path, grids, attentions=("swin",), widths=(32, 64), depths=(1, 1))
    found, notes = patterns_of(outcome)
    assert found == [] and [note[: len("No stage is small enough")] for note in notes] == said


def test_a_grid_that_is_seen_whole_is_told(tmp_path: Path) -> None:
    outcome = _outcome(tmp_path, [(4, 4), (2, 2)], attentions=("swin", "dense"), widths=(32, 64), depths=(1, 1))
    _, (note,) = patterns_of(outcome)
    assert note.startswith("At 4x4 tokens, the grid that is drawn, swin, layer 1 see every token exactly")
