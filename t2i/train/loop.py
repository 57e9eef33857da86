"""The training loop: whole optimizer steps, one small reduction a step, checkpoints, and periodic work as callables."""

import logging
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from t2i.config import RunConfig
from t2i.data.loader import StepLoader
from t2i.data.shards import MANIFEST
from t2i.errors import CheckpointError, NumericalError, Stopped, UserError
from t2i.model.learn import num_parameters
from t2i.model.resize import merged_state_dict
from t2i.runs import checkpoints
from t2i.runs.ckpt import DATA_MANIFEST, IMAGE_TOKENIZER
from t2i.runs.folder import METRICS, write_status
from t2i.runs.trust import check_owner, check_plain, only_plain_values
from t2i.tokens.image import ROUND_TRIP, ImageTokenizer
from t2i.tokens.sequence import next_token_labels
from t2i.tokens.text import TextTokenizer
from t2i.train.engine import KINDS, micro_batches, optimizer_state_bytes
from t2i.train.launch import on_first_rank
from t2i.train.metrics import MetricsWriter, peak_memory_bytes
from t2i.train.schedule import learning_rate

logger = logging.getLogger(__name__)

MAX_SKIPPED = 3
"""Steps in a row without a finite gradient after which a run ends."""


Work = Callable[[int], list[dict[str, Any]]]
"""Takes the step, returns rows for metrics.jsonl; every rank calls it together."""


@dataclass(frozen=True)
class Periodic:
    """Work between steps, such as a held-out loss."""

    every: int
    """Steps between calls; 0 for never. It is also done after the last step."""
    work: Work
    at_start: bool = False
    """Also before the first step."""


