"""The inputs of a run, read before its first step: shards, the model to start from, and both tokenizers."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from t2i.config import ASSETS, EMBEDDED_SHARDS, EMBEDDED_VIEWS, DataConfig, PrepareConfig, RunConfig
from t2i.data.batching import global_batch, num_text_sequences
from t2i.data.loader import check_amount, check_nodes, parts_of_a_step, text_stream
from t2i.data.prepare.images import prepare
from t2i.data.prepare.part_folder import ClaimedError, is_claimed
from t2i.data.shards.captions import truncation
from t2i.data.shards.integrity import check_listing
from t2i.data.shards.manifest import (
    IMAGE_TOKENIZER,
    TEXT_TOKENIZER,
    Manifest,
    check_text_use,
    read_manifest,
)
from t2i.data.shards.reader import check_image_tokenizer, fetch_shards
from t2i.data.sources import open_source
from t2i.distributed.collectives import is_first_on_node, on_first_rank
from t2i.env import torch_compile_problem
from t2i.errors import UserError
from t2i.files import hub_name, not_here
from t2i.measure.forgetting import check_text
from t2i.runs.loading import find
from t2i.runs.run_folder import has_begun
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.sequence import caption_room
from t2i.tokens.text import TextTokenizer
from t2i.train.new_embeddings import check_new_embeddings, kind_of
from t2i.train.prompts import read_prompts
from t2i.train.trackers import check_trackers

logger = logging.getLogger(__name__)

WAIT_SECONDS = 2.0
"""Between looks at whether another process still prepares."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, checked before any weight is made."""

    shards: Path
    manifest: Manifest
    """The manifest of the shards."""
    start: str
    """`random`, or the folder of the weights to start from."""
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer | None
    """None for text shards and precomputed tokens, which have no image tokenizer."""
    replay: Path | None = None
    """Text shards that are replayed; None without."""


def check_before_start(config: RunConfig, *, world_size: int) -> None:
    """Refuse inputs that are not there or do not fit, from their small files alone.

    Before DeepSpeed is started, which takes seconds, and minutes where it first compiles its operators.

    Raises:
        DataError: there are no such shards, or no such text to measure.
        UserError: they are too few for a step, model.init or a file of embeddings does not exist, a tracker is not
            installed, prompts to sample would not be used, or there is no compiler to compile with.
    """
    data, model = config.data, config.model
    if config.train.compile and (problem := torch_compile_problem()):
        raise UserError(problem)
    size = global_batch(config.train.global_batch_tokens, seq_len=data.seq_len, world_size=world_size)
    if not has_begun(config.run_dir):
        check_nodes(data, world_size=world_size)
    for one, a_step in parts_of_a_step(data, global_batch=size, world_size=world_size):
        # Remote shards are downloaded first, and the embedded ones made.
        if not one.remote and (one.shards != EMBEDDED_SHARDS or one.shards.exists()):
            manifest = read_manifest(one.shards)
            check_amount(one, manifest=manifest, a_step=a_step, world_size=world_size)
            if one.shards == data.shards:
                check_new_embeddings(kind_of(model, manifest=manifest), data=one, manifest=manifest)
    if model.init != "random" and not hub_name(model.init) and (missing := not_here(model.init)):
        raise UserError(f"model.init: {missing}.")
    check_trackers(config.train.report_to)
    if config.train.eval_text:
        check_text(config.train.eval_text, name="train.eval_text")
    if prompts := config.train.sample_prompts:
        if not config.train.sample_every or data.mode != "text-to-image":
            needed = "train.sample_every > 0 and data.mode text-to-image"
            raise UserError(f"train.sample_prompts is {prompts}; expected {needed} with it.")
        read_prompts(prompts)
    rows = Path(model.new_embeddings)
    if rows.suffix == ".safetensors" and not rows.is_file():
        raise UserError(f"model.new_embeddings is {rows}; expected a file that exists.")


