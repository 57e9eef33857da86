"""Captions to image codes: one prefill, guidance, and only the image vocabulary's part of the LM head.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

B captions, R = 2 B rows with guidance (conditional, then unconditional), P positions of the longest prompt, K codes per
image, T positions so far, D width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from .forms_open_lm import ClassForm
from .products_open_lm import has_blocks, product

# Under their old names too: files of older exports and others' scripts import them from here.
from .race_open_lm import Draws, choose_codes, image_keys, next_codes, waits  # noqa: F401
from .reading_open_lm import begin_any
from .window_open_lm import WindowDecoder, pace_of, sample_by_window

MOST_STEPS = 256
"""Maximum number of compiled steps per process, over all shapes and settings."""
MANY_ROWS = 8
"""From so many rows on, a compiled step is faster with oneDNN than with MKL (measured at 64 codes, batches 1 and 8)."""
MARKERS = ("<doc>", "</doc>", "<text>", "</text>", "<image>", "</image>")


# Without cuDNN's attention, which prepares a plan for each new shape. The keys grow by one per code, so that it would
# prepare a thousand, most of a minute, for each length of prompt; torch prefers it in bf16 on newer GPUs.
@sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
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
    window: int | Literal["auto"] = "auto",
) -> Tensor:
    """Sample one image per prompt: codes (B, K), int64.

    Guidance combines hidden states, with one product with the head per pair, unless the class caps its logits.

    Args:
        model: a causal LM; open_lm's allocates its KV cache once.
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
        window: codes per pass, all but the first of them guesses that the pass checks. The codes are those of window 1
            but where rounding decides. "auto" measures passes, and takes 1 where more do not pay; also for a compiled
            step, and for weights of 16 bits. A model whose decoder has no window is read by 1.

    Raises:
        ValueError: no prompt, a setting out of its range, or a compiled step of a model whose class has none or with a
            window.
    """
    if not len(prompts):
        raise ValueError("there is no caption to draw; expected at least one")
    if window != "auto" and (window < 1 or (is_compiled and window > 1)):
        raise ValueError(f"window is {window}; expected auto or a number >= 1, and 1 for a compiled step")
    form = ClassForm.of(model)
    how = Draws(image_ids, guidance_scale, temperature, top_k, top_p, mixes_logits=not form.is_linear)
    # After <image> come K codes and nothing else, so the text part of the LM head is never multiplied with.
    head, bias = form.head_of(model, image_ids)  # (codebook, D), (codebook,)
    if is_compiled and not form.is_plain(bias):
        raise ValueError(
            f"{type(model).__name__} scales, caps or shifts its logits, which is not compiled here"
        )
    pace = 1 if is_compiled else pace_of(window, model=model, num_images=len(prompts), how=how)
    keys = image_keys(torch.tensor(seeds, device=model.device), num_codes=num_codes)  # (B, K)
    # Asked by method, not by class, so that an export's class, loaded by remote code, is decoded the fast way too.
    begin = getattr(model, "begin_decoding", None) or functools.partial(begin_any, model)
    empty = empty_prompt if how.is_guided else None
    hidden, decoder = begin(prompts, empty_prompt=empty, num_codes=num_codes, is_fixed=is_compiled)
    multiply = product(head, num_rows=len(hidden) if how.mixes_logits else len(prompts))
    to_logits = form.logits_after(multiply, bias=bias)
    # The first code is sampled from the prompts' hidden states, so K codes take at most K - 1 passes.
    codes = [next_codes(hidden, keys[:, 0], to_logits=to_logits, how=how)]
    on_code(codes)
    if pace != 1 and isinstance(decoder, WindowDecoder):
        sample_by_window(codes, decoder, keys, to_logits=to_logits, how=how, pace=pace, on_code=on_code)
    step = _compiled_step(decoder, head, how) if is_compiled else _step(decoder, to_logits, how)
    for of_code in keys.T.contiguous()[len(codes) :]:
        codes.append(step(codes[-1], of_code).clone())  # a CUDA graph writes into the same memory
        on_code(codes)
    return torch.stack(codes, dim=1)


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
    window: int | Literal["auto"] = "auto",
) -> list[Any]:
    """Sample one PIL image per caption; caption i uses seed + i.

    Args:
        model: a causal LM whose config.json has vocab_layout and codes_per_image.
        captions: several, or one as a text.
        tokenizer: the text tokenizer of the model's folder.
        image_tokenizer: the diffusers VQModel of its image_tokenizer folder.
        window: codes per pass, which change the time only; sample_codes says more.

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
        window=window,
    )
    pixels = codes_to_pixels(image_tokenizer, codes)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


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
    texts = [caption_ids(text, tokenizer) for text in captions]
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


def caption_ids(text: str, tokenizer: Any) -> list[int]:
    """Encode a caption without special tokens, even if it spells one: then it is text, as in training."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # An unknown character is text, and so is its token, unless it also ends documents.
    unknown = None if tokenizer.unk_token == tokenizer.eos_token else tokenizer.unk_token
    added = tokenizer.added_tokens_decoder.items()
    special = {number: one.content for number, one in added if one.special and one.content != unknown}
    if special.keys().isdisjoint(ids):
        return ids
    # Unigram models hold special tokens as words too, and find them in a text. Cut in two, they do not.
    model = tokenizer.backend_tokenizer.model
    halves = {number: (token[:1], token[1:]) for number, token in special.items()}
    spelled = {
        number: [one.id for half in both for one in model.tokenize(half)] for number, both in halves.items()
    }
    return [own for number in ids for own in spelled.get(number, [number])]


def prompt_ids(text_ids: Sequence[int], *, num_text_rows: int, mode: str = "text-to-image") -> list[int]:
    """Return the ids of `<doc> <text> caption </text> <image>`, without the text for an image-only model.

    Raises:
        ValueError: the model was trained on text only.
    """
    doc, _, text, end_text, image, _ = range(num_text_rows, num_text_rows + len(MARKERS))
    if mode == "text-only":
        raise ValueError("this model was trained on text only; it samples no images")
    if mode == "image-only":
        return [doc, image]
    return [doc, text, *text_ids, end_text, image]


@torch.inference_mode()
def codes_to_pixels(image_tokenizer: Any, codes: Tensor) -> Tensor:
    """Decode codes (B, K) of square images to uint8 pixels (B, 3, H, W)."""
    side = round(codes.shape[1] ** 0.5)
    shape = (len(codes), side, side, image_tokenizer.quantize.vq_embed_dim)
    # force_not_quantize: these are codes already, and VQModel would look up the nearest codebook entry of each.
    flat = codes.flatten().to(image_tokenizer.device)
    pixels = image_tokenizer.decode(flat, force_not_quantize=True, shape=shape).sample
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
