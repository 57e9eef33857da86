"""Ids brought along: shards and a run with no picture and no image tokenizer anywhere."""

import json
from pathlib import Path

import made_sources as made
import numpy as np
import pytest

from t2i.config import ASSETS, DataConfig, ModelConfig, PrepareConfig, RunConfig, TrainConfig
from t2i.data.prepare.images import prepare
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import check_shards, read_split
from t2i.data.sources import open_source
from t2i.errors import DataError, UserError
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.text import TextTokenizer
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
FACTS = {"vocab_size": 70_000, "length": 10, "made_by": "a one-dimensional tokenizer"}


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 70_000, (36, 10))


@pytest.fixture
def folder(tmp_path, ids):
    """Twelve sequences in each layout."""
    out = tmp_path / "ids"
    out.mkdir()
    (out / "ids.json").write_text(json.dumps(FACTS))
    rows = [{"ids": row.tolist(), "caption": made.caption(i), "key": f"k{i}"} for i, row in enumerate(ids)]
    (out / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:12])))
    made.write_table(out / "b.parquet", [{"ids": row["ids"]} for row in rows[12:24]])
    np.save(out / "c.npy", ids[24:].astype(np.int32))
    (out / "c.txt").write_text("".join(f"{row['caption']}\n" for row in rows[24:]))
    return out


def prepared(folder, out, **settings):
    return prepare(
        open_source(f"ids:{folder}", heldout_share=0.3),
        out=out,
        image_tokenizer=None,
        text_tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer"),
        config=PrepareConfig(**settings),
    )


def test_ids_of_every_layout_are_trained_on(folder, ids, tmp_path):
    manifest = prepared(folder, tmp_path / "shards")
    assert (manifest.codebook_size, manifest.codes_per_image) == (70_000, 10)
    assert not (tmp_path / "shards" / "image_tokenizer").exists()
    counts = check_shards(tmp_path / "shards")
    assert sum(counts.values()) == 36
    samples = {s["key"]: s for split in counts for s in read_split(tmp_path / "shards", split)}
    names = [*(f"k{i}" for i in range(12)), *(f"b/{i}" for i in range(12)), *(f"c/{i}" for i in range(12))]
    for place, name in enumerate(names):
        assert samples[name]["codes"].tolist() == ids[place].tolist()
        assert samples[name]["caption"] == ("" if name[0] == "b" else made.caption(place))
    config = RunConfig(
        run_dir=tmp_path / "run",
        data=DataConfig(shards=tmp_path / "shards", seq_len=32),
        model=ModelConfig(hidden_size=16, num_layers=1, num_heads=2),
        train=TrainConfig(
            max_steps=2, global_batch_tokens=4 * 32, eval_every=2, sample_every=1, eval_images=4
        ),
    )
    train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    rows = read_metrics(config.run_dir)
    assert [row["image_tokens"] for row in rows if "split" not in row] == [40, 40]
    assert next(row for row in rows if row.get("split") == "heldout")["image_loss"] > 0
    assert not (config.run_dir / "samples").exists()
    with pytest.raises(UserError, match="image_tokenizer is no image tokenizer"):
        open_model(str(config.run_dir), needs_images=True)


def test_wrong_ids_are_counted_and_wrong_files_named(folder, tmp_path):
    rows = [{"ids": [1] * 9}, {"ids": [1.5] * 10}, {"ids": [-1] * 10}, {"ids": [70_000] * 10}]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = prepared(folder, tmp_path / "shards")
    assert manifest.left_out == {"an id outside 0 to 69999": 2, "not 10 integers": 2}
    assert read_manifest(tmp_path / "shards").image_tokenizer.name == FACTS["made_by"]
    with pytest.raises(UserError, match="views is 2; ids:.* has precomputed codes, which cannot be shifted"):
        prepared(folder, tmp_path / "views", views=2)
    (folder / "c.txt").write_text("one line\n")
    with pytest.raises(DataError, match=r"c\.txt has 1 lines; c\.npy has 12 rows"):
        prepared(folder, tmp_path / "lines")
    (folder / "a.jsonl").write_text('{"caption": "no ids"}')
    with pytest.raises(DataError, match=r"a\.jsonl: row 1 has no ids"):
        prepared(folder, tmp_path / "none")
    (folder / "ids.json").write_text('{"vocab_size": 5}')
    with pytest.raises(DataError, match=r"ids\.json cannot be used .* expected \{.vocab_size"):
        open_source(f"ids:{folder}")


