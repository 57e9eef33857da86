"""One training run, from its settings to its last checkpoint."""

import logging
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from t2i.config import (
    RunConfig,
    TrainConfig,
)
from t2i.distributed import faults
from t2i.distributed.collectives import is_first_on_node, on_first_rank
from t2i.distributed.launch import make_repeatable, prepare_environment, start_processes, warn_of_building
from t2i.distributed.signals import StopFlag, stop_flag
from t2i.env import check_machine
from t2i.errors import EXPECTED, NumericalError, Stopped, UserError, exit_code
from t2i.runs.checkpoint_store import last_step
from t2i.runs.run_folder import make_folder, open_run, write_status
from t2i.train.ds_config import read_ds_config
from t2i.train.inputs import manifest_of, text_tokenizer_folder, warn_of_other_tokenizer, with_found_start

logger = logging.getLogger(__name__)

AT_LEAST_ONE = ("max_steps", "global_batch_tokens", "log_every", "keep_last", "eval_pictures")
BELOW_ONE = ("beta1", "beta2")
AT_LEAST_ZERO = (
    "save_every",
    "keep_every",
    "hang_timeout_seconds",
    "eval_every",
    "sample_every",
    "warmup_steps",
    "weight_decay",
    "z_loss",
    "lr",
    "new_rows_lr",
    "min_lr_ratio",
    "grad_clip",
    "l2_to_init",
    "spike_score",
    "beta1",
    "beta2",
)


def train(config: RunConfig, *, ds_config_path: Path, stop_at: int | None = None) -> None:
    """Train in this process, one rank of a launched job or a job of its own.

    Args:
        stop_at: stop, saved, after this step, as if asked to; None for max_steps.

    Raises:
        UserError, DataError, NumericalError, CheckpointError, LostRankError, Stopped: see t2i.errors.
    """
    check_numbers(config.train)
    ds_config = read_ds_config(ds_config_path)
    make_folder(config.run_dir)
    with stop_flag() as flag:
        prepare_environment()
        # Imported here: streaming reads LOCAL_WORLD_SIZE when it is imported.
        import torch.distributed as dist

        from t2i.data.batching import global_batch
        from t2i.distributed.health import Peers
        from t2i.distributed.shared_memory import sweep

        if is_first_on_node() and not dist.is_initialized():
            sweep()
            check_machine(ds_config, run_dir=config.run_dir)
        warn_of_building(ds_config)
        make_repeatable(config.train.deterministic, seed=config.train.seed)
        start_processes()
        world_size = dist.get_world_size()
        num_sequences = global_batch(config, world_size=world_size)
        heading = f"{num_sequences:,} sequences of {config.data.seq_len:,} tokens a step; ranks: {world_size}"
        locks: list[IO[str]] = []
        on_first_rank(lambda: locks.append(open_run(config, ds_config=ds_config, heading=heading)))
        peers = Peers.meet(config.run_dir)
        try:
            faults.reach("setup", step=0)
            _train(config, ds_config, peers=peers, flag=flag, stop_at=stop_at)
        except (Exception, KeyboardInterrupt) as error:
            flag.is_leaving = True  # the launcher may ask a rank to end that is ending already
            _leave(config, peers, error)
        finally:
            for lock in locks:
                lock.close()


def check_numbers(config: TrainConfig) -> None:
    """Refuse numbers that no run can have.

    Raises:
        UserError: the first such key.
    """
    for least, keys in ((1, AT_LEAST_ONE), (0, AT_LEAST_ZERO)):
        for key in keys:
            value = getattr(config, key)
            if value is not None and not least <= value < math.inf:  # nan is neither
                raise UserError(f"train.{key} is {value}; wanted is a number of at least {least}.")
    for key in BELOW_ONE:
        if getattr(config, key) >= 1:
            raise UserError(f"train.{key} is {getattr(config, key)}; wanted is less than 1.")


