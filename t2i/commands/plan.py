"""Estimate what a run needs: parameters, memory per GPU, days, cost and disk.

Examples:
  python launchers/plan.py --config launchers/configs/paper_1b.yaml --gpu a100-80gb --num-gpus 64 --price 2
  python launchers/plan.py --ds_config ds_configs/zero2_fp32.json --gpu cpu --mfu 0.7

It takes all flags of the run too: `--train.max-steps 1000` plans a shorter one. Nothing is trained.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge, Le

from t2i.cli import parse
from t2i.config import PlanConfig, RunConfig
from t2i.config.size import DEMO, PAPER


@dataclass(frozen=True)
class PlanCommand(RunConfig):
    """The run, the machine and the price."""

    size: Annotated[int | None, Ge(DEMO), Le(PAPER)] = None
    """One number for width, layers, heads, learning rate and batch: 6 is the first demo, 24 the paper's model.
    Flags after it override what it sets. Default: what those flags say."""
    ds_config: Path = Path("ds_configs/zero2.json")
    """DeepSpeed JSON of the run."""
    config: Path | None = None
    """YAML file of the run's flags."""
    plan: Annotated[PlanConfig, tyro.conf.arg(name="")] = field(default_factory=PlanConfig)


def main() -> None:
    command = parse(PlanCommand, description=__doc__ or "")
    from t2i.cost.description import describe
    from t2i.cost.plan import make_plan
    from t2i.train.ds_config import read_ds_config

    plan = make_plan(
        command.data,
        model=command.model,
        train=command.train,
        ds_config=read_ds_config(command.ds_config),
        plan=command.plan,
    )
    print("\n".join(describe(plan)))
