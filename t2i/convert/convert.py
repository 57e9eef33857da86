"""Convert released weights to our folders and back. A folder appears only after it has been checked."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from t2i.convert.open_lm import (
    RELEASED_CONFIGS,
    has_frequencies,
    load_open_lm,
    open_lm_state,
    open_lm_tensors,
    with_frequencies,
)
from t2i.convert.open_lm_config import (
    POSITIONS,
    Positions,
    config_of,
    decide_positions,
    open_lm_config,
    read_config,
    read_values,
)
from t2i.convert.open_lm_reference import open_lm_logits
from t2i.convert.proof import Tell, prove_logits
from t2i.convert.released import RELEASES, only_tensors, read_weights
from t2i.convert.vq import SourceLayout, load_vq, vq_tensors
from t2i.convert.vq_reference import source_codes, source_latents, source_pixels
from t2i.data.sources import openmoji
from t2i.errors import CheckpointError, UserError
from t2i.files import new_folder, sha256_of
from t2i.model.backbone import is_open_lm, weight_files
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.resize import end_at, never_generate
from t2i.runs.loading import find
from t2i.tokens.image import ImageTokenizer, to_pixels
from t2i.tokens.text import JSON, MODEL, NEOX, OLDER, TextTokenizer

OPEN_LM_WEIGHTS, OPEN_LM_CONFIG = "open_lm.pt", "open_lm.json"
MEMORY_FACTOR = 2.5
"""Most memory of a conversion, relative to the files: they are held, written, and read again."""
LATENTS, PIXELS = 1e-4, 2e-4
"""Largest differences that rounding explains: of latents, relative to the largest or to 1; of pixels in [-1, 1]."""
CODES = 0.99
"""Smallest share of equal codes. Rounding may change the code of a latent that lies between two codes."""
PROOF_IMAGES = ("1F600", "1F34E", "1F3E0", "1F415")
"""Images of the embedded dataset that are encoded for the check: a face, an apple, a house and a dog."""


def identify(checkpoint: Path, *, tell: Tell) -> set[str]:
    """Hash a checkpoint's files, report each, and return the names of the known releases among them."""
    hashes = {file: sha256_of(file) for file in weight_files(checkpoint)}
    for file, value in hashes.items():
        what = f"known release {RELEASES[value]}" if value in RELEASES else "not a known release"
        tell(f"{file.name}: SHA-256 {value}, {what}")
    return {RELEASES[value] for value in hashes.values() if value in RELEASES}


def convert_open_lm(
    checkpoint: Path,
    *,
    config_names: Sequence[str],
    text_tokenizer: str | None,
    out: Path,
    tell: Tell,
    positions: Positions | None = None,
) -> None:
    """Convert an open_lm checkpoint to a folder for model.init.

    Args:
        checkpoint: a file, or a Hugging Face folder written by open_lm.
        config_names: the published name or the file of its config, and a run's params.txt; none for that of the
            folder, or of a known release.
        text_tokenizer: a folder or a hub name; None for that of the folder, else GPT-NeoX-20B's.
        positions: how positions are encoded, where no config says it.

    Raises:
        UserError: `out` exists, nobody says how positions are encoded, or checkpoint, config and tokenizer do
            not belong together.
        CheckpointError: the checkpoint may run code, does not fit the config, or the folder gives other logits.
    """
    with new_folder(out) as part:
        if config_names:
            # Called for its check: a wrong name is refused before gigabytes are hashed.
            config_of(read_values(config_names), source=" ".join(config_names))
        tell(memory_needed(checkpoint))
        has_own = any((checkpoint / name).is_file() for name in (JSON, MODEL, *OLDER))
        tensors = open_lm_tensors(read_weights(checkpoint))  # before a hub is asked
        tokenizer = TextTokenizer.load(text_tokenizer or (checkpoint if has_own else NEOX))
        releases = identify(checkpoint, tell=tell)
        config = _config(
            config_names, tensors=tensors, positions=positions, checkpoint=checkpoint, releases=releases
        )
        _check_rows(tokenizer, config=config)
        model = load_open_lm(tensors, config=config, source=checkpoint)
        prepare_generation(model, tokenizer)
        model.save_pretrained(part)
        tokenizer.tokenizer.save_pretrained(part)
        del model  # the proof holds the written folder's weights beside the checkpoint's
        proof = only_tensors(tensors)
        if config.positional_embedding_type != "none" and not has_frequencies(tensors):
            proof = with_frequencies(proof, config=config)
            tell(f"the file does not show its positions: {positions}, as --positions says, is not proven")
        tell(prove_open_lm(part, tensors=proof))


def convert_back(ckpt: str, *, out: Path) -> None:
    """Write a CKPT's language model to `out` in open_lm's format: open_lm.pt and open_lm.json.

    Raises:
        UserError: `out` exists, or ckpt is not a CKPT of an open_lm model.
    """
    folder, _ = find(ckpt)
    if not is_open_lm(folder):
        raise UserError(f"{folder} holds no open_lm model: its config.json is of another class.")
    with new_folder(out) as part:
        config = OpenLMConfig.from_pretrained(folder)
        state = open_lm_state(only_tensors(read_weights(folder)), config=config)
        torch.save(state, part / OPEN_LM_WEIGHTS)
        (part / OPEN_LM_CONFIG).write_text(json.dumps(open_lm_config(config), indent=4))


