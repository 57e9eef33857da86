"""Convert a GGUF file, llama.cpp's format of quantised language models, to a folder for model.init.

transformers reads the weights. The text tokenizer is made here from the file's own lists: transformers' reader takes
the start token for the end token, and splits digits otherwise than many of these models do.
"""

from functools import partial
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from t2i.convert.gguf_file import PAIRS_NEIGHBOURS, GgufFile, load_weights, open_gguf, read_tensors
from t2i.convert.gguf_reference import Sizes, gguf_logits
from t2i.convert.proof import Tell, prove_logits
from t2i.errors import CheckpointError, UserError
from t2i.files import new_folder, sha256_of
from t2i.model.resize import end_at, never_generate
from t2i.tokens.pieces import Pieces, begin_texts, tokenizer_of_pieces
from t2i.tokens.text import PROBE, TextTokenizer

SPECIAL_TOKEN, USER_TOKEN = 3, 4
"""GGUF's types of tokens that text is never split into, and of added words that it is."""

# llama.cpp's rules of splitting text before merges, by the name that a file gives.
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = ("gpt-2", "olmo", "mpt", "phi-2")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
OWN_RULE = {"llama-bpe": LETTERS + r"\p{N}{1,3}" + REST, "qwen2": LETTERS + r"\p{N}" + REST}
MOST_RENAMED = 0.01
"""Share of a tokenizer's tokens that a file may have by another name: converters rename some added ones."""
SPLITS = (*GPT2, *SINGLE_DIGITS, *OWN_RULE)


def convert_gguf(
    checkpoint: Path,
    *,
    end_token: str | None,
    text_tokenizer: str | None,
    out: Path,
    tell: Tell,
    dtype: str = "float32",
) -> None:
    """Convert a GGUF file to a folder for model.init.

    Args:
        end_token: the token that ends a document; None for the file's own end token.
        text_tokenizer: a folder or a hub name; None to make it from the file.
        dtype: of the written weights, a torch dtype's name.

    Raises:
        UserError: `out` exists, no GGUF file, or an architecture, a quantisation or a tokenizer that is not supported.
        CheckpointError: the file is broken, or the folder gives other logits than the file's own tensors.
    """
    with new_folder(out) as part:
        file = open_gguf(checkpoint)
        made = given_tokenizer(text_tokenizer, file=file) if text_tokenizer else tokenizer_of(file)
        tell(memory_needed(file))
        tell(f"{checkpoint.name}: SHA-256 {sha256_of(checkpoint)}")
        model = load_weights(file)
        set_ends(model, made, end_token=end_token, tokenizer_name=text_tokenizer or str(file.path), file=file)
        model.to(getattr(torch, dtype)).save_pretrained(part)
        made.save_pretrained(part)
        del model  # the proof holds the written folder's weights beside the file's
        tell(_names_of(file))
        tell(prove_text(part))
        # From GGUF's own names and order of heads, by another path than transformers' reader takes.
        written = AutoModelForCausalLM.from_pretrained(part, dtype=torch.float32, trust_remote_code=False)
        tensors = dict(read_tensors(file))
        for name in tensors:  # one by one: not a second copy of all
            tensors[name] = tensors[name].to(getattr(torch, dtype)).float()
        reference = partial(gguf_logits, tensors, sizes=_sizes(file))
        tell(prove_logits(written.eval(), reference, of="the file's own tensors"))


def memory_needed(file: GgufFile) -> str:
    """Say how much memory a conversion needs: two copies of all weights in fp32."""
    size = sum(int(tensor.n_elements) for tensor in file.reader.tensors) * 4
    return f"the weights take {size / 1e9:.1f} GB in fp32; converting needs about {2 * size / 1e9 + 1:.0f} GB of memory"


def given_tokenizer(name: str, *, file: GgufFile) -> PreTrainedTokenizerFast:
    """Load a text tokenizer that was named in place of the file's own, and compare it with the file's list of tokens.

    Raises:
        UserError: it is not there, or is that of another model.
    """
    tokenizer, tokens = TextTokenizer.load(name).tokenizer, file.of_tokenizer("tokens")
    vocabulary = tokenizer.get_vocab()
    others = sum(number < len(tokens) and tokens[number] != token for token, number in vocabulary.items())
    if others > MOST_RENAMED * len(vocabulary):
        raise UserError(
            f"--text-tokenizer {name} is not that of {file.path}: {others} of its {len(vocabulary)} ids are other"
            " tokens there; expected the same ones."
        )
    return tokenizer


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerFast:
    """Make the text tokenizer from a file's vocabulary: byte-level BPE (gpt2) or SentencePiece's BPE (llama).

    Raises:
        UserError: it is of another kind, or splits text by a rule that is not known here.
        CheckpointError: the file lacks a part of it.
    """
    kind, rule = (file.values.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "llama" and (kind != "gpt2" or rule not in SPLITS):
        raise UserError(
            f"{file.path} has a text tokenizer of kind {kind} that splits text by rule {rule}; expected kind llama, or"
            f" kind gpt2 and one of {', '.join(SPLITS)}. Give the model's own folder or hub name by --text-tokenizer."
        )
    try:
        return _tokenizer(file, rule=None if kind == "llama" else str(rule))
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers has no class of its own for what it cannot use
        raise CheckpointError(f"{file.path} has a broken text tokenizer: {error}.") from error


def _tokenizer(file: GgufFile, *, rule: str | None) -> PreTrainedTokenizerFast:
    """Make the text tokenizer: byte-level BPE that splits text by a rule, or SentencePiece's BPE."""
    made = _byte_level(file, rule=rule) if rule else tokenizer_of_pieces(_pieces(file))
    tokens = file.of_tokenizer("tokens")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)
    for name, role in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = file.values.get(f"tokenizer.ggml.{role}_token_id")
        if number is not None:
            setattr(tokenizer, f"{name}_token", tokens[number])
    tokenizer.chat_template = file.values.get("tokenizer.chat_template")
    return tokenizer


