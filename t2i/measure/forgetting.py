"""Forgetting: held-out text loss, probability that leaks to image codes, and completions."""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from t2i.config import Dtype
from t2i.data.shards.manifest import MANIFEST, check_text_tokenizer, read_manifest
from t2i.data.shards.reader import read_split, spread
from t2i.data.sources.documents import PREFIX, open_documents
from t2i.distributed.collectives import rank_and_size
from t2i.errors import DataError, UserError
from t2i.measure.perplexity import perplexity_of
from t2i.measure.reduce import ShouldStop, never, sum_over_ranks
from t2i.model.backbone import (
    head_of,
    hidden_states,
    learned_positions,
    made_of,
    num_ids,
    read_model_config,
)
from t2i.runs.loading import find, open_model, reading
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

logger = logging.getLogger(__name__)

PROMPTS = (
    "Simply put, the theory of relativity states that",
    "Translate English to French:\nsea otter => loutre de mer\npeppermint => menthe poivrée\n"
    "plush girafe => girafe peluche\ncheese =>",
)
"""The paper's two (Table 1)."""

FORGETTING = "forgetting.json"
CHUNK_POSITIONS = 256
"""Positions whose logits are in memory at a time."""


@dataclass(frozen=True)
class TextCost:
    """Loss of text, in nats per token."""

    num_tokens: int
    loss: float
    """Over the whole vocabulary."""
    loss_text_rows: float
    """Over the text vocabulary: what the model still knows of text, whatever it gives to image codes."""
    leaked: float
    """Mean probability outside the text vocabulary."""

    @property
    def perplexity(self) -> float:
        """Per token, over the whole vocabulary."""
        return perplexity_of(self.loss)

    @property
    def perplexity_text_rows(self) -> float:
        """Per token, over the text vocabulary."""
        return perplexity_of(self.loss_text_rows)

    def to_json(self) -> dict[str, float]:
        """Give it the form of a cost in forgetting.json."""
        return asdict(self) | {
            "perplexity": self.perplexity,
            "perplexity_text_rows": self.perplexity_text_rows,
        }


def check_text(text: str, *, name: str) -> None:
    """Check that there is text to measure, before a model is loaded.

    Args:
        text: as of text_sequences.
        name: of the flag or setting that says it.

    Raises:
        DataError: no text can be read of it.
    """
    if (Path(text) / MANIFEST).is_file():
        return
    try:
        open_documents(f"{PREFIX}{text}")
    except DataError as error:
        reason = str(error).removeprefix(f"--source {PREFIX}{text}: ")
        raise DataError(f"{name} is {text}, of which no text can be read: {reason}") from error


