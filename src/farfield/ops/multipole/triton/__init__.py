"""The Triton engine: fused kernels for GPUs, forward and backward, in memory linear in N and without atomics.

Nothing of size queries times keys, and no gathered keys, are written to memory: every program reads what its leaf
block sees through the plan's tables. Importing this package does not import triton; running a call does. With
TRITON_INTERPRET=1 in the environment before triton is first imported, the kernels run on CPU, slowly, for tests.

    tables      what reads what, and turned round (numpy, cached)
    kernels_*   the device code
    cells       the pyramid: its launches up and down
    launch      one call: forward and backward
    tuning      tile sizes
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from farfield.ops.multipole.engines import Request
from farfield.ops.multipole.settings import Result, Settings, Tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def why_not(request: Request) -> str | None:
    """None where the kernels can run the request, otherwise the reason in one sentence."""
    if request.device.type != "cuda" and not (interpreted() and request.device.type == "cpu"):
        return f"its kernels run on CUDA devices, not on {request.device.type} (TRITON_INTERPRET=1 interprets them)"
    if not _installed():
        return "triton is not installed"
    if request.device.type == "cuda" and torch.cuda.get_device_capability(request.device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or more"
    if request.dtype not in DTYPES:
        return f"its kernels compute in float32, float16 or bfloat16, not in {request.dtype}"
    if interpreted() and request.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    if not 16 <= request.head_dim <= 256:
        return f"its kernels take head widths from 16 to 256, not {request.head_dim}"
    if request.query_rank:
        return "it has no kernel for pooled queries (query_rank)"
    if request.dropout:
        return "it has no kernel for dropout of the weights"
    return None


def forward(s: Settings, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, N, D] in the dtype of the query and lse [B, Hq, N] in float32."""
    from farfield.ops.multipole.triton import launch

    with _on(tensors.query.device):
        return launch.forward(s, tensors)


def backward(s: Settings, tensors: Tensors, result: Result) -> list[Tensor]:
    """Gradients of query, key, value, level_bias (empty where there is none) and of each weight, in this order."""
    from farfield.ops.multipole.triton import launch

    with _on(tensors.query.device):
        return launch.backward(s, tensors, result)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
