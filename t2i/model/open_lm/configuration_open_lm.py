"""Configuration of open_lm models (https://github.com/mlfoundations/open_lm) for transformers."""

import math
from typing import Any

from transformers import PretrainedConfig

NORM_TYPES = (
    "default_layer_norm",
    "lp_layer_norm",
    "gain_only_layer_norm",
    "gain_only_lp_layer_norm",
    "no_wb_layer_norm",
    "rms_norm",
)
POSITION_TYPES = ("rotary", "head_rotary", "none")
BASE_CLASS = "modeling_open_lm.OpenLMModel"


class OpenLMConfig(PretrainedConfig):
    """Describe an open_lm model and, once grown, the layout of its vocabulary.

    Args:
        hidden_size: width D.
        intermediate_size: width of the feed-forward; None for open_lm's 256 * ceil(int(8 D / 3) / 256).
        positional_embedding_type: "rotary", or "head_rotary": the released 1B model's rotation along the heads,
            which leaves every query-key product unchanged and so equals "none", no position encoding at all.
        norm_type: one of open_lm's names; gain_only has no bias, no_wb neither bias nor gain, and lp equals its
            namesake outside autocast.
        qk_norm: normalise queries and keys over all heads together.
        vocab_layout: num_text_rows, num_text_tokens, codebook_size, multiple; None for a language model alone.
        codes_per_image: length of the code grid, row by row; None for a language model alone.
        sequence_mode: content of the sequences in training: "text-to-image", "image-only" or "text-only".
        sequence_length: tokens per sequence in training, including padding; longer captions were truncated. None if
            it is not known.
        image_rows_only: image codes were trained by a softmax over the image vocabulary only.

    Raises:
        ValueError: sizes that do not divide, or an unknown name.
    """

    model_type = "open_lm"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 50_432,
        hidden_size: int = 2_048,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 2_048,
        positional_embedding_type: str = "rotary",
        norm_type: str = "default_layer_norm",
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        post_embed_norm: bool = False,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        vocab_layout: dict[str, int] | None = None,
        codes_per_image: int | None = None,
        sequence_mode: str = "text-to-image",
        sequence_length: int | None = None,
        image_rows_only: bool = False,
        **kwargs: Any,
    ) -> None:
        # Rotary angles turn the two halves of a head, so its width must be even.
        if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size is {hidden_size} for {num_attention_heads} heads; each head needs an even width"
            )
        if norm_type not in NORM_TYPES:
            raise ValueError(f"norm_type is {norm_type!r}; expected one of {', '.join(NORM_TYPES)}")
        if positional_embedding_type not in POSITION_TYPES:
            raise ValueError(
                f"positional_embedding_type is {positional_embedding_type!r}; expected one of"
                f" {', '.join(POSITION_TYPES)}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        # open_lm's own rule, which its released weights follow.
        self.intermediate_size = intermediate_size or 256 * math.ceil(int(8 * hidden_size / 3) / 256)
        self.max_position_embeddings = max_position_embeddings
        self.positional_embedding_type = positional_embedding_type
        self.norm_type = norm_type
        self.norm_eps = norm_eps
        self.qk_norm = qk_norm
        self.post_embed_norm = post_embed_norm
        self.use_cache = use_cache
        self.vocab_layout = vocab_layout
        self.codes_per_image = codes_per_image
        self.sequence_mode = sequence_mode
        self.sequence_length = sequence_length
        self.image_rows_only = image_rows_only
        # Saving a model adds its own class to the map; AutoModel and feature extraction need the one without LM head.
        kwargs["auto_map"] = {**(kwargs.get("auto_map") or {}), "AutoModel": BASE_CLASS}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
