"""The routes over HTTP: one thread per connection, which waits while the drawing thread draws."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from t2i.files import is_readable
from t2i.serve.answers import ALLOWED, HEALTH, IMAGES, METRICS, MODELS, answer_of, headers_of
from t2i.serve.clients import has_key, is_loopback
from t2i.serve.images_request import Limits, RefusedError, read_request
from t2i.serve.meters import Meters
from t2i.serve.waiting import Asked, ClosedError, FullError, Waiting

logger = logging.getLogger(__name__)

MOST_BODY_BYTES = 2**16
MOST_CONNECTIONS = 256
"""Connections at once, each of which is a thread."""
BACKLOG = 1_024
"""Connections that wait to be accepted; with Python's five, a burst of clients is turned away."""
SILENT_SECONDS = 30
"""How long a client may take for the next piece of its request, or of an answer."""
PIECE = 65_536
"""Bytes of an answer that are written at once."""
LAST_BYTES, LAST_SECONDS = 2**24, 5.0
"""How much of a refused body is read, and for how long, before its connection is closed."""
LOOK_SECONDS = 0.5
"""How often it is looked whether a client still waits for its images."""
JSON_TYPE, TEXT_TYPE = "application/json", "text/plain; version=0.0.4; charset=utf-8"
TOO_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


@dataclass(frozen=True)
class Service:
    """What all connections share."""

    waiting: Waiting
    meters: Meters
    limits: Limits
    cut_caption: Callable[[str], str]
    """Cuts a caption to what the model reads of it."""
    created: int
    """When the model's files were written, in seconds since 1970."""
    api_key: str | None = None
    """None: everybody who reaches the server may draw."""


