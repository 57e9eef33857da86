"""Icon sets in Iconify's JSON form, read with checks.

A set is one JSON file (`icons.json` of a package @iconify-json/NAME) with the SVG body of each icon, and with other
names for them. Its maker and licence stand in it or in `info.json` beside it.

Source: https://iconify.design/docs/types/iconify-json.html
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from t2i.data.sources.icon_drawing import Icon
from t2i.errors import DataError
from t2i.files import check_keys, read_json, read_optional_json

ICONS = "icons.json"
MAX_BODY = 2**21
"""Characters of an icon's SVG; the largest of the emoji sets has 0.9 million."""

OUTSIDE = re.compile(
    r"<(?:image|feImage|script|foreignObject)\b|href\s*=\s*[\"'](?!#|data:)|url\(\s*[\"']?(?!#|data:)"
)
"""What would make a drawing depend on other files, which a stranger's icon must not read."""

STYLES = re.compile(r"<style\b[^>]*>[^<]*url\(")
"""References by class, which are followed nowhere here."""

NO_PLACE = "an icon without a size or a place"
HIDDEN = "an icon that its set has withdrawn (hidden)"
ALIAS = "another name of an icon (alias)"


@dataclass(frozen=True)
class IconSet:
    """One icon set."""

    file: Path
    prefix: str
    """Short name, which keys begin with."""
    style: str
    """How captions name the set, such as "Noto"."""
    credit: str
    """Name, version, maker and licence."""
    icons: dict[str, Icon]
    """By name, sorted."""
    aliases: dict[str, str]
    """Other name -> the icon's."""
    code_points: dict[str, str]
    """Name -> code points, such as "1F419"; empty for sets that state none."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Entries that are no icons, by reason."""


def read_icon_set(file: Path) -> IconSet:
    """Read one set; its broken icons are counted.

    Raises:
        DataError: the file is no icon set.
    """
    values = read_json(file)
    check_keys(values, {"prefix": str, "icons": dict}, where=f"{file}, as Iconify's JSON form,")
    aliases = values.get("aliases") or {}
    if not isinstance(aliases, dict):
        raise DataError(f"{file}: aliases is {aliases!r:.80}; expected an object of keys.")
    info = values.get("info") or read_optional_json(file.with_name("info.json"))
    if not isinstance(info, dict):
        raise DataError(f"{file}: info is {info!r:.80}; expected an object of keys.")
    left_out: Counter[str] = Counter()
    icons, names = _icons(values, left_out), dict[str, str]()
    for name, one in aliases.items():
        _add_alias(str(name), one, aliases=aliases, icons=icons, names=names, left_out=left_out)
    if not icons:
        reasons = "; ".join(f"{count} times {reason}" for reason, count in left_out.items())
        raise DataError(f"{file} has no icon that can be drawn: {reasons or 'it is empty'}.")
    return IconSet(
        file,
        values["prefix"],
        style=_style(str(info.get("name") or values["prefix"].replace("-", " "))),
        credit=_credit(
            info, prefix=values["prefix"], package=read_optional_json(file.with_name("package.json"))
        ),
        icons=dict(sorted(icons.items())),
        aliases=names,
        code_points=_code_points(file.with_name("chars.json")),
        left_out=left_out,
    )


def _icons(values: Mapping[str, Any], left_out: Counter[str]) -> dict[str, Icon]:
    shared = _box(values, Icon(""))
    found: dict[str, Icon] = {}
    for name, one in values["icons"].items():
        icon = _icon(one, shared)
        if isinstance(icon, str):
            left_out[icon] += 1
        else:
            found[str(name)] = icon
    return found


def _icon(one: object, shared: Icon) -> Icon | str:
    """Read one icon, or return the reason that it is left out."""
    if not isinstance(one, dict) or not isinstance(one.get("body"), str) or not one["body"].strip():
        return "an icon without a body"
    if one.get("hidden") is True:
        return HIDDEN
    if len(one["body"]) > MAX_BODY:
        return f"an icon over {MAX_BODY:,} characters"
    if OUTSIDE.search(one["body"]):
        return "an icon that holds or names other images, files or scripts"
    if STYLES.search(one["body"]):
        return "an icon whose style sheet refers to elements"
    icon = _box(one, replace(shared, body=one["body"]))
    return icon if _has_place(icon) else NO_PLACE


