"""The machine that a number was measured on: its name and its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch


def release_memory() -> None:
    """Free the GPU memory that the last model left cached, so that the next model finds it empty."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def restart_resident_peak() -> int | None:
    """Restart the system's record of the peak of resident memory, and return the resident bytes; None off Linux."""
    with suppress(AttributeError, OSError, TypeError):  # freed pages that glibc keeps would hide a growth
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident_memory("VmRSS")
    except OSError:
        return None


def resident_memory(key: str) -> int:
    """Bytes of resident memory: `VmRSS` now, or `VmHWM` at the peak."""
    return _kilobytes("/proc/self/status", key)


def free_memory() -> int | None:
    """Bytes of memory that programs can still allocate; None where the system is not Linux."""
    try:
        return _kilobytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return None


def _kilobytes(file: str, key: str) -> int:
    return 1024 * int(re.findall(rf"^{key}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)[0])


def describe_machine(device: str) -> dict[str, str | int | float | None]:
    """Facts needed to repeat a measurement: device, threads, load of the machine, PyTorch's version."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": load,
        "torch": torch.__version__,
    }


def device_name(device: str) -> str:
    """The name of a GPU, or of the CPU with the number of PyTorch's threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = None
    with suppress(OSError):
        name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    threads = torch.get_num_threads()
    return f"{name[1] if name else platform.machine()}, {threads} thread{'s' * (threads > 1)}"
