"""Configuration of a language model whose image positions have weights of their own, for transformers.

This file is uploaded with exported models, so it imports only transformers.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .configuration_open_lm import OpenLMConfig


class RoutedConfig(PretrainedConfig):
    """Describe a routed model: the language model's own configuration, and which weights image positions have.

    Args:
        text_config: configuration of the language model, its vocabulary grown; attributes that are not here are read
            there.
        image_weights: "feed-forward": a copy of that part of every layer; "all": of every matrix and norm; "lora": a
            low-rank addition to every matrix.
        image_rank: rank of that addition.
        num_text_rows: ids from here on are image codes and markers.
        text_hash: hash of the language model's weights, which never change.
    """

    model_type = "t2i_routed"
    is_composition = True

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        image_weights: str = "feed-forward",
        image_rank: int = 0,
        num_text_rows: int = 0,
        text_hash: str = "",
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, PretrainedConfig):
            values = dict(text_config or {"model_type": OpenLMConfig.model_type})
            kind = values.pop("model_type")
            text_config = (
                OpenLMConfig(**values)
                if kind == OpenLMConfig.model_type
                else AutoConfig.for_model(kind, **values)
            )
        self.text_config = text_config
        self.image_weights, self.image_rank = image_weights, image_rank
        self.num_text_rows, self.text_hash = num_text_rows, text_hash
        super().__init__(**kwargs)
        self.tie_word_embeddings = text_config.tie_word_embeddings

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        """Return the language model's configuration, from which transformers takes the sizes of a cache."""
        return self.text_config

    def __getattr__(self, name: str) -> Any:
        # Not auto_map: the language model's names its own class.
        if name.startswith("__") or name == "auto_map" or "text_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.text_config, name)


RoutedConfig.register_for_auto_class()
