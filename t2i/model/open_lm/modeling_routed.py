"""A language model whose image positions have weights of their own, and whose text stays bit for bit what it was.

In the layers, positions that hold an image code or a marker go through weights that were trained on images. Positions
that hold text go through the language model's own. Attention is shared, so image positions read the keys of text. Text
logits come from a product of their own, so that a larger head cannot change how they are rounded.

This file is uploaded with exported models, so it imports only torch and transformers. B batch, S sequence, D width,
N = B S positions, V vocabulary.
"""

import copy
from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

# All files of the class, though not all are used here: transformers copies no others.
from .attention_open_lm import Attention  # noqa: F401
from .class_reading_open_lm import body_of
from .configuration_open_lm import OpenLMConfig
from .configuration_routed import RoutedConfig
from .decoding_any_open_lm import RowDecoder  # noqa: F401
from .decoding_open_lm import begin_decoding  # noqa: F401
from .fixed_shape_open_lm import windows  # noqa: F401
from .forms_open_lm import ClassForm  # noqa: F401
from .layers_open_lm import forward  # noqa: F401
from .modeling_open_lm import OpenLMForCausalLM
from .products_open_lm import mirror, mirrored
from .race_open_lm import race  # noqa: F401
from .reading_open_lm import left_padded  # noqa: F401
from .sampling_open_lm import draw
from .window_open_lm import sample_by_window  # noqa: F401

FEED_FORWARD_NAMES = ("feed_forward", "mlp")
"""Names of the feed-forward part of a layer: open_lm's and those of transformers' classes."""


