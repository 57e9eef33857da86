"""Loading DeepSpeed's part of a checkpoint, converted if the machine's settings differ; and random states."""

import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from t2i.distributed.collectives import of_all_ranks, on_first_rank
from t2i.env import outside_job
from t2i.errors import CheckpointError
from t2i.runs.checkpoint_store import CONVERTED
from t2i.runs.trust import only_plain_values
from t2i.train.deepspeed_internals import (
    count_steps_as,
    drop_second_moments,
    kind_of,
    names_as_they_are,
    reading_universal,
    saved_ds_config,
    saved_module,
)

logger = logging.getLogger(__name__)

CONVERTER = """
import os, sys
from deepspeed.checkpoint.ds_to_universal import main, parse_arguments
from t2i.runs.trust import pickle_enums_by_value
pickle_enums_by_value()
os.chdir(sys.argv.pop(1))
main(parse_arguments())
"""


class RandomState(TypedDict):
    """The random states of one rank, as their libraries give them."""

    torch: Tensor
    numpy: dict[str, Any] | tuple[str, NDArray[np.uint32], int, int, float]
    python: tuple[object, ...]
    cuda: NotRequired[Tensor]


class ClientState(TypedDict):
    """What is saved together with DeepSpeed's state."""

    random: list[RandomState]
    """One per rank."""


def load_state(engine: deepspeed.DeepSpeedEngine, folder: Path, *, num_ranks: int) -> None:
    """Load DeepSpeed's state, converted if the run that saved it had other ranks, another precision or another Adam.

    Args:
        num_ranks: of the run that saved it.

    Raises:
        CheckpointError: the state is damaged, or cannot be converted.
    """
    with only_plain_values(folder / "engine"):
        saved = kind_of(saved_ds_config(folder), num_ranks=num_ranks)
    own = kind_of(engine.config, num_ranks=dist.get_world_size())
    if saved == own:
        load_engine(engine, folder)
        return
    for kind in (saved, own):
        if kind.is_round_robin and kind.num_ranks > 1:
            # DeepSpeed 0.19.8 notes the places that parameters would have in their own order.
            raise CheckpointError(
                f"{folder} was made by {saved} and would be loaded by {own}, but DeepSpeed cannot convert the state of"
                f" several ranks with round_robin_gradients: it would take some weights for others. Resume with the"
                f" number of ranks and the DeepSpeed JSON that made it."
            )
    # Converted when it is needed, not at each save: that would double a save's time and size.
    converted = folder.with_name(CONVERTED)
    logger.info("converting %s, made by %s, for %s", folder, saved, own)
    on_first_rank(lambda: convert(folder / "engine", converted / "engine"))
    with reading_universal(engine):
        load_engine(engine, converted)
    count_steps_as(engine)
    load_frozen(engine.module, folder)
    dist.barrier()  # until every rank has read it
    on_first_rank(lambda: shutil.rmtree(converted))


def convert(source: Path, target: Path) -> None:
    """Convert DeepSpeed's state to its universal format, which any number of ranks reads.

    Raises:
        CheckpointError: the conversion failed.
    """
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir()
    # In its own process: the converter forks workers, which would inherit this rank's threads and connections. From
    # within the folder that holds both: it takes paths for patterns, and anything may be in the name of a run.
    parent = source.parents[1]
    command = [sys.executable, "-c", CONVERTER, str(parent.absolute()), "--inject_missing_state"]
    command += ["--input_folder", str(source.relative_to(parent))]
    command += ["--output_folder", str(target.relative_to(parent))]
    # Without these the converter would take itself for a rank of this job and wait for the others.
    environment = outside_job(os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(
            target.parent, ignore_errors=True
        )  # as large as a checkpoint, and perhaps what filled the disk
        raise CheckpointError(f"{source} could not be converted: {done.stderr.strip()[-500:]}")


def load_engine(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Load DeepSpeed's state from folder/engine and set the random states saved with it.

    Raises:
        CheckpointError: DeepSpeed finds nothing there, or finds more than tensors and plain values.
    """
    # DeepSpeed unpickles without restriction, and a pickle from elsewhere can run code.
    with only_plain_values(folder / "engine"), names_as_they_are(engine):
        loaded, client_state = engine.load_checkpoint(str(folder), tag="engine")
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load {folder / 'engine'}.")
    drop_second_moments(engine)
    restore_random_states(client_state)


def load_frozen(module: torch.nn.Module, folder: Path) -> None:
    """Copy the frozen parameters, which the universal format leaves out."""
    # Not from model.safetensors: there adapters are merged into the matrices, and split embeddings are joined.
    with only_plain_values(folder / "engine"):
        saved = saved_module(folder)
    for name, value in module.named_parameters():
        if not value.requires_grad:
            value.data.copy_(saved[name])


def random_states() -> ClientState:
    """Collect the random states of all ranks, for dropout; the loader and the sampler have their own generators."""
    state: RandomState = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {"random": of_all_ranks([state])}


def restore_random_states(client_state: ClientState) -> None:
    """Set what random_states collected on this rank; a rank that was not there keeps its own."""
    states = client_state["random"]
    # A new rank has no earlier random state to continue.
    if dist.get_rank() >= len(states):
        return
    state = states[dist.get_rank()]
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
