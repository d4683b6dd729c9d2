"""Peak memory of a block of code, and the memory that is still free.

On Linux the kernel keeps the highest resident size of the process (VmHWM); writing ``5`` to ``/proc/self/clear_refs``
sets it back to the present size, so a peak can be taken around any block without a second process. On CUDA the
allocator's own counters are used. Elsewhere nothing reliable exists, and the peak is None together with the reason.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from pathlib import Path
from types import TracebackType

import torch

from farfield.ops.memory import forget

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_RESET_PEAK = "5"
_KIB = 1024


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes, such as VmRSS or VmHWM."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * _KIB
    raise OSError(f"{_STATUS} has no field {field}")


def why_unmeasured(device: torch.device | str = "cpu") -> str | None:
    """None when peaks can be measured on ``device``, otherwise the reason in one sentence.

    Whether the kernel lets a process reset its peak is known only from doing so; the first question about the CPU does
    that once, later ones change nothing.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"peak memory is not measured on {device.type} devices"
    if not sys.platform.startswith("linux"):
        return f"peak memory of a process cannot be reset on {sys.platform}, only on Linux"
    return _why_not_reset()


@functools.cache
def _why_not_reset() -> str | None:
    try:
        _CLEAR.write_text(_RESET_PEAK)
        _status_bytes("VmHWM")
    except OSError as error:
        return f"peak memory cannot be reset here ({error})"
    return None


def give_back() -> None:
    """Collects garbage, gives up kept buffers and returns freed heap pages to the system: no later peak hides there."""
    gc.collect()
    forget()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; musl has no such function
        if trim is not None:
            trim(0)


class PeakMemory:
    """Context manager: how far memory rises inside the block.

    On CPU this is the resident size of the whole process, on CUDA the bytes that torch has allocated.

    Attributes:
        raised: bytes above the level at entry, at the highest moment; None where it cannot be measured.
        reason: why ``raised`` is None, otherwise None.

    Example:
        >>> with PeakMemory("cpu") as peak:
        ...     x = torch.ones(1 << 20)
        >>> peak.raised is None or peak.raised >= 0
        True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.raised: int | None = None
        self.reason: str | None = None
        self._start = 0

    def __enter__(self) -> PeakMemory:
        self.reason = why_unmeasured(self.device)
        if self.reason is not None:
            return self
        give_back()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            _CLEAR.write_text(_RESET_PEAK)
            self._start = _status_bytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reason is not None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            high = torch.cuda.max_memory_allocated(self.device)
        else:
            high = _status_bytes("VmHWM")
        self.raised = max(0, high - self._start)


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated on ``device``; None where that is unknown.

    On Linux the smaller of the machine's available memory and what the control group still allows (containers).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    free = [
        int(line.split()[1]) * _KIB for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:")
    ]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
        except (OSError, ValueError):  # no such group, or the limit reads "max"
            continue
    return min(free) if free else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; torch raises a plain RuntimeError for that on CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        said in text for said in ("out of memory", "can't allocate memory", "not enough memory")
    )
