"""Held-out perplexity by kind of token, and image loss by position on the code grid."""

import logging
import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from t2i.config import DataConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.shards.integrity import Sample
from t2i.data.shards.manifest import TRAIN, Manifest, read_manifest, read_manifest_file
from t2i.data.shards.reader import fetch_shards, read_split, spread
from t2i.errors import DataError, NumericalError, UserError
from t2i.files import write_json
from t2i.measure.heldout import CaptionMeter, caption_meter, with_ids
from t2i.model.backbone import head_of, hidden_states, softmax_rows, trained_seq_len
from t2i.model.loss import NUM_SUMS, LossSums, split_sums, token_losses
from t2i.runs.loading import DATA_MANIFEST, OpenedModel
from t2i.runs.run_folder import read_settings
from t2i.tokens.sequence import Mode, caption_room, next_token_labels
from t2i.tokens.text import TextTokenizer

logger = logging.getLogger(__name__)

PERPLEXITY = "perplexity.json"
METER_IMAGES = 2_048
"""Images of a split that caption sensitivity is measured on: each costs two more passes of the model."""
LARGEST_NATS = math.log(sys.float_info.max)


def data_of(model: OpenedModel, *, shards: Path | None, mode: str | None) -> DataConfig:
    """Choose what to measure on: what is given, else (None) the data of the model's run.

    Raises:
        UserError: no shards are given, and the model has no run folder that names them.
    """
    trained = RunData(mode=getattr(model.model.config, "sequence_mode", RunData.mode))
    if model.run_dir is not None:
        settings = read_settings(model.run_dir)["data"]
        trained = RunData(
            Path(settings["shards"]), settings["remote"], mode=settings["mode"], seq_len=settings["seq_len"]
        )
    chosen = shards or trained.shards
    if chosen is None:
        raise UserError(f"{model.folder} is in no run folder; say with --data.shards what to measure it on.")
    # As long as in training: positions beyond were never trained, and would cost more for that alone. A model of any
    # number of positions was not trained on images, which is said when the shards are opened.
    seq_len = trained.seq_len or trained_seq_len(model.model) or DataConfig().seq_len
    remote = trained.remote if shards is None else ""
    return DataConfig(chosen, remote, mode=cast(Mode, mode or trained.mode), seq_len=seq_len)


@dataclass(frozen=True)
class RunData:
    """What a run's resolved.yaml says about its data."""

    shards: Path | None = None
    """None for a model without a run."""
    remote: str = ""
    """Where shards are downloaded from that are not in `shards` yet."""
    mode: str = "text-to-image"
    seq_len: int = 0
    """0 for a model without a run, whose config.json says it."""


@dataclass(frozen=True)
class TokenCost:
    """Loss of one kind of token."""

    tokens: float
    nats: float
    """Per token."""
    perplexity: float


