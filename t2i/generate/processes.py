"""The processes that `accelerate launch` or `torchrun` started for one command."""

from datetime import timedelta

import torch
from accelerate import PartialState

PATIENCE = timedelta(days=2)
"""How long a process waits for the slowest one; a process that dies ends all of them at once."""


def join() -> PartialState:
    """Meet the other processes, if there are any: process_index, num_processes, device, wait_for_everyone()."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
