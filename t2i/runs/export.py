"""Export a checkpoint as a folder that draws images without t2i installed."""

import os
import shutil
from pathlib import Path

import diffusers
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from t2i.data.shards.manifest import IMAGE_TOKENIZER
from t2i.errors import CheckpointError, UserError, first_line
from t2i.files import new_folder, read_json, read_optional_json, write_json
from t2i.model.backbone import head_of, hidden_states, load_model, num_ids, weight_files
from t2i.model.open_lm import language_model_t2i, pipeline_t2i, sampling_open_lm
from t2i.model.resize import end_at
from t2i.model.routing import check_text
from t2i.runs.card import MEASURED, SAMPLER, model_card
from t2i.runs.eval_results import EVAL_RESULTS, write_eval_results
from t2i.runs.loading import DATA_MANIFEST, OpenedModel
from t2i.runs.run_folder import RESOLVED
from t2i.tokens.image import ROUND_TRIP

CONFIG, DTYPES = "config.json", ("dtype", "torch_dtype")
"""A model's description, and what its newer and older form call the number type of the weights."""
NUM_CHECKED = 8
"""Ids whose hidden states are compared."""
LANGUAGE_MODEL = "language_model"
"""diffusers' name for the model; the folder of that name holds what opens it."""


def export(
    checkpoint: OpenedModel,
    *,
    out: Path,
    command: str,
    trust_remote_code: bool = False,
    repo: str | None = None,
) -> None:
    """Write the exported folder, and check that it gives the same logits.

    Args:
        command: the command that made it, for the model card.
        trust_remote_code: the model's class is code of its folder, which may run once more for the check.
        repo: the hub's repository that the folder will be uploaded to, for the model card.

    Raises:
        UserError: `out` exists.
        CheckpointError: the folder, when loaded, gives other logits, or text weights that must not change have.
    """
    check_text(checkpoint.model, name=str(checkpoint.folder))
    with new_folder(out) as part:
        _write(checkpoint, part)
        card = model_card(checkpoint, folder=part, name=out.name, command=command, repo=repo)
        (part / "README.md").write_text(card)
        _check_logits(checkpoint.model, part, trust_remote_code=trust_remote_code)


def _write(checkpoint: OpenedModel, part: Path) -> None:
    # Other classes are transformers' own. Remote code would replace a class that everybody knows; a package does not.
    if not hasattr(checkpoint.model, "draw"):
        _write_sampler(part / SAMPLER)
    end_at(checkpoint.model, checkpoint.text_tokenizer.tokenizer)  # older runs did not write it down
    _write_model(checkpoint, part)
    checkpoint.text_tokenizer.tokenizer.save_pretrained(part)
    checkpoint.needed_image_tokenizer().copy_to(part / IMAGE_TOKENIZER)
    _write_pipeline(part)
    places = {name: checkpoint.measures_folder(folder) / "scores.json" for name, folder in MEASURED.items()}
    for file in (DATA_MANIFEST, ROUND_TRIP, RESOLVED, *MEASURED):
        found = [path for path in (checkpoint.home / file, places.get(file)) if path and path.is_file()]
        # Measures of this very checkpoint, the last in the list, come before those that an earlier export copied.
        if found:
            shutil.copyfile(found[-1], part / file)
    for file in MEASURED:
        if scores := read_optional_json(part / file):
            write_eval_results(scores, file=part / EVAL_RESULTS / f"{Path(file).stem}.yaml")
    _forget_places(part / DATA_MANIFEST)


def _write_sampler(package: Path) -> None:
    """Write the sampler and all that it imports from beside itself, as a package."""
    package.mkdir()
    first = Path(str(sampling_open_lm.__file__))
    for file in (first, *map(Path, get_relative_import_files(first))):
        shutil.copyfile(file, package / file.name)
    text = f'"""Captions to images, for the model beside it."""\n\nfrom .{first.stem} import draw as draw\n'
    (package / "__init__.py").write_text(text)


