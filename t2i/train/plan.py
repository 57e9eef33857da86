"""What a run will need, before anything is spent: parameters, memory, time, disk.

Parameters and batches are counted with the run's own code. Memory and disk are a model, which tests hold against
DeepSpeed's and against real tensors; time is arithmetic on a utilisation that somebody states.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i.config import EMBEDDED_SHARDS, PlanConfig, RunConfig
from t2i.data.shards import MANIFEST, read_manifest
from t2i.errors import UserError
from t2i.model.configuration_open_lm import OpenLMConfig
from t2i.tokens.vocab import VocabLayout
from t2i.train.build import random_model_config
from t2i.train.devices import Device, find_device
from t2i.train.engine import accumulation, global_batch
from t2i.train.estimates import (
    Counts,
    Memory,
    checkpoint_bytes,
    count_parameters,
    estimate_memory,
    flops_a_token,
    weight_bytes,
)

SHARE_LEFT_FREE = 0.08
"""Of a device's memory: CUDA's context, NCCL's buffers, fragments. A guess."""

CHARACTERS_A_TOKEN = 4.5
"""Of English captions under a BPE of 50,000; a guess."""

MDS_BYTES_A_PAIR = 45
"""The key, the sizes of the columns and the place in the shard's index."""


@dataclass(frozen=True)
class Data:
    """What a plan needs to know of the shards."""

    text_tokens: int
    """Ids of the text tokenizer."""
    codebook_size: int
    num_pairs: int
    shard_bytes: float
    are_made: bool
    """Read from the shards themselves, or assumed."""


@dataclass(frozen=True)
class Plan:
    """All that `describe` prints."""

    config: RunConfig
    asked: PlanConfig
    device: Device
    data: Data
    model: OpenLMConfig
    counts: Counts
    global_batch: int
    accumulation: int
    micro_batch: int
    memory: dict[bool, Memory]
    """Without and with gradient checkpointing, at this micro-batch."""
    largest_micro_batch: dict[bool, int]
    flops_a_token: float
    tokens_per_second: float
    checkpoint_bytes: float

    @property
    def tokens_a_step(self) -> int:
        """Padding included."""
        return self.global_batch * self.config.data.seq_len

    @property
    def step_seconds(self) -> float:
        """Of one optimizer step."""
        return self.tokens_a_step / self.tokens_per_second

    @property
    def hours(self) -> float:
        """Of the steps alone."""
        return self.config.train.max_steps * self.step_seconds / 3600


def make_plan(config: RunConfig, *, ds_config: dict[str, Any], plan: PlanConfig) -> Plan:
    """Count and estimate what `config` needs on plan.num_gpus devices.

    Raises:
        UserError: an unknown device, a ZeRO stage that this does not know, or embedded shards not made yet.
    """
    _check_zero(ds_config)
    element = weight_bytes(ds_config)
    device = find_device(plan.gpu, num_processes=plan.num_gpus, is_half=element == 2)
    data = known_data(config, plan=plan)
    model = model_config(config, data=data)
    counts = count_parameters(model)
    sequences = global_batch(config, world_size=plan.num_gpus)
    steps, micro_batch = accumulation(
        sequences // plan.num_gpus, micro_batch=ds_config["train_micro_batch_size_per_gpu"]
    )

    def memory(num_sequences: int, *, is_checkpointed: bool) -> Memory:
        return estimate_memory(
            model,
            counts=counts,
            ds_config=ds_config,
            num_gpus=plan.num_gpus,
            num_tokens=num_sequences * config.data.seq_len,
            is_checkpointed=is_checkpointed,
        )

    room = device.memory_bytes * (1 - SHARE_LEFT_FREE)
    largest = {}
    for is_checkpointed in (False, True):
        fixed = memory(0, is_checkpointed=is_checkpointed).total
        each = memory(1, is_checkpointed=is_checkpointed).total - fixed
        largest[is_checkpointed] = max(0, int((room - fixed) / each))
    flops = flops_a_token(model, counts=counts, seq_len=config.data.seq_len)
    # A forward pass is a third of a step's products; checkpointing does it twice.
    useful = 0.75 if config.model.gradient_checkpointing else 1.0
    return Plan(
        config=config,
        asked=plan,
        device=device,
        data=data,
        model=model,
        counts=counts,
        global_batch=sequences,
        accumulation=steps,
        micro_batch=micro_batch,
        memory={flag: memory(micro_batch, is_checkpointed=flag) for flag in (False, True)},
        largest_micro_batch=largest,
        flops_a_token=flops,
        tokens_per_second=plan.num_gpus * plan.mfu * useful * device.peak_flops / flops,
        checkpoint_bytes=checkpoint_bytes(counts, element_bytes=element),
    )


