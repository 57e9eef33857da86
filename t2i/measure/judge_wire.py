"""The wire of UniRL's reward service: images and texts go to POST /score, numbers come back by the reward's name.

Source: https://github.com/Tencent-Hunyuan/UniRL, unirl-reward-service.
"""

import base64
import http.client
import io
import json
import logging
import math
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from t2i.errors import UserError
from t2i.files import parse_json

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 300.0
"""A judge of some billion parameters takes a minute for a batch, and longer while it is loaded."""
TRIES = 3
WAIT_SECONDS = 2.0
"""Before the second try; twice as long before each further one."""
AGAIN = (408, 429, 500, 502, 503, 504)
"""Statuses of a service that is busy or starting."""
UNREACHED = (OSError, http.client.HTTPException)
"""What a request ends with that got no answer; a time-out is an OSError."""
SHOWN = 200
"""Characters of an answer that an error quotes."""


def answer_of(
    url: str, *, body: dict[str, object] | None, timeout_seconds: float, wait_seconds: float
) -> dict[str, Any]:
    """Ask, again if the service is busy or does not answer; GET without a body, else POST.

    Raises:
        UserError: it refused the request, or did not answer.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    # Around proxies: images of a private model go to the address that was named, and nowhere else.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for attempt in range(TRIES):
        wait(attempt, wait_seconds=wait_seconds)
        try:
            with opener.open(request, timeout=timeout_seconds) as response:
                return parse_json(_read(response, seconds=timeout_seconds), where=url, error=UserError)
        except urllib.error.HTTPError as error:
            said = f"status {error.code}, {_body_of(error)}"
            if error.code not in AGAIN:  # the request itself is wrong, and would be again
                raise UserError(f"{url} refused a request: {said}.") from error
        except UNREACHED as error:
            said = str(getattr(error, "reason", None) or error) or type(error).__name__
        logger.warning("%s did not answer (%s), try %d of %d", url, said, attempt + 1, TRIES)
    raise UserError(f"{url} did not answer {TRIES} times, last with: {said}. Is the service running?")


def _read(response: http.client.HTTPResponse, *, seconds: float) -> bytes:
    """Read an answer to its end.

    Raises:
        TimeoutError: it takes longer; the socket's own time-out is that of each piece of it.
    """
    parts, until = [], time.monotonic() + seconds
    while part := response.read1():
        parts.append(part)
        if time.monotonic() > until:
            raise TimeoutError(f"the answer was not whole after {seconds:g} s")
    if response.length:  # read1 takes an early end for the end
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _body_of(error: urllib.error.HTTPError) -> str:
    """Quote what a service said of an error; it may break off before it has."""
    try:
        return shown(error.read(SHOWN).decode(errors="replace"))
    except UNREACHED as broken:
        return f"without a text: {broken}"


def wait(attempt: int, *, wait_seconds: float) -> None:
    """Wait before a try, counted from 0: the first waits for nothing, each further one twice as long."""
    if attempt:
        time.sleep(wait_seconds * 2 ** (attempt - 1))


def request_of(image: "Image.Image", caption: str, *, reward: str) -> dict[str, object]:
    """Ask for one image's score under its caption."""
    buffer = io.BytesIO()
    # As PNG: another loss by JPEG would be judged too. Written anew: a drawn file carries its caption along.
    image.save(buffer, format="PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {
        "history": [{"text": caption, "image_b64": encoded}],
        "required_rewards": [reward],
        "metadata": None,
    }


def scores_of(
    answer: dict[str, Any], *, reward: str, key: str, count: int, url: str
) -> list[dict[str, float] | str]:
    """Read an answer: per image its measures, or why it has none.

    Args:
        key: what measures of the reward are called.

    Raises:
        UserError: it is not an answer to `count` images.
    """
    results, errors = answer.get("results"), answer.get("errors")
    if not isinstance(results, list) or len(results) != count:
        raise UserError(f"{url} answered {shown(answer)}; expected {count} results, one per image.")
    # A service that says nothing of errors may leave their list out, or cut it short.
    errors = [*(errors if isinstance(errors, list) else []), *[{}] * count]
    return [_score_of(*each, reward=reward, key=key) for each in zip(results, errors, strict=False)]


def _score_of(result: object, error: object, *, reward: str, key: str) -> dict[str, float] | str:
    said = error.get(reward) if isinstance(error, dict) else None
    parts = result.get(reward) if isinstance(result, dict) else None
    if said or not isinstance(parts, dict) or not parts:
        return shown(said or result)
    bad = {name: value for name, value in parts.items() if not _is_finite(value)}
    if bad:
        return f"{shown(bad)}; expected finite numbers"
    # A reward of one part carries the same name twice.
    return {key if name == reward else f"{key}_{name}": float(value) for name, value in parts.items()}


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def revisions_of(answer: dict[str, Any]) -> set[str]:
    """List the revisions that an answer states; none where the service says nothing of them."""
    identities = answer.get("identities")
    listed = identities if isinstance(identities, list) else []
    stated = (each.get("scorer_version") for each in listed if isinstance(each, dict))
    return {str(revision) for revision in stated if revision}


def shown(value: object) -> str:
    """Quote the beginning of what a service said."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
