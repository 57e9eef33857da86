"""Export a checkpoint as a folder that draws images without t2i installed."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from t2i.data.shards.manifest import IMAGE_TOKENIZER
from t2i.errors import CheckpointError, UserError
from t2i.files import new_folder, read_optional_json
from t2i.model.backbone import load_model
from t2i.model.open_lm import sampling_open_lm
from t2i.runs.loading import DATA_MANIFEST, OpenedModel
from t2i.runs.run_folder import RESOLVED
from t2i.tokens.image import ROUND_TRIP

MEASURED = {"scores.json": "eval", "coco_scores.json": "coco"}
"""Name of a scores file in an exported folder -> the run's folder of measures that it comes from."""

SAMPLER = "draw.py"
"""The sampler, stored beside a model whose own class cannot draw."""

CARD = Path(__file__).with_name("card.md")


def export(checkpoint: OpenedModel, *, out: Path, command: str, trust_remote_code: bool = False) -> None:
    """Write the exported folder, and check that it gives the same logits.

    Args:
        command: the command that made it, for the model card.
        trust_remote_code: the model's class is code of its folder, which may run once more for the check.

    Raises:
        UserError: `out` exists.
        CheckpointError: the folder, when loaded, gives other logits.
    """
    with new_folder(out) as part:
        _write(checkpoint, part, name=out.name, command=command)
        _check_logits(checkpoint.model, part, trust_remote_code=trust_remote_code)


def _write(checkpoint: OpenedModel, part: Path, *, name: str, command: str) -> None:
    # Other classes are transformers' own. Remote code would replace a class that everybody knows; a file does not.
    if not hasattr(checkpoint.model, "draw"):
        shutil.copyfile(sampling_open_lm.__file__, part / SAMPLER)
    checkpoint.model.save_pretrained(part)
    checkpoint.text_tokenizer.tokenizer.save_pretrained(part)
    checkpoint.needed_image_tokenizer().model.save_pretrained(part / IMAGE_TOKENIZER)
    places = {name: checkpoint.measures_folder(folder) / "scores.json" for name, folder in MEASURED.items()}
    for file in (DATA_MANIFEST, ROUND_TRIP, RESOLVED, *MEASURED):
        found = [path for path in (checkpoint.home / file, places.get(file)) if path and path.is_file()]
        # Measures of this very checkpoint, the last in the list, come before those that an earlier export copied.
        if found:
            shutil.copyfile(found[-1], part / file)
    (part / "README.md").write_text(model_card(checkpoint, folder=part, name=name, command=command))


def model_card(checkpoint: OpenedModel, *, folder: Path, name: str, command: str) -> str:
    """Fill in the model card with the folder's own scores."""
    measured = [scores for scores in (read_optional_json(folder / file) for file in MEASURED) if scores]
    manifest = read_optional_json(folder / DATA_MANIFEST)
    start = (
        yaml.safe_load((folder / RESOLVED).read_text())["model"]["init"]
        if (folder / RESOLVED).is_file()
        else ""
    )
    num_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    template = jinja2.Template(
        CARD.read_text(), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return template.render(
        front_matter=front_matter(measured, name=name, kind=checkpoint.model.config.model_type),
        name=name,
        command=command,
        measured=measured,
        manifest=manifest,
        start=start,
        num_parameters=num_parameters,
        draws_itself=not (folder / SAMPLER).is_file(),
    )


def front_matter(measured: list[dict[str, Any]], *, name: str, kind: str) -> str:
    """Return what the hub reads of a card: tags, and the model's scores as its model-index."""
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", scores["data"].lower()).strip("-"),
            dataset_name=scores["data"],
            metric_type=key,
            metric_name=f"{key} ({scores['n']:,} images, {scores['features']}, {scores['resize']})",
            metric_value=round(scores[key], 4),
        )
        for scores in measured
        for key in scores["measures"]
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", kind, "autoregressive"],
        # The hub needs a name only with results. No base_model and no datasets: `models/x` would look like a hub name
        # there, and a wrong claim is worse than none. The card's text says both.
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def check_repo(name: str) -> None:
    """Check that a name is valid on the hub, before anything is written.

    Raises:
        UserError: it is not.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub is {name!r}; expected USER/NAME. {error}") from error


def push(folder: Path, *, repo: str) -> str:
    """Upload an exported folder to the hub, with huggingface_hub's own token, and return its address."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    api.create_repo(repo, exist_ok=True)
    return str(api.upload_folder(repo_id=repo, folder_path=folder))


@torch.inference_mode()
def _check_logits(model: PreTrainedModel, folder: Path, *, trust_remote_code: bool) -> None:
    ids = torch.arange(24, device=model.device)[None] % model.config.vocab_size
    again = load_model(folder, dtype=model.dtype, trust_remote_code=trust_remote_code)
    again = again.eval().to(model.device)
    # Rounding may differ a little with the weights' layout in memory. A swapped or lost tensor differs by far more.
    difference = (model(ids).logits - again(ids).logits).abs().max().item()
    if difference > 1e-4:
        raise CheckpointError(
            f"{folder}, when loaded, gives logits that differ by {difference:.1e}; not exported."
        )
