"""Tokenizers of GPT-NeoX-20B's structure: from tokenizer.json alone, from a whole folder, from the hub's cache."""

import json
import shutil

import pytest
import torch
from backbones.tiny import IS_NEWEST
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.utils import hub
from twins.text_tokenizer import train_text_tokenizer

from t2i.errors import UserError
from t2i.tokens.pieces import begin_texts
from t2i.tokens.text import NEOX, TextTokenizer
from t2i.tokens.vocab import VocabLayout

CAPTION = "a red  apple, <|endoftext|>"


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    """Two special tokens first, merges, then runs of 24 down to 2 spaces as added tokens that are not special."""
    tokenizer = train_text_tokenizer(["a red apple and a green house"] * 3, vocab_size=300)
    runs = [AddedToken(" " * count, special=False, normalized=True) for count in range(24, 1, -1)]
    tokenizer.tokenizer.add_tokens(runs)
    folder = tmp_path_factory.mktemp("neox")
    tokenizer.tokenizer.save_pretrained(folder)
    return folder


def test_every_way_to_load_gives_the_same_ids_and_ends(neox, tmp_path, monkeypatch):
    shutil.copy(neox / "tokenizer.json", tmp_path)
    released = tmp_path / "released"  # GPT-NeoX-20B's files name no padding
    released.mkdir()
    shutil.copy(neox / "tokenizer.json", released)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (released / "tokenizer_config.json").write_text(json.dumps(names))
    snapshot = (
        tmp_path
        / "cache"
        / f"models--{NEOX.removeprefix('hf:').replace('/', '--')}"
        / "snapshots"
        / ("0" * 40)
    )
    shutil.copytree(neox, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(tmp_path / "cache"))
    ways = [TextTokenizer.load(name) for name in (neox, tmp_path, released, NEOX)]
    assert len({way.fingerprint() for way in ways}) == 1
    for way in ways:
        assert way.encode(CAPTION).tolist() == ways[0].encode(CAPTION).tolist()
        assert way.decode(way.encode(CAPTION)) == CAPTION
        assert 0 not in way.encode(CAPTION)
        tokenizer = way.tokenizer
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
        assert tokenizer.padding_side == "left"


def test_runs_of_spaces_are_counted_and_padding_rows_are_not(neox):
    tokenizer = TextTokenizer.load(neox)
    num_tokens = tokenizer.num_tokens
    assert tokenizer.encode("a  b").tolist().count(num_tokens - 1) == 1  # two spaces: the last id
    layout = VocabLayout(num_text_rows=num_tokens + 155, num_text_tokens=num_tokens, codebook_size=16)
    assert layout.special_id("<doc>") == num_tokens + 155
    assert layout.unused_ids()[:155] == list(range(num_tokens, num_tokens + 155))
    used = layout.is_text() | layout.is_special() | layout.is_image()
    used[layout.pad_id] = True
    assert layout.unused_ids() == torch.arange(layout.vocab_size)[~used].tolist()


def test_a_saved_tokenizer_is_transformers_own(neox, tmp_path):
    TextTokenizer.load(neox).tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_token, again.padding_side) == ("<|endoftext|>", "left")
    assert again("a red apple")["input_ids"] == TextTokenizer.load(neox).encode("a red apple").tolist()


def named(folder, source, *, start, **settings):
    """Write a folder whose tokenizer.json puts a start token before each text or not, with settings beside it."""
    backend = TextTokenizer.load(source).tokenizer.backend_tokenizer
    if start:
        begin_texts(backend, "<|endoftext|>")
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **settings}))
    return TextTokenizer.load(folder)


def test_texts_begin_as_the_tokenizers_own_class_begins_them(neox, tmp_path):
    llama = {"tokenizer_class": "LlamaTokenizerFast"}
    plain = named(tmp_path / "plain", neox, start=False)
    deepseek = named(tmp_path / "deepseek", neox, start=False, add_bos_token=True, **llama)
    bare = named(tmp_path / "bare", neox, start=True, add_bos_token=False, **llama)
    if not IS_NEWEST:  # whose class makes the whole tokenizer anew
        theirs = [AutoTokenizer.from_pretrained(tmp_path / name)("a red") for name in ("deepseek", "bare")]
        assert [found["input_ids"][0] == 0 for found in theirs] == [True, False]
    assert (plain.start_ids, deepseek.start_ids, bare.start_ids) == ([], [0], [])
    assert named(tmp_path / "twice", neox, start=True, add_bos_token=True, **llama).start_ids == [0]
    # What was prepared before stays valid, captions are as before, and a saved folder says the same.
    assert deepseek.fingerprint() == plain.fingerprint() == bare.fingerprint()
    assert deepseek.encode(CAPTION).equal(plain.encode(CAPTION))
    deepseek.tokenizer.save_pretrained(tmp_path / "saved")
    assert TextTokenizer.load(tmp_path / "saved").start_ids == [0]


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "/nowhere", "somebody/something", "something"])
def test_a_name_without_hf_is_never_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("t2i.tokens.text.AutoTokenizer", None)
    with pytest.raises(UserError, match=rf"{name} does not exist here; .* is written hf:USER/NAME\.$"):
        TextTokenizer.load(name)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"it has neither tokenizer\.json nor tokenizer\.model\.$"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "none-such"}}'),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
    ],
)
def test_a_broken_tokenizer_is_one_sentence(neox, file, text, tmp_path):
    shutil.copytree(neox, tmp_path / "broken")
    (tmp_path / "broken" / file).write_text(text)
    with pytest.raises(UserError, match=r"the text tokenizer .*broken cannot be read: ") as caught:
        TextTokenizer.load(tmp_path / "broken")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_reads_its_own_file_whatever_its_config_names(neox, tmp_path):
    shutil.copytree(neox, tmp_path / "odd")
    config = json.loads((neox / "tokenizer_config.json").read_text())
    (tmp_path / "odd" / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_file": "/etc/passwd"})
    )
    assert TextTokenizer.load(tmp_path / "odd").fingerprint() == TextTokenizer.load(neox).fingerprint()
