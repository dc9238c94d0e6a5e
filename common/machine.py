"""The machine: its name, the precision it trains in fastest, what a process costs on it."""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

# In bf16 the weights and their updates stay in fp32: only products get faster.
FASTER = 1.3
INSTRUCTION_SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def device_name(device: str | torch.device) -> str:
    """Returns the GPU's name, or the processor's; with `mps` behind it where its GPU computes."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    if sys.platform == "darwin":  # where platform says "arm"
        with contextlib.suppress(OSError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            name = done.stdout.strip() or name
    return name if kind == "cpu" else f"{name} ({kind})"


def instruction_sets() -> list[str]:
    """Returns those of the CPU's instruction sets that decide int8 speed (none where unknown)."""
    with contextlib.suppress(OSError):
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        return [name for name in INSTRUCTION_SETS if name in words]
    return []


def training_precision(asked: str) -> str:
    """Returns what --precision stands for here: fp32, bf16 or fp16.

    Says on stderr what auto takes on a CPU, where it depends on more than the hardware.
    """
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        # Without emulation: GPUs before Ampere hold bf16, and compute it slower than fp32.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    names = [name for name in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(name)]
    times_as_fast = bf16_times_as_fast() if names else 0.0
    taken = "bf16" if times_as_fast > FASTER else "fp32"
    why = "no amx_bf16 or avx512_bf16 here"
    if names:
        why = f"{names[0]}: products of matrices {times_as_fast:.1f} times as fast as in fp32"
    print(f"precision auto: {taken} ({why})", file=sys.stderr)
    return taken


def bf16_times_as_fast() -> float:
    """Returns how many times as fast as in fp32 a product of matrices is in bf16."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(10):
        for dtype, times in seconds.items():
            left, right = (torch.ones(size, dtype=dtype) for size in ((1024, 384), (384, 1536)))
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def peak_memory() -> int:
    """Returns the most memory that this process has had, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, kilobytes on Linux


def cost(wall_seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """Returns what something cost, as run.json keeps it: seconds, rounded to hundredths.

    CPU seconds are those of all threads; peak_memory_mb (2^20) is the most that the process has
    had until now. Where CUDA is, peak_gpu_memory_mb is the most that its tensors took of the GPU,
    peak_gpu_reserved_mb that with what torch kept for later ones and for graphs: what has to fit.
    """
    figures = {
        "wall_seconds": round(wall_seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_memory_mb": peak_memory() // 2**20,
    }
    if torch.cuda.is_available():
        figures["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() // 2**20
        figures["peak_gpu_reserved_mb"] = torch.cuda.max_memory_reserved() // 2**20
    return figures


def process_cost() -> dict[str, Any]:
    """Returns what this process has cost since it began, imports included."""
    return cost(time.time() - psutil.Process().create_time(), time.process_time())


@contextlib.contextmanager
def cost_of(part: str, parts: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Adds to `parts` what the block cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    parts[part] = cost(time.perf_counter() - wall, time.process_time() - cpu)
