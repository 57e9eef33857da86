"""Run a study: a grid of training runs and their measures, with a report like a short paper.

Examples:
  python launchers/study.py launchers/studies/smoke.yaml
  python launchers/study.py launchers/studies/mini.yaml --plan --gpu a100-80gb h100-80gb
  python launchers/study.py launchers/studies/fair.yaml --ds_config zero2_fp32.json
  python launchers/study.py mine.yaml --out /shared/mine --launcher slurm --workers 8 --sbatch="--gres=gpu:8"

Run the same command to resume. Finished runs are not repeated, and jobs that failed are tried again. The exit status is
that of the first job that failed, else 0. Several copies of the command, also on other machines with the same folder,
share the work.
"""

import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Gt, Le

from t2i.cli import parse
from t2i.config import Gpu
from t2i.errors import UserError
from t2i.shipped import find_shipped
from t2i.verbs import command_line, is_typed_as_verb

SCRIPT = Path("launchers/study.py")


@dataclass(frozen=True)
class StudyCommand:
    """The study, its workers and its report."""

    study: tyro.conf.Positional[Path]
    """Study file; t2i ships some, in launchers/studies/."""
    out: Path | None = None
    """Folder for runs and report. Default: runs/NAME of the study file, or of its base."""
    ds_config: str = ""
    """DeepSpeed's JSON of all training in place of the file's, such as zero2_fp32.json on a processor without bf16."""
    plan: bool = False
    """Only print what the study will need."""
    gpu: tuple[Gpu, ...] = ()
    """GPUs that --plan estimates the time for, beside this machine."""
    num_gpus: Annotated[int, Ge(1), Le(1_000_000)] = 1
    """GPUs of each kind, for --plan."""
    mfu: Annotated[float, Gt(0), Le(1)] = 0.4
    """Share of a device's peak that training reaches, for --plan: a guess until measured."""
    price: Annotated[float, Ge(0), Le(1_000_000)] = 0.0
    """US dollars per GPU-hour, for --plan; 0 for no cost."""
    report: bool = False
    """Only write the report of finished runs."""
    jobs_only: bool = False
    """Write no report; another worker will."""
    launcher: Literal["local", "slurm"] = "local"
    """Where workers run: as processes here, which share the GPUs out, or as a Slurm array job."""
    workers: Annotated[int, Ge(1), Le(10_000)] = 1
    """Number of workers."""
    sbatch: Annotated[str, tyro.conf.arg(metavar="OPTIONS")] = ""
    """Options for sbatch, as one word after an equals sign: --sbatch="--gres=gpu:8 --time=8:00:00"."""


def main() -> None:
    command = parse(StudyCommand, description=__doc__ or "")
    from t2i.report.sections.registry import check_sections
    from t2i.study.inputs import missing_inputs
    from t2i.study.job_flags import check_job_flags
    from t2i.study.jobs import jobs_of, read_study
    from t2i.study.runner import gpus_to_share, local_workers, submit

    options = sbatch_options(command)
    study = read_study(find_shipped(command.study), ds_config=command.ds_config)
    out = command.out or study.default_out()
    check_sections(study)
    jobs = jobs_of(study, out=out)
    flags = [str(command.study), "--out", str(out)]
    flags += ["--ds_config", command.ds_config] if command.ds_config else []
    again = [
        sys.executable,
        # By its whole name: workers begin where this command was typed, which may be outside the checkout.
        *(["-m", "t2i", "study"] if is_typed_as_verb() else [str(find_shipped(SCRIPT).resolve())]),
        *flags,
    ]
    if not command.report:
        check_job_flags(study, jobs)
    missing = [] if command.report and not command.plan else missing_inputs(study, out=out)
    if missing and not command.plan:
        raise UserError(f"{command.study}: {'; '.join(missing)}.")
    if command.plan:
        for one in missing:
            print(f"{one}: the plan takes the sizes that the study's settings and `assumed` state.")
        print_plan(study, command, num_jobs=len(jobs), out=out)
    elif command.launcher == "slurm" and not command.report:
        print(submit(again, count=command.workers, options=options, out=out))
        print(f"The report, when it has ended or before: {command_line('study', *flags, '--report')}")
    else:
        status = 0
        if not command.report:
            gpus = gpus_to_share(study) if command.workers > 1 else []
            with local_workers([*again, "--jobs-only"], count=command.workers - 1, gpus=gpus):
                status = work_through(study, out=out)
        if not command.jobs_only:
            report(study, jobs, out=out, again=command_line("study", *flags))
        sys.exit(status)


def sbatch_options(command: StudyCommand) -> list[str]:
    if command.jobs_only and command.launcher == "slurm":
        raise UserError(
            "--jobs-only is for a worker, and --launcher slurm starts workers; leave one of them out."
        )
    try:
        return shlex.split(command.sbatch)
    except ValueError as error:
        raise UserError(f"--sbatch is {command.sbatch!r}, which a shell could not read: {error}.") from error


def work_through(study: Any, *, out: Path) -> int:
    from t2i.study.jobs import jobs_of
    from t2i.study.runner import exit_status, work

    records = work(partial(jobs_of, study, out=out), study=study, out=out)
    for name, record in records.items():
        if record.state != "done":
            log = out / "logs" / f"{name}.log"
            print(f"{name}: {record.state}; {record.reason or f'see {log}'}")
    return exit_status(records.values())


def report(study: Any, jobs: Any, *, out: Path, again: str) -> None:
    from t2i.report.study import write_study_report

    print(f"Open {write_study_report(study, jobs, out=out, command=again)} in a browser.")


def print_plan(study: Any, command: StudyCommand, *, num_jobs: int, out: Path) -> None:
    from t2i.study.cost import cost_lines, run_costs

    machines = [("cpu", 1), *((name, command.num_gpus) for name in command.gpu)]
    costs = run_costs(study, out=out)
    print("\n".join(cost_lines(costs, machines=machines, mfu=command.mfu, price=command.price)))
    print(f"and {num_jobs - len(costs)} steps and measures beside them.")
