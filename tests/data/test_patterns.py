"""Patterns of file names, and keys that are unique in whatever they name."""

from dataclasses import replace

import made_sources as made
import pytest

from t2i.data.shards.manifest import Manifest, TextMaker
from t2i.data.sources import reopen_source
from t2i.data.sources.pattern import expand, key_prefixes
from t2i.errors import DataError, UserError


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_patterns_name_files_in_order(tmp_path):
    touch(*(tmp_path / name for name in ("a/08.tar", "a/09.tar", "a/10.tar", "b/08.tar")))
    with pytest.raises(DataError, match=r"b/09\.tar is not `openmoji`"):
        expand(f"{tmp_path}/{{b,a}}/{{08..09}}.tar")
    assert [path.name for path in expand(f"{tmp_path}/a/{{08..10}}.tar")] == ["08.tar", "09.tar", "10.tar"]
    assert [path.name for path in expand(f"{tmp_path}/a/{{10..09}}.tar")] == ["10.tar", "09.tar"]
    assert [path.parent.name for path in expand(f"{tmp_path}/{{b,a}}/*8.tar")] == ["b", "a"]
    assert [path.name for path in expand(f"{tmp_path}/**/*9.tar")] == ["09.tar"]
    with pytest.raises(UserError, match=r"has the range \{0\.\.99999999\}; expected at most 1,000,000"):
        expand(f"{tmp_path}/{{0..99999999}}.tar")
    (tmp_path / "b" / "._08.tar").touch()
    assert [path.name for path in expand(f"{tmp_path}/b/*")] == ["08.tar"]
    assert [path.name for path in expand(f"{tmp_path}/b/.*")] == ["._08.tar"]
    (tmp_path / "c.tar").mkdir()
    with pytest.raises(DataError, match=r"names .*c\.tar, which is not a file"):
        expand(f"{tmp_path}/*.tar")


@pytest.mark.parametrize("folder", ["my [set]", "my {v1}", "{a,b}", "what*", "[set]/[1-3]"])
def test_names_that_exist_are_taken_literally(folder, tmp_path):
    files = [tmp_path / folder / name for name in ("1.tar", "2.tar", "[a] {b,c}.tar")]
    touch(*files)
    for file in files:
        assert expand(str(file)) == [file]
    assert expand(f"{tmp_path}/{folder}/*.tar") == files
    assert expand(f"{tmp_path}/{folder}/{{1..2}}.tar") == files[:2]
    assert expand(f"{tmp_path}/{folder}/[[]a]*") == files[2:]


def test_keys_begin_with_what_tells_files_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["x/a/train/0.tar", "x/b/train/0.tar", "x/b/test/0.tar"]
    touch(*(tmp_path / name for name in names))

    def prefixes(pattern):
        return list(key_prefixes(expand(pattern), pattern=pattern).values())

    assert prefixes("x/{a,b}/*/0.tar") == ["a/train/0", "b/test/0", "b/train/0"]
    assert prefixes("x/a/*/0.tar") == ["train/0"]
    # A file keeps its keys when others are added, by whatever way its folder is written.
    assert (
        prefixes("x/b/test/*.tar")
        == prefixes("x/b/test/0.tar")
        == prefixes("./x/../x/b/test/0.tar")
        == ["test/0"]
    )
    monkeypatch.chdir(tmp_path / "x" / "b")
    assert prefixes("{train,test}/0.tar") == ["train/0", "test/0"]
    assert prefixes("../a/train/0.tar") == ["train/0"]
    monkeypatch.chdir("test")
    assert prefixes("0.tar") == prefixes("*.tar") == ["test/0"]


@pytest.mark.parametrize("has_keys", [True, False])
def test_two_downloads_of_the_same_names_lose_nothing(has_keys, tmp_path):
    for index, name in enumerate(("seta", "setb")):
        content = made.rows(image="image")[12 * index : 12 * index + 12]
        keys = [{"key": f"{place:09d}"} if has_keys else {} for place in range(12)]
        content = [{**row, **key} for row, key in zip(content, keys, strict=True)]
        made.write_table(tmp_path / name / "train-00000-of-00001.parquet", content)
    pattern = f"{tmp_path}/{{seta,setb}}/train-00000-of-00001.parquet"
    kept, tally = made.accounted(pattern)
    assert (len(kept), tally.seen) == (24, 24)
    alone = made.accounted(pattern.replace("{seta,setb}", "seta"))[0]
    assert alone.keys() <= kept.keys()
    # As long as they are alone, the keys do not depend on the way that they are named.
    assert alone.keys() == made.accounted(tmp_path / "seta")[0].keys()


def test_shards_of_0_1_find_their_images_by_the_keys_that_they_had(tmp_path):
    rows = [{**row, "key": f"{place:09d}"} for place, row in enumerate(made.rows(image="image"))]
    made.write_table(tmp_path / "keyed" / "a.parquet", rows)
    made.write_table(tmp_path / "plain" / "a.parquet", made.rows(image="image"))
    for name, old, new in (("keyed", "000000007", "keyed/a/000000007"), ("plain", "a/1/2", "plain/a/1/2")):
        manifest = Manifest(
            source=str(tmp_path / name), heldout_share=0.1, counts={}, text_tokenizer=TextMaker("", "", 1),
            floors_nats={}, files={}, arguments={}, seen=24,
        )  # fmt: skip
        assert reopen_source(manifest).pairs[7].key == new
        # They count nothing as seen.
        assert reopen_source(replace(manifest, seen=None)).pairs[7].key == old
