"""Captions to image codes: one prefill, a static cache, guidance, and only the image rows of the head.

B captions, R = 2 B rows with guidance (conditional, then unconditional), P positions of the longest prompt, K codes a
picture, T positions so far, L layers, H heads, D width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

SPECIAL_TOKENS = ("<doc>", "</doc>", "<text>", "</text>", "<image>", "</image>")


class StaticCache:
    """Keys and values (R, H, T, head_dim) of every layer in memory that is taken once."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # (L, 2, R, H, P + K, head_dim)
        self.length = 0

    @classmethod
    def empty(cls, config: Any, *, num_rows: int, num_positions: int, like: Tensor) -> "StaticCache":
        """Take the memory of so many rows and positions, zeroed, on the device and in the dtype of `like`."""
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, num_rows, config.num_attention_heads, num_positions, head_dim)
        return cls(like.new_zeros(shape))

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


class Decoder:
    """The model's forward for one new token a row, without what only whole sequences need.

    Weights are laid out for few rows, angles and mask are made once for all steps.
    """

    def __init__(self, model: Any, cache: StaticCache, *, padding: Tensor) -> None:
        """Prepare to go on after the prompts that `cache` holds.

        Args:
            padding: (R,) positions on the left of each row that no key may be seen of.
        """
        self.body, self.cache = model.model, cache
        num_rows, num_heads, num_positions, head_dim = cache.memory.shape[2:]
        self.heads = (num_rows, 3, num_heads, head_dim)
        self.products = [
            [
                product(linear.weight, num_rows=num_rows)
                for linear in (
                    block.attention.in_proj,
                    block.attention.out_proj,
                    block.feed_forward.w12,
                    block.feed_forward.w3,
                )
            ]
            for block in self.body.layers
        ]
        places = torch.arange(num_positions, device=padding.device)
        self.angles = self.body.angles(
            (places - padding[:, None]).clamp(min=0)
        )  # (R, 1, P + K, head_dim) each
        if self.angles is not None:
            cos, sin = self.angles
            sign = torch.ones_like(sin)
            sign[..., : head_dim // 2] = -1
            self.angles = cos, sin * sign
        self.mask = None
        if padding.any():
            hidden = torch.full((num_rows, num_positions), -torch.inf, device=padding.device)
            hidden = hidden.where(places < padding[:, None], 0)
            self.mask = hidden[:, None, None].to(cache.memory.dtype)  # (R, 1, 1, P + K)

    def __call__(self, ids: Tensor) -> Tensor:
        """Append one id a row (R,) to the cache; compute its normed hidden state (R, D)."""
        body, at = self.body, self.cache.length
        end = at + 1
        mask = None if self.mask is None else self.mask[..., :end]
        angles = None if self.angles is None else [part[:, :, at : at + 1] for part in self.angles]
        hidden = body.post_embed_norm(body.tok_embeddings(ids))  # (R, D)
        for block, products, memory in zip(body.layers, self.products, self.cache.memory, strict=True):
            in_proj, out_proj, w12, w3 = products
            heads = self._heads(block.attention, in_proj(block.attention_norm(hidden)), angles)
            memory[:, :, :, at] = heads[:, 1:].transpose(0, 1)
            mixed = F.scaled_dot_product_attention(
                heads[:, 0, :, None], memory[0, :, :, :end], memory[1, :, :, :end], attn_mask=mask
            )  # (R, H, 1, head_dim)
            hidden = hidden + out_proj(mixed.flatten(1))
            gate, value = w12(block.ffn_norm(hidden)).chunk(2, dim=-1)
            hidden = hidden + w3(F.silu(gate) * value)
        self.cache.length = end
        return body.norm(hidden)

    def _heads(self, attention: Any, projected: Tensor, angles: list[Tensor] | None) -> Tensor:
        """Norm and turn what was projected (R, 3 D): queries, keys and values (R, 3, H, head_dim)."""
        heads = projected.view(self.heads)
        if self.body.config.qk_norm:
            flat = projected.view(len(projected), 3, -1)
            flat[:, 0] = attention.q_norm(flat[:, 0])
            flat[:, 1] = attention.k_norm(flat[:, 1])
        if angles is not None:
            cos, signed_sin = angles
            pair = heads[:, :2].float()
            swapped = pair.roll(pair.shape[-1] // 2, dims=-1)
            heads[:, :2] = torch.addcmul(pair * cos, swapped, signed_sin)
        return heads


def product(weight: Tensor, *, num_rows: int) -> Callable[[Tensor], Tensor]:
    """Prepare x (num_rows, D) -> x weight^T.

    In fp32 on x86 processors oneDNN takes the weight in blocks of its own: half the time at 2 rows, a third at 16.
    """
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    has_blocks = torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()
    if not (is_plain and has_blocks):
        return functools.partial(F.linear, weight=weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), num_rows)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: multiply(rows, packed, None, "none", [], "")


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
    batch, is_guided = len(prompts), guidance_scale != 1
    head = model.get_output_embeddings().weight[image_ids.start : image_ids.stop]
    to_logits = product(head, num_rows=batch)
    keys = picture_keys(torch.tensor(seeds, device=model.device), num_codes=num_codes)  # (B, K)
    prefill = _prefill if model.config.model_type == "open_lm" else _prefill_any
    hidden, decoder = prefill(
        model, prompts, empty_prompt=empty_prompt if is_guided else None, num_codes=num_codes
    )
    codes = torch.empty(batch, num_codes, dtype=torch.long, device=model.device)
    for step in range(num_codes):
        if is_guided:
            conditional, unconditional = hidden.float().chunk(2)
            hidden = unconditional + guidance_scale * (conditional - unconditional)
        logits = to_logits(hidden.to(head.dtype)).float()  # (B, codebook)
        chosen = choose(logits, keys[:, step], temperature=temperature, top_k=top_k, top_p=top_p)
        codes[:, step] = chosen
        if step < num_codes - 1:
            ids = chosen + image_ids.start
            hidden = decoder(torch.cat([ids, ids]) if is_guided else ids)
    return codes


def _prefill(
    model: Any, prompts: Sequence[Sequence[int]], *, empty_prompt: Sequence[int] | None, num_codes: int
) -> tuple[Tensor, Decoder]:
    """Read the prompts: the last hidden states (R, D), and what goes on from there.

    Args:
        empty_prompt: read once for all rows; None without guidance.
    """
    lengths = [len(prompt) for prompt in prompts] + [len(empty_prompt or [])] * len(prompts)
    batch, longest = len(prompts), max(lengths)
    num_rows = 2 * batch if empty_prompt else batch
    like = model.get_output_embeddings().weight
    cache = StaticCache.empty(model.config, num_rows=num_rows, num_positions=longest + num_codes, like=like)
    ids, mask = _left_padded(prompts, length=longest, device=model.device)  # (B, P)
    own = StaticCache(cache.memory[:, :, :batch])
    mask_or_none = None if mask.all() else mask
    hidden = model.model(ids, attention_mask=mask_or_none, past_key_values=own).last_hidden_state[:, -1]
    if empty_prompt:
        single = StaticCache.empty(model.config, num_rows=1, num_positions=len(empty_prompt), like=like)
        ids = torch.tensor([list(empty_prompt)], device=model.device)
        last = model.model(ids, past_key_values=single).last_hidden_state[:, -1]
        cache.memory[:, :, batch:, :, longest - len(empty_prompt) : longest] = single.memory
        hidden = torch.cat([hidden, last.expand(batch, -1)])
    cache.length = longest
    padding = longest - torch.tensor(lengths[:num_rows], device=model.device)
    return hidden, Decoder(model, cache, padding=padding)


def _prefill_any(
    model: Any, prompts: Sequence[Sequence[int]], *, empty_prompt: Sequence[int] | None, num_codes: int
) -> tuple[Tensor, "PlainDecoder"]:
    """Do what _prefill does with a class of transformers' own."""
    rows = [*prompts, *([empty_prompt] * len(prompts) if empty_prompt else [])]
    ids, mask = _left_padded(rows, length=max(map(len, rows)), device=model.device)  # (R, P)
    decoder = PlainDecoder(model, F.pad(mask.long(), (0, num_codes), value=1))
    return decoder(ids), decoder


class PlainDecoder:
    """Go on from the ids read so far by the model's own forward and transformers' cache."""

    def __init__(self, model: Any, mask: Tensor) -> None:
        self.model, self.mask = model, mask  # (R, T)
        self.positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.cache = DynamicCache()

    def __call__(self, ids: Tensor) -> Tensor:
        """Read ids (R, S), or (R,) for one more each, and return the last hidden states (R, D)."""
        ids = ids.view(len(self.mask), -1)
        past = self.cache.get_seq_length()
        total = past + ids.shape[1]
        outputs = self.model.base_model(
            ids,
            attention_mask=self.mask[:, :total],
            position_ids=self.positions[:, past:total],
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state[:, -1]


def choose(logits: Tensor, keys: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Choose one code a row of logits (B, codebook), each row by its own key (B,): (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    codebook = logits.shape[-1]
    count = min(top_k, codebook) if top_k else codebook
    if count == codebook and top_p == 1:
        order = torch.arange(codebook, device=logits.device).expand_as(logits)
        kept = logits
    else:
        kept, order = logits.topk(count, sorted=top_p < 1)
    probabilities = (kept / temperature).softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    # An exponential race: argmax of p / wait is a draw from p. Waits are by code: the order of ties does not matter.
    winner = (probabilities / waits(keys, order)).argmax(-1, keepdim=True)
    return order.gather(1, winner)[:, 0]


def picture_keys(seeds: Tensor, *, num_codes: int) -> Tensor:
    """Derive a key for each code of each picture from its seed (B,): (B, K), int64."""
    return _scramble(_scramble(seeds)[:, None] + torch.arange(num_codes, device=seeds.device))


def waits(keys: Tensor, codes: Tensor) -> Tensor:
    """Draw an exponential variable for each code (B, N) under its row's key (B,): a hash, the same on every device."""
    bits = _scramble(keys[:, None] + codes) & 0x7FFFFF  # 23: with the half, as many as fp32 holds
    return -((bits.float() + 0.5) / 0x800000).log()


def _scramble(numbers: Tensor) -> Tensor:
    """Mix the bits of int64 numbers so that neighbours have nothing in common.

    Source: splitmix64 (https://doi.org/10.1145/2660193.2660195), whose gamma and multipliers these are, signed.
    """
    numbers = (numbers + 1) * -0x61C8864680B583EB
    numbers = (numbers ^ (numbers >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ (numbers >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return numbers ^ (numbers >> 31 & 0x1FFFFFFFF)


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


def _left_padded(rows: Sequence[Sequence[int]], *, length: int, device: Any) -> tuple[Tensor, Tensor]:
    """Pad rows on the left to one length: ids and mask (B, length)."""
    ids = [[row[0]] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
