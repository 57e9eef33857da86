"""Judges of others, such as PickScore, HPSv3 or GenEval 2, asked by HTTP: none of their code is imported here.

The wire is that of UniRL's reward service (https://github.com/Tencent-Hunyuan/UniRL, unirl-reward-service): images and
texts go to POST /score, and numbers come back by the name of the reward.
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i.errors import UserError
from t2i.files import parse_json
from t2i.generate.best_of import Ranker
from t2i.generate.captions import captions_sha256
from t2i.measure.images import batches, read_image

logger = logging.getLogger(__name__)

BATCH = 8
"""Images per request."""
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


@dataclass(frozen=True)
class RemoteJudge:
    """One reward of a service."""

    url: str
    """Address of the service, without /score."""
    reward: str
    """What the service calls it, such as hpsv3."""
    revision: str = ""
    """Of its weights, in the user's words; empty if the service says it."""
    timeout_seconds: float = TIMEOUT_SECONDS
    wait_seconds: float = WAIT_SECONDS

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--judge-url is {self.url}; expected an address such as http://localhost:8080.")

    def protocol(self, revisions: set[str], *, captions: Sequence[str]) -> dict[str, object]:
        """Say who judged what.

        Raises:
            UserError: it is not known which revision judged, or there was more than one.
        """
        known = {each for each in revisions | {self.revision} if each}
        # A judge whose weights are not named cannot be compared with itself tomorrow.
        if len(known) != 1:
            found = "is not stated" if not known else f"is {' and '.join(sorted(known))}"
            raise UserError(
                f"The revision of judge {self.reward} at {self.url} {found}; expected one. Name it with"
                " --judge-revision, as the service gives none or another."
            )
        prompts = {str(place): caption for place, caption in enumerate(captions)}
        return {
            "reward": self.reward,
            "revision": known.pop(),
            "prompts_sha256": captions_sha256(prompts),
            "images": "PNG, as drawn",
        }


@dataclass(frozen=True)
class Answers:
    """What a judge said of some images."""

    scores: list[dict[str, float]]
    """Per image, measure -> score. Keys are the reward's name, and behind it that of a part of it."""
    revision: str
    """As the service says it; empty if it does not."""

    def means(self) -> dict[str, float]:
        """Average every measure over the images."""
        return {key: sum(each[key] for each in self.scores) / len(self.scores) for key in self.scores[0]}


def check_service(judge: RemoteJudge) -> None:
    """Ask a service whether it has the reward, before anything is drawn.

    Raises:
        UserError: it does not answer, or has no such reward.
    """
    answer = _answer(judge, "/rewards", body=None)
    rewards = answer.get("rewards")
    if not isinstance(rewards, list) or judge.reward not in rewards:
        raise UserError(f"{judge.url} has no judge {judge.reward}; it has: {_shown(rewards)}.")


def check_revision(judge: RemoteJudge) -> None:
    """Let a judge score one grey image, so that one that fails or has no revision is known before anything is drawn.

    Raises:
        UserError: it fails, or its revision is not known.
    """
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    answers = ask(judge, [grey], ["a grey square"])
    judge.protocol({answers.revision}, captions=[])


def ask(judge: RemoteJudge, images: Iterable[np.ndarray | Path], captions: Sequence[str]) -> Answers:
    """Let a judge score images, each under its caption, BATCH at a time.

    Raises:
        UserError: the service did not answer, or not with a finite number per image.
    """
    scores: list[dict[str, float]] = []
    revisions = set()
    for batch in batches(zip(images, captions, strict=True), size=BATCH):
        answer = _answer(judge, "/score", body={"protocol_version": "1", "requests": _requests(judge, batch)})
        scores += _scores(answer, judge, count=len(batch))
        revisions |= _revisions(answer)
    names = {tuple(sorted(each)) for each in scores}
    if len(names) != 1 or len(revisions) > 1:
        found = _shown(sorted(map(list, names)) if len(names) != 1 else sorted(revisions))
        raise UserError(f"{judge.url} answers differently from image to image: {found}.")
    return Answers(scores, revision=next(iter(revisions), ""))


