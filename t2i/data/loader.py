"""Batches of whole optimizer steps from shards: deterministic, resumable in mid-epoch, on any number of ranks."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TypedDict

import torch
from streaming import StreamingDataLoader

from t2i.config import DataConfig
from t2i.data.batching import num_text_sequences
from t2i.data.dataset import open_dataset
from t2i.data.shards.integrity import LookAhead
from t2i.data.shards.manifest import MANIFEST, Manifest, read_manifest
from t2i.distributed.signals import die_with
from t2i.errors import DataError, UserError
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout


class Batch(TypedDict):
    """One rank's share of one optimizer step."""

    input_ids: torch.Tensor
    """(B, S)"""
    key: list[str]


Position = dict[str, int]
"""The state of Streaming's loader: the epoch, the samples read of it, and what fixes their order."""


class _Stream:
    """This rank's share of each step from one shard set, epoch after epoch, with a position that can be saved."""

    def __init__(
        self,
        config: DataConfig,
        *,
        layout: VocabLayout,
        a_step: int,
        world_size: int,
        seed: int,
        tokenizer: TextTokenizer,
    ) -> None:
        manifest = read_manifest(config.shards)
        num_samples = manifest.counts.get("train", 0)
        check_amount(config, manifest=manifest, a_step=a_step, world_size=world_size)
        dataset = open_dataset(
            config,
            layout=layout,
            num_sequences=a_step // world_size,
            # Whole steps only, or the order at an epoch's end would depend on the number of ranks. Which samples
            # sit out differs from epoch to epoch.
            epoch_size=num_samples // a_step * a_step,
            seed=seed,
            tokenizer=tokenizer,
        )
        self.loader = StreamingDataLoader(
            dataset,
            batch_size=a_step // world_size,
            num_workers=config.num_workers,
            drop_last=True,
            persistent_workers=config.num_workers > 0,
            # Signals are for the rank, which still needs its loader while it saves.
            worker_init_fn=partial(live_with_rank, parent=os.getpid()),
            # Its own generator. Otherwise each start of the loader would draw from the process's random state,
            # and a resumed run would draw once more than an uninterrupted one.
            generator=torch.Generator().manual_seed(seed),
        )
        self.folder = config.shards
        self.look_aheads: list[LookAhead] = []
        self.position: Position | None = None

    def look_ahead(self) -> None:
        """Start a thread that hashes all shards; a bad one ends the iteration."""
        self.look_aheads.append(LookAhead(self.folder, manifest=read_manifest(self.folder)))
        self.look_aheads[-1].start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for batch in _sentences(self.loader):
                for thread in self.look_aheads:
                    thread.check()
                self.position = self.loader.state_dict()
                yield batch

    def go_on_from(self, position: Position | None) -> None:
        """Resume from a saved position; None for the start."""
        self.position = position
        if position is not None:
            self.loader.load_state_dict(position)

    def close(self) -> None:
        """Stop the loader's processes."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()


class StepLoader:
    """This rank's share of optimizer steps, without end, with a position that can be saved.

    Each step holds the same number of sequences of config.shards and, for config.replay_ratio, of config.replay_shards.
    """

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
        self.global_batch = global_batch
        parts = parts_of_a_step(config, global_batch=global_batch, world_size=world_size)
        self.streams = [
            _Stream(one, layout=layout, a_step=amount, world_size=world_size, seed=seed, tokenizer=tokenizer)
            for one, amount in parts
        ]

    def look_ahead(self) -> None:
        """Start threads that hash all shards, on one rank; a bad shard ends the iteration."""
        for stream in self.streams:
            stream.look_ahead()

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over batches without end: input_ids (B, S) and keys, with replayed text last in each batch.

        Raises:
            DataError: a shard or a sample is not what was prepared.
        """
        for parts in zip(*self.streams, strict=True):
            yield {
                "input_ids": torch.cat([part["input_ids"] for part in parts]),
                "key": [key for part in parts for key in part["key"]],
            }

    def close(self) -> None:
        """Stop the loaders' processes, which ignore signals."""
        for stream in self.streams:
            stream.close()

    @property
    def epoch(self) -> int:
        """The epoch of data.shards that the last batch is from, counted from 0."""
        position = self.streams[0].position
        return 0 if position is None else int(position["epoch"])

    def state_dict(self) -> str:
        """Return the position after the last batch, as JSON."""
        return json.dumps([stream.position for stream in self.streams])

    def load_state_dict(self, state: str) -> None:
        """Resume from a saved position."""
        for stream, position in zip(self.streams, json.loads(state), strict=True):
            stream.go_on_from(position)


