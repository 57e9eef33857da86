"""Grow a language model's vocabulary by image codes; its own embeddings and LM head stay equal bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from t2i.errors import UserError, first_line
from t2i.model.foreign_folder import UNUSABLE
from t2i.model.trainable import merge_lora

INPUT_ROWS, OUTPUT_ROWS = "input_rows", "output_rows"


Kind = Literal["random", "own", "mean", "uniform"]
"""How new embeddings are drawn, where they are not read from a file."""


def new_rows(old: Tensor, *, count: int, kind: Kind, generator: torch.Generator) -> Tensor:
    """Make embeddings (count, D) to put after the embeddings `old` (V, D).

    Args:
        kind: "random": open_lm's initialisation, a normal of deviation D^-0.5 truncated at three deviations;
            "own": a normal of the mean and deviation of the old ones, per dimension; "mean" and "uniform": their mean
            plus a hundredth of that deviation.
    """
    width = old.shape[1]
    if kind == "random":
        std = width**-0.5
        rows = torch.empty(count, width)
        # Drawn in fp32 and cast, so that a seed gives the same values in every precision.
        return nn.init.trunc_normal_(rows, std=std, a=-3 * std, b=3 * std, generator=generator).to(old.dtype)
    # Some noise in any case, because equal embeddings would get equal gradients and stay equal.
    scale = 1.0 if kind == "own" else 0.01
    noise = torch.randn(count, width, generator=generator) * old.float().std(0) * scale
    return (old.float().mean(0) + noise).to(old.dtype)


def grow_vocabulary(
    model: PreTrainedModel, *, vocab_size: int, rows: str | Mapping[str, Tensor], seed: int
) -> None:
    """Grow the embeddings and the LM head of any causal LM, in place, to vocab_size ids.

    Args:
        rows: one of Kind, or input_rows and, for an untied head, output_rows, each (new ids, D), or a .safetensors
            file of these.

    Raises:
        UserError: the vocabulary is larger already, or the file's tensors have another shape.
    """
    # Copied, so that they stay equal bit for bit whatever transformers does to them below.
    old_input, old_output = (
        module.weight.detach().clone()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    old_bias = bias_of(model)
    old_bias = None if old_bias is None else old_bias.detach().clone()
    count = vocab_size - len(old_input)
    if count < 0:
        raise UserError(
            f"the model has {len(old_input)} embeddings; expected <= {vocab_size}, those of the layout."
        )
    is_tied = OUTPUT_ROWS not in ends_of(model)
    generator = torch.Generator().manual_seed(seed)
    given = rows
    if isinstance(rows, str) and Path(rows).suffix == ".safetensors":
        if not Path(rows).is_file():
            raise UserError(f"model.new_embeddings is {rows}; expected a file that exists.")
        try:
            given = load_file(rows)
        except SafetensorError as error:
            raise UserError(f"model.new_embeddings: {rows} cannot be read: {first_line(error)}") from error
    # transformers makes the modules larger and keeps ties; its own values for the new ids are overwritten below.
    try:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    except UNUSABLE as error:
        raise UserError(
            f"transformers cannot grow the vocabulary of a model of class {type(model).__name__}: {first_line(error)}"
        ) from error
    if hasattr(model.config, "decoder_vocab_size"):  # Marian's, which transformers leaves as it was
        model.config.decoder_vocab_size = vocab_size
    sides = [(INPUT_ROWS, old_input)] + ([] if is_tied else [(OUTPUT_ROWS, old_output)])
    for (name, old), weight in zip(sides, ends_of(model).values(), strict=True):
        if isinstance(given, str):
            # ModelConfig allows no other words.
            added = new_rows(old, count=count, kind=cast(Kind, given), generator=generator)
        else:
            added = _given(
                given, name, rows if isinstance(rows, str) else "a mapping", shape=(count, old.shape[1])
            )
        with torch.no_grad():
            weight[: len(old)] = old  # (V0, D)
            weight[len(old) :] = added  # (V - V0, D)
    if old_bias is not None:
        # As an average token has it, so that it prefers neither text nor codes.
        head = model.get_output_embeddings()
        head.bias = nn.Parameter(torch.cat([old_bias, old_bias.mean().expand(count)]))
        model.set_output_embeddings(head)  # some classes hold the bias a second time


def ends_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the input embeddings and, where it is not tied to them, the LM head, each (V, D)."""
    # By the tensors themselves: config.tie_word_embeddings may say otherwise.
    embedding, head = cast(
        tuple[Tensor, Tensor],
        (model.get_input_embeddings().weight, model.get_output_embeddings().weight),
    )
    ends = {INPUT_ROWS: embedding}
    return ends if head is embedding else ends | {OUTPUT_ROWS: head}


def bias_of(model: PreTrainedModel) -> Tensor | None:
    """Return the bias (V,) of the LM head; most classes have none."""
    return cast(Tensor | None, getattr(model.get_output_embeddings(), "bias", None))


