"""fma: Fast Multipole Attention, near blocks and a pyramid of summaries in one softmax."""

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
    sinks: int = 0,
    bias: float | None = Pyramid.bias,
    rotate: str = Pyramid.rope,
    grid: tuple[int, ...] | None = None,
    open: int = Pyramid.open,
    beam: int | None = Pyramid.beam,
    page: int | tuple[int, ...] | None = Pyramid.page,
    share: int = Pyramid.share,
    beam_share: int | None = Pyramid.beam_share,
    recent: int = Pyramid.recent,
    rest: str = Pyramid.rest,
    choose: str = Pyramid.choose,
    open_bias: float | str | None = Pyramid.open_bias,
) -> Parts:
    far = Pyramid(
        rank,
        summary=summary,
        levels=levels,
        count_bias=count_bias,
        query_rank=query_rank,
        sinks=sinks,
        bias=bias,
        rope=rotate,
        grid=grid,
        open=open,
        beam=beam,
        page=page,
        share=share,
        beam_share=beam_share,
        recent=recent,
        rest=rest,
        choose=choose,
        open_bias=open_bias,
    )
    return Parts(near=Blocks(block), far=far, merge="softmax")


RECIPE = Recipe(
    name="fma",
    title="fast multipole attention: exact near blocks, summaries of growing groups farther away",
    citation="Kang, Tran, De Sterck, Fast Multipole Attention, arXiv 2310.11960",
    near="own and adjacent blocks of block tokens",
    far="pyramid, rank summaries per group",
    merge="softmax",
    cost="n·(3·block + rank·log(n/block))",
    dims=(1, 2, 3),
    causal=True,
    proof="tests/recipes/test_fma.py::test_equals_the_reference_engine",
    departures=(
        "summaries have weights that all levels share, so that any length works; the paper's, "
        '`summary="learned"`, fix the length; that a summary counts as its tokens is an option in released code, '
        "and which tables used it is not said; the bias per level and head that lets the far field start quiet "
        "is farfield's; zeros that released causal kernels leave in the normaliser are left out"
    ),
    parts=_parts,
)
