"""How a class computes logits and continues from prompts, found by value and checked before the first step.

A list of classes would be wrong with transformers' next release. So the model is asked: what its LM head is given, what
becomes of the head's product, and which way of reading prompts gives what whole sequences give.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from t2i.errors import UserError, first_line
from t2i.model.foreign_folder import UNUSABLE
from t2i.model.open_lm.class_reading_open_lm import body_of, reader_of
from t2i.model.open_lm.forms_open_lm import PADDED, UNPADDED, WHOLE, ClassForm
from t2i.model.open_lm.reading_open_lm import begin_any
from t2i.model.softmax import Head
from t2i.model.unpacked import unpacked

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Maximum difference of fp32 values, relative to the largest: kernels sum in other orders."""
LOW_PRECISION_TOLERANCE = 0.1
"""The same in half precision, which rounds at every layer."""
LARGE_LOGIT = 100.0
"""A logit that a cap would change: caps of today's classes are 15 to 50."""
NUM_IDS = 64
"""Ids whose logits are compared."""


def head_of(model: PreTrainedModel) -> Head:
    """Return the LM head, whose weight (V, D) is for a tied model that of the input embeddings."""
    module, form = model.get_output_embeddings(), ClassForm.of(model)
    bias = cast(Tensor | None, getattr(module, "bias", None))
    return Head(cast(Tensor, module.weight), bias=bias, scale=form.scale, cap=form.cap)


def num_ids(model: PreTrainedModel) -> int:
    """Count the ids of a model: its embeddings, since some configurations have no vocab_size of their own."""
    return len(cast(Tensor, model.get_input_embeddings().weight))


@torch.no_grad()
def check_head(model: PreTrainedModel, *, name: str) -> None:
    """Find how a model's logits follow from hidden states, which loss and sampler repeat, and write it down.

    Raises:
        UserError: there is no LM head, or the logits follow in another way.
    """
    module, kind = model.get_output_embeddings(), type(model).__name__
    if not _is_matrix(module):
        raise UserError(f"{name} ({kind}) has no LM head that computes logits.")
    if not _is_matrix(model.get_input_embeddings()):
        raise UserError(
            f"{name} ({kind}) has no embeddings that are one matrix, to which image codes can be added."
        )
    ids = torch.arange(8, device=model.device)[None] % num_ids(model)  # (1, 8): which ids does not matter
    try:
        with evaluating(model):
            small = _seen(model, ids)
            with unpacked():
                unmasked = _seen(model, ids)
            large = _seen(model, ids, factor=LARGE_LOGIT / max(small.product.abs().max().item(), 1e-6))
            hidden = _of_body(model, ids)
    except UNUSABLE as error:
        raise UserError(
            f"{name} ({kind}) does not compute logits as a causal language model: {first_line(error)}"
        ) from error
    is_transformed = not are_close(small.given, hidden, dtype=model.dtype)
    form = _fitting([small, large], numbers=set(_numbers(model.config.to_dict())), dtype=model.dtype)
    if form is None:
        raise UserError(
            f"the logits of {name} ({kind}) are not hidden states times LM head, nor that scaled or capped by a number"
            " of its config.json. Such a model cannot be trained here."
        )
    is_masked = not are_close(unmasked.given, small.given, dtype=model.dtype)
    reading = ClassForm.of(model).reading
    replace(form, is_transformed=is_transformed, is_masked=is_masked, reading=reading).write(model)


