"""Pictures read, cropped and resized: here, or by processes of their own while this one encodes."""

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
from t2i.errors import DataError
from t2i.files import hash_uniform
from t2i.tokens.image import centre_crop_resize, shifted

TASK_PAIRS = 16
"""Pairs that a process takes at a time."""


@dataclass(frozen=True)
class Decoded:
    """What became of one pair's picture."""

    pictures: list[Image.Image]
    """As it is, and its shifted views; none if it was not usable."""
    left_out: str = ""
    """The filter that refused it."""
    broken: str = ""
    """The error that reading it raised."""


@contextmanager
def decoding(config: PrepareConfig) -> Iterator[Executor | None]:
    """Start config.workers processes; None for none of them.

    They are forked, as a DataLoader's are, and touch neither torch nor a GPU.
    """
    if not config.workers:
        yield None
        return
    context = get_context("fork")
    with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_leave_signals) as pool:
        yield pool


def decode_all(
    pairs: Iterable[Pair], *, config: PrepareConfig, pool: Executor | None
) -> Iterator[tuple[Pair, Decoded]]:
    """Read pictures in the order of their pairs, a few tasks ahead of who asks.

    Raises:
        DataError: a process died, mostly for want of memory.
    """
    if pool is None:
        yield from ((pair, decode(pair, config=config)) for pair in pairs)
        return
    rest = iter(pairs)
    tasks = iter(lambda: list(islice(rest, TASK_PAIRS)), [])
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
            f"one of {config.workers} processes that read pictures died, mostly for want of memory."
            " Fewer --workers need less; the same command goes on."
        ) from error


def decode(pair: Pair, *, config: PrepareConfig) -> Decoded:
    """Read one pair's picture and make its views, or say why not."""
    try:
        return Decoded(views(pair, config))
    except LeftOut as reason:
        return Decoded([], left_out=str(reason))
    except UNREADABLE as error:
        return Decoded([], broken=f"{type(error).__name__}: {error}")


def views(pair: Pair, config: PrepareConfig) -> list[Image.Image]:
    """Crop and resize a pair's picture; a training pair also gets config.views - 1 shifted copies."""
    image = centre_crop_resize(pair.open(), size=config.image_size)
    made = [image]
    reach = config.image_size // 16
    for number in range(1, num_views(pair, config)):
        right, down = (
            int(hash_uniform("view", pair.key, number, axis) * (2 * reach + 1)) - reach
            for axis in ("right", "down")
        )
        made.append(shifted(image, right=right, down=down))
    return made


def num_views(pair: Pair, config: PrepareConfig) -> int:
    """Count the pictures made of one pair."""
    return config.views if pair.split == "train" else 1


def view_key(key: str, number: int) -> str:
    """Name a view: KEY, KEY@1, KEY@2, ..."""
    return f"{key}@{number}" if number else key


def _decode_task(task: list[Pair], config: PrepareConfig) -> list[Decoded]:
    return [decode(pair, config=config) for pair in task]


def _leave_signals() -> None:
    """Ctrl-C is for the process that asked; it ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
