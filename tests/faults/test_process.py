"""Processes that die, hang, fail or are asked to stop: under the real launcher, two ranks of a tiny model."""

import os
import random
import re
import signal
import socket
import time
from dataclasses import replace

import pytest
import torch
from conftest import config_of
from launched import (
    LEARN,
    Job,
    copy_run,
    ds_config,
    first_difference,
    forget_after,
    record,
    state_of_last,
    steps,
    steps_lost,
)

from t2i.config import RunConfig
from t2i.errors import UserError
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.metrics_log import read_metrics
from t2i.runs.run_folder import open_run
from t2i.train import resume_check as verify
from t2i.train.main import train


@pytest.fixture
def half(proof, tmp_path):
    """The folder of such a run that has done all steps, but lost all checkpoints after step 4."""
    run_dir = copy_run(proof.run_dir / "halves", tmp_path / "run")
    forget_after(run_dir, step=4)
    return run_dir


def same_as(whole, run_dir):
    assert record(run_dir) == record(whole)
    assert not first_difference(state_of_last(run_dir), state_of_last(whole))


def test_two_ranks_prove_themselves_that_they_resume_bit_for_bit(proof, whole):
    assert "equal: 8 steps" in proof.said()
    same_as(whole, proof.run_dir / "halves")


def test_the_proof_names_the_first_difference(whole, tmp_path):
    other = copy_run(whole, tmp_path / "run")
    folder = checkpoints.step_folder(other, 8)
    manifest = checkpoints.read_checkpoint_manifest(folder)
    manifest.facts.optimizer_bits[1] += 1
    (folder / "manifest.json").write_text(manifest.text())
    assert verify.first_difference(other, whole, step=8).startswith(
        "the optimizer's moments differ after 8 steps"
    )
    metrics = other / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"samples": 24', '"samples": 25'))
    assert (
        verify.first_difference(other, whole, step=8)
        == "step 3: samples is 25 after resuming, 24 without resuming."
    )


def test_a_new_start_goes_on_bit_for_bit(shards, whole, half):
    assert steps_lost(half) == 4
    again = Job(shards, half, warm=True, **LEARN).run()
    assert again.code == 0, again.said()[-3000:]
    assert "resuming at step 4 of 8" in again.said()
    same_as(whole, half)


@pytest.mark.slow
@pytest.mark.fault(
    1,
    "a rank is killed",
    injected="SIGKILL of rank 1 in step 6",
    expected="exit 6 naming it, in seconds; the same command equals the undisturbed run bit for bit",
)
def test_a_killed_rank_is_named_and_the_run_goes_on_bit_for_bit(shards, whole, tmp_path, observed):
    killed = Job(shards, tmp_path / "run", fault="1:6:kill", **LEARN).run()
    seconds = time.time() - (killed.run_dir / "metrics.jsonl").stat().st_mtime
    status, lost = killed.status(), steps_lost(killed.run_dir)
    assert (status["state"], status["code"], status["step"]) == ("failed", 6, 4)
    assert "Lost rank 1 (process" in status["reason"]
    assert "Lost rank 1 (process" in killed.said()
    assert "Traceback" not in killed.said()
    assert status["next"].startswith("deepspeed launchers/train.py")
    again = Job(shards, killed.run_dir, **LEARN).run()
    assert again.code == 0, again.said()[-3000:]
    assert "resuming at step 4 of 8" in again.said()
    same_as(whole, killed.run_dir)
    observed(
        f"status 6, command's status {killed.code}, rank named, all gone {seconds:.1f} s after the last step; from"
        " step 4 on, weights, Adam, random states and metrics of step 8 equal",
        deaths=[lost],
    )


