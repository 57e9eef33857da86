"""The processes of a job: what a launcher sets, how ranks find each other, and what the first rank decides for all."""

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

from t2i.config.deepspeed_json import DsConfig
from t2i.env import extensions_folder, keep_memory, operators_built, operators_needed, use_own_tools
from t2i.errors import UserError

logger = logging.getLogger(__name__)

PATIENCE = timedelta(days=2)
"""How long a process waits for the slowest one; a process that dies ends all of them at once."""


def start_processes() -> None:
    """Let the ranks of a launched job find each other; a process without a launcher is a job of one rank.

    Raises:
        UserError: another job listens at the port where ranks meet.
    """
    prepare_environment()
    import deepspeed  # here: it chooses its accelerator when it is imported, and `join` needs none of its six seconds

    try:
        deepspeed.init_distributed(dist_backend=None, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = int(os.environ["MASTER_PORT"])
        raise UserError(
            f"another job holds port {port} of this machine; add --master_port {port + 1} after `deepspeed`."
        ) from error
    atexit.unregister(_close_gloo)
    atexit.register(_close_gloo)


def _close_gloo() -> None:
    """End gloo's threads before the interpreter: one that ends over them may abort, with another exit status.

    Source: https://github.com/pytorch/pytorch/issues/190489.
    """
    # NCCL's group is left alone: closing it can wait for ranks that are lost.
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def make_repeatable(is_asked: bool, *, seed: int) -> None:
    """Seed what random states libraries share, and choose the operators that give the same bits every time if asked."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if is_asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's library is first used
    torch.use_deterministic_algorithms(is_asked)
    torch.backends.cudnn.benchmark = False


def prepare_environment() -> None:
    """Fill in what a launcher sets and libraries read, before any of them is imported or used.

    RANK alone tells a launched process; `deepspeed`, `torchrun`, Slurm's script and an operator's pod each leave
    something out of the rest. Streaming tells machines apart by LOCAL_WORLD_SIZE when it opens a data set, which
    `deepspeed` calls LOCAL_SIZE; DeepSpeed reads DS_ACCELERATOR when it is imported.

    Raises:
        UserError: a launched process lacks an address or a size, or has a local rank beyond its node.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    use_own_tools()
    keep_memory()
    _check_launch()
    if os.environ["RANK"] != "0":
        logging.getLogger("t2i").setLevel(logging.ERROR)  # the first rank speaks for all
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it looked for one


def _check_launch() -> None:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set, so a launcher started this, but {', '.join(missing)} is not.")
    local_rank, on_this_node, in_all = (
        int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    )
    if local_rank >= on_this_node or in_all % on_this_node:
        raise UserError(
            f"LOCAL_RANK {local_rank}, LOCAL_WORLD_SIZE {on_this_node} and WORLD_SIZE {in_all} do not fit together;"
            " LOCAL_WORLD_SIZE is the number of processes on each node."
        )


def warn_of_building(ds_config: DsConfig) -> None:
    """Say on the first rank that DeepSpeed is about to compile, which takes minutes once."""
    if torch.cuda.is_available() or os.environ["RANK"] != "0":
        return
    names = operators_needed(ds_config)
    if operators_built(*names):
        return
    logger.warning(
        "DeepSpeed builds its C++ operators (%s) once, for one to eight minutes, in %s",
        ", ".join(names),
        extensions_folder(),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join() -> PartialState:
    """Meet the other processes, if there are any: process_index, num_processes, device, wait_for_everyone()."""
    keep_memory()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        os.environ.pop("LOCAL_RANK", None)  # or accelerate opens a group of one, at whatever MASTER_PORT says
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def leave(processes: PartialState) -> None:
    """End the group that join opened."""
    if processes.num_processes > 1:
        processes.destroy_process_group()
