"""A checkpoint as a folder that draws pictures where t2i is not installed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import HfApi

from t2i.errors import CheckpointError, UserError
from t2i.model.modeling_open_lm import OpenLMForCausalLM
from t2i.runs.ckpt import DATA_MANIFEST, IMAGE_TOKENIZER, Checkpoint

SCORES = "scores.json"
CARD = Path(__file__).with_name("card.md")


def export(checkpoint: Checkpoint, *, out: Path, command: str) -> None:
    """Write the exported folder and prove that it gives the same logits.

    Args:
        command: what made it, for the model card.

    Raises:
        UserError: `out` exists.
        CheckpointError: the folder, loaded back, gives other logits.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already; choose another.")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    home = checkpoint.run_dir or checkpoint.folder
    checkpoint.model.save_pretrained(part)
    checkpoint.text_tokenizer.tokenizer.save_pretrained(part)
    checkpoint.image_tokenizer.model.save_pretrained(part / IMAGE_TOKENIZER)
    for name in (DATA_MANIFEST, SCORES):
        found = next((path for path in (home / name, home / "eval" / name) if path.is_file()), None)
        if found:
            shutil.copyfile(found, part / name)
    (part / "README.md").write_text(model_card(checkpoint, folder=part, name=out.name, command=command))
    _check_logits(checkpoint.model, part)
    part.rename(out)


def model_card(checkpoint: Checkpoint, *, folder: Path, name: str, command: str) -> str:
    """Fill the model card with the folder's own measured numbers."""
    scores = _read(folder / SCORES)
    manifest = _read(folder / DATA_MANIFEST)
    num_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    template = jinja2.Template(
        CARD.read_text(), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return template.render(
        name=name, command=command, scores=scores, manifest=manifest, num_parameters=num_parameters
    )


def push(folder: Path, *, repo: str) -> str:
    """Upload an exported folder to the hub; return its address. The token is huggingface_hub's own business."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    api.create_repo(repo, exist_ok=True)
    return str(api.upload_folder(repo_id=repo, folder_path=folder))


@torch.inference_mode()
def _check_logits(model: OpenLMForCausalLM, folder: Path) -> None:
    ids = torch.arange(24, device=model.device)[None] % model.config.vocab_size
    again = OpenLMForCausalLM.from_pretrained(folder, dtype=model.dtype).eval().to(model.device)
    difference = (model(ids).logits - again(ids).logits).abs().max().item()
    if difference > 1e-4:
        raise CheckpointError(
            f"{folder}, loaded back, gives logits that differ by {difference:.1e}; not exported."
        )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
