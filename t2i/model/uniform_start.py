"""What an image code costs a pre-trained model before its first step, and new rows that begin at the uniform cost.

The text rows of a pre-trained model may share a large mean, along which its hidden states point. New rows around zero
get none of that, so the model begins with a debt that a randomly initialised one has not.
"""

from dataclasses import dataclass
from math import log

import torch
from scipy.optimize import brentq
from torch import Tensor
from transformers import PreTrainedModel

from t2i.model.backbone import head_of, hidden_states
from t2i.tokens.vocab import VocabLayout

NUM_PROBES, NUM_WORDS, NUM_CODES = 4, 12, 64
"""Sequences of the probe, and the text ids and image codes of each, at most."""
ROUNDS = 3
"""Shifts one after another: a tied model's hidden states move with its new input rows."""
LARGEST_SHIFT = 100.0
"""Nats. A shift beyond it is no fair start, and 32-bit numbers would lose the differences between codes."""


@dataclass(frozen=True)
class Probe:
    """Sequences of random text ids and random codes, which stand for captioned images."""

    ids: Tensor
    """(B, S) ids: text, the markers between text and image, codes."""
    num_old: int
    """Ids from here on are new, and their rows may be shifted."""
    first_code: int

    @classmethod
    def draw(cls, layout: VocabLayout, *, num_old: int, codes_per_image: int, seed: int) -> "Probe":
        """Draw the same probe for the same seed on every rank."""
        generator = torch.Generator().manual_seed(seed)
        count = min(codes_per_image, NUM_CODES)
        words = torch.randint(layout.num_text_tokens, (NUM_PROBES, NUM_WORDS), generator=generator)
        codes = torch.randint(layout.codebook_size, (NUM_PROBES, count), generator=generator)
        markers = torch.tensor([layout.special_id("</text>"), layout.special_id("<image>")])
        ids = torch.cat([words, markers.expand(NUM_PROBES, -1), layout.image_ids(codes)], 1)
        return cls(ids, num_old, layout.first_image_id)


def uniform_cost(model: PreTrainedModel) -> float:
    """Return what a uniform guess over all ids costs, in nats."""
    return log(len(head_of(model)))


@torch.no_grad()
def code_cost(model: PreTrainedModel, probe: Probe) -> float:
    """Measure what an image code costs on average over the probe, in nats."""
    return _Measured.by(model, probe).cost(0.0)


@torch.no_grad()
def shift_to_uniform(model: PreTrainedModel, probe: Probe) -> None:
    """Shift the rows of all new ids, in place and all alike, until a code costs what a uniform guess does.

    The shift is along the mean hidden state of the places that precede a code. It prefers no code, so among image codes
    the cost stays as it is. Where no shift reaches the uniform cost, the rows stay where they are.
    """
    wanted, head = uniform_cost(model), head_of(model)
    for _ in range(ROUNDS):
        measured = _Measured.by(model, probe)
        excess = [measured.cost(shift) - wanted for shift in (-LARGEST_SHIFT, LARGEST_SHIFT)]
        # The cost falls as the shift grows. `not`, so that nan is no reason to go on.
        if not excess[0] > 0 > excess[1]:
            return
        shift = brentq(lambda shift: measured.cost(shift) - wanted, -LARGEST_SHIFT, LARGEST_SHIFT, xtol=1e-3)  # noqa: B023
        head[probe.num_old :] += (shift * measured.direction).to(head.dtype)


@dataclass(frozen=True)
class _Measured:
    """The places of a probe from which a code is predicted; N of them."""

    text: Tensor
    """(N,) log-sum-exp of the logits of ids that are not new."""
    new: Tensor
    """(N, V - V0) logits of the new ids."""
    targets: Tensor
    """(N,) the codes' places among the new ids."""
    direction: Tensor
    """(D,) along the mean hidden state; its product with that is 1."""
    reach: Tensor
    """(N,) what one nat of shift adds to the logits of each place."""

    @classmethod
    def by(cls, model: PreTrainedModel, probe: Probe) -> "_Measured":
        was_training = model.training
        model.eval()
        hidden = hidden_states(model, probe.ids)[:, :-1]
        model.train(was_training)
        head, num_old = head_of(model).float(), probe.num_old
        following = probe.ids[:, 1:]
        is_code = following >= probe.first_code
        places = hidden[is_code].float()  # (N, D)
        mean = places.mean(0)
        direction = mean / mean.square().sum()
        return cls(
            text=(places @ head[:num_old].T).logsumexp(1),
            new=places @ head[num_old:].T,
            targets=following[is_code] - num_old,
            direction=direction,
            reach=places @ direction,
        )

    def cost(self, shift: float) -> float:
        """Return the mean cost of a code in nats if all new rows move by `shift` along the direction."""
        logits = self.new + shift * self.reach[:, None]
        total = torch.logaddexp(self.text, logits.logsumexp(1))
        return float((total - logits.gather(1, self.targets[:, None])[:, 0]).mean())
