"""Describe this machine and check that a run can start on it. `python -m t2i.env` prints it for a bug report."""

import ctypes
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from t2i.config import DsConfig
from t2i.errors import CheckpointError, UserError

PACKAGES = ("t2i", "torch", "deepspeed", "transformers", "diffusers", "mosaicml-streaming", "numpy")
SHARED_MEMORY = Path("/dev/shm")

VARIABLES = {
    "T2I_DEBUG": "1 shows the traceback of errors that otherwise end in a sentence",
    "T2I_FAULT": "RANK:STEP:ACTION[:ARG] breaks a run on purpose, to see what it does then",
    "RANK": "this process's number among all; set by launchers. Without it a process is a job of its own",
    "WORLD_SIZE": "processes of the job; set by launchers",
    "LOCAL_RANK": "this process's number on its machine, 0 by default; set by launchers",
    "LOCAL_WORLD_SIZE": "processes on each machine, LOCAL_SIZE or 1 by default; set by launchers",
    "LOCAL_SIZE": "the same, as the `deepspeed` launcher calls it",
    "MASTER_ADDR": "machine of rank 0; set by launchers. 127.84.50.73 where all ranks are on one machine",
    "MASTER_PORT": "port by which ranks find each other; set by launchers",
    "GLOO_SOCKET_IFNAME": "lo by default where all ranks are on one machine, so that no other reaches them; gloo's own",
    "TORCHELASTIC_USE_AGENT_STORE": "set by torchrun, whose own process then holds the port",
    "TORCH_EXTENSIONS_DIR": "where DeepSpeed's C++ operators are built; by default in the Python environment",
    "DS_ACCELERATOR": "cpu by default where torch finds no GPU; DeepSpeed's own",
    "CUDA_VISIBLE_DEVICES": "the GPUs that `t2i study --workers N` shares out, one to a worker; a tracker sees none",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True by default, against fragments in a GPU's memory; torch's own",
    "PYTORCH_CUDA_ALLOC_CONF": "the same by its older name: where either is set, neither is changed",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8 by default with train.deterministic; CUDA's own",
    "THP_MEM_ALLOC_ENABLE": "1 by default: torch asks for huge pages on CPUs",
    "TOKENIZERS_PARALLELISM": "false by default: loader processes are many already",
    "TQDM_MININTERVAL": "seconds between two looks of progress; 10 by default where it is written to no terminal",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "set to 1 while DeepSpeed's state is loaded, so that no pickle runs code",
    "PATH": "programs of the Python environment are put first, for ninja",
    "PYTHONPATH": "a study's jobs and a run's trackers get the folder of t2i put first",
    "XDG_CACHE_HOME": "its t2i/ has Inception weights, reference features and the exact judge; by default ~/.cache/t2i",
    "T2I_API_KEY": "key that clients of `t2i serve` and `t2i play` must give; without one, only this machine is let in",
    "GRADIO_ANALYTICS_ENABLED": "set to False by `t2i play`: Gradio reports nothing",
    "GRADIO_TEMP_DIR": "set by `t2i play`: files that its page shows, which are removed at its end",
    "MLFLOW_TRACKING_URI": "where MLflow keeps runs; by default trackers/mlflow.db in the run's folder",
    "HF_ENDPOINT": "address of the hub that exports are uploaded to; Hugging Face's own",
}
"""Every environment variable that t2i reads or sets itself; libraries read more."""

OF_A_JOB = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
)  # fmt: skip
"""Variables that make a process a rank of a job."""

BUFFER_BYTES = 69_206_024
"""Shared memory per rank of DeepSpeed's reduction on CPUs."""
NCCL_BYTES = 2**25
"""Shared memory per rank of several GPUs on one machine, which NCCL and loader processes take: an estimate."""
ORDER_BYTES = 8
"""Shared memory per sample of an epoch's order, which Streaming writes there on each machine."""
SPARE_BYTES = 2**23
"""Shared memory for the rest of Streaming and loader processes."""
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
"""What Linux has where an NVIDIA driver is loaded."""
LEAST_DISK_BYTES = 2**20
"""Free disk space that a run's log needs; what a checkpoint needs is checked at each save."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt."""
DEFAULT_PORT = 29500
"""Port at which the ranks of a job find each other, if started by `deepspeed`."""