def text_sequences(text: str, *, tokenizer: TextTokenizer, seq_len: int, num_sequences: int) -> Tensor:
    """Read held-out text as at most num_sequences packed sequences: (N, S).

    Args:
        text: a shard folder, a .txt file, a folder of them, or a dataset's name. Of shards, the held-out sequences of
            documents or the held-out captions of images are read.

    Raises:
        DataError: the text is shorter than one sequence, has no held-out part, or its ids are of another tokenizer.
    """
    folder = Path(text)
    if not (folder / MANIFEST).is_file():
        documents: Iterable[str] = open_documents(f"{PREFIX}{text}").texts
    elif (manifest := read_manifest(folder)).is_text:
        check_text_tokenizer(folder, manifest=manifest, tokenizer=tokenizer)
        samples = list(read_split(folder, "heldout"))
        if not samples:
            raise DataError(f"{text} has no held-out sequence; prepare it with a larger --heldout-share.")
        # Spread evenly: neighbours are of one document.
        chosen = spread(samples, num_sequences)
        return torch.stack([torch.from_numpy(sample["caption_ids"].astype("int64")) for sample in chosen])
    else:
        # Captions as text, not their ids: those may be of another tokenizer.
        documents = (sample["caption"] for sample in read_split(folder, "heldout"))
    ids: list[int] = []
    start_ids, end_id = tokenizer.start_ids, tokenizer.end_id
    for document in documents:
        ids += [*start_ids, *tokenizer.encode(document).tolist(), end_id]
        if len(ids) >= seq_len * num_sequences:
            break
    count = min(num_sequences, len(ids) // seq_len)
    if count == 0:
        raise DataError(
            f"{text} has {len(ids)} tokens; expected at least {seq_len}, which one sequence takes."
        )
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def text_cost(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    layout: VocabLayout,
    batch_size: int = 32,
    should_stop: ShouldStop = never,
    description: str = "",
) -> TextCost:
    """Measure packed text (N, S). With several ranks, each takes whole batches; sums are reduced once.

    Args:
        description: as of sum_over_ranks.

    Raises:
        Interrupted: should_stop asked for it.
    """
    rank, world_size = rank_and_size()
    sums = sum_over_ranks(
        input_ids.split(batch_size)[rank::world_size],
        lambda batch: _sums(model, batch.to(model.device), layout),
        model=model,
        size=4,
        should_stop=should_stop,
        description=description,
    )
    loss, loss_text_rows, leaked, count = sums.tolist()
    return TextCost(
        int(count), loss=loss / count, loss_text_rows=loss_text_rows / count, leaked=leaked / count
    )


def complete(
    model: PreTrainedModel,
    prompts: Iterable[str],
    *,
    tokenizer: TextTokenizer,
    layout: VocabLayout,
    max_new_tokens: int = 40,
    is_chat: bool = False,
) -> list[str]:
    """Complete prompts greedily among text tokens, up to an end token (paper, Table 1).

    Args:
        is_chat: prompts are a user's turns, put into the tokenizer's chat template; the answers are returned.

    Raises:
        UserError: is_chat of a tokenizer without a chat template, or a prompt that has no token or too many.
    """
    # Image codes and unused ids are suppressed: the question is which text the model still prefers.
    barred = list(range(layout.num_text_tokens, num_ids(model))) or None
    ends = _ends(model, tokenizer)
    most = learned_positions(model)
    found = []
    for asked in asked_ids(
        prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens, is_chat=is_chat, most=most
    ):
        ids = asked[None].to(model.device)
        made: Tensor = cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,  # greedy, as in the paper: models are compared by one completion each
            # By one rule for all, whatever a folder's generation_config.json says.
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            suppress_tokens=barred,
            eos_token_id=ends,
            pad_token_id=tokenizer.end_id,
        )
        completion = made[0, ids.shape[1] :].cpu()
        found.append(tokenizer.continuation(asked, completion[~torch.isin(completion, torch.tensor(ends))]))
    return found


def asked_ids(
    prompts: Iterable[str], *, tokenizer: TextTokenizer, max_new_tokens: int, is_chat: bool, most: int | None
) -> list[Tensor]:
    """Encode prompts as complete() asks them: (T,) each.

    Args:
        most: positions that the model has; None for any number.

    Raises:
        UserError: is_chat of a tokenizer without a chat template, or a prompt that has no token or too many.
    """
    start = torch.tensor(tokenizer.start_ids, dtype=torch.long)
    found = []
    for prompt in prompts:
        # Begun as the tokenizer begins a text: without its `<bos>`, Gemma completes nothing that makes sense.
        asked = _turn(tokenizer, prompt) if is_chat else torch.cat([start, tokenizer.encode(prompt)])
        if not len(asked):
            raise UserError(
                "--prompts holds an empty prompt; expected words, as this tokenizer begins a text with nothing."
            )
        # The last new token is read by nothing.
        if most is not None and len(asked) + max_new_tokens - 1 > most:
            raise UserError(
                f"a prompt of {len(asked)} tokens and {max_new_tokens} new ones are more than the model's {most}"
                " positions; expected a shorter prompt, or fewer new tokens."
            )
        found.append(asked)
    return found


def _ends(model: PreTrainedModel, tokenizer: TextTokenizer) -> list[int]:
    """List the ids that end a text: of documents, and of a chat model's turns."""
    known = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({*tokenizer.end_ids, *(known if isinstance(known, list) else [])})


