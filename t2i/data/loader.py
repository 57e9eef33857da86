"""Shards to whole optimizer steps of sequences: deterministic, resumable in mid-epoch, for any number of ranks."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import torch
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _ShardState
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.hashing import hash_uniform
from t2i.data.integrity import LookAhead
from t2i.data.shards import check_sample, read_manifest
from t2i.data.stream import VerifiedStream
from t2i.errors import DataError, UserError
from t2i.tokens.sequence import encode_sequence
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout


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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this process's samples of the next epoch.

        Raises:
            DataError: a shard is not what was prepared.
        """
        try:
            yield from super().__iter__()
        finally:
            if self.failure:
                raise self.failure

    def __getitem__(self, at: Any) -> dict[str, Any]:
        """Read one sample as input_ids (S,) and its key.

        Raises:
            DataError: it is none that the manifest allows.
        """
        sample = super().__getitem__(at)
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
        if config.cache_limit and not config.remote:
            raise UserError(
                f"data.cache_limit is {config.cache_limit}, but data.remote is empty: there is nothing to bring a"
                " shard from again that left the cache."
            )
        num_samples = read_manifest(config.shards)["counts"].get("train", 0)
        if num_samples < global_batch:
            raise UserError(
                f"{config.shards} has {num_samples} training pairs; one step takes {global_batch}"
                " (train.global_batch_tokens / data.seq_len)."
            )
        if global_batch % world_size:
            raise UserError(f"a step of {global_batch} sequences does not divide over {world_size} ranks.")
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
        )
        self.folder = config.shards
        self.look_aheads: list[LookAhead] = []
        self.position: dict[str, Any] | None = None

    def look_ahead(self) -> None:
        """Hash all shards in a thread, on one rank; what it finds ends the iteration."""
        self.look_aheads.append(LookAhead(self.folder, manifest=read_manifest(self.folder)))
        self.look_aheads[-1].start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield input_ids (B, S) and keys for ever, epoch after epoch.

        Raises:
            DataError: a shard or a sample is not what was prepared.
        """
        while True:
            for batch in _sentences(self.loader):
                for thread in self.look_aheads:
                    thread.check()
                self.position = self.loader.state_dict()
                yield batch

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


def _open_dataset(config: DataConfig, **settings: Any) -> SequenceDataset:
    """Open the training split; what Streaming says of an impossible cache_limit is the user's to know."""
    try:
        return SequenceDataset(config, **settings)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"data.shards {config.shards} cannot be read: {error}") from error


def _sentences(loader: StreamingDataLoader) -> Iterator[dict[str, Any]]:
    """Pass batches on; of a loader process's error keep the sentence, which torch puts below a traceback."""
    try:
        yield from loader
    except DataError as error:
        sentence = str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        raise DataError(sentence) from error


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
