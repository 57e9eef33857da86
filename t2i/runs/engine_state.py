"""Finished runs without DeepSpeed's state, which only a resume reads and which is most of a checkpoint."""

import shutil
from pathlib import Path

from t2i.disk import sync
from t2i.files import write_whole
from t2i.runs.checkpoint_manifest import MANIFEST, CheckpointManifest, committed, read_checkpoint_manifest
from t2i.runs.checkpoint_store import ENGINE, is_of_engine


def drop_engine_state(run_dir: Path) -> int:
    """Remove DeepSpeed's state from a finished run's checkpoints, which then hold what everything but a resume reads.

    Returns:
        the bytes that are free now.
    """
    freed = 0
    for folder in committed(run_dir).values():
        manifest = read_checkpoint_manifest(folder)
        kept = {name: file for name, file in manifest.files.items() if not is_of_engine(name)}
        if kept.keys() != manifest.files.keys():
            # The manifest first: a folder that lacks a listed file is a damaged one.
            write_whole(folder / MANIFEST, CheckpointManifest(manifest.step, manifest.facts, kept).text())
            sync(folder / MANIFEST)
        # Also where nothing is listed any more: an earlier call may have been killed before it came here.
        shutil.rmtree(folder / ENGINE, ignore_errors=True)
        freed += manifest.num_bytes() - sum(file.bytes for file in kept.values())
    return freed
