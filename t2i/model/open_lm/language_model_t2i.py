"""How diffusers' pipeline opens the language model of an exported folder: by transformers, from the folder above.

This file is uploaded with exported models, as language_model/language_model_t2i.py: diffusers looks for a component's
code in a folder of the component's name, while transformers looks for the model at the top.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


class LanguageModel(PreTrainedModel):
    """A name for diffusers to call; what it opens is of the model's own class."""

    @classmethod
    def from_pretrained(cls, folder: str, **settings: Any) -> PreTrainedModel:
        """Open the model of the folder above; diffusers was told to trust code before it ran this file."""
        home = complete(Path(folder).absolute().parent)
        config = AutoConfig.from_pretrained(home, trust_remote_code=True).get_text_config(decoder=True)
        if getattr(config, "attn_logit_softcapping", None) is not None:
            settings.setdefault("attn_implementation", "eager")  # SDPA leaves the cap out
        return AutoModelForCausalLM.from_pretrained(home, trust_remote_code=True, **settings)


def complete(home: Path) -> Path:
    """Download what diffusers left out of its download from the hub: the model's code and its tokenizer."""
    # The hub's cache: models--USER--NAME/snapshots/COMMIT.
    repo = home.parent.parent.name
    if home.parent.name == "snapshots" and repo.startswith("models--"):
        user_and_name = repo.removeprefix("models--").replace("--", "/", 1)
        snapshot_download(user_and_name, revision=home.name, cache_dir=home.parent.parent.parent)
    return home