@pytest.mark.fault(
    16,
    "resumed with 1 rank instead of 2",
    injected="run of 2 ranks with frozen parameters and accumulation, gone on with by 1",
    expected="converted, said so; same samples; losses within 1e-6",
)
def test_two_ranks_go_on_as_one(shards, whole, half, tmp_path, observed, caplog):
    config = config_of(shards, half)
    config = replace(
        config,
        model=replace(config.model, trainable="norms"),
        train=replace(config.train, max_steps=8, save_every=2, eval_every=0, deterministic=True),
    )
    with caplog.at_level("INFO", logger="t2i"):
        train(config, ds_config_path=ds_config(tmp_path))
    assert "made by 2 ranks in fp32 with torch's Adam, for 1 rank in fp32" in caplog.text
    same_but_for_rounding(whole, half, observed)
    assert not (half / "checkpoints" / ".universal").exists()


@pytest.mark.fault(
    16,
    "resumed with 2 ranks instead of 1",
    injected="run of 1 rank with frozen parameters and accumulation, gone on with by 2",
    expected="converted, said so; same samples; losses within 1e-6",
)
def test_one_rank_goes_on_as_two(shards, tmp_path, observed):
    config = config_of(shards, tmp_path / "one")
    config = replace(
        config,
        model=replace(config.model, trainable="norms"),
        train=replace(config.train, max_steps=8, save_every=4, keep_last=9, eval_every=0, deterministic=True),
    )
    train(config, ds_config_path=ds_config(tmp_path))
    run_dir = copy_run(config.run_dir, tmp_path / "run")
    forget_after(run_dir, step=4)
    job = Job(shards, run_dir, warm=True, train__save_every=4, train__keep_last=9, **LEARN).run()
    assert job.code == 0, job.said()[-3000:]
    assert "made by 1 rank in fp32 with torch's Adam, for 2 ranks in fp32" in job.said()
    same_but_for_rounding(config.run_dir, run_dir, observed)


def same_but_for_rounding(whole, run_dir, observed):
    """Gradients are summed in another order: equal to fp32's rounding, which few steps do not amplify."""
    found, wanted = record(run_dir), record(whole)
    exact = ("step", "epoch", "samples", "tokens", "lr")
    assert [[row[key] for key in exact] for row in found] == [[row[key] for key in exact] for row in wanted]
    largest = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(found, wanted, strict=True))
    assert largest < 1e-6
    found, wanted = (state_of_last(run)["weights"] for run in (run_dir, whole))
    frozen = [name for name in wanted if re.search(r"(in_proj|out_proj|w12|w3)\.weight", name)]
    assert len(frozen) == 8  # of two layers
    assert all(torch.equal(found[name], wanted[name]) for name in frozen)
    observed(f"samples and tokens equal, losses within {largest:.1e}, frozen parameters equal")


@pytest.mark.slow
@pytest.mark.fault(
    5,
    "SIGTERM to the `deepspeed` command alone",
    injected="its process id killed with SIGTERM while 2 ranks train",
    expected="ranks notice within a step: saved, status 75 in 30 s, no process left",
)
def test_the_launcher_alone_is_ended_and_the_ranks_save_and_leave(shards, tmp_path, observed):
    with Job(shards, tmp_path / "run", train__max_steps=100_000, train__save_every=100_000) as job:
        job.wait_for_step(3)
        job.process.terminate()
        seconds = job.wait_for_all()
    assert_stopped(job)
    assert seconds < 30
    observed(
        f"status 75 with all {job.status()['step']} steps saved, last process gone after {seconds:.1f} s",
        stops=[steps_lost(job.run_dir)],
    )


def assert_stopped(job):
    status, done = job.status(), steps(job.run_dir)[-1]["step"]
    assert (status["state"], status["code"], status["step"]) == ("stopped", 75, done), job.said()[-3000:]
    assert f"Stopped at step {done} of" in job.said()
    launchers = r'Traceback [^\n]*\n  File "[^"]*/bin/deepspeed"[^\n]*\n(?:  [^\n]*\n)+KeyboardInterrupt\n'
    ours = re.sub(launchers, "", job.said())
    assert "Traceback" not in ours, ours[-3000:]
    checkpoints.verify(job.run_dir / (job.run_dir / "latest").read_text().strip())


