"""Real launches of tiny runs, watched from outside: what tests of faults break and then start again."""

import json
import os
import re
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import processes
import psutil
import torch
from safetensors.torch import load_file

from t2i.runs.checkpoint_store import committed, last_step
from t2i.runs.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]
DEADLINE_SECONDS = 540
"""Operators may have to be built first, on a machine that is busy."""
SETTINGS = {
    "data.seq_len": 90,
    "model.hidden_size": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "train.max_steps": 8,
    "train.global_batch_tokens": 8 * 90,
    "train.warmup_steps": 2,
    "train.save_every": 2,
    "train.eval_every": 0,
    "train.eval_images": 4,
    "train.deterministic": True,
}
"""Of a run that takes a moment; two micro-batches of two on each of two ranks (see ds_config)."""
LEARN = {"model__learn": "norms"}
"""A part of the model is frozen in these runs."""


def flags(settings):
    words = []
    for key, value in settings.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def ds_config(folder):
    path = folder / "small.json"
    if not path.exists():
        plain = json.loads((ROOT / "ds_configs" / "zero2_fp32.json").read_text())
        # A deterministic run fills each new bucket, whatever the model's size; the rows' gradients are larger than it.
        buckets = {**plain["zero_optimization"], "reduce_bucket_size": 50_000}
        changes = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": buckets}
        path.write_text(json.dumps({**plain, **changes}))
    return path


def ranks_of(count, *, port):
    """List the variables that the deepspeed launcher sets, by rank."""
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run_ranks(words, *, count=2, timeout=DEADLINE_SECONDS):
    """Run words as so many ranks, as processes.start_warm does; return each one's exit status and all that it said."""
    with ExitStack() as files:
        said = [files.enter_context(TemporaryFile("w+")) for _ in range(count)]
        ranks = [
            processes.start_warm(words, env=processes.environment(**variables), stdout=file, stderr=file)
            for variables, file in zip(ranks_of(count, port=str(processes.free_port())), said, strict=True)
        ]
        try:
            codes = [rank.wait(timeout=timeout) for rank in ranks]
        finally:
            for rank in ranks:
                processes.end(rank)
        return [(code, file.seek(0) or file.read()) for code, file in zip(codes, said, strict=True)]


class Job:
    """`deepspeed launchers/train.py` in a session of its own; use it as a context."""

    def __init__(
        self,
        shards,
        run_dir,
        *,
        ranks=2,
        warm=False,
        fault="",
        environment=None,
        port=None,
        beside=None,
        command="train",
        **settings,
    ):
        """Take a run's settings (`data__seq_len` for data.seq_len).

        Args:
            ranks: 0 for one process without a launcher.
            warm: start the ranks as processes.start_warm does, each in a session of its own, instead of the launcher.
            beside: where the log goes; None for beside the run folder.
            command: of launchers/.
        """
        beside = beside or run_dir.parent
        self.run_dir, self.log = run_dir, beside / f"{run_dir.name}.log"
        self.environment = processes.environment(T2I_FAULT=fault, **(environment or {}))
        port = str(port or processes.free_port())
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        launcher = [deepspeed, "--num_gpus", str(ranks), "--master_port", port]
        values = {
            **SETTINGS,
            "data.shards": shards,
            **{key.replace("__", "."): v for key, v in settings.items()},
        }
        script = [
            f"launchers/{command}.py",
            "--ds_config",
            str(ds_config(beside)),
            "--run-dir",
            str(run_dir),
        ]
        words = [*script, *flags(values)]
        self.command = [*(launcher if ranks else [sys.executable]), *words]
        self.is_warm = warm
        self.ranks_words = [
            ([words[0], f"--local_rank={rank}", *words[1:]], self.environment | variables)
            for rank, variables in enumerate(ranks_of(ranks, port=port))
        ] or [(words, self.environment)]

    def __enter__(self):
        self.started = time.monotonic()
        self.file = self.log.open("w")
        written = {"stdout": self.file, "stderr": self.file}
        if self.is_warm:
            self.processes = [
                processes.start_warm(words, env=env, **written) for words, env in self.ranks_words
            ]
        else:
            self.processes = [processes.start(self.command, cwd=ROOT, env=self.environment, **written)]
        return self

    def __exit__(self, *_):
        for process in self.processes:
            processes.end(process)
        self.file.close()

    @property
    def process(self):
        """The command, or the first rank of those that are started warm."""
        return self.processes[0]

    def run(self):
        """Start, wait for the end, and return self."""
        with self:
            self.wait()
        return self

    def wait(self, timeout=DEADLINE_SECONDS):
        """Wait for the command's end and return its exit status, which is that of the first rank that failed."""
        codes = [process.wait(timeout=timeout) for process in self.processes]
        self.code = next(filter(None, codes), 0)
        self.seconds = time.monotonic() - self.started
        return self.code

    def wait_for_all(self, timeout=60):
        """Wait until no process of the session is left; return the seconds that it took."""
        started = time.monotonic()
        while self.session():
            self.process.poll()
            assert time.monotonic() - started < timeout, [process.cmdline() for process in self.session()]
            time.sleep(0.05)
        return time.monotonic() - started

    def session(self):
        """List the processes that are left of this job."""
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = os.getsid(process.pid) in [one.pid for one in self.processes]
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def ranks(self):
        """Find the processes of the ranks, in order."""
        found = {}
        for process in self.session():
            words = " ".join(process.cmdline())
            number = re.search(r"launchers/train.py --local_rank=(\d+)", words)
            if number and not any(
                parent.pid in [p.pid for p in found.values()] for parent in process.parents()
            ):
                found[int(number.group(1))] = process
        return [found[rank] for rank in sorted(found)]

    def wait_for_step(self, step):
        """Wait until metrics.jsonl has a row of this step."""
        self.wait_until(lambda: any(row["step"] >= step for row in steps(self.run_dir)))

    def wait_until(self, is_true, timeout=DEADLINE_SECONDS):
        """Wait for something while the job runs."""
        ended = time.monotonic() + timeout
        while not is_true():
            assert self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < ended, self.said()[-3000:]
            time.sleep(0.05)

    def said(self):
        """Read what the job has printed."""
        return self.log.read_text()

    def status(self):
        """Read status.json."""
        return json.loads((self.run_dir / "status.json").read_text())


