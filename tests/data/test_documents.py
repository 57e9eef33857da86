import json
from dataclasses import replace

import numpy as np
import pytest

from t2i.config import ASSETS, DataConfig
from t2i.data.prepare import text as packing
from t2i.data.prepare.text import prepare_text
from t2i.data.shards.manifest import TextMaker, check_text_use, read_manifest
from t2i.data.shards.reader import check_shards, read_split
from t2i.data.sources import documents
from t2i.data.sources.documents import documentation_strings, open_documents, prose
from t2i.errors import DataError, UserError
from t2i.tokens.text import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for index in range(60):
        (folder / f"{index:02d}.txt").write_text(
            f"Document number {index} tells of {index * 7} small things.\n"
        )
    (folder / "60.txt").write_text((folder / "00.txt").read_text())
    return folder


def prepare(folder, out, tokenizer, **changes):
    settings = {"seq_len": 16, "heldout_share": 0.3, **changes}
    return prepare_text(open_documents(f"text:{folder}"), out=out, text_tokenizer=tokenizer, **settings)


@pytest.fixture(scope="module")
def prepared(folder, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "text"
    prepare(folder, out, tokenizer)
    return out


def ids_of(prepared, split):
    return [int(one) for sample in read_split(prepared, split) for one in sample["caption_ids"]]


def test_documents_are_packed_whole_and_once_and_splits_share_none(prepared, folder, tokenizer):
    texts = {path.read_text().strip() for path in folder.glob("*.txt")}
    found = {}
    for split in ("train", "heldout"):
        pieces = tokenizer.tokenizer.decode(ids_of(prepared, split)).split("<|endoftext|>")
        found[split] = pieces[:-1]  # what did not fill the last sequence is left out
        assert set(found[split]) <= texts
    both = found["train"] + found["heldout"]
    assert len(both) == len(set(both))
    manifest = read_manifest(prepared)
    assert sum(manifest.documents.values()) == 60  # the double is left out
    for split in ("train", "heldout"):
        assert manifest.documents[split] - len(found[split]) <= 1
    assert manifest.is_text
    written = json.loads((prepared / "manifest.json").read_text())
    assert not {"codes_per_image", "codebook_size", "image_tokenizer", "image_size"} & set(written)


def test_what_another_preparation_has_begun_is_not_removed(folder, tokenizer, tmp_path):
    part = tmp_path / "text.part"
    (part / "units").mkdir(parents=True)
    (part / "units" / "000000.json").write_text("hours of work")
    with pytest.raises(UserError, match="has units, which is of no preparation of this kind"):
        prepare(folder, tmp_path / "text", tokenizer)
    (part / "arguments.json").write_text(json.dumps({"source": "my images"}))
    with pytest.raises(
        UserError, match=r"text\.part was made with other arguments \(source: my images there"
    ):
        prepare(folder, tmp_path / "text", tokenizer)
    assert (part / "units" / "000000.json").read_text() == "hours of work"


def test_a_text_preparation_that_was_killed_starts_over_or_is_published(
    folder, tokenizer, tmp_path, monkeypatch
):
    out = tmp_path / "text"

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(packing, "check_accounts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, out, tokenizer)
    assert (tmp_path / "text.part" / "arguments.json").exists() and not out.exists()
    with monkeypatch.context() as patched:
        patched.setattr(packing, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, out, tokenizer)
    monkeypatch.setattr(packing, "_pack", None)  # all is there: nothing is packed again
    counts = prepare(folder, out, tokenizer).counts
    assert check_shards(out) == counts and not (out / "arguments.json").exists()


def test_floors_of_text_are_ordered_as_models_are(prepared):
    floors = read_manifest(prepared).floors_nats["heldout"]
    assert floors["bigram"] < floors["unigram"] < floors["uniform"] == pytest.approx(np.log(2048))


def test_the_same_documents_give_the_same_hash_and_others_another(prepared, folder, tokenizer, tmp_path):
    again = prepare(folder, tmp_path / "again", tokenizer)
    assert again.gathered_sha256 == read_manifest(prepared).gathered_sha256
    (tmp_path / "one.txt").write_text(
        "First of all.\n\nSecond, a paragraph of some length.\n\n" * 2 + "End. " * 40
    )
    one = prepare(tmp_path / "one.txt", tmp_path / "other", tokenizer, seq_len=4, heldout_share=0.5)
    assert one.gathered_sha256 != again.gathered_sha256
    assert sum(one.documents.values()) == 3


def test_checks_count_and_read_everything(prepared, tokenizer):
    counts = check_shards(prepared)
    assert counts == read_manifest(prepared).counts
    manifest = json.loads((prepared / "manifest.json").read_text())
    (prepared / "manifest.json").write_text(json.dumps({**manifest, "sequence_tokens": 15}))
    with pytest.raises(DataError, match="has 16 ids; expected 15"):
        check_shards(prepared)
    (prepared / "manifest.json").write_text(json.dumps(manifest))


def test_a_share_of_nothing_holds_nothing_out(folder, tokenizer, tmp_path):
    manifest = prepare(folder, tmp_path / "all", tokenizer, heldout_share=0.0)
    assert manifest.counts.keys() == manifest.documents.keys() == manifest.floors_nats.keys() == {"train"}
    assert manifest.documents["train"] == 60
    assert check_shards(tmp_path / "all") == manifest.counts
    assert list(read_split(tmp_path / "all", "heldout")) == []


def test_other_uses_are_refused(prepared, folder, tokenizer):
    config = DataConfig(shards=prepared, mode="text-only", seq_len=16)
    manifest = read_manifest(prepared)
    check_text_use(config, manifest=manifest, tokenizer=tokenizer)
    with pytest.raises(UserError, match="holds only text, but data.mode is image-only"):
        check_text_use(replace(config, mode="image-only"), manifest=manifest, tokenizer=tokenizer)
    with pytest.raises(UserError, match="data.seq_len is 96; the sequences of .* have 16 tokens"):
        check_text_use(replace(config, seq_len=96), manifest=manifest, tokenizer=tokenizer)
    other = replace(manifest, text_tokenizer=TextMaker("another", "0" * 64, num_tokens=2048))
    with pytest.raises(DataError, match="made with the text tokenizer another"):
        check_text_use(config, manifest=other, tokenizer=tokenizer)
    with pytest.raises(UserError, match="Choose another --out"):
        prepare(folder, prepared, tokenizer, heldout_share=0.2)


def test_sources_that_are_none_are_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="holds no .txt file"):
        open_documents(f"text:{tmp_path}")
    with pytest.raises(DataError, match="does not exist"):
        open_documents("text:./nowhere.txt")
    for name in ("nowhere.txt", "my/documants"):
        with pytest.raises(DataError, match=rf"{name} does not exist here; .* written hf:USER/NAME"):
            open_documents(f"text:{name}")
    with pytest.raises(DataError, match="the Hugging Face dataset nobody/nothing cannot be opened"):
        list(open_documents("text:hf:nobody/nothing").texts)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(DataError, match="do not fill one sequence of 16"):
        prepare(tmp_path, tmp_path / "out", tokenizer)


def test_an_empty_file_is_no_document_and_a_byte_order_mark_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" \n")
    (tmp_path / "b.txt").write_bytes("\ufeffA text.".encode())
    assert list(open_documents(f"text:{tmp_path}").texts) == ["A text."]


