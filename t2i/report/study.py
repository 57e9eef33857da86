"""A study as a short paper: report.md with figures beside it, and report.html with everything inside it."""

import time
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt

from t2i.cli import flags_of_mapping
from t2i.report.figures import to_svg
from t2i.report.sections.registry import Section, make_section
from t2i.runs.run_folder import ENVIRONMENT, environment
from t2i.study.jobs import Job, run_dir
from t2i.study.results import read_json
from t2i.study.spec import Study

MARKDOWN, HTML = Path(__file__).with_name("study.md.jinja"), Path(__file__).with_name("study.html.jinja")


def write_study_report(study: Study, jobs: list[Job], *, out: Path, command: str) -> Path:
    """Write report.md, report.html and figures from a study's files into its report's folder; return the page's path.

    Args:
        command: what makes it again.
    """
    to = study.report_dir(out)
    figures = to / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, arguments in enumerate(study.report, start=1):
        section = make_section(arguments, study=study, out=out)
        parts.append(_part(section, name=f"{number:02d}-{arguments['section']}", folder=figures))
    records = {job.name: read_json(out / "jobs" / f"{job.name}.json") for job in jobs}
    facts = {
        "study": study,
        "parts": parts,
        "records": records,
        "minutes": sum(record.get("seconds", 0) for record in records.values()) / 60,
        "failed": {name: one for name, one in records.items() if one.get("state") not in ("done", None)},
        "environment": environment(),
        "commits": _commits(study, out),
        "command": command,
        "flags": lambda settings: " ".join(flags_of_mapping(settings)),
        "date": time.strftime("%F"),
    }
    for template, name in ((MARKDOWN, "report.md"), (HTML, "report.html")):
        page = jinja2.Template(
            template.read_text(), autoescape=template is HTML, trim_blocks=True, lstrip_blocks=True
        ).render(**facts)
        (to / name).write_text(page + "\n")
    return to / "report.html"


def _commits(study: Study, out: Path) -> list[str]:
    """List the commits that runs were trained with; a page may be written by a later one."""
    found = {read_json(run_dir(out, *run) / ENVIRONMENT).get("commit", "") for run in study.runs()}
    return sorted(found - {""})


def _part(section: Section, *, name: str, folder: Path) -> dict[str, Any]:
    """Save a section's figure as PNG and SVG, and give the template what it shows."""
    part: dict[str, Any] = {"section": section, "svg": "", "png": ""}
    if section.figure is not None:
        section.figure.tight_layout()
        section.figure.savefig(folder / f"{name}.png", dpi=150)
        part["png"] = f"figures/{name}.png"
        part["svg"] = to_svg(section.figure)
        (folder / f"{name}.svg").write_text(part["svg"])
        plt.close(section.figure)
    return part
