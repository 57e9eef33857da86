"""Judges of others, such as PickScore, HPSv3 or GenEval 2, asked by HTTP: none of their code is imported here."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from tqdm import tqdm

from t2i.errors import UserError
from t2i.generate.best_of import Ranker
from t2i.generate.captions import captions_sha256
from t2i.measure.images import batches, read_image
from t2i.measure.judge_answers import Score, answer_key, keep_answers, read_answers
from t2i.measure.judge_wire import (
    TIMEOUT_SECONDS,
    TRIES,
    WAIT_SECONDS,
    answer_of,
    request_of,
    revisions_of,
    scores_of,
    shown,
    wait,
)
from t2i.measure.protocol import is_own

logger = logging.getLogger(__name__)

BATCH = 8
"""Images per request."""
NAMED = 3
"""Images that an error names."""


@dataclass(frozen=True)
class RemoteJudge:
    """One reward of a service."""

    url: str
    """Address of the service, without /score."""
    reward: str
    """What the service calls it, such as hpsv3."""
    revision: str = ""
    """Of its weights, in the user's words; empty if the service says it."""
    service_revision: str | None = None
    """As the service says it; empty if it says none, None before it was asked."""
    answers: Path | None = None
    """File that its answers are kept in; None for none."""
    timeout_seconds: float = TIMEOUT_SECONDS
    wait_seconds: float = WAIT_SECONDS

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise UserError(f"--judge-url is {self.url}; expected an address such as http://localhost:8080.")

    @property
    def key(self) -> str:
        """Name its measures and its entry in scores.json: the reward `clip` of a service is not the CLIP score."""
        return f"reward_{self.reward}" if is_own(self.reward) else self.reward

    @property
    def name(self) -> str:
        """Name it with its revision, in the words of both."""
        stated = f"(service: {self.service_revision})" if self.service_revision else ""
        return " ".join(each for each in (self.reward, self.revision, stated) if each)

    def protocol(self, revisions: set[str], *, captions: Sequence[str]) -> dict[str, object]:
        """Say who judged what.

        Args:
            revisions: those that the service stated.

        Raises:
            UserError: it is not known which revision judged, or there was more than one.
        """
        stated = {each for each in (*revisions, self.service_revision) if each}
        if len(stated) > 1:
            raise UserError(
                f"Judge {self.reward} at {self.url} states the revisions {' and '.join(sorted(stated))}; expected one."
            )
        # A judge whose weights are not named cannot be compared with itself tomorrow.
        if not stated and not self.revision:
            raise UserError(
                f"The revision of judge {self.reward} at {self.url} is not stated; expected one. Name it:"
                f" --judges {self.reward}=REVISION."
            )
        # Side by side: what a service says may be the version of its wrapper, which knows nothing of the weights.
        revision = {"revision": self.revision, "service_revision": next(iter(stated), "")}
        prompts = {str(place): caption for place, caption in enumerate(captions)}
        return {
            "reward": self.reward,
            **{key: value for key, value in revision.items() if value},
            "prompts_sha256": captions_sha256(prompts),
            "images": "PNG, as drawn",
        }


@dataclass(frozen=True)
class Answers:
    """What a judge said of some images."""

    scores: list[Score]
    """Per image, measure -> score. Keys are the reward's name, and behind it that of a part of it."""
    revision: str
    """As the service says it; empty if it does not."""

    def means(self) -> dict[str, float]:
        """Average every measure over the images."""
        return {key: sum(each[key] for each in self.scores) / len(self.scores) for key in self.scores[0]}


@dataclass(frozen=True)
class Item:
    """An image to be judged."""

    name: str
    """Its file, or its place among the images."""
    image: Image.Image
    caption: str
    key: str
    """Of its answer."""


def check_service(judge: RemoteJudge) -> None:
    """Ask a service whether it has the reward, before anything is drawn.

    Raises:
        UserError: it does not answer, or has no such reward.
    """
    rewards = _answer(judge, "/rewards", body=None).get("rewards")
    if not isinstance(rewards, list) or judge.reward not in rewards:
        raise UserError(f"{judge.url} has no judge {judge.reward}; it has: {shown(rewards)}.")


def check_revision(judge: RemoteJudge) -> RemoteJudge:
    """Let a judge score one grey image, so that one that fails or has no revision is known before anything is drawn.

    Returns:
        The judge with the revision that its service states.

    Raises:
        UserError: it fails, or its revision is not known.
    """
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    checked = replace(judge, service_revision=ask(judge, [grey], ["a grey square"]).revision)
    checked.protocol(set(), captions=[])
    return checked


