"""docs/backbones.md, made from what tests/backbones/table.py found."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "backbones.md"
RESULTS = ("transformers_4.json", "transformers_5.json")
PASSES = "passes"
PEOPLE_USE = {
    "Llama 3": "llama", "Qwen2.5": "qwen2", "Qwen3": "qwen3", "Qwen3 MoE": "qwen3_moe", "Gemma 2": "gemma2",
    "Gemma 3 (1B)": "gemma3_text", "Gemma 3 (4B and larger)": "gemma3", "Mistral": "mistral", "Mixtral": "mixtral",
    "OLMo 2": "olmo2", "SmolLM3": "smollm3", "Phi-2": "phi", "Phi-3": "phi3", "Pythia": "gpt_neox", "Falcon": "falcon",
    "GPT-2": "gpt2", "Granite 3": "granite", "DeepSeek-V3": "deepseek_v3", "Command R": "cohere", "Mamba": "mamba",
}  # fmt: skip
"""Names of models that people use, and their model_type."""
HEAD = """# Language models

Any causal language model that transformers can load may be `--model.init`. No list of names decides: before the first
step the model itself is asked, on a few ids.

- **How its logits follow from hidden states.** The loss never holds the logits of a whole batch, so it multiplies with
  the LM head itself. What the head is given and what becomes of its product are compared with the class's own logits,
  small ones and ones of 100. A bias, a scale (Granite, Cohere) and a cap (Gemma 2) are found by value, as numbers of
  `config.json`, and repeated exactly. Logits that follow in another way are refused.
- **How it continues a prompt.** Hidden states of padded prompts with a KV cache are compared with those of whole
  sequences. A class that takes no padding is read without it. A class whose cache cannot be continued, such as
  Mamba's in transformers 4, is drawn from whole sequences, which is exact and slow. A class that sees later ids is
  refused.
- **Whether text stays.** Once its vocabulary is grown, its text logits are those from before, or it is refused.

What differs from most classes is written into `config.json` as `class_form`, where the sampler reads it. Logits with a
cap are mixed after it in guidance, and not hidden states, which would give other logits.

## What was tried

`make backbones-table` makes a tiny randomly initialised model of every class that the installed transformers maps to a
causal language model. Each is grown by image codes, trained for 2 steps, resumed for a third, exported, loaded and
drawn from twice: the export must draw the same codes. Each class runs in a process of its own, in fp32 on a processor.
Real weights of these classes were not tried, but for SmolLM2's (Llama's class).

"""
TAIL = """
- **passes**: all of that.
- **refused**: a sentence before the first step says why.
- **fails**: an error of the class or of t2i in a later step.
- **not made**: transformers could not make a tiny model of the class here, so nothing is known of it.
- *form* is what differs from most classes; *image weights* are the kinds of `model.image_weights` that it takes.

`lora` is not in the table: it needs matrices that are `nn.Linear` or GPT-2's `Conv1D`.
"""


def results_file(version: str) -> Path:
    """Name the file of a transformers release's results: one for each major release."""
    return HERE / f"transformers_{version.split('.')[0]}.json"


def read_results() -> list[dict[str, Any]]:
    """Read the results of each major release."""
    return [json.loads((HERE / name).read_text()) for name in RESULTS if (HERE / name).exists()]


def write_page() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """Make the page's text."""
    found = read_results()
    return HEAD + _counts(found) + TAIL + _people(found) + "".join(map(_all, found))


def _counts(found: list[dict[str, Any]]) -> str:
    lines = [
        "| transformers | mapped | tried | pass | refused | fail | not made |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        results = [row["result"] for row in one["rows"].values()]
        counts = [results.count(result) for result in (PASSES, "refused", "fails", "not made")]
        share = f"{counts[0]} ({counts[0] / len(results):.0%})"
        cells = [one["transformers"], one["mapped"], len(results), share, *counts[1:]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _people(found: list[dict[str, Any]]) -> str:
    versions, oldest = [f"transformers {one['transformers']}" for one in found], found[0]["transformers"]
    lines = [
        "",
        "## Classes that people use",
        "",
        f"| model | class | {' | '.join(versions)} | form ({oldest}) | image weights ({oldest}) |",
    ]
    lines.append("|---" * (len(versions) + 4) + "|")
    for name, model_type in PEOPLE_USE.items():
        rows = [one["rows"].get(model_type, {}) for one in found]
        results = [row.get("result", "not there") for row in rows]
        first = rows[0]
        cells = [
            name,
            f"`{first.get('kind', '')}`",
            *results,
            first.get("form", ""),
            first.get("image_weights", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _all(one: dict[str, Any]) -> str:
    lines = ["", f"## All classes of transformers {one['transformers']}", ""]
    lines += ["| model_type | class | result | form, or reason | image weights |", "|---|---|---|---|---|"]
    for model_type, row in one["rows"].items():
        result = row["result"] if row["result"] in (PASSES, "refused") else f"{row['result']} ({row['step']})"
        note = row["form"] if row["result"] == PASSES else _cell(row["reason"])
        lines.append(f"| `{model_type}` | `{row['kind']}` | {result} | {note} | {row['image_weights']} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Make a reason fit a cell of a table."""
    for sign, plain in (("|", "/"), ("<", "&lt;"), ("*", "\\*"), ("`", "'"), ("[", "\\["), ("_", "\\_")):
        text = text.replace(sign, plain)
    return text[:220]
