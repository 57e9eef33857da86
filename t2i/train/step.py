"""One optimizer step: forward and backward over the global batch, one small read from the device, one update."""

import logging
import operator
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import deepspeed
import torch.distributed as dist
from torch import Tensor

from t2i.config import TrainConfig
from t2i.data.batching import COMPILED_POSITIONS, micro_batches
from t2i.data.loader import Batch, StepLoader
from t2i.distributed import faults
from t2i.distributed.collectives import any_rank, of_all_ranks
from t2i.distributed.signals import Requests
from t2i.model.loss import LossSums
from t2i.runs.metrics_log import MetricsRow
from t2i.tokens.sequence import next_token_labels
from t2i.train.deepspeed_internals import step_without_update
from t2i.train.guards import spike_score
from t2i.train.metrics import Speed, peak_memory_bytes, why_skipped
from t2i.train.progress import Progress
from t2i.train.schedule import learning_rate
from t2i.train.step_sums import Read, loss_row, number, read_step, tokens_of_all

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """One finished step, the same on every rank but for its times."""

    row: MetricsRow
    """For metrics.jsonl."""
    read: Read
    loss: float | None
    """Nats per token; None if not finite."""
    image_loss: float | None
    """Nats per image code; None if not finite, or without image codes."""
    is_spike: bool
    was_skipped: bool
    """The weights are as before."""


class Stepper:
    """Takes the optimizer steps of one run, on every rank together."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        engine: deepspeed.DeepSpeedEngine,
        loader: StepLoader,
        speed: Speed,
        requests: Requests,
    ) -> None:
        self.config = config
        self.engine = engine
        self.loader = loader
        self.speed = speed
        self.requests = requests
        self.layout = engine.module.layout

    def step(self, batches: Iterator[Batch], progress: Progress) -> StepResult:
        """Take one optimizer step over the global batch, and count it."""
        started = time.perf_counter()
        batch = next(batches)
        input_ids = batch["input_ids"]  # (B, S)
        data_seconds = time.perf_counter() - started
        labels = next_token_labels(input_ids, layout=self.layout)  # (B, S)
        parts = micro_batches(
            input_ids,
            labels,
            size=self.engine.train_micro_batch_size_per_gpu(),
            multiple=COMPILED_POSITIONS if self.config.compile else 1,
        )
        # The gradient's scale needs all ranks' tokens before the first backward. It stays on the device: no wait.
        total = tokens_of_all(labels, device=self.engine.device)
        # Not by DeepSpeed's scheduler: the schedule is a function of the step, so there is no state to resume.
        lr = learning_rate(progress.step, config=self.config)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        sums = self.accumulate(parts, total, step=progress.step + 1)
        faults.reach("step", step=progress.step + 1)
        read = self.agree(sums, positions=sum(ids.numel() for ids, _ in parts))
        losses = loss_row(read.sums)
        loss = losses["loss"]
        score = None if loss is None else spike_score(loss, progress.losses)
        is_spike = self.is_spike(score, step=progress.step + 1)
        was_skipped = self.update(read, is_spike=is_spike)
        num_sequences = len(input_ids) * dist.get_world_size()
        progress.count(num_sequences, tokens=read.tokens, loss=loss, was_skipped=was_skipped)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        grad_norm = self.engine.get_global_grad_norm()
        row: MetricsRow = {
            "step": progress.step,
            "epoch": self.loader.epoch,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "padded": read.positions - read.tokens,
            **losses,
            "lr": lr,
            "grad_norm": None if grad_norm is None else number(float(grad_norm)),
            "spike_score": score,
            "spike": is_spike,
            "skipped": was_skipped,
            **self.speed.row(num_tokens=read.tokens, seconds=seconds),
            "seconds": progress.seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "memory_bytes": peak_memory_bytes(self.engine.device),
        }
        if was_skipped:
            row["skipped_keys"] = of_all_ranks(list(batch["key"]))
            reason = why_skipped(loss, is_spike=is_spike)
            logger.warning("step %d changed no weight: %s", progress.step, reason)
        return StepResult(row, read, loss, losses["image_loss"], is_spike, was_skipped)

    def agree(self, sums: LossSums, *, positions: int) -> Read:
        """Read what all ranks found in this step, and what any of them was asked to do."""
        return read_step(
            sums,
            positions=positions,
            should_stop=self.requests.should_stop(),
            should_save=self.requests.should_save(),
        )

    def is_spike(self, score: float | None, *, step: int) -> bool:
        """Tell whether the loss spiked; if that has consequences, the same on every rank."""
        is_spike = score is not None and score > self.config.spike_score
        if is_spike:
            logger.warning("step %d: the loss is %.1f deviations above the recent ones", step, score)
        # Ranks that disagreed about an update would hold different weights from then on.
        return is_spike if self.config.spike == "log" else any_rank(is_spike)

    def update(self, read: Read, *, is_spike: bool) -> bool:
        """Update the weights, unless the loss is not finite or a spike to skip; tell whether it was skipped."""
        # DeepSpeed skips by itself where a gradient is not finite, so its own counter is asked.
        skipped_before = self.engine.skipped_steps
        if not read.is_finite or (is_spike and self.config.spike != "log"):
            step_without_update(self.engine)
        else:
            self.engine.step()
        return bool(self.engine.skipped_steps > skipped_before)

    def accumulate(self, parts: list[tuple[Tensor, Tensor]], total: Tensor, *, step: int) -> LossSums:
        """Run forward and backward over the micro-batches; return their summed losses and counts.

        Each rank's gradient is of sum * accumulation * world / total. DeepSpeed's two means turn this into the gradient
        of the mean over all tokens of all ranks, however unequal their counts.
        """
        engine = self.engine
        factor = faults.loss_factor(step=step)
        scale = (factor * engine.gradient_accumulation_steps() * dist.get_world_size() / total).float()
        found: list[LossSums] = []
        for index, (ids, wanted) in enumerate(parts):
            engine.set_gradient_accumulation_boundary(index == len(parts) - 1)
            loss, sums = engine(ids.to(engine.device), wanted.to(engine.device))
            engine.backward(loss * scale)
            # Within a batch this only counts; the last one is the update, which the read comes before.
            if index < len(parts) - 1:
                engine.step()
            found.append(sums)
        return reduce(operator.add, found).scaled(factor)