def npy(shape, *, descr="<i4", data=b""):
    """An array's file whose header claims a shape, whatever data follows."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


BROKEN = {
    "a.npy": [
        (npy((10**12, 10)), "is not an array of numpy's, or is broken"),
        (npy((2, 10), data=b"\0" * 79), "is not an array of numpy's, or is broken"),
        (npy((10**12, 0)), "is not an array|has the shape"),
        (npy((2, 9), data=b"\0" * 72), r"has the shape \(2, 9\); expected \(N, 10\), as ids.json says"),
        (npy((10,), data=b"\0" * 40), r"has the shape \(10,\)"),
        (npy((), data=b"\0" * 4), r"has the shape \(\)"),
        (npy((1, 10), descr="|O", data=b"\x80\x04N."), "is not an array of numpy's, or is broken"),
        (b"", "is not an array of numpy's, or is broken"),
        (b"PK\x03\x04", "is not an array of numpy's, or is broken"),
        (b"PK\x05\x06" + b"\0" * 18, "has several arrays"),
    ],
    "a.jsonl": [
        (b"[1, 2]", "line 1 holds list; expected an object of keys"),
        (b'{"ids": [1', "line 1 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"id": [1]}', "row 1 has no ids"),
    ],
    "a.parquet": [(b"PAR1", "is not a parquet file, or is broken")],
    "ids.json": [
        (b"[]", "cannot be used"),
        (b'{"vocab_size": "9", "length": 10, "made_by": "x"}', "vocab_size is '9'; expected int"),
        (b'{"vocab_size": 0, "length": 10, "made_by": "x"}', "vocab_size is 0; expected 1 to 2,147,483,648"),
        (
            b'{"vocab_size": 9, "length": 1000000000000, "made_by": "x"}',
            "length is 1000000000000; expected 1 to",
        ),
        (b'{"vocab_size": 9, "length": 10, "made_by": "x", "why": 1}', "cannot be used"),
    ],
}


@pytest.mark.parametrize(("name", "content", "sentence"), [(n, *case) for n in BROKEN for case in BROKEN[n]])
def test_a_broken_or_forged_file_is_a_sentence(name, content, sentence, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(FACTS))
    (tmp_path / "whole.jsonl").write_text(json.dumps({"ids": [1] * 10}))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        made.accounted(f"ids:{tmp_path}")


def test_odd_rows_are_left_out_and_their_captions_are_text(tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(FACTS))
    good = [1] * 10
    rows = [
        *(
            {"ids": ids}
            for ids in ([[1, 2], [3]], "1" * 10, None, {"a": 1}, [2**70] * 10, [True] * 10, [None] * 10)
        ),
        *(
            {"ids": good, "caption": caption}
            for caption in ({"en": "a"}, 7, [], float("nan"), None, "", "a\nb")
        ),
        {"ids": good, "key": {"a": 1}},
        {"ids": good, "key": 5},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, tally = made.accounted(f"ids:{tmp_path}", opens=False)
    assert kept == {"a/9": "", "a/10": "", "a/11": "", "a/12": "", "a/13": "a b", "a/14": "", "5": ""}
    assert tally.left_out["not 10 integers"] == 7


def test_the_lines_of_captions_end_at_line_ends_alone(tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(FACTS))
    np.save(tmp_path / "a.npy", np.ones((3, 10), np.int64))
    (tmp_path / "a.txt").write_bytes("a\u2028b\r\n\r\ncaf".encode() + b"\xe9\r\n")
    (tmp_path / "notes.txt").touch()
    kept, tally = made.accounted(f"ids:{tmp_path}", opens=False)
    assert list(kept.values()) == ["a b", "", "café"]
    assert tally.changed == {"a caption that is not UTF-8, read as cp1252": 1}
    assert tally.unread == {"a file of another kind (.txt)": 1}
