"""Checkpoints of a training run: written by all ranks, committed whole by the first, loaded by any number of ranks."""

import logging
import shutil
from pathlib import Path

import deepspeed
import torch.distributed as dist

from t2i.config import TrainConfig
from t2i.data.loader import StepLoader
from t2i.data.shards.manifest import MANIFEST, are_same_shards
from t2i.distributed import faults
from t2i.distributed.collectives import of_all_ranks, on_first_rank
from t2i.distributed.run_id import OwnFolder
from t2i.errors import CheckpointError, UserError
from t2i.files import write_whole
from t2i.model.resize import merged_state_dict, on_cpu
from t2i.model.trainable import num_parameters
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.checkpoint_manifest import CheckpointManifest, Facts, SealedFile, read_checkpoint_manifest
from t2i.runs.loading import DATA_MANIFEST, IMAGE_TOKENIZER
from t2i.runs.metrics_log import METRICS, MetricsRow, heldout_loss, rows_of_step
from t2i.runs.run_folder import REPLAY_MANIFEST, STATUS, has_begun, write_status
from t2i.runs.trust import check_owner, check_plain, pickle_enums_by_value
from t2i.tokens.image import ROUND_TRIP
from t2i.train.deepspeed_internals import (
    group_sizes,
    moments_of,
    save_engine,
    why_it_failed,
)
from t2i.train.deepspeed_state import load_state, random_states
from t2i.train.guards import check_finite, check_ranks_agree, optimizer_bits
from t2i.train.inputs import Inputs
from t2i.train.progress import Progress

logger = logging.getLogger(__name__)

MAX_FAILED = 2
"""Failed saves in a row that end a run."""