def _has_place(icon: Icon) -> bool:
    sides = (icon.width, icon.height)
    return all(side > 0 for side in sides) and all(map(math.isfinite, (*sides, icon.left, icon.top)))


def _box(values: Mapping[str, Any], icon: Icon) -> Icon:
    """Take over the box and the turns that an icon, an alias or a whole set states."""

    def number(key: str, usual: float) -> float:
        value = values.get(key, usual)
        return float(value) if isinstance(value, int | float) and abs(value) < 1e9 else math.nan

    turns = values.get("rotate")
    return replace(
        icon,
        left=number("left", icon.left),
        top=number("top", icon.top),
        width=number("width", icon.width),
        height=number("height", icon.height),
        # Those of an alias come on top of its icon's.
        quarter_turns=(icon.quarter_turns + (turns if isinstance(turns, int) else 0)) % 4,
        is_flipped=icon.is_flipped ^ (values.get("hFlip") is True),
        is_upside_down=icon.is_upside_down ^ (values.get("vFlip") is True),
    )


def _add_alias(
    name: str,
    one: object,
    *,
    aliases: Mapping[str, Any],
    icons: dict[str, Icon],
    names: dict[str, str],
    left_out: Counter[str],
) -> None:
    """Add another name of an icon, or, where it turns the icon, another icon."""
    icon, steps = _resolved(name, aliases=aliases, icons=icons)
    if icon is None:
        left_out["an alias of an icon that is not kept"] += 1
    elif not _has_place(icon):
        left_out[NO_PLACE] += 1
    elif isinstance(one, dict) and one.get("hidden") is True:
        left_out[HIDDEN] += 1
    elif icon == icons[steps[-1]]:
        left_out[ALIAS] += 1
        names[name] = steps[-1]
    else:
        icons.setdefault(name, icon)


def _resolved(
    name: str, *, aliases: Mapping[str, Any], icons: Mapping[str, Icon]
) -> tuple[Icon | None, list[str]]:
    """Follow an alias to its icon; also return the names on the way."""
    steps = [name]
    while (one := aliases.get(steps[-1])) is not None:
        parent = one.get("parent") if isinstance(one, dict) else None
        if not isinstance(parent, str) or parent in steps:
            return None, steps
        steps.append(parent)
    icon = icons.get(steps[-1])
    if icon is None:
        return None, steps
    for step in reversed(steps[:-1]):
        icon = _box(aliases[step], icon)
    return icon, steps


def _code_points(file: Path) -> dict[str, str]:
    """Read which code points a set's names stand for; fonts of icons number theirs privately, which says nothing."""
    chars = read_optional_json(file)
    pairs = {str(name): str(points).upper() for points, name in chars.items()}
    return {name: points for name, points in pairs.items() if not _is_private(points)}


def _is_private(points: str) -> bool:
    try:
        values = [int(point, 16) for point in points.split("-")]
    except ValueError:
        return True
    return any(0xE000 <= value < 0xF900 or value >= 0xF0000 for value in values)


def _style(name: str) -> str:
    """Name a set's style: "Noto Emoji (v1)" -> "Noto v1"."""
    first, *rest = re.sub(r"[()]", "", name).split() or ["unnamed"]
    return " ".join([first, *(word for word in rest if word.lower() != "emoji")])


def _credit(info: Mapping[str, Any], *, prefix: str, package: Mapping[str, Any]) -> str:
    """Name a set, its version, its maker and its licence, as far as they are stated."""

    def stated(key: str, name: str, otherwise: str) -> str:
        value = info.get(key)
        return str(value.get(name) or otherwise) if isinstance(value, dict) else otherwise

    version = package.get("version") or info.get("version") or ""
    named = f"{info.get('name') or prefix} {version}".strip()
    author, licence = (
        stated("author", "name", "an unnamed maker"),
        stated("license", "title", "licence not stated"),
    )
    return f"{named} by {author} ({licence})"
