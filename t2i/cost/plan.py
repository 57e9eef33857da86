"""What a run will need, before anything is spent: parameters, memory, time, disk.

Parameters and batches are counted with the run's own code. Memory and disk are a model, which tests hold against
DeepSpeed's and against real tensors; time is arithmetic on a utilisation that somebody states.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from t2i.config import EMBEDDED_SHARDS, EMBEDDED_VIEWS, PlanConfig, RunConfig
from t2i.cost.devices import Device, find_device
from t2i.cost.estimates import (
    Counts,
    Memory,
    checkpoint_bytes,
    count_parameters,
    estimate_memory,
    flops_a_token,
    weight_bytes,
)
from t2i.data.batching import accumulation, global_batch
from t2i.data.shards.manifest import MANIFEST, read_manifest
from t2i.errors import UserError
from t2i.model.backbone import random_model_config, read_model_config
from t2i.runs.loading import find
from t2i.tokens.vocab import VocabLayout
from t2i.train.main import check_numbers

SHARE_LEFT_FREE = 0.08
"""Of a device's memory: CUDA's context, NCCL's buffers, fragments. A guess."""

CHARACTERS_A_TOKEN = 4.5
"""Of English captions under a BPE of 50,000; a guess."""

KEY_BYTES, MDS_BYTES_A_PAIR = 12, 24
"""A key, which is a guess, and the columns' sizes with the pair's place, which a test measures."""


@dataclass(frozen=True)
class Data:
    """What a plan needs to know of the shards."""

    text_tokens: int
    """Ids of the text tokenizer."""
    codebook_size: int
    """0 for shards of text alone."""
    codes_per_image: int
    num_pairs: int
    """To train on."""
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
    model: PretrainedConfig
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
        UserError: an unknown device, impossible numbers, a ZeRO stage that this does not know, or embedded shards
            not made yet.
    """
    check_numbers(config.train)
    _check(ds_config, plan)
    element = weight_bytes(ds_config)
    device = find_device(plan.gpu, num_processes=plan.num_gpus, is_half=element == 2)
    data = known_data(config, plan=plan)
    model = model_config(config, data=data)
    counts = count_parameters(
        model, recipe=config.model.learn, lora_rank=config.model.lora_rank, num_kept=num_text_rows(model)
    )
    memory = partial(estimate_memory, model, counts=counts, ds_config=ds_config, num_gpus=plan.num_gpus)
    seq_len, sequences = config.data.seq_len, global_batch(config, world_size=plan.num_gpus)
    limit = ds_config["train_micro_batch_size_per_gpu"]
    steps, micro_batch = accumulation(sequences // plan.num_gpus, micro_batch=limit)
    flops = flops_a_token(model, counts=counts, seq_len=seq_len, text_mix=config.data.text_mix)
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
        memory={
            flag: memory(num_tokens=micro_batch * seq_len, is_checkpointed=flag) for flag in (False, True)
        },
        largest_micro_batch={
            flag: largest_micro_batch(partial(memory, is_checkpointed=flag), seq_len=seq_len, device=device)
            for flag in (False, True)
        },
        flops_a_token=flops,
        tokens_per_second=plan.num_gpus * plan.mfu * useful * device.peak_flops / flops,
        checkpoint_bytes=checkpoint_bytes(counts, element_bytes=element),
    )


def largest_micro_batch(memory: Callable[..., Memory], *, seq_len: int, device: Device) -> int:
    """Count the sequences whose activations fit beside the rest; 0 if not even one does.

    Args:
        memory: of num_tokens, in which it is linear.
    """
    fixed = memory(num_tokens=0).total
    room = device.memory_bytes * (1 - SHARE_LEFT_FREE) - fixed
    return max(0, int(room / (memory(num_tokens=seq_len).total - fixed)))


def _check(ds_config: dict[str, Any], plan: PlanConfig) -> None:
    if plan.num_gpus < 1 or not 0 < plan.mfu <= 1 or not 0 <= plan.price < inf:
        raise UserError(
            f"--num-gpus is {plan.num_gpus}, --mfu {plan.mfu} and --price {plan.price}; wanted are at least 1, above 0"
            " up to 1, and at least 0."
        )
    for key in ("text_rows", "codebook_size", "codes_per_image", "num_pairs", "caption_tokens"):
        if getattr(plan, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} is {getattr(plan, key)}; wanted is at least 1.")
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
            text_tokens=manifest.text_tokenizer.num_tokens,
            codebook_size=manifest.codebook_size,
            codes_per_image=manifest.codes_per_image,
            num_pairs=manifest.counts["train"],
            shard_bytes=sum(path.stat().st_size for path in folder.rglob("*.mds*")),
            are_made=True,
        )
    if folder == EMBEDDED_SHARDS:
        raise UserError(
            f"{folder} is not made yet: python launchers/prepare.py --source openmoji"
            f" --views {EMBEDDED_VIEWS} --out {folder}"
        )
    return Data(
        text_tokens=plan.text_rows,
        codebook_size=plan.codebook_size,
        codes_per_image=plan.codes_per_image,
        num_pairs=plan.num_pairs,
        shard_bytes=plan.num_pairs * pair_bytes(plan),
        are_made=False,
    )


def pair_bytes(plan: PlanConfig) -> float:
    """Estimate a pair's bytes in a shard: codes and caption ids of two or four bytes each, and the caption."""
    caption = plan.caption_tokens * (CHARACTERS_A_TOKEN + _id_bytes(plan.text_rows))
    return plan.codes_per_image * _id_bytes(plan.codebook_size) + caption + KEY_BYTES + MDS_BYTES_A_PAIR


