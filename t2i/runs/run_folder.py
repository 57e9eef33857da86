"""The files of a run folder that explain the run: its settings, its machine, its status."""

import dataclasses
import errno
import fcntl
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, Protocol

import yaml

from t2i.config import DsConfig
from t2i.config.renamed import LAST_RELEASE, with_new_keys
from t2i.distributed.run_id import give_run_id
from t2i.errors import CheckpointError, UserError
from t2i.files import lines_of, read_optional_json, read_yaml, try_writing, write_json, write_whole
from t2i.runs.checkpoint_manifest import MANIFEST
from t2i.runs.checkpoint_store import CHECKPOINTS, last_step
from t2i.runs.metrics_log import has_step
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
START = "start.json"
"""What a run with train.l2_sp began from: folder and hash of its weights."""
REPLAY_MANIFEST = "replay_manifest.json"
"""Copy of the manifest of data.replay_shards."""
BY_CONTENT = {
    "data.shards": "data_manifest.json",
    "data.remote": "data_manifest.json",
    "data.replay_shards": REPLAY_MANIFEST,
}
"""Settings that a resumed run knows by what is there, not by the path, once it has this copy to compare with."""
SAMPLES, SAMPLE_CAPTIONS = "samples", "captions.txt"
"""Folder of the grids drawn in training, and the file of their captions, one per line."""

OTHERS = {
    MANIFEST: "a manifest.json: it is a folder of shards, or a checkpoint",
    "config.json": "a config.json: it is a folder of a model",
    "model_index.json": "a model_index.json: it is a folder of a model",
}
"""Files that no run has, and what a folder with them is."""
IMAGE_TOKENIZER = "image_tokenizer"
"""Copy of the shards' image tokenizer."""

REPORTED_PACKAGES = ("torch", "deepspeed", "transformers", "diffusers", "mosaicml-streaming", "t2i")


NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""What file systems without file locks say when they are asked for one."""

State = Literal["running", "done", "stopped", "failed"]


@dataclasses.dataclass(frozen=True)
class Status:
    """The content of status.json."""

    state: State
    code: int | None = None
    """Exit status; None while the run is running."""
    step: int = 0
    reason: str = ""
    """The error that ended the run."""
    next: str = ""
    """Command to run next: to resume, or to make the report of a run that is done; empty where none is known to help.
    """
    time: str = ""


class Settings(Protocol):
    """Settings, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


class RunSettings(Settings, Protocol):
    """All settings of a run. Only its run_dir is read here; the rest is written down."""

    @property
    def run_dir(self) -> Path: ...


def plain(config: Settings) -> dict[str, object]:
    """Turn settings into plain values, to be written as YAML or JSON and compared."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))  # type: ignore[no-any-return]


def open_run(config: RunSettings, *, ds_config: DsConfig, heading: str = "") -> IO[str]:
    """Make or reopen config.run_dir for this process alone, and return its lock, which the caller keeps open.

    A new run's settings are written down. Those of one that is resumed are still to be compared with its checkpoint and
    its data, so they are written by `record_run`, once nothing refuses them.

    Args:
        heading: a comment above the settings.

    Raises:
        UserError: another process uses the folder, or it was begun with other settings that may not change.
    """
    run_dir = config.run_dir
    make_folder(run_dir)
    lock = _lock(run_dir)
    try:
        is_resumed = has_begun(run_dir)
        if is_resumed:
            _refuse_other_science(config)
        # A run of version 0.1.0 has no id, and neither have its checkpoints.
        if not (run_dir / RESOLVED).exists() or not is_resumed:
            give_run_id(run_dir)
        write_status(run_dir, state="running", step=last_step(run_dir))
        if not is_resumed:
            record_run(config, ds_config=ds_config, heading=heading)
    except (UserError, OSError):
        # The caller never gets the lock, and this process may open the folder again.
        lock.close()
        raise
    return lock


def record_run(config: RunSettings, *, ds_config: DsConfig, heading: str = "") -> None:
    """Write down a run's settings, DeepSpeed's, and this process's environment.

    Args:
        heading: a comment above the settings.
    """
    comment = f"# {heading}\n" if heading else ""
    write_whole(config.run_dir / RESOLVED, comment + yaml.safe_dump(plain(config), sort_keys=False))
    write_json(config.run_dir / DS_CONFIG, dict(ds_config))
    write_json(config.run_dir / ENVIRONMENT, environment())


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Read a run's resolved.yaml, in today's spelling of its keys."""
    found = read_yaml(run_dir / RESOLVED, name=str(run_dir / RESOLVED))
    settings = with_new_keys(found, is_said=False)
    if settings != found:
        # One warning, not one per key: nobody typed these keys, and a resumed run writes the new ones.
        logger.warning(
            "%s has old names of settings, which are read up to release %s.", run_dir / RESOLVED, LAST_RELEASE
        )
    return settings