def parts_of_a_step(
    config: DataConfig, *, global_batch: int, world_size: int
) -> list[tuple[DataConfig, int]]:
    """List the shard sets of a run, with how many sequences of each step are theirs.

    Raises:
        UserError: the ranks cannot share a step evenly.
    """
    if global_batch % world_size:
        raise UserError(f"a step of {global_batch} sequences does not divide over {world_size} ranks.")
    num_text = num_text_sequences(config, global_batch=global_batch, world_size=world_size)
    parts = [(config, global_batch - num_text)]
    return [*parts, (text_stream(config), num_text)] if num_text else parts


def num_ordered(config: DataConfig) -> int:
    """Count the training samples of a run's shard sets, as far as their manifests are here."""
    sets = [config, text_stream(config)] if config.replay_shards else [config]
    here = [one.shards for one in sets if (one.shards / MANIFEST).is_file()]
    return sum(read_manifest(shards).counts.get("train", 0) for shards in here)


def check_nodes(config: DataConfig, *, world_size: int) -> None:
    """Check that the nodes of a run that begins can share its order; one that has begun keeps it on any number.

    Raises:
        UserError: they cannot.
    """
    # Streaming would raise on one rank of each node, while the others wait.
    on_this_node = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size))
    canonical, num_nodes = config.num_canonical_nodes, world_size // int(on_this_node)
    if num_nodes and max(num_nodes, canonical) % min(num_nodes, canonical):
        raise UserError(
            f"data.num_canonical_nodes is {canonical}, on {num_nodes} nodes; expected that one divides the other."
        )


def check_amount(config: DataConfig, *, manifest: Manifest, a_step: int, world_size: int) -> None:
    """Check that the shards have enough training sequences for one step.

    Raises:
        UserError: they have fewer.
    """
    num_kept = num_trained_on(manifest, subsample_every=config.subsample_every)
    if num_kept >= a_step:
        return
    fits = num_kept // world_size * world_size
    smaller = (
        f" `--train.global-batch-tokens {fits * config.seq_len}` makes a step of {fits}."
        if fits
        else f" {world_size} ranks need as many."
    )
    raise UserError(
        f"{config.shards} has {num_kept} training sequences; one step takes {a_step}"
        f" (train.global_batch_tokens / data.seq_len).{smaller} `--views` of prepare makes more of few images."
    )


def num_trained_on(manifest: Manifest, *, subsample_every: int) -> int:
    """Count the training samples that data.subsample_every leaves."""
    return -(-manifest.counts.get("train", 0) // subsample_every)


def text_stream(config: DataConfig) -> DataConfig:
    """Return the settings that replayed text is read with: those of text-only training."""
    assert config.replay_shards is not None
    whole = replace(config, remote="", cache_limit=None, subsample_every=1)
    return replace(whole, shards=config.replay_shards, mode="text-only")


def live_with_rank(worker: int, *, parent: int) -> None:
    """Have a loader's process ignore signals and die with its rank."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with(parent)


def _sentences(loader: StreamingDataLoader) -> Iterator[Batch]:
    """Pass batches on; reduce a loader process's error to its sentence, which torch puts below a traceback."""
    try:
        yield from loader
    except DataError as error:
        sentence = str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        raise DataError(sentence) from error
