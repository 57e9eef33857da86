"""Captions to image codes: one prefill, guidance, and only the image vocabulary's part of the LM head.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

B captions, R = 2 B rows with guidance (conditional, then unconditional), P positions of the longest prompt, K codes per
image, T positions so far, D width.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .products_open_lm import has_blocks, product
from .reading_open_lm import begin_any

MOST_STEPS = 256
"""Maximum number of compiled steps per process, over all shapes and settings."""
MANY_ROWS = 8
"""From so many rows on, a compiled step is faster with oneDNN than with MKL (measured at 64 codes, batches 1 and 8)."""
MARKERS = ("<doc>", "</doc>", "<text>", "</text>", "<image>", "</image>")


@dataclass(frozen=True)
class Draws:
    """How codes are sampled from hidden states."""

    image_ids: range
    """Ids of the image codes, in order of the codes."""
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float

    @property
    def is_guided(self) -> bool:
        """Tell whether each caption has a second row, of the null caption."""
        return self.guidance_scale != 1


@torch.inference_mode()
def sample_codes(
    model: PreTrainedModel,
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
    is_compiled: bool = False,
    on_code: Callable[[list[Tensor]], object] = len,
) -> Tensor:
    """Sample one image per prompt: codes (B, K), int64.

    Guidance combines hidden states instead of logits. The LM head has no bias, so both give the same, and this takes
    one product with the head per pair.

    Args:
        model: a causal LM with a bias-free LM head; open_lm's allocates its KV cache once.
        prompts: ids up to and with `<image>`, of any lengths.
        empty_prompt: the prompt of the null caption.
        image_ids: ids of the image codes, in order of the codes.
        seeds: one per prompt; an image depends on its own seed, not on its batch.
        guidance_scale: 1 for none.
        temperature: 0 for the most likely code.
        top_k: keep this many codes; 0 for all.
        top_p: of those, keep the most likely that together reach this probability.
        is_compiled: compile the step, which takes a minute, again for another number of prompts or a longer one.
            Afterwards the weights must not change. Codes differ where rounding decides.
        on_code: called after each code with all codes so far, (B,) each; what it raises ends the sampling.

    Raises:
        ValueError: no prompt, or a compiled step of a model whose class has none.
    """
    if not len(prompts):
        raise ValueError("there is no caption to draw; expected at least one")
    how = Draws(image_ids, guidance_scale, temperature, top_k, top_p)
    # After <image> come K codes and nothing else, so the text part of the LM head is never multiplied with.
    head = model.get_output_embeddings().weight[image_ids.start : image_ids.stop]  # (codebook, D)
    keys = image_keys(torch.tensor(seeds, device=model.device), num_codes=num_codes).T.contiguous()  # (K, B)
    # Asked by method, not by class, so that an export's class, loaded by remote code, is decoded the fast way too.
    begin = getattr(model, "begin_decoding", None) or functools.partial(begin_any, model)
    empty = empty_prompt if how.is_guided else None
    hidden, decoder = begin(prompts, empty_prompt=empty, num_codes=num_codes, is_fixed=is_compiled)
    to_logits = product(head, num_rows=len(prompts))
    # The first code is sampled from the prompts' hidden states, so K codes take K - 1 steps.
    step = _compiled_step(decoder, head, how) if is_compiled else _step(decoder, to_logits, how)
    codes = [next_codes(hidden, keys[0], to_logits=to_logits, how=how)]
    on_code(codes)
    for of_code in keys[1:]:
        codes.append(step(codes[-1], of_code).clone())  # a CUDA graph writes into the same memory
        on_code(codes)
    return torch.stack(codes, dim=1)


def next_codes(hidden: Tensor, keys: Tensor, *, to_logits: Callable[[Tensor], Tensor], how: Draws) -> Tensor:
    """Sample one code per caption (B,) from hidden states (R, D), each by its own key (B,)."""
    if how.is_guided:
        conditional, unconditional = hidden.float().chunk(
            2
        )  # (B, D) each, in fp32: their difference is small
        mixed = unconditional + how.guidance_scale * (conditional - unconditional)
        hidden = mixed.to(hidden.dtype)
    logits = to_logits(hidden).float()  # (B, codebook)
    return choose_codes(logits, keys, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)


def _step(
    decoder: Callable[..., Tensor], to_logits: Callable[[Tensor], Tensor], how: Draws
) -> Callable[..., Tensor]:
    """Make the step from codes (B,) and the next keys (B,) to the next codes; a fixed decoder also takes a window."""

    def step(codes: Tensor, keys: Tensor, *window: int) -> Tensor:
        ids = codes + how.image_ids.start
        # Both rows of a pair continue with the code that was sampled for it.
        hidden = decoder(torch.cat([ids, ids]) if how.is_guided else ids, *window)
        return next_codes(hidden, keys, to_logits=to_logits, how=how)

    return step


def _compiled_step(decoder: Any, head: Tensor, how: Draws) -> Callable[[Tensor, Tensor], Tensor]:
    """Compile a fixed decoder's step, once per window: CUDA graphs on a GPU, packed weights on a CPU."""
    if how not in decoder.steps:
        is_cuda = head.device.type == "cuda"
        codebook, width = head.shape
        to_logits = nn.Linear(
            width, codebook, bias=False, device="meta"
        )  # only weights of modules are packed
        to_logits.weight = nn.Parameter(head, requires_grad=False)
        is_by_onednn = has_blocks(head) and len(decoder.padding) >= MANY_ROWS
        step = torch.compile(
            _step(decoder, to_logits, how),
            fullgraph=True,
            dynamic=False,
            backend=_packed_by_onednn if is_by_onednn else "inductor",
            # CUDA graphs: at these sizes a step is hundreds of launches and little work. max-autotune is not used: on a
            # CPU it gave wrong codes at batch 8 (torch 2.14.1).
            mode="reduce-overhead" if is_cuda else None,
        )
        # Dynamo counts all steps as versions of one function, and would stop compiling at eight.
        step = torch._dynamo.config.patch(recompile_limit=MOST_STEPS)(step)
        decoder.steps[how] = step if is_cuda else torch._inductor.config.patch(freezing=True)(step)
    windows = decoder.windows()
    return lambda codes, keys: decoder.steps[how](codes, keys, next(windows))


