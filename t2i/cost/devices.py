"""Peak speed of devices: of GPUs by their data sheets, of this machine's CPU by a short measurement."""

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
"""Side of the matrices whose product is timed to find out how slow bf16 is."""

MEASURED_SIZE = 1024
"""Side of the matrices whose product is timed to measure a CPU's speed."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or one process's share of a CPU."""

    name: str
    peak_flops: float
    """Floating-point operations per second in the precision of training, without sparsity."""
    memory_bytes: float
    source: str
    """Source of the two numbers."""
    unit: str = "GPU"
    """What one such device is called."""
    reported: str = ""
    """Regular expression of its name in CUDA."""


def _gpu(name: str, teraflops: float, gibibytes: float, source: str, reported: str) -> Device:
    return Device(name, teraflops * 1e12, gibibytes * 2**30, f"{source}, bf16 dense", reported=reported)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 312, 40, "NVIDIA A100 data sheet", "A100-(SXM4|PCIE)-40GB"),
        _gpu("a100-80gb", 312, 80, "NVIDIA A100 data sheet", "A100(-SXM4-80GB| 80GB PCIe)"),
        _gpu("h100-80gb", 989, 80, "NVIDIA H100 SXM data sheet", "H100 80GB HBM3"),
        _gpu("h100-pcie", 756, 80, "NVIDIA H100 PCIe data sheet", "H100 PCIe"),
        _gpu("h100-nvl", 835, 94 * 1e9 / 2**30, "NVIDIA H100 NVL data sheet", "H100 NVL"),
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
        raise UserError(
            f"the peak speed of {name} is known only for bf16; give a --ds_config that enables it."
        )
    return GPUS[name]


def peak_flops_of(name: str) -> float | None:
    """Look up the bf16 peak of a device by its CUDA name; None if it is not listed."""
    found = [gpu for gpu in GPUS.values() if re.fullmatch(rf"(NVIDIA )?(GeForce )?{gpu.reported}", name)]
    return found[0].peak_flops if found else None


def measure_cpu(*, num_processes: int, is_half: bool) -> Device:
    """Time one matrix product on all cores, and divide the speed and the memory among the processes."""
    dtype = torch.bfloat16 if is_half else torch.float32
    flops = 2 * MEASURED_SIZE**3 / product_seconds(dtype, size=MEASURED_SIZE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    source = (
        f"a {MEASURED_SIZE} x {MEASURED_SIZE} matrix product in {dtype}, timed here on {os.cpu_count()} cores"
    )
    return Device("cpu", flops / num_processes, memory / num_processes, source, unit="process")


def warn_of_slow_bf16(model: nn.Module, ds_config: DsConfig, *, tokens: int) -> None:
    """Warn on the first rank if this device is slow at bf16; of a CPU, estimate the time per step."""
    if not ds_config.get("bf16", {}).get("enabled") or dist.get_rank() != 0:
        return
    if torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            logger.warning(
                "%s has no bf16 of its own (NVIDIA GPUs have it since Ampere), so that it is emulated, which is slow."
                " Perhaps --ds_config ds_configs/zero2_fp32.json is faster here; measure both.",
                torch.cuda.get_device_name(),
            )
        return
    seconds = {dtype: product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    # CPUs without bf16 instructions are tens of times slower; a factor below three may be chance.
    if seconds[torch.bfloat16] < 3 * seconds[torch.float32]:
        return
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    # A step does three matrix products per parameter and token: one forward, two backward.
    step_seconds = 3 * num_parameters * tokens / PRODUCT_SIZE**3 * seconds[torch.bfloat16]
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    logger.warning(
        "bf16 is %.0f times slower than fp32 on this CPU: expect about %.0f s per step. For speed use"
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
    # The best, because other work on the machine can only make it slower.
    return min(times)
