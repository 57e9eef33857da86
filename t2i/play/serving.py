"""The page's web server: who may ask, what a browser may load, and an end by Ctrl-C."""

import logging
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from t2i.serve.clients import is_loopback

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

HEADERS = {
    # Nothing of elsewhere is loaded or asked, whatever a caption may bring about.
    b"content-security-policy": (
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
        b" img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:;"
        b" connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
    ),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
LAST_ANSWERS_SECONDS = 2
"""How long pages that are open may take to be told of the end."""


class Door:
    """An ASGI application that lets in who may, and adds HEADERS to every answer."""

    def __init__(self, application: Application, *, is_open: bool) -> None:
        """Stand before an application.

        Args:
            is_open: whether a password is asked for inside; otherwise only requests for this machine's own name are
                let in, which a site whose name was made to lead here cannot make.
        """
        self._application, self._is_open = application, is_open

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [*HEADERS.items()]})
            await send({"type": "http.response.body", "body": refusal})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        await self._application(scope, receive, send_with_headers)

    def _refusal(self, scope: Message) -> bytes:
        """Say why a request is not let in; empty if it is."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin", "")
        if not self._is_open and not is_loopback(host):
            return b"this page answers to localhost alone"
        # Browsers send forms and uploads to any address, for any site, and add who is asking. A link may lead here.
        is_link = scope.get("method") == "GET" and headers.get(b"sec-fetch-mode") == "navigate"
        is_elsewhere = headers.get(b"sec-fetch-site") == "cross-site" and not is_link
        if is_elsewhere or (origin and not self._is_open and not is_loopback(origin.partition("://")[2])):
            return b"this page answers to no other site's pages"
        return b""


def serve_until_stopped(
    application: Application,
    *,
    listening: socket.socket,
    stopped: threading.Event,
    give_up: Callable[[], None],
) -> None:
    """Serve until the event of stop_signal is set; a second Ctrl-C ends at once.

    Args:
        give_up: ends the work that pages wait for.
    """
    import uvicorn  # comes with Gradio

    server = uvicorn.Server(
        uvicorn.Config(
            application,
            log_level="critical",
            timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,  # an open page never ends by itself
        )
    )
    # In a thread, where uvicorn leaves signals alone.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="serving", daemon=True)
    thread.start()
    stopped.wait()
    logger.info("Stopping.")
    give_up()
    server.should_exit = True
    thread.join()
