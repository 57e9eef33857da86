"""The training loop: whole optimizer steps, one small read from the device a step, and periodic work as callables."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from t2i.config import RunConfig
from t2i.data.batching import micro_batches
from t2i.data.loader import Batch, StepLoader
from t2i.distributed import faults
from t2i.distributed.collectives import any_rank, of_all_ranks
from t2i.distributed.health import STEP, Watchdog
from t2i.distributed.signals import SAVE, STOP, StopFlag, asked_by_file, forget_file
from t2i.errors import NumericalError, Stopped
from t2i.measure.reduce import Interrupted
from t2i.runs import checkpoint_store as checkpoints
from t2i.tokens.sequence import next_token_labels
from t2i.train.checkpoint import Saver
from t2i.train.guards import MAX_SKIPPED, check_updates, spike_score, step_without_update
from t2i.train.metrics import MetricsWriter, Speed, peak_memory_bytes, short, why_skipped
from t2i.train.periodic import Periodic
from t2i.train.progress import Progress
from t2i.train.schedule import learning_rate
from t2i.train.step_sums import Read, loss_row, number, read_step

logger = logging.getLogger(__name__)

BETWEEN_STEPS = 10.0
"""A save or a measure may take so many times as long as a step before it counts as hanging."""


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: deepspeed.DeepSpeedEngine,
        loader: StepLoader,
        saver: Saver,
        writer: MetricsWriter | None,
        periodic: list[Periodic],
        flag: StopFlag,
        watchdog: Watchdog,
        stop_at: int | None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.loader = loader
        self.saver = saver
        self.writer = writer
        self.periodic = periodic
        self.flag = flag
        self.watchdog = watchdog
        self.last = min(config.train.max_steps, stop_at or config.train.max_steps)
        self.layout = engine.module.layout
        self.progress = Progress()
        self.is_first = dist.get_rank() == 0
        is_half = engine.bfloat16_enabled()
        self.speed = Speed(engine.module.model, data=config.data, device=engine.device, is_half=is_half)

    def run(self) -> None:
        """Train from where the run folder stands to max_steps.

        Raises:
            Stopped: it was asked for; everything is saved.
            NumericalError: three steps in a row without an update.
            CheckpointError: two saves in a row failed, or the last one.
        """
        try:
            restored = self.saver.restore()
            self.progress = restored or Progress()
            if self.writer:
                self.writer.start(step=restored.step if restored else -1)
            at_start = [place for place, work in enumerate(self.periodic) if work.at_start]
            self.flag.raises = False
            self._steps(owed=self.progress.owed if restored else at_start)
        finally:
            self.watchdog.close()
            self.loader.close()
            if self.writer:
                self.writer.close()

    def _steps(self, *, owed: list[int]) -> None:
        config, progress = self.config.train, self.progress
        if not self.measure(owed):
            self.stop()
        batches = iter(self.loader)
        with tqdm(
            initial=progress.step, total=config.max_steps, unit="step", disable=not self.is_first
        ) as bar:
            while self.progress.step < self.last:
                self.watchdog.arm(STEP)
                row, read = self.step(batches)
                if self.progress.step % config.log_every == 0 or row["skipped"]:
                    self.log([row])
                bar.set_postfix(loss=short(row["loss"]), image=short(row["image_loss"]))
                bar.update()
                check_updates(self.progress, run_dir=self.config.run_dir)
                if row["spike"] and config.spike == "rewind":
                    self.rewind()
                    bar.update(self.progress.step - bar.n)
                    continue
                due = [
                    place
                    for place, work in enumerate(self.periodic)
                    if work.every and self.is_due(work.every)
                ]
                is_asked = not self.measure(due) or read.should_stop
                is_last = is_asked or self.progress.step == self.last
                if is_last or read.should_save or self.is_due(config.save_every):
                    self.save(must_succeed=is_last)
                if is_last and (self.progress.owed or self.progress.step < config.max_steps):
                    self.stop()

    def is_due(self, every: int) -> bool:
        """Tell whether what is done every so many steps, and after the last, is due now; 0 is after the last alone."""
        step = self.progress.step
        return step == self.config.train.max_steps or (every > 0 and step % every == 0)

    def rewind(self) -> None:
        """Go back to the last checkpoint after a spike, and on with the data that follow it.

        Raises:
            NumericalError: there is no checkpoint, or it was gone back to too often.
        """
        step = checkpoints.last_step(self.config.run_dir)
        times = self.progress.rewinds + 1
        if step == 0 or times > MAX_SKIPPED:
            raise NumericalError(
                f"The loss jumped in step {self.progress.step}, and the run cannot go back to the checkpoint of step"
                f" {step}: it has done so {times - 1} times of at most {MAX_SKIPPED}. Look at the samples named in"
                " metrics.jsonl."
            )
        logger.warning("the loss jumped in step %d: back to step %d, past its data", self.progress.step, step)
        self.progress = self.saver.load(checkpoints.step_folder(self.config.run_dir, step))
        self.progress.rewinds = times
        if self.writer:
            self.writer.rewind(step=step)

    def step(self, batches: Iterator[Batch]) -> tuple[dict[str, Any], Read]:
        """Do one optimizer step over the whole global batch; return its row and what else was read."""
        started = time.perf_counter()
        batch = next(batches)
        input_ids = batch["input_ids"]  # (B, S)
        data_seconds = time.perf_counter() - started
        labels = next_token_labels(input_ids, layout=self.layout)
        parts = micro_batches(input_ids, labels, size=self.engine.train_micro_batch_size_per_gpu())
        # The gradient's scale needs all ranks' tokens before the first backward. It stays on the device: no read.
        amounts = [float((labels >= 0).sum()), float(sum(ids.numel() for ids, _ in parts))]
        counts = torch.tensor(amounts, dtype=torch.float64).to(self.engine.device)
        dist.all_reduce(counts)
        lr = learning_rate(self.progress.step, config=self.config.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        sums = self.accumulate(parts, counts[0])
        faults.reach("step", step=self.progress.step + 1)
        read = self.agree(sums, counts)
        losses = loss_row(read.sums)
        score = spike_score(losses["loss"], self.progress.losses) if losses["loss"] is not None else None
        is_spike = self.is_spike(score)
        was_skipped = self.update(read, is_spike=is_spike)
        num_sequences = len(input_ids) * dist.get_world_size()
        self.progress.count(
            num_sequences, tokens=int(read.total), loss=losses["loss"], was_skipped=was_skipped
        )
        seconds = time.perf_counter() - started
        self.progress.seconds += seconds
        grad_norm = self.engine.get_global_grad_norm()
        row = {
            "step": self.progress.step,
            "epoch": self.loader.epoch,
            "samples": self.progress.samples,
            "tokens": self.progress.tokens,
            "padded": int(read.computed - read.total),
            **losses,
            "lr": lr,
            "grad_norm": None if grad_norm is None else number(float(grad_norm)),
            "spike_score": score,
            "spike": is_spike,
            "skipped": was_skipped,
            **self.speed.row(num_tokens=read.total, seconds=seconds),
            "seconds": self.progress.seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "memory_bytes": peak_memory_bytes(self.engine.device),
        }
        if was_skipped:
            row["skipped_keys"] = of_all_ranks(list(batch["key"]))
            logger.warning("step %d changed no weight: %s", row["step"], why_skipped(row))
        return row, read

    def agree(self, sums: Tensor, counts: Tensor) -> Read:
        """Read what all ranks found in this step, and what was asked of any of them."""
        run_dir = self.config.run_dir
        return read_step(
            sums,
            counts,
            should_stop=self.flag.is_set() or (self.is_first and asked_by_file(run_dir, STOP)),
            should_save=self.is_first and asked_by_file(run_dir, SAVE),
        )

    def is_spike(self, score: float | None) -> bool:
        """Tell whether the loss jumped; where that has consequences, all ranks take them together."""
        settings = self.config.train
        is_spike = score is not None and score > settings.spike_score
        if is_spike:
            logger.warning(
                "step %d: the loss is %.1f deviations above the last ones", self.progress.step + 1, score
            )
        return is_spike if settings.spike == "log" else any_rank(is_spike)

    def update(self, read: Read, *, is_spike: bool) -> bool:
        """Change the weights, unless the loss is not finite or a spike that must not pass; tell if it was left out."""
        skipped_before = self.engine.skipped_steps
        if not read.is_finite or (is_spike and self.config.train.spike != "log"):
            step_without_update(self.engine)
        else:
            self.engine.step()
        return bool(self.engine.skipped_steps > skipped_before)

    def accumulate(self, parts: list[tuple[Tensor, Tensor]], total: Tensor) -> Tensor:
        """Run forward and backward over the micro-batches; return the summed losses and counts (7,).

        Each rank's gradient is of sum * accumulation * world / total, which DeepSpeed's two means turn into the
        gradient of the mean over all tokens of all ranks, however unequal their counts.
        """
        engine = self.engine
        factor = faults.loss_factor(step=self.progress.step + 1)
        scale = (factor * engine.gradient_accumulation_steps() * dist.get_world_size() / total).float()
        summed = torch.zeros(7, device=engine.device)
        for index, (ids, wanted) in enumerate(parts):
            engine.set_gradient_accumulation_boundary(index == len(parts) - 1)
            loss, sums = engine(ids.to(engine.device), wanted.to(engine.device))
            engine.backward(loss * scale)
            if index < len(parts) - 1:
                engine.step()
            summed += sums
        summed[:3] *= factor
        return summed

    def measure(self, places: list[int]) -> bool:
        """Do periodic work; at a request to stop, owe all of it and return False, the same on every rank."""
        rows: list[dict[str, Any]] = []
        for place in places:
            self.watchdog.arm("measure", times=BETWEEN_STEPS)
            faults.reach("periodic", step=self.progress.step)
            was_cut = False
            try:
                rows += self.periodic[place].work(self.progress.step, self.flag.is_set)
            except Interrupted:
                was_cut = True
            if any_rank(was_cut):
                self.progress.owed = places
                return False
        self.progress.owed = []
        self.log(rows)
        return True

    def save(self, *, must_succeed: bool) -> None:
        """Commit a checkpoint of this step."""
        self.watchdog.arm("save", times=BETWEEN_STEPS)
        self.saver.save(self.progress, must_succeed=must_succeed)
        if self.is_first:
            forget_file(self.config.run_dir, SAVE)

    def stop(self) -> None:
        """Leave a saved run.

        Raises:
            Stopped: always.
        """
        if self.is_first:
            forget_file(self.config.run_dir, STOP)
        step, last = self.progress.step, self.config.train.max_steps
        raise Stopped(f"Stopped at step {step} of {last}; the same command goes on.")

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to metrics.jsonl on the first rank."""
        if self.writer:
            for row in rows:
                self.writer.write(row)
