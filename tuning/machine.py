"""The machine of this process: cores, GPUs, memory and disk."""

import os
import re
import resource
import shutil
import sys
from pathlib import Path

import psutil
import torch

from tuning.errors import UserError

DISK_RESERVE = 64 << 20  # bytes to leave free
CGROUP = Path("/sys/fs/cgroup")


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Half of this process's share of the cores: the other half computes, or feeds the accelerator."""
    return min(8, max(1, count_cores() // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


def count_gpus() -> int:
    return torch.cuda.device_count()


def has_c_compiler() -> bool:
    """Whether Triton finds a compiler for the code that starts its kernels: it looks for these."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def free_memory() -> int:
    """Bytes of main memory that are free: of the machine, or of its container where that leaves less.

    Cached files count as free. The files of Linux' control groups: docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    free = psutil.virtual_memory().available
    try:
        limit, used, kinds = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:  # no container, or no Linux
        return free
    cached = re.search(r"^inactive_file (\d+)$", kinds, re.MULTILINE)
    return min(free, int(limit) - int(used) + int(cached[1] if cached else 0)) if limit.strip() != "max" else free


def free_device_memory(device: torch.device) -> int:
    """Bytes free on `device` and, since what is loaded comes through it, in main memory: the smaller number."""
    free = free_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free


def peak_memory_bytes() -> int:
    """The most memory that this process has held: allocated by PyTorch on CUDA where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux: its ru_maxrss begins with what the parent process held
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_space(output: Path, needed: int) -> None:
    """Raises `UserError` where `needed` bytes do not fit on the disk of `output`."""
    free = shutil.disk_usage(output.parent).free
    if free < needed + DISK_RESERVE:
        raise UserError(
            where=f"output {output}",
            problem=f"{(needed + DISK_RESERVE) / 1e6:,.0f} MB are needed, and {free / 1e6:,.0f} MB are free.",
            fix="Make room, or give another folder.",
        )