def _write_model(checkpoint: OpenedModel, part: Path) -> None:
    """Write the model as it is stored, whatever precision it was opened in."""
    model, files = checkpoint.model, weight_files(checkpoint.folder)
    if not all(file.suffix == ".safetensors" for file in files):
        model.save_pretrained(part)
        return
    # Everything but the weights, which are copied: written anew, they would take the precision of this process.
    model.save_pretrained(part, state_dict={})
    for file in part.glob("*.safetensors*"):
        file.unlink()
    for file in (*files, *checkpoint.folder.glob("*.safetensors.index.json")):
        shutil.copyfile(file, part / file.name)
    own, stored = (read_json(folder / CONFIG) for folder in (part, checkpoint.folder))
    kept = {key: stored[key] for key in DTYPES if key in stored}
    write_json(part / CONFIG, {key: value for key, value in own.items() if key not in DTYPES} | kept)


def _write_pipeline(part: Path) -> None:
    """Write what diffusers' DiffusionPipeline.from_pretrained reads."""
    (part / LANGUAGE_MODEL).mkdir()
    shutil.copyfile(pipeline_t2i.__file__, part / Path(pipeline_t2i.__file__).name)
    opener = Path(language_model_t2i.__file__)
    shutil.copyfile(opener, part / LANGUAGE_MODEL / opener.name)
    index = {
        "_class_name": [Path(pipeline_t2i.__file__).stem, pipeline_t2i.T2IPipeline.__name__],
        "_diffusers_version": diffusers.__version__,
        # First: from the hub it completes the folder, which the tokenizer then is read from.
        LANGUAGE_MODEL: [opener.stem, language_model_t2i.LanguageModel.__name__],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        IMAGE_TOKENIZER: ["diffusers", "VQModel"],
    }
    write_json(part / "model_index.json", index)


def _forget_places(manifest: Path) -> None:
    """Take from a manifest where source and tokenizers lie on this machine: an export is given to others."""
    if not (values := read_optional_json(manifest)):
        return
    values.get("arguments", {}).pop("source_path", None)
    for key in ("text_tokenizer", "image_tokenizer"):
        made_by = values.get(key)
        if isinstance(made_by, dict) and Path(made_by["name"]).is_absolute():
            values[key] = {**made_by, "name": Path(made_by["name"]).name}
    write_json(manifest, values)


def check_repo(name: str) -> None:
    """Check that a name is valid on the hub, before anything is written.

    Raises:
        UserError: it is not.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub is {name!r}; expected USER/NAME. {error}") from error


def push(folder: Path, *, repo: str, is_private: bool = False) -> str:
    """Upload an exported folder to the hub, with huggingface_hub's own token, and return its address.

    Args:
        is_private: a repository that is made now can be seen by its owner alone; one that exists stays as it is.

    Raises:
        UserError: the hub cannot be reached, or does not let this user write there.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(repo, exist_ok=True, private=is_private)
        return str(api.upload_folder(repo_id=repo, folder_path=folder))
    except Exception as error:
        # Its own errors are of the first two; from its version 1 on, those of the connection are httpx's.
        if not isinstance(error, OSError | ValueError) and not type(error).__module__.startswith("httpx"):
            raise
        private = " --private" if is_private else ""
        raise UserError(
            f"{folder} is whole, but could not be uploaded to {repo}: {first_line(error)} Log in (`hf auth login`),"
            f" then upload it alone: `hf upload {repo} {folder}{private}`."
        ) from error


@torch.inference_mode()
def _check_logits(model: PreTrainedModel, folder: Path, *, trust_remote_code: bool) -> None:
    """Load the folder as anybody would, and compare what logits are made of: hidden states, and the LM head."""
    # Over the whole vocabulary: a routed model has other weights for its last ids.
    ids = torch.linspace(0, num_ids(model) - 1, NUM_CHECKED, device=model.device).long()[None]
    again = load_model(folder, dtype=model.dtype, trust_remote_code=trust_remote_code)
    again = again.eval().to(model.device)
    # Rounding may differ a little with the weights' layout in memory. A swapped or lost tensor differs by far more.
    difference = (hidden_states(model, ids) - hidden_states(again, ids)).abs().max().item()
    if difference > 1e-4:
        raise CheckpointError(
            f"{folder}, when loaded, gives hidden states that differ by {difference:.1e}; not exported."
        )
    # Not the logits: to read both heads once is quicker than to multiply by them.
    if not head_of(model).equals(head_of(again)):
        raise CheckpointError(f"{folder}, when loaded, has another LM head; not exported.")