class Route:
    """Which positions of the present pass are image positions: set by the embeddings, read by every routed module."""

    def __init__(self, num_text_rows: int) -> None:
        self.num_text_rows = num_text_rows
        self.has_text, self.has_image = True, False
        self.text = self.image = torch.empty(0, dtype=torch.long)

    def look(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Sort the positions of ids (B, S) by kind; a hook that runs before they are embedded."""
        is_image = inputs[0].flatten() >= self.num_text_rows
        self.text, self.image = (~is_image).nonzero()[:, 0], is_image.nonzero()[:, 0]
        self.has_text, self.has_image = len(self.text) > 0, len(self.image) > 0


class ByKind(nn.Module):
    """A module of the language model that image positions do not merely pass."""

    def __init__(self, text: Any, route: Route) -> None:
        super().__init__()
        self.text, self.route = text, route

    @property
    def weight(self) -> Tensor:
        """The language model's weight; some classes ask a layer for its dtype."""
        return cast(Tensor, self.text.weight)

    def of_images(self) -> nn.Module:
        """Return what image positions pass, where there are no others."""
        raise NotImplementedError


class Routed(ByKind):
    """A module of the language model for text positions, and its copy for image positions."""

    def __init__(self, text: Any, route: Route) -> None:
        super().__init__(text, route)
        self.image = copy.deepcopy(text)

    def of_images(self) -> nn.Module:
        return self.image

    def forward(self, hidden: Tensor) -> Tensor:
        route = self.route
        # Text alone goes through the very call of the language model: a gathered product may be rounded otherwise.
        if not (route.has_image and route.has_text):
            return self.image(hidden) if route.has_image else self.text(hidden)
        rows = hidden.flatten(0, 1)  # (N, ...): each position is multiplied once, as in the plain model
        image = self.image(rows[route.image])
        out = image.new_empty(len(rows), *image.shape[1:])
        out = out.index_copy(0, route.image, image).index_copy(0, route.text, self.text(rows[route.text]))
        return out.unflatten(0, hidden.shape[:2])


class RoutedAddition(ByKind):
    """A matrix of the language model for all positions, and a low-rank addition at image positions."""

    def __init__(self, text: Any, route: Route, rank: int) -> None:
        super().__init__(text, route)
        shape = text.weight.shape if isinstance(text, Conv1D) else text.weight.shape[::-1]
        like = {"bias": False, "device": text.weight.device, "dtype": text.weight.dtype}
        self.down, self.up = nn.Linear(shape[0], rank, **like), nn.Linear(rank, shape[1], **like)
        # Zero, so that the model first computes what it did before.
        nn.init.zeros_(self.up.weight)

    def of_images(self) -> nn.Module:
        return Sum(self.text, self.down, self.up)

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.text(hidden)
        if not self.route.has_image:
            return out
        added = self.up(self.down(hidden.flatten(0, 1)[self.route.image])).to(out.dtype)
        return out.flatten(0, 1).index_add(0, self.route.image, added).unflatten(0, hidden.shape[:2])


class Sum(nn.Module):
    """A matrix and its low-rank addition, both for all positions."""

    def __init__(self, text: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.text, self.down, self.up = text, down, up

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.text(hidden)
        return out + self.up(self.down(hidden)).to(out.dtype)


class RoutedHead(nn.Linear):
    """An LM head that computes text logits by the product that the language model's own head was."""

    def __init__(self, head: Any, num_text_rows: int) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.weight, self.bias, self.num_text_rows = head.weight, head.bias, num_text_rows
        self.out_features, self.in_features = head.weight.shape

    def forward(self, hidden: Tensor) -> Tensor:
        parts = []
        for ids in (slice(self.num_text_rows), slice(self.num_text_rows, None)):
            bias = None if self.bias is None else self.bias[ids]
            parts.append(F.linear(hidden, self.weight[ids], bias))
        return torch.cat(parts, dim=-1)


class RoutedForCausalLM(PreTrainedModel, GenerationMixin):
    """Any causal language model, with image weights of its own beside it."""

    config_class = RoutedConfig
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    draw = draw

    def __init__(self, config: RoutedConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        text = config.text_config
        if language_model is None:
            language_model = (
                OpenLMForCausalLM(text)
                if text.model_type == OpenLMConfig.model_type
                else AutoModelForCausalLM.from_config(text, trust_remote_code=False)
            )
        self.language_model = language_model
        # What the language model's class says of itself; asked by `compiles`.
        self._can_compile_fullgraph = getattr(language_model, "_can_compile_fullgraph", False)
        self.route = Route(config.num_text_rows)
        self.watcher = self.get_input_embeddings().register_forward_pre_hook(self.route.look)
        self._tied_weights_keys = _below("language_model", language_model._tied_weights_keys)
        head = language_model.get_output_embeddings()
        language_model.set_output_embeddings(RoutedHead(head, config.num_text_rows))
        add_image_weights(language_model, self.route, kind=config.image_weights, rank=config.image_rank)
        self.generation_config = copy.deepcopy(language_model.generation_config)
        self.post_init()

    def init_weights(self) -> None:
        """Draw nothing: the language model is whole, and image weights are copies."""
        self.tie_weights()

    @property
    def base_model(self) -> nn.Module:
        """The part that computes hidden states."""
        return body_of(self.language_model)

    def image_body(self) -> nn.Module:
        """Mirror the body as image codes pass it, without looking at ids: while codes are sampled there is no text."""
        embeddings, watcher = self.get_input_embeddings(), self.watcher.id

        def change(module: nn.Module) -> nn.Module | None:
            if isinstance(module, ByKind):
                return module.of_images()
            if module is not embeddings:
                return None
            made = mirror(module)
            hooks = module._forward_pre_hooks.items()
            made.__dict__["_forward_pre_hooks"] = OrderedDict(hook for hook in hooks if hook[0] != watcher)
            return made

        return mirrored(self.base_model, change)

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that maps ids to (B, S, D)."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it, and look at what the new one is given."""
        self.watcher.remove()
        self.language_model.set_input_embeddings(value)
        self.watcher = value.register_forward_pre_hook(self.route.look)

    def get_output_embeddings(self) -> nn.Module:
        """Return the bias-free LM head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the bias-free LM head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def prepare_inputs_for_generation(self, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare a step of generate() as the language model does."""
        return self.language_model.prepare_inputs_for_generation(*inputs, **kwargs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Compute logits (B, S, V) as the language model's class does; ids are needed, for they say what is image."""
        return self.language_model(input_ids, attention_mask=attention_mask, **kwargs)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm: it owns vectors only."""
    # By shape, not by name or class: every model family has its own RMSNorm.
    own = list(module.parameters(recurse=False))
    return bool(own) and all(value.dim() == 1 for value in own)


def add_image_weights(model: PreTrainedModel, route: Route, *, kind: str, rank: int) -> None:
    """Put routed modules into every layer of a language model, in place.

    Raises:
        ValueError: a layer has no part of this kind.
    """
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    body = body_of(model)
    for owner in [*layers, body] if kind == "all" else layers:
        for name, module in list(owner.named_modules() if owner is not body else owner.named_children()):
            is_matrix = isinstance(module, nn.Linear | Conv1D)
            if kind == "feed-forward" and name in FEED_FORWARD_NAMES:
                made: nn.Module = Routed(module, route)
            elif kind == "all" and (is_norm(module) or (is_matrix and owner is not body)):
                made = Routed(module, route)
            elif kind == "lora" and is_matrix:
                made = RoutedAddition(module, route, rank)
            else:
                continue
            parent, _, last = name.rpartition(".")
            setattr(owner.get_submodule(parent), last, made)
    if not any(isinstance(module, Routed | RoutedAddition) for module in model.modules()):
        raise ValueError(f"the layers of {type(model).__name__} have no {kind} part to route")


def _below(prefix: str, keys: Any) -> Any:
    """Put a prefix before transformers' list, or in newer releases mapping, of tied weights."""
    if isinstance(keys, dict):
        return {f"{prefix}.{name}": f"{prefix}.{source}" for name, source in keys.items()}
    return [f"{prefix}.{name}" for name in keys or ()]


RoutedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
