"""The share of text, image and special tokens in token count, loss and gradient norm (sec. 2.2)."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from t2i.config import DataConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.shards.reader import read_split
from t2i.errors import DataError
from t2i.files import write_json
from t2i.measure.perplexity import read_pairs_manifest
from t2i.model.backbone import head_of, hidden_states, softmax_rows
from t2i.model.loss import kinds_of, summed_loss
from t2i.runs.loading import OpenedModel
from t2i.tokens.sequence import IGNORED, next_token_labels
from t2i.tokens.vocab import KINDS

GRADIENTS = "gradients.json"


def heldout_sequences(model: OpenedModel, *, config: DataConfig, num_sequences: int) -> Tensor:
    """Read held-out pairs as sequences (N, S), as training would see them without dropped captions.

    Raises:
        DataError: the shards have no held-out pairs, or other codes than the model's.
    """
    read_pairs_manifest(config, model=model)
    samples = list(read_split(config.shards, "heldout", num_samples=num_sequences, remote=config.remote))
    if not samples:
        raise DataError(f"{config.shards} has no held-out pairs; prepare with a larger --heldout-share.")
    to_apply = tokenizer_to_apply(config, tokenizer=model.text_tokenizer)
    captions = [caption_ids_of(sample, tokenizer=to_apply) for sample in samples]
    return stack_sequences(samples, layout=model.layout, config=config, captions=captions)


@dataclass(frozen=True)
class KindShare:
    """The share of one kind of token in tokens, loss and gradient."""

    tokens: int
    token_share: float
    loss_share: float
    norm: float
    """Norm of its part of the mean loss's gradient, over all parameters."""
    norm_share: float
    """Share of the sum of the parts' norms."""
    norm_layers: float
    """Without embeddings and LM head."""


@dataclass(frozen=True)
class GradientShares:
    """The gradient of the mean loss, in its parts by kind of token."""

    text: KindShare
    image: KindShare
    special: KindShare
    cosine_text_image: float | None
    """Between the parts of text and image, which conflict below 0; None where either has no gradient."""

    def by_kind(self) -> dict[str, KindShare]:
        """Name the parts of text, image and special."""
        return {"text": self.text, "image": self.image, "special": self.special}


@dataclass(frozen=True)
class _Part:
    gradient: dict[str, Tensor]
    """Gradient of one kind's summed loss, by parameter."""
    nats: float
    tokens: int


def gradient_shares(model: OpenedModel, input_ids: Tensor, *, batch_size: int = 32) -> GradientShares:
    """Split the gradient of the mean loss over all tokens of (N, S) into its parts by kind of token (sec. 2.2)."""
    labels = next_token_labels(input_ids, layout=model.layout)  # (N, S)
    total = int((labels >= 0).sum())
    parts = {kind: _part(model, input_ids, labels, kind=kind, batch_size=batch_size) for kind in KINDS}
    model.model.zero_grad(set_to_none=True)
    # One divisor for all kinds: the parts then add up to the gradient that training follows.
    norms = {kind: _norm(part.gradient.values()) / total for kind, part in parts.items()}
    all_nats = sum(part.nats for part in parts.values())
    vocabulary = _embedding_names(model)
    shares = {
        kind: KindShare(
            tokens=part.tokens,
            token_share=part.tokens / total,
            loss_share=part.nats / all_nats,
            norm=norms[kind],
            norm_share=norms[kind] / sum(norms.values()),
            # Apart from embeddings and head, whose rows serve one kind of token alone: in the layers both kinds meet.
            norm_layers=_norm(value for name, value in part.gradient.items() if name not in vocabulary)
            / total,
        )
        for kind, part in parts.items()
    }
    text, image = parts["text"].gradient, parts["image"].gradient
    # fsum and float64: over billions of products of both signs, a float32 sum is mostly rounding.
    dot = math.fsum(float((text[name].double() * image[name].double()).sum()) for name in text)
    both = total**2 * norms["text"] * norms["image"]
    # Sequences of one kind have no angle between two: dividing by a norm of 0 would end the whole measure.
    return GradientShares(**shares, cosine_text_image=dot / both if both else None)


def write_gradients(shares: GradientShares, *, model: OpenedModel, path: Path) -> None:
    """Write what gradients.json holds."""
    write_json(path, {"checkpoint": str(model.folder), **asdict(shares)})


def _part(model: OpenedModel, input_ids: Tensor, labels: Tensor, *, kind: str, batch_size: int) -> _Part:
    """Compute the gradient of one kind's summed loss."""
    network, layout = model.model, model.layout
    network.zero_grad(set_to_none=True)
    nats, count = 0.0, 0
    batches = list(zip(input_ids.split(batch_size), labels.split(batch_size), strict=True))
    for ids, targets in tqdm(batches, desc=f"gradient of {kind}", unit="batch"):
        targets = targets.to(network.device)
        hidden = hidden_states(network, ids.to(network.device))  # (B, S, D)
        kinds = kinds_of(targets, num_text_rows=layout.num_text_rows, first_image_id=layout.first_image_id)
        # Labels of other kinds are ignored, but their tokens stay: every token is predicted from the whole sequence.
        total, _, _ = summed_loss(
            hidden,
            targets.masked_fill(~kinds[kind], IGNORED),
            head=head_of(network),
            image_rows=softmax_rows(network, layout=layout),
        )
        total.backward()  # type: ignore[no-untyped-call]
        nats, count = nats + float(total.detach()), count + int(kinds[kind].sum())
    gradient = {
        name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None
    }
    return _Part(gradient, nats=nats, tokens=count)


def _embedding_names(model: OpenedModel) -> set[str]:
    """Name the parameters of embeddings and LM head."""
    # By identity, not by name: names differ between classes, and a tied head has none of its own.
    ends = (model.model.get_input_embeddings().weight, model.model.get_output_embeddings().weight)
    return {name for name, value in model.model.named_parameters() if any(value is end for end in ends)}


def _norm(values: Iterable[Tensor]) -> float:
    return math.sqrt(math.fsum(float(value.double().square().sum()) for value in values))
