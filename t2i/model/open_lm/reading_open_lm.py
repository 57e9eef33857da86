"""Prompts read with a model's own forward and KV cache, and the decoder that continues from there.

Whether the fast decoder equals a class's own decoding is not assumed. It is tried once per model. A class that needs
another cache (a sliding window, a state, a convolution) continues as it does by itself.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

B captions, R = 2 B rows with guidance (conditional, then unconditional), P positions of the longest prompt, K codes per
image, T positions so far, D width.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .class_reading_open_lm import UnpaddedDecoder, body_of, reader_of
from .decoding_any_open_lm import FixedRowDecoder, Memory, RowDecoder, allocated, cache_name
from .fixed_shape_open_lm import kept_decoder
from .forms_open_lm import PADDED, ClassForm

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Maximum difference of hidden states, relative to the largest, by which a class's fast decoding counts as equal."""
LOW_PRECISION_TOLERANCE = 0.1
UNSERVED = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError)
"""What classes raise if they take no mask of four dimensions, or no cache but their own."""
Began = tuple[Tensor, RowDecoder | FixedRowDecoder]


class PlainDecoder:
    """Continue from the ids read so far, with the model's own forward and KV cache."""

    def __init__(self, model: PreTrainedModel, mask: Tensor) -> None:
        self.body, self.mask = reader_of(model), mask  # (R, T)
        self.cache_name = cache_name(self.body)
        # Counted from each row's first real id, as in training, where prompts are not padded on the left.
        self.positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (R, T)
        # None: the model makes its own. Layers with a sliding window or a convolution need other caches than the rest.
        self.cache: Any = None
        self.length = 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Read ids (R, S), or (R,) for one more per row, and return the last hidden states (R, D)."""
        ids = ids.view(len(self.mask), -1)
        past, self.length = self.length, self.length + ids.shape[1]
        outputs = self.body(
            ids,
            attention_mask=self.mask[:, : self.length],
            position_ids=self.positions[:, past : self.length].contiguous(),  # XGLM takes no view
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        self.cache = outputs.past_key_values
        return outputs.last_hidden_state[:, -1]


def begin_any(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    empty_prompt: Sequence[int] | None,
    num_codes: int,
    is_fixed: bool = False,
) -> tuple[Tensor, RowDecoder | FixedRowDecoder | PlainDecoder | UnpaddedDecoder]:
    """Read the prompts as begin_decoding does, with a model of one of transformers' own classes.

    Raises:
        ValueError: is_fixed, and the step of this class cannot be compiled.
    """
    begun = None
    form = ClassForm.of(model)
    if form.reading == PADDED and (compiles(model) if is_fixed else is_served(model)):
        begun = begin_rows(model, prompts, empty_prompt=empty_prompt, num_codes=num_codes, is_fixed=is_fixed)
    if begun is None and is_fixed:
        raise ValueError(
            f"the step of {type(model).__name__} cannot be compiled as a whole with a KV cache of fixed shape;"
            " expected a class such as Llama's, Qwen2's or Qwen3's, or is_compiled=False"
        )
    if form.reading != PADDED:
        unpadded = UnpaddedDecoder(
            model, [*prompts, *([empty_prompt] * len(prompts) if empty_prompt else [])]
        )
        return unpadded.begin(), unpadded
    return begun or begin_plain(model, prompts, empty_prompt=empty_prompt, num_codes=num_codes)


def begin_rows(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    empty_prompt: Sequence[int] | None,
    num_codes: int,
    is_fixed: bool = False,
) -> Began | None:
    """Read the prompts, and continue with a decoder of rows; None if a layer's cache would not hold all positions."""
    batch, empty = len(prompts), list(empty_prompt or [])
    hidden, own = read_rows(model, prompts)
    caches = [own.cache]
    if empty:
        # The null prompt is the same in every row: it is read once, and its keys and values are copied to all.
        last, single = read_rows(model, [empty])
        hidden = torch.cat([hidden, last.expand(batch, -1)])
        caches.append(single.cache)
    lengths = [*map(len, prompts), *([len(empty)] * batch if empty else [])]
    longest, num_rows = max(lengths), len(lengths)
    if not all(holds_all(cache, longest + num_codes) for cache in caches):
        return None
    read = [[(layer.keys, layer.values) for layer in cache.layers] for cache in caches]
    if is_fixed:
        fixed = _kept_decoder(model, read[0], num_rows=num_rows, least_positions=longest + num_codes)
        longest = fixed.memory[0][0].shape[2] - num_codes  # prompts end where the decoder's own positions do
    memory: Memory = (
        fixed.memory
        if is_fixed
        else [
            (allocated(keys, num_rows, longest + num_codes), allocated(values, num_rows, longest + num_codes))
            for keys, values in read[0]
        ]
    )
    for index, layers in enumerate(read):
        rows = slice(index * batch, (index + 1) * batch)
        for pair, new in zip(memory, layers, strict=True):
            for into, part in zip(pair, new, strict=True):
                into[rows, :, longest - part.shape[2] : longest] = part
    padding = longest - torch.tensor(lengths, device=model.device)
    if is_fixed:
        return hidden, fixed.begin(length=longest, padding=padding)
    return hidden, RowDecoder(steps_body(model), memory, length=longest, padding=padding)


