"""Whether a value of a study file is of the kind that a field or an argument is annotated with."""

from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number such as 1.0e-4",
    bool: "true or false",
    NoneType: "nothing",
    list: "a list",
    dict: "names with values",
}


def misfit(value: object, kind: Any, *, name: str) -> str:
    """Say what of a value of YAML is of another kind; empty if nothing is.

    Args:
        kind: a class, a list, a mapping, a tuple (a list of that length) or a union. Any other, such as a name that is
            defined later, takes every value.
        name: of the value.
    """
    of, inner = get_origin(kind) or kind, get_args(kind)
    if of in (Union, UnionType):
        if {str, float} <= set(inner) and isinstance(value, str) and _is_number(value):
            # YAML takes 1.6e21 for a text, and it would be a folder's name here.
            return f"{name} is the text {value!r}; expected {WORDS[float]}, with a point and a sign."
        of_each = [misfit(value, one, name=name) for one in inner]
        if "" in of_each:
            return ""
        if inside := next((one for one in of_each if not one.startswith(f"{name} is ")), ""):
            return inside
        expected = " or ".join(WORDS.get(get_origin(one) or one, "another kind") for one in inner)
        return f"{name} is {value!r:.80}; expected {expected}."
    if of is tuple:
        if not isinstance(value, list) or len(value) != len(inner):
            return f"{name} is {value!r:.80}; expected a list of {len(inner)}."
        parts = [(f"{name}[{place}]", one, *inner[:1]) for place, one in enumerate(value)]
    elif of not in WORDS:
        return ""
    elif not _is_of(value, of):
        return f"{name} is {value!r:.80}; expected {WORDS[of]}."
    elif isinstance(value, list):
        parts = [(f"{name}[{place}]", one, *inner) for place, one in enumerate(value)]
    elif isinstance(value, dict):
        parts = [(f"the name {key!r} in {name}", key, inner[0]) for key in value]
        parts += [(f"{name}.{key}", one, inner[1]) for key, one in value.items()]
    else:
        return ""
    return next((said for part, one, of_part in parts if (said := misfit(one, of_part, name=part))), "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_of(value: object, kind: type) -> bool:
    # In Python a bool is an int, but `true` is no seed.
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