def _turn(tokenizer: TextTokenizer, prompt: str) -> Tensor:
    """Encode a user's turn, up to where the answer begins: (T,)."""
    if not tokenizer.tokenizer.chat_template:
        raise UserError(f"--chat: {tokenizer.name} has no chat template; expected a chat model's tokenizer.")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    # Here special tokens are markers: the template is made of them.
    return torch.tensor(tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class KeptLanguage:
    """Text losses and completions of one model."""

    ckpt: str
    """The folder that its weights came from."""
    costs: dict[str, TextCost]
    """Name of a text -> its loss."""
    completions: list[str]
    """One per prompt."""
    dtype: str
    """Of the weights that were measured."""


@dataclass(frozen=True)
class Forgetting:
    """Models, by name, measured on the same texts and prompts."""

    texts: dict[str, str]
    prompts: list[str]
    models: dict[str, KeptLanguage]

    def to_json(self) -> dict[str, object]:
        """Give it the form of forgetting.json."""
        models = {
            name: {**vars(kept), "costs": {kind: cost.to_json() for kind, cost in kept.costs.items()}}
            for name, kept in self.models.items()
        }
        return {"texts": self.texts, "prompts": self.prompts, "models": models}


def measure_forgetting(
    ckpts: dict[str, str],
    *,
    texts: dict[str, str],
    prompts: Iterable[str],
    seq_len: int,
    num_sequences: int,
    max_new_tokens: int,
    is_chat: bool = False,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> Forgetting:
    """Measure checkpoints, by name, on the same texts and prompts, each with its own tokenizer.

    Raises:
        UserError, DataError: what one of them refuses, before the first is measured.
    """
    prompts = list(prompts)
    ids: dict[str, dict[str, Tensor]] = {}
    for name, ckpt in ckpts.items():
        folder, _ = find(ckpt)
        with reading(folder):
            tokenizer = TextTokenizer.load(folder)
            most = _positions(folder, trust_remote_code=trust_remote_code)
        asked_ids(prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens, is_chat=is_chat, most=most)
        ids[name] = {
            kind: text_sequences(text, tokenizer=tokenizer, seq_len=seq_len, num_sequences=num_sequences)
            for kind, text in texts.items()
        }
        _check_lengths(ids[name], texts=texts, ckpt=ckpt, most=most)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: dict[str, KeptLanguage] = {}
    fingerprints: set[str] = set()
    # One model in memory at a time: a model and its reference may each fill the device.
    for name, ckpt in ckpts.items():
        opened = open_model(
            ckpt,
            device=device,
            needs_images=False,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        tokenizer, layout = opened.text_tokenizer, opened.layout
        completed = complete(
            opened.model,
            prompts,
            tokenizer=tokenizer,
            layout=layout,
            max_new_tokens=max_new_tokens,
            is_chat=is_chat,
        )
        _check_lengths(ids[name], texts=texts, ckpt=ckpt, most=learned_positions(opened.model))
        costs = {
            kind: text_cost(opened.model, one, layout=layout, description=f"{name}, {kind}")
            for kind, one in ids[name].items()
        }
        fingerprints.add(tokenizer.fingerprint())
        models[name] = KeptLanguage(
            str(opened.folder), costs=costs, completions=completed, dtype=opened.dtype
        )
    if len(fingerprints) > 1:
        logger.warning(
            "%s have different text tokenizers, so their perplexities, which are per token, do not compare.",
            " and ".join(models),
        )
    return Forgetting(texts, prompts=prompts, models=models)


def _positions(folder: Path, *, trust_remote_code: bool) -> int | None:
    """Return the learned positions of a folder's model without reading its weights; None where that does not tell."""
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):  # shapes alone
            return learned_positions(made_of(config, trust_remote_code=trust_remote_code))
    except UserError:  # some classes are made with values only; loading them decides
        return None


def _check_lengths(ids: dict[str, Tensor], *, texts: dict[str, str], ckpt: str, most: int | None) -> None:
    """Refuse sequences (N, S) of texts that are longer than a model's positions; None for any number of them."""
    for kind, one in ids.items():
        if most is not None and one.shape[1] > most:
            raise UserError(
                f"{texts[kind]} is measured in sequences of {one.shape[1]} tokens; {ckpt} has {most} positions."
                " Give a smaller --seq-len."
            )


def _sums(model: PreTrainedModel, input_ids: Tensor, layout: VocabLayout) -> Tensor:
    """Sum over one batch (B, S): loss, loss among text, leaked probability, tokens."""
    hidden = hidden_states(model, input_ids)[:, :-1].flatten(0, 1)  # (N, D)
    labels = input_ids[:, 1:].flatten()
    head = head_of(model)
    # Chunked: (N, V) logits of a whole batch would be gigabytes. Not token_losses, which has one softmax, not two.
    sums = torch.zeros(4, dtype=torch.float64)
    for rows, targets in zip(hidden.split(CHUNK_POSITIONS), labels.split(CHUNK_POSITIONS), strict=True):
        logits = head.logits(rows)  # (N, V)
        target = logits.gather(1, targets[:, None])[:, 0]
        everything, text = logits.logsumexp(-1), logits[:, : layout.num_text_tokens].logsumexp(-1)
        leaked = 1 - (text - everything).exp()
        parts = (everything - target, text - target, leaked, torch.ones_like(leaked))
        sums += torch.stack([part.sum() for part in parts]).double().cpu()
    return sums
