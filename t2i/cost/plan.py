"""Plan a run before anything is spent: parameters, memory, time and disk.

Parameters and batches are counted with the run's own code. Memory and disk are estimates, which tests compare with
DeepSpeed's estimator and with real tensors. Time follows from a utilisation (MFU) that the caller assumes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig

from t2i.config import DataConfig, DsConfig, ModelConfig, PlanConfig, TrainConfig
from t2i.cost.assumptions import Data, known_data, model_config, num_text_rows
from t2i.cost.devices import Device, find_device
from t2i.cost.estimates import (
    Counts,
    Memory,
    checkpoint_bytes,
    count_parameters,
    estimate_memory,
    flops_a_token,
    least_step_seconds,
    muon_flops,
    num_checkpoints,
    weight_bytes,
)
from t2i.data.batching import accumulation, global_batch, num_text_sequences
from t2i.errors import UserError

START_SECONDS = 60
"""Importing, opening the model and the data, the first steps; a guess."""
SHARE_LEFT_FREE = 0.08
"""Share of a device's memory for CUDA's context, NCCL's buffers and fragmentation; a guess."""


@dataclass(frozen=True)
class Plan:
    """What a run consists of and needs."""

    init: str
    """model.init."""
    shards: Path
    seq_len: int
    max_steps: int
    num_checkpoints: int
    """The most that there are at a time."""
    is_checkpointed: bool
    """Whether the run uses gradient checkpointing."""
    asked: PlanConfig
    device: Device
    data: Data
    model: PretrainedConfig
    counts: Counts
    global_batch: int
    pairs_a_step: int
    """Sequences of a step that are no replayed text."""
    num_trained_on: int
    """Pairs that data.subsample_every leaves."""
    accumulation: int
    micro_batch: int
    memory: dict[bool, Memory]
    """Memory without (False) and with (True) gradient checkpointing, at this micro-batch."""
    largest_micro_batch: dict[bool, int]
    flops_a_token: float
    product_seconds: float
    """Seconds of a step's products, by the assumed utilisation."""
    least_seconds: float
    """Seconds that a step takes at least, whatever its products take; 0 on a CPU, where they decide."""
    checkpoint_bytes: float

    @property
    def tokens_a_step(self) -> int:
        """Tokens per optimizer step, including padding."""
        return self.global_batch * self.seq_len

    @property
    def step_seconds(self) -> float:
        """Seconds per optimizer step."""
        return max(self.product_seconds, self.least_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second on all devices, including padding."""
        return self.tokens_a_step / self.step_seconds

    @property
    def hours(self) -> float:
        """Hours from the command to its last step, without measures and checkpoints."""
        return (START_SECONDS + self.max_steps * self.step_seconds) / 3600


@dataclass(frozen=True)
class Work:
    """What one run computes: its model, and the cost of a token."""

    model: PretrainedConfig
    counts: Counts
    flops_per_token: float
    """Of a forward and a backward pass, which MFU counts."""
    executed_flops_per_token: float
    """With what gradient checkpointing computes again, which decides the time."""


def work_of(data: DataConfig, *, model: ModelConfig, known: Data, image_vocab_only: bool) -> Work:
    """Count a run's parameters and floating-point operations, without making any weight.

    Args:
        known: of the run's shards.
        image_vocab_only: train.image_vocab_only.
    """
    described = model_config(model, data=known, seq_len=data.seq_len, image_rows_only=image_vocab_only)
    counts = count_parameters(
        described,
        recipe=model.trainable,
        lora_rank=model.lora_rank,
        image_weights=model.image_weights,
        num_kept=num_text_rows(described),
    )
    flops = flops_a_token(described, counts=counts, seq_len=data.seq_len, replay_ratio=data.replay_ratio)
    # A forward pass is a third of a step's products, and checkpointing does it twice. MFU leaves the second out, so
    # that its gain in memory is not read as a gain in use.
    return Work(
        described,
        counts=counts,
        flops_per_token=flops,
        executed_flops_per_token=flops * (4 / 3 if model.gradient_checkpointing else 1),
    )


def make_plan(
    data: DataConfig,
    *,
    model: ModelConfig,
    train: TrainConfig,
    ds_config: DsConfig,
    plan: PlanConfig,
) -> Plan:
    """Count and estimate what a run of these settings needs on plan.num_gpus devices.

    Raises:
        UserError: a ZeRO stage that this does not know, embedded shards not made yet, or replayed text that the
            devices cannot share evenly.
    """
    _check_zero(ds_config)
    element, seq_len = weight_bytes(ds_config), data.seq_len
    device = find_device(plan.gpu, num_processes=plan.num_gpus, is_half=element == 2)
    known = known_data(data.shards, plan=plan)
    work = work_of(data, model=model, known=known, image_vocab_only=train.image_vocab_only)
    sequences = global_batch(train.global_batch_tokens, seq_len=seq_len, world_size=plan.num_gpus)
    num_text = num_text_sequences(data, global_batch=sequences, world_size=plan.num_gpus)
    limit = ds_config["train_micro_batch_size_per_gpu"]
    steps, micro_batch = accumulation(sequences // plan.num_gpus, micro_batch=limit)
    memory = partial(
        estimate_memory,
        work.model,
        counts=work.counts,
        ds_config=ds_config,
        num_gpus=plan.num_gpus,
        on_cpu=plan.gpu == "cpu",
        optimizer=train.optimizer,
    )
    return Plan(
        init=model.init,
        shards=data.shards,
        seq_len=seq_len,
        max_steps=train.max_steps,
        num_checkpoints=num_checkpoints(train)[1],
        is_checkpointed=model.gradient_checkpointing,
        asked=plan,
        device=device,
        data=known,
        model=work.model,
        counts=work.counts,
        global_batch=sequences,
        pairs_a_step=sequences - num_text,
        num_trained_on=-(-known.num_pairs // data.subsample_every),
        accumulation=steps,
        micro_batch=micro_batch,
        memory={
            flag: memory(num_tokens=micro_batch * seq_len, is_checkpointed=flag) for flag in (False, True)
        },
        largest_micro_batch={
            flag: largest_micro_batch(partial(memory, is_checkpointed=flag), seq_len=seq_len, device=device)
            for flag in (False, True)
        },
        flops_a_token=work.flops_per_token,
        product_seconds=(
            sequences * seq_len * work.executed_flops_per_token / plan.num_gpus
            + (muon_flops(work.counts, num_gpus=plan.num_gpus) if train.optimizer == "muon" else 0)
        )
        / (plan.mfu * device.peak_flops),
        least_seconds=0.0
        if plan.gpu == "cpu"
        else least_step_seconds(
            work.model,
            sequences=sequences // plan.num_gpus,
            accumulation=steps,
            num_workers=data.num_workers,
        ),
        checkpoint_bytes=checkpoint_bytes(work.counts, element_bytes=element, optimizer=train.optimizer),
    )


def largest_micro_batch(memory: Callable[..., Memory], *, seq_len: int, device: Device) -> int:
    """Count the sequences per micro-batch that fit in memory; 0 if not even one does.

    Args:
        memory: returns the memory for num_tokens; linear in it.
    """
    # Linear in the tokens, so that two values give the whole line.
    fixed = memory(num_tokens=0).total
    room = device.memory_bytes * (1 - SHARE_LEFT_FREE) - fixed
    return max(0, int(room / (memory(num_tokens=seq_len).total - fixed)))


def _check_zero(ds_config: DsConfig) -> None:
    zero = ds_config.get("zero_optimization", {})
    # Offloading moves the optimizer to another memory, and stage 3 the weights. The estimates know neither.
    offloads = [key for key in zero if key.startswith("offload")]
    if zero.get("stage") != 2 or offloads:
        found = f"stage {zero.get('stage', 0)}" + "".join(f" with {key}" for key in offloads)
        raise UserError(f"a plan is made for ZeRO stage 2 without offloading; the JSON has {found}.")
