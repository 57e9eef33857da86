"""One training run, from its settings to its last checkpoint."""

import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2i.config import ASSETS, EMBEDDED_SHARDS, EMBEDDED_VIEWS, PrepareConfig, RunConfig
from t2i.env import extensions_folder
from t2i.errors import EXPECTED, UserError

logger = logging.getLogger(__name__)

PRODUCT_SIZE = 256
NUM_SAMPLED = 16
"""Held-out captions drawn every train.sample_every steps, always the same."""


def train(config: RunConfig, *, ds_config_path: Path) -> None:
    """Train in this process, one rank of a launched job or a job of its own.

    Raises:
        UserError, DataError, NumericalError, CheckpointError, Stopped: see t2i.errors.
    """
    prepare_environment()
    import torch.distributed as dist

    from t2i.train.engine import read_ds_config

    ds_config = read_ds_config(ds_config_path)
    if os.environ["RANK"] == "0" and not extensions_folder().exists():
        logger.warning(
            "DeepSpeed builds its C++ operators once, for one to eight minutes, in %s", extensions_folder()
        )
    start_processes()
    is_first = dist.get_rank() == 0
    lock = None
    if is_first:
        from t2i.runs.folder import open_run

        lock = open_run(config, ds_config=ds_config)
    try:
        _train(config, ds_config)
    except Exception as error:
        if is_first:
            _report_failure(config, error)
        raise
    finally:
        if lock is not None:
            lock.close()


def start_processes() -> None:
    """Let the ranks of a launched job find each other; a process without a launcher is a job of one rank."""
    prepare_environment()
    # Imported here: streaming reads LOCAL_WORLD_SIZE when it is imported.
    import deepspeed

    deepspeed.init_distributed(dist_backend=None, verbose=False)