@pytest.mark.slow
@pytest.mark.fault(
    4,
    "SIGTERM to every rank (Slurm)",
    injected="SIGTERM to both rank processes",
    expected="status 75 in 30 s, no step lost",
)
def test_ranks_that_are_told_to_stop_save(shards, tmp_path, observed):
    with Job(shards, tmp_path / "run", train__max_steps=100_000, train__save_every=100_000) as job:
        job.wait_for_step(3)
        for rank in job.ranks():
            rank.terminate()
        seconds = job.wait_for_all()
    assert_stopped(job)
    observed(
        f"status 75, command's status {job.wait()}, {seconds:.1f} s",
        stops=[steps_lost(job.run_dir)],
    )


@pytest.mark.slow
@pytest.mark.fault(
    4,
    "SIGTERM to one rank",
    injected="SIGTERM to rank 1 alone",
    expected="both ranks stop after the same step: status 75",
)
def test_one_rank_that_is_told_to_stop_stops_all(shards, tmp_path, observed):
    with Job(shards, tmp_path / "run", train__max_steps=100_000, train__save_every=100_000) as job:
        job.wait_for_step(3)
        job.ranks()[1].terminate()
        seconds = job.wait_for_all()
    assert_stopped(job)
    observed(
        f"status 75, command's status {job.wait()}, {seconds:.1f} s",
        stops=[steps_lost(job.run_dir)],
    )


@pytest.mark.slow
@pytest.mark.fault(
    6,
    "SIGTERM to loader processes too",
    injected="SIGTERM to the whole process group, 2 loader processes a rank",
    expected="they live until the ranks have saved: status 75",
)
def test_loader_processes_do_not_stop_before_their_rank(shards, tmp_path, observed):
    settings = {"train__max_steps": 100_000, "train__save_every": 100_000, "data__num_workers": 2}
    with Job(shards, tmp_path / "run", **settings) as job:
        job.wait_for_step(3)
        num_processes = len(job.session())
        os.killpg(job.process.pid, signal.SIGTERM)
        seconds = job.wait_for_all()
    assert_stopped(job)
    assert num_processes >= 8  # command, launcher, two ranks with two loader processes each
    observed(
        f"{num_processes} processes told, status 75, all gone after {seconds:.1f} s",
        stops=[steps_lost(job.run_dir)],
    )


@pytest.mark.slow
@pytest.mark.fault(
    7, "Ctrl-C", injected="SIGINT to the process group", expected="the step is finished and saved: status 75"
)
def test_an_interrupt_is_a_wish_to_stop(shards, tmp_path, observed):
    with Job(shards, tmp_path / "run", train__max_steps=100_000, train__save_every=100_000) as job:
        job.wait_for_step(3)
        os.killpg(job.process.pid, signal.SIGINT)
        seconds = job.wait_for_all()
    assert_stopped(job)
    said = "the `deepspeed` command itself shows its own KeyboardInterrupt"
    observed(f"status 75, {seconds:.1f} s; {said}", stops=[steps_lost(job.run_dir)])


@pytest.mark.slow
@pytest.mark.fault(
    7,
    "Ctrl-C twice",
    injected="SIGINT to a single process, and again until it has said how it ended",
    expected="status 130 at once (75 where the first was granted sooner), the last checkpoint valid",
)
def test_a_second_interrupt_ends_at_once(shards, tmp_path, observed):
    with Job(shards, tmp_path / "run", ranks=0, train__max_steps=100_000, train__save_every=5) as job:
        job.wait_for_step(7)
        job.process.send_signal(signal.SIGSTOP)  # both arrive before the next step
        job.process.send_signal(signal.SIGINT)
        job.process.send_signal(signal.SIGCONT)
        while job.process.poll() is None and job.status()["code"] is None:  # two at once would be one
            job.process.send_signal(signal.SIGINT)
            time.sleep(0.005)
        code = job.wait(30)
    assert code in (130, 75)  # the first may have been granted before the second came
    checkpoints.verify(job.run_dir / (job.run_dir / "latest").read_text().strip())
    assert job.status()["code"] == code
    observed(f"status {code}, last checkpoint valid")


