"""All kinds of sections that a study's report may have."""

import inspect
from pathlib import Path

from t2i.errors import UserError
from t2i.report.sections import (
    alignments,
    budgets,
    comparisons,
    curves,
    embeddings,
    images,
    language,
    law,
    overviews,
    scores,
    slopes,
    tokenizers,
    tuning,
    wordings,
)
from t2i.report.sections.section import Section, SectionKind
from t2i.study.kinds import misfit
from t2i.study.spec import SectionSpec, Study, nearest_name

SECTIONS: dict[str, SectionKind] = {
    kind.name: kind
    for kind in (
        *curves.SECTIONS,
        *comparisons.SECTIONS,
        *overviews.SECTIONS,
        *slopes.SECTIONS,
        *budgets.SECTIONS,
        *law.SECTIONS,
        *tuning.SECTIONS,
        *wordings.SECTIONS,
        *tokenizers.SECTIONS,
        *images.SECTIONS,
        *scores.SECTIONS,
        *alignments.SECTIONS,
        *embeddings.SECTIONS,
        *language.SECTIONS,
    )
}


def make_section(spec: SectionSpec, *, study: Study, out: Path) -> Section:
    """Make one section from its entry in the study file.

    Raises:
        UserError: an unknown kind or argument.
    """
    _check(spec, study)
    section = SECTIONS[spec.section].make(study, out, **spec.arguments)
    section.title, section.paper = spec.title or section.title, spec.paper
    return section


def check_sections(study: Study) -> None:
    """Check the report's sections before anything runs.

    Raises:
        UserError: an unknown kind or argument.
    """
    for spec in study.report:
        _check(spec, study)


def arguments_of(kind: SectionKind) -> list[str]:
    """List the arguments that an entry of this kind may have."""
    return [*inspect.signature(kind.make).parameters][2:]  # after the study and its folder


def _check(spec: SectionSpec, study: Study) -> None:
    if spec.section not in SECTIONS:
        right = nearest_name(spec.section, list(SECTIONS))
        raise UserError(f"{study.file}: report has a section {spec.section!r}; {right}.")
    kind, where = SECTIONS[spec.section], f"{study.file}: section {spec.title or spec.section}"
    known = arguments_of(kind)
    if unknown := [name for name in spec.arguments if name not in known]:
        raise UserError(f"{where}: no argument {unknown[0]!r}; {nearest_name(unknown[0], known)}.")
    try:
        inspect.signature(kind.make).bind(study, Path(), **spec.arguments)
    except TypeError as error:  # an argument without a default is missing
        raise UserError(f"{where}: {error}.") from error
    for name, parameter in inspect.signature(kind.make).parameters.items():
        value = spec.arguments.get(name, parameter.default)
        if name not in spec.arguments or value == parameter.default:
            continue
        said = misfit(value, parameter.annotation, name=name)
        if said or value in ([], {}):
            raise UserError(f"{where}: {said or f'{name} is empty; expected at least one.'}")
    if kind.check is not None:
        kind.check(study, **spec.arguments)
