"""All that reaches into DeepSpeed beyond what it documents: for another version, read this file again (a test fails).

Made for 0.19.8 (MADE_FOR), ZeRO stages 1 and 2 alone, which ds_config.py sees to.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from safetensors import SafetensorError
from torch import Tensor, nn

from t2i.distributed import faults
from t2i.errors import CheckpointError
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.checkpoint_manifest import SealedFile

MADE_FOR = "0.19.8"
NORM_PART = 2**20
"""Values of a gradient whose squares are summed at a time."""
SEALERS = 2
"""Files that a rank pushes to the disk and hashes at one time, beside what it writes."""
WRITER_WORDS = ("PytorchStreamWriter", "iostream", "unexpected pos")
"""What torch.save's RuntimeError speaks of when the disk fails under it."""


@dataclass(frozen=True)
class Sealed:
    """What became of the files that one rank wrote."""

    files: dict[str, SealedFile]
    """What checkpoint_store.seal says of each, by path."""
    reasons: list[str]
    """Why others failed, a sentence each."""


class SealingWriter(CheckpointEngine):  # type: ignore[misc]
    """Writes DeepSpeed's files of one save and seals each while it writes the next.

    Failures are kept instead of raised: DeepSpeed's save waits for all ranks several times, and a rank that raised in
    its midst would leave the others waiting.
    """

    def __init__(self, plain: CheckpointEngine, *, step: int) -> None:
        """Write with `plain`, which is DeepSpeed's own and knows what its JSON says of files."""
        super().__init__()
        self.name = type(self).__name__
        self.plain = plain
        self.step = step
        self.pool = ThreadPoolExecutor(SEALERS)
        self.coming: dict[str, Future[SealedFile]] = {}
        self.reasons: list[str] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a save."""
        self.plain.create(info)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file and have it sealed."""

        def write() -> None:
            faults.reach("shards", step=self.step, path=Path(path))
            with _no_zip_sums():
                self.plain.save(state_dict, path)
            self.seal(Path(path))

        if reason := why_it_failed(write):
            self.reasons.append(reason)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file."""
        return self.plain.load(path, map_location=map_location)

    def commit(self, info: CheckpointCommitInfo) -> Any:
        """End DeepSpeed's part of a save; the run's own commit comes after it, on the first rank."""
        return self.plain.commit(info)

    def seal(self, path: Path) -> None:
        """Push a written file to the disk and hash it, beside what comes next."""
        self.coming[str(path)] = self.pool.submit(checkpoints.seal, path)

    def finish(self) -> Sealed:
        """Wait until all files are sealed."""
        reasons = list(self.reasons)
        files: dict[str, SealedFile] = {}
        for path, seal in self.coming.items():
            if reason := why_it_failed(seal.result):
                reasons.append(reason)
            else:
                files[path] = seal.result()
        self.pool.shutdown()
        return Sealed(files, reasons)

    def abandon(self) -> None:
        """Wait for nothing: what ends a run is not kept waiting."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def save_engine(
    engine: deepspeed.DeepSpeedEngine, folder: Path, *, step: int, written: list[Path], state: dict[str, Any]
) -> Sealed:
    """Write DeepSpeed's part of a checkpoint on this rank, folder/engine; all ranks call it.

    Args:
        written: files that this rank has written before, to be sealed too.
        state: kept beside DeepSpeed's own.
    """
    plain = engine.checkpoint_engine
    writer = SealingWriter(plain, step=step)
    for path in written:
        writer.seal(path)
    # DeepSpeed makes its writer by itself and takes none as an argument, but asks this attribute for each file.
    engine.checkpoint_engine = writer
    # It copies scripts beside its state that get weights out of it, which model.safetensors has here. A disk that
    # refused them would raise on one rank alone.
    engine._copy_recovery_script = _copy_nothing
    try:
        engine.save_checkpoint(str(folder), tag="engine", client_state=state, save_latest=False)
    except BaseException:
        writer.abandon()
        raise
    finally:
        engine.checkpoint_engine = plain
        del engine._copy_recovery_script
    return writer.finish()


def _copy_nothing(path: str) -> None:
    pass


@contextmanager
def _no_zip_sums() -> Iterator[None]:
    """Leave out the sums of torch's zip files, a pass over all bytes: the manifest has a hash of each file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def why_it_failed(write: Callable[[], object]) -> str:
    """Write, and return in one sentence why that failed, or nothing.

    Raises:
        RuntimeError: one that the disk has no part in.
    """
    try:
        write()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or 'the disk'}: {error.strerror or error}."
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in WRITER_WORDS):
            raise
        return f"{str(error).splitlines()[0]} (a full disk?)."
    return ""


@contextmanager
def reading_universal(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Let the engine's loads within read DeepSpeed's universal format, which its JSON would ask for all loads."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def step_without_update(engine: deepspeed.DeepSpeedEngine) -> None:
    """Do the engine's step so that it drops the gradients, on the path by which it leaves out an overflow."""
    optimizer = engine.optimizer
    checks = optimizer.check_grad_overflow
    optimizer.check_grad_overflow = True  # else it looks at no gradient before its update
    optimizer.check_overflow = lambda **_: setattr(optimizer, "overflow", True)
    try:
        engine.step()
    finally:
        del optimizer.check_overflow
        optimizer.check_grad_overflow = checks


def measure_in_parts(optimizer: Any) -> None:
    """Let DeepSpeed take the norm of gradients part by part: it copies in double precision what it measures."""
    whole = optimizer.get_grad_norm_direct

    def by_parts(gradients: list[Tensor], params: list[nn.Parameter], **rest: Any) -> Tensor:
        real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        pairs = [
            (part, param)
            # Not strict: what fills up the last partition comes after the last parameter and belongs to none.
            for gradient, param in zip(real, params, strict=False)
            for part in gradient.flatten().split(NORM_PART)
        ]
        return whole([part for part, _ in pairs], [param for _, param in pairs], **rest)

    optimizer.get_grad_norm_direct = by_parts


def group_sizes(engine: deepspeed.DeepSpeedEngine) -> list[int]:
    """Count the trainable parameters of each group: DeepSpeed lays its state out by groups, in their order."""
    return [sum(value.numel() for value in group) for group in engine.optimizer.bit16_groups]


def adam_of(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """Return the optimizer of this rank's shards, which ZeRO's wraps."""
    return engine.optimizer.optimizer  # type: ignore[no-any-return]


def moments_of(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """List Adam's moments on this rank."""
    states = adam_of(engine).state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]
