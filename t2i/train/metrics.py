"""Where a run's numbers go: metrics.jsonl is the record, TensorBoard a view of it."""

import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from t2i.runs.folder import append_metrics, rewind_metrics


class MetricsWriter:
    """Append rows to metrics.jsonl and to TensorBoard's events."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def start(self, *, step: int) -> None:
        """Go on after `step`: what an earlier process wrote beyond it is set aside; -1 for nothing done yet."""
        rewind_metrics(self.run_dir, step=step)
        self.events = SummaryWriter(log_dir=str(self.run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row; `split` names its group in TensorBoard."""
        append_metrics(self.run_dir, row)
        group = row.get("split", "train")
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                self.events.add_scalar(f"{group}/{key}", value, row["step"])

    def show(self, picture: Image.Image, *, step: int) -> None:
        """Show a sheet of sampled pictures in TensorBoard."""
        self.events.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Flush TensorBoard's events."""
        self.events.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Tell the most memory that this process has held: on its GPU, or in all where it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
