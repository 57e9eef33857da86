"""Who says an error: the whole table of (error, rank, what the others left), and what a process then does."""

import pytest
import torch.distributed as dist

from t2i.distributed import ending as endings
from t2i.distributed.ending import Ending, Left, ending, leave, said_once_per_machine
from t2i.errors import CheckpointError, DataError, LostRankError, NumericalError, Stopped, UserError

LOST, KILLED = LostRankError("Rank 1 failed: no such picture."), LostRankError("Lost rank 1.")
LOST.exit_code = DataError.exit_code  # where the other left its status, that is the job's
CONNECTION = dist.DistBackendError("NCCL communicator was aborted")
GLOO = RuntimeError("[../third_party/gloo/pair.cc:598] Connection closed by peer")
BUG = RuntimeError("an index is out of range")
ALONE, SPEAKS, SILENT = Left(), Left(LOST, speaks=True), Left(LOST, speaks=False)
UNLESS = "say unless the first does"

TABLE = [
    # What every rank raises: the first says it, the others go with the same status.
    *(
        case
        for shared in (NumericalError("three steps"), Stopped("at step 4"), KeyboardInterrupt())
        for case in (
            (shared, 0, ALONE, Ending(shared, "say", notes=True, reports=True)),
            (shared, 1, ALONE, Ending(shared, "go", notes=False, reports=False)),
            (shared, 3, ALONE, Ending(shared, "go", notes=False, reports=False)),
        )
    ),
    # What a user can cause: often on all ranks without a reduction, so others than the first ask it.
    *(
        case
        for own in (UserError("a key"), DataError("a picture"), CheckpointError("disk full"), KILLED)
        for case in (
            (own, 0, ALONE, Ending(own, "say", notes=True, reports=True)),
            (own, 2, ALONE, Ending(own, UNLESS, notes=True, reports=False)),
        )
    ),
    # A bug, or a path that the system refuses: each rank says its own.
    *(
        case
        for bug in (BUG, OSError("no such file"), MemoryError())
        for case in (
            (bug, 0, ALONE, Ending(bug, "say", notes=True, reports=True)),
            (bug, 2, ALONE, Ending(bug, "say", notes=True, reports=False)),
        )
    ),
    # Another rank is the cause: the lowest that lives says who it is.
    *(
        case
        for met in (CONNECTION, GLOO, Stopped("asked by a launcher whose other rank failed"))
        for case in (
            (met, 0, SPEAKS, Ending(LOST, "say", notes=True, reports=True)),
            (met, 1, SPEAKS, Ending(LOST, "say", notes=True, reports=True)),
            (met, 1, SILENT, Ending(LOST, "go", notes=False, reports=False)),
            (met, 3, SILENT, Ending(LOST, "go", notes=False, reports=False)),
        )
    ),
]


@pytest.mark.parametrize(("error", "rank", "left", "wanted"), TABLE)
def test_what_each_rank_does_with_each_error(error, rank, left, wanted):
    assert ending(error, rank=rank, left=left) == wanted


class Others:
    """Ranks as a process finds them, and what it leaves for them, in order."""

    def __init__(self, run_dir, *, rank, failed=None, lost=KILLED, speaks=True, first_says=False):
        self.run_dir, self.rank = run_dir, rank
        self.answers = {"failed": failed, "lost": lost, "speaks": speaks}
        self.first_says = first_says
        self.happened = []

    def failed(self):
        return self.answers["failed"]

    def lost(self):
        return self.answers["lost"]

    def speaks(self):
        return self.answers["speaks"]

    def first_says_it_too(self, error):
        self.happened.append(("asked the first", error))
        return self.first_says

    def note_failure(self, error):
        self.happened.append(("noted", error))

    def report(self, error):
        self.happened.append(("reported", error))


def end_of(error, **facts):
    """Leave with an error; return what was raised, and what happened before."""
    others = Others(**facts)
    with pytest.raises(BaseException) as met:
        try:
            raise error
        except BaseException as caught:
            leave(others, caught, report=others.report)
    return met.value, others.happened


@pytest.mark.parametrize("error", [CONNECTION, GLOO])
def test_a_lost_connection_ends_with_who_is_lost(error, tmp_path):
    said, happened = end_of(error, run_dir=tmp_path, rank=1)
    assert said is KILLED and said.__cause__ is error
    assert happened == [("noted", KILLED), ("reported", KILLED)]
    gone, happened = end_of(error, run_dir=tmp_path, rank=2, lost=LOST, speaks=False)
    assert isinstance(gone, SystemExit) and gone.code == DataError.exit_code
    assert happened == []


def test_a_stop_is_another_ranks_failure_only_where_one_left_word(tmp_path):
    stop = Stopped("at step 4")
    assert end_of(stop, run_dir=tmp_path, rank=0, failed=LOST)[0] is LOST
    assert end_of(stop, run_dir=tmp_path, rank=0)[0] is stop
    gone, happened = end_of(stop, run_dir=tmp_path, rank=1)
    assert gone.code == 75 and happened == []


def test_a_users_error_is_noted_before_the_first_rank_is_waited_for(tmp_path):
    error = DataError("a picture")
    gone, happened = end_of(error, run_dir=tmp_path, rank=1, first_says=True)
    assert gone.code == 3
    assert happened == [("noted", error), ("asked the first", error)]
    said, happened = end_of(error, run_dir=tmp_path, rank=1, first_says=False)
    assert said is error
    assert happened == [("noted", error), ("asked the first", error)]


def test_only_a_bug_of_the_first_rank_points_to_its_traceback(tmp_path, capsys):
    assert end_of(BUG, run_dir=tmp_path, rank=0)[0] is BUG
    assert "error.txt" in capsys.readouterr().err
    for error, rank in ((BUG, 1), (UserError("a key"), 0), (KeyboardInterrupt(), 0), (CONNECTION, 0)):
        end_of(error, run_dir=tmp_path, rank=rank)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "wanted"), [(CONNECTION, True), (GLOO, True), (BUG, False), (OSError("gloo"), False)]
)
def test_errors_of_collectives_are_told_from_others(error, wanted):
    assert endings.is_lost_connection(error) is wanted


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_an_error_of_all_ranks_before_they_meet_is_said_by_the_first_of_a_machine(local_rank, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("t2i.distributed.ending.SAY_SECONDS", 0.0)
    with pytest.raises((DataError, SystemExit)) as caught, said_once_per_machine():
        raise DataError("no shards")
    if local_rank == "0":
        assert str(caught.value) == "no shards"
    else:
        assert caught.value.code == 3


def test_a_rank_that_its_launcher_stops_because_the_first_failed_is_silent(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as caught, said_once_per_machine():
        raise Stopped("before the first step")
    assert caught.value.code == 75