def _check_zero(ds_config: dict[str, Any]) -> None:
    zero = ds_config.get("zero_optimization", {})
    offloads = [key for key in zero if key.startswith("offload")]
    if zero.get("stage") != 2 or offloads:
        found = f"stage {zero.get('stage', 0)}" + "".join(f" with {key}" for key in offloads)
        raise UserError(f"a plan is made for ZeRO stage 2 without offloading; the JSON has {found}.")


def known_data(config: RunConfig, *, plan: PlanConfig) -> Data:
    """Read what the shards say, or take the plan's own numbers where they are not made yet.

    Raises:
        UserError: they are the embedded shards, whose numbers are not the plan's.
    """
    folder = config.data.shards
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return Data(
            text_tokens=manifest["text_tokenizer"]["num_tokens"],
            codebook_size=manifest["codebook_size"],
            num_pairs=sum(manifest["counts"].values()),
            shard_bytes=sum(path.stat().st_size for path in folder.rglob("*.mds*")),
            are_made=True,
        )
    if folder == EMBEDDED_SHARDS:
        raise UserError(
            f"{folder} is not made yet: python launchers/prepare.py --source openmoji --out {folder}"
        )
    return Data(
        text_tokens=plan.text_rows,
        codebook_size=plan.codebook_size,
        num_pairs=plan.num_pairs,
        shard_bytes=plan.num_pairs * pair_bytes(plan),
        are_made=False,
    )


def pair_bytes(plan: PlanConfig) -> float:
    """Estimate a pair's bytes in a shard: codes and caption ids of two or four bytes each, and the caption."""
    caption = plan.caption_tokens * (CHARACTERS_A_TOKEN + _id_bytes(plan.text_rows))
    return plan.codes_per_image * _id_bytes(plan.codebook_size) + caption + MDS_BYTES_A_PAIR


def _id_bytes(num_values: int) -> int:
    return 2 if num_values <= 2**16 else 4


def has_model_folder(config: RunConfig) -> bool:
    """Tell whether model.init names a folder that is there."""
    return (Path(config.model.init) / "config.json").is_file()


def model_config(config: RunConfig, *, data: Data) -> OpenLMConfig:
    """Describe the model that will learn, image rows included: model.init's if it is there, else of the given size."""
    if has_model_folder(config):
        model = OpenLMConfig.from_pretrained(config.model.init)
    else:
        model = random_model_config(
            config.model, num_text_tokens=data.text_tokens, seq_len=config.data.seq_len
        )
    layout = VocabLayout(
        num_text_rows=model.vocab_size, num_text_tokens=model.vocab_size, codebook_size=data.codebook_size
    )
    model.vocab_size = layout.vocab_size
    return model


def describe(plan: Plan) -> list[str]:
    """Write a plan out, a line each; what is estimated says so."""
    return [*_counted(plan), "", *_memory_lines(plan), "", *_time_lines(plan), "", *_disk_lines(plan)]