def ranker_of(judge: RemoteJudge) -> Ranker:
    """Make what chooses among several images of a caption."""

    def rank(images: list[Image.Image], captions: list[str]) -> list[float]:
        answers = ask(judge, [np.asarray(image) for image in images], captions)
        return [headline(each, reward=judge.reward) for each in answers.scores]

    return Ranker(f"{judge.reward} {judge.revision}".strip(), rank)


def _requests(judge: RemoteJudge, batch: list[tuple[np.ndarray | Path, str]]) -> list[dict[str, object]]:
    return [
        {
            "history": [{"text": caption, "image_b64": _encoded(image)}],
            "required_rewards": [judge.reward],
            "metadata": None,
        }
        for image, caption in batch
    ]


def _encoded(image: np.ndarray | Path) -> str:
    """Write an image as PNG: another loss by JPEG would be judged too."""
    opened = read_image(image) if isinstance(image, Path) else Image.fromarray(image)
    buffer = io.BytesIO()
    opened.save(buffer, format="PNG")  # written anew: a drawn file carries its caption and checkpoint along
    return base64.b64encode(buffer.getvalue()).decode()


def _scores(answer: dict[str, Any], judge: RemoteJudge, *, count: int) -> list[dict[str, float]]:
    results, errors = answer.get("results"), answer.get("errors")
    if not isinstance(results, list) or len(results) != count:
        raise UserError(f"{judge.url} answered {_shown(answer)}; expected {count} results, one per image.")
    # A service that says nothing of errors may leave their list out, or cut it short.
    errors = [*(errors if isinstance(errors, list) else []), *[{}] * count]
    scores = []
    for result, error in zip(results, errors, strict=False):
        parts = result.get(judge.reward) if isinstance(result, dict) else None
        if not isinstance(parts, dict) or not parts:
            said = error.get(judge.reward, result) if isinstance(error, dict) else result
            raise UserError(f"{judge.url} did not score an image by {judge.reward}: {_shown(said)}.")
        bad = {name: value for name, value in parts.items() if not _is_finite(value)}
        if bad:
            raise UserError(f"{judge.url} scored an image as {_shown(bad)}; expected finite numbers.")
        scores.append({_key(judge.reward, name): float(value) for name, value in parts.items()})
    return scores


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _key(reward: str, part: str) -> str:
    """Name a measure: a reward of one part carries the same name twice."""
    return reward if part == reward else f"{reward}_{part}"


def headline(score: dict[str, float], *, reward: str) -> float:
    """Choose the number that images are ranked by: the part named as the reward, else the first."""
    return score.get(reward, next(iter(score.values())))


def _revisions(answer: dict[str, Any]) -> set[str]:
    identities = answer.get("identities") or []
    stated = (each.get("scorer_version") for each in identities if isinstance(each, dict))
    return {str(revision) for revision in stated if revision}


def _answer(judge: RemoteJudge, path: str, *, body: dict[str, object] | None) -> dict[str, Any]:
    """Ask, again if the service is busy or does not answer; GET without a body, else POST."""
    url = judge.url.rstrip("/") + path
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    # Around proxies: images of a private model go to the address that was named, and nowhere else.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for attempt in range(TRIES):
        if attempt:
            time.sleep(judge.wait_seconds * 2 ** (attempt - 1))
        try:
            with opener.open(request, timeout=judge.timeout_seconds) as response:
                return parse_json(response.read(), where=url, error=UserError)
        except urllib.error.HTTPError as error:
            said = f"status {error.code}, {_shown(error.read(SHOWN).decode(errors='replace'))}"
            if error.code not in AGAIN:  # the request itself is wrong, and would be again
                raise UserError(f"{url} refused a request: {said}.") from error
        except UNREACHED as error:
            said = str(getattr(error, "reason", None) or error) or type(error).__name__
        logger.warning("%s did not answer (%s), try %d of %d", url, said, attempt + 1, TRIES)
    raise UserError(f"{url} did not answer {TRIES} times, last with: {said}. Is the service running?")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
