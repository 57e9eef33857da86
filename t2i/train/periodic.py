"""Periodic work between steps: held-out losses, forgetting of text, and images of held-out captions."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from t2i.config import DataConfig, TrainConfig
from t2i.data.loader import num_trained_on
from t2i.data.shards.integrity import Sample
from t2i.data.shards.reader import read_split
from t2i.files import whole_file
from t2i.generate.sample import Drawer, draw_grid
from t2i.measure.forgetting import text_cost, text_sequences
from t2i.measure.heldout import heldout_rows, heldout_text_rows
from t2i.measure.reduce import Interrupted, ShouldStop
from t2i.runs.metrics_log import MetricsRow
from t2i.runs.run_folder import SAMPLES, write_sample_captions
from t2i.tokens.image import centre_crop_resize
from t2i.tokens.vocab import VocabLayout
from t2i.train.engine import Learner
from t2i.train.inputs import Inputs
from t2i.train.metrics import MetricsWriter
from t2i.train.prompts import Prompt, read_prompts

logger = logging.getLogger(__name__)

NUM_SAMPLED = 16
"""Held-out captions that are sampled every train.sample_every steps, always the same ones."""

MANY_TIMES = 100
"""Times that a run trains on each sample, above which it is warned of; tens are usual for few images."""

PeriodicWork = Callable[[int, ShouldStop], list[MetricsRow]]
"""Takes the step, and a check that asks it to stop with Interrupted; returns rows of metrics.jsonl. All ranks call it.
"""


@dataclass(frozen=True)
class Periodic:
    """PeriodicWork between steps, such as a held-out loss."""

    every: int
    """Steps between calls; 0 for never. It also runs after the last step."""
    work: PeriodicWork
    at_start: bool = False
    """It also runs before the first step."""


def periodic_work(
    config: TrainConfig,
    *,
    data: DataConfig,
    learner: Learner,
    inputs: Inputs,
    writer: MetricsWriter | None,
) -> list[Periodic]:
    """List what a run measures and samples, and how often.

    Args:
        writer: the first rank's; None on the others.
    """
    model, layout = learner.model, learner.layout
    if writer:
        _say_what_is_small(config, data=data, inputs=inputs)
    amount, tokenizer = config.eval_images, inputs.text_tokenizer
    found = [
        Periodic(
            every=config.eval_every,
            work=_text_losses(model, layout, data=data, num_sequences=amount)
            if inputs.manifest.is_text
            else _image_losses(model, layout, data=data, inputs=inputs, num_pictures=amount),
        )
    ]
    if config.eval_text:
        ids = text_sequences(
            config.eval_text, tokenizer=tokenizer, seq_len=data.seq_len, num_sequences=amount
        )
        # At the start too: forgetting is a difference to what the model knew before the first step.
        found.append(Periodic(every=config.eval_every, work=_kept_text(model, layout, ids), at_start=True))
    # Precomputed tokens have no decoder, and only text-to-image sequences were trained to follow a caption.
    if config.sample_every and inputs.image_tokenizer is not None and data.mode == "text-to-image":
        drawer = Drawer(model, tokenizer, inputs.image_tokenizer, layout)
        prompts = _prompts(config.sample_prompts, data=data, is_first=writer is not None)
        work = _samples(drawer, prompts=prompts, writer=writer)
        found.append(Periodic(every=config.sample_every, work=work))
    elif config.sample_every and writer:
        logger.warning(
            "train.sample_every is %d, but nothing is drawn: that takes shards with an image tokenizer, and data.mode"
            " text-to-image.",
            config.sample_every,
        )
    return found


def _say_what_is_small(config: TrainConfig, *, data: DataConfig, inputs: Inputs) -> None:
    """Warn where there is nothing to measure on, or where the run would learn its few images by heart."""
    counts = inputs.manifest.counts
    if not counts.get("heldout"):
        logger.warning(
            "%s holds nothing out, so there is no held-out loss and no score. Prepare with `--heldout-share 0.1`, say.",
            data.shards,
        )
    samples = num_trained_on(inputs.manifest, subsample_every=data.subsample_every)
    per_step = config.global_batch_tokens / data.seq_len * (1 - data.replay_ratio)
    trained = config.max_steps * per_step
    if samples and trained > MANY_TIMES * samples:
        steps = max(1, round(MANY_TIMES * samples / per_step))
        logger.warning(
            "%d steps train on each of %d samples %.0f times: expect the held-out loss to rise long before the end."
            " `--train.max-steps %d` trains %d times on each; `--views` of prepare makes more of few images.",
            config.max_steps,
            samples,
            trained / samples,
            steps,
            MANY_TIMES,
        )


def _image_losses(
    model: PreTrainedModel,
    layout: VocabLayout,
    *,
    data: DataConfig,
    inputs: Inputs,
    num_pictures: int,
) -> PeriodicWork:
    kept: dict[str, list[Sample]] = {}

    def measure(step: int, should_stop: ShouldStop) -> list[MetricsRow]:
        rows = heldout_rows(
            model,
            config=data,
            layout=layout,
            tokenizer=inputs.text_tokenizer,
            num_pictures=num_pictures,
            # Wordings show the same images again; `t2i perplexity` measures them, once, at the end.
            splits=inputs.manifest.heldout_splits,
            should_stop=should_stop,
            kept=kept,
        )
        return [{"step": step, **row} for row in rows]

    return measure


def _text_losses(
    model: PreTrainedModel, layout: VocabLayout, *, data: DataConfig, num_sequences: int
) -> PeriodicWork:
    kept: dict[str, list[Sample]] = {}

    def measure(step: int, should_stop: ShouldStop) -> list[MetricsRow]:
        rows = heldout_text_rows(
            model,
            config=data,
            layout=layout,
            num_sequences=num_sequences,
            should_stop=should_stop,
            kept=kept,
        )
        return [{"step": step, **row} for row in rows]

    return measure


def _kept_text(model: PreTrainedModel, layout: VocabLayout, ids: Tensor) -> PeriodicWork:
    """Measure forgetting: the loss on text sequences (N, S), and the probability that leaks to image codes."""

    def measure(step: int, should_stop: ShouldStop) -> list[MetricsRow]:
        cost = text_cost(model, ids, layout=layout, should_stop=should_stop)
        row = {"text_loss": cost.loss, "text_loss_text_rows": cost.loss_text_rows, "leaked": cost.leaked}
        return [{"step": step, "split": "text", **row}]

    return measure


def _samples(drawer: Drawer, *, prompts: Sequence[Prompt], writer: MetricsWriter | None) -> PeriodicWork:
    """Sample images of the same prompts each time: a PNG, and a copy for TensorBoard."""
    # Read once and kept: the same prompts make the grids of a run comparable.
    captions = [prompt.text for prompt in prompts]
    size = math.isqrt(drawer.model.config.codes_per_image) * drawer.image_tokenizer.downscale
    beside = [prompt.real and centre_crop_resize(prompt.real, size=size) for prompt in prompts]

    def sample(step: int, should_stop: ShouldStop) -> list[MetricsRow]:
        # The first rank alone: an image depends on its own seed, so more ranks would only draw it again.
        if writer and captions:
            file = writer.run_dir / SAMPLES / f"step_{step:06d}.png"
            with interruptible(drawer.model, should_stop), on_device_of(drawer):
                sheet = draw_grid(drawer, captions, beside=beside)
            try:
                file.parent.mkdir(exist_ok=True)
                write_sample_captions(writer.run_dir, captions)
                # Whole or not at all: the report, the page and the trackers read it while the run goes on.
                with whole_file(file) as written:
                    sheet.save(written, format="PNG")
            except OSError as error:  # a full disk ends no run, and the other ranks would wait for this one
                logger.warning("%s cannot be written: %s.", file, error.strerror)
            writer.show(sheet, step=step)
        return []

    return sample


def _prompts(file: Path | None, *, data: DataConfig, is_first: bool) -> list[Prompt]:
    """Read the prompts to sample: those of a file, else held-out captions, else those of training."""
    if file:
        return read_prompts(file)
    captions = _captions(data, split="heldout")
    if not captions:
        captions = _captions(data, split="train")
        if is_first:
            logger.warning(
                "%s holds nothing out, so samples are drawn from captions of training images: they do not show what"
                " the model draws of others.",
                data.shards,
            )
    return [Prompt(caption, None) for caption in captions]


def _captions(data: DataConfig, *, split: str) -> list[str]:
    samples = read_split(data.shards, split, num_samples=NUM_SAMPLED, remote=data.remote)
    return [sample["caption"] for sample in samples]


@contextmanager
def on_device_of(drawer: Drawer) -> Iterator[None]:
    """Let the image tokenizer decode where the model is, and give its memory back to training afterwards."""
    # All ranks wait for the grid, which takes a tokenizer of the paper's size ten minutes on a CPU's core.
    network = drawer.image_tokenizer.model
    home = network.device
    network.to(drawer.model.device)
    try:
        yield
    finally:
        network.to(home)


@contextmanager
def interruptible(model: nn.Module, should_stop: ShouldStop) -> Iterator[None]:
    """Let a request interrupt sampling before its next call of the model.

    Raises:
        Interrupted: should_stop said so; the model is back in its earlier mode.
    """
    was_training = model.training

    # A hook of the model: the sampler is uploaded with exported models and knows nothing of requests.
    def look(*_: object) -> None:
        if should_stop():
            raise Interrupted

    hook = model.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
        model.train(was_training)
