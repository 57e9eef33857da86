"""Images that wait, and the one thread that draws them in batches."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from t2i.serve.meters import Meters


@dataclass(frozen=True)
class Asked:
    """One image that somebody asked for."""

    caption: str
    seed: int
    drawn: Future[bytes] = field(default_factory=Future, compare=False)
    """Its PNG file, once it is drawn."""


class FullError(RuntimeError):
    """So many images wait that no more are taken."""


class ClosedError(RuntimeError):
    """The server stops; it draws what waits, and takes no more."""


class Waiting:
    """A queue of images, and the thread that draws them; the model is used by that thread alone."""

    def __init__(
        self,
        draw: Callable[[Sequence[Asked]], list[bytes]],
        *,
        batch_size: int,
        most_waiting: int,
        meters: Meters,
    ) -> None:
        """Start the thread.

        Args:
            draw: draws up to batch_size images.
        """
        self._draw, self._batch_size, self._most, self._meters = draw, batch_size, most_waiting, meters
        self._images: deque[Asked] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.num_drawing = 0
        """Images that are drawn right now."""
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        with self._changed:
            self._drop_cancelled()
            return len(self._images)

    def add(self, images: Sequence[Asked]) -> None:
        """Let images wait, all of a request or none.

        Raises:
            FullError: too many wait already.
            ClosedError: the server stops.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError
            self._drop_cancelled()
            if len(self._images) + len(images) > self._most:
                raise FullError
            self._images.extend(images)
            self._changed.notify()

    def close(self) -> None:
        """Take no more images, draw those that wait, and return when they are drawn."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _drop_cancelled(self) -> None:
        """Let images go whose clients have left: they would keep others out until the next batch begins."""
        left = [image for image in self._images if not image.drawn.cancelled()]
        if len(left) < len(self._images):
            self._meters.add("t2i_cancelled_images_total", len(self._images) - len(left))
            self._images = deque(left)

    def _work(self) -> None:
        while batch := self._next():
            self.num_drawing, start = len(batch), time.monotonic()
            try:
                files = self._draw(batch)
            # Whatever it was, those who wait must hear of it, and the next batch may be fine.
            except Exception as error:
                for image in batch:
                    image.drawn.set_exception(error)
                continue
            self._meters.add("t2i_drawing_seconds_total", time.monotonic() - start)
            self._meters.add("t2i_batches_total")
            self._meters.add("t2i_images_total", len(batch))
            for image, file in zip(batch, files, strict=True):
                image.drawn.set_result(file)

    def _next(self) -> list[Asked]:
        """Wait for images and take a batch of them; empty when the server has stopped."""
        batch: list[Asked] = []
        with self._changed:
            while not batch:
                while not self._images and not self._is_closed:
                    self._changed.wait()
                if not self._images:
                    return []
                while self._images and len(batch) < self._batch_size:
                    image = self._images.popleft()
                    if image.drawn.set_running_or_notify_cancel():
                        batch.append(image)
                    else:
                        self._meters.add("t2i_cancelled_images_total")
        return batch