def never_generate(model: PreTrainedModel, ids: list[int]) -> None:
    """Keep transformers' generate() from choosing these ids, now and after the model is saved."""
    # In the generation config, not in the logits: these stay those of open_lm.
    if model.generation_config is not None:  # some classes have no generate()
        model.generation_config.suppress_tokens = ids or None


def end_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generate() end at the tokenizer's end token, in both config files; more end tokens of a chat model stay."""
    generation, end = model.generation_config, tokenizer.eos_token_id
    if end is None or generation is None:
        return
    known = generation.eos_token_id
    # A class's own default may be any other token: Llama's is id 2.
    if end not in (known if isinstance(known, list) else [known]):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(generation, name, getattr(tokenizer, name))
        model.config.bos_token_id = tokenizer.bos_token_id
    # Not the padding: for a Llama, it would freeze that id's embedding from the next load on.
    model.config.eos_token_id = generation.eos_token_id


def _given(tensors: Mapping[str, Tensor], name: str, file: str, *, shape: tuple[int, int]) -> Tensor:
    if name not in tensors:
        raise UserError(f"model.new_embeddings: {file} has no tensor {name}; it has {', '.join(tensors)}.")
    if tuple(tensors[name].shape) != shape:
        raise UserError(
            f"model.new_embeddings: {name} in {file} has shape {tuple(tensors[name].shape)}; expected {shape}."
        )
    return tensors[name]


class _JoinedRows(nn.Module):
    """Old embeddings (V0, D) and new ones (V1, D) as two parameters, joined where they are used."""

    def __init__(self, old: nn.Parameter, new: nn.Parameter) -> None:
        super().__init__()
        self.old, self.new = old, new

    @property
    def weight(self) -> Tensor:
        """All embeddings (V, D)."""
        return torch.cat([self.old, self.new])  # (V0 + V1, D)


class JoinedEmbedding(_JoinedRows):
    """Input embeddings whose new part is its own parameter; some classes scale or shift what they look up."""

    def __init__(self, old: nn.Parameter, new: nn.Parameter, *, lookup: nn.Module) -> None:
        super().__init__(old, new)
        del lookup.weight
        self.lookup = lookup

    def forward(self, input_ids: Tensor) -> Tensor:
        # No parameter of its own, which an optimizer would see beside the two parts.
        self.lookup.weight = self.weight
        try:
            return self.lookup(input_ids)
        finally:
            del self.lookup.weight


class JoinedHead(_JoinedRows):
    """An LM head whose new part is its own parameter."""

    def __init__(self, old: nn.Parameter, new: nn.Parameter, *, bias: nn.Parameter | None) -> None:
        super().__init__(old, new)
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        # Two products: one of more rows might round the logits of text otherwise than the language model did.
        rows = (self.old, self.new)
        biases = (None, None) if self.bias is None else self.bias.split([len(part) for part in rows])
        parts = [nn.functional.linear(hidden, *part) for part in zip(rows, biases, strict=True)]
        return torch.cat(parts, dim=-1)


def split_rows(model: PreTrainedModel, *, num_old: int) -> None:
    """Make the embeddings and LM head of ids from num_old on their own parameters, in place.

    Learning rate, L2-SP and freezing can then differ for them. A tied head shares both parameters with the embeddings.
    """
    lookup, bias = model.get_input_embeddings(), bias_of(model)
    embedding, head = lookup.weight, model.get_output_embeddings().weight
    input_rows = _parts(embedding, num_old=num_old)
    output_rows = input_rows if head is embedding else _parts(head, num_old=num_old)
    model.set_input_embeddings(JoinedEmbedding(*input_rows, lookup=lookup))
    model.set_output_embeddings(JoinedHead(*output_rows, bias=bias))


def _parts(rows: Tensor, *, num_old: int) -> tuple[nn.Parameter, nn.Parameter]:
    old, new = rows.detach()[:num_old], rows.detach()[num_old:]
    return nn.Parameter(old.clone()), nn.Parameter(new.clone())


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a plain model of this class: split embeddings joined, adapters merged."""
    state = model.state_dict()
    joined: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, _JoinedRows):
            old, new = state.pop(f"{name}.old"), state.pop(f"{name}.new")
            # One tensor for both ends of a tied model: safetensors then saves it once.
            # On the CPU, as merge_lora does.
            state[f"{name}.weight"] = joined.setdefault(id(module.new), torch.cat([old.cpu(), new.cpu()]))
    merge_lora(model, state)
    return state


def on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a state dict from a GPU to the host; a tensor that has two names stays one."""
    # DeepSpeed keeps a group's weights in one memory, and transformers clones what shares memory: on a GPU that is
    # nearly full, a save would end the run.
    moved: dict[tuple[int, int, torch.Size], Tensor] = {}
    return {
        name: moved.setdefault((value.data_ptr(), value.numel(), value.shape), value.cpu())
        for name, value in state.items()
    }
