"""Draw from a model of others: one loop for all, with a seed per caption."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.generate.image_files import draw_images, settings_of
from t2i.generate.others.family import OthersModel
from t2i.generate.sample import decode_images
from t2i.settings import MAX_WHOLE


def draw_others_folder(
    opened: OthersModel,
    captions: dict[str, str],
    *,
    out: Path,
    config: SampleConfig,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    description: str = "draw",
) -> list[Path]:
    """Draw every caption to out/NAME.png, as draw_folder does from a model of this package.

    Raises:
        UserError: `out` holds images of another drawing, or the settings are of this package's models alone.
    """
    if (config.best_of, config.best_by, config.compile) != (1, "likelihood", False) or config.window not in (
        "auto",
        1,
    ):
        raise UserError(
            "--best-of, --best-by, --compile and --window are for models of this package;"
            f" {opened.folder} is a {opened.kind}."
        )
    texts = list(captions.values())

    def draw(start: int) -> list[Image.Image]:
        batch = texts[start : start + batch_size]
        seeds = [(config.seed + start + place) % MAX_WHOLE for place, _ in enumerate(batch)]
        codes = draw_codes(opened, batch, seeds=seeds, settings=config)
        return decode_images(opened.needed_image_tokenizer(), codes)

    return draw_images(
        captions,
        out=out,
        draw=draw,
        settings=settings_of(
            captions, weights=opened.weights, dtype=opened.dtype, config=config, batch_size=batch_size
        )
        # An Emu3 draws any size, and the image tokenizer may lie in a folder of its own.
        | {
            "image_size": opened.image_size(),
            "image_tokenizer": opened.needed_image_tokenizer().fingerprint(),
        },
        checkpoint=opened.folder,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        description=description,
    )


@torch.inference_mode()
def draw_codes(
    opened: OthersModel, captions: Sequence[str], *, seeds: Sequence[int], settings: SampleConfig
) -> Tensor:
    """Sample codes (B, K) of captions; the codes of a caption depend on its seed, not on its batch."""
    family = opened.family
    prompts = [family.prompt(caption) for caption in captions]
    is_guided = settings.guidance_scale != 1
    rows = prompts + [family.null_prompt(prompt) for prompt in prompts] if is_guided else prompts
    embeds, mask = _padded(rows, opened.model)  # (R, S, D), (R, S)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cache, codes = DynamicCache(), []
    for place in range(family.codes_per_side**2):
        hidden = _step(family.body, embeds, mask=mask, cache=cache)  # (R, D)
        logits = family.logits(hidden).float()  # (R, C)
        if is_guided:
            matched, null = logits.chunk(2)
            logits = null + settings.guidance_scale * (matched - null)  # (B, C)
        codes.append(choose(logits.cpu(), generators, settings=settings).to(mask.device))
        chosen = codes[-1].repeat(2 if is_guided else 1)
        embeds = family.embed_code(chosen)[:, None]  # (R, 1, D)
        if family.line_end is not None and (place + 1) % family.codes_per_side == 0:
            end = torch.full_like(chosen, family.line_end)
            embeds = torch.cat([embeds, opened.model.get_input_embeddings()(end)[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), embeds.shape[1])], dim=1)
    return torch.stack(codes, dim=1)


def choose(logits: Tensor, generators: Sequence[torch.Generator], *, settings: SampleConfig) -> Tensor:
    """Draw a code per row of logits (B, C), each with its own generator: (B,)."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        least = logits.topk(settings.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    shares, order = logits.softmax(-1).sort(descending=True)
    # A code is kept if those before it do not reach top_p yet; so the first always is.
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= settings.top_p, 0)
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(shares, generators, strict=True)
    ]
    return order.gather(-1, torch.stack(drawn))[:, 0]


def _padded(rows: Sequence[Sequence[int]], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Embed rows of ids, padded on the left: (R, S, D) and what is no padding, (R, S)."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    return model.get_input_embeddings()(ids), mask


def _step(body: torch.nn.Module, embeds: Tensor, *, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Compute the last hidden state of each row (R, D) after embeddings (R, S, D), and grow the cache."""
    # Padding takes no position: a caption must not depend on the longest one of its batch.
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
    out = body(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1]
