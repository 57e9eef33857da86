"""Shards to whole optimizer steps of sequences: deterministic, resumable in mid-epoch, for any number of ranks."""

import ctypes
import json
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from streaming import StreamingDataLoader, StreamingDataset
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.hashing import hash_uniform
from t2i.data.shards import read_manifest
from t2i.errors import UserError
from t2i.tokens.sequence import encode_sequence
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent dies."""


def is_dropped(*, seed: int, epoch: int, key: str, share: float) -> bool:
    """Decide whether a caption is replaced by the empty one: a hash, the same on every rank."""
    return hash_uniform("caption dropout", seed, epoch, key) < share


def tokenizer_to_apply(config: DataConfig, *, tokenizer: TextTokenizer) -> TextTokenizer | None:
    """Return the tokenizer if captions must be read with it anew; None where the shards' ids are its own."""
    made_by = read_manifest(config.shards)["text_tokenizer"]["fingerprint"]
    return None if tokenizer.fingerprint() == made_by else tokenizer


def caption_ids_of(sample: dict[str, Any], *, tokenizer: TextTokenizer | None) -> Tensor:
    """Read the caption ids (T,) of a sample, as stored (None) or by another tokenizer."""
    if tokenizer is None:
        return torch.from_numpy(sample["caption_ids"].astype("int64"))
    return tokenizer.encode(sample["caption"])


class SequenceDataset(StreamingDataset):
    """Sequences built at read time, so that one shard set serves every vocabulary and every mode."""

    def __init__(
        self,
        config: DataConfig,
        *,
        layout: VocabLayout,
        num_sequences: int,
        epoch_size: int,
        seed: int,
        tokenizer: TextTokenizer,
    ) -> None:
        super().__init__(
            local=str(config.shards / "train"),
            remote=f"{config.remote.rstrip('/')}/train" if config.remote else None,
            validate_hash="xxh64" if config.remote else None,
            cache_limit=config.cache_limit,
            epoch_size=epoch_size,
            batch_size=num_sequences,
            shuffle=True,
            shuffle_seed=seed,
            num_canonical_nodes=config.num_canonical_nodes,
        )
        self.config, self.layout, self.seed = config, layout, seed
        self.tokenizer = tokenizer_to_apply(config, tokenizer=tokenizer)

    def __getitem__(self, at: Any) -> dict[str, Any]:
        """Read one sample as input_ids (S,) and its key."""
        sample = super().__getitem__(at)
        epoch = self.next_epoch - 1
        if "codes" not in sample:  # text shards hold whole sequences
            return {
                "input_ids": torch.from_numpy(sample["caption_ids"].astype("int64")),
                "key": sample["key"],
            }
        caption_ids = caption_ids_of(sample, tokenizer=self.tokenizer)
        has_prompt = (
            self.config.mode == "text-to-image"
        )  # else the caption is no condition, but all or nothing
        if has_prompt and is_dropped(
            seed=self.seed, epoch=epoch, key=sample["key"], share=self.config.caption_dropout
        ):
            caption_ids = caption_ids[:0]
        input_ids = encode_sequence(
            caption_ids,
            torch.from_numpy(sample["codes"].astype("int64")),
            layout=self.layout,
            mode=self.config.mode,
            seq_len=self.config.seq_len,
        )
        return {"input_ids": input_ids, "key": sample["key"]}


class StepLoader:
    """An endless stream of this rank's share of optimizer steps, with a position that can be saved."""

    def __init__(
        self,
        config: DataConfig,
        *,
        layout: VocabLayout,
        global_batch: int,
        world_size: int,
        seed: int,
        tokenizer: TextTokenizer,
    ) -> None:
        num_samples = read_manifest(config.shards)["counts"]["train"]
        if num_samples < global_batch:
            raise UserError(
                f"{config.shards} has {num_samples} training pairs; one step takes {global_batch}"
                " (train.global_batch_tokens / data.seq_len)."
            )
        if global_batch % world_size:
            raise UserError(f"a step of {global_batch} sequences does not divide over {world_size} ranks.")
        self.global_batch = global_batch
        num_sequences = global_batch // world_size
        dataset = _open_dataset(
            config,
            layout=layout,
            num_sequences=num_sequences,
            # Whole steps only, or the order at an epoch's end would depend on the number of ranks. Which samples
            # sit out differs from epoch to epoch.
            epoch_size=num_samples // global_batch * global_batch,
            seed=seed,
            tokenizer=tokenizer,
        )
        self.loader = StreamingDataLoader(
            dataset,
            batch_size=num_sequences,
            num_workers=config.num_workers,
            drop_last=True,
            persistent_workers=config.num_workers > 0,
            worker_init_fn=live_with_rank,
            # Its own, or each start of the loader would draw from the process's random state: a resumed run once more.
            generator=torch.Generator().manual_seed(seed),
        )
        self.position: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield input_ids (B, S) and keys for ever, epoch after epoch."""
        while True:
            for batch in self.loader:
                self.position = self.loader.state_dict()
                yield batch

    def close(self) -> None:
        """End the loader's processes, which no signal ends."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()

    @property
    def epoch(self) -> int:
        """The epoch of the batch yielded last, from 0."""
        return 0 if self.position is None else int(self.position["epoch"])

    def state_dict(self) -> str:
        """Return the position after the batch yielded last, as JSON."""
        return json.dumps(self.position)

    def load_state_dict(self, state: str) -> None:
        """Go on from a saved position."""
        self.position = json.loads(state)
        if self.position is not None:
            self.loader.load_state_dict(self.position)


def live_with_rank(worker: int) -> None:
    """Leave stopping to the rank: a loader's process lives on while the rank saves, and dies with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _open_dataset(config: DataConfig, **settings: Any) -> SequenceDataset:
    """Open the training split; what Streaming says of an impossible cache_limit is the user's to know."""
    try:
        return SequenceDataset(config, **settings)
    except ValueError as error:
        raise UserError(f"data.shards {config.shards} cannot be read: {error}") from error


def stack_sequences(
    samples: list[dict[str, Any]],
    *,
    layout: VocabLayout,
    config: DataConfig,
    captions: list[Tensor] | None = None,
) -> Tensor:
    """Build the sequences (B, S) of read samples, under their own caption ids or the given ones."""
    own = [torch.from_numpy(sample["caption_ids"].astype("int64")) for sample in samples]
    return torch.stack(
        [
            encode_sequence(
                caption_ids,
                torch.from_numpy(sample["codes"].astype("int64")),
                layout=layout,
                mode=config.mode,
                seq_len=config.seq_len,
            )
            for sample, caption_ids in zip(samples, own if captions is None else captions, strict=True)
        ]
    )