class ImageServer(ThreadingHTTPServer):
    """Accepts connections until it is shut down; `is_stopping` makes it refuse requests for images before."""

    request_queue_size = BACKLOG
    daemon_threads = True

    def __init__(self, address: tuple[str, int], *, service: Service) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)
        self.service = service
        self.is_stopping = False
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._answering = 0
        self._answered = threading.Condition()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or turn it away."""
        if self._slots.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
                return
            except (
                RuntimeError
            ):  # no thread can be started now, as where a container has a limit of processes
                self._slots.release()
        with suppress(OSError):
            request.sendall(TOO_BUSY)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and free its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection; a client that leaves is no error."""
        logger.debug("a connection ended", exc_info=True)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count the request inside the block as one that is not answered yet."""
        with self._answered:
            self._answering += 1
        try:
            yield
        finally:
            with self._answered:
                self._answering -= 1
                self._answered.notify_all()

    def wait_until_answered(self, *, timeout_seconds: float) -> None:
        """Return when no request is without its answer, or after some time."""
        with self._answered:
            self._answered.wait_for(lambda: not self._answering, timeout_seconds)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: ImageServer
    protocol_version = "HTTP/1.1"
    timeout = SILENT_SECONDS
    server_version, sys_version = "t2i", ""
    _has_unread = False
    """Whether a part of the request was not read, which would be taken for the next request."""

    def do_GET(self) -> None:
        """Answer GET, and HEAD, which wants the same without the content."""
        self._answer({MODELS: self._models, HEALTH: self._health, METRICS: self._metrics})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answer POST."""
        self._answer({IMAGES: self._images})

    def do_OPTIONS(self) -> None:
        """Refuse what no route has."""
        self._answer({})

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS

    def finish(self) -> None:
        """Close the connection, once the client has had the time to read its answer."""
        with suppress(OSError):
            if self._has_unread:
                self._read_rest()
        super().finish()

    def _read_rest(self) -> None:
        # A connection that is closed while its client still sends is reset, and the answer is lost with it.
        self.connection.shutdown(socket.SHUT_WR)
        end, left = time.monotonic() + LAST_SECONDS, LAST_BYTES
        while left > 0 and (seconds := end - time.monotonic()) > 0:
            self.connection.settimeout(seconds)
            piece = self.connection.recv(2**16)
            left -= len(piece) or left  # nothing: the client has closed it

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: _answer logs."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses in the same form as the rest."""
        self.close_connection = self._has_unread = True
        text = message or HTTPStatus(code).phrase
        self._send(code, json.dumps(RefusedError(code, text).to_json()), kind=JSON_TYPE)

    def _answer(self, routes: dict[str, Callable[[], tuple[str, str]]]) -> None:
        path, start = self.path.split("?")[0].rstrip("/") or "/", time.monotonic()
        route = path if path in ALLOWED else MODELS if path.startswith(f"{MODELS}/") else "other"
        lengths = self.headers.get_all("Content-Length", [])
        self._has_unread = lengths not in ([], ["0"]) or self._is_chunked() or bool(self.headers.defects)
        with self.server.answering():
            status, kind = 200, JSON_TYPE
            try:
                self._check_client(path)
                if route not in routes:
                    raise RefusedError(
                        405 if route in ALLOWED else 404, f"there is no {self.command} {path:.100}"
                    )
                text, kind = routes[route]()
            except RefusedError as refused:
                status, text = refused.status, json.dumps(refused.to_json())
            except ConnectionAbortedError:
                status, text = 499, ""
            seconds = time.monotonic() - start
            self.server.service.meters.add(f't2i_requests_total{{route="{route}",status="{status}"}}')
            if route == IMAGES and status == 200:
                self.server.service.meters.took(seconds)
            logger.info("%s %s %d %.2f s", self.command, route, status, seconds)
            self.close_connection |= self._has_unread
            if text:
                self._send(status, text, kind=kind, **headers_of(status, route))

    def _send(self, status: int, text: str, *, kind: str, **headers: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        # In pieces: the time-out is that of a write, and a slow client that goes on reading is none that is silent.
        for start in range(0, len(body) if self.command != "HEAD" else 0, PIECE):
            self.wfile.write(body[start : start + PIECE])

    def _check_client(self, path: str) -> None:
        """Refuse clients without the key, and pages of other sites that a browser on this machine has open."""
        host, key = self.headers.get("Host", ""), self.server.service.api_key
        # A page cannot know the key; and behind a proxy the name is the proxy's.
        if not key and host and not is_loopback(host):
            raise RefusedError(403, "this server answers to localhost alone")
        if key and path != HEALTH and not has_key(self.headers.get("Authorization", ""), key=key):
            raise RefusedError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _health(self) -> tuple[str, str]:
        if self.server.is_stopping:
            raise RefusedError(503, "the server stops", code="stopping")
        return json.dumps({"status": "ok", "waiting_images": len(self.server.service.waiting)}), JSON_TYPE

    def _metrics(self) -> tuple[str, str]:
        service = self.server.service
        return service.meters.text(waiting=len(service.waiting)), TEXT_TYPE

    def _models(self) -> tuple[str, str]:
        service = self.server.service
        model = {
            "id": service.limits.model,
            "object": "model",
            "created": service.created,
            "owned_by": "t2i",
        }
        asked = unquote(self.path.split("?")[0].rstrip("/").removeprefix(MODELS).removeprefix("/"))
        if not asked:
            return json.dumps({"object": "list", "data": [model]}), JSON_TYPE
        if asked != model["id"]:
            raise RefusedError(404, f"there is no model {asked:.100}", param="model", code="model_not_found")
        return json.dumps(model), JSON_TYPE

    def _images(self) -> tuple[str, str]:
        service = self.server.service
        request = read_request(self._read_body(), limits=service.limits)
        images = [Asked(request.prompt, request.seed + index) for index in range(request.num_images)]
        try:
            service.waiting.add(images)
        except FullError as error:
            raise RefusedError(429, "too many images wait; try again later", code="queue_full") from error
        except ClosedError as error:
            raise RefusedError(503, "the server stops", code="stopping") from error
        try:
            files = [self._wait_for(image.drawn) for image in images]
        finally:
            for image in images:  # those that nobody waits for any more
                image.drawn.cancel()
        read, side = service.cut_caption(request.prompt), service.limits.image_size
        return json.dumps(answer_of(request, images, files, read=read, side=side)), JSON_TYPE

    def _read_body(self) -> bytes:
        if self.headers.get_content_type() != JSON_TYPE:
            raise RefusedError(415, f"expected Content-Type: {JSON_TYPE}")
        lengths = self.headers.get_all("Content-Length", [])
        # Two of them, or a line that hides those behind it, are how a request is hidden in another one's body.
        if len(lengths) > 1 or self.headers.defects:
            raise RefusedError(400, "expected one Content-Length, and headers of the form NAME: VALUE")
        length = lengths[0] if lengths else ""
        if not length.isdecimal() or self._is_chunked():
            raise RefusedError(411, "expected a Content-Length, and no Transfer-Encoding")
        if len(length) > 9 or int(length) > MOST_BODY_BYTES:
            raise RefusedError(413, f"the body has {length:.20} bytes; expected at most {MOST_BODY_BYTES}")
        body = self.rfile.read(int(length))
        self._has_unread = False
        return body

    def _is_chunked(self) -> bool:
        return "Transfer-Encoding" in self.headers

    def _wait_for(self, drawn: Future[bytes]) -> bytes:
        """Wait for a file.

        Raises:
            RefusedError: it could not be drawn.
            ConnectionAbortedError: the client has left meanwhile.
        """
        while True:
            try:
                return drawn.result(timeout=LOOK_SECONDS)
            except TimeoutError as error:
                if drawn.done():  # it is the drawing thread's own
                    raise RefusedError(500, f"the image could not be drawn: {error}") from error
                if self._has_left():
                    raise ConnectionAbortedError from None
            except Exception as error:  # the drawing thread's, whatever it was
                logger.error("a batch could not be drawn", exc_info=error)
                raise RefusedError(500, f"the image could not be drawn: {error}") from error

    def _has_left(self) -> bool:
        """Tell whether the client has closed its end."""
        try:
            return is_readable(self.connection) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:  # it was killed, or cut off
            return True
