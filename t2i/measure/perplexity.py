"""Held-out perplexity by kind of token, and the image loss by place on the code grid."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import fetch_shards, read_split
from t2i.errors import DataError, UserError
from t2i.files import write_json
from t2i.measure.heldout import HELDOUT_SPLITS
from t2i.model.backbone import head_of, hidden_states, softmax_rows
from t2i.model.loss import split_sums, token_losses
from t2i.runs.loading import OpenedModel
from t2i.runs.run_folder import RESOLVED
from t2i.tokens.sequence import Mode, next_token_labels

RESULTS = "perplexity.json"
KINDS = ("text", "image", "special")


def data_of(model: OpenedModel, *, shards: Path | None, mode: str | None) -> DataConfig:
    """Say what to measure on: what is given, else (None) what the model's run was trained on.

    Raises:
        UserError: no shards are given, and the model has no run folder that names them.
    """
    trained = RunData()
    if model.run_dir is not None:
        settings = yaml.safe_load((model.run_dir / RESOLVED).read_text())["data"]
        trained = RunData(
            Path(settings["shards"]), settings["remote"], mode=settings["mode"], seq_len=settings["seq_len"]
        )
    chosen = shards or trained.shards
    if chosen is None:
        raise UserError(f"{model.folder} is in no run folder; say with --data.shards what to measure it on.")
    seq_len = trained.seq_len or model.model.config.max_position_embeddings
    remote = trained.remote if shards is None else ""
    return DataConfig(chosen, remote, mode=cast(Mode, mode or trained.mode), seq_len=seq_len)


@dataclass(frozen=True)
class RunData:
    """What a run's resolved.yaml says of its data."""

    shards: Path | None = None
    """None for a model without a run."""
    remote: str = ""
    """Where its shards come from that are not in `shards` yet."""
    mode: str = "text-to-image"
    seq_len: int = 0
    """0 for a model without a run: as much as it was made for."""


def write_results(
    results: dict[str, Any], *, model: OpenedModel, config: DataConfig, out: Path | None
) -> Path:
    """Write perplexity.json, by default (None) into the model's run or folder; return its path."""
    path = out or model.home / RESULTS
    about = {
        "checkpoint": str(model.folder),
        "shards": str(config.shards),
        "mode": config.mode,
        "image_rows_only": softmax_rows(model.model, layout=model.layout) is not None,
    }
    write_json(path, {**about, "splits": results})
    return path


def perplexity(model: OpenedModel, *, config: DataConfig, batch_size: int = 32) -> dict[str, Any]:
    """Measure every held-out split of the shards that config names.

    Returns:
        per split: nats a token and perplexity of text, image, special and all tokens (None where there are none), bits
        a pixel, and the image loss of each row and column of the code grid.

    Raises:
        DataError: the shards' codes are not the model's, or there is no held-out split.
    """
    if config.remote:
        fetch_shards(config.shards, remote=config.remote)
    manifest = read_manifest(config.shards)
    if manifest.is_text:
        raise DataError(f"{config.shards} holds text alone, which eval/forgetting.py measures.")
    if manifest.codebook_size != model.layout.codebook_size:
        found, wanted = manifest.codebook_size, model.layout.codebook_size
        raise DataError(f"{config.shards} has {found} codes; the model of {model.folder} knows {wanted}.")
    to_apply = tokenizer_to_apply(config, tokenizer=model.text_tokenizer)
    results = {}
    for split in HELDOUT_SPLITS:
        samples = list(read_split(config.shards, split, remote=config.remote))
        if not samples:
            continue
        captions = [caption_ids_of(sample, tokenizer=to_apply) for sample in samples]
        ids = stack_sequences(samples, layout=model.layout, config=config, captions=captions)  # (N, S)
        results[split] = {"num_pictures": len(samples)} | measure(
            model, ids, batch_size=batch_size, image_size=manifest.image_size or None
        )
    if not results:
        raise DataError(f"{config.shards} has no held-out split.")
    return results


@torch.inference_mode()
def measure(
    model: OpenedModel, input_ids: Tensor, *, batch_size: int, image_size: int | None
) -> dict[str, Any]:
    """Measure sequences (N, S) with whole pictures, or without any; image_size None for ids without pixels."""
    sums = torch.zeros(2, len(KINDS), dtype=torch.float64)
    by_code: list[Tensor] = []
    image_rows = softmax_rows(model.model, layout=model.layout)
    for batch in input_ids.split(batch_size):
        labels = next_token_labels(batch, layout=model.layout).to(model.model.device)
        hidden = hidden_states(model.model, batch.to(model.model.device))
        losses, _ = token_losses(hidden, labels, head=head_of(model.model), image_rows=image_rows)
        split = split_sums(
            losses,
            labels,
            num_text_rows=model.layout.num_text_rows,
            first_image_id=model.layout.first_image_id,
        )
        sums += torch.stack([torch.stack(split[kind]).double() for kind in KINDS], dim=1).cpu()
        is_image = labels >= model.layout.first_image_id
        by_code.append(losses[is_image].double().cpu().view(len(batch), -1))  # (B, K)
    result: dict[str, Any] = {}
    for kind, total, count in zip(KINDS, *sums.tolist(), strict=True):
        result[kind] = _cost(total, count)
    result["total"] = _cost(float(sums[0].sum()), float(sums[1].sum()))
    codes = torch.cat(by_code)
    if codes.shape[1]:
        result |= by_place(codes.mean(0), image_size=image_size)
    return result


def by_place(code_losses: Tensor, *, image_size: int | None) -> dict[str, Any]:
    """Average losses of codes (K,), row by row over a square grid, by row and by column; add bits a pixel."""
    side = math.isqrt(len(code_losses))
    places: dict[str, Any] = {"image_loss_by_code": code_losses.tolist()}
    if image_size is not None:
        places["bits_per_pixel"] = float(code_losses.sum()) / math.log(2) / image_size**2
    if side * side == len(code_losses):
        grid = code_losses.view(side, side)
        places |= {"image_loss_by_row": grid.mean(1).tolist(), "image_loss_by_column": grid.mean(0).tolist()}
    return places


def _cost(total: float, count: float) -> dict[str, float] | None:
    """Nats a token and perplexity; None where no token was counted."""
    if not count:
        return None
    nats = total / count
    return {"tokens": count, "nats": nats, "perplexity": math.exp(nats)}
