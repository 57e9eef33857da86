"""What a client asks for, read from OpenAI's JSON, and what it is told when that cannot be."""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from t2i.files import valid_text

MOST_SEED = 2**63 - 1
RANDOM_SEEDS = 2**31
"""Seeds that are chosen for a client are short enough to be typed."""
MOST_CHARACTERS = 4_000
"""Of a prompt."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    model: str
    """The only model there is."""
    image_size: int
    """Pixels per side."""
    most_images: int
    most_characters: int
    """Of a prompt."""


class RefusedError(Exception):
    """A request that is answered by an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer, in OpenAI's form."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ImagesRequest:
    """Images of one prompt."""

    prompt: str
    num_images: int
    seed: int
    """Of the first image; image i has seed + i."""


def read_request(body: bytes, *, limits: Limits) -> ImagesRequest:
    """Read the body of POST /v1/images/generations. Fields that are not known here are ignored.

    Raises:
        RefusedError: it is no JSON object, or a field has a value that cannot be served.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise RefusedError(400, "the body is no JSON object")
    # Null is what clients send for "as usual".
    values = {key: value for key, value in values.items() if value is not None}
    _check_model(values.get("model", limits.model), limits)
    _check_form(values, limits)
    prompt = values.get("prompt")
    if not isinstance(prompt, str):
        raise _wrong("prompt", prompt, "a text")
    if len(prompt) > limits.most_characters:
        found = f"prompt has {len(prompt):,} characters; expected at most {limits.most_characters:,}"
        raise RefusedError(400, found, param="prompt", code="string_above_max_length")
    num_images = _whole(values, "n", default=1, most=limits.most_images, least=1)
    seed = _whole(
        values, "seed", default=secrets.randbelow(RANDOM_SEEDS), most=MOST_SEED - num_images, least=0
    )
    # Half of a pair of surrogates is no text, though JSON can spell it.
    return ImagesRequest(valid_text(prompt), num_images, seed)


def _check_model(model: object, limits: Limits) -> None:
    if model != limits.model:
        message = f"there is no model {model!r:.100}; this server draws with {limits.model!r}"
        raise RefusedError(404, message, param="model", code="model_not_found")


def _check_form(values: dict[str, Any], limits: Limits) -> None:
    side = limits.image_size
    served = {
        "size": ("auto", f"{side}x{side}"),
        "response_format": ("b64_json",),
        "output_format": ("png",),
        "background": ("auto", "opaque"),
        "stream": (False,),
    }
    for name, choices in served.items():
        if name in values and values[name] not in choices:
            raise _wrong(name, values[name], " or ".join(map(str, choices)))


def _whole(values: dict[str, Any], name: str, *, default: int, least: int, most: int) -> int:
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _wrong(name, value, f"a whole number from {least} to {most}")
    return value


def _wrong(name: str, value: object, expected: str) -> RefusedError:
    return RefusedError(
        400, f"{name} is {value!r:.100}; expected {expected}", param=name, code="invalid_value"
    )