def test_files_of_text_may_end_in_capitals(tmp_path):
    (tmp_path / "A.TXT").write_text("one text")
    (tmp_path / "b.txt").write_text("another")
    assert list(open_documents(f"text:{tmp_path}").texts) == ["one text", "another"]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENTED_PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(DataError, match="reads no_such_package, which is not installed"):
        open_documents("text:docstrings")


def test_chosen_packages_are_read_alone_with_their_versions():
    found = open_documents("text:docstrings:yaml")
    assert list(found.versions) == ["yaml"]
    texts = list(found.texts)
    assert any("Parse" in text or "YAML" in text for text in texts)
    assert len(texts) < 500


def test_documentation_is_read_and_prose_kept(tmp_path):
    (tmp_path / "code.py").write_text(
        '"""A heading.\n\nThis paragraph has quite enough words to be taken for prose by any reader of it.\n\n'
        '>>> x = f(1)  # and this paragraph is an example, however many words it may have in it\n"""\n'
        'def f():\n    "Return it."\n'
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    texts = documentation_strings(tmp_path / "code.py")
    assert [prose(text) for text in texts] == [
        "This paragraph has quite enough words to be taken for prose by any reader of it.", "",
    ]  # fmt: skip
    assert documentation_strings(tmp_path / "broken.py") == []


def test_code_is_read_without_its_docstrings_and_comments(tmp_path):
    (tmp_path / "module.py").write_text(
        '"""Words."""\n# A comment.\nclass Empty:\n    """Only words."""\n\ndef double(x):\n'
        '    """More."""\n    return 2 * x  # twice\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (code,) = documents.code_without_words(tmp_path / "module.py")
    assert code == "class Empty:\n    pass\n\ndef double(x):\n    return 2 * x"
    assert documents.code_without_words(tmp_path / "broken.py") == [""]
    (tmp_path / "deep.py").write_text("total = " + " + ".join(["1"] * 2_000))
    assert "".join(documents.code_without_words(tmp_path / "deep.py")) == ""
    found = open_documents("text:code:yaml")
    texts = list(found.texts)
    assert list(found.versions) == ["yaml"] and any("def safe_load(stream)" in text for text in texts)
    assert not any('"""' in text for text in texts)
    with pytest.raises(DataError, match="text:code reads nowhere, which is not installed"):
        open_documents("text:code:nowhere")


def test_shuffled_documents_have_the_same_words_in_another_order(folder):
    plain, mixed = open_documents(f"text:{folder}"), open_documents(f"text:shuffled:{folder}")
    pairs = list(zip(plain.texts, mixed.texts, strict=True))
    assert all(sorted(a.split()) == sorted(b.split()) for a, b in pairs)
    assert sum(a != b for a, b in pairs) > 0.9 * len(pairs)
    assert list(open_documents(f"text:shuffled:{folder}").texts) == [b for _, b in pairs]
    assert mixed.name == f"text:shuffled:{folder}" and mixed.files == plain.files
    assert (
        open_documents("text:shuffled:docstrings:yaml").versions
        == open_documents("text:docstrings:yaml").versions
    )