def with_own_code(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables of a process that finds this t2i first, wherever it is started."""
    path = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**environment, "PYTHONPATH": path}


def outside_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables of a process that does not take itself for a rank of this job."""
    return {key: value for key, value in environment.items() if key not in OF_A_JOB}


def extensions_folder() -> Path:
    """Name the folder of DeepSpeed's C++ operators."""
    # In this Python environment, so that removing it removes everything.
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix) / "torch_extensions"))


def operators_built(*names: str) -> bool:
    """Tell whether DeepSpeed's C++ operators of these names are compiled."""
    return all(any(extensions_folder().rglob(f"{name}*.so")) for name in names)


def operators_needed(ds_config: DsConfig) -> list[str]:
    """List the C++ operators that a run on CPUs needs."""
    has_torch_adam = ds_config.get("optimizer", {}).get("params", {}).get("torch_adam")
    return ["deepspeed_shm_comm"] if has_torch_adam else ["deepspeed_shm_comm", "fused_adam"]


def keep_memory() -> None:
    """Let this process keep the memory that it frees, and have torch put large tensors in huge pages."""
    # On a CPU each training step allocates and frees the same memory. By default glibc returns large blocks to the
    # system, which hands out zeroed pages one by one at the next touch: a fifth of the benchmark step's time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Only glibc has it; other C libraries are left as they are.
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def use_own_tools() -> None:
    """Put this environment's programs first on PATH."""
    # torch calls `ninja` by name, and a virtual environment need not be activated.
    own = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])


def check_machine(ds_config: DsConfig, *, run_dir: Path, num_samples: int = 0) -> None:
    """Check once per machine that a launched run can start.

    Args:
        num_samples: training samples, whose order of an epoch Streaming keeps in shared memory; 0 if not known yet.

    Raises:
        UserError: the port is taken, shared memory is too small, or a compiler is missing.
        CheckpointError: the run's disk is full.
    """
    # Before the collectives start: from there on, each of these ends with a traceback or a signal on some rank.
    problems = []
    # A single rank meets nobody, and torchrun's own process holds the port.
    has_port = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or os.environ["WORLD_SIZE"] == "1"
    if os.environ["RANK"] == "0" and not has_port:
        problems.append(port_problem(int(os.environ["MASTER_PORT"])))
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        problems.append(compiler_problem(operators_needed(ds_config)))
        num_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        problems.append(shared_memory_problem(num_ranks=num_ranks, num_samples=num_samples))
    else:
        num_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        problems.append(shared_memory_problem(num_ranks=num_ranks, num_samples=num_samples, on_gpus=True))
        problems.append(cuda_compiler_problem(operators_needed(ds_config)))
    for problem in filter(None, problems):
        raise UserError(problem)
    if problem := disk_problem(run_dir):
        raise CheckpointError(problem)


def port_problem(port: int) -> str:
    """Describe the problem if a port is taken, and name a free one; empty if there is none."""
    return "" if _is_free(port) else taken_port_advice(port)


def taken_port_advice(port: int) -> str:
    """Say that a port is taken, and name a free one."""
    other = next((free for free in range(port + 1, min(port + 100, 2**16)) if _is_free(free)), None)
    advice = f"deepspeed --master_port {other}" if other else "deepspeed --master_port with a free one"
    return (
        f"port {port}, at which ranks find each other, is taken, usually by another run. Start with {advice}."
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # The port of a run that has just ended stays reserved for a minute, but can be used with this option.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def shared_memory_problem(*, num_ranks: int, num_samples: int = 0, on_gpus: bool = False) -> str:
    """Describe the problem if shared memory is too small; empty if there is none.

    Args:
        num_ranks: on this machine.
        num_samples: as of check_machine.
    """
    # One GPU talks to no other.
    per_rank = BUFFER_BYTES if not on_gpus else NCCL_BYTES if num_ranks > 1 else 0
    needed = num_ranks * per_rank + num_samples * ORDER_BYTES + SPARE_BYTES
    if not SHARED_MEMORY.is_dir() or _free_bytes(SHARED_MEMORY) >= needed:
        return ""
    ranks = f"{num_ranks} ranks on {'GPUs' if on_gpus else 'CPUs'}" if num_ranks * per_rank else ""
    order = f"the order of {num_samples:,} samples" if num_samples else ""
    whose = " and ".join(filter(None, (ranks, order))) or "a run"
    return (
        f"{SHARED_MEMORY} has {_free_bytes(SHARED_MEMORY) / 1e6:.0f} MB free; expected {needed / 1e6:.0f} MB for"
        f" {whose}, or the kernel kills the processes. In Docker give --shm-size {-(-needed // 10**9)}g, in Kubernetes"
        " an emptyDir in memory."
    )


def unusable_gpu() -> str:
    """Say why torch cannot use the NVIDIA GPU of this machine; empty if it can, or there is none to use."""
    try:
        import torch  # here: it takes seconds, and the report may be that it is broken
    except (ImportError, OSError):
        return ""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
    if is_hidden or not NVIDIA_DRIVER.is_file() or torch.cuda.is_available():
        return ""
    said = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", NVIDIA_DRIVER.read_text())
    driver = f"driver {said[1]}" if said else "its driver"
    made_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"this machine has an NVIDIA GPU with {driver}, which torch {torch.__version__} cannot use: it is built"
        f" {made_for}. Everything runs on the CPU. Install a newer driver, or a torch for this one; `nvidia-smi` names"
        " the newest CUDA that it knows. CUDA_VISIBLE_DEVICES= says that the CPU is meant."
    )


