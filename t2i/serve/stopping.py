"""Serve until told to stop, and stop once what was asked for is drawn."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from t2i.serve.http_server import ImageServer

logger = logging.getLogger(__name__)

LAST_ANSWERS_SECONDS = 30.0
"""How long clients may take to receive their images after the last was drawn."""


@contextmanager
def accepting(server: ImageServer) -> Iterator[ImageServer]:
    """Accept requests inside the block; at its end draw what waits, answer, and close."""
    thread = threading.Thread(target=server.serve_forever, name="accepting", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        # Until all is drawn, new requests get an answer too: that the server stops.
        server.is_stopping = True
        server.service.waiting.close()
        server.shutdown()
        server.wait_until_answered(timeout_seconds=LAST_ANSWERS_SECONDS)
        server.server_close()


def stop_signal() -> threading.Event:
    """Return an event that SIGTERM or Ctrl-C sets from now on; a second Ctrl-C interrupts."""
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return stopped


def serve_until_stopped(server: ImageServer, *, stopped: threading.Event) -> None:
    """Serve until the event of stop_signal is set; a second Ctrl-C ends at once."""
    with accepting(server):
        stopped.wait()
        logger.info("Stopping: %d images wait, and are drawn first.", len(server.service.waiting))
