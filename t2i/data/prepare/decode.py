"""Decode the images of pairs, in this process or in several: crop, resize and shift them, or say why not."""

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

from PIL import Image

from t2i.config import PrepareConfig
from t2i.data.sources import UNREADABLE, LeftOut, Pair
from t2i.data.sources.image import OF_THE_DISK
from t2i.distributed.signals import die_with
from t2i.errors import CheckpointError, DataError
from t2i.files import hash_uniform
from t2i.tokens.image import centre_crop_resize, shifted

TASK_PAIRS = 16
"""Pairs per task of a decoding process."""


@dataclass(frozen=True)
class Decoded:
    """The result of decoding one pair's image."""

    images: list[Image.Image]
    """The image and its shifted views; empty if it was not usable."""
    changed: tuple[str, ...] = ()
    """What was lost or guessed when it was decoded."""
    left_out: str = ""
    """Why a filter refused it."""
    broken: str = ""
    """The error that decoding raised."""


@contextmanager
def decoding(config: PrepareConfig) -> Iterator[Executor | None]:
    """Start config.workers decoding processes; yield None if there are none.

    Raises:
        CheckpointError: there is no room for their semaphores.
    """
    if not config.workers:
        yield None
        return
    # Forked, as a DataLoader's are: spawned ones would each import torch and diffusers. They use neither torch nor
    # a GPU: CUDA does not survive a fork.
    context = get_context("fork")
    try:
        pool = ProcessPoolExecutor(
            config.workers, mp_context=context, initializer=_live_with_parent, initargs=(os.getpid(),)
        )
    except OSError as error:
        raise CheckpointError(
            f"{config.workers} decoding processes cannot be started: {error.strerror}. They need room in /dev/shm;"
            " --workers 0 needs none."
        ) from error
    with pool:
        yield pool


def decode_all(
    pairs: Iterable[Pair], *, config: PrepareConfig, pool: Executor | None
) -> Iterator[tuple[Pair, Decoded]]:
    """Decode images in the order of their pairs, a few tasks ahead of the consumer.

    Raises:
        DataError: a decoding process died, usually because memory ran out.
    """
    if pool is None:
        yield from ((pair, decode(pair, config=config)) for pair in pairs)
        return
    rest = iter(pairs)
    tasks = iter(lambda: list(islice(rest, TASK_PAIRS)), [])
    # Bounded, because decoded images wait in memory. Popped in order, so that the shards do not depend on
    # which process is faster.
    ahead = deque(
        (task, pool.submit(_decode_task, task, config)) for task in islice(tasks, 4 * config.workers)
    )
    try:
        while ahead:
            task, future = ahead.popleft()
            done = future.result()
            ahead.extend((task, pool.submit(_decode_task, task, config)) for task in islice(tasks, 1))
            yield from zip(task, done, strict=True)
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {config.workers} decoding processes died, usually because memory ran out."
            " Use fewer --workers, and run the same command to resume."
        ) from error


def decode(pair: Pair, *, config: PrepareConfig) -> Decoded:
    """Decode one pair's image and make its views, or return the reason that it cannot be used."""
    try:
        opened = pair.open()
        return Decoded(views(pair, opened.image, config), opened.changed)
    except LeftOut as reason:
        return Decoded([], left_out=str(reason))
    except UNREADABLE as error:
        if getattr(error, "errno", None) in OF_THE_DISK:
            raise  # counted as broken, the pair would be lost for good
        return Decoded([], broken=f"{type(error).__name__}: {error}")


def views(pair: Pair, image: Image.Image, config: PrepareConfig) -> list[Image.Image]:
    """Crop and resize a pair's image; a training pair also gets config.views - 1 shifted copies."""
    image = centre_crop_resize(image, size=config.image_size)
    made = [image]
    reach = config.image_size // 16
    for number in range(1, num_views(pair, config)):
        # By a hash of the key, so that a view is the same whichever process makes it.
        right, down = (
            int(hash_uniform("view", pair.key, number, axis) * (2 * reach + 1)) - reach
            for axis in ("right", "down")
        )
        made.append(shifted(image, right=right, down=down))
    return made


def num_views(pair: Pair, config: PrepareConfig) -> int:
    """Count the images made from one pair."""
    return config.views if pair.split == "train" else 1


def _decode_task(task: list[Pair], config: PrepareConfig) -> list[Decoded]:
    return [decode(pair, config=config) for pair in task]


def _live_with_parent(parent: int) -> None:
    """Ignore Ctrl-C, which the terminal sends to all processes: the parent handles it and ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
