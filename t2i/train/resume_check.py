"""A run's own proof that it resumes: the same steps trained at once, and in two halves with a resume between."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from safetensors import safe_open

from t2i.config import RunConfig
from t2i.distributed.collectives import on_first_rank
from t2i.distributed.ending import said_once_per_machine
from t2i.errors import Stopped, UserError
from t2i.model.backbone import weight_files
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.metrics_log import read_metrics
from t2i.train.main import train

BY_THE_CLOCK = (
    "tokens_per_second",
    "flops_per_second",
    "mfu",
    "seconds",
    "step_seconds",
    "data_seconds",
    "memory_bytes",
)
"""Values of a row that depend on the clock or the machine, so that two equal runs differ in them."""


def train_both(config: RunConfig, *, ds_config_path: Path, num_steps: int) -> tuple[Path, Path]:
    """Train num_steps at once and in two halves, below config.run_dir; return the two run folders.

    Every rank of a launched job calls this. Steps that are saved already are not trained again.

    Raises:
        UserError: the folder has a training of other length, or one that was stopped where it may not resume.
        Stopped: a stop was requested.
    """
    # Without evaluations and samples, which change no weight and take most of such a short run.
    quiet = replace(
        config.train, save_every=0, eval_every=0, sample_every=0, sample_prompts=None, eval_text=""
    )
    whole, halves = (
        replace(config, run_dir=config.run_dir / name, train=quiet) for name in ("whole", "halves")
    )
    with said_once_per_machine():
        _check_whole(whole.run_dir, num_steps=num_steps)
    for run, step in ((whole, num_steps), (halves, num_steps // 2), (halves, num_steps)):
        if checkpoints.last_step(run.run_dir) < step:
            with _stop_expected():
                train(run, ds_config_path=ds_config_path, stop_at=step)
            on_first_rank(partial(_check_reached, run.run_dir, step=step, is_whole=run is whole))
    return whole.run_dir, halves.run_dir


def _check_whole(run_dir: Path, *, num_steps: int) -> None:
    """Check that the training at once was not begun, or was not stopped and is as long as asked for."""
    reached = checkpoints.last_step(run_dir)
    if reached not in (0, num_steps):
        raise UserError(
            f"{run_dir} is at step {reached}; expected none or all of {num_steps} steps, trained at once. Remove"
            f" {run_dir.parent}, or choose another --run-dir."
        )


def _check_reached(run_dir: Path, *, step: int, is_whole: bool) -> None:
    """Check that a training came to its step: a stop that was asked for meanwhile ends it like the planned one."""
    reached = checkpoints.last_step(run_dir)
    if reached < step:
        first = f"remove {run_dir.parent}, for it is trained at once, and " if is_whole and reached else ""
        raise Stopped(f"Stopped at step {reached} of {step} in {run_dir}; {first}run the same command.")


def first_difference(found: Path, wanted: Path, *, step: int) -> str:
    """Name the first thing in which two runs are not equal bit for bit after `step`; empty if there is none."""
    return _differing_row(found, wanted) or _differing_checkpoint(
        *(checkpoints.step_folder(run, step) for run in (found, wanted))
    )


def _differing_row(found: Path, wanted: Path) -> str:
    for row, other in zip(read_metrics(found), read_metrics(wanted), strict=True):
        for key in set(other) - set(BY_THE_CLOCK):
            if row[key] != other[key]:
                return f"step {other['step']}: {key} is {row[key]} after resuming, {other[key]} without resuming."
    return ""


def _differing_checkpoint(found: Path, wanted: Path) -> str:
    resumed, other = (checkpoints.verify(folder) for folder in (found, wanted))
    for file in weight_files(wanted):  # several, of a large model
        with (
            safe_open(found / file.name, framework="pt") as ours,
            safe_open(file, framework="pt") as theirs,
        ):
            for name in theirs.keys():  # noqa: SIM118  (not a mapping)
                if not (ours.get_tensor(name) == theirs.get_tensor(name)).all():
                    distance = (ours.get_tensor(name) - theirs.get_tensor(name)).abs().max().item()
                    return f"weights of {name} differ by up to {distance:.2e} after {other.step} steps."
    for what, one, two in (
        ("the optimizer's moments", resumed.facts.optimizer_bits, other.facts.optimizer_bits),
        ("the place in the data", resumed.facts.loader, other.facts.loader),
    ):
        if one != two:
            return f"{what} differ after {other.step} steps: {one} after resuming, {two} without."
    return ""


@contextmanager
def _stop_expected() -> Iterator[None]:
    """Let a run end before max_steps, as requested; ranks after the first end by SystemExit."""
    try:
        yield
    except Stopped:
        pass
    except SystemExit as end:
        if end.code != Stopped.exit_code:
            raise
