"""Prove on your own machines and settings that a run resumes as if it had never stopped.

Examples:
  deepspeed launchers/verify_resume.py --ds_config ds_configs/zero2.json --config launchers/configs/paper_1b.yaml
  python launchers/verify_resume.py --ds_config ds_configs/zero2_fp32.json --num-steps 6 --train.deterministic

It trains --num-steps steps at once, then half of them, starts anew from that checkpoint, and does the rest; then it
says `equal`, or the first difference with exit status 4. On GPUs, add --train.deterministic to rule out operators whose
sums have no fixed order. All of the run's own flags are taken; measures and samples are left out. The two runs are kept
in --run-dir and not repeated by the same command.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from t2i.cli import parse
from t2i.config import RunConfig
from t2i.config.size import DEMO, PAPER
from t2i.errors import UserError


@dataclass(frozen=True)
class VerifyCommand(RunConfig):
    """The run and its number of steps."""

    run_dir: Path = Path("runs/verify_resume")
    """Folder for the two runs."""
    num_steps: Annotated[int, Ge(2)] = 20
    """Steps of the whole run; it stops after half of them."""
    size: Annotated[int | None, Ge(DEMO), Le(PAPER)] = None
    """One number for width, layers, heads, learning rate and batch: 6 is the first demo, 24 the paper's model.
    Flags after it override what it sets. Default: what those flags say."""
    ds_config: Path = Path("ds_configs/zero2.json")
    """DeepSpeed JSON of the run."""
    config: Path | None = None
    """YAML file of the run's flags."""


def main() -> None:
    command = parse(VerifyCommand, description=__doc__ or "")
    if command.num_steps > command.train.max_steps:
        raise UserError(
            f"--num-steps is {command.num_steps}; expected at most train.max_steps {command.train.max_steps}."
        )
    from t2i.distributed.signals import stop_flag

    with stop_flag():  # importing takes seconds, in which a stop is a stop too
        import torch.distributed as dist

        from t2i.distributed.launch import prepare_environment

        prepare_environment()  # before DeepSpeed, which looks for its accelerator when it is imported
        from t2i.train.resume_check import first_difference, train_both

    config = RunConfig(run_dir=command.run_dir, data=command.data, model=command.model, train=command.train)
    whole, halves = train_both(config, ds_config_path=command.ds_config, num_steps=command.num_steps)
    if dist.is_initialized() and dist.get_rank():
        return
    difference = first_difference(halves, whole, step=command.num_steps)
    if difference:
        print(f"Not equal. {difference} The two runs are in {command.run_dir}.", file=sys.stderr)
        sys.exit(4)
    print(
        f"equal: {command.num_steps} steps, their metrics, weights, the optimizer's moments and place in the data"
    )
