"""Attentions of other packages, each behind one small adapter. A package that is missing or cannot run is said so.

An adapter is a function ``(label, options) -> Subject`` under its name in :data:`PEERS`. It imports its package only
when a case is prepared. Layouts are converted outside the measured time.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farfield import recipes
from farfield.bench import model
from farfield.bench.case import Case
from farfield.bench.model import Work
from farfield.bench.subjects import Built, Refused, Subject, installed
from farfield.near.window import Window

__all__ = ["PEERS", "Peer", "names", "peer"]

LAYER = "a layer with projections of its own"


@dataclass(frozen=True)
class Peer:
    """An adapter and what it is.

    Attributes:
        title: what is measured, in a few words.
        package: on PyPI; None for what comes with torch.
        module: that is imported.
        options: with their defaults.
        subject: makes the :class:`Subject` from a label and all options.
        try_out: raises :class:`Refused` where it cannot run a case at all; only for what cannot be known otherwise.
    """

    title: str
    package: str | None
    module: str
    options: dict[str, Any]
    subject: Callable[[str, dict[str, Any]], Subject]
    try_out: Callable[[Case], None] | None = None

    def why_not(self, device: str = "cpu") -> str | None:
        """None when its package is here and it runs on the device, as far as that is known; otherwise the reason."""
        if self.package is not None and not installed(self.module):
            return f"{self.package} is not installed"
        if self.try_out is not None:
            try:
                self.try_out(Case((16,), device=device))
            except Refused as refused:
                return str(refused)
        return None


def names() -> list[str]:
    """All peers."""
    return list(PEERS)


def peer(name: str, options: dict[str, Any], label: str) -> Subject:
    """The subject of a peer.

    Raises:
        ValueError: for an unknown name or option, listing the known ones.
    """
    if name not in PEERS:
        close = difflib.get_close_matches(name, PEERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown peer {name!r}{hint} Known peers: {', '.join(PEERS)}, or all")
    found = PEERS[name]
    for option in options:
        if option not in found.options:
            listed = ", ".join(found.options) or "none"
            raise ValueError(f"{label!r}: peer {name!r} has no option {option!r}; its options: {listed}")
    subject = found.subject(label, {**found.options, **options})
    missing = found.package is not None and not installed(found.module)
    return replace(subject, peer=True, why_not=f"{found.package} is not installed" if missing else None)


def _only(case: Case, *, dims: tuple[int, ...] = (1,), causal: bool | None = None) -> None:
    """Raises Refused unless the case has one of these dimensions and this order."""
    if case.dims not in dims:
        raise Refused(f"it works in {', '.join(f'{d}-D' for d in dims)}")
    if causal is not None and case.causal != causal:
        raise Refused("it has no causal form" if case.causal else "it is causal only")


def _heads_last(x: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, H, D], in memory too."""
    return x.transpose(1, 2).contiguous()


def _fla(case: Case) -> None:
    if not case.device.startswith("cuda"):
        raise Refused("the kernels of flash-linear-attention need a GPU")


# torch itself


def _chosen(backend: str | None) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return nullcontext() if backend is None else sdpa_kernel([getattr(SDPBackend, backend)])


def _sdpa(backend: str) -> Callable[[Case], None]:
    """Refuses a case that a backend of scaled_dot_product_attention does not take."""

    def try_out(case: Case) -> None:
        x = torch.zeros(1, 1, 8, case.head_dim, device=case.device, dtype=case.torch_dtype)
        try:
            # Torch warns at length of what the error says in short.
            with warnings.catch_warnings(action="ignore"), _chosen(backend):
                F.scaled_dot_product_attention(x, x, x, is_causal=case.causal)
        except RuntimeError as error:
            name = backend.lower().replace("_", " ")
            raise Refused(f"torch's {name} does not run in {case.dtype} on {case.device}") from error

    return try_out