def _kept_decoder(
    model: PreTrainedModel, like: Memory, *, num_rows: int, least_positions: int
) -> FixedRowDecoder:
    """Return the model's only decoder of fixed shape; a new one if these rows and positions do not fit."""

    def fits(kept: FixedRowDecoder) -> bool:
        return kept.fits(like, num_rows=num_rows, least_positions=least_positions)

    def make(num_positions: int) -> FixedRowDecoder:
        return FixedRowDecoder(steps_body(model), like, num_rows=num_rows, num_positions=num_positions)

    return kept_decoder(model, fits, make, least_positions=least_positions)


def holds_all(cache: Any, num_positions: int) -> bool:
    """Tell whether a model's own cache is keys and values of so many positions in every layer, and nothing else."""
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(
        # A sliding window that is longer than all positions hides nothing.
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > num_positions)
        for layer in layers
    )


def steps_body(model: PreTrainedModel) -> Any:
    """Return the part of a causal LM that computes hidden states of image codes."""
    own = getattr(model, "image_body", None)
    return body_of(model) if own is None else own()


def compiles(model: PreTrainedModel) -> bool:
    """Tell whether a model's step can be compiled as a whole."""
    if hasattr(model, "begin_decoding"):
        return True
    # The class's own word for its forward; that it continues from a cache of fixed shape is tried.
    return bool(getattr(model, "_can_compile_fullgraph", False)) and is_served(model, is_fixed=True)


@torch.inference_mode()
def is_served(model: PreTrainedModel, *, is_fixed: bool = False) -> bool:
    """Tell whether a model's hidden states are the same by our decoder as by its own cache; tried once per model."""
    answers: dict[object, bool] = model.__dict__.setdefault("_served", {})
    key = (is_fixed, model.dtype, model.device.type, model.training)
    if key not in answers:
        # Ids of the end of the vocabulary, for these are the image codes.
        last = cast(Tensor, model.get_input_embeddings().weight).shape[0] - 1
        ids = last - torch.arange(14, device=model.device).view(2, 7) % (last + 1)
        settings: dict[str, Any] = {"empty_prompt": None, "num_codes": 3}
        try:
            # With a padded row, and without: then there is no mask.
            answers[key] = all(
                _is_equal(
                    begin_rows(model, prompts, **settings, is_fixed=is_fixed),
                    begin_plain(model, prompts, **settings),
                    ids=ids[:, 4:],
                )
                for prompts in ([ids[0, :4].tolist(), ids[1, start:4].tolist()] for start in (1, 0))
            )
        except UNSERVED:
            answers[key] = False
    return answers[key]


def _with_windows(decoder: FixedRowDecoder, windows: Iterator[int], ids: Tensor) -> Tensor:
    hidden: Tensor = decoder(ids, next(windows))
    return hidden


def _is_equal(begun: Began | None, other: tuple[Tensor, PlainDecoder], *, ids: Tensor) -> bool:
    if begun is None:
        return False
    hidden, decoder = begun
    other_hidden, plain = other
    step: Callable[[Tensor], Tensor] = decoder
    if isinstance(decoder, FixedRowDecoder):
        step = functools.partial(_with_windows, decoder, decoder.windows())
    found = torch.stack([hidden, *map(step, ids.T)])
    expected = torch.stack([other_hidden, *map(plain, ids.T)])  # (4, R, D), as found
    if isinstance(decoder, RowDecoder):
        # Several ids at once, from unequal positions, as windows are read.
        starts = decoder.length - ids.shape[1] + torch.arange(len(ids), device=ids.device)
        several = decoder.read(torch.stack([ids[0, :-1], ids[1, 1:]]), starts)  # (2, 2, D)
        found = torch.cat([found, several])
        expected = torch.cat([expected, torch.stack([expected[1:-1, 0], expected[2:, 1]])])
    tolerance = TOLERANCES.get(found.dtype, LOW_PRECISION_TOLERANCE)
    difference = (found - expected).float().abs().max().item()
    return difference <= tolerance * expected.float().abs().max().item()


def begin_plain(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    empty_prompt: Sequence[int] | None,
    num_codes: int,
) -> tuple[Tensor, PlainDecoder]:
    """Read the prompts as begin_decoding does, and continue with the model's own cache."""
    rows = [*prompts, *([empty_prompt] * len(prompts) if empty_prompt else [])]
    return read_rows(model, rows, num_codes=num_codes)


def read_rows(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], *, num_codes: int = 0
) -> tuple[Tensor, PlainDecoder]:
    """Read rows of any lengths: the last hidden states (R, D), and the decoder that continues for so many codes."""
    ids, mask = left_padded(rows, length=max(map(len, rows)), device=model.device)  # (R, P)
    # One mask for all later positions too: every code may be attended to by those after it.
    decoder = PlainDecoder(model, F.pad(mask.long(), (0, num_codes), value=1))
    return decoder(ids), decoder


def left_padded(
    rows: Sequence[Sequence[int]], *, length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Pad rows on the left to one length: ids and mask (B, length)."""
    # On the left, so that all prompts end at one position, from which all codes continue.
    # Any id will do as padding: the mask hides it.
    ids = [[row[0]] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
