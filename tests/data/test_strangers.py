"""Whatever bytes a stranger's file has, it is read or refused in a sentence: never another error."""

import json
from contextlib import suppress
from pathlib import Path

import made_sources as made
import pytest
from fuzz.fuzz_sources import check
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from t2i.cli import flags_of
from t2i.config import ASSETS
from t2i.data.shards.integrity import check_listing, read_index, remake_command
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import read_split
from t2i.data.sources import UNREADABLE, Tally, decode_image, open_source
from t2i.data.sources.caption import LeftOut, read_captions
from t2i.errors import CheckpointError, DataError, UserError
from t2i.files import parse_json
from t2i.runs import checkpoint_store as checkpoints
from t2i.tokens.text import TextTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
often = settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw, values):
    """A JSON text like the given one, with a value replaced or removed, some bytes changed, or its end torn off."""
    copy = json.loads(json.dumps(values))
    node, way = copy, []
    while isinstance(node, dict | list) and node and (not way or draw(st.booleans())):
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        way.append((node, key))
        node = node[key]
    kind = draw(st.sampled_from(["value", "removed", "bytes", "torn"]))
    if way and kind == "value":
        way[-1][0][way[-1][1]] = draw(plain)
    elif way and kind == "removed":
        del way[-1][0][way[-1][1]]
    return damaged(draw, json.dumps(copy).encode(), kind)


def damaged(draw, content, kind):
    content = bytearray(content)
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 4))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    if kind == "torn":
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


@st.composite
def damaged_bytes(draw, content):
    return damaged(draw, content, draw(st.sampled_from(["bytes", "torn"])))


@pytest.fixture(scope="module")
def example_manifest(shards):
    return json.loads((shards / "manifest.json").read_text())


@given(text=st.binary(max_size=200) | st.text(max_size=200) | plain.map(json.dumps))
@example(text="[" * 100_000)
@example(text="1" * 5_000)
@often
def test_json(text):
    with suppress(DataError):
        assert isinstance(parse_json(text, where="x"), dict)


@given(data=st.data())
@often
def test_manifests_of_shards(data, example_manifest, tmp_path):
    content = data.draw(st.binary(max_size=50) | changed(example_manifest))
    (tmp_path / "manifest.json").write_bytes(content)
    with suppress(DataError):
        manifest = read_manifest(tmp_path)
        assert remake_command(tmp_path, manifest).startswith("python launchers/prepare.py --source")
        check_listing(tmp_path, manifest)


@given(data=st.data())
@often
def test_indexes_of_shards(data, shards, tmp_path):
    index = json.loads((shards / "train" / "index.json").read_text())
    (tmp_path / "train").mkdir(exist_ok=True)
    (tmp_path / "train" / "index.json").write_bytes(data.draw(st.binary(max_size=50) | changed(index)))
    with suppress(DataError):
        for shard in read_index(tmp_path, "train"):
            assert (tmp_path / shard.name).resolve().is_relative_to(tmp_path.resolve())
            assert shard.reader.column_names
        list(read_split(tmp_path, "train"))


@given(data=st.data())
@often
def test_manifests_of_checkpoints(data, tmp_path):
    files = {
        "config.json": {"bytes": 2, "xxh64": "0" * 16},
        "engine/state.pt": {"bytes": 3, "xxh64": "1" * 16},
    }
    content = data.draw(st.binary(max_size=50) | changed({"step": 3, "files": files, "world_size": 1}))
    (tmp_path / "manifest.json").write_bytes(content)
    (tmp_path / "config.json").write_bytes(b"{}")
    with suppress(CheckpointError):
        checkpoints.verify(tmp_path)
        assert not json.loads(content)["files"], "no file has such a hash"


@pytest.fixture(scope="module")
def text_tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