def convert_vq(checkpoint: Path, *, layout: SourceLayout, out: Path, tell: Tell) -> None:
    """Convert a released image tokenizer to a diffusers folder.

    Raises:
        UserError: `out` exists, or there is no checkpoint.
        CheckpointError: it may run code, does not fit, or the folder gives other codes or images.
    """
    with new_folder(out) as part:
        identify(checkpoint, tell=tell)
        tensors, left_out = vq_tensors(read_weights(checkpoint), layout=layout)
        if left_out:
            tell(f"left out, because encoding and decoding do not need it: {', '.join(left_out)}")
        load_vq(tensors, layout=layout, source=checkpoint).save_pretrained(part)
        tell(prove_codes(part, tensors=only_tensors(tensors), layout=layout))


def prepare_generation(model: OpenLMForCausalLM, tokenizer: TextTokenizer) -> None:
    """Set generate() to end at the tokenizer's end token and never choose an id that no token uses."""
    end_at(model, tokenizer.tokenizer)
    never_generate(model, list(range(tokenizer.num_tokens, model.config.vocab_size)))


@torch.inference_mode()
def prove_open_lm(folder: Path, *, tensors: dict[str, Tensor]) -> str:
    """Compare the logits of a written folder with a forward pass on open_lm's own tensors; return a sentence.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    # The release's own steps are written a second time, from its own names. Shapes alone would let swapped queries
    # and keys pass.
    model = OpenLMForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    for part in (
        *model.model.layers,
        model.model.tok_embeddings,
        model.model.post_embed_norm,
        model.model.norm,
    ):
        in_fp32_while_used(part)
    in_fp32_while_used(model.output)
    return prove_logits(
        model, partial(open_lm_logits, tensors, config=model.config), of="open_lm's own tensors"
    )


@torch.inference_mode()
def prove_codes(folder: Path, *, tensors: dict[str, Tensor], layout: SourceLayout) -> str:
    """Compare a written folder with the release's own steps on a few images; return a sentence.

    Raises:
        CheckpointError: latents, codes or decoded images differ by more than rounding.
    """
    tokenizer = ImageTokenizer.load(folder)
    pixels = to_pixels([openmoji.render(key) for key in PROOF_IMAGES])
    latents = source_latents(tensors, pixels, layout=layout)
    codes = source_codes(tensors, latents, layout=layout).flatten(1)  # (B, K)
    images = source_pixels(tensors, codes.view(-1, *latents.shape[2:]), layout=layout)
    latent_error = (tokenizer.model.encode(pixels).latents - latents).abs().max().item()
    pixel_error = (tokenizer.decode(codes) - images).abs().max().item()
    num_equal = int((tokenizer.encode(pixels) == codes).sum())
    found = (
        f"latents differ by {latent_error:.1e}, pixels by {pixel_error:.1e},"
        f" {num_equal} of {codes.numel()} codes are equal"
    )
    is_close = latent_error <= LATENTS * max(1, latents.abs().max().item()) and pixel_error <= PIXELS
    if not is_close or num_equal < CODES * codes.numel():
        raise CheckpointError(f"the converted tokenizer differs from the release: {found}; nothing written.")
    return f"checked: {len(pixels)} images, in the written folder and by the release's own steps: {found}"


def in_fp32_while_used(part: nn.Module) -> None:
    """Let a part of a model compute in fp32, and hold its weights in fp32 only meanwhile."""
    # The whole model in fp32 would need twice the memory of a file in bf16, beside the file.
    stored = {name: value.data for name, value in part.named_parameters()}

    def widen(module: nn.Module, inputs: tuple[object, ...]) -> None:
        for value in module.parameters():
            value.data = value.data.float()

    def restore(module: nn.Module, inputs: tuple[object, ...], outputs: object) -> None:
        for name, value in module.named_parameters():
            value.data = stored[name]

    part.register_forward_pre_hook(widen)
    part.register_forward_hook(restore)


def memory_needed(checkpoint: Path) -> str:
    """Say how much memory a conversion needs, before it reads anything."""
    size = sum(file.stat().st_size for file in weight_files(checkpoint))
    needed = MEMORY_FACTOR * size / 1e9 + 1  # GB; the libraries take the last one
    return f"the weights take {size / 1e9:.1f} GB; converting needs about {needed:.0f} GB of memory"


def _config(
    given: Sequence[str],
    *,
    tensors: Mapping[str, object],
    positions: Positions | None,
    checkpoint: Path,
    releases: set[str],
) -> OpenLMConfig:
    """Read the checkpoint's config, and decide what it leaves out about positions."""
    right = next((RELEASED_CONFIGS[name] for name in releases if name in RELEASED_CONFIGS), None)
    own = checkpoint / "config.json"
    names = given or ((right,) if right else (str(own),) if own.is_file() else ())
    if not names:
        raise UserError(
            "give --config NAME|FILE: the checkpoint is not a known release and has no config.json."
        )
    source, values = " ".join(names), read_values(names)
    # Shapes cannot tell the configs of a release apart: they differ in how positions are rotated.
    if right and given and config_of(values, source=source).to_dict() != read_config(right).to_dict():
        raise UserError(f"--config {source} is wrong for this release; expected {right}.")
    values[POSITIONS] = decide_positions(
        stated=values.get(POSITIONS),
        given=positions,
        has_frequencies=has_frequencies(tensors),
        source=source,
    )
    return config_of(values, source=source)


def _check_rows(tokenizer: TextTokenizer, *, config: OpenLMConfig) -> None:
    if tokenizer.num_tokens > config.vocab_size:
        raise UserError(
            f"text tokenizer {tokenizer.name} has {tokenizer.num_tokens} ids; the model has {config.vocab_size}"
            " embeddings."
        )
