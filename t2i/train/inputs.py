"""What a run reads before its first step: shards, the model to start from, and the text tokenizer."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2i.config import (
    ASSETS,
    EMBEDDED_SHARDS,
    EMBEDDED_VIEWS,
    DataConfig,
    PrepareConfig,
    RunConfig,
)
from t2i.data.shards.manifest import Manifest, read_manifest
from t2i.distributed.collectives import is_first_on_node, on_first_rank
from t2i.errors import UserError

logger = logging.getLogger(__name__)


def manifest_of(data: DataConfig) -> Manifest:
    """Make the embedded shards or bring remote ones, where that is asked and needed, and read the manifest.

    Raises:
        DataError: there are no such shards.
    """
    import torch.distributed as dist

    from t2i.data.shards.reader import fetch_shards

    if data.shards == EMBEDDED_SHARDS and not data.remote:
        on_first_rank(lambda: prepare_embedded(EMBEDDED_SHARDS))
    if data.remote and is_first_on_node():
        fetch_shards(data.shards, remote=data.remote)
    dist.barrier()
    return read_manifest(data.shards)


def with_found_start(config: RunConfig) -> RunConfig:
    """Resolve model.init to a folder, the same on every rank, though its run may be writing another one."""
    from t2i.runs.loading import find

    if config.model.init == "random":
        return config
    found = on_first_rank(lambda: str(find(config.model.init)[0]))
    return replace(config, model=replace(config.model, init=found))


def warn_of_other_tokenizer(tokenizer: Any, manifest: Manifest) -> None:
    """Say that captions are read anew where the model's text tokenizer is not that of the shards."""
    made_by = manifest.text_tokenizer
    if made_by.fingerprint != tokenizer.fingerprint():
        logger.warning(
            "captions are tokenized anew by %s; shards have ids of %s", tokenizer.name, made_by.name
        )


def prepare_embedded(out: Path) -> None:
    """Make the embedded pictures' shards at `out`, unless shards are there."""
    if out.exists():
        return
    from t2i.data.prepare.images import prepare
    from t2i.data.sources import open_source
    from t2i.tokens.image import ImageTokenizer
    from t2i.tokens.text import TextTokenizer

    prepare(
        open_source("openmoji"),
        out=out,
        image_tokenizer=ImageTokenizer.load(ASSETS / "image_tokenizer"),
        text_tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer"),
        config=PrepareConfig(views=EMBEDDED_VIEWS),
    )


def text_tokenizer_folder(config: RunConfig, *, own: Path) -> Path:
    """A language model brings its own tokenizer; a random one takes `own`, that of the shards."""
    if config.model.init == "random":
        return own
    folder = Path(config.model.init)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"model.init is {folder}, which has no tokenizer.json beside its weights.")
    return folder
