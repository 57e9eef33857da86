"""What a GPU needs, as far as a CPU can show it: the order of calls, what is freed, what is waited for."""

import gc
import os
import sys
import weakref
from datetime import timedelta

import deepspeed
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, config_of
from deepspeed.runtime.engine import DeepSpeedEngine

from t2i.distributed import launch, rendezvous
from t2i.errors import UserError
from t2i.train import main


@pytest.fixture
def calls(monkeypatch):
    """Pretend that two GPUs are visible to local rank 1, and record what is called in which order."""
    found = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(("set_device", device)))
    monkeypatch.setattr(launch, "prepare_environment", lambda: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **given: found.append(("init", given)))
    return found


def test_the_own_gpu_is_current_before_ranks_meet(calls):
    launch.start_processes()
    assert [name for name, _ in calls] == ["set_device", "init"]
    assert calls[0][1] == 1


def test_a_rank_without_a_gpu_is_one_sentence_before_ranks_meet(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"LOCAL_RANK is 1, .* 1 GPUs; expected a GPU per process"):
        launch.start_processes()
    assert calls == []


def test_a_collective_waits_longer_than_any_watchdog(calls):
    launch.start_processes()
    # DeepSpeed's own ten minutes would end a rank that waits for another's save.
    assert calls[-1][1]["timeout"] == launch.PATIENCE > timedelta(hours=10)


@pytest.mark.parametrize("place", [rendezvous.OWN, rendezvous.ANY])
def test_ranks_that_never_start_are_waited_for_by_minutes(place, monkeypatch):
    seen = []

    def store(*_, timeout=None, **__):
        seen.append(timeout)
        raise ConnectionError

    monkeypatch.setattr(dist, "TCPStore", store)
    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "TCPStore", store)
    monkeypatch.setattr(rendezvous, "_listen", lambda port: os.fdopen(os.open(os.devnull, os.O_RDONLY)))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ConnectionError):
        next(iter(dist.rendezvous(place, timeout=launch.PATIENCE)))
    assert seen == [rendezvous.MEETING]


def alive():
    gc.collect()
    return sum(isinstance(found, DeepSpeedEngine) for found in gc.get_objects())


@pytest.mark.parametrize("ends_by", ["its last step", "an error"])
def test_a_run_leaves_no_engine_behind(ends_by, shards, tmp_path, monkeypatch):
    made = []
    real = main.make_engine

    def make(*arguments, **settings):
        engine = real(*arguments, **settings)
        made.extend(map(weakref.ref, [engine, *engine.module.parameters()]))
        return engine

    monkeypatch.setattr(main, "make_engine", make)
    if ends_by == "an error":
        monkeypatch.setattr(main, "periodic_work", lambda *_, **__: 1 / 0)
    before = alive()
    try:
        main.train(
            config_of(shards, tmp_path / "run", max_steps=1, eval_every=0),
            ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json",
        )
    except ZeroDivisionError as error:
        assert ends_by == "an error"
        error.__traceback__ = None
    assert made
    assert alive() <= before
    assert [ref for ref in made if ref() is not None] == []
