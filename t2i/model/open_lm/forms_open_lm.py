"""What a class of transformers' own does around its LM head, and how it continues from a prompt.

Found by value before training (t2i/model/class_form.py) and written into config.json, where the sampler reads it.

This file is uploaded with exported models, so it imports only torch and transformers.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

KEY = "class_form"
"""The key of config.json; absent for a class that needs nothing of this."""
PADDED, UNPADDED, WHOLE = "padded", "unpadded", "whole"


@dataclass(frozen=True)
class ClassForm:
    """How logits follow from hidden states: cap * tanh((weight hidden + bias) * scale / cap)."""

    is_transformed: bool = False
    """The LM head is given other hidden states than those of the body, as in BERT's class."""
    scale: float = 1.0
    cap: float | None = None
    """None for logits of any size."""
    reading: str = PADDED
    """How prompts are read: padded to one length, by length and with a cache, or whole sequences at every step."""
    is_masked: bool = False
    """Attention looks ahead where it is given no mask, as in Doge's class."""

    @classmethod
    def of(cls, model: Any) -> "ClassForm":
        """Read the form of a model's class from its configuration."""
        return cls(**(getattr(model.config, KEY, None) or {}))

    def write(self, model: Any) -> None:
        """Write it into a model's configuration, as far as it is not that of most classes."""
        plain = asdict(ClassForm())
        values = {name: value for name, value in asdict(self).items() if value != plain[name]}
        if values or hasattr(model.config, KEY):
            setattr(model.config, KEY, values)

    @property
    def is_linear(self) -> bool:
        """Tell whether mixing hidden states mixes logits alike."""
        return self.cap is None

    @staticmethod
    def head_of(model: Any, ids: range) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias, None for none, of a part of a model's LM head."""
        module, rows = model.get_output_embeddings(), slice(ids.start, ids.stop)
        bias = getattr(module, "bias", None)
        return module.weight[rows], None if bias is None else bias[rows].float()

    def is_plain(self, bias: Tensor | None) -> bool:
        """Tell whether logits are the product alone."""
        return bias is None and self.scale == 1 and self.cap is None

    def logits_after(
        self, product: Callable[[Tensor], Tensor], *, bias: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """Turn a product with the LM head's weight into logits."""
        if self.is_plain(bias):
            return product

        def logits(hidden: Tensor) -> Tensor:
            found = product(hidden).float()
            found = (found if bias is None else found + bias) * self.scale
            return found if self.cap is None else self.cap * (found / self.cap).tanh()

        return logits
