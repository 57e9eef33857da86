"""What `window.py --exact` does: compare the codes of windows with those of one code per pass."""

from dataclasses import dataclass

import torch
from guesses import counting
from torch import Tensor

from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.race_open_lm import Draws, guided_logits, image_keys, kept_codes, waits
from t2i.model.open_lm.sampling_open_lm import sample_codes

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE_IDS, EMPTY, NUM_CODES = range(64, 128), [1, 2], 256
HOW = Draws(IMAGE_IDS, guidance_scale=2.0, temperature=0.9, top_k=20, top_p=1.0)
BATCH, WINDOW = 250, 4


def random_model(sizes: dict[str, int], *, image_ids: range, dtype: torch.dtype) -> OpenLMForCausalLM:
    """Build a randomly initialised model, with weights large enough that codes depend on what was read."""
    torch.manual_seed(0)
    model = OpenLMForCausalLM(OpenLMConfig(vocab_size=image_ids.stop, **sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    return model.to(dtype)


@torch.inference_mode()
def compare(num_images: int, *, dtype: torch.dtype) -> dict[str, object]:
    """Draw images by one code per pass and by windows; count the codes compared and those that differ.

    An image is compared up to its first code that differs, for then the rest is another image's. How narrowly that
    code was decided is measured in `dtype` and in float64: if rounding alone moves the margin by as much as it is, or
    to another winner, no way of computing in `dtype` decides this code for sure.
    """
    model, wide = (random_model(TINY, image_ids=IMAGE_IDS, dtype=kind) for kind in (dtype, torch.float64))
    compared, pairs, passes = 0, [], 0
    for first in range(0, num_images, BATCH):
        seeds = range(first, min(first + BATCH, num_images))
        prompts = [[3 + seed % 50] * (1 + seed % 7) for seed in seeds]
        settings = {
            "empty_prompt": EMPTY,
            "image_ids": IMAGE_IDS,
            "num_codes": NUM_CODES,
            "seeds": seeds,
            "guidance_scale": HOW.guidance_scale,
            "temperature": HOW.temperature,
            "top_k": HOW.top_k,
        }
        one = sample_codes(model, prompts, window=1, **settings)
        with counting() as rows:
            several = sample_codes(model, prompts, window=WINDOW, **settings)
        passes += sum(rows) // 2
        is_equal = (one == several).long().cumprod(1).sum(1)  # codes before the first that differs
        compared += int((is_equal + 1).clamp(max=NUM_CODES).sum())
        for index in (is_equal < NUM_CODES).nonzero()[:, 0].tolist():
            known = one[index, : is_equal[index]]
            found, truth = (decided(kind, prompts[index], known, seed=seeds[index]) for kind in (model, wide))
            pairs.append((found, truth))
    num_below = sum(found.is_below_rounding(truth) for found, truth in pairs)
    return {
        "images": num_images,
        "codes compared": compared,
        "codes that differ": len(pairs),
        "largest margin of those": max((found.margin for found, _ in pairs), default=0.0),
        "margins below their own rounding": f"{num_below} of {len(pairs)}",
        "margins there and in float64": [(found.margin, truth.margin) for found, truth in pairs],
        "passes per image": passes / num_images,
    }


@dataclass(frozen=True)
class Decision:
    """Which code won a place, and how narrowly."""

    winner: int
    margin: float
    """In the logarithm: of the race, or of the last place within top-k where that is less."""

    def is_below_rounding(self, truth: "Decision") -> bool:
        """Tell whether rounding moves what decides by at least the margin; `truth` is computed in float64."""
        return self.winner != truth.winner or abs(self.margin - truth.margin) >= self.margin


def decided(model: OpenLMForCausalLM, prompt: list[int], known: Tensor, *, seed: int) -> Decision:
    """Decide the code after `known`."""
    states = [
        model.model(torch.tensor([[*start, *(known + IMAGE_IDS.start).tolist()]])).last_hidden_state[:, -1]
        for start in (prompt, EMPTY)
    ]
    head = model.output.weight[IMAGE_IDS.start : IMAGE_IDS.stop]
    logits = guided_logits(torch.cat(states), to_logits=lambda rows: rows @ head.T, how=HOW)
    probabilities, codes = kept_codes(logits, temperature=HOW.temperature, top_k=HOW.top_k, top_p=HOW.top_p)
    keys = image_keys(torch.tensor([seed]), num_codes=NUM_CODES)[:, len(known)]
    best = (probabilities.log() - waits(keys, codes).log()).topk(2)
    edge = (logits / HOW.temperature).topk(HOW.top_k + 1).values[0]
    race, last = best.values[0, 0] - best.values[0, 1], edge[-2] - edge[-1]
    return Decision(int(codes[0, best.indices[0, 0]]), min(race.item(), last.item()))
