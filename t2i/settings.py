"""A setting's field says all about it: range, choices, whether it may change on resume, and its text.

    warmup_steps: Annotated[int, Ge(0), MAY_CHANGE] = 50
    \"\"\"Steps of linear warm-up.\"\"\"

The check of its value, the differences that stop a resume, --help and docs/settings.md are all made from the field.
"""

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MultipleOf

from t2i.errors import UserError

MAX_WHOLE = 2**63
"""Whole numbers stay below it: torch and numpy hold them in 64 bits."""

SIGNS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))

Hint = Any
"""An annotation with its metadata; typing has no type for one yet (PEP 747)."""


@dataclass(frozen=True)
class Mark:
    """A yes-or-no fact of a field."""

    name: str


MAY_CHANGE = Mark("may change on resume")
OR_ZERO = Mark("0 is allowed beside the range")


@dataclass(frozen=True)
class Names:
    """The allowed texts: one of these words, or a file with this extension."""

    words: tuple[str, ...]
    suffix: str


@dataclass(frozen=True)
class FormerDefault:
    """A default of earlier releases: a run that was begun under it resumes under today's."""

    value: object


def hints_of(kind: type) -> dict[str, Hint]:
    """Return the annotations of a dataclass with their metadata, by field."""
    hints = get_type_hints(kind, include_extras=True)
    return {one.name: hints[one.name] for one in fields(kind)}


def check_values(config: object, *, group: str = "") -> None:
    """Check each setting of a dataclass against its own annotation.

    Args:
        group: prefix of a run's keys, such as "train"; empty for flags without a group.

    Raises:
        UserError: one sentence per setting that is out of range, each with the full key.
    """
    # All at once: whoever waits in a queue for each run should not find them one by one.
    wrong = [
        f"{key_of(name, group=group)} is {value!r}; expected {expected(hint)}{_limit(value)}."
        for name, hint in hints_of(type(config)).items()
        if not fits(value := getattr(config, name), hint)
    ]
    if wrong:
        raise UserError(" ".join(wrong))


def key_of(name: str, *, group: str) -> str:
    """Name a setting as its user writes it: train.lr in a run file, --top-p on other command lines."""
    return f"{group}.{name}" if group else f"--{name.replace('_', '-')}"


def bare(hint: Hint) -> Any:
    """Take the range and other marks from an annotation: Annotated[int, Ge(1)] -> int."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def fits(value: object, hint: Hint) -> bool:
    """Tell whether an annotation allows a value; texts and groups are not checked, and of paths that there is one."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if not fits(value, arguments[0]):
            return False
        items = value if isinstance(value, tuple | list) else (value,)
        return all(_is_in_range(item, hint.__metadata__) for item in items)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple | list) and all(fits(item, arguments[0]) for item in value)
    if hint is NoneType:
        return value is None
    # bool is an int in Python, but `train.seed: true` in a run file is a mistake. numpy's integers are fine.
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < MAX_WHOLE
    if hint is float:
        # The difference of a finite number to itself is 0; that of nan or an infinity is not.
        return isinstance(value, Real) and not isinstance(value, bool) and value - value == 0
    # An empty path would be the folder that the command happens to run in.
    return hint is not Path or str(value) != ""


def _is_in_range(value: Any, metadata: tuple[object, ...]) -> bool:
    # Bounds are those of numbers; a word beside them, such as auto, was checked as a choice.
    is_choice = isinstance(value, str) and not any(isinstance(rule, Names) for rule in metadata)
    if value is None or is_choice or (OR_ZERO in metadata and value == 0):
        return True
    # Written as "not >=", so that a value which compares with nothing is out of range too.
    for rule in metadata:
        if isinstance(rule, Names) and not (value in rule.words or Path(value).suffix == rule.suffix):
            return False
        if isinstance(rule, MultipleOf) and value % rule.multiple_of:
            return False
        if isinstance(rule, Ge) and not value >= rule.ge:
            return False
        if isinstance(rule, Gt) and not value > rule.gt:
            return False
        if isinstance(rule, Le) and not value <= rule.le:
            return False
        if isinstance(rule, Lt) and not value < rule.lt:
            return False
    return True


