"""What a model must do once its vocabulary is grown: keep its text, read and train new ids, and load again."""

import copy
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from t2i.errors import UserError, first_line
from t2i.model.class_form import are_close, difference, evaluating, num_ids
from t2i.model.foreign_folder import UNUSABLE
from t2i.model.open_lm.class_reading_open_lm import reader_of
from t2i.model.open_lm.modeling_routed import RoutedForCausalLM


@torch.no_grad()
def text_logits(model: PreTrainedModel, *, num_text_rows: int) -> Tensor:
    """Compute the logits (8, V) of text ids after a few of them."""
    with evaluating(model):
        ids = torch.arange(8, device=model.device)[None] % num_text_rows
        return cast(Tensor, model(ids, use_cache=False).logits)[0, :, :num_text_rows].float()


def check_shapes(model: PreTrainedModel, *, name: str) -> None:
    """Check that a grown model's configuration describes its tensors, so that a checkpoint can be loaded.

    Raises:
        UserError: it describes other ones.
    """
    with torch.device("meta"):  # shapes alone
        again = type(model)(copy.deepcopy(model.config))
    shapes, expected = (
        {key: value.shape for key, value in one.state_dict().items()} for one in (model, again)
    )
    strange = [key for key, shape in shapes.items() if expected.get(key, shape) != shape]
    if strange:
        raise UserError(
            f"{name} ({type(model).__name__}) would not load again once its vocabulary is grown: its config.json then"
            f" describes other shapes of {', '.join(strange[:3])}. Choose a model of another class."
        )


def check_reads(model: PreTrainedModel, ids: range, *, name: str) -> None:
    """Read a few of these ids, which are new, with a model, and differentiate what it computes.

    Raises:
        UserError: its class cannot.
    """
    try:
        _differentiate(model, [*ids[:4], *ids[-4:]])
    except UNUSABLE as error:
        raise UserError(
            f"{name} ({type(model).__name__}) cannot be trained with ids beyond its own vocabulary:"
            f" {first_line(error).rstrip('.')}. Choose a model of another class."
        ) from error


def check_routed(model: RoutedForCausalLM) -> None:
    """Read a few ids of text and a few beyond it with a routed model, and differentiate what it computes.

    Raises:
        UserError: its class hands the routed parts something else than one row per position.
    """
    config, end = model.config, num_ids(model)
    text, image = range(config.num_text_rows), range(config.num_text_rows, end)
    try:
        _differentiate(model, [*text[:3], *image[:4], *image[-4:]])
    except UNUSABLE as error:
        raise UserError(
            f"model.image_weights is {config.image_weights}, which {type(model.language_model).__name__} cannot have:"
            f" {first_line(error).rstrip('.')}. Choose another kind, or a model of another class."
        ) from error


def _differentiate(model: PreTrainedModel, ids: list[int]) -> None:
    """Compute the hidden states of a few rows of these ids, and their gradient by the embeddings."""
    few = torch.tensor(ids, device=model.device)
    embedded: list[Tensor] = []

    def keep(_: torch.nn.Module, __: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # GIT adds to it in place, which a leaf does not allow

    watcher = model.get_input_embeddings().register_forward_hook(keep)
    try:
        for num_sequences in (3, 2):  # some classes keep what they computed for the batch before
            hidden = reader_of(model)(few.expand(num_sequences, -1), use_cache=False).last_hidden_state
            # Back to the embeddings' output alone: the weights' gradients would be as large as the model.
            torch.autograd.grad(hidden.sum(), embedded[-1], allow_unused=True)
    finally:
        watcher.remove()


def check_text_kept(model: PreTrainedModel, before: Tensor, *, name: str) -> None:
    """Compare a grown model's text logits with those before (8, V).

    Raises:
        UserError: they differ: the class does more with its embeddings than what was grown.
    """
    after = text_logits(model, num_text_rows=before.shape[1])
    if not are_close(after, before, dtype=model.dtype):
        raise UserError(
            f"{name} ({type(model).__name__}) gives other text logits once its vocabulary is grown: they differ by"
            f" {difference(after, before):.1e} of the largest. Its class cannot be trained here with these settings."
        )
