"""Ranks of one machine meet where no other machine can reach them."""

import os
import socket
import threading
from datetime import timedelta

import processes
import psutil
import pytest
from torch.distributed.rendezvous import rendezvous

from t2i.distributed import rendezvous as meeting
from t2i.errors import UserError


@pytest.fixture
def job(monkeypatch):
    """The variables that `deepspeed --num_gpus 2` sets for the first rank."""
    port = processes.free_port()
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    return port


def store():
    return next(iter(rendezvous(meeting.meeting_place(), timeout=timedelta(seconds=30))))


def listening():
    found = psutil.Process().net_connections(kind="inet")
    return {(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN}


def test_ranks_of_one_machine_meet_on_its_loopback(job, monkeypatch):
    first, rank, world_size = store()
    assert (rank, world_size) == (0, 2)
    assert {ip for ip, port in listening() if port == job} == {meeting.LOOPBACK}
    monkeypatch.setenv("RANK", "1")
    second, rank, _ = store()
    threading.Thread(target=first.set, args=("word", "from the first")).start()
    assert rank == 1 and second.get("word") == b"from the first"


def test_a_rank_of_another_job_at_the_same_port_is_not_taken_for_one_of_this(job, monkeypatch):
    monkeypatch.setattr(meeting, "_job_name", lambda: "this job")
    first, *_ = store()
    monkeypatch.setattr(meeting, "_job_name", lambda: "another")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=rf"port {job}, .* taken"):
        store()
    assert first.check([meeting.JOB])


@pytest.mark.parametrize("address", ["0.0.0.0", meeting.LOOPBACK])
def test_a_port_that_was_taken_meanwhile_is_said(job, address):
    with socket.socket() as other:
        other.bind((address, job))
        other.listen()
        with pytest.raises(UserError, match=rf"port {job}, .* taken.* deepspeed --master_port \d+"):
            store()


def test_a_single_rank_opens_no_port(job, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_SIZE", "1")
    before = listening()
    alone, rank, world_size = store()
    alone.set("word", "to itself")
    assert (rank, world_size, alone.get("word")) == (0, 1, b"to itself")
    assert listening() == before


def test_several_machines_and_torchrun_meet_where_the_launcher_says(job, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert meeting.meeting_place() == meeting.ANY
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert meeting.meeting_place() == meeting.ANY
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_a_training_process_listens_to_no_other_machine(one_process):
    assert {ip for ip, _ in listening() if not ip.startswith("127.")} <= {"::1"}
