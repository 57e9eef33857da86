"""The processes that `accelerate launch` or `torchrun` started for one command."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from t2i.env import keep_memory

PATIENCE = timedelta(days=2)
"""How long a process waits for the slowest one; a process that dies ends all of them at once."""


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
