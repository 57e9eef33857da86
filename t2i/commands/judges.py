"""Flags of judges behind HTTP, which `sample` and `score` share.

Examples:
  python eval/coco_fid.py runs/train --judge-url http://localhost:8080 --judges hpsv3=v3.0 pickscore=v1
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Le

from t2i.errors import UserError
from t2i.measure.judge_wire import TIMEOUT_SECONDS
from t2i.settings import check_values

if TYPE_CHECKING:
    from t2i.measure.remote_judge import RemoteJudge


@dataclass(frozen=True)
class JudgeFlags:
    """A service, and its judges."""

    judge_url: str = ""
    """Address of a reward service, such as UniRL's. Default: none."""
    judges: tuple[str, ...] = ()
    """Which of its judges, each with the revision of its weights: hpsv3=v3.0 pickscore=v1. A name alone, if the service
    states a revision. With --best-by judge the first of them chooses; in a score all of them score every row."""
    judge_revision: str = ""
    """The revision, where there is one judge that is named alone."""
    judge_timeout_seconds: Annotated[float, Gt(0), Le(1_000_000)] = TIMEOUT_SECONDS
    """Seconds that an answer is waited for; a request is tried three times."""

    def __post_init__(self) -> None:
        check_values(self)


def judges_of(flags: JudgeFlags) -> "tuple[RemoteJudge, ...]":
    """Ask a service for its judges, before anything is drawn.

    Raises:
        UserError: flags contradict one another, or a judge is not there, fails or has no revision.
    """
    from t2i.measure.remote_judge import RemoteJudge, check_revision, check_service

    judges = [
        RemoteJudge(flags.judge_url, reward, revision=revision, timeout_seconds=flags.judge_timeout_seconds)
        for reward, revision in revisions_of(flags).items()
    ]
    for judge in judges:
        check_service(judge)
    return tuple(check_revision(judge) for judge in judges)


def check_judges(flags: JudgeFlags) -> None:
    """Refuse flags that contradict one another.

    Raises:
        UserError: they do.
    """
    if bool(flags.judge_url) != bool(flags.judges):
        raise UserError("--judge-url and --judges go together: the address of a service, and its judges.")
    revisions_of(flags)


def revisions_of(flags: JudgeFlags) -> dict[str, str]:
    """List the judges with the user's words for their revisions, empty where there are none."""
    found = {name: revision for name, _, revision in (judge.partition("=") for judge in flags.judges)}
    if len(found) != len(flags.judges) or "" in found:
        raise UserError(
            f"--judges is {' '.join(flags.judges)}; expected names, each once: NAME or NAME=REVISION."
        )
    if not flags.judge_revision:
        return found
    if len(found) != 1 or any(found.values()):
        raise UserError(
            f"--judge-revision is {flags.judge_revision}; expected --judges with one name that it is of. Of several,"
            " each names its own: --judges hpsv3=v3.0 pickscore=v1."
        )
    return dict.fromkeys(found, flags.judge_revision)
