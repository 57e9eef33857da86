"""Draw several images per caption and keep the one that fits it best."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from t2i.model.backbone import head_of, hidden_states
from t2i.tokens.vocab import VocabLayout

ROWS_AT_A_TIME = 32
"""Sequences per forward pass; logits exist for the image codes of so many."""


@dataclass(frozen=True)
class Ranker:
    """A judge that chooses among images."""

    name: str
    """Of it and its revision; images chosen by another are of another drawing."""
    rank: Callable[[list[Image.Image], list[str]], list[float]]
    """Images and their captions -> how well each fits, larger for better."""


@dataclass(frozen=True)
class Best:
    """What was kept of several candidates per caption."""

    codes: Tensor
    """(B, K)."""
    candidates: Tensor
    """Which candidate each is, counted from 0: (B,)."""


def keep_best(candidates: Iterable[tuple[Tensor, Tensor]]) -> Best:
    """Keep the candidate of highest score per caption; of equal ones, the first.

    Args:
        candidates: codes (B, K) and their scores (B,), once per candidate.
    """
    best: Best | None = None
    highest = torch.empty(0)
    for turn, (codes, scores) in enumerate(candidates):
        if best is None:
            best, highest = Best(codes, torch.zeros(len(codes), dtype=torch.long)), scores
            continue
        # Not `>=`: a candidate that is no better changes nothing, so more candidates keep an image that was best.
        is_better = scores > highest
        best = Best(
            torch.where(is_better.to(codes.device)[:, None], codes, best.codes),
            best.candidates.masked_fill(is_better.cpu(), turn),
        )
        highest = torch.where(is_better, scores, highest)
    if best is None:
        raise ValueError("There are no candidates; expected at least one.")
    return best


def caption_gains(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    codes: Tensor,
    *,
    null_prompt: Sequence[int],
    layout: VocabLayout,
) -> Tensor:
    """Compute how much likelier codes are under their captions than under the null caption, in nats: (B,).

    The likelihood alone would prefer images that are likely under any caption, such as plain ones.

    Args:
        codes: (B, K) image codes.
    """
    matched = code_log_likelihoods(model, prompts, codes, layout=layout)
    return matched - code_log_likelihoods(model, [null_prompt] * len(prompts), codes, layout=layout)


def code_log_likelihoods(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], codes: Tensor, *, layout: VocabLayout
) -> Tensor:
    """Sum the log-likelihoods of codes (B, K) after prompts, in nats: (B,) float64, on the CPU."""
    return log_likelihoods_by_place(model, prompts, codes, layout=layout).sum(1)


@torch.inference_mode()
def log_likelihoods_by_place(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], codes: Tensor, *, layout: VocabLayout
) -> Tensor:
    """Compute the log-likelihood of each of codes (B, K) after prompts, in nats: (B, K) float64, on the CPU.

    They are those of drawing without guidance at temperature 1: over image codes alone.
    """
    head = head_of(model).of(layout.image_rows)
    found = []
    for start in range(0, len(prompts), ROWS_AT_A_TIME):
        part = codes[start : start + ROWS_AT_A_TIME].to(model.device)  # (B, K)
        rows = [torch.tensor(each, device=model.device) for each in prompts[start : start + ROWS_AT_A_TIME]]
        # Padding comes behind the codes, where no position looks that is read here.
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.cat([row, layout.image_ids(own)]) for row, own in zip(rows, part, strict=True)],
            batch_first=True,
            padding_value=layout.pad_id,
        )  # (B, S)
        hidden = hidden_states(model, ids)  # (B, S, D)
        # The position before a code tells it.
        before = torch.tensor([len(row) - 1 for row in rows], device=model.device)[:, None]
        places = before + torch.arange(part.shape[1], device=model.device)  # (B, K)
        chosen = torch.take_along_dim(hidden, places[:, :, None], dim=1)  # (B, K, D)
        logits = head.logits(chosen)  # (B, K, C)
        nats = logits.log_softmax(-1).gather(-1, part[:, :, None].long())[..., 0]  # (B, K)
        found.append(nats.double().cpu())
    return torch.cat(found)