def steps_lost(run_dir):
    """Count the steps that a run has done, by its metrics, and that no checkpoint holds."""
    done = steps(run_dir)
    return done[-1]["step"] - last_step(run_dir) if done else 0


def forget_after(run_dir, *, step):
    """Take a run's later checkpoints away, as if it had died before."""
    for found, folder in committed(run_dir).items():
        if found > step:
            folder.rename(run_dir / f"was_{folder.name}")


def steps(run_dir):
    """Read the rows of training steps."""
    return [row for row in read_metrics(run_dir) if "split" not in row]


SAME = (
    "step",
    "epoch",
    "samples",
    "tokens",
    "padded",
    "loss",
    "image_loss",
    "text_loss",
    "lr",
    "grad_norm",
    "skipped",
)
"""Of a row, all that does not depend on the clock."""


def record(run_dir):
    """Read of all rows what a run that was disturbed must have in common with one that was not."""
    return [{key: row[key] for key in SAME} for row in steps(run_dir)]


def state_of_last(run_dir):
    """Read all of the last checkpoint: weights, and DeepSpeed's state of every rank, by file."""
    folder = run_dir / (run_dir / "latest").read_text().strip()
    # These pickles were written by this very test.
    engine = {path.name: torch.load(path, weights_only=False) for path in sorted(folder.glob("engine/*.pt"))}
    return {"weights": load_file(folder / "model.safetensors"), **engine}


def first_difference(found, wanted, place=""):
    """Walk two states and name the first place where they are not equal bit for bit; empty if there is none."""
    if isinstance(wanted, torch.Tensor):
        return "" if torch.equal(found, wanted) else place
    if isinstance(wanted, np.ndarray):
        return "" if np.array_equal(found, wanted) else place
    if isinstance(wanted, dict):
        pairs = [(found.get(key), value, f"{place}/{key}") for key, value in wanted.items()]
        same_keys = set(found) == set(wanted)
    elif isinstance(wanted, list | tuple):
        pairs = [(a, b, f"{place}/{number}") for number, (a, b) in enumerate(zip(found, wanted, strict=True))]
        same_keys = True
    elif isinstance(wanted, bool | int | float | str | type(None)):
        return "" if found == wanted else place
    else:
        return first_difference(vars(found), vars(wanted), place) if hasattr(wanted, "__dict__") else ""
    return next(filter(None, (first_difference(*pair) for pair in pairs)), "" if same_keys else place)


def copy_run(run_dir, target):
    shutil.copytree(run_dir, target)
    return target