def read_inputs(data: DataConfig, *, init: str, global_batch: int) -> Inputs:
    """Read and check the inputs of a run, on every rank together.

    Args:
        init: model.init, `random` or a CKPT.
        global_batch: sequences per step over all ranks.

    Raises:
        DataError: there are no such shards, or they have changed since they were made.
        UserError: settings, shards and model do not fit together.
    """
    manifest = manifest_of(data)
    # This reads no shard: hashing all would take minutes, so each is hashed before its first sample is read.
    if not data.remote:
        on_first_rank(lambda: check_listing(data.shards, manifest))
    start = found_start(init)
    # A pre-trained model reads its own ids; a randomly initialised one takes those of the shards.
    text_tokenizer = TextTokenizer.load(data.shards / TEXT_TOKENIZER if start == "random" else start)
    if said := text_tokenizer.loss_of_text():
        logger.warning(said)
    _check_fit(data, manifest=manifest, tokenizer=text_tokenizer)
    image_tokenizer = None
    if manifest.has_image_tokenizer:
        image_tokenizer = tokenizer = ImageTokenizer.load(data.shards / IMAGE_TOKENIZER)
        # It encodes a few images again, which takes seconds; the other ranks have the same files.
        on_first_rank(lambda: check_image_tokenizer(data.shards, tokenizer))
    replays = num_text_sequences(data, global_batch=global_batch, world_size=dist.get_world_size()) > 0
    if replays:
        mixed = text_stream(data)  # the replayed text
        check_text_use(mixed, manifest=manifest_of(mixed), tokenizer=text_tokenizer)
    replay = data.replay_shards if replays else None
    return Inputs(data.shards, manifest, start, text_tokenizer, image_tokenizer, replay)


def _check_fit(data: DataConfig, *, manifest: Manifest, tokenizer: TextTokenizer) -> None:
    """Check that sequences can be made of the shards; warn if captions are tokenized again."""
    if manifest.is_text:
        check_text_use(data, manifest=manifest, tokenizer=tokenizer)
        return
    caption_room(mode=data.mode, seq_len=data.seq_len, num_codes=manifest.codes_per_image)
    warn_of_other_tokenizer(tokenizer, manifest)
    if said := truncation(data, manifest, tokenizer):
        logger.warning(said)


def manifest_of(data: DataConfig) -> Manifest:
    """Make the embedded shards or download remote ones, where that is needed, and read the manifest.

    Raises:
        DataError: there are no such shards.
    """
    if data.shards == EMBEDDED_SHARDS and not data.remote:
        on_first_rank(lambda: prepare_embedded(EMBEDDED_SHARDS))
    if data.remote and is_first_on_node():
        fetch_shards(data.shards, remote=data.remote)
    dist.barrier()  # the other ranks of a machine read what its first one downloads
    return read_manifest(data.shards)


def found_start(init: str) -> str:
    """Resolve model.init to a folder, the same on every rank."""
    # Asked of one rank: the run that it names may be saving a newer checkpoint at this moment.
    if init == "random":
        return init
    found: str = on_first_rank(lambda: str(find(init)[0]))
    if found != init:
        logger.info("model.init %s: %s", init, found)  # the newest one of a run that may still be training
    return found


def warn_of_other_tokenizer(tokenizer: TextTokenizer, manifest: Manifest) -> None:
    """Warn that captions are tokenized again, because the model's text tokenizer is not that of the shards."""
    # Ids of another tokenizer would mean other words; the captions themselves are in the shards too.
    made_by = manifest.text_tokenizer
    if made_by.fingerprint != tokenizer.fingerprint():
        logger.warning(
            "captions are tokenized again by %s; the shards have ids of %s", tokenizer.name, made_by.name
        )


def prepare_embedded(out: Path) -> None:
    """Make the shards of the embedded images at `out`, unless shards are there or another process makes them."""
    part = out.with_name(out.name + ".part")
    while not out.exists():
        logger.info("preparing the embedded images at %s: once, some minutes on a CPU", out)
        try:
            prepare(
                open_source("openmoji"),
                out=out,
                image_tokenizer=ImageTokenizer.load(ASSETS / "image_tokenizer"),
                text_tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer"),
                # Without shifted views, so few images are memorised: held-out loss rose from step 400 on.
                config=PrepareConfig(views=EMBEDDED_VIEWS),
            )
        except ClaimedError:
            # Two runs that are started together want the same shards; if the other one is killed, this one goes on.
            logger.info("another process prepares %s; waiting for it", out)
            while is_claimed(part, rank=0):
                time.sleep(WAIT_SECONDS)
