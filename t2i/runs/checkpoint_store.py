"""Checkpoints committed whole or not at all: written aside, hashed, synced, renamed; `latest` last.

DeepSpeed's own save writes in place and its load starts silently from step 0 when `latest` is missing; so its files
are only a part (engine/) of a folder that has one manifest of sizes and hashes.
"""

import json
import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from t2i.distributed import faults
from t2i.errors import CheckpointError
from t2i.files import check_keys, file_hash, is_inside, read_json

logger = logging.getLogger(__name__)

CHECKPOINTS, LATEST, MANIFEST, STAGING = "checkpoints", "latest", "manifest.json", ".saving"
TRASH = ".trash-"
"""Before the name of a checkpoint that is being removed."""
STEPS = "step_" + 6 * "[0-9]"
"""Names of whole checkpoints (a glob), of which the last in order is the newest."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Name the folder of one step's checkpoint."""
    return run_dir / CHECKPOINTS / f"step_{step:06d}"


def begin(run_dir: Path) -> Path:
    """Make an empty folder to write a checkpoint into; what a killed save left there is removed."""
    staging = run_dir / CHECKPOINTS / STAGING
    wait_for_removals()
    for left in (staging, *staging.parent.glob(f"{TRASH}*")):
        shutil.rmtree(left, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def wait_for_removals() -> None:
    """Wait until the checkpoints that this process dropped are gone, and their space is free."""
    for thread in threading.enumerate():
        if thread.name.startswith(TRASH):
            thread.join()


def seal(path: Path) -> dict[str, int | str]:
    """Push a written file to the disk and describe it: bytes and hash. Whoever wrote it does this, in parallel."""
    with ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(_sync, path)  # the disk's work, beside the hash, which is the processor's
        digest = file_hash(path)
        pushed.result()
    return {"bytes": path.stat().st_size, "xxh64": digest}


def commit(
    run_dir: Path,
    *,
    step: int,
    facts: dict[str, Any],
    keep_last: int,
    keep_every: int = 0,
    sealed: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Turn the written folder into the checkpoint of `step` and drop old ones.

    Args:
        facts: JSON-plain; kept in the manifest beside step and files.
        keep_last: the newest so many stay.
        keep_every: those of every so many steps stay for good; 0 for none.
        sealed: what seal() said of files, by path; None of none. The others are sealed here.

    Raises:
        CheckpointError: the checkpoint exists already.
    """
    staging, final = run_dir / CHECKPOINTS / STAGING, step_folder(run_dir, step)
    if final.exists():
        raise CheckpointError(f"{final} exists already; a checkpoint is never overwritten.")
    known = sealed or {}
    paths = [path for path in sorted(staging.rglob("*")) if path.is_file()]
    files = {path.relative_to(staging).as_posix(): known.get(str(path)) or seal(path) for path in paths}
    manifest = staging / MANIFEST
    faults.reach("manifest", step=step, path=manifest)
    manifest.write_text(json.dumps({"step": step, **facts, "files": files}, indent=1))
    for path in (manifest, *(path for path in staging.rglob("*") if path.is_dir()), staging):
        _sync(path)
    faults.reach("rename", step=step)
    staging.rename(final)
    _sync(final.parent)
    faults.reach("latest", step=step)
    _point_to(final)
    _drop_old(final.parent, keep_last=keep_last, keep_every=keep_every)
    return final


def _point_to(folder: Path) -> None:
    """Let `latest` name a checkpoint's folder, unless it does."""
    latest, text = folder.parents[1] / LATEST, f"{CHECKPOINTS}/{folder.name}\n"
    if not latest.exists() or latest.read_bytes() != text.encode():
        _replace(latest, text)


def _drop_old(folder: Path, *, keep_last: int, keep_every: int) -> None:
    for old in sorted(folder.glob(STEPS))[:-keep_last]:
        if keep_every and int(old.name.removeprefix("step_")) % keep_every == 0:
            continue
        trash = old.with_name(TRASH + old.name)
        old.rename(trash)
        # Beside what comes next; begin() removes what a death leaves of it.
        threading.Thread(target=shutil.rmtree, args=(trash, True), name=trash.name).start()


def discard(run_dir: Path) -> None:
    """Remove what a save that failed has written, so that its space is free."""
    shutil.rmtree(run_dir / CHECKPOINTS / STAGING, ignore_errors=True)


def bytes_of(folder: Path) -> int:
    """Add up the sizes of a checkpoint's files."""
    return sum(file["bytes"] for file in read_manifest(folder)["files"].values())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    path = folder / MANIFEST
    manifest = read_json(path, error=CheckpointError)
    check_keys(manifest, {"step": int, "files": dict}, where=path, error=CheckpointError)
    for name, wanted in manifest["files"].items():
        if not is_inside(name) or not isinstance(wanted, dict):
            raise CheckpointError(f"{path}: files name {name!r:.80}, which is no file of a checkpoint.")
        check_keys(wanted, {"bytes": int, "xxh64": str}, where=f"{path}: {name}", error=CheckpointError)
    return manifest


def verify(folder: Path, *, weights_only: bool = False) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest.

    Args:
        weights_only: leave out DeepSpeed's state, which only training reads.

    Raises:
        CheckpointError: the first file that is missing, of another size, or of other content.
    """
    manifest = read_manifest(folder)
    for name, wanted in manifest["files"].items():
        if weights_only and name.startswith("engine/"):
            continue
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the manifest lists it.")
        size = file.stat().st_size
        if size != wanted["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes; the manifest says {wanted['bytes']}.")
        if file_hash(file) != wanted["xxh64"]:
            raise CheckpointError(f"{file} has another content than the manifest says.")
    return manifest


def choose(run_dir: Path) -> Path | None:
    """Find the newest whole checkpoint, and let `latest` name it; None if the run has none yet.

    A bad one is set aside as .bad. `latest` may name one of those, or the one before: a death came in between.

    Raises:
        CheckpointError: there are checkpoints, but none is whole: never a silent start from step 0.
    """
    for folder in sorted((run_dir / CHECKPOINTS).glob(STEPS), reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning("setting a bad checkpoint aside: %s", error)
            folder.rename(_free_name(folder.with_suffix(".bad")))
            continue
        _point_to(folder)
        return folder
    bad = sorted((run_dir / CHECKPOINTS).glob("step_??????.bad*"), reverse=True)
    if bad:
        listed = " ".join(map(_why_bad, bad))
        raise CheckpointError(
            f"no checkpoint of {run_dir} is whole: {listed} Start anew in another --run-dir."
        )
    return None


def _why_bad(folder: Path) -> str:
    try:
        verify(folder)
    except CheckpointError as error:
        return str(error)
    return f"{folder} was set aside, but is whole; take what follows the step off its name."


def newest_readable(run_dir: Path) -> Path | None:
    """Find the newest checkpoint whose weights are whole, without touching a run that may be training.

    Raises:
        CheckpointError: there are checkpoints, but the weights of none are whole.
    """
    reasons = []
    for folder in sorted((run_dir / CHECKPOINTS).glob(STEPS), reverse=True):
        try:
            verify(folder, weights_only=True)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        return folder
    if reasons:
        raise CheckpointError(f"no checkpoint of {run_dir} is whole: {' '.join(reasons)}")
    return None


def last_step(run_dir: Path) -> int:
    """Read the step of the newest checkpoint from its name; 0 if there is none."""
    names = sorted(path.name for path in (run_dir / CHECKPOINTS).glob(STEPS))
    return int(names[-1].removeprefix("step_")) if names else 0


def _free_name(path: Path) -> Path:
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}{number}")
    return free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
