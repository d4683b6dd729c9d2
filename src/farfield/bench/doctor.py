"""What an issue report needs: versions, devices, compiler, and which engines and peers can run here, or why not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from typing import Any

import torch

from farfield.bench.case import DTYPES
from farfield.bench.machine import describe_machine
from farfield.bench.memory import available_bytes, why_unmeasured
from farfield.bench.peers import PEERS
from farfield.ops.multipole import ENGINES, Request, can_run

__all__ = ["examine"]

PACKAGES = (
    "numpy", "triton", "transformers", "safetensors", "rich", "typer", "matplotlib", "timm", "torchvision", "einops",
    "lightning", "accelerate",
)  # fmt: skip
"""Packages beside torch whose version may matter."""
HEAD_DIM = 64
_FORMAT = "farfield-doctor/1"
_PREFIX = "cannot run this call: "
_SETTINGS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CXX", "TRITON_INTERPRET", "TORCH_CPP_LOG_LEVEL",
    "ATEN_CPU_CAPABILITY", "PYTORCH_CUDA_ALLOC_CONF", "FARFIELD_TUNE",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Everything, as JSON can hold it.

    Engines are asked through their own ``why_not``; one that is built on first use may be built now, which takes some
    seconds once.
    """
    devices = _devices()
    return {
        "format": _FORMAT,
        "versions": _versions(),
        "machine": _machine(),
        "devices": devices,
        "environment": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "engines": [_engine(engine, device["name"]) for engine in ENGINES for device in devices],
        "peers": {name: peer.why_not(devices[min(1, len(devices) - 1)]["name"]) for name, peer in PEERS.items()},
    }


def _versions() -> dict[str, str | None]:
    import farfield

    found: dict[str, str | None] = {
        "farfield": farfield.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    packages = dict.fromkeys([*PACKAGES, *(p.package for p in PEERS.values() if p.package is not None)])
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machine() -> dict[str, Any]:
    facts = describe_machine("cpu")
    free = available_bytes("cpu")
    return {
        "system": facts["system"],
        "processor": facts["processor"],
        "capability": facts["capability"],
        "cores": facts["cores"],
        "threads": facts["threads"],
        "interop_threads": torch.get_num_interop_threads(),
        "free_memory": free,
        "compiler": _compiler(),
        "peak_memory": why_unmeasured("cpu") or "measured",
        "executable": "virtual environment" if sys.prefix != sys.base_prefix else "system",
    }


def _compiler() -> str:
    """The first line of what the C++ compiler says of itself, or that there is none."""
    asked = os.environ.get("CXX", "")
    words = shlex.split(asked)
    name = words[0] if words else next((n for n in ("c++", "g++", "clang++") if shutil.which(n)), None)
    if name is None or shutil.which(name) is None:
        return f"$CXX is {asked!r}, which is not found" if words else "none found (c++, g++, clang++, $CXX)"
    try:
        said = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{name} does not run: {error}"
    lines = said.stdout.strip().splitlines()
    return f"{name}: {lines[0]}" if lines else f"{name} says nothing of itself"


def _devices() -> list[dict[str, Any]]:
    """The CPU and every accelerator that torch sees."""
    found: list[dict[str, Any]] = [{"name": "cpu", "description": describe_machine("cpu")["processor"]}]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": f"cuda:{index}",
                "description": f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, "
                f"compute capability {facts.major}.{facts.minor}, CUDA {torch.version.cuda}",
            }
        )
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "description": "Apple's Metal"})
    return found


def _engine(engine: str, device: str) -> dict[str, Any]:
    """Which dtypes an engine of multipole attention computes in on a device, and why not in the others."""
    runs, reasons = [], {}
    for name, dtype in DTYPES.items():
        reason = can_run(engine, Request(torch.device(device), dtype, HEAD_DIM))
        if reason is None:
            runs.append(name)
        else:
            reasons[name] = reason.partition(_PREFIX)[2] or reason
    return {"engine": engine, "device": device, "dtypes": runs, "why_not": reasons}
