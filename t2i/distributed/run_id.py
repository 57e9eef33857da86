"""Which run a folder belongs to: an id, written when the run begins, that each of its checkpoints carries."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from t2i.errors import CheckpointError
from t2i.files import write_whole

RUN_ID = "run_id"
"""Name of the file. Version 0.1.0 wrote none, and then the id of the run and of its checkpoints is empty."""


@dataclass(frozen=True)
class OwnFolder:
    """A run folder as this process found it at its start."""

    path: Path
    run_id: str

    @classmethod
    def at(cls, path: Path) -> "OwnFolder":
        """Take the folder with the id that it has now."""
        return cls(path, read_run_id(path))

    def is_own(self) -> bool:
        """Tell whether it is still the same run's: somebody may have removed it and begun another run there.

        A disk that cannot say so for a moment, such as a shared one whose server restarts, says nothing against it.
        """
        try:
            return read_run_id(self.path) == self.run_id
        except OSError:
            return True

    def check(self) -> None:
        """Check that it is still the same run's.

        Raises:
            CheckpointError: it is not.
        """
        if read_run_id(self.path) != self.run_id:
            raise CheckpointError(
                f"{self.path} is not this run's folder any more: while this process trained, it was moved, removed, or"
                " begun anew by another. Nothing more is written there."
            )


def read_run_id(run_dir: Path) -> str:
    """Read the id of a run; empty if it has none."""
    try:
        return (run_dir / RUN_ID).read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def give_run_id(run_dir: Path) -> None:
    """Write an id into the folder of a new run, unless it has one."""
    if not read_run_id(run_dir):
        write_whole(run_dir / RUN_ID, secrets.token_hex(16) + "\n")
