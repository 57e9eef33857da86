"""The server's routes, and what it answers in OpenAI's form."""

import base64
import time
from collections.abc import Sequence
from typing import Any

from t2i.serve.images_request import ImagesRequest
from t2i.serve.waiting import Asked

IMAGES, MODELS, HEALTH, METRICS = "/v1/images/generations", "/v1/models", "/health", "/metrics"
ALLOWED = {IMAGES: "POST", MODELS: "GET, HEAD", HEALTH: "GET, HEAD", METRICS: "GET, HEAD"}
"""Methods of each route."""


def headers_of(status: int, route: str) -> dict[str, str]:
    """Return what an error's answer says besides."""
    found = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": ALLOWED.get(route, "")}}
    return {"Retry-After": "1"} if status in (429, 503) else found.get(status, {})


def answer_of(
    request: ImagesRequest, images: Sequence[Asked], files: Sequence[bytes], *, read: str, side: int
) -> dict[str, Any]:
    """Write OpenAI's answer, with each image's seed.

    Args:
        read: what the model reads of the prompt; it is named where that is less than was sent.
        side: pixels per side.
    """
    data = [
        {
            "b64_json": base64.b64encode(file).decode(),
            "seed": image.seed,
            **({} if read == request.prompt else {"revised_prompt": read}),
        }
        for image, file in zip(images, files, strict=True)
    ]
    return {"created": int(time.time()), "data": data, "output_format": "png", "size": f"{side}x{side}"}
