"""The checkpoint with the lowest held-out loss: kept when older ones are dropped, and named checkpoints/best."""

import logging
from contextlib import suppress
from pathlib import Path

from t2i.distributed.run_id import read_run_id
from t2i.errors import CheckpointError
from t2i.runs.checkpoint_manifest import CHECKPOINTS, committed, read_checkpoint_manifest

logger = logging.getLogger(__name__)

BEST = "best"


def best_of(run_dir: Path) -> Path | None:
    """Find the run's checkpoint with the lowest held-out loss, of those whose step was evaluated; None without any."""
    run_id, losses = read_run_id(run_dir), {}
    for folder in committed(run_dir).values():
        with suppress(CheckpointError):  # a damaged one, or one that is being removed
            facts = read_checkpoint_manifest(folder).facts
            evaluated = facts.progress.get("heldout_losses")
            # By the manifests alone: what a run that is resumed believes may be of a checkpoint that is gone.
            if (
                evaluated
                and facts.run_id == run_id
                and facts.progress.get("heldout_step") == facts.progress.get("step")
            ):
                losses[folder] = evaluated[-1]
    return min(losses, key=lambda folder: losses[folder], default=None)


def link_best(run_dir: Path) -> None:
    """Have checkpoints/best lead to the best checkpoint."""
    best, link = best_of(run_dir), run_dir / CHECKPOINTS / BEST
    if best is None or (link.is_symlink() and link.readlink() == Path(best.name)):
        return
    temporary = link.with_name(f".{BEST}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(best.name)
        temporary.replace(link)
    except OSError as error:  # a help for people, which not every file system can give
        logger.debug("%s cannot be made: %s.", link, error.strerror)
