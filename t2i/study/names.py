"""Names in a study file: known ones, and what somebody may have meant."""

import difflib
from dataclasses import fields, is_dataclass
from typing import Any

from t2i.config import RunConfig
from t2i.errors import UserError

TRAIN = "launchers/train.py"


def check_keys(settings: dict[str, Any], *, where: str, kind: Any = RunConfig, prefix: str = "") -> None:
    """Check that settings have the names of a run's, and name the nearest where one has not.

    Raises:
        UserError: the first name that a run does not have.
    """
    known = {one.name: one.type for one in fields(kind)}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in known:
            right = nearest_name(f"{prefix}{name}", [f"{prefix}{one}" for one in known])
            raise UserError(f"{where} has the setting {prefix}{key}, which {TRAIN} does not take; {right}.")
        group = known[name]
        if is_dataclass(group) and isinstance(value, dict):
            check_keys(value, where=where, kind=group, prefix=f"{prefix}{name}.")


def nearest_name(name: str, known: list[str]) -> str:
    """Say what somebody may have meant, or all that there is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"perhaps {close[0]} was meant" if close else f"known are {', '.join(known)}"
