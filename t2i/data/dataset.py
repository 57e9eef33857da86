"""Samples of shards as sequences, built when they are read, so that one shard set serves every vocabulary and mode."""

import atexit
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.shards.integrity import HASH, Sample, Verified, check_file, read_index, remake_advice
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import check_sample
from t2i.data.shards.remote import fetch
from t2i.errors import DataError, UserError
from t2i.files import hash_uniform
from t2i.tokens.sequence import encode_sequence
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

Opened = TypeVar("Opened", bound=StreamingDataset)


def is_dropped(*, seed: int, epoch: int, key: str, share: float) -> bool:
    """Decide whether a caption is replaced by the empty one: a hash, the same on every rank."""
    return hash_uniform("caption dropout", seed, epoch, key) < share


def tokenizer_to_apply(config: DataConfig, *, tokenizer: TextTokenizer) -> TextTokenizer | None:
    """Return the tokenizer if captions must be read with it anew; None where the shards' ids are its own."""
    made_by = read_manifest(config.shards).text_tokenizer.fingerprint
    return None if tokenizer.fingerprint() == made_by else tokenizer


def caption_ids_of(sample: Sample, *, tokenizer: TextTokenizer | None) -> Tensor:
    """Read the caption ids (T,) of a sample, as stored (None) or by another tokenizer."""
    if tokenizer is None:
        ids = torch.from_numpy(sample["caption_ids"].astype("int64"))
        return (
            ids[:0] if sample.get("caption") == "" else ids
        )  # shards hold one id there: MDS has no empty arrays
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
        """Have a shard hashed or brought; one that is refused is left for other processes to refuse too.

        They would wait for ever, each for the one that began to prepare it.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except DataError:
            self._shard_states[shard_id] = _ShardState.REMOTE
            raise

    def on_exception(self, future: "Future[Any]") -> None:
        """Keep what ended a thread that prepares shards; Streaming would end the epoch and log a traceback."""
        if failure := future.exception():
            self.failure = failure
            self._event.set()
            self._iterator.on_exit()  # a thread that fails does not say so itself, and is waited for

    def __iter__(self) -> Iterator[Encoded]:
        """Yield this process's samples of the next epoch.

        Raises:
            DataError: a shard is not what was prepared.
        """
        try:
            yield from super().__iter__()
        finally:
            if self.failure:
                raise self.failure

    def __getitem__(self, at: int) -> Encoded:
        """Read one sample as input_ids (S,) and its key.

        Raises:
            DataError: it is none that the manifest allows.
        """
        sample = super().__getitem__(at - at % self.config.subsample_every)
        check_sample(sample, manifest=self.manifest, where=self.config.shards / "train")
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


def open_dataset(
    config: DataConfig,
    *,
    layout: VocabLayout,
    num_sequences: int,
    epoch_size: int,
    seed: int,
    tokenizer: TextTokenizer,
) -> SequenceDataset:
    """Open the training split, num_sequences of this rank per step.

    Raises:
        UserError: what Streaming says of an impossible cache_limit.
    """
    try:
        return without_looks(
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


class VerifiedStream(Stream):
    """The training split of a shard folder.

    Streaming prepares a shard once a machine, before anyone reads a sample of it: by downloading it, or here, where it
    is there already, by hashing it.
    """

    def __init__(self, folder: Path, *, remote: str, split: str = "train") -> None:
        super().__init__(
            local=str(folder / split), remote=f"{remote.rstrip('/')}/{split}" if remote else None
        )
        self.folder, self.place, self.name = folder, remote, split
        self.advice = remake_advice(folder, read_manifest(folder))

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Read the index, which lies in the folder by now.

        Raises:
            DataError: it is broken, or has columns that are never read.
        """
        return [shard.reader for shard in read_index(self.folder, self.name)]

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Tell which shards need no preparing: none of a folder's own, and those of a cache that are still whole."""
        if not self.place:
            cache_usage_per_shard[:] = 0
            return
        super().set_up_local(shards, cache_usage_per_shard)
        verified = Verified(self.folder)
        for at in np.flatnonzero(cache_usage_per_shard):
            info: FileInfo = shards[at].file_pairs[0][0]
            name, wanted = f"{self.name}/{info.basename}", info.hashes[HASH]
            if not verified.has(name, wanted=wanted):
                fetch(self.place, self.folder, name, wanted=wanted)
                verified.add(name, wanted=wanted)
        verified.save()

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        name, wanted = f"{self.name}/{raw_info.basename}", raw_info.hashes[HASH]
        if self.place:
            fetch(self.place, self.folder, name, wanted=wanted)
        else:
            check_file(self.folder, name, wanted=wanted, advice=self.advice)
        return int(raw_info.bytes)


def without_looks(open_dataset: Callable[[], Opened]) -> Opened:
    """Open a data set, and close what Streaming opened of others in the search for a free name.

    It would hold that until the process ends: one that opens a hundred data sets comes to the limit of open files.
    """
    looks: list[SharedMemory] = []

    def look(name: str, create: bool, size: int = 0) -> SharedMemory:
        memory = SharedMemory(name, create, size)
        if not create:
            looks.append(memory)
        return memory

    prefix.SharedMemory = look
    try:
        dataset = open_dataset()
    finally:
        prefix.SharedMemory = SharedMemory
    for memory in looks:
        if (
            memory is not dataset._locals_shm
        ):  # the other ranks of a machine look for the first one's and keep it
            atexit.unregister(memory.cleanup)
            memory.cleanup()
    return dataset