def _counted(plan: Plan) -> list[str]:
    config, counts, data = plan.config, plan.counts, plan.data
    is_sized = config.model.init != "random" and not has_model_folder(config)
    sized = f" (of model.hidden_size and so on: {config.model.init} is not there yet)" if is_sized else ""
    assumed = "" if data.are_made else f" (assumed: {config.data.shards} is not made yet)"
    per_rank, steps = plan.global_batch // plan.asked.num_gpus, config.train.max_steps
    return [
        f"model    {counts.total:,} parameters, {counts.learned:,} learned; {plan.model.vocab_size:,} rows{sized}",
        f"step     {plan.global_batch} sequences of {config.data.seq_len} = {plan.tokens_a_step:,} tokens;"
        f" {per_rank} a {plan.device.unit}, as {plan.accumulation} x {plan.micro_batch}",
        f"run      {steps:,} steps = {steps * plan.tokens_a_step:,} tokens,"
        f" {steps * plan.global_batch / data.num_pairs:.2f} times {data.num_pairs:,} pairs{assumed}",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    plain, checkpointed = plan.memory[False], plan.memory[True]
    room = plan.device.memory_bytes * (1 - SHARE_LEFT_FREE)
    chosen = plan.memory[plan.config.model.gradient_checkpointing]
    verdict = "fits" if chosen.total <= room else "does not fit"
    names = {
        "weights": "weights",
        "gradients": f"gradients, 1/{plan.asked.num_gpus}",
        "optimizer": f"fp32 weights and Adam, 1/{plan.asked.num_gpus}",
        "buckets": "buckets for reduction",
        "logits": "logits of a chunk, head's gradient",
        "activations": f"activations of {plan.micro_batch} sequences",
    }
    rows = [(label, getattr(plain, name), getattr(checkpointed, name)) for name, label in names.items()]
    return [
        f"{f'memory a {plan.device.unit}, estimated (GiB)':36}{'plain':>10}{'gradient checkpointing':>24}",
        *(f"  {label:34}{_gib(one):>10}{_gib(two):>24}" for label, one, two in rows),
        f"  {'together':34}{_gib(plain.total):>10}{_gib(checkpointed.total):>24}",
        f"  {'largest micro-batch':34}{plan.largest_micro_batch[False]:>10}{plan.largest_micro_batch[True]:>24}",
        f"  {_gib(chosen.total)} of {_gib(plan.device.memory_bytes)} GiB"
        f" with {SHARE_LEFT_FREE:.0%} kept free: {verdict}",
    ]


def _time_lines(plan: Plan) -> list[str]:
    device, num_gpus, price = plan.device, plan.asked.num_gpus, plan.asked.price
    cost = f"; {plan.hours * num_gpus * price:,.0f} dollars at {price:g} an hour" if price else ""
    return [
        f"time, estimated for {plan.asked.mfu:.0%} of {device.peak_flops / 1e12:.4g} TFLOP/s a {device.unit}"
        f" ({device.source})",
        f"  {plan.flops_a_token / 1e9:.3g} GFLOP a token;"
        f" {plan.tokens_per_second / num_gpus:,.0f} tokens/s a {device.unit}"
        f" and {plan.tokens_per_second:,.0f} in all, padding included; {plan.step_seconds:.3g} s a step",
        f"  {plan.hours:,.3g} hours = {plan.hours / 24:,.2f} days;"
        f" {plan.hours * num_gpus:,.4g} {device.unit} hours{cost}",
        "  not counted: start-up, waiting for data, held-out losses, sample grids, checkpoints, steps done again",
    ]


def _disk_lines(plan: Plan) -> list[str]:
    kept = plan.config.train.keep_last + 1
    origin = "as they are" if plan.data.are_made else "estimated"
    size = plan.checkpoint_bytes / 1e9
    return [
        f"disk     shards {plan.data.shard_bytes / 1e9:.3g} GB, {origin};"
        f" a checkpoint {size:.3g} GB, {kept} at a time {kept * size:.3g} GB, estimated"
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
