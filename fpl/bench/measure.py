"""Seconds, memory and speed of this machine."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fpl.experiments.cache import device
from fpl.linear import linear

MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices whose product is the peak


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes; a GPU is waited for."""
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def wait() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_speed() -> float:
    """Return the GFLOP/s of a product of square matrices in single precision, the best of three."""
    n = MATRIX[device()]
    a = torch.randn(n, n, device=device())
    seconds = min(timed(lambda: linear(a, a)) for _ in range(3))
    return 2 * n**3 / seconds / 1e9


def memory(call: Callable[[], object]) -> float:
    """Return the bytes in use at the peak of a call, above those before it.

    nan where the system does not say.
    """
    gc.collect()
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        # what was freed goes back to the system, so that it counts when it is taken again
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except (AttributeError, OSError):
        return float("nan")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Return VmRSS (now) or VmHWM (the peak) of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"{what}:\s*(\d+) kB", status)
    return 1024 * int(kilobytes)


def machine() -> str:
    """Return the machine in words."""
    if device() == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    found = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    name = found[0] if found else platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return f"{name}, {threads}, torch {torch.__version__}"