def _is_matrix(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _of_body(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the hidden states that a model's body computes; none if the body cannot be called by itself."""
    try:
        return cast(Tensor, body_of(model)(ids, use_cache=False).last_hidden_state)
    except UNUSABLE:
        return torch.empty(0)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Turn dropout off inside the block, and caches, which some classes have only then, on."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Seen:
    """One pass, as its LM head saw it."""

    given: Tensor
    """(1, S, D) what the head was given."""
    product: Tensor
    """(1, S, N) what its weight and bias make of that, of N ids."""
    logits: Tensor
    """(1, S, N) what the class returned, of these ids."""


def _seen(model: PreTrainedModel, ids: Tensor, *, factor: float = 1.0) -> _Seen:
    """Watch a pass over ids (1, S), with the head's input multiplied by a factor.

    Raises:
        LookupError: the head was not called as a module.
    """
    module: Any = model.get_output_embeddings()
    given: list[Tensor] = []

    def watch(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(inputs[0] * factor)
        return (given[-1], *inputs[1:])

    watcher = module.register_forward_pre_hook(watch)
    try:
        logits = model(ids, use_cache=False).logits
    finally:
        watcher.remove()
    if len(given) != 1:
        raise LookupError(f"its LM head is called {len(given)} times in one pass")
    columns = torch.linspace(0, logits.shape[-1] - 1, NUM_IDS, device=ids.device).long()
    if logits.shape[:2] != ids.shape or logits.shape[-1] != num_ids(model):
        raise LookupError(
            f"it gives logits of shape {tuple(logits.shape)} for ids of shape {tuple(ids.shape)}, and has"
            f" {num_ids(model)} embeddings"
        )
    bias = None if getattr(module, "bias", None) is None else module.bias[columns]
    product = Head(module.weight[columns], bias=bias).logits(given[0])
    return _Seen(given[0], product, logits[..., columns].float())


def _fitting(seen: list[_Seen], *, numbers: set[float], dtype: torch.dtype) -> ClassForm | None:
    """Choose the form that explains the logits of all passes best; None if none explains them."""
    scales = {1.0, *numbers, *(1 / number for number in numbers)}

    def misfit(form: ClassForm) -> float:
        worst = 0.0
        for one in seen:
            expected = form.logits_after(lambda product: product, bias=None)(one.product)
            worst = max(worst, difference(expected, one.logits))
        return worst

    # A scale shows in small logits and a cap in large ones, so they are found one after the other.
    found = [ClassForm()]
    if misfit(found[0]) > _tolerance(dtype):
        forms = [
            ClassForm(scale=scale, cap=cap) for scale in sorted(scales) for cap in (None, *sorted(numbers))
        ]
        found = sorted(forms, key=misfit)
    return found[0] if misfit(found[0]) <= _tolerance(dtype) else None


def _numbers(values: object) -> Iterator[float]:
    """List the positive numbers of a configuration, at any depth."""
    if isinstance(values, dict):
        for value in values.values():
            yield from _numbers(value)
    elif isinstance(values, int | float) and not isinstance(values, bool) and 0 < values < float("inf"):
        yield float(values)


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference relative to the largest value; nan for other shapes."""
    if first.shape != second.shape:
        return float("nan")
    return ((first - second).abs().max() / second.abs().max().clamp(min=1e-6)).item()


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE if dtype == torch.float32 else LOW_PRECISION_TOLERANCE


def are_close(first: Tensor, second: Tensor, *, dtype: torch.dtype) -> bool:
    """Tell whether two results of one computation, in a precision, are equal but for rounding."""
    # "<=" of nan is false, so that nan is refused too.
    return difference(first.float(), second.float()) <= _tolerance(dtype)


@torch.inference_mode()
def check_decoding(model: PreTrainedModel, *, name: str) -> None:
    """Find a way of reading prompts that gives the hidden states of whole sequences, and write it down.

    Raises:
        UserError: there is none: the model's class sees later ids.
    """
    if hasattr(model, "begin_decoding"):  # open_lm's own, which takes other steps
        return
    reason = ""
    for reading in (PADDED, UNPADDED, WHOLE):
        replace(ClassForm.of(model), reading=reading).write(model)
        with evaluating(model):
            reason = _why_not(model)
        if not reason:
            if reading == WHOLE:
                logger.warning(
                    "%s (%s) has no cache that can be continued: each code is drawn from the whole sequence, which is"
                    " slow.",
                    name,
                    type(model).__name__,
                )
            return
    raise UserError(
        f"{name} ({type(model).__name__}) cannot be drawn from: {reason}. Choose a transformer, such as those of"
        " Llama's, Qwen2's or GPT-NeoX's class."
    )


def _why_not(model: PreTrainedModel) -> str:
    """Compare hidden states read id by id with those of whole rows; return what differs, or ""."""
    rows = torch.arange(1, 19).view(2, 9).to(model.device) % num_ids(model)  # (2, 9)
    # Continued with the end of the vocabulary, for these are image codes: the sampler reads no others.
    rows[:, 6:] = num_ids(model) - 1 - rows[:, 6:]
    shorter = 2  # ids that the second row lacks
    try:
        hidden, decoder = begin_any(
            model, [rows[0, :6].tolist(), rows[1, shorter:6].tolist()], empty_prompt=None, num_codes=3
        )
        found = torch.stack([hidden, *(decoder(ids) for ids in rows[:, 6:].T)], dim=1)  # (2, 4, D)
        reader = reader_of(model)
        expected = torch.stack(
            [
                reader(row[None], use_cache=False).last_hidden_state[0, -4:]
                for row in (rows[0], rows[1, shorter:])
            ]
        )
    except UNUSABLE as error:
        return first_line(error)
    if are_close(found, expected, dtype=model.dtype):
        return ""
    return (
        f"the hidden states of a prompt and its continuation differ by {difference(found, expected):.1e} of the"
        " largest from those of the whole sequence"
    )