def compiler_problem(names: list[str]) -> str:
    """Describe what is missing to compile DeepSpeed's C++ operators; empty if nothing is, or they are compiled."""
    use_own_tools()
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if not missing or operators_built(*names):
        return ""
    return (
        f"{' and '.join(missing)} not found, so DeepSpeed's operators ({', '.join(names)}) cannot be compiled."
        " Install them with `apt-get install g++` and `pip install ninja`."
    )


def cuda_compiler_problem(names: list[str]) -> str:
    """Describe the problem if DeepSpeed's Adam would be compiled for a GPU without nvcc; empty if there is none."""
    from torch.utils.cpp_extension import (
        CUDA_HOME,
    )  # here: torch takes seconds, and `python -m t2i.env` may lack it

    if "fused_adam" not in names or CUDA_HOME or operators_built("fused_adam"):
        return ""
    return (
        "there is no CUDA toolkit (nvcc) here, so DeepSpeed's Adam cannot be compiled. Put"
        ' "optimizer": {"params": {"torch_adam": true}} into --ds_config: torch\'s own fused Adam needs no compiler.'
    )


def torch_compile_problem() -> str:
    """Describe what torch.compile lacks on this machine; empty if nothing."""
    # Also on a GPU: Triton compiles the code that starts its kernels.
    if any(map(shutil.which, ("g++", "gcc", "clang", "cc"))):
        return ""
    return "train.compile needs a C++ compiler, and none is here. Install one with `apt-get install g++`."


def disk_problem(folder: Path) -> str:
    """Describe the problem if the disk of a folder is full; empty if there is none. The folder need not exist."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = _free_bytes(there)
    if free >= LEAST_DISK_BYTES:
        return ""
    return f"{there} has {free / 1e6:.0f} MB free; a run needs at least {LEAST_DISK_BYTES / 1e6:.0f} MB."


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def problems_here() -> list[str]:
    """List what would prevent a run of two ranks on CPUs from starting here."""
    found = [
        port_problem(int(os.environ.get("MASTER_PORT", DEFAULT_PORT))),
        compiler_problem(operators_needed({})),
        shared_memory_problem(num_ranks=2),
        disk_problem(Path()),
        unusable_gpu(),
    ]
    return [problem for problem in found if problem]


def machine_facts() -> dict[str, str]:
    """Collect facts about this machine, one short text each."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        "accelerators": _accelerators(),
    }
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    use_own_tools()
    for tool in ("g++", "ninja"):
        facts[tool] = shutil.which(tool) or "not found"
    facts["operators"] = str(extensions_folder())
    for label, folder in (("shared memory", SHARED_MEMORY), ("disk here", Path())):
        facts[label] = f"{_free_bytes(folder) / 1e9:.1f} GB free" if folder.exists() else "none"
    return facts


def _accelerators() -> str:
    try:
        import torch  # here: it takes seconds, and the report may be that it is broken
    except (ImportError, OSError) as error:  # OSError: a library of a broken installation
        return f"torch cannot be imported: {error}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "none"


def describe_lines() -> list[str]:
    """Write the facts and the problems out, one to a line."""
    facts = [f"{key:20s} {value}" for key, value in machine_facts().items()]
    return [*facts, *(f"{'problem':20s} {text}" for text in problems_here() or ["none"])]


if __name__ == "__main__":
    print("\n".join(describe_lines()))