class Saver:
    """Saves and loads the state of one run on every rank together."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        run_dir: Path,
        engine: deepspeed.DeepSpeedEngine,
        loader: StepLoader,
        inputs: Inputs,
    ) -> None:
        self.config = config
        self.run_dir, self.folder = run_dir, OwnFolder.at(run_dir)
        self.engine = engine
        self.loader = loader
        self.inputs = inputs
        self.num_failed = 0
        pickle_enums_by_value()

    def save(self, progress: Progress, *, must_succeed: bool) -> None:
        """Commit a checkpoint: a Hugging Face folder plus engine/ for DeepSpeed's state.

        A save that fails on any rank is given up with a warning, unless it must succeed.

        Raises:
            CheckpointError: on every rank, if the save failed and had to succeed, or the one before failed too.
            NumericalError: weights are not finite, or ranks hold different ones.
        """
        # A checkpoint is never overwritten: the folder of this step holds this step.
        if on_first_rank(lambda: self._is_saved(progress.step)):
            return
        check_finite(self.engine, progress, run_dir=self.run_dir)
        # Only the first rank's weights are saved, so a rank that drifted away would go unnoticed.
        check_ranks_agree(self.engine.module)
        # One rank writes, all ask: were only one to raise, the others would wait for it in the next collective.
        reason = on_first_rank(lambda: why_it_failed(lambda: self._begin(progress.step))) or self._write(
            progress
        )
        if not reason:
            self.num_failed = 0
            return
        self.num_failed += 1
        # Before anything else: the half-written folder may be what fills the disk.
        on_first_rank(lambda: checkpoints.discard(self.run_dir))
        sentence = f"The checkpoint of step {progress.step} could not be written: {reason}"
        if must_succeed or self.num_failed == MAX_FAILED:
            kept = self.run_dir / checkpoints.CHECKPOINTS
            raise CheckpointError(
                f"{sentence} Free some disk space, then run the same command to resume from the last one in {kept}."
            )
        logger.warning("%s Training continues until the next save.", sentence)

    def _is_saved(self, step: int) -> bool:
        self.folder.check()
        return checkpoints.make_way(self.run_dir, step=step)

    def _begin(self, step: int) -> None:
        """Write the weights into a new folder, if the disk has room for a checkpoint as large as the last one."""
        staging, model = checkpoints.begin(self.run_dir), self.engine.module.model
        # Checked beforehand: a large save would fail only after minutes, on a disk that others are writing to.
        last = checkpoints.last_step(self.run_dir)
        free = shutil.disk_usage(self.run_dir).free
        if last and free < (needed := self._manifest(last).num_bytes()):
            raise CheckpointError(
                f"disk full: a checkpoint needs {_size(needed)}, {_size(free)} are free at {self.run_dir}."
            )
        faults.reach("weights", step=step, path=staging)
        # Merged: transformers knows neither LoRA adapters nor embeddings in two parts.
        model.save_pretrained(staging, state_dict=on_cpu(merged_state_dict(model)))
        self.inputs.text_tokenizer.tokenizer.save_pretrained(staging)

    def _manifest(self, step: int) -> CheckpointManifest:
        return read_checkpoint_manifest(checkpoints.step_folder(self.run_dir, step))

    def _write(self, progress: Progress) -> str:
        """Write on all ranks and commit on the first; return why it failed, the same on every rank, or ""."""
        staging = self.run_dir / checkpoints.CHECKPOINTS / checkpoints.STAGING
        written = [path for path in staging.iterdir() if path.is_file()] if dist.get_rank() == 0 else []
        own = save_engine(self.engine, staging, step=progress.step, written=written, state=random_states())
        # After the save, not within: DeepSpeed waits for all ranks several times, so no rank may raise there.
        parts = of_all_ranks([(own, optimizer_bits(self.engine))])
        failed = [f"rank {rank}: {why}" for rank, (part, _) in enumerate(parts) for why in part.reasons]
        if failed:
            return failed[0]
        known = {path: facts for part, _ in parts for path, facts in part.files.items()}
        bits = [number for _, number in parts]
        return on_first_rank(lambda: why_it_failed(lambda: self._commit(progress, sealed=known, bits=bits)))

    def _commit(self, progress: Progress, *, sealed: dict[str, SealedFile], bits: list[int]) -> None:
        step, settings = progress.step, self.config
        num_learned, num_all = num_parameters(self.engine.module.model)
        facts = Facts(
            run_id=self.folder.run_id,
            progress=vars(progress),
            loader=self.loader.state_dict(),
            world_size=dist.get_world_size(),
            global_batch=self.loader.global_batch,
            image_rows_only=settings.image_vocab_only,
            parameters={"learned": num_learned, "all": num_all},
            parameter_groups=group_sizes(self.engine),
            optimizer_state_bytes=sum(value.nbytes for value in moments_of(self.engine)),
            optimizer_bits=bits,
        )
        checkpoints.commit(
            self.run_dir,
            step=step,
            facts=facts,
            # What was saved before a streak of skipped steps stays: the streak may be what ends the run.
            keep_last=settings.keep_last + progress.skipped_in_a_row,
            keep_every=settings.keep_every,
            sealed=sealed,
        )
        try:
            write_status(self.run_dir, state="running", step=step)
        except OSError as error:  # the checkpoint is there all the same
            logger.warning("%s cannot be written: %s.", self.run_dir / STATUS, error.strerror or error)

    def restore(self) -> Progress | None:
        """Load the newest complete checkpoint on every rank; None if there is none.

        Raises:
            UserError: the shards are not those that the run started with.
            CheckpointError: none of several is complete, or it does not fit.
        """
        on_first_rank(self._keep_inputs)
        folder = self.newest()
        if folder is None:
            if (self.run_dir / METRICS).exists():
                logger.info("starting from step 0: this run stopped before its first checkpoint")
            return None
        progress = self.load(folder)
        self.loader.load_state_dict(read_checkpoint_manifest(folder).facts.loader)
        logger.info("resuming at step %d of %d", progress.step, self.config.max_steps)
        return progress

    def newest(self) -> Path | None:
        """Choose the newest whole checkpoint of this run, the same on every rank; None if there is none.

        Raises:
            CheckpointError: none of several is whole, or another user may have written it.
        """

        def choose() -> Path | None:
            folder = checkpoints.choose_newest(self.run_dir)
            if folder is not None:
                # By the manifest: what is being removed may still be there.
                if not any(map(checkpoints.is_of_engine, read_checkpoint_manifest(folder).files)):
                    raise CheckpointError(
                        f"{folder} has no {checkpoints.ENGINE}/, so its run cannot resume: a study keeps none of a run"
                        f" that is done. To train on from its weights: --model.init {folder} --run-dir NEW."
                    )
                check_owner(folder)  # DeepSpeed's state is pickled, and reading a pickle can run code
                check_plain(folder / "engine")
            return folder

        return on_first_rank(choose)

    def _keep_inputs(self) -> None:
        """Copy what sampling and measuring need into the run folder; after the first step, compare it instead."""
        run_dir, inputs = self.run_dir, self.inputs
        kept = {DATA_MANIFEST: inputs.shards} | ({REPLAY_MANIFEST: inputs.replay} if inputs.replay else {})
        is_begun = has_begun(run_dir)
        for name, shards in kept.items():
            if is_begun and (run_dir / name).exists():
                if not are_same_shards(run_dir / name, shards / MANIFEST):
                    raise UserError(
                        f"{run_dir} was started with other shards than {shards} holds now: its {name} differs. Choose"
                        " another --run-dir."
                    )
                continue
            # Copies: the shards may be gone when someone samples from the run.
            if name == DATA_MANIFEST:
                self._keep_image_tokenizer()
            write_whole(
                run_dir / name, (shards / MANIFEST).read_text()
            )  # last: it says that the rest is there

    def _keep_image_tokenizer(self) -> None:
        folder, round_trip = self.run_dir / IMAGE_TOKENIZER, self.run_dir / ROUND_TRIP
        # Those of a start that was refused before its first step may be others.
        shutil.rmtree(folder, ignore_errors=True)
        round_trip.unlink(missing_ok=True)
        if self.inputs.image_tokenizer is not None:
            shutil.copytree(self.inputs.image_tokenizer.folder, folder)
            shutil.copyfile(self.inputs.shards / ROUND_TRIP, round_trip)

    def load(self, folder: Path) -> Progress:
        """Load weights, optimizer and random states of a complete checkpoint, but not the loader's position.

        Raises:
            UserError: this number of ranks would make another global batch.
            CheckpointError: it has other parameter groups, as an older t2i made them.
        """
        facts = read_checkpoint_manifest(folder).facts
        # Another global batch would be another experiment, with another place in the data.
        batch = facts.global_batch
        if batch not in (None, self.loader.global_batch):
            raise UserError(
                f"{folder} was made with {batch} sequences per step; with {dist.get_world_size()} ranks,"
                f" train.global_batch_tokens gives {self.loader.global_batch}. Use a number of ranks that divides"
                f" {batch}."
            )
        groups, found = group_sizes(self.engine), facts.parameter_groups
        # DeepSpeed's conversion for other ranks would fill the first groups and say nothing of the rest.
        if found != groups:
            told = f"has parameter groups of {found}" if found else "does not record its parameter groups"
            raise CheckpointError(
                f"{folder} {told}; this version of t2i makes groups of {groups}. Resume with the version that wrote it,"
                f" or start a run from its weights: --model.init {folder} --run-dir NEW."
            )
        load_state(self.engine, folder, num_ranks=facts.world_size)
        try:
            progress = Progress(**facts.progress)
        except TypeError as error:
            raise CheckpointError(
                f"the manifest of {folder} has other keys than expected: {error}."
            ) from error
        # What a stop cut short may have been made up for since, or the stop came between the rows and this save.
        if progress.owed:
            rows: list[MetricsRow] = on_first_rank(lambda: _measured_rows(self.run_dir, progress.step))
            if rows:
                progress.owed = []
                if (loss := heldout_loss(rows)) is not None:
                    progress.note_heldout(loss)
        return progress


def _measured_rows(run_dir: Path, step: int) -> list[MetricsRow]:
    return [row for row in rows_of_step(run_dir, step) if "split" in row]


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
