"""What a run does between steps: held-out losses, text that is kept or lost, pictures of held-out captions."""

from typing import Any

from t2i.config import RunConfig
from t2i.data.shards import read_split
from t2i.generate.draw import draw_grid
from t2i.measure.forgetting import text_cost, text_sequences
from t2i.measure.heldout import heldout_rows, heldout_text_rows
from t2i.runs.ckpt import Checkpoint
from t2i.runs.folder import SAMPLE_CAPTIONS, SAMPLES
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.loop import Periodic, Work
from t2i.train.metrics import MetricsWriter

NUM_SAMPLED = 16
"""Held-out captions drawn every train.sample_every steps, always the same."""


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
    def measure(step: int) -> list[dict[str, Any]]:
        amount = config.train.eval_pictures
        rows = heldout_rows(
            model, config=config.data, layout=layout, tokenizer=tokenizer, num_pictures=amount
        )
        return [{"step": step, **row} for row in rows]

    return measure


def _text_losses(config: RunConfig, model: Any, layout: VocabLayout) -> Work:
    def measure(step: int) -> list[dict[str, Any]]:
        amount = config.train.eval_pictures
        rows = heldout_text_rows(model, config=config.data, layout=layout, num_sequences=amount)
        return [{"step": step, **row} for row in rows]

    return measure


def _kept_text(config: RunConfig, model: Any, layout: VocabLayout, tokenizer: TextTokenizer) -> Work:
    """Measure what is left of the language model."""
    settings = {"seq_len": config.data.seq_len, "num_sequences": config.train.eval_pictures}
    ids = text_sequences(config.train.eval_text, tokenizer=tokenizer, **settings)

    def measure(step: int) -> list[dict[str, Any]]:
        cost = text_cost(model, ids, layout=layout)
        row = {"text_loss": cost.loss, "text_loss_text_rows": cost.loss_text_rows, "leaked": cost.leaked}
        return [{"step": step, "split": "text", **row}]

    return measure


def _samples(config: RunConfig, drawer: Checkpoint, writer: MetricsWriter | None) -> Work:
    """Draw held-out captions, always the same, on the first rank: a PNG and TensorBoard's copy of it."""
    heldout = read_split(config.data.shards, "heldout", num_samples=NUM_SAMPLED, remote=config.data.remote)
    captions = [sample["caption"] for sample in heldout]

    def sample(step: int) -> list[dict[str, Any]]:
        if writer and captions:
            folder = config.run_dir / SAMPLES
            folder.mkdir(exist_ok=True)
            (folder / SAMPLE_CAPTIONS).write_text("\n".join(captions) + "\n")
            sheet = draw_grid(drawer, captions)
            sheet.save(folder / f"step_{step:06d}.png")
            writer.show(sheet, step=step)
        return []

    return sample
