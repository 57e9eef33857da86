"""Work that reports while it goes on, as an iterator that can be given up."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class GivenUpError(Exception):
    """Nobody waits for this work any more."""


@dataclass(frozen=True)
class _Ended:
    error: BaseException | None


def follow(
    work: Callable[[Callable[[T], None]], None],
    *,
    busy: threading.Lock,
    given_up: threading.Event,
) -> Iterator[T]:
    """Run `work` in a thread and yield what it tells, as it tells it.

    Args:
        work: called with a function that it tells its results to.
        busy: held while it works, so that one piece of work has the machine at a time.
        given_up: ends the work the next time that it tells something or calls check(given_up). A consumer that closes
            the iterator sets it.

    Raises:
        Exception: what the work raises; being given up is no error.
    """
    told: queue.SimpleQueue[T | _Ended] = queue.SimpleQueue()

    def run() -> None:
        error: BaseException | None = None
        try:
            with busy:
                check(given_up)
                work(told.put)
        except GivenUpError:
            pass
        except BaseException as raised:  # raised again where it is waited for
            error = raised
        told.put(_Ended(error))

    threading.Thread(target=run, name="playing", daemon=True).start()
    try:
        while not isinstance(one := told.get(), _Ended):
            yield one
        if one.error is not None:
            raise one.error
    except GeneratorExit:
        given_up.set()
        raise


def check(given_up: threading.Event) -> None:
    """End the work if nobody waits for it.

    Raises:
        GivenUpError: nobody does.
    """
    if given_up.is_set():
        raise GivenUpError


class Visitors:
    """What each open page waits for, so that it can be given up: by a button, or when the page closes."""

    def __init__(self) -> None:
        self._given_up: dict[tuple[str, str], threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, page: str, *, tab: str) -> threading.Event:
        """Return the event that gives up what a tab of a page begins now; what it began before is given up."""
        begun = threading.Event()
        with self._lock:
            before = self._given_up.get((page, tab))
            self._given_up[page, tab] = begun
        if before is not None:
            before.set()
        return begun

    def give_up(self, page: str, *, tab: str = "") -> None:
        """Give up what a tab of a page waits for; without a tab, what all of them do, and forget the page."""
        with self._lock:
            found = [key for key in self._given_up if key[0] == page and tab in ("", key[1])]
            events = [self._given_up.pop(key) for key in found]
        for event in events:
            event.set()

    def give_up_all(self) -> None:
        """Give up everything."""
        for page in {page for page, _ in [*self._given_up]}:
            self.give_up(page)
