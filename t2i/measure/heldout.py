"""Held-out losses of images under matched, shuffled and null captions, and of text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from t2i.config import DataConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.shards.integrity import Sample
from t2i.data.shards.reader import read_split
from t2i.distributed.collectives import rank_and_size
from t2i.measure.reduce import ShouldStop, never, sum_over_ranks
from t2i.measure.shuffled import unrelated
from t2i.model.backbone import head_of, hidden_states, softmax_rows
from t2i.model.loss import NUM_SUMS, LossSums, split_sums, token_losses
from t2i.runs.metrics_log import MetricsRow
from t2i.tokens.sequence import next_token_labels
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

# Matched, shuffled and null. These names are keys of scores.json, which older files have too.
CAPTIONS = ("own", "wrong", "empty")


@dataclass(frozen=True)
class CaptionMeter:
    """Caption sensitivity of one split: image loss under three captions (nats per code), and text loss (per token)."""

    num_pictures: int
    own: float | None
    """Under the matched caption; None for a split without images."""
    wrong: float | None
    """Under the shuffled caption, another text that is of another image; None if an image has none."""
    empty: float | None
    """Under the null caption; None where that was not measured."""
    text: float | None
    """None where no caption token is predicted."""


def heldout_rows(
    model: PreTrainedModel,
    *,
    config: DataConfig,
    layout: VocabLayout,
    tokenizer: TextTokenizer,
    num_pictures: int,
    splits: Sequence[str] = ("heldout",),
    batch_size: int = 32,
    should_stop: ShouldStop = never,
    kept: dict[str, list[Sample]] | None = None,
) -> list[MetricsRow]:
    """Measure held-out splits of the shards, with captions read by `tokenizer`; rows for metrics.jsonl.

    Args:
        kept: where the samples of each split are kept for the next time, which takes no index and no hash then.
    """
    rows: list[MetricsRow] = []
    kept = {} if kept is None else kept
    for split in splits:
        if split not in kept:
            to_apply = tokenizer_to_apply(config, tokenizer=tokenizer)
            kept[split] = [
                with_ids(sample, caption_ids_of(sample, tokenizer=to_apply))
                for sample in read_split(config.shards, split, num_samples=num_pictures, remote=config.remote)
            ]
        if samples := kept[split]:
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
                    # Keys of metrics.jsonl: renaming one would cut the curves of runs that are resumed.
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
    model: PreTrainedModel,
    *,
    config: DataConfig,
    layout: VocabLayout,
    num_sequences: int,
    batch_size: int = 32,
    should_stop: ShouldStop = never,
    kept: dict[str, list[Sample]] | None = None,
) -> list[MetricsRow]:
    """Measure the held-out sequences of text shards; a row for metrics.jsonl, none where nothing is held out.

    With several ranks, each takes whole batches. Sum and count are reduced once.

    Args:
        kept: as of heldout_rows.
    """
    kept = {} if kept is None else kept
    if "heldout" not in kept:
        read = read_split(config.shards, "heldout", num_samples=num_sequences, remote=config.remote)
        kept["heldout"] = list(read)
    samples = kept["heldout"]
    if not samples:  # prepared with nothing held out
        return []
    ids = torch.stack([caption_ids_of(sample, tokenizer=None) for sample in samples])  # (N, S)
    rank, world_size = rank_and_size()
    # Whole batches per rank: the last bits of a product depend on its shape, so any number of ranks gives one result.
    sums = sum_over_ranks(
        ids.split(batch_size)[rank::world_size],
        lambda batch: _sums(model, batch, layout=layout).pack().cpu(),
        model=model,
        size=NUM_SUMS,
        should_stop=should_stop,
    )
    return [{"split": "heldout", "num_sequences": len(ids), "text_loss": LossSums.unpack(sums).mean("text")}]


def with_ids(sample: Sample, caption_ids: Tensor) -> Sample:
    """Copy a sample with other caption ids (T,)."""
    changed = sample.copy()
    changed["caption_ids"] = caption_ids.numpy()
    return changed


def caption_meter(
    model: PreTrainedModel,
    samples: list[Sample],
    *,
    config: DataConfig,
    layout: VocabLayout,
    batch_size: int,
    with_null: bool = True,
    should_stop: ShouldStop = never,
    description: str = "",
) -> CaptionMeter:
    """Measure samples (caption_ids and codes each) under matched, shuffled and null captions.

    With several ranks, each takes whole batches. Sums and counts are reduced once.

    Args:
        with_null: measure the null caption too, which is the same whatever the others say.
        description: as of sum_over_ranks.

    Raises:
        Interrupted: should_stop asked for it.
    """
    own = [torch.from_numpy(sample["caption_ids"].astype("int64")) for sample in samples]
    # Shifted by half the split and not by one: neighbours may be views of one image. A fixed shift gives the same pairs
    # at every step, so that no new draw adds noise to the curve.
    others = unrelated(
        [tuple(ids.tolist()) for ids in own],
        [sample["codes"].tobytes() for sample in samples],
        shift=len(own) // 2,
        # A caption of another style would cost for its style, whatever the model makes of the other words.
        alike=[sample.get("style", "") for sample in samples],
    )
    captions = {
        "own": own,
        "wrong": [own[place] for place in others or []],
        "empty": [ids[:0] for ids in own],
    }
    # Where all captions are one, its matched loss would be reported as the shuffled one.
    kinds = [kind for kind in CAPTIONS if kind != "wrong" or others]
    kinds = [kind for kind in kinds if kind != "empty" or with_null]
    rank, world_size = rank_and_size()
    starts = range(rank * batch_size, len(samples), world_size * batch_size)

    def measure(at: tuple[str, int]) -> Tensor:
        kind, start = at
        batch = slice(start, start + batch_size)
        ids = stack_sequences(samples[batch], layout=layout, config=config, captions=captions[kind][batch])
        # A row per caption, so that all three travel in one reduction.
        sums = torch.zeros(len(CAPTIONS), NUM_SUMS, dtype=torch.float64)
        sums[CAPTIONS.index(kind)] = _sums(model, ids, layout=layout).pack().cpu()
        return sums.flatten()

    places = [(kind, start) for kind in kinds for start in starts]
    size = NUM_SUMS * len(CAPTIONS)
    sums = sum_over_ranks(
        places, measure, model=model, size=size, should_stop=should_stop, description=description
    )
    of = {kind: LossSums.unpack(row) for kind, row in zip(CAPTIONS, sums.view(-1, NUM_SUMS), strict=True)}
    return CaptionMeter(
        num_pictures=len(samples),
        own=of["own"].mean("image"),
        wrong=of["wrong"].mean("image"),
        empty=of["empty"].mean("image"),
        # Under the matched captions alone: the shuffled ones are the same tokens, and the null ones have none.
        text=of["own"].mean("text"),
    )


def _sums(model: PreTrainedModel, input_ids: Tensor, *, layout: VocabLayout) -> LossSums:
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
