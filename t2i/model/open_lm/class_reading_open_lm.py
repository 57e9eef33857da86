"""The parts of a class's model: what computes the hidden states that its LM head is given, its norms and matrices.

Beside them, a decoder for classes that take no padding.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

R rows, D width.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from .decoding_any_open_lm import cache_name
from .forms_open_lm import WHOLE, ClassForm

FEED_FORWARD_NAMES = ("feed_forward", "mlp")
"""Names of the feed-forward part of a layer: open_lm's and those of transformers' classes."""


def body_of(model: PreTrainedModel) -> Any:
    """Return the part of a causal LM that computes hidden states, without the LM head."""
    # transformers' own name for it, base_model, is the whole model in some classes, such as Gemma 3's.
    if model.base_model is not model:
        return model.base_model
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else model


def of_text(model: PreTrainedModel) -> list[nn.Module]:
    """List the modules of a model from the outside in, without those of vision and audio towers."""
    # Towers are models of their own, which no id enters.
    words = model.get_input_embeddings()
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    towers = [part for part in parts if all(module is not words for module in part.modules())]
    of_towers = {module for tower in towers for module in tower.modules()}
    return [module for module in model.modules() if module not in of_towers]


def find_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Find the stack of layers, or None: the outermost list with as many modules as config.json names layers.

    Where none has, as in LongCat's class, it is the outermost list of all.
    """
    # Lists within a layer, such as experts, come later.
    lists = [module for module in of_text(model) if isinstance(module, nn.ModuleList)]
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    return next((found for found in lists if len(found) == count), lists[0] if lists else None)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm: it owns vectors, and there is nothing else in it."""
    # By shape, not by name or class: every model family has its own RMSNorm. Mixers own vectors beside matrices.
    own = list(module.parameters(recurse=False))
    return bool(own) and all(value.dim() == 1 for value in module.parameters())


def parts_of(model: PreTrainedModel, kind: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """Find parts of a model's layers: each part's layer, its name there, and itself.

    Args:
        kind: "feed-forward": the feed-forward parts; "lora": the matrices; "all": matrices and norms, and the norms
            beside the layers.

    Raises:
        ValueError: there are none.
    """
    layers = find_layers(model)
    inside = [(layer, *part) for layer in layers or () for part in layer.named_modules()]
    holders = [module for module in model.modules() if any(child is layers for child in module.children())]
    around = dict.fromkeys([body_of(model), *holders])
    beside = [(module, *part) for module in around for part in module.named_children()]
    matrices = [part for part in inside if isinstance(part[2], nn.Linear | Conv1D)]
    found = {
        "feed-forward": [part for part in inside if part[1] in FEED_FORWARD_NAMES],
        "lora": matrices,
        "all": matrices + [part for part in inside + beside if is_norm(part[2])],
    }[kind]
    if not found:
        raise ValueError(f"the layers of {type(model).__name__} have no {kind} part to route")
    return found


class HeadInput:
    """Compute what the LM head of a model is given, where that is not what its body returns."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def forward(self) -> Any:
        """The model's own forward, whose parameters say what its cache is called."""
        return self.model.forward

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        """Run the model's own forward on ids (B, S), with one logit per position instead of all."""
        head: Any = self.model.get_output_embeddings()
        found: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            found.append(hidden)
            return hidden[..., :1]

        head.forward = keep
        try:
            outputs = self.model(input_ids, **kwargs)
        finally:
            del head.forward
        return BaseModelOutputWithPast(
            last_hidden_state=cast(Any, found[-1]), past_key_values=getattr(outputs, "past_key_values", None)
        )


def reader_of(model: PreTrainedModel) -> Any:
    """Return what computes the hidden states that the LM head of a model is multiplied with."""
    return HeadInput(model) if ClassForm.of(model).is_transformed else body_of(model)


class UnpaddedDecoder:
    """Continue rows of one length together, without padding, mask and positions, which some classes do not take."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
        self.reader, self.has_cache = reader_of(model), ClassForm.of(model).reading != WHOLE
        self.cache_name = cache_name(self.reader)
        places: defaultdict[int, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            places[len(row)].append(place)
        self.places = [torch.tensor(group, device=model.device) for group in places.values()]
        self.ids = [
            torch.tensor([rows[place] for place in group], device=model.device) for group in places.values()
        ]
        self.caches: list[Any] = [None] * len(self.ids)

    def begin(self) -> Tensor:
        """Read the rows and return their last hidden states (R, D)."""
        return self._read(self.ids)

    def __call__(self, ids: Tensor) -> Tensor:
        """Read one more id of each row (R,), and return the last hidden states (R, D)."""
        new = [ids[places, None] for places in self.places]
        self.ids = [torch.cat(parts, dim=1) for parts in zip(self.ids, new, strict=True)]
        return self._read(new if self.has_cache else self.ids)

    def _read(self, parts: list[Tensor]) -> Tensor:
        found = []
        for group, ids in enumerate(parts):
            if self.has_cache:
                outputs = self.reader(ids, use_cache=True, **{self.cache_name: self.caches[group]})
                self.caches[group] = outputs.past_key_values
            else:
                outputs = self.reader(ids, use_cache=False)
            found.append(outputs.last_hidden_state[:, -1])
        return torch.cat(found)[torch.cat(self.places).argsort()]