def has_begun(run_dir: Path) -> bool:
    """Tell whether a run has made a step; until then it may be given other settings."""
    return any((run_dir / CHECKPOINTS).glob("step_*")) or has_step(run_dir)


def _refuse_other_science(config: RunSettings) -> None:
    if not (config.run_dir / RESOLVED).exists():
        return
    by_content = {key for key, copy in BY_CONTENT.items() if (config.run_dir / copy).exists()}
    found = read_settings(config.run_dir)
    changed = changed_settings(found, plain(config), kind=type(config), by_content=by_content)
    if changed:
        listed = "; ".join(changed)
        raise UserError(
            f"{config.run_dir} was begun with other settings ({listed}). Choose another --run-dir."
        )


def make_folder(run_dir: Path) -> None:
    """Make a run folder and check that it is writable, before anything else is done.

    Raises:
        CheckpointError: it is not.
        UserError: it holds something else, of which a run would replace a part.
    """
    with _saying_unwritable(run_dir):
        _refuse_other_content(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / LOCK).open("a").close()


def check_place(run_dir: Path) -> None:
    """Check that a run folder can be written, without making it.

    Raises:
        CheckpointError: it cannot.
    """
    with _saying_unwritable(run_dir):
        try_writing(run_dir)


@contextmanager
def _saying_unwritable(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"run folder {run_dir} cannot be written: {error.strerror}. Choose another --run-dir, or make it writable."
        ) from error


def _refuse_other_content(run_dir: Path) -> None:
    # Shards, models and runs have files of the same names: an image tokenizer, its round trip, a manifest.
    what = next((what for name, what in OTHERS.items() if (run_dir / name).exists()), "")
    if not what and not (run_dir / RESOLVED).exists() and (run_dir / IMAGE_TOKENIZER).exists():
        what = f"{IMAGE_TOKENIZER}/ of its own, which a run would replace"
    if what:
        raise UserError(f"run folder {run_dir} has {what}; expected a new folder, or that of a run.")


def _lock(run_dir: Path) -> IO[str]:
    # The kernel releases this lock when the process ends, however it ends; a file with a process id would stay.
    lock = (run_dir / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise UserError(
            f"run folder {run_dir} is in use by {lock.read() or 'another process'}; choose another --run-dir."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning(
            "%s cannot be locked (%s): nothing keeps a second process from training there at the same time.",
            lock.name,
            error.strerror,
        )
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}")
    lock.flush()
    return lock


def environment() -> dict[str, object]:
    """Describe this process: command, git commit, versions, machine."""
    return {
        "command": own_command_line(),
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: version(name) for name in REPORTED_PACKAGES},
    }


def git_commit() -> str:
    """Return the commit of this checkout, with `+` if files differ from it; empty for an installed package."""
    here = Path(__file__)
    # An environment may lie within another repository, whose commit says nothing of these files.
    is_ours = ["git", "ls-files", "--error-unmatch", here.name]
    ask = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        if subprocess.run(is_ours, cwd=here.parent, capture_output=True, check=False).returncode:
            return ""
        done = subprocess.run(ask, cwd=here.parent, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip()


def write_status(
    run_dir: Path,
    *,
    state: State,
    step: int,
    code: int | None = None,
    reason: str = "",
    next_command: str | None = None,
) -> None:
    """Write status.json.

    Args:
        code: the exit status, once the run has ended.
        next_command: None for the report of a run that is done, else for this very command.
    """
    if next_command is None:
        next_command = report_command(run_dir) if state == "done" else own_command_line()
    status = Status(state, code, step, reason, next_command, time=time.strftime("%FT%T%z"))
    write_json(run_dir / STATUS, dataclasses.asdict(status))


def write_sample_captions(run_dir: Path, captions: Sequence[str]) -> None:
    """Write the captions of a run's grids of samples, one per line."""
    write_whole(
        run_dir / SAMPLES / SAMPLE_CAPTIONS, "".join(f"{' '.join(text.split())}\n" for text in captions)
    )


def read_sample_captions(run_dir: Path) -> list[str]:
    """Read the captions of a run's grids of samples; none where nothing was sampled."""
    file = run_dir / SAMPLES / SAMPLE_CAPTIONS
    return lines_of(file.read_bytes().decode(errors="replace")) if file.is_file() else []


def report_command(run_dir: Path) -> str:
    """Write out the command that makes the report of a run."""
    # A name that begins with a dash would be taken for a flag.
    return command_line("report", f"./{run_dir}" if str(run_dir).startswith("-") else str(run_dir))


def read_status(run_dir: Path) -> Status | None:
    """Read status.json; None for a run that has not begun.

    Raises:
        DataError: it is not JSON.
    """
    found = read_optional_json(run_dir / STATUS)
    known = {one.name for one in dataclasses.fields(Status)}
    return (
        Status(**{key: value for key, value in found.items() if key in known}) if "state" in found else None
    )
