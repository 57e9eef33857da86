"""The model card of an exported folder: what the model is, how to draw with it, its scores and its licences."""

import functools
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from t2i.config import ASSETS
from t2i.data.shards.reader import read_split
from t2i.errors import UserError
from t2i.files import hub_name, read_optional_json, read_yaml
from t2i.model.backbone import soft_cap_of
from t2i.model.open_lm.configuration_routed import RoutedConfig
from t2i.runs.eval_results import model_index
from t2i.runs.loading import DATA_MANIFEST, SHIPPED_MODEL, OpenedModel, run_around
from t2i.runs.run_folder import RESOLVED

MEASURED = {"scores.json": "eval", "coco_scores.json": "coco"}
"""Name of a scores file in an exported folder -> the run's folder of measures that it comes from."""
SAMPLER = "draw"
"""The sampler, stored beside a model whose own class cannot draw."""
EMBEDDED_TOKENIZER = ASSETS / "image_tokenizer"
CARD = Path(__file__).with_name("card.md")
NUM_CAPTIONS, CAPTION_CHARACTERS = 2, 120
EMBEDDED = ("grinning face", "woman climbing: dark skin tone")
"""Captions of the embedded images."""
LEFT_BY = {
    "within-tensors": "the values of each tensor, in another order",
    "moments": "the mean and the deviation of each tensor",
    "layer-order": "its layers, in another order",
}
"""What each control of model.control_init keeps of the weights."""
MOST_STARTS = 8
"""A model may have begun from a model that began from another: so many are followed."""


def model_card(
    checkpoint: OpenedModel, *, folder: Path, name: str, command: str, repo: str | None = None
) -> str:
    """Fill in the card of an exported folder from the files in it.

    Args:
        repo: the hub's repository that the folder is uploaded to; None if it stays on this machine.
    """
    measured = [scores for scores in (read_optional_json(folder / file) for file in MEASURED) if scores]
    settings = _settings(folder)
    model, kind = settings.get("model", {}), checkpoint.model.config.model_type
    start, control = model.get("init", ""), model.get("control_init", "none")
    python = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.py"))
    return _template().render(
        front_matter=front_matter(measured, name=name, kind=kind),
        name=name,
        repo=repo,
        command=command,
        measured=measured,
        manifest=read_optional_json(folder / DATA_MANIFEST),
        start=start,
        control=control,
        left=LEFT_BY.get(control, "a part of them"),
        # Weights of image codes' own leave the language model's as they were.
        forgets=start not in ("", "random") and control == "none" and kind != RoutedConfig.model_type,
        licences=licences(checkpoint, settings),
        captions=captions_of(folder, settings),
        num_parameters=sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        python=python,
        # transformers' other kernels leave the cap out.
        is_capped=soft_cap_of(checkpoint.model.config) is not None,
        is_remote="auto_map" in read_optional_json(folder / "config.json"),
        draws_itself=not (folder / SAMPLER).exists(),
        sampler=SAMPLER,
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"text": as_text, "code": as_code, "literal": repr}
    return environment.from_string(CARD.read_text())


def as_text(value: object) -> str:
    """Write anybody's text into Markdown as one line of plain words: no HTML, link, image or heading of its own."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>#|!&~])", r"\\\1", text)


def as_code(value: object) -> str:
    """Write anybody's text into Markdown as code within a line."""
    text = " ".join(str(value).split()).replace("`", "'")
    return f"`{text}`"


def captions_of(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Choose captions to show: held-out ones of the shards if these are still there."""
    shards = Path(settings.get("data", {}).get("shards", ""))
    try:
        for split in ("heldout", "train"):
            # Read from the run's own shards: a caption in another style would show nothing of the model.
            found = [sample["caption"] for sample in read_split(shards, split, num_samples=NUM_CAPTIONS)]
            if found := [" ".join(caption[:CAPTION_CHARACTERS].split()) for caption in found if caption]:
                return found
    except (UserError, OSError, ValueError, KeyError):
        pass  # moved or removed since: the card then shows where captions go
    is_embedded = read_optional_json(folder / DATA_MANIFEST).get("source") == "openmoji"
    return (
        list(EMBEDDED) if is_embedded else ["a caption", "another caption, in the words of the training data"]
    )


def licences(checkpoint: OpenedModel, settings: dict[str, Any]) -> dict[str, str]:
    """Collect what the model is made of, each with the licence that its own files state."""
    found: dict[str, str] = {}
    manifest = read_optional_json(checkpoint.home / DATA_MANIFEST)
    if manifest:
        found[f"images: {manifest.get('source')}"] = str(manifest.get("licence", "not stated"))
    for init, home in starts_of(settings):
        found[f"starting weights: {init}"] = stated_licence(home)
    tokenizer = checkpoint.needed_image_tokenizer()
    is_embedded = tokenizer.has_weights_of(EMBEDDED_TOKENIZER)
    folder = EMBEDDED_TOKENIZER if is_embedded else tokenizer.folder
    found["image tokenizer" + (" (t2i's own)" if is_embedded else "")] = stated_licence(folder)
    return found


def starts_of(settings: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """List what training began from, by name and folder, the last one first."""
    for _ in range(MOST_STARTS):
        model = settings.get("model", {})
        init = model.get("init", "random")
        if init == "random" or model.get("control_init") == "fresh":  # of which no weight is left
            return
        home = _home_of(init)
        yield init, home
        settings = _settings(home)


def _home_of(init: str) -> Path:
    """Return a start's folder; a hub's model is looked for in the cache alone, where training has put it."""
    if hub := hub_name(init):
        with suppress(HfHubHTTPError, LocalEntryNotFoundError, HFValidationError):
            return Path(snapshot_download(hub, local_files_only=True))
    path = Path(init)
    if init == SHIPPED_MODEL and not path.exists():
        return ASSETS / SHIPPED_MODEL
    return run_around(path) or path


def stated_licence(home: Path) -> str:
    """Read the licence that a model's folder states: in its card, or of the images that it was trained on."""
    card = home / "README.md"
    if card.is_file():
        try:
            if stated := ModelCard.load(card, ignore_metadata_errors=True).data.license:
                return str(stated)
        except (ValueError, yaml.YAMLError):
            pass  # a README of another kind
    return str(read_optional_json(home / DATA_MANIFEST).get("licence", "not stated"))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / RESOLVED
    return read_yaml(path, name=str(path)) if path.is_file() else {}


def front_matter(measured: list[dict[str, Any]], *, name: str, kind: str) -> str:
    """Return what the hub reads of a card: tags, and the model's scores as its model-index."""
    results = [result for scores in measured for result in model_index(scores)]
    data = ModelCardData(
        library_name="diffusers",  # whose snippet the hub then prints
        pipeline_tag="text-to-image",
        tags=["text-to-image", kind, "autoregressive"],
        # The hub needs a name only with results. No base_model and no datasets: `models/x` would look like a hub name
        # there, and a wrong claim is worse than none. The card's text says both.
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()