@pytest.mark.slow
@pytest.mark.fault(
    8,
    "SIGTERM while held-out losses are measured",
    injected="SIGTERM to one rank at the start of a long measure",
    expected="broken off, saved, status 75 in 30 s; done first when the run goes on",
)
def test_a_measure_is_broken_off_and_made_up_for(shards, tmp_path, observed):
    settings = {"train__max_steps": 4, "train__eval_every": 2, "train__eval_images": 36}
    undisturbed = Job(shards, tmp_path / "whole", **settings).run()
    job = Job(shards, tmp_path / "run", fault="1:2:term:periodic", **settings).run()
    assert_stopped(job)
    manifest = checkpoints.read_checkpoint_manifest(checkpoints.step_folder(job.run_dir, 2))
    assert manifest.facts.progress["owed"] == [0]
    assert Job(shards, job.run_dir, **settings).run().code == 0
    measured = [
        [(row["step"], row["image_loss"]) for row in read_metrics(run) if "split" in row]
        for run in (undisturbed.run_dir, job.run_dir)
    ]
    assert measured[0] == measured[1]
    observed(
        f"status 75 at step 2 in {job.seconds:.0f} s with start; {len(measured[1])} measures equal later"
    )


@pytest.mark.slow
@pytest.mark.fault(
    8,
    "SIGTERM before the first step",
    injected="SIGTERM to a rank before the model is built",
    expected="status 75, nothing to save, nothing half",
)
def test_a_stop_before_the_first_step(shards, tmp_path, observed):
    job = Job(shards, tmp_path / "run", fault="0:0:term:setup").run()
    assert (job.status()["code"], job.status()["step"]) == (75, 0)
    assert "Stopped before the first step" in job.said()
    assert Job(shards, job.run_dir).run().code == 0
    observed("status 75; the same command trains from the start")


@pytest.mark.slow
@pytest.mark.fault(
    9,
    "a rank hangs",
    injected="SIGSTOP of rank 1 in step 3",
    expected="all stacks in hang_rank0.txt, exit 6 in time, naming the rank; resumable bit for bit",
)
def test_a_rank_that_hangs_is_found(shards, whole, tmp_path, observed):
    settings = {"train__hang_timeout_seconds": 5, **LEARN}
    job = Job(shards, tmp_path / "run", fault="1:3:stop", **settings).run()
    status = job.status()
    assert (status["state"], status["code"]) == ("failed", 6), job.said()[-3000:]
    assert "Rank 1 is stopped" in status["reason"]
    stacks = (job.run_dir / "hang_rank0.txt").read_text()
    assert "all_reduce" in stacks
    lost = steps_lost(job.run_dir)
    assert Job(shards, job.run_dir, **settings).run().code == 0
    same_as(whole, job.run_dir)
    observed(
        f"status 6 naming it, stacks written, gone {job.seconds:.0f} s after the start; resumed, equal",
        deaths=[lost],
    )


@pytest.mark.slow
@pytest.mark.fault(
    10,
    "a rank raises (a bug)",
    injected="RuntimeError in rank 1, step 3",
    expected="its traceback once, error_rank1.txt; the others say one line",
)
def test_a_bug_in_one_rank_is_said_once(shards, tmp_path, observed):
    job = Job(shards, tmp_path / "run", fault="1:3:raise").run()
    said = job.said()
    assert said.count("Traceback (most recent call last)") == 1
    assert "an error made by T2I_FAULT" in said
    assert "Rank 1 failed: an error made by T2I_FAULT" in said
    assert "RuntimeError: an error made by" in (job.run_dir / "error_rank1.txt").read_text()
    assert job.status()["code"] == 6
    observed(f"one traceback, status 6 pointing to error_rank1.txt, command's status {job.code}")


@pytest.mark.slow
@pytest.mark.fault(
    11,
    "the port is taken",
    injected="a socket bound to it",
    expected="exit 2 naming the port and --master_port",
)
def test_a_taken_port_is_said(shards, tmp_path, observed):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with Job(shards, tmp_path / "run", port=port) as job:
            job.wait()
    assert job.code == 2, job.said()[-3000:]
    assert f"port {port}, at which ranks find each other, is taken" in job.said()
    assert "--master_port" in job.said()
    observed(f"exit 2 after {job.seconds:.0f} s")


