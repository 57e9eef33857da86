"""What a study will take, before it runs: tokens, floating-point operations, disk, and time on named machines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i.config import ASSETS, Gpu, PlanConfig, RunConfig
from t2i.cost.assumptions import known_data, model_config, num_text_rows
from t2i.cost.devices import find_device
from t2i.cost.estimates import checkpoint_bytes, count_parameters, flops_a_token, weight_bytes
from t2i.data.batching import global_batch
from t2i.files import read_json
from t2i.study.jobs import read_record, run_config, run_name, step_config
from t2i.study.spec import TRAIN, Study
from t2i.tokens.text import TextTokenizer
from t2i.train.ds_config import read_ds_config


@dataclass(frozen=True)
class RunCost:
    """One training run."""

    name: str
    tokens: int
    """Padding included."""
    flops: float
    disk_bytes: float
    """Its checkpoints when it is done."""
    took_seconds: float | None
    """None if it is not done."""


def run_costs(study: Study, *, out: Path) -> list[RunCost]:
    """Count every training run, those among the steps too; what is done has its time."""
    element = weight_bytes(read_ds_config(Path(study.ds_config)))
    # Shards of a study are made by its own steps, so they are seldom there when the plan is asked for.
    plan = PlanConfig(**{**_embedded(), **study.assumed})
    runs = {step.name: step_config(step, out=out) for step in study.steps if step.command == TRAIN}
    runs |= {
        run_name(arm, seed): run_config(study, arm=arm, seed=seed, out=out) for arm, seed in study.runs()
    }
    return [_cost(name, config, plan=plan, element_bytes=element, out=out) for name, config in runs.items()]


def cost_lines(costs: list[RunCost], *, machines: list[tuple[Gpu, int]], mfu: float) -> list[str]:
    """Write a study's cost out, a line per run, and the time of what is not done on each machine.

    Args:
        machines: name and number of devices, as seconds_on takes them.
    """
    lines = [
        f"{one.name:32s} {one.tokens:>16,} tokens  {one.flops:.2e} FLOPs  {one.disk_bytes / 1e9:>9.3g} GB"
        + ("" if one.took_seconds is None else f"  took {one.took_seconds / 60:.1f} minutes")
        for one in costs
    ]
    tokens, flops, disk = (
        sum(getattr(one, key) for one in costs) for key in ("tokens", "flops", "disk_bytes")
    )
    lines.append(
        f"{len(costs)} runs, {tokens:,} tokens, {flops:.2e} FLOPs, {disk / 1e9:.3g} GB of checkpoints"
    )
    left = [one for one in costs if one.took_seconds is None]
    for name, count in machines:
        minutes = seconds_on(left, gpu=name, num_gpus=count, mfu=mfu) / 60
        where = "this machine's CPU, fp32" if name == "cpu" else f"{count} x {name}, bf16"
        time = f"{minutes:,.0f} minutes" if minutes < 600 else f"{minutes / 60:,.0f} hours"
        lines.append(f"  about {time} of training still to do, at {mfu:.0%} of the peak of {where}")
    return lines


def seconds_on(costs: list[RunCost], *, gpu: Gpu, num_gpus: int, mfu: float) -> float:
    """Estimate the time of all runs, one after another on num_gpus GPUs in bf16, or on `cpu`, here, in fp32."""
    device = find_device(gpu, num_processes=num_gpus, is_half=gpu != "cpu")
    # One after another on all devices: side by side on fewer each would take as long in all.
    return sum(one.flops for one in costs) / (device.peak_flops * num_gpus * mfu)


def _cost(name: str, config: RunConfig, *, plan: PlanConfig, element_bytes: int, out: Path) -> RunCost:
    settings, seq_len = config.model, config.data.seq_len
    model = model_config(
        settings,
        data=known_data(config.data.shards, plan=plan),
        seq_len=seq_len,
        image_rows_only=config.train.image_vocab_only,
    )
    counts = count_parameters(
        model, recipe=settings.trainable, lora_rank=settings.lora_rank, num_kept=num_text_rows(model)
    )
    sequences = global_batch(config.train.global_batch_tokens, seq_len=seq_len, world_size=1)
    tokens = config.train.max_steps * sequences * seq_len
    record = read_record(out, name)
    return RunCost(
        name=name,
        tokens=tokens,
        flops=tokens
        * flops_a_token(model, counts=counts, seq_len=seq_len, replay_ratio=config.data.replay_ratio),
        disk_bytes=config.train.keep_last * checkpoint_bytes(counts, element_bytes=element_bytes),
        took_seconds=record.seconds if record.state == "done" else None,
    )


def _embedded() -> dict[str, Any]:
    """Describe the embedded images and tokenizers, which a study's own shards are made of."""
    tokenizer = read_json(ASSETS / "image_tokenizer" / "config.json")
    return {
        "text_vocab_size": TextTokenizer.load(ASSETS / "text_tokenizer").num_tokens,
        "codebook_size": tokenizer["num_vq_embeddings"],
        "codes_per_image": 64,
        "num_pairs": 3_500,
    }
