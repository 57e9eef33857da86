"""The processes of a job: what a launcher sets, and how ranks find each other."""

import atexit
import logging
import os
import random
import socket
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState

from t2i.config import DsConfig
from t2i.distributed.rendezvous import meeting_place
from t2i.env import (
    extensions_folder,
    keep_memory,
    operators_built,
    operators_needed,
    taken_port_advice,
    unusable_gpu,
    use_own_tools,
)
from t2i.errors import UserError

logger = logging.getLogger(__name__)

PATIENCE = timedelta(days=2)
"""How long a process waits in a collective for the slowest one; no bound of its own, because DeepSpeed's 10 minutes
would end a rank that waits for another one's save. What hangs is ended by the run's watchdog, what died by the launcher
or, over gloo, by its lost connection."""


def start_processes() -> None:
    """Let the ranks of a job find each other; a process without a launcher is a job of one rank.

    Raises:
        UserError: another job uses the port where ranks meet.
    """
    prepare_environment()
    import deepspeed  # here: it takes six seconds, which `join` can do without, and must follow DS_ACCELERATOR

    use_own_gpu()
    try:
        deepspeed.init_distributed(
            dist_backend=None, verbose=False, timeout=PATIENCE, init_method=meeting_place()
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(taken_port_advice(int(os.environ["MASTER_PORT"]))) from error
    # Once, however often this is called in one process. NCCL's group is left alone: closing it may wait for lost ranks.
    atexit.unregister(_close_gloo)
    atexit.register(_close_gloo)


def use_own_gpu() -> None:
    """Make this rank's GPU the current one, if there are GPUs.

    Raises:
        UserError: there are fewer GPUs than ranks on this machine.
    """
    # Before the first collective: one of objects is made of tensors on the current device, which is GPU 0 on every
    # rank until it is set, and NCCL refuses a tensor that is not on the rank's own GPU.
    if not torch.cuda.is_available():
        return
    own, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if own >= there:
        raise UserError(
            f"LOCAL_RANK is {own}, but this process sees {there} GPUs; expected a GPU per process. Start fewer"
            " processes, or let each see all GPUs of its machine (with Slurm --gpus-per-node, not --gpus-per-task)."
        )
    torch.cuda.set_device(own)


def _close_gloo() -> None:
    """Stop gloo's threads before the interpreter exits, which may otherwise abort with another exit status.

    Source: https://github.com/pytorch/pytorch/issues/190489.
    """
    # NCCL's group is left alone: closing it can wait for ranks that are lost.
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def make_repeatable(is_asked: bool, *, seed: int) -> None:
    """Seed the global random states of libraries, and choose deterministic operators if asked."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if is_asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's library is first used
    torch.use_deterministic_algorithms(is_asked)
    # Its choice depends on timings, so it differs from run to run.
    torch.backends.cudnn.benchmark = False


def prepare_environment() -> None:
    """Set the environment variables that libraries read, before any of these libraries is imported or used.

    Raises:
        UserError: the launcher's variables are incomplete or contradict each other.
    """
    # tokenizers would warn in each process that the loader forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # RANK alone marks a launched process: `deepspeed`, `torchrun`, Slurm's script and an operator's pod each leave out
    # some of the other variables.
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ.setdefault("LOCAL_RANK", "0")
    # Streaming tells machines apart by it. `deepspeed` calls it LOCAL_SIZE.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    use_own_tools()
    keep_memory()
    _check_launch()
    if os.environ["RANK"] != "0":
        logging.getLogger("t2i").setLevel(logging.ERROR)  # the first rank speaks for all
    # Blocks of many sizes come and go, as micro-batches differ in length: segments that grow do not fragment.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if reason := unusable_gpu():
        logger.warning("%s", reason)
    if not torch.accelerator.is_available():
        # DeepSpeed reads it when it is imported. Without it, DeepSpeed searches for accelerators and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _check_launch() -> None:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set, so a launcher started this process, but {', '.join(missing)} is not set."
        )
    local_rank, on_this_node, in_all = (
        int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    )
    if local_rank >= on_this_node or in_all % on_this_node:
        raise UserError(
            f"LOCAL_RANK {local_rank}, LOCAL_WORLD_SIZE {on_this_node} and WORLD_SIZE {in_all} contradict each other;"
            " LOCAL_WORLD_SIZE is the number of processes per node."
        )


def warn_of_building(ds_config: DsConfig) -> None:
    """Log on the first rank that DeepSpeed is about to compile its operators, which takes minutes once."""
    if torch.cuda.is_available() or os.environ["RANK"] != "0":
        return
    names = operators_needed(ds_config)
    if operators_built(*names):
        return
    logger.warning(
        "DeepSpeed compiles its C++ operators (%s) once, which takes one to eight minutes, in %s",
        ", ".join(names),
        extensions_folder(),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join() -> PartialState:
    """Join the other processes, if there are any; the result has process_index, num_processes and device."""
    keep_memory()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        # With it, accelerate would open a process group of one rank, at whatever MASTER_PORT says.
        os.environ.pop("LOCAL_RANK", None)
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE, init_method=meeting_place())


def leave_job(processes: PartialState) -> None:
    """Close the process group that join opened."""
    if processes.num_processes > 1:
        processes.destroy_process_group()