def prepare_environment() -> None:
    """Fill in what a launcher sets, for streaming and for a process without a launcher.

    RANK alone tells a launched process; `deepspeed`, `torchrun`, Slurm's script and an operator's pod each leave
    something out of the rest.

    Raises:
        UserError: a launched process lacks an address or a size, or has a local rank beyond its node.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    _check_launch()
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it looked for one


def _check_launch() -> None:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set, so a launcher started this, but {', '.join(missing)} is not.")
    local_rank, on_this_node, in_all = (
        int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    )
    if local_rank >= on_this_node or in_all % on_this_node:
        raise UserError(
            f"LOCAL_RANK {local_rank}, LOCAL_WORLD_SIZE {on_this_node} and WORLD_SIZE {in_all} do not fit together;"
            " LOCAL_WORLD_SIZE is the number of processes on each node."
        )


def _train(config: RunConfig, ds_config: dict[str, Any]) -> None:
    import torch.distributed as dist

    from t2i.data.loader import StepLoader
    from t2i.data.shards import (
        IMAGE_TOKENIZER,
        TEXT_TOKENIZER,
        check_image_tokenizer,
        fetch_shards,
        has_image_tokenizer,
        read_manifest,
    )
    from t2i.data.text_shards import check_text_use, is_text
    from t2i.measure.heldout import heldout_rows, heldout_text_rows
    from t2i.runs.ckpt import Checkpoint
    from t2i.runs.folder import write_status
    from t2i.tokens.image import ImageTokenizer
    from t2i.tokens.text import TextTokenizer
    from t2i.train.build import build_model
    from t2i.train.engine import Learner, global_batch, make_engine
    from t2i.train.loop import Periodic, Trainer

    world_size, is_first = dist.get_world_size(), dist.get_rank() == 0
    if config.data.shards == EMBEDDED_SHARDS and not config.data.remote and is_first:
        prepare_embedded(EMBEDDED_SHARDS)
    if config.data.remote and os.environ["LOCAL_RANK"] == "0":
        fetch_shards(config.data.shards, remote=config.data.remote)
    dist.barrier()
    manifest = read_manifest(config.data.shards)
    config = with_found_start(config)
    text_tokenizer = TextTokenizer.load(
        _text_tokenizer_folder(config, own=config.data.shards / TEXT_TOKENIZER)
    )
    if is_text(manifest):
        check_text_use(config.data, manifest=manifest, tokenizer=text_tokenizer)
    elif is_first:
        warn_of_other_tokenizer(text_tokenizer, manifest)
    image_tokenizer = None
    if has_image_tokenizer(manifest):
        image_tokenizer = ImageTokenizer.load(config.data.shards / IMAGE_TOKENIZER)
        if is_first:
            check_image_tokenizer(config.data.shards, image_tokenizer)
    model, layout = build_model(config, manifest=manifest, text_tokenizer=text_tokenizer)
    num_sequences = global_batch(config, world_size=world_size)
    loader = StepLoader(
        config.data,
        layout=layout,
        global_batch=num_sequences,
        world_size=world_size,
        seed=config.train.seed,
        tokenizer=text_tokenizer,
    )
    warn_of_slow_bf16(model, ds_config, tokens=num_sequences // world_size * config.data.seq_len)
    learner = Learner(model, layout=layout, with_z_loss=config.train.z_loss > 0)
    engine = make_engine(
        learner, config=config.train, ds_config=ds_config, per_rank=num_sequences // world_size
    )

    def measure(step: int) -> list[dict[str, Any]]:
        amount = config.train.eval_pictures
        if is_text(manifest):
            rows = heldout_text_rows(model, config=config.data, layout=layout, num_sequences=amount)
        else:
            rows = heldout_rows(
                model, config=config.data, layout=layout, tokenizer=text_tokenizer, num_pictures=amount
            )
        return [{"step": step, **row} for row in rows]

    periodic = [Periodic(every=config.train.eval_every, work=measure)]
    if config.train.eval_text:
        work = _text_meter(config, model, layout, text_tokenizer)
        periodic.append(Periodic(every=config.train.eval_every, work=work, at_start=True))
    if image_tokenizer is not None:
        drawer = Checkpoint(config.run_dir, config.run_dir, model, text_tokenizer, image_tokenizer, layout)
        periodic.append(Periodic(every=config.train.sample_every, work=_sampler(config, drawer)))
    trainer = Trainer(
        config,
        engine=engine,
        loader=loader,
        text_tokenizer=text_tokenizer,
        image_tokenizer=image_tokenizer,
        periodic=periodic,
    )
    trainer.run()
    if is_first:
        write_status(config.run_dir, state="done", step=trainer.progress.step, code=0)


def _sampler(config: RunConfig, drawer: Any) -> Callable[[int], list[dict[str, Any]]]:
    """Make the periodic work that draws held-out captions, always the same, on the first rank."""
    import torch.distributed as dist

    from t2i.data.shards import read_split
    from t2i.generate.draw import draw_grid
    from t2i.runs.folder import SAMPLE_CAPTIONS, SAMPLES

    heldout = read_split(config.data.shards, "heldout", num_samples=NUM_SAMPLED, remote=config.data.remote)
    captions = [sample["caption"] for sample in heldout]

    def sample(step: int) -> list[dict[str, Any]]:
        if dist.get_rank() == 0 and captions:
            folder = config.run_dir / SAMPLES
            folder.mkdir(exist_ok=True)
            (folder / SAMPLE_CAPTIONS).write_text("\n".join(captions) + "\n")
            draw_grid(drawer, captions).save(folder / f"step_{step:06d}.png")
        return []

    return sample


def _text_meter(
    config: RunConfig, model: Any, layout: Any, tokenizer: Any
) -> Callable[[int], list[dict[str, Any]]]:
    """Make the periodic work that measures what is left of the language model."""
    from t2i.measure.forgetting import text_cost, text_sequences

    settings = {"seq_len": config.data.seq_len, "num_sequences": config.train.eval_pictures}
    ids = text_sequences(config.train.eval_text, tokenizer=tokenizer, **settings)

    def measure(step: int) -> list[dict[str, Any]]:
        cost = text_cost(model, ids, layout=layout)
        row = {"text_loss": cost.loss, "text_loss_text_rows": cost.loss_text_rows, "leaked": cost.leaked}
        return [{"step": step, "split": "text", **row}]

    return measure


def with_found_start(config: RunConfig) -> RunConfig:
    """Resolve model.init to a folder on the first rank, which alone may check and set aside checkpoints."""
    import torch.distributed as dist

    from t2i.runs.ckpt import find

    if config.model.init == "random":
        return config
    found: list[str] = [str(find(config.model.init)[0]) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(found)
    return replace(config, model=replace(config.model, init=found[0]))


def warn_of_other_tokenizer(tokenizer: Any, manifest: dict[str, Any]) -> None:
    """Say that captions are read anew where the model's text tokenizer is not that of the shards."""
    made_by = manifest["text_tokenizer"]
    if made_by["fingerprint"] != tokenizer.fingerprint():
        logger.warning(
            "captions are tokenized anew by %s; shards have ids of %s", tokenizer.name, made_by["name"]
        )


