"""What a run does between steps: held-out losses, text that is kept or lost, pictures of held-out captions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from t2i.config import RunConfig
from t2i.data.shards.reader import read_split
from t2i.generate.sample import draw_grid
from t2i.measure.forgetting import text_cost, text_sequences
from t2i.measure.heldout import heldout_rows, heldout_text_rows
from t2i.measure.reduce import Interrupted, ShouldStop
from t2i.runs.loading import Checkpoint
from t2i.runs.run_folder import SAMPLE_CAPTIONS, SAMPLES
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.metrics import MetricsWriter

NUM_SAMPLED = 16
"""Held-out captions drawn every train.sample_every steps, always the same."""

Work = Callable[[int, ShouldStop], list[dict[str, Any]]]
"""Takes the step, and what asks it to break off with Interrupted; returns rows for metrics.jsonl. All ranks do it."""


@dataclass(frozen=True)
class Periodic:
    """Work between steps, such as a held-out loss."""

    every: int
    """Steps between calls; 0 for never. It is also done after the last step."""
    work: Work
    at_start: bool = False
    """Also before the first step."""


def periodic_work(
    config: RunConfig,
    *,
    model: Any,
    layout: VocabLayout,
    text_tokenizer: TextTokenizer,
    image_tokenizer: ImageTokenizer | None,
    reads_text: bool,
    writer: MetricsWriter | None,
) -> list[Periodic]:
    """List what a run measures and draws, with how often.

    Args:
        image_tokenizer: None where there are no pictures to draw.
        reads_text: the shards are of documents.
        writer: the first rank's.
    """
    settings = config.train
    measure = _picture_losses(config, model, layout, text_tokenizer)
    if reads_text:
        measure = _text_losses(config, model, layout)
    found = [Periodic(every=settings.eval_every, work=measure)]
    if settings.eval_text:
        work = _kept_text(config, model, layout, text_tokenizer)
        found.append(Periodic(every=settings.eval_every, work=work, at_start=True))
    if settings.sample_every and image_tokenizer is not None and config.data.mode == "text-to-image":
        drawer = Checkpoint(config.run_dir, config.run_dir, model, text_tokenizer, image_tokenizer, layout)
        found.append(Periodic(every=settings.sample_every, work=_samples(config, drawer, writer)))
    return found


def _picture_losses(config: RunConfig, model: Any, layout: VocabLayout, tokenizer: TextTokenizer) -> Work:
    def measure(step: int, should_stop: ShouldStop) -> list[dict[str, Any]]:
        amount = config.train.eval_pictures
        rows = heldout_rows(
            model,
            config=config.data,
            layout=layout,
            tokenizer=tokenizer,
            num_pictures=amount,
            should_stop=should_stop,
        )
        return [{"step": step, **row} for row in rows]

    return measure


def _text_losses(config: RunConfig, model: Any, layout: VocabLayout) -> Work:
    def measure(step: int, should_stop: ShouldStop) -> list[dict[str, Any]]:
        amount = config.train.eval_pictures
        rows = heldout_text_rows(
            model, config=config.data, layout=layout, num_sequences=amount, should_stop=should_stop
        )
        return [{"step": step, **row} for row in rows]

    return measure


def _kept_text(config: RunConfig, model: Any, layout: VocabLayout, tokenizer: TextTokenizer) -> Work:
    """Measure what is left of the language model."""
    settings = {"seq_len": config.data.seq_len, "num_sequences": config.train.eval_pictures}
    ids = text_sequences(config.train.eval_text, tokenizer=tokenizer, **settings)

    def measure(step: int, should_stop: ShouldStop) -> list[dict[str, Any]]:
        cost = text_cost(model, ids, layout=layout, should_stop=should_stop)
        row = {"text_loss": cost.loss, "text_loss_text_rows": cost.loss_text_rows, "leaked": cost.leaked}
        return [{"step": step, "split": "text", **row}]

    return measure


def _samples(config: RunConfig, drawer: Checkpoint, writer: MetricsWriter | None) -> Work:
    """Draw held-out captions, always the same, on the first rank: a PNG and TensorBoard's copy of it."""
    heldout = read_split(config.data.shards, "heldout", num_samples=NUM_SAMPLED, remote=config.data.remote)
    captions = [sample["caption"] for sample in heldout]

    def sample(step: int, should_stop: ShouldStop) -> list[dict[str, Any]]:
        if writer and captions:
            folder = config.run_dir / SAMPLES
            folder.mkdir(exist_ok=True)
            (folder / SAMPLE_CAPTIONS).write_text("\n".join(captions) + "\n")
            with interruptible(drawer.model, should_stop):
                sheet = draw_grid(drawer, captions)
            sheet.save(folder / f"step_{step:06d}.png")
            writer.show(sheet, step=step)
        return []

    return sample


@contextmanager
def interruptible(model: nn.Module, should_stop: ShouldStop) -> Iterator[None]:
    """Let a request break off what calls the model again and again, such as drawing, before the next call.

    Raises:
        Interrupted: should_stop asked for it; the model is left in the mode it was in.
    """
    was_training = model.training

    def look(*_: Any) -> None:
        if should_stop():
            raise Interrupted

    hook = model.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
        model.train(was_training)