def _packed_by_onednn(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
    """Compile with weights that oneDNN packs, which is faster than MKL at many rows."""
    # torch's compiler uses oneDNN only if products may be rounded. They may while it compiles, not when the step runs.
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    finally:
        products.fp32_precision = before


def choose_codes(logits: Tensor, keys: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Sample one code per row of logits (B, codebook), each row by its own key (B,): (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    codebook = logits.shape[-1]
    count = min(top_k, codebook) if top_k else codebook
    if count == codebook and top_p == 1:
        # All codes are kept, so nothing has to be sorted.
        order = torch.arange(codebook, device=logits.device).expand_as(logits)
        kept = logits
    elif top_p == 1:
        kept, order = logits.topk(count, sorted=False)  # (B, count) each
    else:
        kept, order = logits.topk(count)  # sorted: top_p cuts at a cumulative sum
    probabilities = (kept / temperature).softmax(-1)
    if top_p < 1:
        # The probability of all likelier codes: the first code always stays, and so does the one that crosses top_p.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    # An exponential race: the argmax of p / wait is a sample of p. Waits are by code, so the order of ties is harmless.
    winner = (probabilities / waits(keys, order)).argmax(-1, keepdim=True)
    return order.gather(1, winner)[:, 0]


def image_keys(seeds: Tensor, *, num_codes: int) -> Tensor:
    """Derive a key for each code of each image from its seed (B,): (B, K), int64.

    Keys are hashes, not states of a generator, so they are the same on every device and in every batch.
    """
    return _scramble(_scramble(seeds)[:, None] + torch.arange(num_codes, device=seeds.device))


def waits(keys: Tensor, codes: Tensor) -> Tensor:
    """Draw an exponential variable for each code (B, N) by its row's key (B,): a hash, the same on every device."""
    # Hashed for the kept codes only: a generator would draw for the whole codebook, a fifth of a step's time.
    bits = _scramble(keys[:, None] + codes) & 0x7FFFFF  # 23 bits: with the half, as many as fp32 holds
    return -((bits.float() + 0.5) / 0x800000).log()


def _scramble(numbers: Tensor) -> Tensor:
    """Mix the bits of int64 numbers, so that neighbouring numbers have unrelated hashes.

    Source: splitmix64 (https://doi.org/10.1145/2660193.2660195), whose gamma and multipliers these are, signed.
    """
    numbers = (numbers + 1) * -0x61C8864680B583EB
    numbers = (numbers ^ (numbers >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ (numbers >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return numbers ^ (numbers >> 31 & 0x1FFFFFFFF)


def draw(
    model: PreTrainedModel,
    captions: str | Sequence[str],
    *,
    tokenizer: Any,
    image_tokenizer: Any,
    seed: int = 0,
    guidance_scale: float = 2.0,
    temperature: float = 0.9,
    top_k: int = 50,
    top_p: float = 1.0,
) -> list[Any]:
    """Sample one PIL image per caption; caption i uses seed + i.

    Args:
        model: a causal LM whose config.json has vocab_layout and codes_per_image.
        captions: several, or one as a text.
        tokenizer: the text tokenizer of the model's folder.
        image_tokenizer: the diffusers VQModel of its image_tokenizer folder.

    Raises:
        ValueError: the model has no image codes, or there is no caption.
    """
    from PIL import Image  # here: sample_codes of an exported folder works without Pillow

    # A text is a sequence of letters too, each of which would become an image.
    captions = [captions] if isinstance(captions, str) else list(captions)
    codes = caption_codes(
        model,
        captions,
        tokenizer=tokenizer,
        seeds=[seed + index for index in range(len(captions))],
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    pixels = codes_to_pixels(image_tokenizer, codes)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def caption_codes(
    model: PreTrainedModel, captions: Sequence[str], *, tokenizer: Any, seeds: Sequence[int], **how: Any
) -> Tensor:
    """Sample the codes (B, K) of captions, each by its own seed.

    Args:
        how: guidance_scale and the other arguments of sample_codes after the seeds.

    Raises:
        ValueError: the model has no image codes, or there is no caption.
    """
    config = model.config
    if getattr(config, "vocab_layout", None) is None or config.codes_per_image is None:
        raise ValueError("this model has no image codes: its config.json has no vocab_layout")
    # Captions are truncated as in training: longer sequences would use positions that were never trained.
    length = config.sequence_length or config.max_position_embeddings
    room = length - config.codes_per_image - len(MARKERS)
    texts = [
        # A caption that spells a special token is text, not a marker.
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in captions
    ]
    rows = config.vocab_layout["num_text_rows"]
    first = rows + len(MARKERS) + 1  # after <pad>
    return sample_codes(
        model,
        [prompt_ids(text[:room], num_text_rows=rows, mode=config.sequence_mode) for text in texts],
        empty_prompt=prompt_ids([], num_text_rows=rows, mode=config.sequence_mode),
        image_ids=range(first, first + config.vocab_layout["codebook_size"]),
        num_codes=config.codes_per_image,
        seeds=seeds,
        **how,
    )


def prompt_ids(caption_ids: Sequence[int], *, num_text_rows: int, mode: str = "text-to-image") -> list[int]:
    """Return the ids of `<doc> <text> caption </text> <image>`, without the text for an image-only model.

    Raises:
        ValueError: the model was trained on text only.
    """
    doc, _, text, end_text, image, _ = range(num_text_rows, num_text_rows + len(MARKERS))
    if mode == "text-only":
        raise ValueError("this model was trained on text only; it samples no images")
    if mode == "image-only":
        return [doc, image]
    return [doc, text, *caption_ids, end_text, image]


@torch.inference_mode()
def codes_to_pixels(image_tokenizer: Any, codes: Tensor) -> Tensor:
    """Decode codes (B, K) of square images to uint8 pixels (B, 3, H, W)."""
    side = round(codes.shape[1] ** 0.5)
    shape = (len(codes), side, side, image_tokenizer.config.vq_embed_dim)
    # force_not_quantize: these are codes already, and VQModel would look up the nearest codebook entry of each.
    flat = codes.flatten().to(image_tokenizer.device)
    pixels = image_tokenizer.decode(flat, force_not_quantize=True, shape=shape).sample
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
