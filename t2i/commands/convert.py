"""Convert released weights to folders that t2i uses, or a language model back to open_lm's format.

Examples:
  python launchers/convert.py open-lm --checkpoint open_lm_1b.pt --config open_lm_1b_old --out models/open_lm_1b
  python launchers/convert.py open-lm --checkpoint epoch_9.pt --config mine.json params.txt --out models/mine
  python launchers/convert.py gguf --checkpoint SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2
  python launchers/convert.py movqgan --checkpoint movqgan_270M.ckpt --out tokenizers/movqgan_270m
  python launchers/convert.py llamagen --checkpoint vq_ds16_c2i.pt --out tokenizers/llamagen_16
  python launchers/convert.py open-lm-back models/open_lm_1b --out back

Each conversion but open-lm-back checks what the new folder computes against the checkpoint itself before the folder
appears.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from t2i.cli import Ckpt, parse


@dataclass(frozen=True)
class OpenLm:
    """An open_lm language model -> a folder for --model.init."""

    checkpoint: Path
    """open_lm's .pt or .safetensors file, or a Hugging Face folder that open_lm wrote."""
    out: Path
    """New folder."""
    config: tuple[str, ...] = ()
    """open_lm's name of the model's config, or its JSON; and the run's params.txt, where some settings were flags. Not
    needed for a folder or a known release."""
    positions: Literal["rotary", "head_rotary", "none"] | None = None
    """How positions are encoded, where neither config nor params.txt says it."""
    text_tokenizer: str | None = None
    """Folder with tokenizer.json, or a hub name. Default: the folder's own, else hf:EleutherAI/gpt-neox-20b."""


@dataclass(frozen=True)
class Gguf:
    """llama.cpp's GGUF file of a llama, qwen2 or qwen3 model -> a folder for --model.init."""

    checkpoint: Path
    """The .gguf file, quantised or not."""
    out: Path
    """New folder."""
    end_token: str | None = None
    """Token that ends a document, such as <|endoftext|>. Default: the file's end token, which of a chat model ends a
    turn."""
    text_tokenizer: str | None = None
    """Folder with tokenizer.json, or a hub name. Default: made from the file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the folder's weights. --model.image-weights needs that of training; bfloat16 rounds fp32 weights."""


@dataclass(frozen=True)
class Movqgan:
    """SBER-MoVQGAN (67M, 102M, 270M, read from the shapes) -> a diffusers VQModel folder."""

    checkpoint: Path
    """The released .ckpt, or a training one."""
    out: Path
    """New folder."""


@dataclass(frozen=True)
class Llamagen:
    """LlamaGen's VQ-16 or VQ-8 -> a diffusers VQModel folder."""

    checkpoint: Path
    """The released .pt, or a training one."""
    out: Path
    """New folder."""


@dataclass(frozen=True)
class OpenLmBack:
    """A CKPT's language model -> open_lm's state dict and json, bit for bit."""

    ckpt: Ckpt
    """A converted folder, a run folder, a checkpoint, an exported folder or a hub name (hf:USER/NAME)."""
    out: Path
    """New folder of open_lm.pt and open_lm.json."""


def main() -> None:
    kinds = OpenLm | Gguf | Movqgan | Llamagen | OpenLmBack
    command: OpenLm | Gguf | Movqgan | Llamagen | OpenLmBack
    command = parse(kinds, description=__doc__ or "", has_run_file=False)  # type: ignore[arg-type]
    from t2i.convert.convert import convert_back, convert_open_lm, convert_vq
    from t2i.convert.gguf import convert_gguf
    from t2i.convert.vq import LLAMAGEN, MOVQGAN

    if isinstance(command, OpenLmBack):
        convert_back(command.ckpt, out=command.out)
        print(f"{command.out}: open_lm.pt and open_lm.json.")
        return
    if isinstance(command, OpenLm):
        convert_open_lm(
            command.checkpoint,
            config_names=command.config,
            text_tokenizer=command.text_tokenizer,
            out=command.out,
            tell=print,
            positions=command.positions,
        )
    elif isinstance(command, Gguf):
        convert_gguf(
            command.checkpoint,
            end_token=command.end_token,
            text_tokenizer=command.text_tokenizer,
            dtype=command.dtype,
            out=command.out,
            tell=print,
        )
    else:
        layout = MOVQGAN if isinstance(command, Movqgan) else LLAMAGEN
        convert_vq(command.checkpoint, layout=layout, out=command.out, tell=print)
    flag = "--model.init" if isinstance(command, OpenLm | Gguf) else "--image-tokenizer"
    print(f"{command.out} is ready for {flag}.")
