"""Names of checkpoints, and manifest.json: what it records about the run, and the size and hash of each file."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from t2i.errors import CheckpointError
from t2i.files import Kind, check_keys, is_inside, read_json

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
OWN_HASH = "manifest_xxh64"
"""Key of the manifest's hash of all its other keys. Manifests of version 0.1.0 lack it, and have no run_id either."""
NAME = re.compile("step_([0-9]{6,})")
FACT_KEYS: dict[str, Kind] = {
    "run_id": str,
    "progress": dict,
    "loader": str,
    "world_size": int,
    "global_batch": int,
    "image_rows_only": bool,
    "parameters": dict,
    "parameter_groups": list,
    "optimizer_state_bytes": int,
    "optimizer_bits": list,
}
"""Types of the facts in a manifest. Older manifests lack some of them."""


@dataclass(frozen=True)
class SealedFile:
    """Size and hash of a file that has been synced to the disk."""

    bytes: int
    xxh64: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a checkpoint's manifest records about its run; empty or None where an older version recorded nothing."""

    run_id: str = ""
    """Id of the run that made it."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Fields of the run's Progress."""
    loader: str = ""
    """Position in the data."""
    world_size: int = 1
    global_batch: int | None = None
    """Sequences per step."""
    image_rows_only: bool = False
    """train.image_vocab_only."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Number of parameters: `learned` (trainable) and `all`."""
    parameter_groups: list[int] | None = None
    """Trainable parameters per group of the optimizer."""
    optimizer_state_bytes: int = 0
    """Of the first rank."""
    optimizer_bits: list[int] = field(default_factory=list)
    """Per rank, a sum over the optimizer's moments that changes with any bit of them."""


@dataclass(frozen=True)
class CheckpointManifest:
    """The content of a checkpoint's manifest.json."""

    step: int
    facts: Facts
    files: dict[str, SealedFile]
    """Path below the checkpoint's folder -> size and hash."""

    def num_bytes(self) -> int:
        """Return the total size of the files."""
        return sum(file.bytes for file in self.files.values())

    def text(self) -> str:
        """Return the manifest as JSON, with the facts as keys of their own and a hash of all of it."""
        files = {name: asdict(file) for name, file in self.files.items()}
        values = {"step": self.step, **asdict(self.facts), "files": files}
        return json.dumps({**values, OWN_HASH: _hash_of(values)}, indent=1)


def read_checkpoint_manifest(folder: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another step than the folder's name says.
    """
    path = folder / MANIFEST
    values = read_json(path, error=CheckpointError)
    own_hash = values.pop(OWN_HASH, None)
    if ("run_id" in values or own_hash is not None) and own_hash != _hash_of(values):
        raise CheckpointError(f"{path} has other content than its own hash says.")
    present = {key: kind for key, kind in FACT_KEYS.items() if values.get(key) is not None}
    check_keys(values, {"step": int, "files": dict} | present, where=path, error=CheckpointError)
    named = named_step(folder)
    if named not in (None, values["step"]):
        raise CheckpointError(
            f"{path} is of step {values['step']}; expected {named}, as its folder's name says."
        )
    files = {}
    for name, found in values["files"].items():
        # Names become paths, so that one with `..` would reach outside the folder.
        if not is_inside(name) or not isinstance(found, dict):
            raise CheckpointError(f"{path}: files list {name!r:.80}, which is no file of a checkpoint.")
        check_keys(found, {"bytes": int, "xxh64": str}, where=f"{path}: {name}", error=CheckpointError)
        files[name] = SealedFile(found["bytes"], found["xxh64"])
    facts = Facts(**{one.name: values[one.name] for one in fields(Facts) if one.name in present})
    return CheckpointManifest(values["step"], facts, files)


def has_manifest(folder: Path) -> bool:
    """Tell whether a folder has a manifest of a checkpoint, be it a damaged one, and not another tool's."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
    except (ValueError, RecursionError):
        return True
    return isinstance(values, dict) and len(values.keys() & {"step", "files", OWN_HASH, *FACT_KEYS}) >= 3


def step_folder(run_dir: Path, step: int) -> Path:
    """Name the folder of one step's checkpoint."""
    return run_dir / CHECKPOINTS / _folder_name(step)


def committed(run_dir: Path) -> dict[int, Path]:
    """List the folders that have the name of a checkpoint by their steps, in order, whoever made them."""
    folder = run_dir / CHECKPOINTS
    return steps_of(path for path in (folder.iterdir() if folder.is_dir() else ()) if path.is_dir())


def steps_of(paths: Iterable[Path]) -> dict[int, Path]:
    """Map steps to the files or folders that are named after them, in order; what has another name is left out."""
    found = {named_step(path): path for path in paths}
    # By number and not by name: from step 1,000,000 on the order of names is another.
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def is_made_by(folder: Path, run_id: str) -> bool:
    """Tell whether a checkpoint was made by the run of this id; of a damaged manifest nobody knows."""
    try:
        return read_checkpoint_manifest(folder).facts.run_id == run_id
    except CheckpointError:
        return False


def named_step(folder: Path) -> int | None:
    """Read the step from the name of a checkpoint's folder, or of a .png file of one; None for any other name."""
    found = NAME.fullmatch(folder.name.removesuffix(".png"))
    # Only as step_folder writes it: step_0000005 would be a second folder of step 5.
    return int(found[1]) if found and _folder_name(int(found[1])) == found[0] else None


def _hash_of(values: dict[str, Any]) -> str:
    # Of the values and not of the file, so that the hash can stand in it.
    return xxhash.xxh64_hexdigest(json.dumps(values, indent=1))


def _folder_name(step: int) -> str:
    return f"step_{step:06d}"
