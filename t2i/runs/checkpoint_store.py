"""Checkpoints, committed whole or not at all: written aside, hashed, synced, renamed, and then named by `latest`.

DeepSpeed's own save writes in place, and its load starts silently from step 0 if `latest` is missing. So its files are
only a part (engine/) of a folder with one manifest of sizes and hashes.
"""

import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from t2i.distributed import faults
from t2i.errors import CheckpointError
from t2i.files import file_hash
from t2i.runs.checkpoint_manifest import (
    MANIFEST,
    CheckpointManifest,
    Facts,
    SealedFile,
    read_checkpoint_manifest,
)

logger = logging.getLogger(__name__)

CHECKPOINTS, LATEST, STAGING = "checkpoints", "latest", ".saving"
TRASH = ".trash-"
"""Prefix of a checkpoint that is being removed."""
STEPS = "step_" + 6 * "[0-9]"
"""Glob of the names of complete checkpoints; the last one in sorted order is the newest."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Name the folder of one step's checkpoint."""
    return run_dir / CHECKPOINTS / f"step_{step:06d}"


def begin(run_dir: Path) -> Path:
    """Make an empty folder to write a checkpoint into, and remove what a killed save left."""
    staging = run_dir / CHECKPOINTS / STAGING
    wait_for_removals()
    for left in (staging, *staging.parent.glob(f"{TRASH}*")):
        shutil.rmtree(left, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def wait_for_removals() -> None:
    """Wait until the checkpoints that this process dropped are removed and their space is free."""
    for thread in threading.enumerate():
        if thread.name.startswith(TRASH):
            thread.join()


def seal(path: Path) -> SealedFile:
    """Sync a written file to the disk and return its size and hash."""
    # Both at once: the disk syncs while the processor hashes.
    with ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(_sync, path)
        digest = file_hash(path)
        pushed.result()
    return SealedFile(path.stat().st_size, digest)


def commit(
    run_dir: Path,
    *,
    step: int,
    facts: Facts,
    keep_last: int,
    keep_every: int = 0,
    sealed: dict[str, SealedFile] | None = None,
) -> Path:
    """Turn the written folder into the checkpoint of `step`, and drop old ones.

    Args:
        facts: recorded in the manifest.
        keep_last: the number of newest checkpoints to keep.
        keep_every: keep each checkpoint of a multiple of this step for good; 0 for none.
        sealed: files that are sealed already, by path. The others are sealed here.

    Raises:
        CheckpointError: the checkpoint already exists.
    """
    staging, final = run_dir / CHECKPOINTS / STAGING, step_folder(run_dir, step)
    if final.exists():
        raise CheckpointError(f"{final} already exists; a checkpoint is never overwritten.")
    known = sealed or {}
    paths = [path for path in sorted(staging.rglob("*")) if path.is_file()]
    files = {path.relative_to(staging).as_posix(): known.get(str(path)) or seal(path) for path in paths}
    manifest = staging / MANIFEST
    faults.reach("manifest", step=step, path=manifest)
    manifest.write_text(CheckpointManifest(step, facts, files).text())
    # Folders too: without it, a power cut may leave a synced file whose name is not on the disk.
    for path in (manifest, *(path for path in staging.rglob("*") if path.is_dir()), staging):
        _sync(path)
    faults.reach("rename", step=step)
    # From this rename on the checkpoint exists, whether or not `latest` names it.
    staging.rename(final)
    _sync(final.parent)
    faults.reach("latest", step=step)
    _point_to(final)
    _drop_old(final.parent, keep_last=keep_last, keep_every=keep_every)
    return final


def _point_to(folder: Path) -> None:
    """Have `latest` name a checkpoint's folder, if it does not yet."""
    latest, text = folder.parents[1] / LATEST, f"{CHECKPOINTS}/{folder.name}\n"
    if not latest.exists() or latest.read_bytes() != text.encode():
        _replace(latest, text)


def _drop_old(folder: Path, *, keep_last: int, keep_every: int) -> None:
    for old in sorted(folder.glob(STEPS))[:-keep_last]:
        if keep_every and int(old.name.removeprefix("step_")) % keep_every == 0:
            continue
        trash = old.with_name(TRASH + old.name)
        # Renamed first, so that nobody takes a half-removed folder for a checkpoint.
        old.rename(trash)
        # In a thread, because removing gigabytes takes seconds. begin() removes what a killed process leaves.
        threading.Thread(target=shutil.rmtree, args=(trash, True), name=trash.name).start()


def discard(run_dir: Path) -> None:
    """Remove what a failed save has written, to free its space."""
    shutil.rmtree(run_dir / CHECKPOINTS / STAGING, ignore_errors=True)


def bytes_of(folder: Path) -> int:
    """Return the total size of a checkpoint's files."""
    return sum(file.bytes for file in read_checkpoint_manifest(folder).files.values())


def verify(folder: Path, *, weights_only: bool = False) -> CheckpointManifest:
    """Check every file of a checkpoint against its manifest, and return the manifest.

    Args:
        weights_only: leave out DeepSpeed's state, which only training reads.

    Raises:
        CheckpointError: a file is missing, or has another size or content; the first one is named.
    """
    manifest = read_checkpoint_manifest(folder)
    for name, expected in manifest.files.items():
        if weights_only and name.startswith("engine/"):
            continue
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the manifest lists it.")
        size = file.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(f"{file} has {size} bytes; expected {expected.bytes} by the manifest.")
        if file_hash(file) != expected.xxh64:
            raise CheckpointError(f"{file} has other content than the manifest says.")
    return manifest


def choose_newest(run_dir: Path) -> Path | None:
    """Find the newest whole checkpoint and have `latest` name it; None if the run has none yet.

    A damaged checkpoint is set aside as .bad.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    # By the names of the folders, not by `latest`: a process may have died between the rename and `latest`.
    for folder in sorted((run_dir / CHECKPOINTS).glob(STEPS), reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning("setting a bad checkpoint aside: %s", error)
            folder.rename(_free_name(folder.with_suffix(".bad")))
            continue
        _point_to(folder)
        return folder
    # An error rather than None, which would silently start the run again from step 0.
    bad = sorted((run_dir / CHECKPOINTS).glob("step_??????.bad*"), reverse=True)
    if bad:
        listed = " ".join(map(_why_bad, bad))
        raise CheckpointError(
            f"no checkpoint of {run_dir} is whole: {listed} Start again in another --run-dir."
        )
    return None


def _why_bad(folder: Path) -> str:
    try:
        verify(folder)
    except CheckpointError as error:
        return str(error)
    return f"{folder} was set aside, but is whole; rename it to {folder.name.partition('.')[0]} to use it."


def newest_readable(run_dir: Path) -> Path | None:
    """Find the newest checkpoint whose weights are whole, without changing the run folder.

    Raises:
        CheckpointError: there are checkpoints, but the weights of none are whole.
    """
    # Unlike choose_newest it renames nothing: only training holds the run's lock, and the run may be training.
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
    # Not files.write_whole: here the text must be on the disk before the name is.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
