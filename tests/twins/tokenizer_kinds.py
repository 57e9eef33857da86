"""Tiny text tokenizers of every kind that language models have, written as folders of Hugging Face's files."""

import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "a red apple and a green house, it's 1,234.5 kilometres end of it",
    "picture 3 picture 12 picture 45 of kilometres",
] * 3
SPACE = "▁"


def byte_level(folder, *, add_prefix_space=False, split_digits=False):
    """GPT-2's and Llama 3's kind."""
    made = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
        if split_digits
        else whole
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return made


def spaced_bpe(folder, *, form):
    """Llama 2's kind (form "normalizer" in older files, "metaspace" in newer) and Gemma's, with byte fallback."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120))
    state = json.loads(trained.to_str())["model"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if form == "gemma" else ["<unk>", "<s>", "</s>"]
    words = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(state["vocab"], key=state["vocab"].get),
    ]
    made = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=[tuple(pair) for pair in state["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if form == "gemma":
        made.normalizer = normalizers.Replace(" ", SPACE)
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        steps.append(decoders.Strip(" ", 1, 0))
        if form == "normalizer":
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
            )
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(steps)
    made.add_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    bos = special[2] if form == "gemma" else special[1]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return made


def unigram(folder):
    """XGLM's kind: special tokens are words of the model too, and a text can spell them."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    made.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    alphabet = sorted({letter for text in TEXTS for letter in text} | set("</>s"))
    made.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=120,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            initial_alphabet=alphabet,
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    return made


def word_piece(folder):
    """BERT's kind, without capitals and accents."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    return made


KINDS = {
    "gpt-2": (byte_level, {}, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}),
    "llama-3": (
        lambda folder: byte_level(folder, split_digits=True),
        {"specials": ["<|end_of_text|>", "<|eot_id|>"], "bos": "<|begin_of_text|>"},
        {
            "eos_token": "<|eot_id|>",
            "bos_token": "<|begin_of_text|>",
            "clean_up_tokenization_spaces": True,
            "chat_template": "{{ content }}<|eot_id|>",
        },
    ),
    "prefix-space": (
        lambda folder: byte_level(folder, add_prefix_space=True),
        {},
        {"eos_token": "<|endoftext|>", "add_prefix_space": True},
    ),
    "llama-2-normalizer": (
        lambda folder: spaced_bpe(folder, form="normalizer"),
        {},
        {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "legacy": True},
    ),
    "llama-2-metaspace": (
        lambda folder: spaced_bpe(folder, form="metaspace"),
        {},
        {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "legacy": False},
    ),
    "gemma": (
        lambda folder: spaced_bpe(folder, form="gemma"),
        {},
        {"eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "unigram": (
        unigram,
        {},
        {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "word-piece": (word_piece, {}, {"eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}),
}
"""Name -> how it is made, more special tokens, and what tokenizer_config.json says."""


def write_tokenizer(kind, folder, *, named=True, **changes):
    """Write the files of a kind; `named` is whether tokenizer_config.json is there, and `changes` are to it."""
    make, more, config = KINDS[kind]
    made = make(folder)
    specials = [*more.get("specials", []), *([more["bos"]] if "bos" in more else [])]
    if config["eos_token"] not in made.get_vocab() and config["eos_token"] not in specials:
        specials.append(config["eos_token"])
    made.add_special_tokens(specials)
    if "bos" in more:
        made.post_processor = processors.TemplateProcessing(
            single=f"{more['bos']} $A", special_tokens=[(more["bos"], made.token_to_id(more["bos"]))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return folder
