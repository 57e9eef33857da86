"""All use of DeepSpeed's undocumented names. For another version, read this file again; a test then fails.

Made for 0.19.8 (MADE_FOR) and ZeRO stages 1 and 2 only, which ds_config.py checks.
"""

import gc
import glob
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from safetensors import SafetensorError
from torch import Tensor, nn

from t2i.config import DsConfig
from t2i.distributed import faults
from t2i.distributed.collectives import rank_and_size
from t2i.errors import CheckpointError, disk_reason
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.checkpoint_manifest import SealedFile

MADE_FOR = "0.19.8"
MODEL_STATES = "mp_rank_00_model_states.pt"
"""DeepSpeed's file of the weights."""
NORM_PART = 2**20
"""Values of a gradient whose squares are summed at a time."""
GPU_NORM_PART = 2**27
"""The same on a GPU, where a part costs the start of some kernels; 1 GiB in double precision."""
SEALERS = 2
"""Files that a rank flushes to disk and hashes at one time, while it writes the next."""


@dataclass(frozen=True)
class Sealed:
    """The files that one rank wrote, and those that it could not."""

    files: dict[str, SealedFile]
    """What checkpoint_store.seal says of each, by path."""
    reasons: list[str]
    """Why others failed, one sentence each."""


class SealingWriter(CheckpointEngine):  # type: ignore[misc]
    """Writes DeepSpeed's files of one save, and seals each file while it writes the next.

    Failures are kept instead of raised. DeepSpeed's save waits for all ranks several times, so a rank that raised in
    between would leave the others waiting.
    """

    def __init__(self, plain: CheckpointEngine, *, step: int) -> None:
        """Write with `plain`, DeepSpeed's own writer, which knows what its JSON says of files."""
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

    def save(self, state_dict: object, path: str) -> None:
        """Write one file and start to seal it."""

        def write() -> None:
            faults.reach("shards", step=self.step, path=Path(path))
            with _no_zip_sums():
                self.plain.save(state_dict, path)
            self.seal(Path(path))

        if reason := why_it_failed(write):
            self.reasons.append(reason)

    def load(self, path: str, map_location: object = None) -> object:
        """Read one file."""
        return self.plain.load(path, map_location=map_location)

    def commit(self, info: CheckpointCommitInfo) -> object:
        """End DeepSpeed's part of a save; the run's own commit comes after it, on the first rank."""
        return self.plain.commit(info)

    def seal(self, path: Path) -> None:
        """Flush a written file to disk and hash it, in a thread."""
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
        """Drop what is not sealed yet, so that an error ends the run at once."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def save_engine(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    *,
    step: int,
    written: list[Path],
    state: Mapping[str, object],
) -> Sealed:
    """Write DeepSpeed's part of a checkpoint on this rank, folder/engine; all ranks call it.

    Args:
        written: files that this rank has written before, to seal as well.
        state: saved together with DeepSpeed's own.
    """
    plain = engine.checkpoint_engine
    writer = SealingWriter(plain, step=step)
    for path in written:
        writer.seal(path)
    # DeepSpeed makes its own writer and takes none as an argument, but reads this attribute for each file.
    engine.checkpoint_engine = writer
    # It copies scripts that get weights out of its state, which model.safetensors has here already. A full disk
    # would raise there, on one rank only.
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
    """Leave out the checksums of torch's zip files."""
    # They took half of torch's time to write, and the manifest has a hash of each file anyway.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def why_it_failed(write: Callable[[], object]) -> str:
    """Call `write`, and return in one sentence why the disk refused it; "" if it did not.

    Raises:
        RuntimeError: one that has nothing to do with the disk.
    """
    try:
        write()
    except CheckpointError as error:
        return str(error)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not (reason := disk_reason(error)):
            raise
        return reason
    return ""


