"""How tyro reads our dataclasses: as by its own rules, but what is wrong is refused by our own sentences."""

from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from t2i.errors import UserError
from t2i.settings import bare, has_range, hints_of, range_of, texts_of
from t2i.verbs import as_typed

T = TypeVar("T")

REGISTRY = ConstructorRegistry()
PACKAGE = Path(__file__).parents[1]


class Refused(Exception):
    """A dataclass refused its values."""

    # Not a UserError: that is a ValueError, which tyro would put into a frame of its own among its usage text.

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.error = error


@REGISTRY.primitive_rule
def _as_given(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read numbers and choices; what is none stays text, which the check of settings refuses by its key."""
    choices = get_args(info.type) if info.type_origin is Literal else ()
    if info.type not in (int, float) and not choices:
        return None
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else info.type.__name__.upper()
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: words[0] if choices else _number(words[0], info.type),
        is_instance=lambda value: value in choices if choices else isinstance(value, int | info.type),
        str_from_instance=lambda value: [str(value)],
    )


def _number(word: str, kind: type[int] | type[float]) -> int | float | str:
    try:
        return kind(word)
    except ValueError:
        return word


@REGISTRY.primitive_rule
def _path_as_given(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read paths; an empty text, as of a shell's variable that is not set, stays one and is refused by its key."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(words[0]) if words[0] else "",
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


@REGISTRY.struct_rule
def _with_ranges(info: StructTypeInfo) -> StructConstructorSpec | None:
    # tyro's own dataclass is generic; ours have no parameters.
    if not is_dataclass(info.type) or getattr(info.type, "__parameters__", None):
        return None
    hints = hints_of(info.type)
    return StructConstructorSpec(
        instantiate=partial(_made, info.type),
        fields=tuple(
            StructFieldSpec(
                name=one.name,
                type=_with_hint(hints[one.name], text=texts_of(info.type).get(one.name, "")),
                default=_default(one, info.default),
                helptext=partial(_help, info.type, one.name),
            )
            for one in fields(info.type)
        ),
    )


def _made(kind: type[T], **values: object) -> T:
    try:
        return kind(**values)
    except UserError as error:
        raise Refused(error) from error


def _default(one: "Field[object]", given: object) -> object:
    """Find a field's default: that of the instance given for the whole group, else its own."""
    if is_dataclass(given):
        return getattr(given, one.name)
    if one.default is not MISSING:
        return one.default
    return tyro.MISSING if one.default_factory is MISSING else one.default_factory()


def _with_hint(hint: Any, *, text: str) -> Any:
    """Add to an annotation how its default is shown in --help."""
    if is_dataclass(bare(hint)):
        return hint
    # None is what stands for the default that the text names; to say both would say that there is none.
    is_said = "default" in text.lower()
    return Annotated[hint, tyro.conf.arg(help_behavior_hint=partial(_shown, is_said=is_said))]


def _shown(default: str, *, is_said: bool) -> str:
    if default in ("", "''", "None") and is_said:
        return ""
    # Where t2i lies on this machine is of no use to the reader.
    path = Path(default)
    own = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else default
    return f"(default: {own if default not in ('', repr('')) else 'empty'})"


def _help(kind: type, name: str) -> str:
    """Return a field's text and range for --help; a group has the text of its class."""
    hint = hints_of(kind)[name]
    text = as_typed(texts_of(kind).get(name) or (is_dataclass(hint) and hint.__doc__) or "")
    words = range_of(hint) if has_range(hint) else ""  # of tyro's own marks there are no words
    return f"{text} ({words})" if words else text
