"""Batches of one shape, so that an image does not depend on what is drawn beside it."""

import io
from collections.abc import Callable, Sequence

from PIL.PngImagePlugin import PngInfo

from t2i.config import SamplerConfig
from t2i.generate.sample import decode_images
from t2i.model.backbone import trained_seq_len
from t2i.model.open_lm.sampling_open_lm import caption_codes
from t2i.runs.loading import OpenedModel
from t2i.serve.waiting import Asked
from t2i.tokens.sequence import caption_room


def room_of(opened: OpenedModel) -> int:
    """Count the tokens of a caption that a sequence had room for in training."""
    config = opened.model.config
    seq_len, num_codes = trained_seq_len(opened.model), config.codes_per_image
    return caption_room(mode=config.sequence_mode, seq_len=seq_len, num_codes=num_codes)


def cut_caption(opened: OpenedModel, caption: str) -> str:
    """Cut a caption to what the model reads of it."""
    ids = opened.text_tokenizer.encode(caption)
    return caption if len(ids) <= room_of(opened) else opened.text_tokenizer.decode(ids[: room_of(opened)])


def batch_drawer(
    opened: OpenedModel, *, sampler: SamplerConfig, batch_size: int
) -> Callable[[Sequence[Asked]], list[bytes]]:
    """Make the function that draws up to batch_size images to PNG files.

    Rounding depends on the shape of a batch, and where two codes are nearly tied, rounding decides. So every batch has
    one shape: it is filled up to batch_size, and two more captions keep the other sizes the same. The longest fixes the
    length of all prompts; the empty one sees to it that there is always padding, hence always a mask.
    """
    longest = "a "
    while len(opened.text_tokenizer.encode(longest)) < room_of(opened):
        longest *= 2
    fixed = [longest, ""]

    def draw(images: Sequence[Asked]) -> list[bytes]:
        missing = batch_size - len(images)
        codes = caption_codes(
            opened.model,
            [image.caption for image in images] + [""] * missing + fixed,
            tokenizer=opened.text_tokenizer.tokenizer,
            seeds=[image.seed for image in images] + [0] * (missing + len(fixed)),
            guidance_scale=sampler.guidance_scale,
            temperature=sampler.temperature,
            top_k=sampler.top_k,
            top_p=sampler.top_p,
            # Windows would let the other images of a batch decide how this one's products are rounded.
            window=1,
        )  # (batch_size + 2, K)
        drawn = decode_images(opened.needed_image_tokenizer(), codes[:batch_size])
        settings = {**vars(sampler), "weights": opened.weights}
        files = []
        for image, pixels in zip(images, drawn, strict=False):
            metadata = PngInfo()
            for key, value in {"caption": image.caption, "seed": image.seed, **settings}.items():
                metadata.add_text(key, str(value))
            file = io.BytesIO()
            pixels.save(file, format="PNG", pnginfo=metadata)
            files.append(file.getvalue())
        return files

    return draw
