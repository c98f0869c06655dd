"""How much memory a way to run a model takes beyond the model itself. In: a device, a call. Out: bytes, or None where
nobody can say.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def kept(device: torch.device) -> int | None:
    """What the whole device has given out and does not get back: weights, engines, the pools of CUDA graphs, whoever
    allocated them. None on the CPU, where a compiler's own memory would drown it.
    """
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def transient(device: torch.device, call: Callable[[], object]) -> int | None:
    """The most that one call holds at a time and gives back; its results count."""
    if device.type != "cuda":
        return host_transient(call)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def host_transient(call: Callable[[], object]) -> int | None:
    """The same of this process, by Linux's own high-water mark; on other systems nobody knows."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no longer resident
        (PROCESS / "clear_refs").write_text("5")  # sets the mark back to what is resident now
        before = resident("VmRSS")
        call()
        return max(0, resident("VmHWM") - before)
    except (OSError, KeyError, AttributeError):
        return None


def resident(field: str) -> int:
    """Bytes, by a field of /proc/self/status. KeyError or OSError where there is none."""
    lines = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024