def expected(hint: Hint) -> str:
    """Put into words what an annotation allows, such as "a whole number >= 1"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, none = _without_none(arguments[0])
        base, word = _without_word(base)
        return " ".join([expected(base), *_words(hint.__metadata__)]) + word + none
    if origin in (Union, UnionType):
        base, none = _without_none(hint)
        return expected(base) + none
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"for each {expected(arguments[0])}"
    return {int: "a whole number", float: "a number", bool: "yes or no", Path: "a path"}.get(hint, "a text")


def has_range(hint: Hint) -> bool:
    """Tell whether an annotation allows less than its type."""
    # Choices are not asked for here: tyro shows those of a Literal in --help by itself.
    origin = get_origin(hint)
    if origin is tuple:
        return has_range(get_args(hint)[0])
    return origin is Annotated and any(not isinstance(one, Mark) for one in hint.__metadata__)


def range_of(hint: Hint) -> str:
    """Put only the bounds into words, such as "from 1 to 1,000"."""
    while get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    return " ".join(_words(hint.__metadata__))


def _without_none(hint: Hint) -> tuple[Hint, str]:
    if get_origin(hint) not in (Union, UnionType) or NoneType not in get_args(hint):
        return hint, ""
    rest = [one for one in get_args(hint) if one is not NoneType]
    return rest[0], " or None"


def _without_word(hint: Hint) -> tuple[Hint, str]:
    """Part a number from the words that may stand in its place, such as auto."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, ""
    words = [one for one in get_args(hint) if get_origin(one) is Literal]
    rest = [one for one in get_args(hint) if get_origin(one) is not Literal]
    return rest[0], "".join(f" or {word}" for one in words for word in get_args(one))


def _words(metadata: tuple[object, ...]) -> Iterator[str]:
    bounds = {
        sign: f"{getattr(rule, attribute):,}"
        for rule in metadata
        for kind, attribute, sign in SIGNS
        if isinstance(rule, kind)
    }
    if set(bounds) == {">=", "<="}:
        yield f"from {bounds['>=']} to {bounds['<=']}"
    elif bounds:
        yield " and ".join(f"{sign} {bound}" for sign, bound in bounds.items())
    for rule in metadata:
        if isinstance(rule, MultipleOf):
            yield f"and a multiple of {rule.multiple_of}"
        if isinstance(rule, Names):
            yield f"among {', '.join(rule.words)} or the path of a {rule.suffix} file"
    if OR_ZERO in metadata:
        yield "or 0"


def _limit(value: object) -> str:
    # Said only where it matters: nearly nobody meets this bound, which every whole number has.
    return " and < 2^63" if isinstance(value, Integral) and abs(int(value)) >= MAX_WHOLE else ""


def may_change(hint: Hint) -> bool:
    """Tell whether a run may be resumed with another value of a setting."""
    return get_origin(hint) is Annotated and MAY_CHANGE in hint.__metadata__


def changed_settings(
    found: Mapping[str, object],
    wanted: Mapping[str, object],
    *,
    kind: type,
    by_content: Collection[str] = (),
    prefix: str = "",
) -> list[str]:
    """List the settings of `kind` that differ and may not change on resume, in words.

    A setting that is not in `found`, because it is newer than the run, counts as its default there.

    Args:
        by_content: full keys of paths that may be others; their content is compared elsewhere.
    """
    changed = []
    hints, defaults = hints_of(kind), default_values(kind)
    for key in {**found, **wanted}:
        if may_change(hints.get(key)) or f"{prefix}{key}" in by_content:
            continue
        old, new = found.get(key, defaults.get(key)), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and is_dataclass(hints.get(key)):
            changed += changed_settings(
                old, new, kind=hints[key], by_content=by_content, prefix=f"{prefix}{key}."
            )
        # Names on the hub have a prefix since 0.1.0: the same model, written anew.
        elif (
            old != new
            and new != f"hf:{old}"
            and not _both_are_defaults(hints.get(key), old, new, defaults.get(key))
            and not _are_one_place(old, new)
        ):
            changed.append(f"{prefix}{key} is {old} there, {new} here")
    return changed


def _both_are_defaults(hint: Hint, old: object, new: object, default: object) -> bool:
    marks = hint.__metadata__ if get_origin(hint) is Annotated else ()
    return new == default and FormerDefault(old) in marks


def _are_one_place(old: object, new: object) -> bool:
    """Tell whether two settings are paths, with a slash, of one file or folder that is there."""
    paths = [Path(text) for text in (old, new) if isinstance(text, str) and "/" in text and "\0" not in text]
    # Without a slash it may be a word, such as `random`.
    return len(paths) == 2 and all(path.exists() for path in paths) and paths[0].samefile(paths[1])


def default_values(kind: type) -> dict[str, object]:
    """Return the defaults of a dataclass as YAML writes them, without groups and fields that have none."""
    return {
        one.name: str(one.default) if isinstance(one.default, Path) else one.default
        for one in fields(kind)  # type: ignore[arg-type]  # a dataclass
        if one.default is not MISSING
    }


@cache
def texts_of(kind: type) -> dict[str, str]:
    """Read the text below each field of a dataclass and of the classes that it extends; lines are joined."""
    # From the source: Python keeps no docstrings of attributes, and tyro finds none through our own rule.
    texts: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if is_dataclass(one):
            texts |= _own_texts(one)
    return texts


def _own_texts(kind: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for line, below in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            texts[line.target.id] = " ".join(str(below.value.value).split())
    return texts
