"""Train a text-to-image language model.

Examples:
  deepspeed launchers/train.py --ds_config ds_configs/zero2.json
  python launchers/train.py --ds_config ds_configs/zero2_fp32.json --run-dir runs/mine --train.max-steps 400

With no --config it trains on the embedded emoji. Run the same command to resume.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from t2i.cli import parse
from t2i.config import RunConfig
from t2i.config.size import DEMO, PAPER


@dataclass(frozen=True)
class TrainCommand(RunConfig):
    """All settings of a run, and two files."""

    size: Annotated[int | None, Ge(DEMO), Le(PAPER)] = None
    """One number for width, layers, heads, learning rate and batch: 6 is the first demo, 24 the paper's model.
    Flags after it override what it sets. Default: what those flags say."""
    ds_config: Path = Path("ds_configs/zero2.json")
    """DeepSpeed JSON: ZeRO stage, precision, micro-batch size."""
    config: Path | None = None
    """YAML file of flags; flags on the command line override it."""


def main() -> None:
    command = parse(TrainCommand, description=__doc__ or "")
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank of a machine says it
        from t2i.runs.run_folder import check_place

        check_place(command.run_dir)  # before the seconds of importing torch and DeepSpeed
    from t2i.distributed.signals import stop_flag

    with stop_flag():  # importing takes seconds, in which a stop is a stop too
        from t2i.distributed.launch import prepare_environment

        prepare_environment()  # before DeepSpeed, which looks for its accelerator when it is imported
        from t2i.train.main import train

    config = RunConfig(run_dir=command.run_dir, data=command.data, model=command.model, train=command.train)
    train(config, ds_config_path=command.ds_config)
