"""What an image code costs a model before its first step, and new rows that begin at the uniform cost.

The text rows of a pre-trained model may share a large mean, along which its hidden states point. New rows around zero
get none of that, so the model begins with a debt that a randomly initialised one has not.
"""

from dataclasses import dataclass, replace
from math import log

import torch
from scipy.optimize import brentq
from torch import Tensor
from transformers import PreTrainedModel

from t2i.model.backbone import head_of, hidden_states
from t2i.model.resize import INPUT_ROWS, ends_of
from t2i.model.softmax import Head
from t2i.tokens.vocab import VocabLayout

NUM_SEQUENCES, NUM_CODES = 64, 32
"""Sequences of a probe, and how many image codes of each are looked at. At the uniform cost of 16 sequences
SmolLM2 costs 0.4 nats more on others: from one to the next costs differ by 0.8 nats."""
ROUNDS = 3
"""Shifts one after another: a tied model's hidden states move with its new input rows."""
LARGEST_SHIFT = 100.0
"""Nats. A shift beyond it is no fair start, and 32-bit numbers would lose the differences between codes."""
FAIR_EXCESS_NATS = 0.1
"""What codes that differ from one another may cost more, among codes, than codes that are alike."""
MOST_HALVINGS = 20
FEW_HALVINGS = 8
"""Of input embeddings, each of which takes several forward passes; less than a hundredth of their distances is left."""


@dataclass(frozen=True)
class Probe:
    """A few sequences of training, whose image codes a model is asked for."""

    ids: Tensor
    """(B, S) ids."""
    num_old: int
    """Ids from here on are new, and their rows may be shifted."""
    first_code: int
    codebook_size: int

    @classmethod
    def of(cls, sequences: Tensor, *, layout: VocabLayout, num_old: int) -> "Probe":
        """Take the first codes of sequences (N, S); random captions would be other text than what comes."""
        starts = (sequences >= layout.first_image_id).int().argmax(1)
        end = int(starts.max()) + NUM_CODES
        return cls(sequences[:NUM_SEQUENCES, :end], num_old, layout.first_image_id, layout.codebook_size)


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
    largest = LARGEST_SHIFT / head.scale  # of products, which the scale turns into nats
    for _ in range(ROUNDS):
        measured = _Measured.by(model, probe)
        excess = [measured.cost(shift) - wanted for shift in (-largest, largest)]
        # The cost falls as the shift grows. `not`, so that nan is no reason to go on.
        if not excess[0] > 0 > excess[1]:
            return
        shift = brentq(lambda shift: measured.cost(shift) - wanted, -largest, largest, xtol=1e-3)  # noqa: B023
        head.weight[probe.num_old :] += (shift * measured.direction).to(head.weight.dtype)


@torch.no_grad()
def narrow_to_fair(model: PreTrainedModel, probe: Probe) -> None:
    """Draw the LM head's rows of codes to their mean, in place, until none is preferred by much.

    Rows that differ as those of text do make a model sure of one code or another, before it has seen any. Halved again
    and again, they keep their directions. Input embeddings that are not tied to the head stay as far apart as they are.
    """
    codes = head_of(model).weight[probe.first_code : probe.first_code + probe.codebook_size]  # (codebook, D)
    for _ in range(MOST_HALVINGS):
        if _Measured.by(model, probe).cost_among_codes() <= log(len(codes)) + FAIR_EXCESS_NATS:
            return
        codes.lerp_(codes.mean(0), 0.5)


@torch.no_grad()
def begin_apart(model: PreTrainedModel, probe: Probe) -> None:
    """Bring codes that differ from one another to the uniform cost, in place.

    Codes that lead to hidden states far apart leave no shift that serves all places. Their input embeddings are then
    drawn to their mean, by halves, until one does.
    """
    codes = ends_of(model)[INPUT_ROWS][probe.first_code : probe.first_code + probe.codebook_size]
    for attempt in range(FEW_HALVINGS + 1):
        if attempt:
            codes.lerp_(codes.mean(0), 0.5)
        narrow_to_fair(model, probe)
        shift_to_uniform(model, probe)
        if code_cost(model, probe) <= uniform_cost(model) + FAIR_EXCESS_NATS:
            return


@dataclass(frozen=True)
class _Measured:
    """The places of a probe from which a code is predicted; N of them."""

    text: Tensor
    """(N,) log-sum-exp of the logits of ids that are not new."""
    head: Head
    """The new ids' part of the LM head."""
    new: Tensor
    """(N, V - V0) products of the new ids' weights, which head.shaped turns into logits."""
    targets: Tensor
    """(N,) the codes' places among the new ids."""
    direction: Tensor
    """(D,) along the mean hidden state; its product with that is 1."""
    reach: Tensor
    """(N,) what a shift of one adds to the products of each place."""
    codes: slice
    """The places of the codes among the new ids."""

    @classmethod
    def by(cls, model: PreTrainedModel, probe: Probe) -> "_Measured":
        was_training = model.training
        model.eval()
        hidden = hidden_states(model, probe.ids)[:, :-1]
        model.train(was_training)
        head, num_old = head_of(model), probe.num_old
        following = probe.ids[:, 1:]
        is_code = following >= probe.first_code
        places = hidden[is_code].float()  # (N, D)
        mean = places.mean(0)
        direction = mean / mean.square().sum()
        new = head.of(range(num_old, len(head)))
        return cls(
            text=head.of(range(num_old)).logits(places).logsumexp(1),
            head=new,
            new=replace(new, scale=1.0, cap=None).logits(places),
            targets=following[is_code] - num_old,
            direction=direction,
            reach=places @ direction,
            codes=slice(probe.first_code - num_old, probe.first_code - num_old + probe.codebook_size),
        )

    def cost(self, shift: float) -> float:
        """Return the mean cost of a code in nats if all new rows move by `shift` along the direction."""
        logits = self.head.shaped(self.new + shift * self.reach[:, None])
        total = torch.logaddexp(self.text, logits.logsumexp(1))
        return float((total - logits.gather(1, self.targets[:, None])[:, 0]).mean())

    def cost_among_codes(self) -> float:
        """Return the mean cost of a code in nats if nothing but codes were possible."""
        logits = self.head.shaped(self.new)
        totals = logits[:, self.codes].logsumexp(1)
        return float((totals - logits.gather(1, self.targets[:, None])[:, 0]).mean())
