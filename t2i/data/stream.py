"""Streaming's view of one split, which reads nothing whose hash was not seen to be right."""

import atexit
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World

from t2i.data.shards.integrity import HASH, Verified, check_file, read_index, remake_advice
from t2i.data.shards.reader import read_manifest
from t2i.data.shards.remote import fetch

Opened = TypeVar("Opened", bound=StreamingDataset)


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