def _pieces(file: GgufFile) -> Pieces:
    values, tokens = file.values, file.of_tokenizer("tokens")
    bos = values.get("tokenizer.ggml.bos_token_id")
    adds_bos = values.get("tokenizer.ggml.add_bos_token", True) and bos is not None
    return Pieces(
        texts=tokens,
        scores=file.of_tokenizer("scores"),
        kinds=file.of_tokenizer("token_type"),
        bos=tokens[bos] if adds_bos else "",
        adds_space=values.get("tokenizer.ggml.add_space_prefix", True),
        joins_spaces=values.get("tokenizer.ggml.remove_extra_whitespaces", False),
    )


def _byte_level(file: GgufFile, *, rule: str) -> Tokenizer:
    tokens: list[str] = file.of_tokenizer("tokens")
    merges = [tuple(merge.split(" ")) for merge in file.of_tokenizer("merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule == "llama-bpe"))
    made.pre_tokenizer = _split_rule(rule)
    made.decoder = decoders.ByteLevel()
    kinds = file.values.get("tokenizer.ggml.token_type", [0] * len(tokens))
    for kind_of, special in ((SPECIAL_TOKEN, True), (USER_TOKEN, False)):
        added = [token for token, found in zip(tokens, kinds, strict=True) if found == kind_of]
        made.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    bos = file.values.get("tokenizer.ggml.bos_token_id")
    # A file that does not say goes by its rule, as in llama.cpp: Llama 3 begins every text with its start token.
    if bos is not None and file.values.get("tokenizer.ggml.add_bos_token", rule == "llama-bpe"):
        begin_texts(made, tokens[bos])
    return made


def set_ends(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    end_token: str | None,
    tokenizer_name: str,
    file: GgufFile,
) -> None:
    """Name the end token in tokenizer and model, and keep ids that no token uses from being generated.

    Args:
        tokenizer_name: folder, hub name or file that the tokenizer is of, for errors.

    Raises:
        UserError: the vocabulary lacks end_token, or has more ids than the model has embeddings.
    """
    vocabulary = tokenizer.get_vocab()
    if end_token is not None and end_token not in vocabulary:
        raise UserError(f"--end-token {end_token} is not in the vocabulary of {tokenizer_name}.")
    num_tokens, num_rows = max(vocabulary.values()) + 1, model.config.vocab_size
    TextTokenizer(tokenizer, name=tokenizer_name).check_rows(num_rows, model=str(file.path))
    chat_end = tokenizer.eos_token_id
    if end_token is not None:
        tokenizer.eos_token = end_token
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # whatever transformers' reader took
    # It copies the padding too, which would freeze that id's embedding from the next load on.
    model.config.pad_token_id = None
    end_at(model, tokenizer)
    # A chat ends at the file's own end token, a document perhaps at another: generate() stops at both.
    if chat_end not in (None, tokenizer.eos_token_id):
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, chat_end]
    never_generate(model, list(range(num_tokens, num_rows)))


def prove_text(folder: Path) -> str:
    """Check that a written tokenizer gives text back; return a sentence.

    Raises:
        CheckpointError: it does not.
    """
    tokenizer = TextTokenizer.load(folder)
    if said := tokenizer.loss_of_text():
        raise CheckpointError(f"{said} Nothing written.")
    count = len(tokenizer.encode(PROBE))
    return f"checked: the text tokenizer gives a text of {len(PROBE)} characters back from {count} ids"


def _split_rule(rule: str) -> pre_tokenizers.PreTokenizer:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in OWN_RULE)
    if rule in GPT2:
        return whole
    first = Regex(OWN_RULE.get(rule, r"\p{N}"))
    return pre_tokenizers.Sequence([pre_tokenizers.Split(first, behavior="isolated"), whole])


def _sizes(file: GgufFile) -> Sizes:
    num_heads = file.of_model("attention.head_count")
    return Sizes(
        num_layers=file.of_model("block_count"),
        num_heads=num_heads,
        num_key_heads=file.values.get(f"{file.architecture}.attention.head_count_kv", num_heads),
        norm_eps=file.of_model("attention.layer_norm_rms_epsilon"),
        rope_base=file.values.get(f"{file.architecture}.rope.freq_base", 10_000.0),
        pairs_neighbours=PAIRS_NEIGHBOURS[file.architecture],
    )


def _names_of(file: GgufFile) -> str:
    name, licence = (file.values.get(f"general.{key}", "not stated") for key in ("name", "license"))
    kinds = ", ".join(sorted({tensor.tensor_type.name for tensor in file.reader.tensors}))
    return f"{file.path.name}: {name}, class {file.architecture}, stored as {kinds}, licence {licence}"
