"""Perplexity of texts under a t2i model or the language model that it started from, for `evaluate.load`."""

import datasets
import evaluate
import torch
from transformers import PreTrainedModel

from t2i.errors import DataError
from t2i.measure.perplexity import perplexity_of
from t2i.model.backbone import head_of, hidden_states, num_positions
from t2i.model.loss import token_losses
from t2i.runs.loading import open_model
from t2i.tokens.sequence import IGNORED
from t2i.tokens.text import TextTokenizer

_INPUTS = """
Args:
    predictions: texts.
    model_id: a run folder, a checkpoint, an exported or converted folder, or a hub name (hf:USER/NAME).
    device: where to compute; by default a GPU if there is one.

Returns:
    perplexities, one per text; mean_perplexity, their mean; perplexity, over all tokens together; num_tokens.
    A tokenizer that puts a start token before each text, such as Llama's and Gemma's, has it before each piece. Without
    one the first token is not counted, as nothing stands before it. A text longer than the model's positions is cut
    into pieces.
"""


class Perplexity(evaluate.Metric):
    """Measure perplexity: the exponential of nats per token, over the whole vocabulary."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], model_id: str, device: str | None = None) -> dict[str, object]:
        if not predictions:
            raise DataError("perplexity has no predictions; expected texts.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        opened = open_model(model_id, needs_images=False, device=device)
        sums = [_nats(text, opened.model, opened.text_tokenizer) for text in predictions]
        perplexities = [perplexity_of(nats / count) for nats, count in sums]
        num_tokens = sum(count for _, count in sums)
        return {
            "perplexities": perplexities,
            # evaluate's own perplexity reports this mean; papers report the one over all tokens.
            "mean_perplexity": sum(perplexities) / len(perplexities),
            "perplexity": perplexity_of(sum(nats for nats, _ in sums) / num_tokens),
            "num_tokens": num_tokens,
        }


@torch.inference_mode()
def _nats(text: str, model: PreTrainedModel, tokenizer: TextTokenizer) -> tuple[float, int]:
    """Sum the losses of one text: nats, tokens counted."""
    ids, start = tokenizer.encode(text), torch.tensor(tokenizer.start_ids, dtype=torch.long)
    least = 1 if len(start) else 2
    if len(ids) < least:
        raise DataError(f"The text {text!r} has {len(ids)} tokens; perplexity needs at least {least}.")
    positions = num_positions(model) or len(start) + len(ids)
    nats, count = 0.0, 0
    for piece in ids.split(max(1, positions - len(start))):
        whole = torch.cat([start, piece])[None].to(model.device)  # (1, S)
        labels = torch.nn.functional.pad(whole[:, 1:], (0, 1), value=IGNORED)
        labels[:, : max(0, len(start) - 1)] = IGNORED  # start tokens are given, not predicted
        predicted = int((labels != IGNORED).sum())
        if predicted:  # a last piece of one token without a start token has nothing to predict
            losses, _ = token_losses(hidden_states(model, whole), labels, head=head_of(model))
            nats, count = nats + losses.double().sum().item(), count + predicted
    return nats, count