def _train(
    config: RunConfig, ds_config: dict[str, Any], *, peers: Any, flag: StopFlag, stop_at: int | None
) -> None:
    import torch.distributed as dist

    from t2i.cost.devices import warn_of_slow_bf16
    from t2i.data.batching import global_batch
    from t2i.data.loader import StepLoader, num_text_sequences, text_stream
    from t2i.data.shards.integrity import check_listing
    from t2i.data.shards.manifest import (
        IMAGE_TOKENIZER,
        TEXT_TOKENIZER,
        check_text_use,
    )
    from t2i.data.shards.reader import check_image_tokenizer
    from t2i.distributed.health import Watchdog
    from t2i.tokens.image import ImageTokenizer
    from t2i.tokens.sequence import caption_room
    from t2i.tokens.text import TextTokenizer
    from t2i.train.build import build_model
    from t2i.train.checkpoint import Saver
    from t2i.train.engine import Learner, make_engine
    from t2i.train.loop import Trainer
    from t2i.train.metrics import MetricsWriter
    from t2i.train.periodic import periodic_work

    data, world_size = config.data, dist.get_world_size()
    manifest = manifest_of(data)
    if not data.remote:
        on_first_rank(lambda: check_listing(data.shards, manifest))
    config = with_found_start(config)
    text_tokenizer = TextTokenizer.load(text_tokenizer_folder(config, own=data.shards / TEXT_TOKENIZER))
    image_tokenizer = None
    if manifest.is_text:
        check_text_use(data, manifest=manifest, tokenizer=text_tokenizer)
    else:
        caption_room(mode=data.mode, seq_len=data.seq_len, num_codes=manifest.codes_per_image)
        warn_of_other_tokenizer(text_tokenizer, manifest)
    if manifest.has_image_tokenizer:
        image_tokenizer = tokenizer = ImageTokenizer.load(data.shards / IMAGE_TOKENIZER)
        on_first_rank(lambda: check_image_tokenizer(data.shards, tokenizer))
    num_sequences = global_batch(config, world_size=world_size)
    if num_text_sequences(data, global_batch=num_sequences, world_size=world_size):
        mixed = text_stream(data)
        check_text_use(mixed, manifest=manifest_of(mixed), tokenizer=text_tokenizer)
    model, layout = build_model(config, manifest=manifest, text_tokenizer=text_tokenizer)
    loader = StepLoader(
        data,
        layout=layout,
        global_batch=num_sequences,
        world_size=world_size,
        seed=config.train.seed,
        tokenizer=text_tokenizer,
    )
    if dist.get_rank() == 0 and not data.remote:
        loader.look_ahead()
    per_rank = num_sequences // world_size
    warn_of_slow_bf16(model, ds_config, tokens=per_rank * data.seq_len)
    engine = make_engine(
        Learner(model, layout=layout, z_loss=config.train.z_loss),
        config=config.train,
        ds_config=ds_config,
        per_rank=per_rank,
    )
    writer = MetricsWriter(config.run_dir) if dist.get_rank() == 0 else None
    saver = Saver(
        config, engine=engine, loader=loader, text_tokenizer=text_tokenizer, image_tokenizer=image_tokenizer
    )
    seconds = config.train.hang_timeout_seconds
    trainer = Trainer(
        config,
        engine=engine,
        loader=loader,
        saver=saver,
        writer=writer,
        periodic=periodic_work(
            config,
            model=model,
            layout=layout,
            text_tokenizer=text_tokenizer,
            image_tokenizer=image_tokenizer,
            reads_text=manifest.is_text,
            writer=writer,
        ),
        flag=flag,
        watchdog=Watchdog(peers, seconds=seconds, on_hang=lambda error: _report(config, peers, error)),
        stop_at=stop_at,
    )
    trainer.run()
    if writer:
        write_status(config.run_dir, state="done", step=trainer.progress.step, code=0)


def _leave(config: RunConfig, peers: Any, error: BaseException) -> NoReturn:
    """End this rank after an error, so that the job says it once: raise it here, or go without a word.

    An error that every rank has is the first rank's to say. One that a rank has alone is its own; the others only meet
    a lost connection, and the lowest of them says who is gone.
    """
    from t2i.distributed.health import is_lost_connection

    code, is_first = exit_code(error), peers.rank == 0
    is_shared = isinstance(error, NumericalError | Stopped | KeyboardInterrupt)
    failed = peers.failed() if isinstance(error, Stopped) else None  # whose launcher then asked all to end
    if failed or is_lost_connection(error):
        lost = failed or peers.lost()
        if not peers.speaks():
            sys.exit(lost.exit_code)
        peers.note_failure(lost)
        _report(config, peers, lost)
        raise lost from error
    if is_first or not is_shared:
        peers.note_failure(error)
    if is_first:
        _report(config, peers, error)
        if not isinstance(error, (*EXPECTED, KeyboardInterrupt)):
            print(f"The traceback is also in {config.run_dir / 'error.txt'}.", file=sys.stderr)
    elif is_shared or (isinstance(error, EXPECTED) and peers.first_says_it_too(error)):
        sys.exit(code)
    raise error


def _report(config: RunConfig, peers: Any, error: BaseException) -> None:
    """Write status.json, on the rank that speaks for the job; a disk that refuses must not hide the error."""
    if not (peers.rank == 0 or peers.speaks()):
        return
    state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
    reason = str(error) or type(error).__name__
    with suppress(OSError):
        step = last_step(config.run_dir)
        write_status(config.run_dir, state=state, step=step, code=exit_code(error), reason=reason)
