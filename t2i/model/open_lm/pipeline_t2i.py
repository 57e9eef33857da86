"""diffusers' pipeline of an exported folder: prompts to images, by the sampler that is stored with the model.

This file is uploaded with exported models, so it imports only torch, transformers and diffusers. diffusers copies the
file alone, so it imports no file beside it either.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput, VQModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_SEED = 2**63 - 1
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class _Interrupted(Exception):  # no error: a callback asked for an end
    """Carry the codes (B, k) of images that will not be finished."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.codes = codes


class T2IPipeline(DiffusionPipeline):
    """Draw images from prompts, code after code in raster order."""

    model_cpu_offload_seq = "language_model->image_tokenizer"
    _callback_tensor_inputs = ["codes"]  # noqa: RUF012 - diffusers' own way

    def __init__(
        self,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_tokenizer: VQModel,
    ) -> None:
        super().__init__()
        self.register_modules(
            language_model=language_model, tokenizer=tokenizer, image_tokenizer=image_tokenizer
        )
        self._interrupt = False

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_scale: float = 2.0,
        temperature: float = 0.9,
        top_k: int = 50,
        top_p: float = 1.0,
        window: int | str = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Tensor]], object] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw num_images_per_prompt images of each prompt, those of one prompt beside each other.

        Args:
            generator: a new generator of seed N gives image i the seed N + i, as `t2i sample --seed N` does. One that
                was used before gives new images. A list has one for each image. None: torch's own generator.
            guidance_scale: 1 for none; useful are 1.5 to 4.
            temperature: 0 for the most likely code.
            top_k: keep this many codes; 0 for all.
            top_p: of those, keep the most likely that together reach this probability.
            window: codes per pass. "auto" takes more where the clock says that they are faster; where two codes are
                nearly tied, rounding may then decide otherwise from call to call.
            height: of an image, as it is; another size is an error. The same for `width`.
            num_inference_steps: one step per code, as it is; another number is an error.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent": codes (B, K).
            callback_on_step_end: called as callback(pipeline, step, step, {"codes": (B, step + 1)}) after each code.
                If it sets pipeline._interrupt, images are decoded as they are, with code 0 for the rest.

        Raises:
            ValueError: an argument that this model cannot draw by.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check_prompts(prompts, num_images_per_prompt=num_images_per_prompt, output_type=output_type)
        self._check_shape(height=height, width=width, num_inference_steps=num_inference_steps)
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name != "codes"]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}; expected codes alone"
            )
        captions = [text for text in prompts for _ in range(num_images_per_prompt)]
        bring(self.language_model)
        sampler, num_codes = sampler_of(self.language_model), self.language_model.config.codes_per_image
        self._interrupt = False
        with self.progress_bar(total=num_codes) as bar:

            def on_code(codes: list[Tensor]) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    so_far, step = torch.stack(codes, dim=1), len(codes) - 1
                    given = {name: so_far for name in callback_on_step_end_tensor_inputs}
                    callback_on_step_end(self, step, step, given)
                if self._interrupt and len(codes) < num_codes:
                    raise _Interrupted(torch.stack(codes, dim=1))

            try:
                codes = sampler.caption_codes(
                    self.language_model,
                    captions,
                    tokenizer=self.tokenizer,
                    seeds=seeds_of(generator, num_images=len(captions)),
                    guidance_scale=guidance_scale,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    window=window,
                    on_code=on_code,
                )  # (B, K)
            except _Interrupted as interrupted:
                codes = F.pad(interrupted.codes, (0, num_codes - interrupted.codes.shape[1]))
        images = self._decoded(codes, output_type=output_type, sampler=sampler)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decoded(self, codes: Tensor, *, output_type: str, sampler: ModuleType) -> Any:
        """Decode codes (B, K) to what was asked for."""
        if output_type == "latent":
            return codes
        bring(self.image_tokenizer)
        pixels = sampler.codes_to_pixels(self.image_tokenizer, codes)  # (B, 3, H, W), uint8
        if output_type == "pt":
            return pixels.float() / 255
        arrays = pixels.permute(0, 2, 3, 1).float().cpu().numpy() / 255  # (B, H, W, 3)
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)

    def _check_shape(self, **asked: int | None) -> None:
        num_codes = self.language_model.config.codes_per_image
        if num_codes is None:
            raise ValueError("this model has no image codes: its config.json has no codes_per_image")
        size = round(num_codes**0.5) * 2 ** (len(self.image_tokenizer.config.block_out_channels) - 1)
        own = {"height": size, "width": size, "num_inference_steps": num_codes}
        for name, value in asked.items():
            if value not in (None, own[name]):
                raise ValueError(
                    f"{name} is {value}; expected {own[name]}, or nothing: this model has no other"
                )

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Refuse: it moves weights where a part's forward is called, and the sampler reads them itself.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("expected enable_model_cpu_offload(), which moves whole models")

    def save_pretrained(self, save_directory: str, **settings: Any) -> None:
        """Refuse: diffusers would write a folder of another form, which nothing opens.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "copy the folder that this pipeline was opened from, or save its parts: language_model, tokenizer and"
            " image_tokenizer have a save_pretrained each"
        )


def bring(part: torch.nn.Module) -> None:
    """Have enable_model_cpu_offload's hook move a part to its device: the sampler calls other methods than forward."""
    hook = getattr(part, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(part)


def _check_prompts(prompts: list[str], *, num_images_per_prompt: int, output_type: str) -> None:
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt is {prompts!r:.200}; expected a text or several")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; expected a number >= 1")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}")


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None, *, num_images: int) -> list[int]:
    """Derive one seed per image from generators, and move each generator on.

    Raises:
        ValueError: as many generators as images were expected.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return _seeds(generator, num_images)
    if len(generator) != num_images:
        raise ValueError(
            f"generator has {len(generator)} generators; expected one for each of {num_images} images"
        )
    return [_seeds(each, 1)[0] for each in generator]


def _seeds(generator: torch.Generator | None, num_images: int) -> list[int]:
    is_new = generator is not None and torch.equal(
        generator.get_state(), generator.clone_state().manual_seed(generator.initial_seed()).get_state()
    )
    device = "cpu" if generator is None else generator.device
    # Drawn even where the seed itself is used: whoever draws twice by one generator expects two images.
    drawn = torch.randint(MOST_SEED, (num_images,), generator=generator, device=device).tolist()
    if generator is None or not is_new:
        return drawn
    return [(generator.initial_seed() + index) % (MOST_SEED + 1) for index in range(num_images)]


def sampler_of(model: PreTrainedModel) -> ModuleType:
    """Return the sampler's module: that of the model's own class, else of the package beside its weights.

    Raises:
        ValueError: there is neither.
    """
    draw = getattr(type(model), "draw", None) or _draw_beside(Path(str(model.name_or_path)))
    return sys.modules[draw.__module__]


def _draw_beside(folder: Path) -> Any:
    """Import `draw` from a model's folder: a package, or in older exports a file."""
    places = (folder / "draw" / "__init__.py", folder / "draw.py")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no sampler; expected {places[0]}")
    # By a name of its own: folders of several models, each with a `draw`, may be open at once.
    name = f"draw_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].draw
