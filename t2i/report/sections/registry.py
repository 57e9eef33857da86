"""Sections of a study's report: each reads run folders and returns figures, a table and the sentence that follows."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t2i.errors import UserError
from t2i.report.sections import comparisons, curves, embeddings, images, language
from t2i.report.sections.section import Section
from t2i.study.spec import Study, nearest_name

KINDS: dict[str, Callable[..., Section]] = {
    "published": images.published,
    "reconstructions": images.reconstructions,
    "curves": curves.curves,
    "comparison": comparisons.comparison,
    "overview": comparisons.overview,
    "sizes": comparisons.sizes,
    "places": images.places,
    "conditioning": images.conditioning,
    "agreement": images.agreement,
    "alignment": embeddings.alignment,
    "nearest": embeddings.nearest,
    "probe": embeddings.probe,
    "pretraining": language.pretraining,
    "completions": language.completions,
    "forgetting": language.forgetting,
    "captions": language.captions,
    "shares": language.shares,
    "ends": curves.ends,
}


def make_section(arguments: dict[str, Any], *, study: Study, out: Path) -> Section:
    """Make one section from its entry in the study file.

    Raises:
        UserError: an unknown kind or argument.
    """
    kind, given = _call(arguments, study)
    section = KINDS[kind](study, out, **given)
    section.title, section.paper = arguments.get("title") or section.title, arguments.get("paper", "")
    return section


def check_sections(study: Study) -> None:
    """Check the report's sections before anything runs.

    Raises:
        UserError: an unknown kind or argument.
    """
    for arguments in study.report:
        _call(arguments, study)


def _call(arguments: dict[str, Any], study: Study) -> tuple[str, dict[str, Any]]:
    """Take an entry apart into its kind and the arguments of that."""
    given = {key: value for key, value in arguments.items() if key not in ("section", "title", "paper")}
    kind = arguments.get("section", "")
    if kind not in KINDS:
        raise UserError(f"{study.file}: report has a section {kind!r}; {nearest_name(kind, list(KINDS))}.")
    signature = inspect.signature(KINDS[kind])
    unknown = next((key for key in given if key not in signature.parameters), None)
    if unknown is not None:
        title, right = arguments.get("title") or kind, nearest_name(unknown, [*signature.parameters][2:])
        raise UserError(f"{study.file}: section {title}: no argument {unknown!r}; {right}.")
    try:
        signature.bind(study, Path(), **given)
    except TypeError as error:
        raise UserError(f"{study.file}: section {arguments.get('title') or kind}: {error}.") from error
    return kind, given
