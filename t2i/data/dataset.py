"""Shards as training sequences, built when a sample is read, so that one shard set serves every vocabulary and mode."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.shared import prefix
from streaming.base.world import World
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.shards.integrity import HASH, Sample, Verified, check_file, read_index, remake_advice
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import check_sample
from t2i.data.shards.remote import fetch
from t2i.distributed.collectives import on_first_rank
from t2i.distributed.shared_memory import new_number
from t2i.errors import DataError, UserError
from t2i.files import hash_uniform
from t2i.tokens.sequence import encode_sequence
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

Opened = TypeVar("Opened", bound=StreamingDataset)


def is_dropped(*, seed: int, epoch: int, key: str, share: float) -> bool:
    """Decide whether a sample's caption is dropped in an epoch."""
    # A hash, not a random generator: every rank, loader process and resumed run must drop the same captions.
    return hash_uniform("caption dropout", seed, epoch, key) < share


def tokenizer_to_apply(config: DataConfig, *, tokenizer: TextTokenizer) -> TextTokenizer | None:
    """Return the tokenizer if captions must be tokenized again; None if the shards' ids are already its own."""
    made_by = read_manifest(config.shards).text_tokenizer.fingerprint
    return None if tokenizer.fingerprint() == made_by else tokenizer


def caption_ids_of(sample: Sample, *, tokenizer: TextTokenizer | None) -> Tensor:
    """Return the caption ids (T,) of a sample.

    Args:
        tokenizer: tokenizes the caption again; None to take the stored ids.
    """
    if tokenizer is None:
        ids = torch.from_numpy(sample["caption_ids"].astype("int64"))
        # MDS has no empty arrays, so a shard holds one id for an empty caption.
        return ids[:0] if sample.get("caption") == "" else ids
    return tokenizer.encode(sample["caption"])


class Encoded(TypedDict):
    """One sample as the model reads it."""

    input_ids: Tensor
    """(S,)"""
    key: str


class SequenceDataset(StreamingDataset):
    """The training split of one shard folder, as sequences."""

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
            streams=[VerifiedStream(config.shards, remote=config.remote)],
            cache_limit=config.cache_limit,
            epoch_size=epoch_size,
            # Streaming deals samples out in whole batches of each rank. Its order is that of the canonical
            # nodes, so that it does not depend on the number of machines.
            batch_size=num_sequences,
            shuffle=True,
            shuffle_seed=seed,
            num_canonical_nodes=config.num_canonical_nodes,
        )
        self.config, self.layout, self.seed = config, layout, seed
        self.tokenizer = tokenizer_to_apply(config, tokenizer=tokenizer)
        self.manifest = read_manifest(config.shards)
        self.failure: BaseException | None = None

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Hash or download a shard.

        Raises:
            DataError: the shard is not what was prepared.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except DataError:
            # Other processes wait for whoever began to prepare a shard. Marked as not there, each of them
            # tries for itself and is refused too; otherwise they would wait for ever.
            self._shard_states[shard_id] = _ShardState.REMOTE
            raise

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        """Read the position to resume from, as Streaming does, and let go of the memory that holds it.

        Streaming would keep that open until the process ends, anew each time that it is asked: a resumed run, whose
        position is taken after every step, would run out of open files.
        """
        kept = streaming_dataset.SharedMemory
        streaming_dataset.SharedMemory = partial(kept, auto_cleanup=False)
        try:
            return super()._resume(world, epoch)
        finally:
            streaming_dataset.SharedMemory = kept

    def on_exception(self, future: "Future[Any]") -> None:
        """Keep the error that ended a thread; Streaming alone would log a traceback and end the epoch early."""
        if failure := future.exception():
            self.failure = failure
            self._event.set()
            # The iterator counts its threads out, and a thread that failed did not count itself.
            self._iterator.on_exit()

    def __iter__(self) -> Iterator[Encoded]:
        """Iterate over this process's samples of the next epoch.

        Raises:
            DataError: a shard is not what was prepared.
        """
        if (before := getattr(self, "_iterator", None)) is not None:
            before.exit()  # as Streaming does next, and keeps each epoch's iterator until the process ends
            before.sample_ids = np.empty(0, np.int64)
        try:
            yield from super().__iter__()
        finally:
            # An epoch cut short by a failed thread looks like one that ended; training must not go on.
            if self.failure:
                raise self.failure

    def __getitem__(self, at: int) -> Encoded:
        """Read one sample as input_ids (S,) and its key.

        Raises:
            DataError: the sample does not match the manifest.
        """
        # A subset is every n-th sample, read n times per epoch: order and epoch length stay those of the
        # whole set, and the subset is the same in every epoch, unlike that of Streaming's own subsampling.
        wanted = at - at % self.config.subsample_every
        if (shard := self.spanner[wanted][0]) != self.spanner[at][0]:
            self.prepare_shard(shard)  # Streaming has hashed that of `at` alone
        sample = super().__getitem__(wanted)
        check_sample(sample, manifest=self.manifest, where=self.config.shards / "train")
        epoch = self.next_epoch - 1
        if "codes" not in sample:  # text shards hold whole sequences
            return {
                "input_ids": torch.from_numpy(sample["caption_ids"].astype("int64")),
                "key": sample["key"],
            }
        caption_ids = caption_ids_of(sample, tokenizer=self.tokenizer)
        # In the other modes the caption is no condition: it is the whole sequence, or no part of it.
        has_prompt = self.config.mode == "text-to-image"
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


