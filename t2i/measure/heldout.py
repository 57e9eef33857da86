"""Held-out losses: what pictures cost that training never saw, under their own, a wrong and an empty caption."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.shards.integrity import Sample
from t2i.data.shards.reader import read_split
from t2i.distributed.collectives import rank_and_size
from t2i.measure.reduce import ShouldStop, never, sum_over_ranks
from t2i.model.backbone import head_of, hidden_states, softmax_rows
from t2i.model.loss import NUM_SUMS, LossSums, split_sums, token_losses
from t2i.tokens.sequence import next_token_labels
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

CAPTIONS = ("own", "wrong", "empty")
HELDOUT_SPLITS = ("heldout", "combinations")


@dataclass(frozen=True)
class CaptionMeter:
    """Image loss of one split under three captions, nats a code, and its text loss, nats a token."""

    num_pictures: int
    own: float | None
    """None where no picture is read."""
    wrong: float | None
    """Each picture under the caption of another one, half the split away."""
    empty: float | None
    text: float | None
    """None where no caption is read."""


def heldout_rows(
    model: Any,
    *,
    config: DataConfig,
    layout: VocabLayout,
    tokenizer: TextTokenizer,
    num_pictures: int,
    batch_size: int = 32,
    should_stop: ShouldStop = never,
) -> list[dict[str, Any]]:
    """Measure every held-out split of the shards; rows for metrics.jsonl. Captions are read by `tokenizer`."""
    rows = []
    to_apply = tokenizer_to_apply(config, tokenizer=tokenizer)
    for split in HELDOUT_SPLITS:
        samples = [
            with_ids(sample, caption_ids_of(sample, tokenizer=to_apply))
            for sample in read_split(config.shards, split, num_samples=num_pictures, remote=config.remote)
        ]
        if samples:
            meter = caption_meter(
                model,
                samples,
                config=config,
                layout=layout,
                batch_size=batch_size,
                should_stop=should_stop,
            )
            rows.append(
                {
                    "split": split,
                    "num_pictures": meter.num_pictures,
                    "image_rows_only": softmax_rows(model, layout=layout) is not None,
                    "image_loss": meter.own,
                    "text_loss": meter.text,
                    "image_loss_wrong_caption": meter.wrong,
                    "image_loss_empty_caption": meter.empty,
                }
            )
    return rows


def heldout_text_rows(
    model: Any,
    *,
    config: DataConfig,
    layout: VocabLayout,
    num_sequences: int,
    batch_size: int = 32,
    should_stop: ShouldStop = never,
) -> list[dict[str, Any]]:
    """Measure the held-out sequences of text shards; a row for metrics.jsonl.

    With several ranks, each takes whole batches; sum and count are reduced once.
    """
    samples = read_split(config.shards, "heldout", num_samples=num_sequences, remote=config.remote)
    ids = torch.stack([caption_ids_of(sample, tokenizer=None) for sample in samples])  # (N, S)
    rank, world_size = rank_and_size()
    sums = sum_over_ranks(
        ids.split(batch_size)[rank::world_size],
        lambda batch: _sums(model, batch, layout=layout).pack().cpu(),
        model=model,
        size=NUM_SUMS,
        should_stop=should_stop,
    )
    return [{"split": "heldout", "num_sequences": len(ids), "text_loss": LossSums.unpack(sums).mean("text")}]


def with_ids(sample: Sample, caption_ids: Tensor) -> Sample:
    """Give a sample other caption ids (T,)."""
    changed = sample.copy()
    changed["caption_ids"] = caption_ids.numpy()
    return changed


def caption_meter(
    model: Any,
    samples: list[Sample],
    *,
    config: DataConfig,
    layout: VocabLayout,
    batch_size: int,
    should_stop: ShouldStop = never,
) -> CaptionMeter:
    """Measure samples (caption_ids and codes each) under their own, a wrong and the empty caption.

    With several ranks, each takes whole batches; sums and counts are reduced once.

    Raises:
        Interrupted: should_stop asked for it.
    """
    own = [torch.from_numpy(sample["caption_ids"].astype("int64")) for sample in samples]
    half = len(own) // 2
    captions = {"own": own, "wrong": own[half:] + own[:half], "empty": [ids[:0] for ids in own]}
    rank, world_size = rank_and_size()
    starts = range(rank * batch_size, len(samples), world_size * batch_size)

    def measure(at: tuple[str, int]) -> Tensor:
        kind, start = at
        batch = slice(start, start + batch_size)
        ids = stack_sequences(samples[batch], layout=layout, config=config, captions=captions[kind][batch])
        sums = torch.zeros(len(CAPTIONS), NUM_SUMS, dtype=torch.float64)
        sums[CAPTIONS.index(kind)] = _sums(model, ids, layout=layout).pack().cpu()
        return sums.flatten()

    places = [(kind, start) for kind in CAPTIONS for start in starts]
    size = NUM_SUMS * len(CAPTIONS)
    sums = sum_over_ranks(places, measure, model=model, size=size, should_stop=should_stop)
    of = {kind: LossSums.unpack(row) for kind, row in zip(CAPTIONS, sums.view(-1, NUM_SUMS), strict=True)}
    return CaptionMeter(
        num_pictures=len(samples),
        own=of["own"].mean("image"),
        wrong=of["wrong"].mean("image"),
        empty=of["empty"].mean("image"),
        text=of["own"].mean("text"),
    )


def _sums(model: Any, input_ids: Tensor, *, layout: VocabLayout) -> LossSums:
    """Sum the losses of one batch (B, S) on the model's device."""
    labels = next_token_labels(input_ids, layout=layout).to(model.device)
    hidden = hidden_states(model, input_ids.to(model.device))
    image_rows = softmax_rows(model, layout=layout)
    losses, squares = token_losses(hidden, labels, head=head_of(model), image_rows=image_rows)
    return split_sums(
        losses,
        labels,
        squares=squares,
        num_text_rows=layout.num_text_rows,
        first_image_id=layout.first_image_id,
    )