def _sdpa_subject(backend: str | None) -> Callable[[str, dict[str, Any]], Subject]:
    def subject(label: str, options: dict[str, Any]) -> Subject:
        def build(case: Case, causal: bool) -> Built:
            if backend is not None:
                _sdpa(backend)(case)

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                with _chosen(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

            return Built(run)

        return Subject(
            label, lambda case: build(case, case.causal), model.dense, decode=lambda case: build(case, False),
            scores=backend == "MATH",
        )  # fmt: skip

    return subject


def _backend(title: str, backend: str) -> Peer:
    return Peer(title, None, "torch", {}, _sdpa_subject(backend), _sdpa(backend))


def _window_size(case: Case, size: Any) -> int | tuple[int, ...]:
    """The size that was asked for, or that of the recipe ``window``, so that the two compare."""
    if size is not None:
        return size
    layer = recipes.build("window", case.width, case.heads, causal=case.causal, dims=case.dims)
    assert isinstance(layer.near_spec, Window)
    return layer.near_spec.size


def _flex(label: str, options: dict[str, Any]) -> Subject:
    def size(case: Case) -> int:
        chosen = _window_size(case, options["window"])
        return chosen if isinstance(chosen, int) else chosen[0]

    def make(case: Case) -> Built:
        _only(case)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        width, last = min(size(case), case.tokens), case.tokens - 1

        def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j < width)

        def around(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            left = width // 2
            first = (i - left).clamp(0, last + 1 - width)
            return (j >= first) & (j < first + width)

        mask = create_block_mask(causal if case.causal else around, None, None, case.tokens, case.tokens, case.device)
        compiled = torch.compile(flex_attention, dynamic=False)
        return Built(lambda q, k, v: compiled(q, k, v, block_mask=mask), engine="inductor")

    def modes(case: Case, mode: str) -> str | None:
        if mode != "backward" or case.device != "cpu":
            return None
        from torch.nn.attention.flex_attention import flex_attention

        x = torch.zeros(1, 1, 16, 16, requires_grad=True)
        try:
            with warnings.catch_warnings(action="ignore"):
                flex_attention(x, x, x)
        except NotImplementedError:
            return f"FlexAttention of torch {torch.__version__} has no backward pass on the CPU"
        return None

    return Subject(label, make, lambda case: model.window(case, size(case)), modes=modes)


# NATTEN


def _natten(label: str, options: dict[str, Any]) -> Subject:
    def rule(case: Case) -> tuple[tuple[int, ...], Any, Any]:
        size = _window_size(case, options["window"])
        sizes = (size,) * case.dims if isinstance(size, int) else tuple(size)
        return tuple(map(min, sizes, case.grid)), options["stride"], options["dilation"]

    def make(case: Case) -> Built:
        package: Any = import_module("natten")
        sizes, stride, dilation = rule(case)
        attention = (package.na1d, package.na2d, package.na3d)[case.dims - 1]
        settings: dict[str, Any] = {"stride": stride, "dilation": dilation, "is_causal": case.causal}
        engine = None
        if case.device == "cpu":  # only FlexAttention runs there; NATTEN compiles it where it trusts that
            settings["torch_compile"] = options["compile"]
            engine = "flex, compiled" if options["compile"] else "flex, eager"
            if options["compile"]:
                package.allow_flex_compile()

        def into(x: Tensor) -> Tensor:
            return _heads_last(x).unflatten(1, case.grid)

        def back(x: Tensor) -> Tensor:
            return x.flatten(1, case.dims).transpose(1, 2)

        return Built(lambda q, k, v: attention(q, k, v, sizes, **settings), into=into, back=back, engine=engine)

    def modes(case: Case, mode: str) -> str | None:
        if mode == "backward" and case.device == "cpu":
            return "NATTEN has no backward pass on the CPU (it runs on FlexAttention there)"
        return None

    def work(case: Case) -> Work:
        sizes, stride, dilation = rule(case)
        return model.window(case, sizes, stride, dilation)

    return Subject(label, make, work, modes=modes)


# flash-linear-attention


def _gla(label: str, options: dict[str, Any]) -> Subject:
    def make(case: Case) -> Built:
        _only(case, causal=True)
        _fla(case)
        package: Any = import_module("fla.ops.gla")
        shape = (case.batch, case.tokens, case.heads, case.head_dim)
        gate = F.logsigmoid(torch.randn(shape, device=case.device, dtype=case.torch_dtype)) / 16
        return Built(
            lambda q, k, v: package.chunk_gla(q, k, v, gate)[0], into=_heads_last, back=None,
            why_no_error="linear attention with gates: not an approximation of softmax attention",
        )  # fmt: skip

    return Subject(label, make, model.linear)


def _nsa(label: str, options: dict[str, Any]) -> Subject:
    def make(case: Case) -> Built:
        _only(case, causal=True)
        _fla(case)
        if case.heads % 16:
            raise Refused(f"it needs 16 query heads for every key head; {case.heads} heads are not a multiple of 16")
        package: Any = import_module("fla.ops.nsa")
        gates = torch.full((3, case.batch, case.tokens, case.heads), 1 / 3, device=case.device, dtype=case.torch_dtype)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            few = slice(None, None, 16)  # one key head for sixteen query heads: its least group
            return package.parallel_nsa(
                q, k[:, :, few].contiguous(), v[:, :, few].contiguous(), *gates,
                block_counts=options["count"], block_size=options["block"], window_size=options["window"],
            )  # fmt: skip

        return Built(run, into=_heads_last, back=None, why_no_error="it shares one key head among sixteen query heads")

    return Subject(label, make, lambda case: None)


# lucidrains' packages


def _local(label: str, options: dict[str, Any]) -> Subject:
    size = options["window"]

    def make(case: Case) -> Built:
        _only(case)
        package: Any = import_module("local_attention")
        module = package.LocalAttention(
            size, causal=case.causal, autopad=True, use_rotary_pos_emb=False, dim=case.head_dim
        )  # fmt: skip
        return Built(module.to(case.device, case.torch_dtype).eval())

    return Subject(label, make, lambda case: model.blocks(case, size))


def _linear(label: str, options: dict[str, Any]) -> Subject:
    def make(case: Case) -> Built:
        _only(case)
        package: Any = import_module("linear_attention_transformer.linear_attention_transformer")
        bucket = options["bucket"]
        if case.causal and case.tokens % bucket:
            raise Refused(f"its causal form needs a multiple of {bucket} tokens, not {case.tokens:,}")

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (
                package.causal_linear_attn(q, k, v, bucket_size=bucket) if case.causal else package.linear_attn(q, k, v)
            )

        return Built(run, back=None, why_no_error="linear attention: not an approximation of softmax attention")

    return Subject(label, make, model.linear)


def _layer(module: nn.Module, case: Case) -> Built:
    placed = module.to(case.device, case.torch_dtype).eval()
    return Built(placed, tuple(placed.parameters()), back=None, why_no_error=LAYER)


def _nystrom(label: str, options: dict[str, Any]) -> Subject:
    def make(case: Case) -> Built:
        _only(case, causal=False)
        package: Any = import_module("nystrom_attention")
        module = package.NystromAttention(case.width, case.head_dim, case.heads, options["landmarks"])
        return _layer(module, case)

    return Subject(label, make, lambda case: None, level="layer")


def _h_transformer(label: str, options: dict[str, Any]) -> Subject:
    def make(case: Case) -> Built:
        _only(case)
        package: Any = import_module("h_transformer_1d.h_transformer_1d")
        shared: dict[str, Any] = {
            "heads": case.heads, "dim_head": case.head_dim, "block_size": options["block"],
        }  # fmt: skip
        if case.tokens < 4 * options["block"]:
            raise Refused(f"it needs at least {4 * options['block']} tokens with block={options['block']}")
        module = (
            package.CausalHAttention1D(case.width, max_seq_len=1 << (case.tokens - 1).bit_length(), **shared)
            if case.causal
            else package.HAttention1D(case.width, **shared)
        )
        return _layer(module, case)

    return Subject(label, make, lambda case: None, level="layer")


def _reformer(label: str, options: dict[str, Any]) -> Subject:
    def make(case: Case) -> Built:
        _only(case)
        package: Any = import_module("reformer_pytorch.reformer_pytorch")
        bucket = options["bucket"]
        if case.tokens % (2 * bucket):
            raise Refused(f"it needs a multiple of {2 * bucket} tokens, not {case.tokens:,}")
        module = package.LSHAttention(bucket_size=bucket, n_hashes=options["hashes"], causal=case.causal)
        module = module.to(case.device).eval()

        def into(x: Tensor) -> Tensor:
            return x.flatten(0, 1)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return module(q, v)[0]

        return Built(run, into=into, back=None, why_no_error="queries are its keys, k is not read")

    return Subject(label, make, lambda case: None)


PEERS: dict[str, Peer] = {
    "sdpa": Peer("scaled_dot_product_attention, torch chooses", None, "torch", {}, _sdpa_subject(None)),
    "sdpa-flash": _backend("its flash backend", "FLASH_ATTENTION"),
    "sdpa-efficient": _backend("its memory-efficient backend", "EFFICIENT_ATTENTION"),
    "sdpa-cudnn": _backend("its cuDNN backend", "CUDNN_ATTENTION"),
    "sdpa-math": _backend("its backend of plain products", "MATH"),
    "flex": Peer("compiled FlexAttention, sliding window", None, "torch", {"window": None}, _flex),
    "natten": Peer(
        "neighbourhood attention, 1-3 D", "natten", "natten",
        {"window": None, "stride": 1, "dilation": 1, "compile": False}, _natten,
    ),
    "fla-gla": Peer("gated linear attention", "flash-linear-attention", "fla", {}, _gla, _fla),
    "fla-nsa": Peer(
        "native sparse attention", "flash-linear-attention", "fla",
        {"count": 16, "block": 64, "window": 64}, _nsa, _fla,
    ),
    "local-attention": Peer(
        "own block and its neighbours", "local-attention", "local_attention", {"window": 64}, _local
    ),
    "linear-attention-transformer": Peer(
        "linear attention", "linear-attention-transformer", "linear_attention_transformer", {"bucket": 64}, _linear
    ),
    "nystrom-attention": Peer(
        "Nyström attention", "nystrom-attention", "nystrom_attention", {"landmarks": 64}, _nystrom
    ),
    "h-transformer-1d": Peer(
        "hierarchical attention; speed only, its numbers are wrong", "h-transformer-1d", "h_transformer_1d",
        {"block": 16}, _h_transformer,
    ),
    "reformer-pytorch": Peer(
        "attention within hash buckets", "reformer-pytorch", "reformer_pytorch", {"bucket": 64, "hashes": 4}, _reformer
    ),
}  # fmt: skip
"""Every peer by the name that ``--peers`` takes."""
