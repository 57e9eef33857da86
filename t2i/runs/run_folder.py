"""A run's folder explains itself: what was asked, on what machine, how far it is, and every number."""

import dataclasses
import fcntl
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Protocol

import yaml

from t2i.config.renamed import LAST_RELEASE, with_new_keys
from t2i.errors import CheckpointError, UserError
from t2i.files import write_json
from t2i.runs.checkpoint_store import last_step
from t2i.settings import changed_settings
from t2i.verbs import command_line, own_command_line

logger = logging.getLogger(__name__)

RESOLVED, DS_CONFIG, ENVIRONMENT, STATUS, LOCK = (
    "resolved.yaml",
    "ds_config.json",
    "environment.json",
    "status.json",
    ".lock",
)
SAMPLES, SAMPLE_CAPTIONS = "samples", "captions.txt"
"""Folder of the grids drawn in training, and the captions of each of them, a line each."""

REPORTED_PACKAGES = ("torch", "deepspeed", "transformers", "diffusers", "mosaicml-streaming", "t2i")


class Settings(Protocol):
    """All that somebody asked of a run: a dataclass, written down whole and read by nothing here but its folder."""

    @property
    def run_dir(self) -> Path: ...


def plain(config: Any) -> dict[str, Any]:
    """Turn a configuration into plain values, for YAML and for comparing."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))  # type: ignore[no-any-return]


def open_run(config: Settings, *, ds_config: Mapping[str, object], heading: str = "") -> IO[str]:
    """Make or reopen config.run_dir for this process alone; keep the returned lock open while it runs.

    Args:
        heading: what follows from the settings on these ranks, a comment above them.

    Raises:
        UserError: the folder belongs to a running process, or was made with other science settings.
    """
    run_dir = config.run_dir
    make_folder(run_dir)
    lock = _lock(run_dir)
    try:
        _refuse_other_science(config)
        write_status(run_dir, state="running", step=last_step(run_dir))
        comment = f"# {heading}\n" if heading else ""
        (run_dir / RESOLVED).write_text(comment + yaml.safe_dump(plain(config), sort_keys=False))
        (run_dir / DS_CONFIG).write_text(json.dumps(ds_config, indent=1))
        (run_dir / ENVIRONMENT).write_text(json.dumps(environment(), indent=1))
    except (UserError, OSError):
        lock.close()
        raise
    return lock


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Read a run's resolved.yaml, in today's spelling of its keys."""
    found = yaml.safe_load((run_dir / RESOLVED).read_text())
    settings = with_new_keys(found, is_said=False)
    if settings != found:
        # One sentence, not one a key: nobody typed them, and a resumed run writes the new ones.
        logger.warning(
            "%s has old names of settings, which are read up to release %s.", run_dir / RESOLVED, LAST_RELEASE
        )
    return settings


def _refuse_other_science(config: Settings) -> None:
    if not (config.run_dir / RESOLVED).exists():
        return
    changed = changed_settings(read_settings(config.run_dir), plain(config), kind=type(config))
    if changed:
        listed = "; ".join(changed)
        raise UserError(
            f"{config.run_dir} was begun with other settings ({listed}). Choose another --run-dir."
        )


def make_folder(run_dir: Path) -> None:
    """Make a run folder that can be written to, or find that out before anything else is done.

    Raises:
        CheckpointError: the file system refuses.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / LOCK).open("a").close()
    except OSError as error:
        raise CheckpointError(
            f"run folder {run_dir} cannot be written: {error.strerror}. Choose another --run-dir, or free it."
        ) from error


def _lock(run_dir: Path) -> IO[str]:
    lock = (run_dir / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise UserError(
            f"run folder {run_dir} is in use by {lock.read() or 'another process'}; choose another --run-dir."
        ) from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}")
    lock.flush()
    return lock


def environment() -> dict[str, Any]:
    """Describe this process: command, commit of the checkout, versions, machine."""
    return {
        "command": own_command_line(),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: version(name) for name in REPORTED_PACKAGES},
    }


def commit() -> str:
    """Name the commit of the checkout that runs, `+` where files differ from it; empty for an installed package."""
    ask = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip()


def write_status(run_dir: Path, *, state: str, step: int, code: int | None = None, reason: str = "") -> None:
    """Write status.json: state is running, done, stopped or failed; code is the exit status once it ended."""
    status = {
        "state": state,
        "code": code,
        "step": step,
        "reason": reason,
        "next": _next_command(run_dir, state),
        "time": time.strftime("%FT%T%z"),
    }
    write_json(run_dir / STATUS, status)


def _next_command(run_dir: Path, state: str) -> str:
    return command_line("report", str(run_dir)) if state == "done" else own_command_line()