@pytest.mark.fault(
    14,
    "no compiler where operators must be built",
    injected="PATH without g++, an empty TORCH_EXTENSIONS_DIR",
    expected="exit 2 with what to install, before data and model",
)
def test_a_missing_compiler_is_said(shards, tmp_path, observed):
    environment = {"PATH": "/nowhere", "TORCH_EXTENSIONS_DIR": str(tmp_path / "none")}
    job = Job(shards, tmp_path / "run", ranks=0, warm=True, environment=environment).run()
    assert job.code == 2, job.said()[-3000:]
    assert "g++ not found, so DeepSpeed's operators" in job.said()
    assert "Traceback" not in job.said()
    observed(f"exit 2 after {job.seconds:.0f} s")


@pytest.mark.fault(
    15,
    "two runs in one folder",
    injected="a second process opens the folder of a running one",
    expected="exit 2 naming process, machine and time",
)
def test_a_folder_in_use_is_refused(shards, tmp_path, observed):
    with open_run(RunConfig(run_dir=tmp_path / "run"), ds_config={}):
        job = Job(shards, tmp_path / "run", ranks=0, warm=True).run()
    assert job.code == 2, job.said()[-3000:]
    assert f"is in use by process {os.getpid()} on" in job.said()
    observed(f"exit 2 naming the process, after {job.seconds:.0f} s")


@pytest.mark.fault(
    17,
    "gone on with under a changed configuration",
    injected="another lr; another number of loader processes",
    expected="science stops with exit 2 and the difference; the machine's keys may change",
)
def test_changed_science_is_refused_and_a_changed_machine_is_not(finished, tmp_path, observed):
    run_dir = copy_run(finished.run_dir, tmp_path / "run")
    config = replace(finished, run_dir=run_dir)
    with pytest.raises(UserError, match=r"train\.lr is 0\.0015 there, 0\.1 here") as refusal:
        open_run(replace(config, train=replace(config.train, lr=0.1)), ds_config={})
    assert refusal.value.exit_code == 2
    open_run(replace(config, data=replace(config.data, num_workers=3)), ds_config={}).close()
    observed(str(refusal.value).partition("(")[2].partition(")")[0])


@pytest.mark.fault(
    18, "the clock jumps", injected="modification times of checkpoints reversed", expected="order is by step"
)
def test_times_of_files_do_not_matter(finished, tmp_path, observed):
    run_dir = copy_run(finished.run_dir, tmp_path / "run")
    for age, folder in enumerate(checkpoints.committed(run_dir).values()):
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert checkpoints.choose_newest(run_dir).name == "step_000006"
    observed("the newest step is chosen")


SEEDS = range(20)


@pytest.mark.slow
@pytest.mark.fault(
    2,
    "the whole process group is killed",
    injected="SIGKILL at 20 random moments (seeds 0 to 19) of one run of 300 steps, saved every 5",
    expected="the same command goes on each time; at most 5 steps lost; the end equals the undisturbed run bit for bit",
)
def test_twenty_deaths_at_random_moments_change_nothing(shards, tmp_path, observed):
    settings = {"train__max_steps": 300, "train__save_every": 5}
    whole = Job(shards, tmp_path / "whole", **settings).run()
    run_dir, committed, lost = tmp_path / "run", [0], []
    for seed in SEEDS:
        before = time_of_rows(run_dir)
        with Job(shards, run_dir, **settings) as job:
            wait_for_death(job, after=committed[-1], before=before, draw=random.Random(seed))
            os.killpg(job.process.pid, signal.SIGKILL)
            job.wait_for_all()
        lost.append(0 if time_of_rows(run_dir) == before else steps_lost(run_dir))
        committed.append(checkpoints.last_step(run_dir))
    assert committed == sorted(committed)
    assert max(lost) <= settings["train__save_every"]
    last = Job(shards, run_dir, **settings).run()
    assert last.code == 0, last.said()[-3000:]
    same_as(whole.run_dir, run_dir)
    observed(
        f"20 deaths, each at most {max(lost)} steps after the checkpoint that stayed, then done; weights, Adam, random"
        " states and metrics of step 300 equal",
        deaths=lost,
    )


