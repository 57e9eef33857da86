"""The language model that a run starts from, before its vocabulary grows: randomly initialised, or loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from t2i.config import ModelConfig
from t2i.data.shards.manifest import Manifest
from t2i.errors import UserError
from t2i.files import read_json, read_optional_json, write_json
from t2i.model.backbone import (
    check_head,
    check_trainable,
    known_layout,
    load_model,
    made_of,
    num_ids,
    random_model_config,
    read_model_config,
)
from t2i.model.control_init import control_init
from t2i.model.open_lm.modeling_routed import RoutedForCausalLM
from t2i.runs.loading import DATA_MANIFEST, find, reading, weights_sha256
from t2i.runs.run_folder import START
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

logger = logging.getLogger(__name__)

DEVIATIONS = ("initializer_range", "init_std")
"""Names in config.json of the deviation that weights are drawn with: most classes', and OPT's."""


@dataclass(frozen=True)
class Start:
    """A language model before its vocabulary grows, and what its ids mean."""

    model: PreTrainedModel
    layout: VocabLayout
    """The vocabulary that the grown model will have."""
    num_kept: int
    """Ids from 0 whose embeddings and LM head stay as they are."""


def fresh_start(config: ModelConfig, *, manifest: Manifest, text_tokenizer: TextTokenizer) -> Start:
    """Make a model of model.init's architecture, drawn by its class's own rule, with the vocabulary that can be kept.

    Raises:
        UserError: model.init_std is given, and the class takes no deviation.
    """
    folder, _ = find(config.init)
    description = read_model_config(folder, trust_remote_code=config.trust_remote_code)
    if config.init_std is not None:
        # A language model of several parts draws by the description of its own part.
        parts = (description, description.get_text_config(decoder=True))
        named = [(part, name) for part in parts for name in DEVIATIONS if hasattr(part, name)]
        if not named:
            raise UserError(
                f"model.init_std is {config.init_std}; expected None, because {type(description).__name__} draws by a"
                " rule without such a deviation."
            )
        for part, name in named:
            setattr(part, name, config.init_std)
    model = made_of(description, trust_remote_code=config.trust_remote_code)
    check_head(model, name=config.init)  # a loaded model has passed it
    return _kept_rows(model, knows_codes=False, manifest=manifest, text_tokenizer=text_tokenizer)


def starting_model(
    config: ModelConfig, *, seq_len: int, seed: int, manifest: Manifest, text_tokenizer: TextTokenizer
) -> Start:
    """Make or load the language model, as a control if asked, with the vocabulary that can be kept."""
    if config.control_init == "fresh":
        return fresh_start(config, manifest=manifest, text_tokenizer=text_tokenizer)
    if config.init != "random":
        start = loaded_start(
            config.init,
            manifest=manifest,
            text_tokenizer=text_tokenizer,
            trust_remote_code=config.trust_remote_code,
        )
    else:
        size = random_model_config(config, num_text_tokens=text_tokenizer.num_tokens, seq_len=seq_len)
        start = _kept_rows(made_of(size), knows_codes=False, manifest=manifest, text_tokenizer=text_tokenizer)
    if config.control_init != "none":
        control_init(start.model, kind=config.control_init, seed=seed)
    return start


def kept_start(found: str, *, run_dir: Path, is_resumed: bool) -> str:
    """Find the weights that a run with L2-SP began from, to which it is pulled: model.init may name other ones by now.

    Args:
        found: the folder that model.init names now, or `random`.

    Raises:
        UserError: the run began from other weights, and they are gone.
    """
    if found == "random":
        return found
    began = read_optional_json(run_dir / START) if is_resumed else {}
    if not began:
        place = Path(found).resolve()
        write_json(run_dir / START, {"folder": str(place), "weights_sha256": weights_sha256(place)})
        return found
    for folder in (began["folder"], found):
        if Path(folder).is_dir() and weights_sha256(Path(folder)) == began["weights_sha256"]:
            return str(folder)
    raise UserError(
        f"train.l2_sp pulls towards the weights that {run_dir} began from, {began['folder']}, and these are gone:"
        f" model.init is now {found}, with other ones. Put them back, or begin another run."
    )


def loaded_start(
    name: str, *, manifest: Manifest, text_tokenizer: TextTokenizer, trust_remote_code: bool
) -> Start:
    """Load a CKPT with the vocabulary that can be kept."""
    folder, run_dir = find(name)
    with reading(folder):
        # fp32 whatever the file holds: DeepSpeed's JSON says in which precision to train.
        model = load_model(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    check_trainable(model, name=name)
    return _kept_rows(
        model,
        knows_codes=not manifest.is_text and _knows_codes(run_dir or folder, manifest),
        manifest=manifest,
        text_tokenizer=text_tokenizer,
    )


def _kept_rows(
    model: PreTrainedModel, *, knows_codes: bool, manifest: Manifest, text_tokenizer: TextTokenizer
) -> Start:
    """Cut off the embeddings and the LM head of ids that mean nothing for these shards.

    A model that was trained on these codes keeps all. One with other codes keeps those of text and markers.
    """
    rows, codebook_size = num_ids(model), manifest.codebook_size
    layout = known_layout(model, name="model.init")
    text_tokenizer.check_rows(layout.num_text_tokens if layout else rows, model="the language model")
    if layout is None:  # it has met no codes at all
        return Start(model, VocabLayout(rows, text_tokenizer.num_tokens, codebook_size), num_kept=rows)
    if knows_codes or manifest.is_text:
        return Start(model, layout, num_kept=rows)
    if isinstance(model, RoutedForCausalLM):
        raise UserError(
            "model.init has image weights for other image codes; expected shards of the codes that it was trained on,"
            " or the language model that it began from."
        )
    # Also of a checkpoint that was copied out of its run, which has no manifest of its data beside it.
    logger.warning(
        "model.init knows image codes, but not as those of these shards: its folder has no %s of the same image"
        " tokenizer. Their embeddings and LM head begin anew.",
        DATA_MANIFEST,
    )
    layout = VocabLayout(layout.num_text_rows, layout.num_text_tokens, codebook_size)
    model.resize_token_embeddings(layout.first_image_id, mean_resizing=False)
    return Start(model, layout, num_kept=layout.first_image_id)


def _knows_codes(home: Path, manifest: Manifest) -> bool:
    """Tell whether the model of a folder was trained on codes of the image tokenizer that made these shards."""
    file = home / DATA_MANIFEST
    if not file.is_file():
        return False
    # By fingerprint of the tokenizer's weights: two tokenizers may share a name and mean other images by a code.
    trained_on = read_json(file).get("image_tokenizer")
    return isinstance(trained_on, dict) and trained_on.get("fingerprint") == manifest.code_maker.fingerprint
