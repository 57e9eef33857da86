"""The checkpoint with the lowest held-out loss: kept when older ones are dropped, and named checkpoints/best."""

import logging
from contextlib import suppress
from pathlib import Path

from t2i.distributed.run_id import read_run_id
from t2i.errors import CheckpointError
from t2i.runs.checkpoint_manifest import CHECKPOINTS, committed, read_checkpoint_manifest
from t2i.runs.metrics_log import heldout_loss, rows_of_step

logger = logging.getLogger(__name__)

BEST = "best"


def best_of(run_dir: Path) -> Path | None:
    """Find the run's checkpoint with the lowest held-out loss, of those whose step was evaluated; None without any."""
    run_id, losses = read_run_id(run_dir), {}
    for step, folder in committed(run_dir).items():
        with suppress(CheckpointError):  # a damaged one, or one that is being removed
            facts = read_checkpoint_manifest(folder).facts
            evaluated = facts.progress.get("heldout_losses")
            if facts.run_id != run_id:
                continue
            # By the manifests: what a run that is resumed believes may be of a checkpoint that is gone. Where a stop
            # cut an evaluation short, the resumed run made up for it, and its rows alone say what came of it.
            if evaluated and facts.progress.get("heldout_step") == step:
                losses[folder] = evaluated[-1]
            elif facts.progress.get("owed"):
                loss = heldout_loss(rows_of_step(run_dir, step))
                losses |= {} if loss is None else {folder: loss}
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
