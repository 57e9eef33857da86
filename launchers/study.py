"""Run a study: a grid of training runs and their measures, to a report like a short paper.

Examples:
  python launchers/study.py launchers/studies/smoke.yaml
  python launchers/study.py launchers/studies/mini.yaml --plan
  sbatch --array=0-7 --gres=gpu:8 --wrap "python launchers/study.py mine.yaml --out /shared/mine"

A killed study goes on with the same command; finished runs are not repeated. Several of the same command, here or on
other machines with the folder, share the work.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from t2i.cli import parse
from t2i.errors import run_command


@dataclass(frozen=True)
class StudyCommand:
    """Which study, to where."""

    study: tyro.conf.Positional[Path]
    """Study file; launchers/studies/ has some."""
    out: Path | None = None
    """Folder of runs and report; by default runs/NAME of the study file."""
    plan: bool = False
    """Only print what it will take."""
    report: bool = False
    """Only write the report of what is there."""


def main() -> None:
    command = parse(StudyCommand, description=__doc__ or "")
    from t2i.study.grid import jobs_of, read_study

    out = command.out or Path("runs") / command.study.stem
    study = read_study(command.study)
    jobs = jobs_of(study, out=out)
    if command.plan:
        print_plan(study, num_jobs=len(jobs), out=out)
        return
    if not command.report:
        from t2i.study.work import work

        records = work(jobs, study=study, out=out)
        for name, record in records.items():
            if record["state"] != "done":
                print(f"{name}: {record['state']}; see {out / 'logs' / name}.log")
    from t2i.study.study_report import write_study_report

    again = f"python launchers/study.py {shlex.quote(str(command.study))} --out {shlex.quote(str(out))}"
    print(f"Open {write_study_report(study, jobs, out=out, command=again)} in a browser.")


def print_plan(study: Any, *, num_jobs: int, out: Path) -> None:
    from t2i.study.price import measured_flops, prices

    priced = prices(study, out=out, flops_a_second=measured_flops())
    for one in priced:
        kind = "it took" if one.is_measured else "about"
        print(
            f"{one.name:32s} {one.tokens:>14,} tokens  {one.flops:.2e} FLOPs  {kind} {one.seconds / 60:.1f} minutes"
        )
    tokens, flops = sum(one.tokens for one in priced), sum(one.flops for one in priced)
    minutes = sum(one.seconds for one in priced) / 60
    print(
        f"{len(priced)} runs, {tokens:,} tokens, {flops:.2e} FLOPs, {minutes:.0f} minutes of training on this machine"
    )
    print(f"and {num_jobs - len(priced)} steps and measures beside them.")


if __name__ == "__main__":
    run_command(main)
