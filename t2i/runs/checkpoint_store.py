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

from t2i.disk import put_in_place, share, sync
from t2i.distributed import faults
from t2i.distributed.run_id import RUN_ID, read_run_id
from t2i.errors import CheckpointError
from t2i.files import file_hash
from t2i.runs.best_checkpoint import best_of, link_best
from t2i.runs.checkpoint_manifest import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointManifest,
    Facts,
    SealedFile,
    committed,
    is_made_by,
    named_step,
    read_checkpoint_manifest,
    step_folder,
)

logger = logging.getLogger(__name__)

LATEST, STAGING, ENGINE = "latest", ".saving", "engine"
CONVERTED = ".universal"
"""Folder, beside the checkpoints, of the one that is being converted for another number of ranks."""
TRASH = ".trash-"
"""Prefix of a checkpoint that is being removed."""
BAD, OTHER = ".bad", ".other-run"
"""Endings of what was set aside: damaged checkpoints, and those of other runs."""
MOST_LOOKS = 100
"""Times that a reader looks for a checkpoint in a run that removes one after the other."""


def begin(run_dir: Path) -> Path:
    """Make an empty folder to write a checkpoint into, and remove what a killed save or conversion left."""
    staging = run_dir / CHECKPOINTS / STAGING
    wait_for_removals()
    for left in (staging, staging.with_name(CONVERTED), *staging.parent.glob(f"{TRASH}*")):
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
        pushed = pool.submit(sync, path)
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
    share(staging)
    known = sealed or {}
    paths = [path for path in sorted(staging.rglob("*")) if path.is_file()]
    files = {path.relative_to(staging).as_posix(): known.get(str(path)) or seal(path) for path in paths}
    manifest = staging / MANIFEST
    faults.reach("manifest", step=step, path=manifest)
    manifest.write_text(CheckpointManifest(step, facts, files).text())
    # Folders too: without it, a power cut may leave a synced file whose name is not on the disk.
    for path in (manifest, *(path for path in staging.rglob("*") if path.is_dir()), staging):
        sync(path)
    faults.reach("rename", step=step)
    # From this rename on the checkpoint exists, whether or not `latest` names it.
    staging.rename(final)
    sync(final.parent)
    faults.reach("latest", step=step)
    _point_to(final)
    link_best(run_dir)
    _drop_old(final, run_id=facts.run_id, keep_last=keep_last, keep_every=keep_every)
    return final


def _point_to(folder: Path) -> None:
    """Have `latest` name a checkpoint's folder, if it does not yet."""
    latest, text = folder.parents[1] / LATEST, f"{CHECKPOINTS}/{folder.name}\n"
    if latest.exists() and latest.read_bytes() == text.encode():
        return
    try:
        _replace(latest, text)
    except OSError as error:  # a help for people; t2i itself reads the names of the folders
        logger.warning("%s cannot be written: %s.", latest, error.strerror)


def _drop_old(newest: Path, *, run_id: str, keep_last: int, keep_every: int) -> None:
    """Remove the run's own checkpoints before `newest`, except those to keep."""
    run_dir, num_kept = newest.parents[1], 1
    best = best_of(run_dir)
    for step, old in reversed(committed(run_dir).items()):
        # Never what is of a later step or of another run: this run has made nothing in its place.
        if old == newest or step > (named_step(newest) or 0) or not is_made_by(old, run_id):
            continue
        num_kept += 1
        if num_kept <= keep_last or old == best or (keep_every and step % keep_every == 0):
            continue
        trash = old.with_name(TRASH + old.name)
        try:
            # Renamed first, so that nobody takes a half-removed folder for a checkpoint.
            old.rename(trash)
        except OSError as error:  # some file systems refuse while another process reads a file in it
            logger.warning("%s cannot be removed yet: %s. The next save tries again.", old, error.strerror)
            continue
        # In a thread, because removing gigabytes takes seconds. begin() removes what a killed process leaves.
        threading.Thread(target=shutil.rmtree, args=(trash, True), name=trash.name).start()


def discard(run_dir: Path) -> None:
    """Remove what a failed save has written, to free its space."""
    shutil.rmtree(run_dir / CHECKPOINTS / STAGING, ignore_errors=True)


def is_of_engine(name: str) -> bool:
    """Tell whether a file that a checkpoint's manifest lists is of DeepSpeed's state."""
    return name.startswith(f"{ENGINE}/")


def verify(folder: Path, *, weights_only: bool = False) -> CheckpointManifest:
    """Check every file of a checkpoint against its manifest, and return the manifest.

    Args:
        weights_only: leave out DeepSpeed's state, which only training reads.

    Raises:
        CheckpointError: a file is missing, or has another size or content; the first one is named.
    """
    manifest = read_checkpoint_manifest(folder)
    for name, expected in manifest.files.items():
        if weights_only and is_of_engine(name):
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


