"""Write docs/settings.md from the fields themselves: `python -m t2i.config > docs/settings.md`."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from t2i.config import (
    AlignConfig,
    DataConfig,
    ModelConfig,
    PlanConfig,
    PrepareConfig,
    RunConfig,
    SampleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from t2i.config.renamed import LAST_RELEASE, RENAMED
from t2i.settings import expected, hints_of, key_of, may_change, texts_of

PARTS: tuple[tuple[str, str, type], ...] = (
    ("Run (`launchers/train.py`)", "", RunConfig),
    ("Data", "data", DataConfig),
    ("Model", "model", ModelConfig),
    ("Training", "train", TrainConfig),
    ("Alignment (`launchers/align.py`)", "align", AlignConfig),
    ("Sources (`launchers/prepare.py`, `launchers/tokenizer.py`)", "", SourceConfig),
    ("Shards (`launchers/prepare.py`)", "", PrepareConfig),
    ("Plans (`launchers/plan.py`)", "", PlanConfig),
    ("Sampling (`launchers/sample.py`, `eval/coco_fid.py`)", "", SampleConfig),
    ("Image tokenizer (`launchers/tokenizer.py train`)", "", TokenizerConfig),
)
"""Heading, prefix of the names, and the class."""

RUN_PARTS = (RunConfig, DataConfig, ModelConfig, TrainConfig)
"""Classes that resolved.yaml holds and a resume compares."""

HEAD = """# Settings

Every setting, with its default and range. A value out of range is refused before anything else is done (exit status
2). On the command line `_` and `-` mean the same: `--train.max-steps 400`. A run file (`--config FILE.yaml`) holds the
same keys, nested. This page is generated from `t2i/config/` by `python -m t2i.config > docs/settings.md`.

On resume, only the settings that say *yes* below may have another value. Any other difference is listed and refused.
"""


def page() -> str:
    """Return the page in Markdown."""
    return "\n".join([HEAD, *(line for part in PARTS for line in _part(*part)), *_old_names()]) + "\n"


def _part(heading: str, group: str, kind: type) -> Iterator[str]:
    is_run = kind in RUN_PARTS
    texts, hints = texts_of(kind), hints_of(kind)
    columns = [
        "setting",
        "default",
        "range or choices",
        *(["may change on resume"] if is_run else []),
        "meaning",
    ]
    yield f"## {heading}\n\n{kind.__doc__}\n"
    yield _row(columns)
    yield _row(["---"] * len(columns))
    for one in fields(kind):  # type: ignore[arg-type]  # a dataclass
        hint = hints[one.name]
        if is_dataclass(hint):
            continue  # a group has its own table
        # Other commands do not resume from a file of settings, so the column would be empty there.
        resume = ["yes" if may_change(hint) else "no"] if is_run else []
        key = f"`{key_of(one.name, group=group)}`"
        yield _row([key, _default(one), expected(hint), *resume, texts[one.name]])
    yield ""


def _old_names() -> Iterator[str]:
    yield "## Old names\n"
    yield f"These still work up to release {LAST_RELEASE}, with a warning.\n"
    yield _row(["old", "now"])
    yield _row(["---", "---"])
    for old, new in RENAMED.items():
        yield _row([f"`{_key(old)}`", f"`{_key(new)}`"])


def _key(name: str) -> str:
    return name if "." in name else key_of(name, group="")


def _default(one: "Field[Any]") -> str:
    if one.default is MISSING:
        return ""
    if isinstance(one.default, tuple):
        return f"`{' '.join(map(str, one.default))}`"
    return "empty" if one.default == "" else f"`{one.default}`"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page(), end="")