def open_dataset(
    config: DataConfig,
    *,
    layout: VocabLayout,
    num_sequences: int,
    epoch_size: int,
    seed: int,
    tokenizer: TextTokenizer,
) -> SequenceDataset:
    """Open the training split, with num_sequences per step on this rank.

    Raises:
        UserError: Streaming refuses the settings, such as a cache_limit that is too small.
    """
    try:
        return under_own_number(
            lambda: SequenceDataset(
                config,
                layout=layout,
                num_sequences=num_sequences,
                epoch_size=epoch_size,
                seed=seed,
                tokenizer=tokenizer,
            )
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"data.shards {config.shards} cannot be read: {error}") from error


def stack_sequences(
    samples: list[Sample],
    *,
    layout: VocabLayout,
    config: DataConfig,
    captions: list[Tensor] | None = None,
) -> Tensor:
    """Build sequences (B, S) from samples, with their stored caption ids or with `captions`."""
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


class VerifiedStream(Stream):
    """The training split of a shard folder, with every shard verified before a sample of it is read.

    Streaming prepares each shard once per machine before it is read: it downloads it. A local shard is hashed here.
    """

    def __init__(self, folder: Path, *, remote: str, split: str = "train") -> None:
        super().__init__(
            local=str(folder / split), remote=f"{remote.rstrip('/')}/{split}" if remote else None
        )
        self.folder, self.place, self.name = folder, remote, split
        self.advice = remake_advice(folder, read_manifest(folder))

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Read the split's index, which is in the folder by now.

        Raises:
            DataError: the index is broken, or has columns of a type that is never read.
        """
        return [shard.reader for shard in read_index(self.folder, self.name)]

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Mark the shards that need no preparation: none of a local folder, and the intact ones of a cache."""
        if not self.place:
            # Marked as absent, so that Streaming has each local shard prepared, which is where it is
            # hashed.
            cache_usage_per_shard[:] = 0
            return
        super().set_up_local(shards, cache_usage_per_shard)
        verified = Verified(self.folder)
        for at in np.flatnonzero(cache_usage_per_shard):
            # The cache is trusted no more than a download. verified.json spares hashing files that have not
            # changed.
            info: FileInfo = shards[at].file_pairs[0][0]
            name, wanted = f"{self.name}/{info.basename}", info.hashes[HASH]
            if not verified.has(name, wanted=wanted):
                fetch(self.place, self.folder, name, xxh64=wanted)
                verified.add(name, wanted=wanted)
        verified.save()

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        name, wanted = f"{self.name}/{raw_info.basename}", raw_info.hashes[HASH]
        if self.place:
            fetch(self.place, self.folder, name, xxh64=wanted)
        else:
            check_file(self.folder, name, wanted=wanted, advice=self.advice)
        return int(raw_info.bytes)


def under_own_number(open_dataset: Callable[[], Opened]) -> Opened:
    """Open a dataset whose shared memory has a number that no other has, the same on all ranks."""
    # Streaming counts up to the first number that is free and then takes it, so that of two runs that start at once
    # one fails. It would also hold the memory of all data sets that it meets on the way open.
    number = on_first_rank(new_number) if dist.is_initialized() else new_number()
    before = prefix._each_prefix_int
    prefix._each_prefix_int = lambda: iter([number])
    try:
        return open_dataset()
    finally:
        prefix._each_prefix_int = before
