"""Names of flags: those that a command has, what each takes, and the nearest to one that it has not."""

import difflib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import get_args

import tyro

from t2i.errors import UserError
from t2i.settings import Hint, bare, hints_of

POSITIONAL = get_args(tyro.conf.Positional[str])[1]
NOT_OURS = ("--help", "--tyro-")
"""How flags begin that tyro itself knows, such as those that write completions for a shell."""
SPELLINGS = ("true", "false", "yes", "no", "on", "off")
"""Words that other programs take as the value of a switch."""
LEAST_LIKENESS = 0.7
"""Of difflib's ratio, for a name to be suggested: --outt is 0.86 like --out and 0.6 like --layout."""


def flag_names(kind: type) -> set[str]:
    """List the flags of a dataclass, or of each of a union's, as tyro names them: train.max-steps, no-compile."""
    return set(flag_hints(kind))


def flag_hints(kind: type) -> dict[str, Hint]:
    """Map the flags of a dataclass, or of each of a union's, to the annotations of their fields."""
    kinds = [kind] if is_dataclass(kind) else get_args(kind)
    return {name.replace("_", "-"): hint for one in kinds for name, hint in _hints(one, prefix="")}


def _hints(kind: type, *, prefix: str) -> Iterator[tuple[str, Hint]]:
    for name, hint in hints_of(kind).items():
        inner, marks = bare(hint), getattr(hint, "__metadata__", ())
        if is_dataclass(inner):
            is_flat = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _hints(inner, prefix=prefix if is_flat else f"{prefix}{name}.")  # type: ignore[arg-type]
        elif POSITIONAL not in marks:
            yield f"{prefix}{name}", hint
            if is_switch(hint):
                yield f"{prefix}no-{name}", hint


def is_switch(hint: Hint) -> bool:
    """Tell whether a flag is given alone, or with `no-` in its name, and takes no value."""
    return bare(hint) is bool


def without_no(name: str) -> str:
    """Take the `no-` from the last part of a switch's name, which turns it off: train.no-compile -> train.compile."""
    group, dot, last = name.rpartition(".")
    return f"{group}{dot}{last.removeprefix('no-')}"


def check_names(words: Sequence[str], *, hints: Mapping[str, Hint]) -> None:
    """Refuse flags that a command does not have, and values of flags that take none.

    tyro would refuse them too, but among what else it misses, in a frame, and without the name that was meant.
    """
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    if any(name.startswith(NOT_OURS) for name in given):
        return
    unknown = [name for name in given if name[2:].replace("_", "-") not in hints]
    if unknown:
        meant = " ".join(
            f"There is no flag {name}{nearest(name, set(hints), form='--{}')}." for name in unknown
        )
        raise UserError(f"{meant} `{sys.argv[0]} --help` lists all flags.")
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if not (word.startswith("--") and is_switch(hints[name[2:].replace("_", "-")])):
            continue
        # A word behind a switch may be the name of a model, but hardly one of these.
        found = value if equals else following if following.lower() in SPELLINGS else None
        if found is not None:
            raise UserError(
                f"{name} has the value {found!r}; expected no value: the switch alone, or with `no-` before the last"
                " part of its name to turn it off."
            )


def check_left(words: Sequence[str], *, kind: type) -> None:
    """Refuse words that no flag and no place of a dataclass has taken."""
    if not words:
        return
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints_of(kind).items()}
    named = [
        next((mark.metavar for mark in found if getattr(mark, "metavar", None)), name.upper())
        for name, found in marks.items()
        if POSITIONAL in found
    ]
    places = f"{' and '.join(named)}, and all else" if named else "all"
    raise UserError(
        f"{shlex.join(words)}: no flag takes this. `{sys.argv[0]}` takes {places} behind the names of flags, which"
        f" `{sys.argv[0]} --help` lists."
    )


def nearest(name: str, known: set[str], *, form: str) -> str:
    """Suggest known names for one that is not, such as train.max-steps for max-stps."""
    wanted = name.removeprefix("--").replace("_", "-")
    # Without the group too: who leaves it out is nearer to other groups' short names than to the right one.
    ends = {one.rpartition(".")[2]: one for one in sorted(known)}
    close = [
        *([ends[wanted.rpartition(".")[2]]] if wanted.rpartition(".")[2] in ends else []),
        *difflib.get_close_matches(wanted, sorted(known), n=2, cutoff=LEAST_LIKENESS),
        *(
            ends[one]
            for one in difflib.get_close_matches(wanted.rpartition(".")[2], ends, n=1, cutoff=LEAST_LIKENESS)
        ),
    ]
    first = list(dict.fromkeys(close))[:2]
    return f"; perhaps you meant {' or '.join(map(form.format, first))}" if first else ""
