"""fma2d: Fast Multipole Attention on images, as the fourth version of its paper applies it."""

from __future__ import annotations

from farfield.far.pyramid import Pyramid
from farfield.near.blocks import Blocks
from farfield.recipes.registry import BLOCK, RANK, Parts, Recipe, Setting

__all__ = ["RECIPE"]


def _parts(
    setting: Setting,
    block: int | tuple[int, ...] = BLOCK,
    rank: int | tuple[int, ...] = RANK,
    summary: str = Pyramid.summary,
    levels: int | None = None,
    count_bias: bool = True,
    query_rank: int | tuple[int, ...] | None = None,
    bias: float | None = Pyramid.bias,
    grid: tuple[int, ...] | None = None,
    open: int = Pyramid.open,
    beam: int | None = Pyramid.beam,
    page: int | tuple[int, ...] | None = Pyramid.page,
    share: int = Pyramid.share,
    beam_share: int | None = Pyramid.beam_share,
    rest: str = Pyramid.rest,
    choose: str = Pyramid.choose,
    open_bias: float | str | None = Pyramid.open_bias,
) -> Parts:
    # Without the options of sequences (sinks, rotation).
    far = Pyramid(
        rank,
        summary=summary,
        levels=levels,
        count_bias=count_bias,
        query_rank=query_rank,
        bias=bias,
        grid=grid,
        open=open,
        beam=beam,
        page=page,
        share=share,
        beam_share=beam_share,
        rest=rest,
        choose=choose,
        open_bias=open_bias,
    )
    return Parts(near=Blocks(block), far=far, merge="softmax")


RECIPE = Recipe(
    name="fma2d",
    title="fast multipole attention on images: 3 x 3 blocks exactly, at most 27 groups of every coarser level",
    citation="Kang, Tran, De Sterck, Fast Multipole Attention, version 4, arXiv 2310.11960",
    near="own and adjacent blocks of block x block pixels",
    far="pyramid, rank x rank summaries per group",
    merge="softmax",
    cost="n·(9·block² + 27·rank²·log(side/block))",
    dims=(2,),
    causal=False,
    proof="tests/recipes/test_fma2d.py::test_equals_the_quadtree_walked_by_hand",
    departures=(
        "how the paper makes and weighs summaries in 2-D is not published, nor how it comes to linear cost; here "
        "both are as in 1-D: weights that all levels share, a summary counts as its tokens, a bias per level and "
        "head"
    ),
    parts=_parts,
)