def _id_bytes(num_values: int) -> int:
    return 2 if num_values <= 2**16 else 4


def is_there(config: RunConfig) -> bool:
    """Tell whether model.init is on this disk."""
    return config.model.init != "random" and Path(config.model.init).exists()


def model_config(config: RunConfig, *, data: Data) -> PretrainedConfig:
    """Describe the model that will learn, image rows included: model.init's if it is here, else of the given size."""
    model: PretrainedConfig
    if is_there(config):
        folder, _ = find(config.model.init)
        model = read_model_config(folder)
    else:
        model = random_model_config(
            config.model, num_text_tokens=data.text_tokens, seq_len=config.data.seq_len
        )
    if data.codebook_size:
        rows = num_text_rows(model)
        model.vocab_layout = VocabLayout(rows, rows, codebook_size=data.codebook_size).to_dict()
        model.vocab_size = VocabLayout(**model.vocab_layout).vocab_size
        model.codes_per_image, model.image_rows_only = data.codes_per_image, config.train.image_rows_only
    return model


def num_text_rows(model: PretrainedConfig) -> int:
    """Count the rows of text, which are all of a model that has not met pictures."""
    layout: dict[str, int] = getattr(model, "vocab_layout", None) or {}
    return layout.get("num_text_rows", model.vocab_size)


def describe(plan: Plan) -> list[str]:
    """Write a plan out, a line each; what is estimated says so."""
    return [*_counted(plan), "", *_memory_lines(plan), "", *_time_lines(plan), "", *_disk_lines(plan)]


def _counted(plan: Plan) -> list[str]:
    config, counts, data = plan.config, plan.counts, plan.data
    is_sized = config.model.init != "random" and not is_there(config)
    sized = f" (of model.hidden_size and so on: {config.model.init} is not here)" if is_sized else ""
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
    verdict = f"{SHARE_LEFT_FREE:.0%} kept free: {'fits' if chosen.total <= room else 'does not fit'}"
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
        f"  {_gib(chosen.total)} of {_gib(plan.device.memory_bytes)} GiB with {verdict}",
    ]


def _time_lines(plan: Plan) -> list[str]:
    device, asked, hours = plan.device, plan.asked, plan.hours
    each, in_all = plan.tokens_per_second / asked.num_gpus, plan.tokens_per_second
    cost = (
        f"; {hours * asked.num_gpus * asked.price:,.0f} dollars at {asked.price:g} an hour"
        if asked.price
        else ""
    )
    return [
        f"time, estimated for {asked.mfu:.0%} of {device.peak_flops / 1e12:.4g} TFLOP/s a {device.unit}"
        f" ({device.source})",
        f"  {plan.flops_a_token / 1e9:.3g} GFLOP a token; {each:,.0f} tokens/s a {device.unit}, {in_all:,.0f} in all,"
        f" padding included; {plan.step_seconds:.3g} s a step",
        f"  {hours:,.1f} hours = {hours / 24:,.2f} days; {hours * asked.num_gpus:,.1f} {device.unit} hours{cost}",
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
