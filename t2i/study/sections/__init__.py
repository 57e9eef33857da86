"""Sections of a study's report: each reads run folders and returns figures, a table and the sentence that follows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from t2i.errors import UserError
from t2i.study.grid import Study
from t2i.study.sections import language, pictures, rows, training
from t2i.study.sections.section import Section

KINDS: dict[str, Callable[..., Section]] = {
    "published": pictures.published,
    "reconstructions": pictures.reconstructions,
    "curves": training.curves,
    "comparison": training.comparison,
    "sizes": training.sizes,
    "places": pictures.places,
    "conditioning": pictures.conditioning,
    "agreement": pictures.agreement,
    "alignment": rows.alignment,
    "nearest": rows.nearest,
    "probe": rows.probe,
    "completions": language.completions,
    "forgetting": language.forgetting,
    "captions": language.captions,
    "shares": language.shares,
    "ends": training.ends,
}


def make_section(arguments: dict[str, Any], *, study: Study, out: Path) -> Section:
    """Make one section from its entry in the study file.

    Raises:
        UserError: an unknown kind or argument.
    """
    given = dict(arguments)
    kind, title, paper = given.pop("section", ""), given.pop("title", ""), given.pop("paper", "")
    if kind not in KINDS:
        raise UserError(f"{study.file}: report has a section {kind!r}; known are {', '.join(KINDS)}.")
    try:
        section = KINDS[kind](study, out, **given)
    except TypeError as error:
        raise UserError(f"{study.file}: section {title or kind}: {error}.") from error
    section.title, section.paper = title or section.title, paper
    return section