def ask(
    judge: RemoteJudge, images: Iterable[np.ndarray | Path], captions: Sequence[str], *, description: str = ""
) -> Answers:
    """Let a judge score images, each under its caption, BATCH at a time; what is kept is not asked for again.

    Args:
        description: of a bar; empty for none.

    Raises:
        UserError: the service did not answer, or not with a finite number per image.
    """
    known = read_answers(judge.answers) if judge.answers else {}
    scores: list[Score] = []
    revisions = {judge.service_revision or ""}
    pairs = tqdm(
        zip(images, captions, strict=True),
        total=len(captions),
        desc=description,
        unit="image",
        disable=not description,
    )
    for start, batch in enumerate(batches(pairs, size=BATCH)):
        items = [_item(judge, *pair, place=start * BATCH + place) for place, pair in enumerate(batch)]
        missing = [item for item in items if item.key not in known]
        found, problems, stated = _judged(judge, missing)
        if judge.answers:
            keep_answers(judge.answers, found)
        if problems:
            raise UserError(_said_of(problems, judge=judge, count=len(batch)))
        revisions |= stated
        known |= found
        scores += [known[item.key] for item in items]
    revisions -= {""}
    names = {tuple(sorted(each)) for each in scores}
    if len(names) != 1 or len(revisions) > 1:
        differing = sorted(map(list, names)) if len(names) != 1 else sorted(revisions)
        raise UserError(f"{judge.url} answers differently from image to image: {shown(differing)}.")
    return Answers(scores, revision=next(iter(revisions), ""))


def ranker_of(judge: RemoteJudge) -> Ranker:
    """Make what chooses among several images of a caption."""

    def rank(images: list[Image.Image], captions: list[str]) -> list[float]:
        answers = ask(judge, [np.asarray(image) for image in images], captions)
        return [headline(each, key=judge.key) for each in answers.scores]

    return Ranker(judge.name, rank)


def headline(score: Score, *, key: str) -> float:
    """Choose the number that images are ranked by: the part named as the reward, else the first."""
    return score.get(key, next(iter(score.values())))


def _item(judge: RemoteJudge, image: np.ndarray | Path, caption: str, *, place: int) -> Item:
    is_file = isinstance(image, Path)
    opened = read_image(image) if isinstance(image, Path) else Image.fromarray(image)
    name = str(image) if is_file else f"image {place}"
    return Item(name, opened, caption, key=answer_key(opened, caption, judge=judge.name))


def _judged(
    judge: RemoteJudge, items: Sequence[Item]
) -> tuple[dict[str, Score], list[tuple[Item, str]], set[str]]:
    """Ask for the scores of a batch, again for those that an answer lacks.

    Returns:
        Scores by the keys of their items, items without one and why, and the revisions that the service stated.
    """
    found: dict[str, Score] = {}
    revisions: set[str] = set()
    problems = [(item, "") for item in items]
    for attempt in range(TRIES if items else 0):
        wait(attempt, wait_seconds=judge.wait_seconds)
        left = [item for item, _ in problems]
        requests = [request_of(item.image, item.caption, reward=judge.reward) for item in left]
        answer = _answer(judge, "/score", body={"protocol_version": "1", "requests": requests})
        scores = scores_of(answer, reward=judge.reward, key=judge.key, count=len(left), url=judge.url)
        judged = list(zip(left, scores, strict=True))
        stated = revisions_of(answer)
        # One that scores and states none is another service than one that states one.
        if not stated and not all(isinstance(score, str) for score in scores):
            stated = {""}
        _check_unchanged(judge, stated)
        revisions |= stated
        found |= {item.key: score for item, score in judged if not isinstance(score, str)}
        problems = [(item, score) for item, score in judged if isinstance(score, str)]
        if not problems:
            break
        said = (judge.url, len(problems), len(left), problems[0][1], attempt + 1, TRIES)
        logger.warning("%s did not score %d of %d images (%s), try %d of %d", *said)
    return found, problems, revisions


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # As it will be looked up, and refused if a label is empty or too long.
        (parts.hostname or "").encode("idna")
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isascii()
        )
    except ValueError:  # also of brackets without an end, and of a port that is no number
        return False


def _check_unchanged(judge: RemoteJudge, revisions: set[str]) -> None:
    """Refuse the answer of another judge than the one that was checked.

    Raises:
        UserError: the service states another revision.
    """
    others = revisions - {judge.service_revision}
    if judge.service_revision is not None and others:
        stated = " and ".join(sorted(others)) or "none"
        raise UserError(
            f"{judge.url} now states revision {stated} of {judge.reward}; at first it stated"
            f" {judge.service_revision or 'none'}. Run the command again with one revision."
        )


def _said_of(problems: Sequence[tuple[Item, str]], *, judge: RemoteJudge, count: int) -> str:
    lines = [f"{item.name}, {shown(item.caption)!r}: {reason}" for item, reason in problems[:NAMED]]
    return "\n".join(
        [
            f"{judge.url} did not score {len(problems)} of {count} images by {judge.reward} in {TRIES} tries:",
            *lines,
        ]
    )


def _answer(judge: RemoteJudge, path: str, *, body: dict[str, object] | None) -> dict[str, object]:
    return answer_of(
        judge.url.rstrip("/") + path,
        body=body,
        timeout_seconds=judge.timeout_seconds,
        wait_seconds=judge.wait_seconds,
    )
