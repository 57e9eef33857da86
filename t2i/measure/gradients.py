"""Whose gradient is it? The share of text, image and special tokens in tokens, loss and gradient norm."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from t2i.config import DataConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.shards.reader import read_split
from t2i.errors import DataError
from t2i.files import write_json
from t2i.model.backbone import head_of, hidden_states, softmax_rows
from t2i.model.loss import IGNORED, kinds_of, summed_loss
from t2i.runs.loading import OpenedModel
from t2i.tokens.sequence import next_token_labels

RESULTS = "gradients.json"
KINDS = ("text", "image", "special")


def heldout_sequences(model: OpenedModel, *, config: DataConfig, num_sequences: int) -> Tensor:
    """Read held-out pairs as sequences (N, S), as training would see them without dropped captions.

    Raises:
        DataError: there are none.
    """
    samples = list(read_split(config.shards, "heldout", num_samples=num_sequences))
    if not samples:
        raise DataError(f"{config.shards} has no held-out pairs.")
    to_apply = tokenizer_to_apply(config, tokenizer=model.text_tokenizer)
    captions = [caption_ids_of(sample, tokenizer=to_apply) for sample in samples]
    return stack_sequences(samples, layout=model.layout, config=config, captions=captions)


def gradient_shares(model: OpenedModel, input_ids: Tensor, *, batch_size: int = 32) -> dict[str, Any]:
    """Split the gradient of the mean loss over all tokens of (N, S) into its parts by kind of token.

    Returns:
        per kind: tokens, its share of them, of the loss and of the sum of the parts' norms; norm, over all
        parameters, and norm_layers, without embedding and head; and the cosine of text's part and image's.
    """
    labels = next_token_labels(input_ids, layout=model.layout)
    total = int((labels >= 0).sum())
    parts = {kind: _part(model, input_ids, labels, kind=kind, batch_size=batch_size) for kind in KINDS}
    model.model.zero_grad(set_to_none=True)
    rows = _row_ids(model)
    norms = {kind: _norm(gradient.values()) / total for kind, (gradient, _, _) in parts.items()}
    all_nats = sum(nats for _, nats, _ in parts.values())
    result: dict[str, Any] = {
        kind: {
            "tokens": count,
            "token_share": count / total,
            "loss_share": nats / all_nats,
            "norm": norms[kind],
            "norm_share": norms[kind] / sum(norms.values()),
            "norm_layers": _norm(value for name, value in gradient.items() if name not in rows) / total,
        }
        for kind, (gradient, nats, count) in parts.items()
    }
    text, image = parts["text"][0], parts["image"][0]
    dot = math.fsum(float((text[name].double() * image[name].double()).sum()) for name in text)
    result["cosine_text_image"] = dot / (total**2 * norms["text"] * norms["image"])
    return result


def write_results(results: dict[str, Any], *, model: OpenedModel, out: Path | None) -> Path:
    """Write gradients.json, by default (None) into the model's run or folder; return its path."""
    path = out or model.home / RESULTS
    write_json(path, {"checkpoint": str(model.folder), **results})
    return path


def _part(
    model: OpenedModel, input_ids: Tensor, labels: Tensor, *, kind: str, batch_size: int
) -> tuple[dict[str, Tensor], float, int]:
    """Compute the gradient of one kind's summed loss, that sum in nats, and its tokens."""
    learner, layout = model.model, model.layout
    learner.zero_grad(set_to_none=True)
    nats, count = 0.0, 0
    for ids, wanted in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True):
        hidden = hidden_states(learner, ids.to(learner.device))
        wanted = wanted.to(learner.device)
        kinds = kinds_of(wanted, num_text_rows=layout.num_text_rows, first_image_id=layout.first_image_id)
        total, _, _ = summed_loss(
            hidden,
            wanted.masked_fill(~kinds[kind], IGNORED),
            head=head_of(learner),
            image_rows=softmax_rows(learner, layout=layout),
        )
        total.backward()  # type: ignore[no-untyped-call]
        nats, count = nats + float(total.detach()), count + int(kinds[kind].sum())
    gradient = {
        name: value.grad.clone() for name, value in learner.named_parameters() if value.grad is not None
    }
    return gradient, nats, count


def _row_ids(model: OpenedModel) -> set[str]:
    """Name the parameters of embedding and head."""
    ends = (model.model.get_input_embeddings().weight, model.model.get_output_embeddings().weight)
    return {name for name, value in model.model.named_parameters() if any(value is end for end in ends)}


def _norm(values: Any) -> float:
    return math.sqrt(math.fsum(float(value.double().square().sum()) for value in values))
