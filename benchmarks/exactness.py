"""What `window.py --exact` does: compare the codes of windows with those of one code per pass."""

import torch
from guesses import counting
from torch import Tensor

from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.race_open_lm import Draws, guided_logits, image_keys, kept_codes, waits
from t2i.model.open_lm.sampling_open_lm import sample_codes

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE_IDS, EMPTY, NUM_CODES = range(64, 128), [1, 2], 256
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
def compare(num_images: int, *, dtype: torch.dtype) -> dict[str, float]:
    """Draw images by one code per pass and by windows; count the codes compared and those that differ.

    An image is compared up to its first code that differs, for then the rest is another image's. Of that code the
    margin is measured: by how much, in the logarithm, its race or the last place within top-k was decided.
    """
    model = random_model(TINY, image_ids=IMAGE_IDS, dtype=dtype)
    how = {"guidance_scale": 2.0, "temperature": 0.9, "top_k": 20}
    compared, margins, passes = 0, [], 0
    for first in range(0, num_images, BATCH):
        seeds = range(first, min(first + BATCH, num_images))
        prompts = [[3 + seed % 50] * (1 + seed % 7) for seed in seeds]
        settings = {
            "empty_prompt": EMPTY,
            "image_ids": IMAGE_IDS,
            "num_codes": NUM_CODES,
            "seeds": seeds,
            **how,
        }
        one = sample_codes(model, prompts, window=1, **settings)
        with counting() as rows:
            several = sample_codes(model, prompts, window=WINDOW, **settings)
        passes += sum(rows) // 2
        is_equal = (one == several).long().cumprod(1).sum(1)  # codes before the first that differs
        compared += int((is_equal + 1).clamp(max=NUM_CODES).sum())
        for index in (is_equal < NUM_CODES).nonzero()[:, 0].tolist():
            known = one[index, : is_equal[index]]
            margins.append(margin(model, prompts[index], known, seed=seeds[index], **how))
    return {
        "images": num_images,
        "codes compared": compared,
        "codes that differ": len(margins),
        "largest margin of those": max(margins, default=0.0),
        "passes per image": passes / num_images,
    }


def margin(
    model: OpenLMForCausalLM,
    prompt: list[int],
    known: Tensor,
    *,
    seed: int,
    guidance_scale: float,
    temperature: float,
    top_k: int,
) -> float:
    """Return by how much the code after `known` is decided, in the logarithm."""
    states = [
        model.model(torch.tensor([[*start, *(known + IMAGE_IDS.start).tolist()]])).last_hidden_state[:, -1]
        for start in (prompt, EMPTY)
    ]
    how = Draws(IMAGE_IDS, guidance_scale, temperature, top_k, 1.0)
    head = model.output.weight[IMAGE_IDS.start : IMAGE_IDS.stop]
    logits = guided_logits(torch.cat(states), to_logits=lambda rows: rows @ head.T, how=how)
    probabilities, codes = kept_codes(logits, temperature=temperature, top_k=top_k, top_p=1.0)
    keys = image_keys(torch.tensor([seed]), num_codes=NUM_CODES)[:, len(known)]
    best = (probabilities.log() - waits(keys, codes).log()).topk(2).values[0]
    edge = (logits / temperature).topk(top_k + 1).values[0]
    return min((best[0] - best[1]).item(), (edge[-2] - edge[-1]).item())
