"""Files that others released: known by their hash, read without running what is in them, checked by name and shape."""

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t2i.errors import CheckpointError
from t2i.model.backbone import weight_files

RELEASES = {
    "c8eeee10d471071414f1f80c4f6fc530a61f089f3ca427282d7b26d9590b30a6": "mlfoundations/open_lm_1B open_lm_1b.pt",
    "0b2ded4afb21c1a90d106a6aa4d37be7040fe6bce87f08e12bad2ea83d892b9a": "ai-forever/MoVQGAN movqgan_67M.ckpt",
    "7374ac550b586ea4a758497a30100c7eaf8e89adde85cdd1a64e0d7562bcfa35": "ai-forever/MoVQGAN movqgan_102M.ckpt",
    "5f4524c6349cd6b042cb56e01d1e0f4ab61d42b09ad9c60b37fbd4fc06a6d0e4": "ai-forever/MoVQGAN movqgan_270M.ckpt",
    "c70d2966ec012f378793214ff0755087e7c5fe6f035b469995143325dca4a4e3": "FoundationVision/LlamaGen vq_ds8_c2i.pt",
    "75e6492ac6fe32414bc07cbf1ad65e854845ef356eede4afbe758ab1c766f1f8": (
        "FoundationVision/LlamaGen vq_ds16_c2i_training.pt"
    ),
}
"""SHA-256 of a released file -> its repository on the hub and its name there."""

NUM_NAMED = 5
"""Tensors that an error names; the rest are counted."""


def read_weights(path: Path) -> dict[str, Any]:
    """Read a checkpoint: safetensors, or a pickle of tensors and plain values.

    Raises:
        UserError: there is none.
        CheckpointError: it is broken, or a pickle with anything else in it.
    """
    content: dict[str, Any] = {}
    for file in weight_files(path):
        content |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    return content


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}).") from error


def _read_pickle(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # not even a pickle, such as a web page saved under the name
            raise CheckpointError(
                f"{file} cannot be read as torch's: it is no pickle and no archive."
            ) from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "something"
        raise CheckpointError(
            f"{file} is a pickle that holds {what} beside tensors and plain values. Such a file can run code when"
            " it is read, so it was not. Ask its authors for safetensors, or save its state dict alone."
        ) from error
    except (
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
        struct.error,
    ) as error:  # of bytes that are no pickle
        raise CheckpointError(
            f"{file} cannot be read as torch's ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__}; wanted is a state dict.")
    return content


def plain_names(tensors: Mapping[str, Any], *, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Strip prefixes that all names share, however often they are stacked."""
    plain = dict(tensors)
    while shared := [
        prefix for prefix in prefixes if plain and all(name.startswith(prefix) for name in plain)
    ]:
        plain = {name.removeprefix(shared[0]): value for name, value in plain.items()}
    return plain


def check_fit(found: Mapping[str, Any], wanted: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Hold names and shapes against those of the model to be filled.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    shapes = [
        f"{name} has shape {_shape(found[name])}, wanted is {_shape(wanted[name])}"
        for name in wanted
        if name in found and _shape(found[name]) != _shape(wanted[name])
    ]
    for problem, listed in (("has no", missing), ("has, unknown here,", unknown), ("does not fit:", shapes)):
        if listed:
            more = f" and {len(listed) - NUM_NAMED} more" if len(listed) > NUM_NAMED else ""
            raise CheckpointError(f"{source} {problem} {'; '.join(listed[:NUM_NAMED])}{more}.")


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