@dataclass
class Progress:
    """What a run has done; saved and restored with the weights."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    """Real tokens, padding not counted."""
    seconds: float = 0.0
    skipped: int = 0
    """Steps whose update was left out for a gradient that was not finite."""
    skipped_in_a_row: int = 0


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: deepspeed.DeepSpeedEngine,
        loader: StepLoader,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer | None,
        writer: MetricsWriter | None,
        periodic: list[Periodic],
    ) -> None:
        self.config = config
        self.engine = engine
        self.loader = loader
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.periodic = periodic
        self.layout = engine.module.layout
        self.progress = Progress()
        self.writer = writer
        self.is_first = dist.get_rank() == 0

    def run(self) -> None:
        """Train from where the run folder stands to max_steps.

        Raises:
            Stopped: a signal asked for it; everything is saved.
            NumericalError: three steps in a row without a finite gradient.
        """
        self.restore()
        try:
            self._steps()
        finally:
            if self.writer:
                self.writer.close()

    def _steps(self) -> None:
        config, progress = self.config.train, self.progress
        batches = iter(self.loader)
        for periodic in self.periodic:
            if periodic.at_start and progress.step == 0:
                self.log(periodic.work(0))
        with (
            stop_flag() as flag,
            tqdm(
                initial=progress.step, total=config.max_steps, unit="step", disable=not self.is_first
            ) as bar,
        ):
            while progress.step < config.max_steps:
                row, should_stop = self.step(batches, should_stop=flag.is_set)
                if progress.step % config.log_every == 0 or row["skipped"]:
                    self.log([row])
                bar.set_postfix(loss=_short(row["loss"]), image=_short(row["image_loss"]))
                bar.update()
                self.check_finite()
                for periodic in self.periodic:
                    if periodic.every and self.is_due(periodic.every):
                        self.log(periodic.work(progress.step))
                if self.is_due(config.save_every) or should_stop:
                    self.save()
                if should_stop and progress.step < config.max_steps:
                    raise Stopped(
                        f"Stopped at step {progress.step} of {config.max_steps}; the same command goes on."
                    )

    def is_due(self, every: int) -> bool:
        """Tell whether what is done every so many steps, and after the last, is due now; 0 is after the last alone."""
        step = self.progress.step
        return step == self.config.train.max_steps or (every > 0 and step % every == 0)

    def check_finite(self) -> None:
        """End the run after MAX_SKIPPED steps in a row without an update.

        Raises:
            NumericalError: with the last good checkpoint.
        """
        step = self.progress.step
        if self.progress.skipped_in_a_row == MAX_SKIPPED:
            raise NumericalError(
                f"The gradient was not finite in steps {step - MAX_SKIPPED + 1} to {step}; none of them changed the"
                f" weights. Checkpoints: {self.config.run_dir / checkpoints.CHECKPOINTS}. Try a smaller train.lr."
            )

    def step(
        self, batches: Iterator[dict[str, Any]], *, should_stop: Callable[[], bool]
    ) -> tuple[dict[str, Any], bool]:
        """Do one optimizer step over the whole global batch; return its row and whether any rank wants to stop."""
        started = time.perf_counter()
        input_ids = next(batches)["input_ids"]  # (B, S)
        data_seconds = time.perf_counter() - started
        labels = next_token_labels(input_ids, layout=self.layout)
        parts = micro_batches(input_ids, labels, size=self.engine.train_micro_batch_size_per_gpu())
        counts = [(labels >= 0).sum().item(), sum(ids.numel() for ids, _ in parts)]
        total, computed = self.reduce(torch.tensor(counts, dtype=torch.float64)).tolist()
        lr = learning_rate(self.progress.step, config=self.config.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        sums = self.accumulate(parts, total)
        skipped_before = self.engine.skipped_steps
        is_finite = bool(torch.isfinite(sums).all())
        extra = torch.tensor([float(should_stop()), float(not is_finite)], dtype=torch.float64)
        sums = self.reduce(torch.cat([sums.double().cpu(), extra]))
        self.engine.step()
        was_skipped = self.engine.skipped_steps > skipped_before or sums[8].item() > 0
        self.progress.step += 1
        self.progress.samples += len(input_ids) * dist.get_world_size()
        self.progress.tokens += int(total)
        self.progress.skipped += was_skipped
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if was_skipped else 0
        seconds = time.perf_counter() - started
        self.progress.seconds += seconds
        grad_norm = self.engine.get_global_grad_norm()
        row = {
            "step": self.progress.step,
            "epoch": self.loader.epoch,
            "samples": self.progress.samples,
            "tokens": self.progress.tokens,
            "padded": int(computed - total),
            **loss_row(sums),
            "lr": lr,
            "grad_norm": None if grad_norm is None else _number(float(grad_norm)),
            "skipped": was_skipped,
            "tokens_per_second": total / seconds,
            "seconds": self.progress.seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "memory_bytes": peak_memory_bytes(self.engine.device),
        }
        return row, sums[7].item() > 0

    def accumulate(self, parts: list[tuple[Tensor, Tensor]], total: float) -> Tensor:
        """Run forward and backward over the micro-batches; return the summed losses and counts (7,).

        Each rank's gradient is of sum * accumulation * world / total, which DeepSpeed's two means turn into the
        gradient of the mean over all tokens of all ranks, however unequal their counts.
        """
        engine = self.engine
        scale = engine.gradient_accumulation_steps() * dist.get_world_size() / total
        summed = torch.zeros(7, device=engine.device)
        for index, (ids, wanted) in enumerate(parts):
            engine.set_gradient_accumulation_boundary(index == len(parts) - 1)
            loss, sums = engine(ids.to(engine.device), wanted.to(engine.device))
            engine.backward(loss * scale)
            if index < len(parts) - 1:
                engine.step()
            summed += sums
        return summed

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        values = values.to(self.engine.device)
        dist.all_reduce(values)
        return values.cpu()

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to metrics.jsonl on the first rank."""
        if self.writer:
            for row in rows:
                self.writer.write(row)

    def save(self) -> None:
        """Commit a checkpoint of this step: a Hugging Face folder plus engine/ for DeepSpeed's state."""
        run_dir, step = self.config.run_dir, self.progress.step
        if checkpoints.step_folder(run_dir, step).exists():
            return
        staging = on_first_rank(lambda: checkpoints.begin(run_dir))
        self.engine.save_checkpoint(
            str(staging), tag="engine", client_state=random_states(), save_latest=False
        )
        dist.barrier()
        on_first_rank(lambda: self._commit(staging))

    def _commit(self, staging: Path) -> None:
        model, run_dir, step = self.engine.module.model, self.config.run_dir, self.progress.step
        model.save_pretrained(staging, state_dict=merged_state_dict(model))
        self.text_tokenizer.tokenizer.save_pretrained(staging)
        num_learned, num_all = num_parameters(model)
        facts = {
            "progress": vars(self.progress),
            "loader": self.loader.state_dict(),
            "world_size": dist.get_world_size(),
            "parameters": {"learned": num_learned, "all": num_all},
            "optimizer_state_bytes": optimizer_state_bytes(self.engine),
        }
        checkpoints.commit(run_dir, step=step, facts=facts, keep_last=self.config.train.keep_last)
        write_status(run_dir, state="running", step=step)

    def restore(self) -> None:
        """Load the newest whole checkpoint, if there is one, on every rank.

        Raises:
            UserError: the shards are not those that the run began with.
            CheckpointError: it was made by another number of ranks, or none is whole.
        """
        run_dir = self.config.run_dir
        folder = on_first_rank(self._find_start)
        if folder is not None:
            self._load(folder)
            if self.is_first:
                logger.info("resuming at step %d of %d", self.progress.step, self.config.train.max_steps)
        elif (run_dir / METRICS).exists():
            logger.info("starting anew: no checkpoint was made before this run stopped")
        if self.writer:
            self.writer.start(step=self.progress.step if folder is not None else -1)

    def _find_start(self) -> Path | None:
        """Choose a checkpoint, and keep what pictures are drawn and measured with beside the checkpoints."""
        run_dir, manifest = self.config.run_dir, self.config.data.shards / MANIFEST
        if not (run_dir / DATA_MANIFEST).exists():
            if self.image_tokenizer is not None:
                shutil.copytree(self.image_tokenizer.folder, run_dir / IMAGE_TOKENIZER, dirs_exist_ok=True)
                shutil.copyfile(self.config.data.shards / ROUND_TRIP, run_dir / ROUND_TRIP)
            shutil.copyfile(manifest, run_dir / DATA_MANIFEST)  # last: it says that the rest is there
        elif (run_dir / DATA_MANIFEST).read_bytes() != manifest.read_bytes():
            raise UserError(
                f"{run_dir} was begun with other shards than {self.config.data.shards} holds now: its"
                f" {DATA_MANIFEST} differs. Choose another --run-dir."
            )
        folder = checkpoints.choose(run_dir)
        if folder is not None:
            check_owner(folder)
            check_plain(folder / "engine")
        return folder

    def _load(self, folder: Path) -> None:
        manifest = checkpoints.read_manifest(folder)
        if manifest["world_size"] != dist.get_world_size():
            found, wanted = manifest["world_size"], dist.get_world_size()
            raise CheckpointError(
                f"{folder} was made by {found} ranks; this run has {wanted}. Use {found} again."
            )
        with only_plain_values(folder / "engine"):
            loaded, client_state = self.engine.load_checkpoint(str(folder), tag="engine")
        if loaded is None:
            raise CheckpointError(f"DeepSpeed could not load {folder / 'engine'}.")
        restore_random_states(client_state)
        self.progress = Progress(**manifest["progress"])
        self.loader.load_state_dict(manifest["loader"])


