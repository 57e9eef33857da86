"""A GGUF file, llama.cpp's format of quantised language models: its metadata, checked, and its weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from t2i.errors import CheckpointError, UserError
from t2i.model.foreign_folder import refuse_adapters

if TYPE_CHECKING:
    from gguf import GGUFReader

PAIRS_NEIGHBOURS = {"llama": True, "qwen2": False, "qwen3": False}
"""Architectures that the proof knows, and how their files keep the pairs that positions turn."""
PARTS = r"(?:attn_(?:q|k|v|output)|ffn_(?:gate|up|down))\.(?:weight|bias)"
NORMS = r"(?:attn|ffn|attn_q|attn_k)_norm\.weight"
TENSOR = re.compile(rf"(?:token_embd|output_norm|output)\.weight|blk\.(\d+)\.(?:{PARTS}|{NORMS})")
"""Names of the tensors of these architectures; others, such as a mixture's experts, would be left out of the folder."""
GgufConfig: Any = getattr(transformers, "GgufConfig", None)
"""How transformers 5 reads quantised weights; there is none before."""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's metadata, read and checked, and its tensors, not read yet."""

    path: Path
    reader: "GGUFReader"
    values: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """The model's class, such as llama."""
        return str(self.values.get("general.architecture"))

    def of_model(self, key: str) -> Any:
        """Return a value of the architecture's own; CheckpointError if the file lacks it."""
        return self._needed(f"{self.architecture}.{key}")

    def of_tokenizer(self, key: str) -> Any:
        """Return a value of the text tokenizer; CheckpointError if the file lacks it."""
        return self._needed(f"tokenizer.ggml.{key}")

    def _needed(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.path} has no {name}, which a {self.architecture} model needs.")
        return self.values[name]


def open_gguf(path: Path) -> GgufFile:
    """Read a file's metadata.

    Raises:
        UserError: the extra is not installed, there is no such file, or its architecture is not supported.
        CheckpointError: it is no GGUF file, or is broken.
    """
    try:
        # Here, because it is an extra.
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "reading GGUF files needs the package gguf: install t2i with its extra, t2i[gguf]."
        ) from error
    if not path.is_file():
        raise UserError(f"--checkpoint {path} is no file; expected a .gguf file.")
    try:
        reader = GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    # Its reader has no errors of its own: whatever a broken header leads to.
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise CheckpointError(f"{path} is no GGUF file, or is broken: {error}.") from error
    file = GgufFile(path, reader, values)
    if file.architecture not in PAIRS_NEIGHBOURS:
        known = ", ".join(PAIRS_NEIGHBOURS)
        raise UserError(f"{path} holds a model of class {file.architecture}; expected one of {known}.")
    scaling = values.get(f"{file.architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        # transformers' reader leaves them out, so that the model would be another beyond its first positions.
        raise UserError(f"{path} scales its rotary positions; expected a model without such scaling.")
    _check_tensors(file)
    num_tokens = len(file.of_tokenizer("tokens"))
    num_rows = next((int(one.shape[-1]) for one in reader.tensors if one.name == "token_embd.weight"), 0)
    if num_rows != num_tokens:  # transformers' reader makes as many embeddings as there are tokens
        raise UserError(f"{path} lists {num_tokens} tokens and has {num_rows} embeddings; expected as many.")
    return file


def _check_tensors(file: GgufFile) -> None:
    """Check that the file has tensors of these architectures alone, in as many blocks as it states.

    Raises:
        UserError: a tensor is unknown.
        CheckpointError: there are more or fewer blocks.
    """
    blocks = set()
    for tensor in file.reader.tensors:
        if (found := TENSOR.fullmatch(tensor.name)) is None:
            raise UserError(
                f"{file.path} has a tensor {tensor.name}, which no plain {file.architecture} model has."
            )
        blocks |= {int(found[1])} if found[1] else set()
    stated = file.of_model("block_count")
    # Read as they are stated, layers beyond would be left out, by the reference too.
    if stated != len(blocks) or blocks != set(range(len(blocks))):
        raise CheckpointError(
            f"{file.path} states {stated} blocks and has tensors of {len(blocks)}; expected as many."
        )


def load_weights(file: GgufFile) -> PreTrainedModel:
    """Load a file's weights with transformers' reader, dequantised to fp32.

    Raises:
        UserError: a quantisation that the package gguf cannot undo.
        CheckpointError: tensors are missing or broken.
    """
    # transformers looks at what else lies there: adapters, and code for generate() unless its settings are given.
    refuse_adapters(file.path.parent)
    # transformers 5 would leave the weights quantised where it has products for that.
    options = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.path.parent,
            gguf_file=file.path.name,
            dtype=torch.float32,
            trust_remote_code=False,
            generation_config=GenerationConfig(),
            **options,
        )
    except NotImplementedError as error:
        kinds = ", ".join(sorted({tensor.tensor_type.name for tensor in file.reader.tensors}))
        raise UserError(
            f"{file.path} is quantised as {kinds}, which cannot be undone here: {error}"
        ) from error
    except (ValueError, KeyError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{file.path} cannot be read as {file.architecture}: {error}") from error
    return cast(PreTrainedModel, model)


def read_tensors(file: GgufFile) -> dict[str, Tensor]:
    """Read the weights by GGUF's own names, dequantised to fp32, with the package gguf."""
    from gguf import dequantize

    return {
        tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type)).float()
        for tensor in file.reader.tensors
    }
