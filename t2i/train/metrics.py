"""Writing a run's numbers: metrics.jsonl is the record, TensorBoard a view of it."""

import logging
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from t2i.config import DataConfig
from t2i.cost.devices import peak_flops_of
from t2i.cost.estimates import counts_of, flops_a_token
from t2i.distributed.run_id import OwnFolder
from t2i.runs.metrics_log import METRICS, MetricsRow, append_metrics, rewind_metrics, step_of
from t2i.train.trackers import TENSORBOARD, Trackers

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Append rows to metrics.jsonl and to TensorBoard's events.

    A full disk ends no run: rows are kept here until one can be written, and TensorBoard is given up.
    """

    def __init__(self, run_dir: Path, *, report_to: Sequence[str] = (TENSORBOARD,)) -> None:
        self.run_dir, self.folder = run_dir, OwnFolder.at(run_dir)
        self.report_to = report_to
        self.trackers: Trackers | None = None
        self.waiting: list[MetricsRow] = []
        self.events: SummaryWriter | None = None

    def start(self, *, step: int) -> None:
        """Continue after `step`, and set aside what an earlier process wrote beyond it; -1 for a new run."""
        # Set aside, not deleted: rows of steps that are taken again may be what somebody looks for after a crash.
        rewind_metrics(self.run_dir, step=step)
        if TENSORBOARD in self.report_to:
            self.events = SummaryWriter(log_dir=str(self.run_dir / TENSORBOARD), purge_step=step + 1)
        # After the rewind: they follow the file, and would report rows that are taken back.
        self.trackers = self.trackers or Trackers(self.report_to, run_dir=self.run_dir)

    def rewind(self, *, step: int) -> None:
        """Set aside what was written beyond `step`."""
        self._show(lambda events: events.close())
        self.start(step=step)

    def write(self, row: MetricsRow) -> None:
        """Write one row; `split` names its group in TensorBoard."""
        if not self.folder.is_own():
            return  # another run's metrics are there now; this run ends at its next save
        rows = [*self.waiting, row]
        try:
            append_metrics(self.run_dir, *rows)
            self.waiting = []
        except OSError as error:
            if not self.waiting:  # one warning for a disk that stays full
                place = self.run_dir / METRICS
                logger.warning("%s: %s. Rows are kept in memory until there is room.", place, error.strerror)
            self.waiting = rows
        self._show(lambda events: _add_scalars(events, row))

    def show(self, image: Image.Image, *, step: int) -> None:
        """Show a grid of sampled images in TensorBoard."""
        self._show(lambda events: events.add_image("samples", np.asarray(image), step, dataformats="HWC"))

    def close(self) -> None:
        """Flush TensorBoard's events, and tell the other trackers that the run has ended."""
        self._show(lambda events: events.close())
        if self.trackers:
            self.trackers.close()

    def _show(self, show: Callable[[SummaryWriter], None]) -> None:
        if self.events is None:
            return
        try:
            show(self.events)
        except OSError as error:
            # Given up for good: its writer thread has ended and cannot take another row.
            logger.warning("TensorBoard's events cannot be written (%s); metrics.jsonl is the record.", error)
            self.events = None


class Speed:
    """Measures throughput: tokens and operations per second, and MFU."""

    def __init__(
        self, model: PreTrainedModel, *, data: DataConfig, device: torch.device, is_half: bool
    ) -> None:
        self.flops_a_token = flops_a_token(
            model.config, counts=counts_of(model), seq_len=data.seq_len, replay_ratio=data.replay_ratio
        )
        # MFU only in bf16: the known peaks are of bf16.
        name = torch.cuda.get_device_name(device) if device.type == "cuda" and is_half else ""
        self.peak_flops = peak_flops_of(name)
        self.num_devices = dist.get_world_size()

    def row(self, *, num_tokens: float, seconds: float) -> dict[str, float]:
        """Return tokens and operations per second, and MFU for a GPU with a known bf16 peak.

        Args:
            num_tokens: of all ranks, without padding.
        """
        # Padding is not counted: a run would seem faster the more of it there is.
        flops = num_tokens * self.flops_a_token / seconds
        row = {"tokens_per_second": num_tokens / seconds, "flops_per_second": flops}
        return row | ({"mfu": flops / (self.num_devices * self.peak_flops)} if self.peak_flops else {})


def _add_scalars(events: SummaryWriter, row: MetricsRow) -> None:
    group = row.get("split", "train")
    for key, value in row.items():
        if isinstance(value, int | float) and key != "step":
            events.add_scalar(f"{group}/{key}", value, step_of(row))


def why_skipped(loss: float | None, *, is_spike: bool) -> str:
    """Say why the update of a step was skipped."""
    if loss is None:
        return "its loss was not finite"
    return f"its loss of {loss:.3f} is a spike" if is_spike else "its gradient was not finite"


SHOWN = {
    "image_loss": "image loss {}",
    "image_loss_wrong_caption": "under shuffled captions {}",
    "image_loss_empty_caption": "under the null caption {}",
    "text_loss": "text loss {}",
}
"""Losses of a held-out row that the terminal shows, in this order."""


def measured(row: MetricsRow) -> str:
    """Say in one line what a held-out row holds, for the terminal."""
    values = [
        text.format(short(value)) for key, text in SHOWN.items() if isinstance(value := row.get(key), float)
    ]
    images = f" on {row['num_pictures']} images" if "num_pictures" in row else ""
    return f"step {step_of(row)}, {row['split']}{images}: {', '.join(values)}"


def short(value: float | None) -> str:
    """Write a loss for a progress bar."""
    return "-" if value is None else f"{value:.3f}"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: on its GPU, or of the whole process if it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
