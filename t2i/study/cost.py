"""The cost of a study before it runs: tokens, floating-point operations, disk, and time on named machines."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from t2i.config import ASSETS, Gpu, ModelConfig, PlanConfig, RunConfig
from t2i.cost.assumptions import known_data
from t2i.cost.devices import find_device
from t2i.cost.estimates import checkpoint_bytes, least_step_seconds, num_checkpoints, weight_bytes
from t2i.cost.plan import START_SECONDS, work_of
from t2i.data.batching import accumulation, global_batch
from t2i.files import read_json
from t2i.study.inputs import training_runs
from t2i.study.jobs import read_record
from t2i.study.spec import Study
from t2i.tokens.text import TextTokenizer
from t2i.train.ds_config import read_ds_config

SIZE = ("family", "hidden_size", "num_layers", "num_heads", "norm_type", "qk_norm")
"""Settings of model that say what is trained, not how."""


@dataclass(frozen=True)
class StepShape:
    """What decides how long a run's steps take at least."""

    model: PretrainedConfig
    steps: int
    sequences: int
    """Per step."""
    micro_batch: int
    num_workers: int
    is_half: bool = False
    """Trained in bf16, as the study's DeepSpeed JSON says."""

    def least_seconds(self, *, num_gpus: int) -> float:
        """Estimate the least time of all steps on so many GPUs."""
        per_rank = -(-self.sequences // num_gpus)
        each = least_step_seconds(
            self.model,
            sequences=per_rank,
            accumulation=accumulation(per_rank, micro_batch=self.micro_batch)[0],
            num_workers=self.num_workers,
        )
        return self.steps * each


@dataclass(frozen=True)
class RunCost:
    """One training run."""

    name: str
    tokens: int
    """Including padding."""
    flops: float
    """Of forward and backward passes, as MFU counts them."""
    executed_flops: float
    """With what gradient checkpointing computes again."""
    shape: StepShape
    disk_bytes: float
    """Size of the checkpoints that it keeps once it is done: weights alone."""
    training_bytes: float
    """Size of its checkpoints while it trains, with the state of the optimizer."""
    took_seconds: float | None
    """None if the run is not done."""


def run_costs(study: Study, *, out: Path) -> list[RunCost]:
    """Count every training run, including those among the steps; runs that are done have their time."""
    ds_config = read_ds_config(Path(study.ds_config))
    element, micro_batch = weight_bytes(ds_config), ds_config["train_micro_batch_size_per_gpu"]
    # Shards of a study are made by its own steps, so they are seldom there when the plan is asked for.
    assumed: dict[str, Any] = dict(study.assumed)
    plan = replace(_embedded(), **assumed)
    runs = training_runs(study, out=out)
    # What has begun is no model yet either.
    unmade = {
        config.run_dir: config.model
        for name, config in runs.items()
        if read_record(out, name).state != "done"
    }
    return [
        _cost(
            name,
            replace(config, model=_sized(config.model, unmade)),
            plan=plan,
            element_bytes=element,
            micro_batch=micro_batch,
            out=out,
        )
        for name, config in runs.items()
    ]


def cost_lines(
    costs: list[RunCost], *, machines: list[tuple[Gpu, int]], mfu: float, price: float = 0.0
) -> list[str]:
    """Describe a study's cost, a line per run, and the time that runs not done yet take on each machine.

    Args:
        machines: name and number of devices, as seconds_on takes them.
        price: dollars per GPU-hour; 0 for no cost.
    """
    lines = [
        f"{one.name:32s} {one.tokens:>16,} tokens  {one.flops:.2e} FLOPs  {one.disk_bytes / 1e9:>9.3g} GB"
        + ("" if one.took_seconds is None else f"  took {one.took_seconds / 60:.1f} minutes")
        for one in costs
    ]
    tokens, flops, disk = (
        sum(getattr(one, key) for one in costs) for key in ("tokens", "flops", "disk_bytes")
    )
    training = max(one.training_bytes for one in costs) if costs else 0.0
    lines.append(
        f"{len(costs)} runs, {tokens:,} tokens, {flops:.2e} FLOPs, {disk / 1e9:.3g} GB of checkpoints in the end;"
        f" a run that trains takes up to {training / 1e9:.3g} GB, and the state of the optimizer goes when it is done"
    )
    # What is done is done once for all: a study that shares its base's runs has only its own to pay for.
    left = [one for one in costs if one.took_seconds is None]
    for name, count in machines:
        minutes = seconds_on(left, gpu=name, num_gpus=count, mfu=mfu) / 60
        on_cpu = "bf16" if any(one.shape.is_half for one in left) else "fp32"
        where = f"this machine's CPU, {on_cpu}" if name == "cpu" else f"{count} x {name}, bf16"
        time = f"{minutes:,.0f} minutes" if minutes < 600 else f"{minutes / 60:,.0f} hours"
        dollars = f"; {minutes / 60 * count * price:,.2f} dollars" if price and name != "cpu" else ""
        lines.append(f"  about {time} of training left, at {mfu:.0%} of the peak of {where}{dollars}")
    return lines


def seconds_on(costs: list[RunCost], *, gpu: Gpu, num_gpus: int, mfu: float) -> float:
    """Estimate the time of all runs, one after another, on num_gpus GPUs in bf16, or as they are on this `cpu`."""
    is_half = gpu != "cpu" or any(one.shape.is_half for one in costs)
    device = find_device(gpu, num_processes=num_gpus, is_half=is_half)
    # One after another on all devices: side by side, on fewer each, they would take as long in all.
    products = (one.executed_flops / (device.peak_flops * num_gpus * mfu) for one in costs)
    least = (0.0 if gpu == "cpu" else one.shape.least_seconds(num_gpus=num_gpus) for one in costs)
    return sum(START_SECONDS + max(pair) for pair in zip(products, least, strict=True))


def _sized(model: ModelConfig, unmade: dict[Path, ModelConfig]) -> ModelConfig:
    """Give a start that a step of the study has yet to make the size that the step will give it.

    Args:
        unmade: run folder of a step -> what it trains.
    """
    named = Path(model.init)  # a run folder, or a checkpoint within
    start = next((unmade[path] for path in (named, *named.parents) if path in unmade), None)
    if start is None:
        return model
    # A start that is drawn at random has a name still: whatever needs a loaded model, such as a control, stays valid.
    sized = replace(model, **{name: getattr(start, name) for name in SIZE})
    if start.init == "random":
        return replace(sized, init=f"{model.init} (not made yet)")
    return _sized(replace(sized, init=start.init), unmade)


def _cost(
    name: str, config: RunConfig, *, plan: PlanConfig, element_bytes: int, micro_batch: int, out: Path
) -> RunCost:
    known, seq_len = known_data(config.data.shards, plan=plan), config.data.seq_len
    work = work_of(
        config.data, model=config.model, known=known, image_vocab_only=config.train.image_vocab_only
    )
    # Of one rank: how many a study is run on is not known here, and a step has as many tokens on any number.
    sequences = global_batch(config.train.global_batch_tokens, seq_len=seq_len, world_size=1)
    tokens = config.train.max_steps * sequences * seq_len
    record = read_record(out, name)
    kept, most = num_checkpoints(config.train)
    return RunCost(
        name=name,
        tokens=tokens,
        flops=tokens * work.flops_per_token,
        executed_flops=tokens * work.executed_flops_per_token,
        shape=StepShape(
            work.model,
            config.train.max_steps,
            sequences,
            micro_batch,
            config.data.num_workers,
            is_half=element_bytes == 2,
        ),
        disk_bytes=kept * element_bytes * work.counts.total,
        training_bytes=most * checkpoint_bytes(work.counts, element_bytes=element_bytes),
        took_seconds=record.seconds if record.state == "done" else None,
    )


def _embedded() -> PlanConfig:
    """Describe the embedded images and tokenizers, which a study's own shards are made of."""
    tokenizer = read_json(ASSETS / "image_tokenizer" / "config.json")
    return PlanConfig(
        text_vocab_size=TextTokenizer.load(ASSETS / "text_tokenizer").num_tokens,
        codebook_size=tokenizer["num_vq_embeddings"],
        codes_per_image=64,
        num_pairs=3_500,
    )
