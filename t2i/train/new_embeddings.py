"""Where a run's new embeddings begin: drawn, read from a file, or made from the shards; and at what cost."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from t2i.config import DataConfig, ModelConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.shards.integrity import Sample
from t2i.data.shards.manifest import IMAGE_TOKENIZER, Manifest
from t2i.data.shards.reader import read_split
from t2i.errors import DataError, UserError
from t2i.model.code_embeddings import deviations_by_captions, deviations_by_vectors
from t2i.model.resize import ends_of, new_rows
from t2i.model.uniform_start import (
    FAIR_EXCESS_NATS,
    NUM_SEQUENCES,
    Probe,
    begin_apart,
    code_cost,
    shift_to_uniform,
    uniform_cost,
)
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

logger = logging.getLogger(__name__)

FROM_SHARDS = ("codebook", "captions")
"""What model.new_embeddings makes from the shards: from their image tokenizer, or from their captions."""
MOST_CAPTIONS = 20_000
"""Captions that are read: more would take minutes, and each code then has some hundred images."""


def kind_of(config: ModelConfig, *, manifest: Manifest) -> str:
    """Return the word or file that model.new_embeddings stands for, which `auto` leaves to the shards and the start."""
    if config.new_embeddings != "auto":
        return config.new_embeddings
    # By one rule whatever the start, so that arms differ in nothing else.
    if manifest.has_image_tokenizer:
        return "codebook"
    return "random" if config.init == "random" else "uniform"


def check_new_embeddings(kind: str, *, data: DataConfig, manifest: Manifest) -> None:
    """Check that shards have what new embeddings are made from.

    Raises:
        UserError: they have no images, or an image tokenizer is needed and they have none.
    """
    if kind not in FROM_SHARDS:
        return
    if manifest.is_text:
        raise UserError(
            f"model.new_embeddings is {kind}; expected shards with image codes, but {data.shards} holds text only."
        )
    if kind == "captions" and data.cache_limit:
        raise UserError(
            f"model.new_embeddings is captions, which reads captions from all over {data.shards}; expected no"
            " data.cache_limit with it, which that would exceed. `codebook` reads few."
        )
    if kind == "codebook" and not manifest.has_image_tokenizer:
        raise UserError(
            f"model.new_embeddings is codebook; expected shards with an image tokenizer, but {data.shards} holds"
            " precomputed tokens, whose code vectors are not known. `captions` needs none."
        )


def rows_from_shards(
    kind: str,
    model: PreTrainedModel,
    *,
    data: DataConfig,
    layout: VocabLayout,
    tokenizer: TextTokenizer,
    seed: int,
) -> Mapping[str, Tensor]:
    """Make embeddings and LM head (V - V0, D) for all ids that a model with V0 ids has not yet.

    Raises:
        DataError: the shards have no captions that differ, or no vectors that do.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    deviations: Callable[[Tensor], Tensor]
    if kind == "captions":
        captions, codes = _seen(data, tokenizer=tokenizer)
        deviations = partial(
            deviations_by_captions, captions=captions, codes=codes, codebook_size=layout.codebook_size
        )
    else:
        vectors = ImageTokenizer.load(data.shards / IMAGE_TOKENIZER).code_vectors()
        deviations = partial(deviations_by_vectors, vectors=vectors, generator=generator)
    # Each end by its own text embeddings: an untied LM head lives in another space than the input embeddings.
    for name, old in ends_of(model).items():
        rows, text = old.detach(), old.detach()[: layout.num_text_tokens].cpu()
        moved = deviations(text)
        count = layout.vocab_size - len(rows)
        made = new_rows(text, count=count, kind="mean", generator=generator)
        place = layout.first_image_id - len(rows)
        made[place : place + layout.codebook_size] += moved.to(made.dtype)
        found[name] = made
    return found


def _seen(data: DataConfig, *, tokenizer: TextTokenizer) -> tuple[list[Tensor], Tensor]:
    """Read captions (T,) and the codes (N, K) of their images, evenly spread over the training split.

    Raises:
        DataError: all captions are empty.
    """
    apply = tokenizer_to_apply(data, tokenizer=tokenizer)
    captions, codes = [], []
    for sample in _trained_on(data, num_samples=MOST_CAPTIONS):
        captions.append(caption_ids_of(sample, tokenizer=apply))
        codes.append(torch.from_numpy(sample["codes"].astype("int64")))
    if not any(len(ids) for ids in captions):
        raise DataError(
            f"model.new_embeddings is captions; expected captions in {data.shards}, but those of its {len(captions)}"
            " images are empty."
        )
    return captions, torch.stack(codes)


def _trained_on(data: DataConfig, *, num_samples: int) -> Iterator[Sample]:
    """Read samples of the training split, evenly spread over those that data.subsample_every leaves."""
    return read_split(
        data.shards,
        "train",
        num_samples=num_samples,
        subsample_every=data.subsample_every,
        remote=data.remote,
    )


def first_sequences(data: DataConfig, *, layout: VocabLayout, tokenizer: TextTokenizer) -> Tensor:
    """Build a few sequences (N, S) of the training split, evenly spread, with as many null captions as training has."""
    samples = list(_trained_on(data, num_samples=NUM_SEQUENCES))
    apply = tokenizer_to_apply(data, tokenizer=tokenizer)
    captions = [caption_ids_of(sample, tokenizer=apply) for sample in samples]
    if data.mode == "text-to-image":
        # A code after no caption is dearer: to SmolLM2 by two nats.
        for place in range(round(data.caption_dropout * len(captions))):
            captions[round(place / data.caption_dropout)] = torch.empty(0, dtype=torch.long)
    return stack_sequences(samples, layout=layout, config=data, captions=captions)


def begin_fairly(model: PreTrainedModel, kind: str, *, probe: Probe, is_drawn: bool) -> None:
    """Bring new embeddings to the uniform cost if asked, and warn of others whose codes cost more.

    Args:
        is_drawn: the model is randomly initialised.
    """
    with _lent_to_gpu(model, probe) as there:
        if kind in FROM_SHARDS:
            begin_apart(model, there)
        elif kind == "uniform":
            shift_to_uniform(model, there)
        cost, uniform = code_cost(model, there), uniform_cost(model)
    # A nat more is usual of a random start, whose logits differ from one another by about one.
    if not cost <= uniform + (1.0 if is_drawn else FAIR_EXCESS_NATS):
        logger.warning(
            "with model.new_embeddings %s an image code costs %.1f nats before the first step, and a uniform guess over"
            " the vocabulary %.1f: the first steps pay that debt. `uniform` begins without it, where the model allows.",
            kind,
            cost,
            uniform,
        )


@contextmanager
def _lent_to_gpu(model: PreTrainedModel, probe: Probe) -> Iterator[Probe]:
    """Have a model on this rank's GPU for a while, where it has room: some dozen passes take hours on one core."""
    if not has_room_for(model):
        yield probe
        return
    nn.Module.to(model, "cuda")  # transformers' own is not typed
    try:
        yield replace(probe, ids=probe.ids.to("cuda"))
    finally:
        nn.Module.to(model, "cpu")
        torch.cuda.empty_cache()


def has_room_for(model: PreTrainedModel) -> bool:
    """Tell whether this rank's GPU has room for a model's weights, and as much again for what it computes."""
    if not torch.cuda.is_available():
        return False
    needed = 2 * sum(value.numel() * value.element_size() for value in model.parameters())
    return torch.cuda.mem_get_info()[0] >= needed
