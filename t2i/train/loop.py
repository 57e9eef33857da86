"""The training loop: optimizer steps, and between them evaluations, logging, saves and requests."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from t2i.config import TrainConfig
from t2i.distributed import faults
from t2i.distributed.collectives import any_rank, on_first_rank
from t2i.distributed.health import STEP, Watchdog
from t2i.distributed.signals import SAVE, STOP, Requests
from t2i.errors import NumericalError, Stopped
from t2i.measure.reduce import Interrupted
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.best_checkpoint import best_of, link_best
from t2i.runs.metrics_log import MetricsRow, heldout_loss
from t2i.runs.run_folder import SAMPLES, report_command
from t2i.train.checkpoint import Saver
from t2i.train.compiled import eagerly
from t2i.train.guards import MAX_SKIPPED, check_updates
from t2i.train.metrics import MetricsWriter, measured, short
from t2i.train.periodic import Periodic
from t2i.train.progress import RISES, Progress
from t2i.train.step import Stepper

logger = logging.getLogger(__name__)

BETWEEN_STEPS = 10.0
"""A save or an evaluation counts as hanging after this many times train.hang_timeout_seconds."""


@dataclass(frozen=True)
class EndConditions:
    """What may end a run before its last step."""

    requests: Requests
    watchdog: Watchdog


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        stepper: Stepper,
        saver: Saver,
        periodic: list[Periodic],
        writer: MetricsWriter | None,
        control: EndConditions,
    ) -> None:
        self.config = config
        self.stepper = stepper
        self.saver = saver
        self.periodic = periodic
        self.writer = writer
        self.requests, self.watchdog = control.requests, control.watchdog
        self.run_dir = self.requests.run_dir
        self.last = min(config.max_steps, self.requests.stop_at or config.max_steps)
        self.progress = Progress()

    def run(self, *, record: Callable[[], None]) -> None:
        """Train from the run folder's last checkpoint to max_steps.

        Args:
            record: writes down the settings; called on the first rank, once nothing refuses to resume with them.

        Raises:
            Stopped: a stop was requested; everything is saved.
            NumericalError: three steps in a row without an update.
            CheckpointError: two saves in a row failed, or the last one.
        """
        try:
            restored = self.saver.restore()
            on_first_rank(record)
            self.progress = restored or Progress()
            if self.writer:
                # Rows beyond the checkpoint are set aside: their steps are taken again. -1 keeps not even step 0.
                self.writer.start(step=restored.step if restored else -1)
            if restored and restored.step >= self.config.max_steps and not restored.owed:
                logger.info(
                    "this run is done; for more steps, run the same command with a larger --train.max-steps than %d",
                    restored.step,
                )
            at_start = [place for place, work in enumerate(self.periodic) if work.at_start]
            self.requests.begin()
            # What is measured may have changed since: there may be less of it.
            pending = [place for place in self.progress.owed if place < len(self.periodic)]
            self._steps(owed=pending if restored else at_start)
            self.requests.grant(STOP)  # of the last step, which nothing follows
            if self.writer:
                self._say_end()
        finally:
            self.stepper.loader.close()
            if self.writer:
                self.writer.close()

    def _say_end(self) -> None:
        step, losses, samples = self.progress.step, self.progress.losses, self.run_dir / SAMPLES
        best = best_of(self.run_dir)
        logger.info(
            "done: step %d%s. Checkpoints: %s%s%s. Next: %s",
            step,
            f", loss {losses[-1]:.3f}" if losses else "",
            self.run_dir / checkpoints.CHECKPOINTS,
            f", the best by held-out loss: {best.name}" if best else "",
            f"; sampled images: {samples}" if samples.is_dir() else "",
            report_command(self.run_dir),
        )

    def _steps(self, *, owed: list[int]) -> None:
        config, progress = self.config, self.progress
        # Evaluations that a stop cut short come first, so metrics do not depend on where a run was stopped.
        if not self.measure(owed):
            self.stop()
        if owed and self.writer:
            link_best(self.run_dir)  # by what that checkpoint's own manifest does not know
        batches = iter(self.stepper.loader)
        with tqdm(
            initial=progress.step, total=config.max_steps, unit="step", disable=self.writer is None
        ) as bar:
            while self.progress.step < self.last:
                self.watchdog.arm(STEP)
                done = self.stepper.step(batches, self.progress)
                due = [
                    place
                    for place, work in enumerate(self.periodic)
                    if work.every and self.is_due(work.every)
                ]
                # A skipped step is always logged: its row names the samples that somebody has to look at. So is one
                # that is measured: what is measured is drawn against the tokens in this row.
                if self.is_due(config.log_every) or due or done.was_skipped:
                    self.log([done.row])
                bar.set_postfix(loss=short(done.loss), image=short(done.image_loss), refresh=False)
                bar.update()
                check_updates(self.progress, run_dir=self.run_dir)
                if done.is_spike and config.spike == "rewind":
                    self.rewind()
                    bar.update(self.progress.step - bar.n)
                    continue
                # Measured before the save, so that the checkpoint names what a stop cut short.
                is_asked = not self.measure(due) or done.read.should_stop
                is_last = is_asked or self.progress.step == self.last
                if is_last or done.read.should_save or self.is_due(config.save_every):
                    self.save(must_succeed=is_last)
                if is_last and (self.progress.owed or self.progress.step < config.max_steps):
                    self.stop()

    def is_due(self, every: int) -> bool:
        """Tell whether work that runs every so many steps is due now; all is due after the last step, 0 only then."""
        step = self.progress.step
        return step == self.config.max_steps or (every > 0 and step % every == 0)

    def rewind(self) -> None:
        """Return to the last checkpoint after a spike, and continue with the data that follow the spike.

        Raises:
            NumericalError: there is no checkpoint, or the run was rewound too often.
        """
        # Verified anew: a disk may have failed since it was saved.
        self.watchdog.arm("rewind", times=BETWEEN_STEPS)
        folder = self.saver.newest()
        step = checkpoints.named_step(folder) if folder else 0
        times = self.progress.rewinds + 1
        if folder is None or step is None or times > MAX_SKIPPED:
            raise NumericalError(
                f"The loss spiked in step {self.progress.step}, and the run cannot rewind to the checkpoint of step"
                f" {step}: it has rewound {times - 1} times of at most {MAX_SKIPPED}. Look at the samples named in"
                " metrics.jsonl."
            )
        logger.warning(
            "the loss spiked in step %d: rewinding to step %d and skipping the data since",
            self.progress.step,
            step,
        )
        # The loader keeps its position: the batches since the checkpoint are not read a second time.
        self.progress = self.saver.load(folder)
        self.progress.rewinds = times
        if self.writer:
            self.writer.rewind(step=step)

    def measure(self, places: list[int]) -> bool:
        """Do periodic work; at a request to stop, mark all of it as pending and return False on every rank."""
        rows: list[MetricsRow] = []
        for place in places:
            self.watchdog.arm("measure", times=BETWEEN_STEPS)
            faults.reach("periodic", step=self.progress.step)
            was_cut = False
            try:
                with eagerly():
                    rows += self.periodic[place].work(self.progress.step, self.requests.is_signalled)
            except Interrupted:
                was_cut = True
            # Ranks look at the request at different moments; they must agree before one leaves the others waiting.
            if any_rank(was_cut):
                self.progress.owed = places
                return False
        self.progress.owed = []
        self.log(rows)
        if self.writer:
            for row in rows:
                logger.info("%s", measured(row))
        self._note_heldout(rows)
        return True

    def _note_heldout(self, rows: list[MetricsRow]) -> None:
        loss, progress = heldout_loss(rows), self.progress
        if loss is None:
            return
        progress.note_heldout(loss)
        if self.writer and progress.has_begun_to_rise():
            best = best_of(self.run_dir)
            logger.warning(
                "the held-out loss has risen in %d evaluations in a row, from %.3f to %.3f: the run begins to"
                " overfit.%s",
                RISES,
                progress.heldout_losses[-RISES - 1],
                loss,
                f" The checkpoint of its lowest is kept: {best}." if best else "",
            )

    def save(self, *, must_succeed: bool) -> None:
        """Commit a checkpoint of this step."""
        self.watchdog.arm("save", times=BETWEEN_STEPS)
        self.saver.save(self.progress, must_succeed=must_succeed)
        self.requests.grant(SAVE)

    def stop(self) -> None:
        """End the run, after everything is saved.

        Raises:
            Stopped: always.
        """
        self.requests.grant(STOP)
        step, last = self.progress.step, self.config.max_steps
        raise Stopped(f"Stopped at step {step} of {last}; run the same command to resume.")

    def log(self, rows: list[MetricsRow]) -> None:
        """Append rows to metrics.jsonl on the first rank."""
        if self.writer:
            for row in rows:
                self.writer.write(row)
