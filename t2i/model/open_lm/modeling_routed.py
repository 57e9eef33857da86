"""A language model whose image positions have weights of their own, and whose text stays bit for bit what it was.

In the layers, positions that hold an image code or a marker go through weights that were trained on images. Positions
that hold text go through the language model's own. Attention is shared, so image positions read the keys of text. Text
logits come from a product of their own, so that a larger head cannot change how they are rounded.

This file is uploaded with exported models, so it imports only torch and transformers. B batch, S sequence, D width,
N = B S positions, V vocabulary.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

# All files of the class, though not all are used here: transformers copies no others.
from .attention_open_lm import Attention  # noqa: F401
from .class_reading_open_lm import body_of, parts_of
from .configuration_open_lm import OpenLMConfig
from .configuration_routed import RoutedConfig
from .decoding_any_open_lm import RowDecoder  # noqa: F401
from .decoding_open_lm import begin_decoding  # noqa: F401
from .fixed_shape_open_lm import windows  # noqa: F401
from .forms_open_lm import ClassForm  # noqa: F401
from .layers_open_lm import forward  # noqa: F401
from .modeling_open_lm import OpenLMForCausalLM
from .products_open_lm import mirror, mirrored, split_head
from .race_open_lm import race  # noqa: F401
from .reading_open_lm import left_padded  # noqa: F401
from .sampling_open_lm import draw
from .window_open_lm import sample_by_window  # noqa: F401


class Route:
    """Which positions of the present pass are image positions: set by the embeddings, read by every routed module."""

    def __init__(self, num_text_rows: int) -> None:
        self.num_text_rows = num_text_rows
        self.text = self.image = torch.empty(0, dtype=torch.long)
        self.embeddings: nn.Module | None = None

    def watch(self, embeddings: nn.Module) -> None:
        """Look at all ids that these embeddings are given from now on, and at no others."""
        if embeddings is not self.embeddings:
            self.embeddings = embeddings
            embeddings.register_forward_pre_hook(self._look)

    def _look(self, embeddings: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if embeddings is self.embeddings:  # not a mirror of them, nor those that were replaced
            is_image = inputs[0].flatten() >= self.num_text_rows
            self.text, self.image = (~is_image).nonzero()[:, 0], is_image.nonzero()[:, 0]


class ByKind(nn.Module):
    """A module of the language model that image positions do not merely pass."""

    def __init__(self, text: Any, route: Route) -> None:
        super().__init__()
        self.text, self.route = text, route

    @property
    def weight(self) -> Tensor:
        """The language model's weight; some classes ask a layer for its dtype."""
        return cast(Tensor, self.text.weight)


class Routed(ByKind):
    """A module of the language model for text positions, and its copy for image positions."""

    def __init__(self, text: Any, route: Route) -> None:
        super().__init__(text, route)
        self.image = copy.deepcopy(text)

    def forward(self, hidden: Tensor) -> Tensor:
        text, image = self.route.text, self.route.image
        # Text alone goes through the very call of the language model: a gathered product may be rounded otherwise.
        if not (len(text) and len(image)):
            return self.image(hidden) if len(image) else self.text(hidden)
        rows = hidden.flatten(0, 1)  # (N, ...): each position is multiplied once, as in the plain model
        if len(rows) != len(text) + len(image):  # Gemma 3 normalises heads before positions
            shape = tuple(hidden.shape)
            raise ValueError(f"{type(self.text).__name__} is given {shape}; expected (batch, positions, ...)")
        of_images = self.image(rows[image])
        out = of_images.new_empty(len(rows), *of_images.shape[1:])
        out = out.index_copy(0, image, of_images).index_copy(0, text, self.text(rows[text]))
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

    def forward(self, hidden: Tensor) -> Tensor:
        out, image = self.text(hidden), self.route.image
        if not len(image):
            return out
        added = self.up(self.down(hidden.flatten(0, 1)[image])).to(out.dtype)
        return out.flatten(0, 1).index_add(0, image, added).unflatten(0, hidden.shape[:2])


class Sum(RoutedAddition):
    """A matrix and its low-rank addition, both for all positions."""

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.text(hidden)
        return out + self.up(self.down(hidden)).to(out.dtype)


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
                # In the precision that from_pretrained has set meanwhile: the part's own configuration names another.
                else AutoModelForCausalLM.from_config(
                    text, dtype=torch.get_default_dtype(), trust_remote_code=False
                )
            )
        self.language_model = language_model
        # What the language model's class says of itself; asked by `compiles`.
        self._can_compile_fullgraph = getattr(language_model, "_can_compile_fullgraph", False)
        self.route = Route(config.num_text_rows)
        self.route.watch(self.get_input_embeddings())
        head = split_head(language_model.get_output_embeddings(), num_first=config.num_text_rows)
        language_model.set_output_embeddings(head)
        kind, rank = config.image_weights, config.image_rank
        for layer, name, part in parts_of(language_model, kind):
            made = RoutedAddition(part, self.route, rank) if kind == "lora" else Routed(part, self.route)
            layer.set_submodule(name, made)
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
        return mirrored(self.base_model, _for_images)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the module that maps ids to (B, S, D), and look at what the new one is given."""
        self.language_model.set_input_embeddings(value)
        self.route.watch(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the LM head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the LM head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def prepare_inputs_for_generation(self, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare a step of generate() as the language model does."""
        return self.language_model.prepare_inputs_for_generation(*inputs, **kwargs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Compute logits (B, S, V) as the language model's class does; ids are needed, for they say what is image."""
        return self.language_model(input_ids, attention_mask=attention_mask, **kwargs)


def _for_images(module: nn.Module) -> nn.Module | None:
    if isinstance(module, RoutedAddition):
        return mirror(module, Sum)
    return module.image if isinstance(module, Routed) else None


RoutedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
