"""Hugging Face datasets in a folder: what save_to_disk wrote, and rows that point out of the dataset."""

import json

import made_sources as made
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from t2i.config import SourceConfig
from t2i.data.sources import open_source
from t2i.errors import DataError

LED_OUT = "a path that leads out of the dataset, in place of image bytes"


def dataset(indexes=range(6), **columns):
    cells = [{"bytes": made.encoded(index), "path": None} for index in indexes]
    features = Features(
        {"image": Image(), "text": Value("string"), **{name: kind for name, (kind, _) in columns.items()}}
    )
    data = {"image": cells, "text": [made.caption(index) for index in indexes]}
    return Dataset.from_dict(
        data | {name: values for name, (_, values) in columns.items()}, features=features
    )


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_what_save_to_disk_wrote_is_read(prefix, tmp_path):
    dataset().save_to_disk(tmp_path / "one")
    assert len(made.accounted(f"{prefix}{tmp_path}/one")[0]) == 6
    DatasetDict(train=dataset(), test=dataset(range(2))).save_to_disk(tmp_path / "two")
    assert len(made.accounted(f"{prefix}{tmp_path}/two")[0]) == 6
    assert len(made.accounted(f"{prefix}{tmp_path}/two", hub_split="test")[0]) == 2
    with pytest.raises(
        DataError, match=r"has the splits \['train', 'test'\]; expected one of these as --hub-split"
    ):
        open_source(f"{prefix}{tmp_path}/two", heldout_share=0.0, config=SourceConfig(hub_split="validation"))
    state = tmp_path / "one" / "state.json"
    facts = json.loads(state.read_text())
    facts["_data_files"][0]["filename"] = "../two/train/data-00000-of-00001.arrow"
    state.write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"state\.json names .*expected files of its folder"):
        open_source(str(tmp_path / "one"))


def test_keys_of_a_saved_set_stay_when_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr("t2i.data.sources.hub.LISTED_UNIT", 4)
    keys = {}
    for count in (6, 9, 14):  # as 1, 2 and 3 shards, of which not all are of one size
        own = {"key": (Value("string"), [f"k{index}" for index in range(count)])}
        for name, columns in (("plain", {}), ("own", own)):
            folder = tmp_path / f"{name}{count}"
            dataset(range(count), **columns).save_to_disk(folder)
            keys[name, count] = list(made.accounted(str(folder))[0])
    for name in ("plain", "own"):
        assert keys[name, 14][:9] == keys[name, 9] and keys[name, 9][:6] == keys[name, 6]
        assert len(set(keys[name, 14])) == 14


def test_numbers_of_classes_become_their_names(tmp_path):
    kind = ClassLabel(names=["cat", "dog"])
    (tmp_path / "set").mkdir()
    dataset(label=(kind, [0, 1, 0, 1, -1, None])).to_parquet(tmp_path / "set" / "train.parquet")
    for name in (f"hf:{tmp_path}/set", f"{tmp_path}/set/train.parquet"):
        kept, tally = made.accounted(name, caption_key="label")
        assert (list(kept.values()), tally.left_out) == (["cat", "dog"] * 2, {"no caption": 2})


def test_paths_that_lead_out_of_the_dataset_are_not_opened(tmp_path):
    (tmp_path / "passport.png").write_bytes(made.encoded(0))
    inside = tmp_path / "set" / "images" / "a.png"
    made.write_table(
        tmp_path / "set" / "train.parquet",
        [
            {"image": {"bytes": None, "path": str(path)}, "text": "a caption"}
            for path in (
                tmp_path / "passport.png",
                f"{tmp_path}/set/../passport.png",
                "https://example.org/a.png",
                f"zip://a.png::{tmp_path}/other.zip",
                "hf://datasets/user/private@main/a.png",
                inside,
            )
        ],
    )
    kept, tally = made.accounted(f"hf:{tmp_path}/set")
    assert not kept
    # Python's own words for the missing file show that it alone was asked for.
    assert tally.left_out.pop(LED_OUT) == 5 and str(inside) in str(tally.left_out)


def test_a_link_in_a_dataset_leads_nowhere_else(tmp_path):
    (tmp_path / "passport.png").write_bytes(made.encoded(0))
    folder = tmp_path / "set"
    made.metadata_jsonl(folder)
    (folder / "000.png").unlink()
    (folder / "000.png").symlink_to(tmp_path / "passport.png")
    kept, tally = made.accounted(f"hf:{folder}")
    assert (len(kept), tally.left_out) == (made.NUM_IMAGES - 1, {LED_OUT: 1})


def test_a_dataset_with_a_script_is_refused_in_a_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    made.metadata_jsonl(folder)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"cannot be opened: it is loaded by a Python script of its own, which is never"
    ):
        open_source("hf:mine")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["data/mien", "./mine", "hf:imagefolder", "hf:./mine", "hf:/mine", "hf:a/b/c", "hf:"]
)
def test_only_names_of_the_hub_reach_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=r"hf:USER/NAME"):
        open_source(name)
