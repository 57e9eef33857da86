"""The report of a study: report.md with figures beside it, and report.html with everything inside it."""

import functools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from t2i.cli import flags_of_mapping
from t2i.errors import CheckpointError, UserError
from t2i.files import read_optional_json
from t2i.report.figures import to_svg
from t2i.report.sections.registry import SECTIONS, make_section
from t2i.report.sections.section import Section
from t2i.runs.run_folder import ENVIRONMENT, environment
from t2i.study.jobs import Job, Record, read_record, run_dir
from t2i.study.spec import SectionSpec, Settings, Study

logger = logging.getLogger(__name__)

MARKDOWN, HTML = Path(__file__).with_name("study.md.jinja"), Path(__file__).with_name("study.html.jinja")


@dataclass(frozen=True)
class Part:
    """A section and its figure, for the templates."""

    section: Section
    png: str = ""
    """Path of its figure from the page; empty without a figure."""
    svg: str = ""
    """The figure itself."""


@dataclass(frozen=True)
class StudyPage:
    """All that the templates show."""

    study: Study
    parts: list[Part]
    failed: dict[str, Record]
    """Jobs that failed or were skipped, by name."""
    minutes: float
    """Of all processes together."""
    environment: dict[str, Any]
    """The machine that writes the page, as in environment.json."""
    commits: list[str]
    """Commits that runs were trained at; a page may be written by a later one."""
    command: str
    date: str

    @staticmethod
    def flags(settings: Settings) -> str:
        """Format settings as on a command line."""
        return " ".join(flags_of_mapping(settings))


def write_study_report(study: Study, jobs: list[Job], *, out: Path, command: str) -> Path:
    """Write report.md, report.html and figures into the report's folder; return the page's path.

    Args:
        command: the command that writes it again.
    """
    to = study.report_dir(out)
    figures = to / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    records = {job.name: read_record(out, job.name) for job in jobs}
    parts = [
        _part(_made(spec, study=study, out=out), name=f"{number:02d}-{spec.section}", folder=figures)
        for number, spec in enumerate(study.report, start=1)
    ]
    page = StudyPage(
        study=study,
        parts=parts,
        # Jobs not yet begun are no failures: a report may be written while workers run.
        failed={name: one for name, one in records.items() if one.state not in ("done", "open")},
        minutes=sum(record.seconds or 0 for record in records.values()) / 60,
        environment=environment(),
        commits=_commits(study, out),
        command=command,
        date=time.strftime("%F"),
    )
    _remove_other_figures(figures, {Path(part.png).stem for part in parts if part.png})
    (to / "report.md").write_text(rendered(page, MARKDOWN, is_html=False))
    (to / "report.html").write_text(rendered(page, HTML, is_html=True))
    return to / "report.html"


def _made(spec: SectionSpec, *, study: Study, out: Path) -> Section:
    """Make a section, or one that says why there is none: the others may stand on hours of runs."""
    try:
        return make_section(spec, study=study, out=out)
    except (UserError, CheckpointError) as error:
        logger.warning("the section %s could not be made: %s", spec.title or spec.section, error)
        return Section(spec.title or spec.section, f"This section could not be made: {error}")


def rendered(page: StudyPage, template: Path, *, is_html: bool) -> str:
    """Fill a template."""
    return _compiled(template, is_html).render(vars(page), flags=page.flags) + "\n"


@functools.cache
def _compiled(template: Path, is_html: bool) -> jinja2.Template:
    # Captions, completions and arms' names are anybody's text, so HTML escapes them all. Markdown stays as it is: what
    # shows it decides which HTML it lets through.
    return jinja2.Template(template.read_text(), autoescape=is_html, trim_blocks=True, lstrip_blocks=True)


def _commits(study: Study, out: Path) -> list[str]:
    """List the commits that runs were trained at."""
    # Of the runs and not of this checkout: a page may be written by a later commit.
    found = {read_optional_json(run_dir(out, *run) / ENVIRONMENT).get("commit", "") for run in study.runs()}
    return sorted(found - {""})


def _remove_other_figures(folder: Path, kept: set[str]) -> None:
    """Remove figures of sections that were moved or removed since; files with other names than a section's stay."""
    for kind in SECTIONS:
        for file in folder.glob(f"[0-9][0-9]-{kind}.*"):
            if file.suffix in (".png", ".svg") and file.stem not in kept:
                file.unlink()


def _part(section: Section, *, name: str, folder: Path) -> Part:
    """Save a section's figure as PNG and SVG."""
    if section.figure is None:
        return Part(section)
    section.figure.tight_layout()  # to_svg does it too, but the PNG is written first
    section.figure.savefig(folder / f"{name}.png", dpi=150)
    svg = to_svg(section.figure)
    (folder / f"{name}.svg").write_text(svg)
    return Part(section, png=f"figures/{name}.png", svg=svg)