@contextmanager
def names_as_they_are(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Let loads within this block take the name of a checkpoint's folder literally."""
    # DeepSpeed takes it for a pattern: it does not find lr[1e-3], and for lr[12] it reads what is in lr1.
    search = engine._get_all_ckpt_names
    engine._get_all_ckpt_names = lambda folder, tag: search(glob.escape(folder), tag)
    try:
        yield
    finally:
        del engine._get_all_ckpt_names


@contextmanager
def reading_universal(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Read DeepSpeed's universal format in the loads within this block."""
    # Its JSON could ask for this only for all loads of a run, those after a rewind included.
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


@dataclass(frozen=True)
class StateKind:
    """What decides how DeepSpeed lays out the state that it saves."""

    num_ranks: int
    precision: Literal["bf16", "fp32"]
    adam: Literal["torch's Adam", "DeepSpeed's Adam"]
    is_round_robin: bool = False
    """Parameters are dealt out to ranks in another order (round_robin_gradients)."""

    def __str__(self) -> str:
        order = " and round_robin_gradients" if self.is_round_robin else ""
        ranks = "rank" if self.num_ranks == 1 else "ranks"
        return f"{self.num_ranks} {ranks} in {self.precision} with {self.adam}{order}"


def kind_of(ds_config: DsConfig, *, num_ranks: int) -> StateKind:
    """Tell how the state of a run with this JSON is laid out."""
    has_bf16 = ds_config.get("bf16", {}).get("enabled", False)
    has_torch_adam = ds_config.get("optimizer", {}).get("params", {}).get("torch_adam", False)
    return StateKind(
        num_ranks,
        precision="bf16" if has_bf16 else "fp32",
        adam="torch's Adam" if has_torch_adam else "DeepSpeed's Adam",
        is_round_robin=ds_config.get("zero_optimization", {}).get("round_robin_gradients", False),
    )


def saved_ds_config(folder: Path) -> DsConfig:
    """Read the JSON with which a checkpoint was made, from DeepSpeed's own state."""
    file = min((folder / "engine").glob("*_optim_states.pt"))
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["ds_config"]  # type: ignore[no-any-return]


def saved_module(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a checkpoint under the names that they have in training, frozen ones included."""
    state = torch.load(folder / "engine" / MODEL_STATES, map_location="cpu", weights_only=True, mmap=True)
    return state["module"]  # type: ignore[no-any-return]


def step_without_update(engine: deepspeed.DeepSpeedEngine) -> None:
    """Take the engine's step so that it drops the gradients and leaves the weights as they are."""
    # By DeepSpeed's own path for an overflow, which clears the gradients and counts a skipped step.
    optimizer = engine.optimizer
    checks = optimizer.check_grad_overflow
    optimizer.check_grad_overflow = True  # without it no gradient is checked before the update
    optimizer.check_overflow = lambda **_: setattr(optimizer, "overflow", True)
    try:
        engine.step()
    finally:
        del optimizer.check_overflow
        optimizer.check_grad_overflow = checks


def measure_in_parts(optimizer: Any) -> None:
    """Let DeepSpeed take the norm of gradients in parts of NORM_PART or GPU_NORM_PART values."""
    # It copies what it measures in double precision, which for a whole matrix takes much memory.
    whole = optimizer.get_grad_norm_direct

    def by_parts(gradients: list[Tensor], params: list[nn.Parameter], **rest: object) -> Tensor:
        real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        pairs = [
            (part, param)
            # Not strict: the padding of the last partition comes after the last parameter and belongs to none.
            for gradient, param in zip(real, params, strict=False)
            for part in gradient.flatten().split(NORM_PART if gradient.is_cpu else GPU_NORM_PART)
        ]
        return whole([part for part, _ in pairs], [param for _, param in pairs], **rest)

    optimizer.get_grad_norm_direct = by_parts


def free_engine(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free an engine, whose hooks on autograd's nodes would otherwise keep it for as long as the process runs."""
    engine.destroy()
    gc.collect()


def group_sizes(engine: deepspeed.DeepSpeedEngine) -> list[int]:
    """Count the trainable parameters of each group, in the order in which DeepSpeed lays out its state."""
    return [sum(value.numel() for value in group) for group in engine.optimizer.bit16_groups]


def adam_of(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """Return the optimizer of this rank's shards, which ZeRO's optimizer wraps."""
    return engine.optimizer.optimizer  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Shard:
    """One rank's part of a parameter group, which ZeRO lays out as one vector, padded at its end."""

    value: Tensor
    """(N,), fp32: the weights that the optimizer updates."""
    begin: int
    """Place of its first value in the whole vector."""
    params: list[tuple[nn.Parameter, int]]
    """The group's parameters, each with the place of its first value in the whole vector."""

    @property
    def end(self) -> int:
        """Place behind its last value."""
        return self.begin + self.value.numel()


def muon_shards(engine: deepspeed.DeepSpeedEngine) -> list[Shard]:
    """List this rank's parts of the parameter groups that Muon updates."""
    zero, rank = engine.optimizer, rank_and_size()[0]
    return [
        Shard(value, begin=rank * value.numel(), params=list(zip(params, places, strict=True)))
        for value, params, places, group in zip(
            zero.single_partition_of_fp32_groups,
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            adam_of(engine).param_groups,
            strict=True,
        )
        if group.get("is_muon")  # which checkpoints of before do not have
    ]


def one_moment(value: Tensor, state: dict[str, Any]) -> Tensor:
    """Return the one moment, (N,), that Muon needs of a shard's state; if there is none yet, begin it, and its steps.

    The state has Adam's form, which DeepSpeed's converter asks for: of the second moment it holds one zero.
    """
    if not state:
        state["step"] = torch.zeros((), device=value.device)
        state["exp_avg"] = torch.zeros_like(value)
        state["exp_avg_sq"] = value.new_zeros(1).expand_as(value)
    return state["exp_avg"]  # type: ignore[no-any-return]


def drop_second_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free what a load makes of the zeros that stand for second moments in Muon's groups: it copies each as a whole."""
    for shard in muon_shards(engine):
        state = adam_of(engine).state.get(shard.value)
        if not state:  # saved before the first update
            continue
        state["exp_avg_sq"] = shard.value.new_zeros(1).expand_as(shard.value)
        # Each parameter that this rank has a part of has views, which would keep the memory.
        mappings: list[Any] = [vars(value)["_hp_mapping"] for value, _ in shard.params]
        for mapping in filter(None, mappings):
            mapping.set_optim_state_fragment(shard.value, state)


def count_steps_as(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let the optimizer have its count of steps in the type that it takes, whichever Adam counted them."""
    adam = adam_of(engine)
    for value, state in adam.state.items():
        # torch's counts in tensors where its fused pass runs, DeepSpeed's in whole numbers.
        if isinstance(adam, torch.optim.Adam):
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=value.device)
        else:
            state["step"] = int(state["step"])


def moments_of(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """List the optimizer's moments on this rank."""
    states = adam_of(engine).state.values()
    return [
        value
        for state in states
        for value in state.values()
        # Not the one zero that stands for Muon's second moment.
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= value.nbytes
    ]
