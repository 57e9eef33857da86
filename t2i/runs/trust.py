"""Resume from a checkpoint without running code from it: DeepSpeed's state is pickled, and its own load would run it.

Only training imports this file. Sampling and export read safetensors, and need neither pickles nor DeepSpeed.
"""

import copyreg
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from t2i.errors import CheckpointError, first_line

logger = logging.getLogger(__name__)

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""torch's switch that overrides DeepSpeed's weights_only=False."""


def check_owner(folder: Path) -> None:
    """Check that a checkpoint belongs to this user and that nobody else may write to it.

    Raises:
        CheckpointError: it belongs to another user, or anyone may write to it.
    """
    # By a new file beside it, not by the process's user id: some shared disks map it to another number.
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        new = os.fstat(file.fileno())
    own = new.st_uid
    keeps_modes = not new.st_mode & 0o002  # this file is for its owner alone, if there are modes at all
    if not keeps_modes:
        logger.warning("%s keeps no permissions: nothing says who else may write there.", folder.parent)
    for path in (folder, *sorted(folder.rglob("*"))):
        # Of a link itself, whose owner chose where it leads.
        found = path.lstat()
        is_open = keeps_modes and found.st_mode & 0o002 and not path.is_symlink()
        if found.st_uid != own or is_open:
            why = (
                f"belongs to user {found.st_uid}, not {own}"
                if found.st_uid != own
                else "is writable by anyone"
            )
            raise CheckpointError(
                f"{path} {why}; a run resumes only from files of its own user. See `chown` and `chmod`."
            )


def pickle_enums_by_value() -> None:
    """Have DeepSpeed's enum pickled as its class and a number."""
    # Some Pythons, such as Debian 12's 3.11.2, write a call of `getattr` instead, which can reach anything and is
    # therefore refused when the checkpoint is read.
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


def check_plain(folder: Path) -> None:
    """Check what the pickles in a folder refer to, without loading them, for DeepSpeed's tools, which load anything.

    Raises:
        CheckpointError: a file refers to anything that DeepSpeed's own state does not have, or is no such file.
    """
    with torch.serialization.safe_globals(_known()):
        for path in sorted(folder.rglob("*.pt")):
            try:
                strange = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{path} is not a state of DeepSpeed: {error}.") from error
            if strange:
                raise CheckpointError(
                    f"{path} holds more than tensors and plain values, so it was not loaded: {', '.join(strange)}."
                )


@contextmanager
def only_plain_values(folder: Path) -> Iterator[None]:
    """Restrict torch's loads inside the block to tensors and the few classes that a checkpoint needs.

    Raises:
        CheckpointError: a file holds anything else; no code of it was run.
    """
    # DeepSpeed calls torch.load with weights_only=False and takes no argument for it; the switch overrides that.
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_known()):
            yield
    except pickle.UnpicklingError as error:
        what = next((line for line in str(error).splitlines() if "GLOBAL" in line), first_line(error))
        raise CheckpointError(
            f"{folder} holds more than tensors and plain values, so it was not loaded: {what.strip():.300}"
        ) from error
    finally:
        os.environ.pop(FORCE) if before is None else os.environ.update({FORCE: before})


def _known() -> list[Callable[..., object] | tuple[Callable[..., object], str]]:
    """List the classes that DeepSpeed's state and a run's random states consist of; torch loads no others."""
    # numpy's names for rebuilding an array moved between its versions; asking an array gives this version's own.
    array = np.random.get_state()[1]  # type: ignore[index]
    rebuild = array.__reduce__()[0]  # type: ignore[union-attr]
    return [
        *(LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address),
        *(rebuild, np.ndarray, np.dtype, type(array.dtype)),  # type: ignore[union-attr]
    ]
