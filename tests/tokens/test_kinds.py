"""Text tokenizers of every kind: text comes back, special tokens are never made of text, documents end rightly."""

import json

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model
from twins.tokenizer_kinds import KINDS, write_tokenizer

from t2i.errors import UserError
from t2i.model.open_lm.sampling_open_lm import caption_ids
from t2i.tokens.pieces import Pieces, read_pieces, tokenizer_of_pieces
from t2i.tokens.text import PROBE, TextTokenizer

EXACT = [kind for kind in KINDS if kind not in ("unigram", "word-piece", "prefix-space")]
TEXTS = [
    "",
    "a red apple",
    " a  red apple ",
    "red\n\tapple .",
    "<s>a</s> red <eos>",
    "naïve 中文 🙂",
    "a <|eot_id|> b[SEP]",
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: TextTokenizer.load(write_tokenizer(kind, folder / kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_makes_a_special_token(kind, opened):
    tokenizer = opened[kind]
    for spelled in (*TEXTS, *tokenizer.special.values(), f"red {' '.join(tokenizer.special.values())} apple"):
        ids = tokenizer.encode(spelled).tolist()
        assert not set(ids) & {number for number in tokenizer.special if number != unknown_id(tokenizer)}, (
            spelled
        )
        assert max(ids, default=0) < tokenizer.num_tokens


def unknown_id(tokenizer):
    return tokenizer.tokenizer.backend_tokenizer.token_to_id(
        {"word-piece": "[UNK]"}.get(tokenizer.name, "<unk>")
    )


@pytest.mark.parametrize("kind", EXACT)
def test_text_comes_back(kind, opened):
    for text in (*TEXTS, PROBE, *opened[kind].special.values()):
        # Files of this form do not tell a text that begins with a space.
        wanted = text.removeprefix(" ") if kind == "llama-2-metaspace" else text
        assert opened[kind].decode(opened[kind].encode(text)) == wanted
    assert opened[kind].loss_of_text() == ""


@pytest.mark.parametrize("kind", ["unigram", "word-piece", "prefix-space"])
def test_a_tokenizer_that_changes_text_says_so(kind, opened):
    said = opened[kind].loss_of_text()
    assert "does not give text back as it was" in said and repr(PROBE) in said


def test_a_special_token_that_a_unigram_model_holds_as_a_word_is_spelled_out(opened):
    tokenizer = opened["unigram"]
    plain = tokenizer.tokenizer("a </s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.end_id in plain  # what transformers makes of it
    ids = tokenizer.encode("a </s>")
    assert tokenizer.end_id not in ids and tokenizer.decode(ids) == "a </s>"


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_caption_has_no_ids(kind, opened):
    assert opened[kind].encode("").tolist() == []


@pytest.mark.parametrize(
    ("kind", "starts", "end"),
    [
        ("gpt-2", [], "<|endoftext|>"),
        ("llama-3", ["<|begin_of_text|>"], "<|end_of_text|>"),
        ("llama-2-normalizer", ["<s>"], "</s>"),
        ("llama-2-metaspace", ["<s>"], "</s>"),
        ("gemma", ["<bos>"], "<eos>"),
        ("unigram", ["</s>"], "</s>"),
        ("word-piece", [], "[SEP]"),
    ],
)
def test_documents_begin_and_end_as_in_pre_training(kind, starts, end, opened):
    tokenizer = opened[kind]
    ids = tokenizer.tokenizer.get_vocab()
    assert tokenizer.start_ids == [ids[token] for token in starts]
    assert tokenizer.end_id == ids[end]
    assert tokenizer.end_ids == ([ids[end], ids["<|eot_id|>"]] if kind == "llama-3" else [ids[end]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_keeps_its_first_space(kind, opened):
    tokenizer = opened[kind]
    whole, prompt = (tokenizer.encode(text) for text in ("a red apple", "a red"))
    assert whole[: len(prompt)].equal(prompt)
    assert tokenizer.continuation(prompt, whole[len(prompt) :]) == " apple"


def test_without_a_config_the_models_own_end_token_is_taken(tmp_path):
    folder = write_tokenizer("llama-2-metaspace", tmp_path / "bare", named=False)
    with pytest.raises(
        UserError, match=r"has no end token: neither its eos_token, which is None, nor <\|endof"
    ):
        _ = TextTokenizer.load(folder).end_id
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    tokenizer = TextTokenizer.load(folder)
    assert (tokenizer.tokenizer.eos_token, tokenizer.end_id) == ("</s>", 2)
    assert tokenizer.tokenizer.pad_token == "</s>"


def test_tokens_beyond_the_embeddings_are_named(tmp_path):
    folder = write_tokenizer("llama-2-metaspace", tmp_path / "padded", pad_token="[PAD]")
    tokenizer = TextTokenizer.load(folder)
    rows = tokenizer.num_tokens - 1
    tokenizer.check_rows(rows + 1, model="it")
    with pytest.raises(
        UserError, match=rf"has {rows + 1} ids; it has {rows} embeddings. .*: \[PAD\] \({rows}\)\. R"
    ):
        tokenizer.check_rows(rows, model="it")
    with pytest.raises(UserError, match=r"\), .* and 6 more\. Remove"):
        tokenizer.check_rows(rows - 9, model="it")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_gives_the_same_ids_to_transformers_and_to_exports(kind, opened, tmp_path):
    opened[kind].tokenizer.save_pretrained(tmp_path)
    again, theirs = TextTokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint() == opened[kind].fingerprint()
    spelled = " ".join(opened[kind].special.values())
    for text in (*TEXTS, PROBE, spelled, f"red{spelled}apple"):
        ids = opened[kind].encode(text).tolist()
        assert again.encode(text).tolist() == ids
        assert caption_ids(text, theirs) == ids  # as an export's own sampler reads it


WORDS = {"▁": -9.0, "a": -9.0, "b": -9.0, "▁a": -1.0, "▁ab": -2.0, "ab": -0.5, "ba": -3.0}
PIECES = Pieces(
    texts=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS],
    scores=[*[0.0] * 259, *WORDS.values()],
    kinds=[2, 3, 3, *[6] * 256, *[1] * len(WORDS)],
    bos="<s>",
    eos="</s>",
)


def test_pieces_are_merged_best_first():
    made = tokenizer_of_pieces(PIECES)
    # "ab" has the best score, and so "bab" never becomes "ba" and "b".
    assert made.encode("bab", add_special_tokens=False).tokens == ["▁", "b", "ab"]
    assert made.encode("ab a é", add_special_tokens=False).tokens == ["▁ab", "▁a", "▁", "<0xC3>", "<0xA9>"]
    assert made.encode("ab").tokens[0] == "<s>"
    assert made.decode(made.encode("  ab é").ids) == "  ab é"


def test_a_sentencepiece_model_without_an_unknown_piece_is_one_sentence(tmp_path):
    model = sentencepiece_model.ModelProto()
    model.trainer_spec.model_type = 2
    model.pieces.add(piece="a", score=0.0, type=1)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="tokenizer.model is broken: none of its pieces is for what no piece"):
        TextTokenizer.load(tmp_path)


def test_what_is_no_sentencepiece_model_is_one_sentence(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Llama 3's, for tiktoken
    with pytest.raises(UserError, match="is no SentencePiece model; expected one, or a tokenizer.json"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="older files, of which transformers makes one"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("adds_space", [True, False])
def test_a_sentencepiece_model_gives_sentencepieces_own_ids(kind, adds_space, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = tmp_path / "texts"
    texts.write_text("a red apple and a green house\nit's 1,234.5 kilometres end of it\npicture 3\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type=kind,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=adds_space,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = TextTokenizer.load(tmp_path)
    assert read_pieces(tmp_path / "tokenizer.model").adds_space == adds_space
    for text in (PROBE, "a red  apple", " red", "picture 45 of kilometres", ""):
        assert tokenizer.encode(text).tolist() == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end_id == theirs.eos_id() and tokenizer.start_ids == [theirs.bos_id()]
    assert torch.equal(tokenizer.encode("</s>"), torch.tensor(theirs.encode("</s>")))