@dataclass(frozen=True)
class PlaceLosses:
    """Image loss by position on the code grid, in nats per code."""

    image_loss_by_code: list[float]
    """(K,), row by row."""
    bits_per_pixel: float | None
    """None for shards of precomputed tokens, whose pixels are not known."""
    image_loss_by_row: list[float] | None
    """None where the codes form no square."""
    image_loss_by_column: list[float] | None

    def to_json(self) -> dict[str, float | list[float]]:
        """Return what was measured, under the keys of perplexity.json."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class SplitCosts:
    """Losses of one held-out split."""

    num_pictures: int
    text: TokenCost | None
    """None where no such token was counted, here and below."""
    image: TokenCost | None
    special: TokenCost | None
    total: TokenCost | None
    places: PlaceLosses | None
    """None for sequences without images."""
    captions: CaptionMeter | None = None
    """Caption sensitivity; None for sequences without captions."""
    label_captions: CaptionMeter | None = None
    """Of a split in other words: that of the same images under the captions of the split whose images they are."""
    cut_captions: int = 0
    """Images whose captions are longer than a sequence has room for: their ends are not read."""

    def to_json(self) -> dict[str, object]:
        """Give it the form of a split in perplexity.json."""
        left_out = {"places", *([] if self.label_captions else ["label_captions"])}
        costs = {key: value for key, value in asdict(self).items() if key not in left_out}
        return costs | (self.places.to_json() if self.places else {})


def write_perplexity(
    splits: dict[str, SplitCosts], *, model: OpenedModel, config: DataConfig, path: Path
) -> None:
    """Write what perplexity.json holds."""
    about = {
        "checkpoint": str(model.folder),
        "shards": str(config.shards),
        "mode": config.mode,
        "dtype": model.dtype,
        "image_rows_only": softmax_rows(model.model, layout=model.layout) is not None,
    }
    write_json(path, {**about, "splits": {split: costs.to_json() for split, costs in splits.items()}})


def measure_perplexity(
    model: OpenedModel, *, config: DataConfig, batch_size: int = 32, num_images: int | None = None
) -> dict[str, SplitCosts]:
    """Measure every held-out split of the shards that config names, also those of other wordings.

    Args:
        num_images: images of each split, evenly spread; None for all.

    Raises:
        DataError: the shards have other codes than the model, or no held-out split.
    """
    manifest = read_pairs_manifest(config, model=model)
    to_apply = tokenizer_to_apply(config, tokenizer=model.text_tokenizer)
    results = {}
    room = caption_room(mode=config.mode, seq_len=config.seq_len, num_codes=manifest.codes_per_image)
    for split in (split for split in manifest.counts if split != TRAIN):
        samples = list(read_split(config.shards, split, num_samples=num_images, remote=config.remote))
        captions = [caption_ids_of(sample, tokenizer=to_apply) for sample in samples]
        ids = stack_sequences(samples, layout=model.layout, config=config, captions=captions)  # (N, S)
        costs = split_costs(
            model,
            ids,
            batch_size=batch_size,
            image_size=manifest.image_size or None,
            description=f"{split} losses",
        )
        if config.mode == "text-to-image":
            if cut := sum(len(caption) > room for caption in captions):
                logger.warning(
                    "%s: %d of %d captions are longer than the %d tokens that data.seq_len %d has room for, and are"
                    " truncated.",
                    *(split, cut, len(captions), room, config.seq_len),
                )
            costs = replace(costs, cut_captions=cut)
            heard = spread([with_ids(*one) for one in zip(samples, captions, strict=True)], METER_IMAGES)
            measure = partial(
                caption_meter,
                model.model,
                config=config,
                layout=model.layout,
                batch_size=batch_size,
                description=f"{split} captions",
            )
            labelled = {}
            if other := (manifest.wordings or {}).get(split):
                labelled = _labelled(heard, other, config=config, to_apply=to_apply)
            # A worth in other words compares with that of the label on the same images alone.
            heard = [heard[place] for place in labelled] or heard
            costs = replace(costs, captions=measure(heard))
            if labelled:
                costs = replace(costs, label_captions=measure([*labelled.values()], with_null=False))
        results[split] = costs
    if not results:
        raise DataError(f"{config.shards} has no held-out pairs; prepare with a larger --heldout-share.")
    return results


def _labelled(
    samples: list[Sample], split: str, *, config: DataConfig, to_apply: TextTokenizer | None
) -> dict[int, Sample]:
    """Find the captions that images have in another split: place of each sample that is there -> it with those ids."""
    # By codes and style: the two splits have keys of their own.
    wanted = {_looks(sample): place for place, sample in enumerate(samples)}
    found: dict[int, set[tuple[int, ...]]] = {}
    for one in read_split(config.shards, split, remote=config.remote):
        if (place := wanted.get(_looks(one))) is not None:
            found.setdefault(place, set()).add(tuple(caption_ids_of(one, tokenizer=to_apply).tolist()))
    # Where codes are few, images of several captions may share them all: which one is meant is not known then.
    alone = {place: next(iter(ids)) for place, ids in found.items() if len(ids) == 1}
    return {place: with_ids(samples[place], torch.tensor(alone[place])) for place in sorted(alone)}


def _looks(sample: Sample) -> tuple[bytes, str]:
    return sample["codes"].tobytes(), sample.get("style", "")


def read_pairs_manifest(config: DataConfig, *, model: OpenedModel) -> Manifest:
    """Read the manifest of image shards whose codes mean to the model what they meant in training.

    Raises:
        DataError: they hold text only, or other codes than the model's.
    """
    if config.remote:
        fetch_shards(config.shards, remote=config.remote)
    manifest = read_manifest(config.shards)
    if manifest.is_text:
        raise DataError(f"{config.shards} holds text only, which eval/forgetting.py measures.")
    sizes = (manifest.codebook_size, manifest.codes_per_image)
    known = (model.layout.codebook_size, getattr(model.model.config, "codes_per_image", 0))
    if sizes != known:
        raise DataError(
            f"{config.shards} has {sizes[0]} codes, {sizes[1]} per image; the model of {model.folder} has {known[0]}"
            f" codes, {known[1]} per image."
        )
    trained = model.home / DATA_MANIFEST
    maker = read_manifest_file(trained).image_tokenizer if trained.is_file() else None
    # Codes have a meaning under one image tokenizer only, and another one may have as many.
    if maker is not None and maker.fingerprint != manifest.code_maker.fingerprint:
        raise DataError(
            f"{config.shards} was made with the image tokenizer {manifest.code_maker.name}; the model of {model.folder}"
            f" was trained with another one, {maker.name}."
        )
    return manifest


@torch.inference_mode()
def split_costs(
    model: OpenedModel, input_ids: Tensor, *, batch_size: int, image_size: int | None, description: str = ""
) -> SplitCosts:
    """Measure sequences (N, S) with whole images, or without any.

    Args:
        image_size: None for codes without pixels.
        description: of a bar; empty for none.
    """
    layout, network = model.layout, model.model
    # float64: a split has millions of tokens, and fp32 sums of them lose what two models differ by.
    packed = torch.zeros(NUM_SUMS, dtype=torch.float64)
    by_code: list[Tensor] = []
    batches = input_ids.split(batch_size)
    for batch in tqdm(batches, desc=description, unit="batch", disable=not description):
        labels = next_token_labels(batch, layout=layout).to(network.device)  # (B, S)
        hidden = hidden_states(network, batch.to(network.device))  # (B, S, D)
        losses, squares = token_losses(
            hidden, labels, head=head_of(network), image_rows=softmax_rows(network, layout=layout)
        )
        parts = split_sums(
            losses,
            labels,
            squares=squares,
            num_text_rows=layout.num_text_rows,
            first_image_id=layout.first_image_id,
        )
        packed += parts.pack().cpu()
        # Every sequence has all K codes, so the chosen losses line up by position.
        by_code.append(losses[labels >= layout.first_image_id].double().cpu().view(len(batch), -1))  # (B, K)
    codes = torch.cat(by_code)  # (N, K)
    sums = LossSums.unpack(packed)
    costs = {kind: _cost(float(nats), float(count)) for kind, (nats, count) in sums.by_kind().items()}
    return SplitCosts(
        num_pictures=len(input_ids),
        text=costs["text"],
        image=costs["image"],
        special=costs["special"],
        total=_cost(float(sums.text + sums.image + sums.special), float(sums.tokens())),
        places=by_place(codes.mean(0), image_size=image_size) if codes.shape[1] else None,
    )


def by_place(code_losses: Tensor, *, image_size: int | None) -> PlaceLosses:
    """Arrange mean losses of codes (K,) by position; image_size, in pixels per side, is None where it is not known."""
    side = math.isqrt(len(code_losses))
    grid = code_losses.view(side, side) if side * side == len(code_losses) else None
    # Per pixel: models with codebooks of different sizes then compare, as losses per code do not.
    bits = float(code_losses.sum()) / math.log(2)
    return PlaceLosses(
        image_loss_by_code=code_losses.tolist(),
        bits_per_pixel=bits / image_size**2 if image_size is not None else None,
        image_loss_by_row=grid.mean(1).tolist() if grid is not None else None,
        image_loss_by_column=grid.mean(0).tolist() if grid is not None else None,
    )


def _cost(nats: float, count: float) -> TokenCost | None:
    """Divide a sum in nats by its tokens; None where no token was counted."""
    if not count:
        return None
    return TokenCost(tokens=count, nats=nats / count, perplexity=perplexity_of(nats / count))


def perplexity_of(nats: float) -> float:
    """Exponentiate a loss in nats per token.

    Raises:
        NumericalError: the loss or its exponential is not finite.
    """
    # JSON has no word for either, and what reads the file would stop at it.
    if not nats < LARGEST_NATS:
        raise NumericalError(
            f"The loss is {nats:.4g} nats per token, which has no perplexity: the model diverged."
        )
    return math.exp(nats)