def time_of_rows(run_dir):
    """Tell when metrics.jsonl was last changed; 0 where there is none yet."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for_death(job, *, after, before, draw):
    """Wait for a random moment: one time in five while the job starts, else some steps after the last checkpoint.

    Rows that the job before left are still there until this one trains; they were written `before`.
    """
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 10))
    else:
        wanted = after + draw.randint(1, 12)
        job.wait_until(lambda: time_of_rows(job.run_dir) != before and has_done(job.run_dir, wanted))
        time.sleep(draw.uniform(0, 0.3))
    assert job.process.poll() is None, "it was done before its death"


def has_done(run_dir, step):
    return any(row["step"] >= step for row in steps(run_dir))


@pytest.mark.slow
@pytest.mark.fault(
    3,
    "killed during a save",
    injected="SIGKILL before each of: a shard of either rank, weights, manifest, rename, latest",
    expected="the checkpoint before is untouched, the half one ignored; equal bit for bit in the end",
)
def test_a_death_in_a_save_leaves_the_checkpoint_before(shards, whole, tmp_path, observed):
    run_dir, seen, lost = tmp_path / "run", [], []
    for step, rank, place in (
        (2, 0, "shards"),
        (2, 1, "shards"),
        (2, 0, "weights"),
        (4, 0, "manifest"),
        (6, 0, "rename"),
        (8, 0, "latest"),
    ):
        job = Job(shards, run_dir, fault=f"{rank}:{step}:kill:{place}", **LEARN).run()
        assert job.status()["code"] == 6, job.said()[-3000:]
        lost.append(steps_lost(run_dir))
        found = checkpoints.choose_newest(run_dir)
        seen.append(f"{place}: {found.name if found else 'none'}")
        assert (found and found.name) == (
            None if step == 2 else f"step_{step if place == 'latest' else step - 2:06d}"
        )
    assert Job(shards, run_dir, **LEARN).run().code == 0
    same_as(whole, run_dir)
    assert not list((run_dir / "checkpoints").glob("*.bad*"))
    observed("after a death at " + ", ".join(seen) + "; equal in the end", deaths=lost)


@pytest.mark.slow
@pytest.mark.fault(
    1,
    "the first rank is killed",
    injected="SIGKILL of rank 0 in step 6",
    expected="status 6 naming it, written by a rank that lives",
)
def test_the_first_rank_dies(shards, tmp_path, observed):
    job = Job(shards, tmp_path / "run", fault="0:6:kill").run()
    assert (job.status()["state"], job.status()["code"]) == ("failed", 6), job.said()[-3000:]
    assert "Lost rank 0 (process" in job.status()["reason"]
    observed(
        f"status 6 written by rank 1, command's status {job.code}",
        deaths=[steps_lost(job.run_dir)],
    )


@pytest.mark.slow
@pytest.mark.fault(
    4,
    "files STOP and SAVE in the run folder",
    injected="`touch RUN/SAVE`, then `touch RUN/STOP`",
    expected="a checkpoint at that step; then saved, status 75, both files gone",
)
def test_files_ask_for_a_save_and_a_stop(shards, tmp_path, observed):
    with Job(shards, tmp_path / "run", train__max_steps=100_000, train__save_every=100_000) as job:
        job.wait_for_step(3)
        (job.run_dir / "SAVE").touch()
        job.wait_until(lambda: checkpoints.last_step(job.run_dir) > 0)
        saved = checkpoints.last_step(job.run_dir)
        (job.run_dir / "STOP").touch()
        code = job.wait(60)
    assert_stopped(job)
    assert code == 75
    assert not {"SAVE", "STOP"} & {path.name for path in job.run_dir.iterdir()}
    observed(
        f"saved at step {saved}, stopped at {job.status()['step']}, exit {code}",
        stops=[steps_lost(job.run_dir)],
    )