def random_states() -> dict[str, Any]:
    """Collect this process's random states; the loader and the sampler use generators of their own."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {"random": state}


def restore_random_states(client_state: dict[str, Any]) -> None:
    """Set what random_states collected."""
    state = client_state["random"]
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def loss_row(sums: Tensor) -> dict[str, float | int | None]:
    """Divide summed losses and counts (7,) once: nats a token by class, None where nothing was counted."""
    totals, counts = sums[:3], sums[3:6]
    row: dict[str, float | int | None] = {"loss": _number((totals.sum() / counts.sum()).item())}
    for kind, total, count in zip(KINDS, totals, counts, strict=True):
        row[f"{kind}_loss"] = _number((total / count).item()) if count else None
        row[f"{kind}_tokens"] = int(count)
    return row


@dataclass
class StopFlag:
    """Set by a signal, read once a step."""

    signals: int = 0

    def is_set(self) -> bool:
        """Tell whether a signal has come."""
        return self.signals > 0


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Turn SIGTERM and the first Ctrl-C into a flag; a second Ctrl-C ends at once."""
    flag = StopFlag()

    def note(number: int, frame: object) -> None:
        flag.signals += 1
        if number == signal.SIGINT and flag.signals > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _number(value: float) -> float | None:
    """JSON has no nan or inf: a value that is not finite is stored as null."""
    return value if math.isfinite(value) else None