def make_way(run_dir: Path, *, step: int) -> bool:
    """Tell whether the run has its checkpoint of a step; anything else of that name is set aside."""
    folder = step_folder(run_dir, step)
    if folder.is_dir() and is_made_by(folder, read_run_id(run_dir)):
        return True
    if os.path.lexists(folder):
        _set_aside_other(folder)
    return False


def choose_newest(run_dir: Path) -> Path | None:
    """Find the newest whole checkpoint of the run and have `latest` name it; None if the run has none yet.

    A damaged checkpoint is set aside as .bad, and one of another run as .other-run.

    Raises:
        CheckpointError: there are checkpoints, but none of this run is whole.
    """
    run_id = read_run_id(run_dir)
    others = []
    # By the names of the folders, not by `latest`: a process may have died between the rename and `latest`.
    for folder in reversed(committed(run_dir).values()):
        try:
            if read_checkpoint_manifest(folder).facts.run_id != run_id:
                others.append(folder)
                continue
            verify(folder)
        except CheckpointError as error:
            logger.warning("setting a bad checkpoint aside: %s", error)
            folder.rename(_free_name(folder.with_name(folder.name + BAD)))
            continue
        for other in others:
            _set_aside_other(other)
        _point_to(folder)
        link_best(run_dir)
        return folder
    # An error rather than None, which would silently start the run again from step 0.
    aside = (run_dir / CHECKPOINTS).glob(f"step_*{BAD}*")
    bad = {step: path for path in aside if (step := named_step(_before_bad(path))) is not None}
    if bad:
        listed = " ".join(_why_bad(bad[step]) for step in sorted(bad, reverse=True))
        raise CheckpointError(
            f"no checkpoint of {run_dir} is whole: {listed} Start again in another --run-dir."
        )
    if others:
        raise CheckpointError(
            f"{run_dir} has no checkpoint of its own, and {others[0]} is of another run: its manifest has another id"
            f" than {run_dir / RUN_ID}. To start a run from its weights: --model.init {others[0]} --run-dir NEW."
        )
    return None


def _set_aside_other(folder: Path) -> None:
    aside = _free_name(folder.with_name(folder.name + OTHER))
    folder.rename(aside)
    logger.warning("%s is no checkpoint of this run; it is now %s.", folder, aside.name)


def _before_bad(folder: Path) -> Path:
    return folder.with_name(folder.name.partition(BAD)[0])


def _why_bad(folder: Path) -> str:
    try:
        verify(folder)
    except CheckpointError as error:
        return str(error)
    return f"{folder} was set aside, but is whole; rename it to {_before_bad(folder).name} to use it."


def newest_readable(run_dir: Path) -> Path | None:
    """Find the newest checkpoint whose weights are whole, without changing the run folder.

    Raises:
        CheckpointError: there are checkpoints, but the weights of none are whole.
    """
    # Unlike choose_newest it renames nothing: only training holds the run's lock, and the run may be training.
    run_id = read_run_id(run_dir)
    for _ in range(MOST_LOOKS):
        reasons = []
        for folder in reversed(committed(run_dir).values()):
            try:
                manifest = verify(folder, weights_only=True)
            except CheckpointError as error:
                if not folder.is_dir():
                    break  # the run removed it meanwhile, and so has a newer one
                reasons.append(str(error))
                continue
            # A folder without an id may be a copy of a part of a run.
            if run_id and manifest.facts.run_id != run_id:
                reasons.append(f"{folder} is of another run.")
                continue
            for reason in reasons:
                logger.warning("%s %s is read instead.", reason, folder)
            return folder
        else:
            if reasons:
                raise CheckpointError(f"no checkpoint of {run_dir} is whole: {' '.join(reasons)}")
            return None
    raise CheckpointError(
        f"{run_dir} is training, and removes its checkpoints faster than they can be read. Keep more of them there"
        " (--train.keep-last), or read again when it has ended."
    )


def last_step(run_dir: Path) -> int:
    """Find the step of the run's newest checkpoint, by names and manifests; 0 if there is none."""
    run_id = read_run_id(run_dir)
    own = (step for step, folder in reversed(committed(run_dir).items()) if is_made_by(folder, run_id))
    return next(own, 0)


def _free_name(path: Path) -> Path:
    names = (path.name + str(number or "") for number in (0, *range(2, 10_000)))
    return next(free for name in names if not os.path.lexists(free := path.with_name(name)))


def _replace(path: Path, text: str) -> None:
    # Not files.write_whole: here the text must be on the disk before the name is.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    sync(temporary)
    put_in_place(temporary, path)
