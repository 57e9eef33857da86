"""Captions to image codes: one prefill, a static cache, guidance, and only the image rows of the head.

B captions, R = 2 B rows with guidance (conditional, then unconditional), K codes a picture.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

SPECIAL_TOKENS = ("<doc>", "</doc>", "<text>", "</text>", "<image>", "</image>")


class StaticCache:
    """Keys and values (R, H, T, head_dim) of every layer in memory that is taken once."""

    def __init__(self, config: Any, *, num_rows: int, num_positions: int, like: Tensor) -> None:
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, num_rows, config.num_attention_heads, num_positions, head_dim)
        self.memory = like.new_zeros(shape)
        self.length = 0

    def get_seq_length(self) -> int:
        """Count the positions held."""
        return self.length

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (R, H, S, head_dim); return all so far. The last layer ends the step."""
        end = self.length + key.shape[2]
        keys, values = self.memory[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        if layer == len(self.memory) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]


@torch.inference_mode()
def sample_codes(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    empty_prompt: Sequence[int],
    image_ids: range,
    num_codes: int,
    seeds: Sequence[int],
    guidance_scale: float = 3.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Sample one picture a prompt: codes (B, K), int64.

    Guidance is combined on the hidden states: the head has no bias, so logits are linear in them and this equals
    combining logits, at one head product for a pair.

    Args:
        model: a causal LM with a bias-free head; with open_lm's, keys and values take their memory once.
        prompts: ids up to and with `<image>`, of any lengths.
        empty_prompt: the prompt of the empty caption.
        image_ids: ids of the image codes, in order of the codes.
        seeds: one a prompt; a picture depends on its own seed, not on its batch.
        guidance_scale: 1 for none.
        temperature: 0 for the most likely code.
        top_k: keep this many codes; 0 for all.
        top_p: of those, keep the most likely that together reach this probability.
    """
    guided = guidance_scale != 1
    rows = [*prompts, *([empty_prompt] * len(prompts) if guided else [])]
    ids, mask = _left_padded(rows, device=model.device)  # (R, S)
    head = model.get_output_embeddings().weight[image_ids.start : image_ids.stop]
    num_positions = ids.shape[1] + num_codes
    cache: Any = DynamicCache()  # what other classes' attention expects
    if model.config.model_type == "open_lm":
        cache = StaticCache(model.config, num_rows=len(rows), num_positions=num_positions, like=head)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    mask = F.pad(mask, (0, num_codes), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    codes: list[Tensor] = []
    for _ in range(num_codes):
        past = cache.get_seq_length()
        total = past + ids.shape[1]
        outputs = model.base_model(
            ids,
            attention_mask=mask[:, :total],
            position_ids=positions[:, past:total],
            past_key_values=cache,
            use_cache=True,
        )
        hidden = outputs.last_hidden_state[:, -1]  # (R, D)
        if guided:
            conditional, unconditional = hidden.chunk(2)
            hidden = unconditional + guidance_scale * (conditional - unconditional)
        logits = (hidden @ head.T).float()  # (B, codebook)
        chosen = choose(logits, generators, temperature=temperature, top_k=top_k, top_p=top_p)
        codes.append(chosen)
        ids = (chosen + image_ids.start)[:, None].repeat(2 if guided else 1, 1)
    return torch.stack(codes, dim=1)


def choose(
    logits: Tensor, generators: Sequence[torch.Generator], *, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Choose one code a row of logits (B, codebook), each row with its own generator: (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    count = min(top_k, logits.shape[-1]) if top_k else logits.shape[-1]
    kept, order = (logits / temperature).topk(count, sorted=top_p < 1)
    probabilities = kept.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    # An exponential race: argmax of p / e is a draw from p.
    races = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=g) for g in generators])
    waits = races.to(logits.device).gather(1, order)  # by code, so that ties in sorting do not matter
    return order.gather(1, (probabilities / waits).argmax(-1, keepdim=True))[:, 0]


def draw(
    model: Any,
    captions: Sequence[str],
    *,
    tokenizer: Any,
    image_tokenizer: Any,
    seed: int = 0,
    guidance_scale: float = 2.0,
    temperature: float = 0.9,
    top_k: int = 50,
    top_p: float = 1.0,
) -> list[Any]:
    """Draw one PIL picture a caption; caption i uses seed + i.

    Args:
        model: a causal LM whose config.json has vocab_layout and codes_per_image.
        tokenizer: the text tokenizer of the model's folder.
        image_tokenizer: the diffusers VQModel of its image_tokenizer folder.

    Raises:
        ValueError: the model has no image codes.
    """
    from PIL import Image

    config = model.config
    if getattr(config, "vocab_layout", None) is None or config.codes_per_image is None:
        raise ValueError("this model has no image codes: its config.json has no vocab_layout")
    length = config.sequence_length or config.max_position_embeddings
    room = length - config.codes_per_image - len(SPECIAL_TOKENS)
    texts = [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in captions
    ]
    rows = config.vocab_layout["num_text_rows"]
    first = rows + len(SPECIAL_TOKENS) + 1  # after <pad>
    codes = sample_codes(
        model,
        [prompt_ids(text[:room], num_text_rows=rows, mode=config.sequence_mode) for text in texts],
        empty_prompt=prompt_ids([], num_text_rows=rows, mode=config.sequence_mode),
        image_ids=range(first, first + config.vocab_layout["codebook_size"]),
        num_codes=config.codes_per_image,
        seeds=[seed + index for index in range(len(captions))],
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    pixels = decode(image_tokenizer, codes)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def prompt_ids(caption_ids: Sequence[int], *, num_text_rows: int, mode: str = "text-to-image") -> list[int]:
    """Write `<doc> <text> caption </text> <image>` as ids; without the text for a model of pictures alone.

    Raises:
        ValueError: the model learned text alone.
    """
    doc, _, text, end_text, image, _ = range(num_text_rows, num_text_rows + len(SPECIAL_TOKENS))
    if mode == "text-only":
        raise ValueError("this model was trained on text alone; it draws no pictures")
    if mode == "image-only":
        return [doc, image]
    return [doc, text, *caption_ids, end_text, image]


@torch.inference_mode()
def decode(image_tokenizer: Any, codes: Tensor) -> Tensor:
    """Decode codes (B, K) of square pictures to uint8 pixels (B, 3, H, W)."""
    side = round(codes.shape[1] ** 0.5)
    shape = (len(codes), side, side, image_tokenizer.config.vq_embed_dim)
    flat = codes.flatten().to(image_tokenizer.device)
    pixels = image_tokenizer.decode(flat, force_not_quantize=True, shape=shape).sample
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _left_padded(rows: Sequence[Sequence[int]], *, device: Any) -> tuple[Tensor, Tensor]:
    """Pad rows on the left to one length: ids and mask (R, S)."""
    longest = max(map(len, rows))
    ids = [[row[0]] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