def warn_of_slow_bf16(model: Any, ds_config: dict[str, Any], *, tokens: int) -> None:
    """Warn once where bf16 is asked of a CPU that is slow at it, with the time a step will take."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() or not ds_config.get("bf16", {}).get("enabled") or dist.get_rank() != 0:
        return
    seconds = {dtype: product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    if seconds[torch.bfloat16] < 3 * seconds[torch.float32]:
        return
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    step_seconds = 3 * num_parameters * tokens / PRODUCT_SIZE**3 * seconds[torch.bfloat16]
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    logger.warning(
        "bf16 is %.0f times slower than fp32 on this CPU: expect about %.0f s a step. For speed use"
        " --ds_config ds_configs/zero2_fp32.json.",
        ratio,
        step_seconds,
    )


def product_seconds(dtype: Any, *, size: int = PRODUCT_SIZE) -> float:
    """Time one product of two matrices of size x size on this CPU, the best of three."""
    import torch

    matrix = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return min(times)


def prepare_embedded(out: Path) -> None:
    """Make the embedded pictures' shards at `out`, unless they are there."""
    from t2i.data.pairs import open_source
    from t2i.data.prepare import prepare
    from t2i.tokens.image import ImageTokenizer
    from t2i.tokens.text import TextTokenizer

    prepare(
        open_source("openmoji"),
        out=out,
        image_tokenizer=ImageTokenizer.load(ASSETS / "image_tokenizer"),
        text_tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer"),
        config=PrepareConfig(views=EMBEDDED_VIEWS),
    )


def _text_tokenizer_folder(config: RunConfig, *, own: Path) -> Path:
    """A language model brings its own tokenizer; a random one takes `own`, that of the shards."""
    if config.model.init == "random":
        return own
    folder = Path(config.model.init)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"model.init is {folder}, which has no tokenizer.json beside its weights.")
    return folder


def _report_failure(config: RunConfig, error: Exception) -> None:
    from t2i.errors import Stopped
    from t2i.runs.checkpoints import LATEST
    from t2i.runs.folder import write_status

    if not config.run_dir.is_dir() or (isinstance(error, UserError) and "in use" in str(error)):
        return
    (config.run_dir / "error.txt").write_text(traceback.format_exc())
    latest = config.run_dir / LATEST
    step = int(latest.read_text().strip()[-6:]) if latest.is_file() else 0
    code = error.exit_code if isinstance(error, EXPECTED) else 1
    state = "stopped" if isinstance(error, Stopped) else "failed"
    write_status(config.run_dir, state=state, step=step, code=code, reason=str(error))
    if not isinstance(error, EXPECTED):
        print(f"The traceback is also in {config.run_dir / 'error.txt'}.", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
