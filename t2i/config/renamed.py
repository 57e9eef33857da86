"""Old spellings of settings, which work for one release with a warning."""

import functools
import logging
import os
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

LAST_RELEASE = "0.2"
"""The last release that knows the old spellings; the release after it drops this table."""

RENAMED = {
    "data.keep_every": "data.subsample_every",
    "data.text_mix": "data.replay_ratio",
    "data.text_shards": "data.replay_shards",
    "model.rows": "model.new_embeddings",
    "model.scramble": "model.control_init",
    "model.learn": "model.trainable",
    "train.new_rows_lr": "train.new_embeddings_lr",
    "train.l2_to_init": "train.l2_sp",
    "train.image_rows_only": "train.image_vocab_only",
    "train.eval_pictures": "train.eval_images",
    "text_rows": "text_vocab_size",
    "num_pictures": "num_images",
    "shards": "data.shards",
}
"""Old key -> new key; those without a group are flags of launchers/plan.py, launchers/tokenizer.py and
eval/gradients.py."""


def with_new_keys(
    values: Mapping[str, object], *, prefix: str = "", is_said: bool = True
) -> dict[str, object]:
    """Return nested settings in the new spelling and the same order; both `_` and `-` are accepted.

    Args:
        is_said: warn of each old name; False for files that a program wrote, such as resolved.yaml.
    """
    renamed: dict[str, object] = {}
    for key, value in values.items():
        new = _new_key(f"{prefix}{key}", is_said=is_said).removeprefix(prefix)
        if isinstance(value, dict):
            renamed[new] = with_new_keys(value, prefix=f"{prefix}{key}.", is_said=is_said)
        else:
            renamed[new] = value
    return renamed


def with_new_flags(words: Sequence[str]) -> list[str]:
    """Return the words of a command line in the new spelling: --data.keep-every=4, --train.no-image-rows-only."""
    return [_new_flag(word) if word.startswith("--") else word for word in words]


def _new_flag(word: str) -> str:
    name, equals, value = word.removeprefix("--").partition("=")
    group, dot, last = name.rpartition(".")
    # A switch is turned off by a `no-` in the last part of its name, which the table does not list.
    negation = last[:3] if last[:3] in ("no-", "no_") else ""
    old = f"{group}{dot}{last.removeprefix(negation)}"
    new = _new_key(old)
    if new == old:
        return word
    group, dot, last = new.rpartition(".")
    return f"--{group}{dot}{negation}{last}{equals}{value}"


def _new_key(key: str, *, is_said: bool = True) -> str:
    old = str(key).replace("-", "_")
    if old not in RENAMED:
        return key
    if is_said:
        _warn(old)
    return RENAMED[old]


@functools.cache  # once per process, though a study names a key in every arm
def _warn(old: str) -> None:
    # By the variable: the command line is read before the ranks of a job know one another.
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s is now %s; the old name works up to release %s.", old, RENAMED[old], LAST_RELEASE)
