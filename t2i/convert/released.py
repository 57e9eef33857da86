"""Released weights: recognised by their hash, read without running code, checked by name and shape."""

import argparse
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
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
"""SHA-256 of a released file -> its hub repository and file name."""

SCALAR: Callable[..., Any] = np.float64(0).__reduce__()[0]  # type: ignore[assignment]
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    pathlib.PosixPath,
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))),
]
"""Classes that training files hold beside tensors: a run's settings, paths, a best loss. They hold plain values."""

Value = TypeVar("Value")

NUM_NAMED = 5
"""Number of tensors that an error names; the others are counted."""


def read_weights(path: Path) -> dict[str, object]:
    """Read a checkpoint: safetensors, or a pickle of tensors and plain values.

    Raises:
        UserError: there is none.
        CheckpointError: it is broken, or a pickle that holds anything else.
    """
    content: dict[str, object] = {}
    for file in weight_files(path):
        content |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    return content


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}).") from error


def _read_pickle(file: Path) -> dict[str, object]:
    try:
        # weights_only, because an ordinary pickle may run any code. mmap spares a copy of the file in memory, which
        # torch can do for its zip format only.
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # Not a pickle at all, such as a web page saved under this name.
        if "Unsupported operand" in str(error):
            raise CheckpointError(
                f"{file} cannot be read by torch: it is neither a pickle nor an archive."
            ) from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "something"
        raise CheckpointError(
            f"{file} is a pickle that holds {what} beside tensors and plain values. Such a file can run code when"
            " it is read, so it was not read. Ask its authors for safetensors, or save only its state dict."
        ) from error
    except (
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
        struct.error,
    ) as error:  # of bytes that are no pickle
        raise CheckpointError(f"{file} cannot be read by torch ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__}; expected a state dict.")
    return content


def only_tensors(values: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the values that are tensors."""
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def plain_names(tensors: Mapping[str, Value], *, prefixes: tuple[str, ...]) -> dict[str, Value]:
    """Strip prefixes that all names share, even if several are stacked."""
    plain = dict(tensors)
    while shared := [
        prefix for prefix in prefixes if plain and all(name.startswith(prefix) for name in plain)
    ]:
        plain = {name.removeprefix(shared[0]): value for name, value in plain.items()}
    return plain


def check_fit(
    found: Mapping[str, object], wanted: Mapping[str, Tensor], *, source: Path | str
) -> dict[str, Tensor]:
    """Check names and shapes against those of the model to be filled, and return the tensors.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    shapes = [
        f"{name} has shape {_shape(found[name])}, expected {_shape(wanted[name])}"
        for name in wanted
        if name in found and _shape(found[name]) != _shape(wanted[name])
    ]
    # The first kind of problem alone: a wrong config makes hundreds of all three.
    for problem, listed in (("has no", missing), ("has, unknown here,", unknown), ("does not fit:", shapes)):
        if listed:
            more = f" and {len(listed) - NUM_NAMED} more" if len(listed) > NUM_NAMED else ""
            raise CheckpointError(f"{source} {problem} {'; '.join(listed[:NUM_NAMED])}{more}.")
    return only_tensors(found)


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
