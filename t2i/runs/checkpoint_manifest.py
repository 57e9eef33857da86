"""manifest.json of a checkpoint: what it records about its run, and the size and hash of each file."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from t2i.errors import CheckpointError
from t2i.files import Kind, check_keys, is_inside, read_json

MANIFEST = "manifest.json"
FACT_KEYS: dict[str, Kind] = {
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
    """Per rank, a sum over Adam's moments that changes with any bit of them."""


@dataclass(frozen=True)
class CheckpointManifest:
    """The content of a checkpoint's manifest.json."""

    step: int
    facts: Facts
    files: dict[str, SealedFile]
    """Path below the checkpoint's folder -> size and hash."""

    def text(self) -> str:
        """Return the manifest as JSON, with the facts as keys of their own."""
        files = {name: asdict(file) for name, file in self.files.items()}
        return json.dumps({"step": self.step, **asdict(self.facts), "files": files}, indent=1)


def read_checkpoint_manifest(folder: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    path = folder / MANIFEST
    values = read_json(path, error=CheckpointError)
    present = {key: kind for key, kind in FACT_KEYS.items() if values.get(key) is not None}
    check_keys(values, {"step": int, "files": dict} | present, where=path, error=CheckpointError)
    files = {}
    for name, found in values["files"].items():
        # Names become paths, so that one with `..` would reach outside the folder.
        if not is_inside(name) or not isinstance(found, dict):
            raise CheckpointError(f"{path}: files list {name!r:.80}, which is no file of a checkpoint.")
        check_keys(found, {"bytes": int, "xxh64": str}, where=f"{path}: {name}", error=CheckpointError)
        files[name] = SealedFile(found["bytes"], found["xxh64"])
    facts = Facts(**{one.name: values[one.name] for one in fields(Facts) if one.name in present})
    return CheckpointManifest(values["step"], facts, files)
