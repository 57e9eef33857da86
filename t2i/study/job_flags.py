"""The flags of a study's steps and measures, read before anything runs as their own commands will read them."""

import difflib
import re
import sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from t2i.cli import read_flags
from t2i.errors import UserError
from t2i.settings import check_values
from t2i.shipped import SHIPPED
from t2i.study.jobs import Job, run_name
from t2i.study.spec import Study
from t2i.verbs import SCRIPTS

PLACES = ("out", "run")
"""What braces of a study file stand for."""
BRACES = re.compile(r"\{(\w+)\}")
ALIKE = 0.8
"""Of difflib's ratio, for a place to be suggested: `runn` is 0.86 like `run`, `count` 0.75 like `out`."""


def check_job_flags(study: Study, jobs: list[Job]) -> None:
    """Refuse flags that a step's or a measure's command does not take: a measure's turn comes after all training.

    Commands of one's own, and those whose flags are in a file, are left to themselves.

    Raises:
        UserError: a flag that does not exist, is missing or out of range, or braces that stand for nothing.
    """
    # Of a measure's jobs the first: the others differ in their run alone.
    first = [
        f"{measure.name}-{run_name(arm, seed)}"
        for measure in study.measures
        for arm in [*(measure.arms or study.arms)][:1]
        for seed in (measure.seeds or study.seeds_of(arm))[:1]
    ]
    named = {*(step.name for step in study.steps), *first}
    for job in jobs:
        if job.name in named:
            _check(job, where=f"{study.file}: {job.name}")


def _check(job: Job, *, where: str) -> None:
    script, *words = job.command
    verb = next((verb for verb, known in SCRIPTS.items() if known == script), "")
    # A file of that name that is here is the user's own, and comes first.
    if not verb or (Path(script).exists() and not Path(script).samefile(SHIPPED / script)):
        return
    for word in words:
        for name in BRACES.findall(word):
            if name in PLACES:
                raise UserError(
                    f"{where} has {{{name}}} in {word}; it stands for a run, which only measures have."
                )
            if close := difflib.get_close_matches(name, PLACES, n=1, cutoff=ALIKE):
                raise UserError(f"{where} has {{{name}}} in {word}; perhaps {{{close[0]}}} was meant.")
    # Training steps are read with their settings, for what they cost.
    if verb == "train" or any(word.partition("=")[0] == "--config" for word in words):
        return
    kind, words = _kind_of(verb, words)
    try:
        check_values(read_flags(kind, words))
    except UserError as error:
        # The list of flags that the sentence may name is that of this command.
        raise UserError(
            f"{where}: {str(error).replace(f'`{sys.argv[0]} --help`', f'`{script} --help`')}"
        ) from error
    except SystemExit as error:  # tyro has printed which flag, and exits as if this were the command itself
        raise UserError(
            f"{where} lacks a flag that {script} needs, or has one without a value; which is said above."
        ) from error


def _kind_of(verb: str, words: list[str]) -> tuple[Any, list[str]]:
    """Return the dataclass that a command reads its words into, and the words that it reads."""
    module = import_module(f"t2i.commands.{verb.replace('-', '_')}")
    if verb == "tokenizer":
        return module.Train | module.Evaluate, words
    if verb == "convert":
        return module.OpenLm | module.Gguf | module.Movqgan | module.Llamagen | module.OpenLmBack, words
    if verb == "score" and words[:1] in (["compare"], ["judge"]):
        return (module.CompareCommand if words[0] == "compare" else module.JudgeCommand), words[1:]
    own = [
        one
        for name, one in vars(module).items()
        if name.endswith("Command") and is_dataclass(one) and one.__module__ == module.__name__
    ]
    return own[0], words
