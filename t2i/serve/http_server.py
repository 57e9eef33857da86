"""The routes over HTTP: one thread per connection, which waits while the drawing thread draws."""

import base64
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from t2i.files import is_readable
from t2i.serve.images_request import ImagesRequest, Limits, RefusedError, read_request
from t2i.serve.meters import Meters
from t2i.serve.waiting import Asked, ClosedError, FullError, Waiting

logger = logging.getLogger(__name__)

IMAGES, MODELS, HEALTH, METRICS = "/v1/images/generations", "/v1/models", "/health", "/metrics"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_BODY_BYTES = 2**16
MOST_CONNECTIONS = 256
"""Connections at once, each of which is a thread."""
BACKLOG = 1_024
"""Connections that wait to be accepted; with Python's five, a burst of clients is turned away."""
SILENT_SECONDS = 30
"""How long a client may take for the next piece of its request."""
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
            super().process_request(request, client_address)
            return
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

    def do_GET(self) -> None:
        """Answer GET."""
        self._answer({MODELS: self._models, HEALTH: self._health, METRICS: self._metrics})

    def do_POST(self) -> None:
        """Answer POST."""
        self._answer({IMAGES: self._images})

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: _answer logs."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses in the same form as the rest."""
        self.close_connection = True
        text = message or HTTPStatus(code).phrase
        self._send(code, json.dumps(RefusedError(code, text).to_json()), kind=JSON_TYPE)

    def _answer(self, routes: dict[str, Callable[[], tuple[str, str]]]) -> None:
        path, start = self.path.split("?")[0].rstrip("/") or "/", time.monotonic()
        known = (IMAGES, MODELS, HEALTH, METRICS)
        route = path if path in known else MODELS if path.startswith(f"{MODELS}/") else "other"
        self._body_is_read = False
        with self.server.answering():
            status, kind, headers = 200, JSON_TYPE, {}
            try:
                self._check_client(path)
                if route not in routes:
                    raise RefusedError(
                        405 if route in known else 404, f"there is no {self.command} {path:.100}"
                    )
                text, kind = routes[route]()
            except RefusedError as refused:
                status, text = refused.status, json.dumps(refused.to_json())
                headers = {"Retry-After": "1"} if status in (429, 503) else {}
                # What was not read of a request would be taken for the next one.
                self.close_connection |= self.command == "POST" and not self._body_is_read
            except ConnectionAbortedError:
                status, text = 499, ""
            seconds = time.monotonic() - start
            self.server.service.meters.add(f't2i_requests_total{{route="{route}",status="{status}"}}')
            if route == IMAGES and status == 200:
                self.server.service.meters.took(seconds)
            logger.info("%s %s %d %.2f s", self.command, route, status, seconds)
            if text:
                self._send(status, text, kind=kind, **headers)

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
        self.wfile.write(body)

    def _check_client(self, path: str) -> None:
        """Refuse clients without the key, and pages of other sites that a browser on this machine has open."""
        name = self.headers.get("Host", "").rsplit(":", 1)[0].strip("[]")
        key = self.server.service.api_key
        # A page cannot know the key; and behind a proxy the name is the proxy's.
        if not key and name and name not in LOOPBACK:
            raise RefusedError(403, "this server answers to localhost alone")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if key and path != HEALTH and not hmac.compare_digest(given, key.encode()):
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
        caption = service.cut_caption(request.prompt)
        images = [Asked(caption, request.seed + index) for index in range(request.num_images)]
        try:
            service.waiting.add(images)
        except FullError as error:
            raise RefusedError(429, "too many images wait; try again later", code="queue_full") from error
        except ClosedError as error:
            raise RefusedError(503, "the server stops", code="stopping") from error
        files = [self._wait_for(image.drawn, images) for image in images]
        return json.dumps(_answer_of(request, images, files, side=service.limits.image_size)), JSON_TYPE

    def _read_body(self) -> bytes:
        if self.headers.get_content_type() != JSON_TYPE:
            raise RefusedError(415, f"expected Content-Type: {JSON_TYPE}")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RefusedError(411, "expected a Content-Length")
        if len(length) > 9 or int(length) > MOST_BODY_BYTES:
            raise RefusedError(413, f"the body has {length:.20} bytes; expected at most {MOST_BODY_BYTES}")
        body = self.rfile.read(int(length))
        self._body_is_read = True
        return body

    def _wait_for(self, drawn: Future[bytes], images: Sequence[Asked]) -> bytes:
        """Wait for a file; nothing is drawn for a client that has left meanwhile."""
        while True:
            try:
                return drawn.result(timeout=LOOK_SECONDS)
            except TimeoutError as error:
                if drawn.done():  # it is the drawing thread's own
                    raise RefusedError(500, f"the image could not be drawn: {error}") from error
                if self._has_left():
                    for image in images:
                        image.drawn.cancel()
                    raise ConnectionAbortedError from None
            except Exception as error:  # the drawing thread's, whatever it was
                logger.error("a batch could not be drawn", exc_info=error)
                raise RefusedError(500, f"the image could not be drawn: {error}") from error

    def _has_left(self) -> bool:
        """Tell whether the client has closed its end."""
        return is_readable(self.connection) and not self.connection.recv(1, socket.MSG_PEEK)


def _answer_of(
    request: ImagesRequest, images: Sequence[Asked], files: Sequence[bytes], *, side: int
) -> dict[str, Any]:
    """Write OpenAI's answer, with each image's seed, and its caption where the model reads less than was sent."""
    data = [
        {
            "b64_json": base64.b64encode(file).decode(),
            "seed": image.seed,
            **({} if image.caption == request.prompt else {"revised_prompt": image.caption}),
        }
        for image, file in zip(images, files, strict=True)
    ]
    return {"created": int(time.time()), "data": data, "output_format": "png", "size": f"{side}x{side}"}
