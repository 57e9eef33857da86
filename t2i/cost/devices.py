"""What GPUs can do on paper, and what this machine's processors can do by a short measurement."""

import logging
import os
import re
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from t2i.config import DsConfig, Gpu
from t2i.errors import UserError

logger = logging.getLogger(__name__)

PRODUCT_SIZE = 256
"""Side of the matrices whose product tells how slow bf16 is."""

MEASURED_SIZE = 1024
"""Side of the matrices whose product tells a CPU's speed."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or one process's share of a CPU."""

    name: str
    peak_flops: float
    """Products and sums a second in the precision of training, without sparsity."""
    memory_bytes: float
    source: str
    """Where the two numbers are from."""
    unit: str = "GPU"
    """What there is one or many of."""
    reported: str = ""
    """Pattern of the name that CUDA gives it."""


def _gpu(name: str, teraflops: float, gibibytes: float, source: str, reported: str) -> Device:
    return Device(name, teraflops * 1e12, gibibytes * 2**30, f"{source}, bf16 dense", reported=reported)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 312, 40, "NVIDIA A100 data sheet", "A100-(SXM4|PCIE)-40GB"),
        _gpu("a100-80gb", 312, 80, "NVIDIA A100 data sheet", "A100(-SXM4-80GB| 80GB PCIe)"),
        _gpu("h100-80gb", 989, 80, "NVIDIA H100 SXM data sheet", "H100 80GB HBM3"),
        _gpu("h200", 989, 141 * 1e9 / 2**30, "NVIDIA H200 SXM data sheet", "H200"),
        _gpu("b200", 2250, 180 * 1e9 / 2**30, "NVIDIA DGX B200 data sheet", "B200"),
        _gpu("l40s", 362, 48 * 1e9 / 2**30, "NVIDIA L40S data sheet", "L40S"),
        _gpu("rtx4090", 165, 24, "NVIDIA Ada GPU architecture paper, sums in fp32", "RTX 4090"),
        _gpu("rtx3090", 71, 24, "NVIDIA GA102 GPU architecture paper, sums in fp32", "RTX 3090"),
    )
}


def find_device(name: Gpu, *, num_processes: int, is_half: bool) -> Device:
    """Look up a GPU, or measure this machine for `cpu`.

    Raises:
        UserError: a precision that a GPU's number is not known for.
    """
    if name == "cpu":
        return measure_cpu(num_processes=num_processes, is_half=is_half)
    if not is_half:
        raise UserError(f"the peak of {name} is known for bf16 only; give a --ds_config that enables it.")
    return GPUS[name]


def peak_flops_of(name: str) -> float | None:
    """Look up what a device of CUDA's name does in bf16; None for one that is not in the list, or another build."""
    found = [gpu for gpu in GPUS.values() if re.fullmatch(rf"(NVIDIA )?(GeForce )?{gpu.reported}", name)]
    return found[0].peak_flops if found else None


def measure_cpu(*, num_processes: int, is_half: bool) -> Device:
    """Time one matrix product on all cores, and share it and the memory out among the processes."""
    dtype = torch.bfloat16 if is_half else torch.float32
    flops = 2 * MEASURED_SIZE**3 / product_seconds(dtype, size=MEASURED_SIZE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = (
        f"a product of {MEASURED_SIZE} x {MEASURED_SIZE} in {dtype} timed here, on {os.cpu_count()} cores"
    )
    return Device("cpu", flops / num_processes, memory / num_processes, source, unit="process")


def warn_of_slow_bf16(model: nn.Module, ds_config: DsConfig, *, tokens: int) -> None:
    """Warn once where bf16 is asked of a CPU that is slow at it, with the time a step will take."""
    if torch.cuda.is_available() or not ds_config.get("bf16", {}).get("enabled") or dist.get_rank() != 0:
        return
    seconds = {dtype: product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    if seconds[torch.bfloat16] < 3 * seconds[torch.float32]:
        return
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    step_seconds = 3 * num_parameters * tokens / PRODUCT_SIZE**3 * seconds[torch.bfloat16]
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    logger.warning(
        "bf16 is %.0f times slower than fp32 on this CPU: expect about %.0f s a step. For speed use"
        " --ds_config ds_configs/zero2_fp32.json.",
        ratio,
        step_seconds,
    )


def product_seconds(dtype: torch.dtype, *, size: int = PRODUCT_SIZE) -> float:
    """Time one product of two matrices of size x size on this CPU, the best of three."""
    matrix = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return min(times)
