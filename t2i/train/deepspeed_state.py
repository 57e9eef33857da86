"""DeepSpeed's part of a checkpoint: loaded as it is, or converted for another number of ranks; and random states."""

import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t2i.distributed import faults
from t2i.distributed.collectives import of_all_ranks, on_first_rank
from t2i.errors import CheckpointError
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.trust import only_plain_values

logger = logging.getLogger(__name__)

CONVERTED = ".universal"
"""Folder, beside the checkpoints, of one that is being read by another number of ranks."""
CONVERTER = """
from deepspeed.checkpoint.ds_to_universal import main, parse_arguments
from t2i.runs.trust import pickle_enums_by_value
pickle_enums_by_value()
main(parse_arguments())
"""

WRITER_WORDS = ("PytorchStreamWriter", "iostream", "unexpected pos")
"""What torch.save's RuntimeError speaks of when the disk fails under it."""
SEALERS = 2
"""Files that a rank pushes to the disk and hashes at one time, beside what it writes."""


def load_from_other_ranks(engine: deepspeed.DeepSpeedEngine, folder: Path, *, found: int) -> None:
    """Load what another number of ranks saved, through DeepSpeed's universal format.

    Raises:
        CheckpointError: it could not be converted.
    """
    converted = folder.with_name(CONVERTED)
    logger.info("converting %s, made by %d ranks, for %d", folder, found, dist.get_world_size())
    on_first_rank(lambda: convert(folder / "engine", converted / "engine"))
    engine._config.load_universal_checkpoint = True
    try:
        load_engine(engine, converted)
    finally:
        engine._config.load_universal_checkpoint = False
    load_frozen(engine.module.model, folder)
    dist.barrier()
    on_first_rank(lambda: shutil.rmtree(converted))


def convert(source: Path, target: Path) -> None:
    """Convert DeepSpeed's state to its universal format, which any number of ranks reads.

    Raises:
        CheckpointError: the conversion failed.
    """
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir()
    command = [sys.executable, "-c", CONVERTER, "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(f"{source} could not be converted: {done.stderr.strip()[-500:]}")


def load_engine(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Load DeepSpeed's state from folder/engine and set the random states saved with it.

    Raises:
        CheckpointError: DeepSpeed finds nothing there, or what it finds is more than tensors and plain values.
    """
    with only_plain_values(folder / "engine"):
        loaded, client_state = engine.load_checkpoint(str(folder), tag="engine")
    if loaded is None:
        raise CheckpointError(f"DeepSpeed could not load {folder / 'engine'}.")
    restore_random_states(client_state)


def load_frozen(model: torch.nn.Module, folder: Path) -> None:
    """Copy the parameters that do not learn, of which the universal format has nothing to load."""
    saved = load_file(folder / "model.safetensors")
    for name, value in model.named_parameters():
        if not value.requires_grad:
            value.data.copy_(saved[name])


def random_states() -> dict[str, Any]:
    """Collect the random states of all ranks; the loader and the sampler use generators of their own."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {"random": of_all_ranks([state])}


def restore_random_states(client_state: dict[str, Any]) -> None:
    """Set what random_states collected on this rank; a rank that was not there keeps its own."""
    states = client_state["random"]
    if dist.get_rank() >= len(states):
        return
    state = states[dist.get_rank()]
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def group_sizes(engine: deepspeed.DeepSpeedEngine) -> list[int]:
    """Count the numbers that learn in each group: DeepSpeed lays its state out by groups, in their order."""
    return [sum(value.numel() for value in group) for group in engine.optimizer.bit16_groups]


def optimizer_state_bytes(engine: deepspeed.DeepSpeedEngine) -> int:
    """Count the bytes of Adam's moments on this rank."""
    moments = [value for state in engine.optimizer.optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in moments if isinstance(value, Tensor))


@contextmanager
def _sealing(engine: Any, *, step: int, written: list[Path]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Seal what is written and each file that DeepSpeed writes on this rank, beside the writing of the next one.

    Failures are collected instead of raised: DeepSpeed's save waits for all ranks several times, and a rank that raised
    in its midst would leave the others waiting. The scripts that it copies beside its state, to get weights out of it,
    are left out: model.safetensors has these. So are the sums of zip files: the manifest has a hash of each.
    """
    sealed: dict[str, Any] = {}
    reasons: list[str] = []
    writer = engine.checkpoint_engine
    plain, has_sums = writer.save, torch.serialization.get_crc32_options()
    pool = ThreadPoolExecutor(SEALERS)
    coming = {str(path): pool.submit(checkpoints.seal, path) for path in written}

    def save(state_dict: Any, path: str) -> None:
        def write() -> None:
            faults.reach("shards", step=step, path=Path(path))
            plain(state_dict, path)
            coming[path] = pool.submit(checkpoints.seal, Path(path))

        if reason := _reason(write):
            reasons.append(reason)

    writer.save = save
    engine._copy_recovery_script = lambda path: None
    torch.serialization.set_crc32_options(False)
    try:
        yield sealed, reasons
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # what ends a run is not kept waiting
        raise
    finally:
        del writer.save, engine._copy_recovery_script
        torch.serialization.set_crc32_options(has_sums)
    for path, seal in coming.items():
        if reason := _reason(seal.result):
            reasons.append(reason)
        else:
            sealed[path] = seal.result()
    pool.shutdown()


def _reason(write: Callable[[], object]) -> str:
    """Write, and return in one sentence why that failed, or nothing."""
    try:
        write()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or 'the disk'}: {error.strerror or error}."
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in WRITER_WORDS):
            raise
        return f"{str(error).splitlines()[0]} (a full disk?)."
    return ""
