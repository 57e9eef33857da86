"""One training run, from its settings to its last checkpoint."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from t2i.config import DsConfig, RunConfig
from t2i.cost.devices import warn_of_slow_bf16
from t2i.data.batching import global_batch
from t2i.data.loader import StepLoader, num_ordered
from t2i.distributed import build_locks, faults
from t2i.distributed.collectives import is_first_on_node, on_first_rank
from t2i.distributed.ending import leave, said_once_per_machine
from t2i.distributed.health import Peers, Watchdog
from t2i.distributed.heartbeat import place_in_job
from t2i.distributed.launch import make_repeatable, prepare_environment, start_processes, warn_of_building
from t2i.distributed.run_id import OwnFolder, read_run_id
from t2i.distributed.shared_memory import sweep
from t2i.distributed.signals import Requests, StopFlag, stop_flag
from t2i.env import check_machine, operators_needed
from t2i.errors import DataError, Stopped, UserError, exit_code
from t2i.model.routing import check_precision
from t2i.runs.checkpoint_manifest import step_folder
from t2i.runs.checkpoint_store import last_step
from t2i.runs.run_folder import (
    STATUS,
    State,
    has_begun,
    make_folder,
    open_run,
    read_status,
    record_run,
    write_status,
)
from t2i.train.build import build_model
from t2i.train.checkpoint import Saver
from t2i.train.compiled import compile_layers
from t2i.train.deepspeed_internals import free_engine
from t2i.train.ds_config import read_ds_config
from t2i.train.engine import Learner, make_engine, whole_ds_config
from t2i.train.inputs import check_before_start, read_inputs
from t2i.train.loop import BETWEEN_STEPS, EndConditions, Trainer
from t2i.train.metrics import MetricsWriter, Speed
from t2i.train.periodic import periodic_work
from t2i.train.start import kept_start
from t2i.train.step import Stepper

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, ds_config_path: Path, stop_at: int | None = None) -> None:
    """Train in this process: as one rank of a launched job, or alone.

    The run is wired here, once. Each part takes its own settings, and nothing below sees all of them.

    Args:
        stop_at: save and stop after this step, as at a request; None for max_steps.

    Raises:
        UserError, DataError, NumericalError, CheckpointError, LostRankError, Stopped: see t2i.errors.
    """
    run_dir, data_config, model_config, train_config = config.run_dir, config.data, config.model, config.train
    with said_once_per_machine():
        ds_config = read_ds_config(ds_config_path)
        check_before_start(config, world_size=place_in_job()[1])
        make_folder(run_dir)  # a folder that cannot be made should fail at once
    with stop_flag() as flag:
        # Before any library is used: some read their seeds and switches only once.
        make_repeatable(train_config.deterministic, seed=train_config.seed)
        with said_once_per_machine():
            _start(ds_config, run_dir=run_dir, num_samples=num_ordered(data_config))
        world_size, is_first = dist.get_world_size(), dist.get_rank() == 0
        num_sequences = global_batch(
            train_config.global_batch_tokens, seq_len=data_config.seq_len, world_size=world_size
        )
        heading = (
            f"{num_sequences:,} sequences of {data_config.seq_len:,} tokens per step; ranks: {world_size}"
        )
        with (
            _job(run_dir, lambda: open_run(config, ds_config=ds_config, heading=heading), flag=flag) as peers,
            closing(
                Watchdog(
                    peers,
                    seconds=train_config.hang_timeout_seconds,
                    on_hang=lambda error: _report(peers, error),
                )
            ) as watchdog,
            ExitStack() as at_end,
        ):
            # From here on: what one rank prepares while the others wait may hang too.
            watchdog.arm("start", times=BETWEEN_STEPS)
            per_rank = num_sequences // world_size
            whole_ds_config(ds_config, config=train_config, per_rank=per_rank)  # before minutes of work
            inputs = read_inputs(data_config, init=model_config.init, global_batch=num_sequences)
            step = on_first_rank(lambda: last_step(run_dir))
            if train_config.l2_sp:
                start = on_first_rank(lambda: kept_start(inputs.start, run_dir=run_dir, is_resumed=step > 0))
                inputs = replace(inputs, start=start)
            model, layout = build_model(
                replace(model_config, init=inputs.start),
                data=data_config,
                train=train_config,
                manifest=inputs.manifest,
                text_tokenizer=inputs.text_tokenizer,
                resumed=step_folder(run_dir, step) if step else None,
            )
            loader = StepLoader(
                data_config,
                layout=layout,
                global_batch=num_sequences,
                world_size=world_size,
                seed=train_config.seed,
                tokenizer=inputs.text_tokenizer,
            )
            # One rank hashes the coming shards in a thread; remote ones are hashed as they are downloaded.
            if is_first and not data_config.remote:
                loader.look_ahead()
            warn_of_slow_bf16(model, ds_config, tokens=per_rank * data_config.seq_len)
            is_bf16 = ds_config.get("bf16", {}).get("enabled", False)
            check_precision(model, dtype=torch.bfloat16 if is_bf16 else torch.float32)
            if train_config.compile:
                compile_layers(model, seq_len=data_config.seq_len)
            learner = Learner(model, layout=layout, z_loss=train_config.z_loss)
            engine = make_engine(learner, config=train_config, ds_config=ds_config, per_rank=per_rank)
            at_end.callback(free_engine, engine)
            writer = MetricsWriter(run_dir, report_to=train_config.report_to) if is_first else None
            speed = Speed(model, data=data_config, device=engine.device, is_half=engine.bfloat16_enabled())
            requests = Requests(flag, peers.folder, reads_files=is_first, stop_at=stop_at)
            trainer = Trainer(
                train_config,
                stepper=Stepper(train_config, engine=engine, loader=loader, speed=speed, requests=requests),
                saver=Saver(train_config, run_dir=run_dir, engine=engine, loader=loader, inputs=inputs),
                periodic=periodic_work(
                    train_config, data=data_config, learner=learner, inputs=inputs, writer=writer
                ),
                writer=writer,
                control=EndConditions(requests, watchdog),
            )

            def record() -> None:
                peers.folder.check()  # another run's folder may be there since
                record_run(config, ds_config=ds_config, heading=heading)

            trainer.run(record=record)


def _start(ds_config: DsConfig, *, run_dir: Path, num_samples: int) -> None:
    """Look at the machine before it is too late for a sentence, and let the ranks of the job meet."""
    prepare_environment()
    if is_first_on_node() and not dist.is_initialized():  # a second run in one process has its port already
        sweep()  # before the check: what killed runs left may be what fills shared memory
        check_machine(ds_config, run_dir=run_dir, num_samples=num_samples)
        build_locks.remove_stale(operators_needed(ds_config))
    warn_of_building(ds_config)
    start_processes()


@contextmanager
def _job(run_dir: Path, open_folder: Callable[[], IO[str]], *, flag: StopFlag) -> Iterator[Peers]:
    """Lock the run folder while the block runs, and record how it ended; an error of all ranks is reported once."""
    # One rank opens, all learn of its error: a lock that is taken ends the job with one sentence.
    locks: list[IO[str]] = []

    def open_first() -> tuple[str, str]:
        """Return the run's id, and the command that the run's status named before this start."""
        before = _next_before(run_dir)
        locks.append(open_folder())
        return read_run_id(run_dir), before

    run_id, before = on_first_rank(open_first)
    peers = Peers.meet(OwnFolder(run_dir, run_id))
    try:
        faults.reach("setup", step=0)
        yield peers
        if peers.rank == 0:
            _say_done(run_dir)
    except (Exception, KeyboardInterrupt) as error:
        flag.is_leaving = True  # the launcher may send SIGTERM to a rank that is ending already
        leave(peers, error, report=lambda error: _report(peers, error, before=before))
    finally:
        for lock in locks:
            lock.close()


def _say_done(run_dir: Path) -> None:
    try:
        write_status(run_dir, state="done", step=last_step(run_dir), code=0)
    except OSError as error:  # all is saved, so it is no failure
        logger.warning(
            "%s cannot say that the run is done: %s. Run the same command when the disk has room.",
            run_dir / STATUS,
            error.strerror,
        )


def _next_before(run_dir: Path) -> str:
    """Read which command the status names; empty if there is none, or the run has not made a step."""
    with suppress(DataError):
        if has_begun(run_dir) and (status := read_status(run_dir)):
            return status.next
    return ""


def _report(peers: Peers, error: BaseException, *, before: str = "") -> None:
    """Write status.json; a disk that refuses must not hide the error.

    Args:
        before: the command that the status named before this start.
    """
    state: State = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
    reason = str(error) or type(error).__name__
    # A command that was refused would be refused again.
    next_command = before if isinstance(error, UserError) else None
    with suppress(OSError):
        if peers.folder.is_own():
            write_status(
                peers.run_dir,
                state=state,
                step=last_step(peers.run_dir),
                code=exit_code(error),
                reason=reason,
                next_command=next_command,
            )