@given(caption=plain | st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
@example(caption="<|endoftext|><|padding|> <image> </text>")
@example(caption="\ud800")
@often
def test_captions(caption, text_tokenizer):
    with suppress(LeftOut):
        check_caption(read_captions(caption, takes_all=False, encoding="cp1252")[0].text, text_tokenizer)


def check_caption(text, text_tokenizer):
    assert text == " ".join(text.split()) and "\0" not in text
    assert {0, 1}.isdisjoint(text_tokenizer.encode(text).tolist())


def opened(source):
    """List all pairs of a source that may be broken."""
    with suppress(DataError):
        for unit in open_source(source).units(8):
            for pair in unit(Tally()):
                assert pair.key.encode() and pair.caption.encode()


def test_tables_of_images(tmp_path):
    made.write_table(tmp_path / "as.parquet", made.rows(image="image")[:4])
    whole = (tmp_path / "as.parquet").read_bytes()

    @given(content=damaged_bytes(whole))
    @often
    def check(content):
        (tmp_path / "x.parquet").write_bytes(content)
        opened(str(tmp_path / "x.parquet"))

    check()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_metadata_beside_images(name, tmp_path):
    made.metadata_jsonl(tmp_path)
    made.write_table(tmp_path / "as.parquet", made.rows())
    whole = {
        "metadata.jsonl": (tmp_path / "metadata.jsonl").read_bytes(),
        "metadata.csv": b'file_name,text\r\n000.png,a caption\r\n001.png,"another, one"\r\n',
        "metadata.parquet": (tmp_path / "as.parquet").read_bytes(),
    }[name]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "as.parquet").unlink()

    @given(
        content=st.binary(max_size=60)
        | damaged_bytes(whole)
        | plain.map(lambda value: json.dumps(value).encode())
    )
    @example(content=b'{"file_name": "000.png", "text": "a"}\n{"file_name": ')
    @example(content=b'{"file_name": {"a": 1}, "text": ["b"]}')
    @example(content=b"file_name,text\n" + b"x" * 200_000)
    @often
    def check(content):
        (tmp_path / name).write_bytes(content)
        opened(str(tmp_path))

    check()


@given(data=st.data())
@often
def test_annotations_of_coco(data, tmp_path):
    if not (tmp_path / "coco").exists():
        made.coco(tmp_path / "coco")
    file = sorted((tmp_path / "coco" / "annotations").glob("*.json"))[0]
    note = {"image_id": 3, "id": 5, "caption": "x"}
    content = {"images": [{"id": 3, "file_name": "COCO_train2014_000000000003.jpg"}], "annotations": [note]}
    file.write_bytes(data.draw(changed(content)))
    opened(f"coco:{tmp_path / 'coco'}")


@pytest.mark.parametrize("kind", ["ustar", "gnu", "pax"])
def test_tars(kind, tmp_path):
    @given(content=st.binary(max_size=600) | damaged_bytes(made.small_tars()[kind]))
    @often
    def check(content):
        for one in (made.resealed(content), content):
            (tmp_path / "x.tar").write_bytes(one)
            opened(str(tmp_path / "x.tar"))

    check()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images(kind):
    whole = made.encoded(1, kind)

    @given(content=st.binary(max_size=60) | damaged_bytes(whole))
    @often
    def check(content):
        with suppress(*UNREADABLE):
            assert decode_image(content).image.mode == "RGB"

    check()


yaml_text = st.text(alphabet="abN01-:_.~&*!|>{}[],'\"?%@#\n \t=<é", max_size=60)


@given(
    content=st.binary(max_size=60)
    | yaml_text.map(str.encode)
    | plain.map(lambda value: json.dumps(value).encode())
)
@example(content=b"a: &a [*a]")
@example(content=b"a: !!timestamp 2020-99-99")
@example(content=b"a: !!int x")
@example(content=b"? !!set {a: b}\n: c")
@example(content=b"[" * 5_000)
@often
def test_run_files(content, tmp_path):
    file = Path(tmp_path) / "x.yaml"
    file.write_bytes(content)
    with suppress(UserError):
        assert all(isinstance(word, str) for word in flags_of(file))


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_random_sources_are_read_as_they_were_made(first, tmp_path):
    for seed in range(first, first + 40):
        check(seed, tmp_path / str(seed))
