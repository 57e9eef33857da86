"""A preparation that is killed, runs out of disk, meets another one, or whose source changed: nothing is ever mixed."""

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import made_sources as made
import processes
import pytest
from huggingface_hub import HfApi
from streaming import StreamingDataset
from streaming.base.util import merge_index

from t2i.config import ASSETS, DataConfig, PrepareConfig, SourceConfig
from t2i.data.prepare import decode, images
from t2i.data.prepare.advice import advice_lines
from t2i.data.prepare.images import prepare
from t2i.data.prepare.part_folder import is_claimed
from t2i.data.prepare.preview import LookedAt, sample_images
from t2i.data.prepare.text import prepare_text
from t2i.data.shards.accounts import account_lines, by_kind, check_accounts, most_frequent, num_pairs
from t2i.data.shards.captions import truncation
from t2i.data.shards.integrity import remake_command
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import check_shards
from t2i.data.sources import Tally, open_source, opening, reopen_source
from t2i.data.sources.documents import open_documents
from t2i.data.sources.listing import make_listing
from t2i.errors import CheckpointError, DataError, UserError
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer

KILLED = 99
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


@pytest.fixture(scope="module")
def text_tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


@pytest.fixture(scope="module")
def image_tokenizer():
    return ImageTokenizer.load(ASSETS / "image_tokenizer")


@pytest.fixture
def of_ids(tmp_path, text_tokenizer):
    """Arguments of prepare: codes in three units, of which two repeat keys of the first."""
    folder = tmp_path / "ids"
    folder.mkdir()
    (folder / "ids.json").write_text(json.dumps({"vocab_size": 9, "length": 2, "made_by": "a test"}))
    for name, keys in {"a": "abcd", "b": "cdef", "c": "ab"}.items():
        write_ids(folder / f"{name}.jsonl", keys)
    return {
        "source": open_source(f"ids:{folder}", heldout_share=0.7),
        "image_tokenizer": None,
        "text_tokenizer": text_tokenizer,
        "config": PrepareConfig(),
    }


def write_ids(file, keys):
    rows = ({"ids": [ord(key) % 9, 1], "caption": f"{key} thing", "key": key} for key in keys)
    file.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def of_images(tmp_path, image_tokenizer, text_tokenizer):
    """Make arguments of prepare for a folder of 24 captioned images; takes what differs."""

    def arguments(heldout_share=0.2, **changes):
        folder = tmp_path / "images"
        if not folder.exists():
            made.text_folder(folder)
        return {
            "source": open_source(str(folder), heldout_share=heldout_share),
            "out": tmp_path / "shards",
            "image_tokenizer": image_tokenizer,
            "text_tokenizer": text_tokenizer,
            "config": PrepareConfig(unit_pairs=8, **changes),
        }

    return arguments


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def watch_changes(folder, *, do):
    """Call do(event) before each change of a file below a folder, for the rest of this process."""

    def hook(event, details):
        is_change = event in CHANGES or (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR))
        if is_change and str(details[0]).startswith(str(folder)):
            do(event)

    sys.addaudithook(hook)


def prepare_and_die(place, folder, arguments):
    """Prepare, and die before the change of this number; with 0, only count the changes."""
    count = itertools.count(1)
    watch_changes(folder, do=lambda _: os._exit(KILLED) if next(count) == place else None)
    prepare(**arguments)
    os.write(os.open(folder.with_name("count"), os.O_CREAT | os.O_WRONLY), str(next(count) - 1).encode())


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_change_of_a_file_ends_in_the_same_bytes(step, tmp_path, of_ids):
    whole = tmp_path / "0"
    processes.fork(prepare_and_die, 0, whole, of_ids | {"out": whole / "out"}).join(60)
    num_changes = int((tmp_path / "count").read_text())
    assert num_changes > 60
    for place in range(1, num_changes + 1, step):
        arguments = of_ids | {"out": tmp_path / str(place) / "out"}
        killed = processes.fork(prepare_and_die, place, tmp_path / str(place), arguments)
        killed.join(60)
        assert killed.exitcode == KILLED
        prepare(**arguments)
        assert contents(arguments["out"]) == contents(whole / "out"), place
        assert list(arguments["out"].parent.iterdir()) == [arguments["out"]]
    assert check_shards(whole / "out") == read_manifest(whole / "out").counts


def prepare_on_full_disks(folder, step, arguments, told):
    """Prepare on a disk that is full from some change on, which is freed then; put what was said into a queue."""
    room = itertools.repeat(True)

    def fill(event):
        if event in ("open", "os.mkdir") and not next(room, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watch_changes(folder, do=fill)
    for place in itertools.count(0, step):
        room = itertools.repeat(True, place)
        out = folder / str(place) / "out"
        try:
            prepare(**arguments, out=out)
            break
        except OSError as error:
            said = str(error)
        room = itertools.repeat(True)
        prepare(**arguments, out=out)
        told.put((place, said, contents(out) == contents(folder.with_name("whole"))))
    told.put(None)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_is_said_of_the_folder_that_is_written(step, tmp_path, of_ids):
    prepare(**of_ids, out=tmp_path / "whole")
    told = processes.FORK.Queue()
    process = processes.fork(prepare_on_full_disks, tmp_path / "disk", step, of_ids, told)
    results = list(iter(lambda: told.get(timeout=120), None))
    process.join(60)
    assert len(results) > 30 / step
    for place, said, is_same in results:
        part = tmp_path / "disk" / str(place) / "out.part"
        assert said.startswith(f"{part} cannot be written: No space left on device. Free some"), said
        assert is_same, place


def test_a_second_preparation_of_the_same_folder_is_refused_by_name(tmp_path, of_ids, monkeypatch):
    arguments = of_ids | {"out": tmp_path / "shards"}
    begun, may_end = processes.FORK.Event(), processes.FORK.Event()
    write = images.write_unit

    def wait(part, index, **settings):
        begun.set()
        may_end.wait(60)
        write(part, index, **settings)

    monkeypatch.setattr(images, "write_unit", wait)
    first = processes.fork(prepare, **arguments)
    assert begun.wait(60)
    with pytest.raises(
        UserError, match=rf"shards\.part is being written by process {first.pid} on .* another --out"
    ):
        prepare(**arguments)
    part = tmp_path / "shards.part"
    assert is_claimed(part, rank=0) and not is_claimed(part, rank=1)
    may_end.set()
    first.join(60)
    assert first.exitcode == 0
    assert not is_claimed(part, rank=0)
    check_shards(tmp_path / "shards")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "file"], "--out file exists and is no shard folder"),
        (["--out", "file/shards"], "file cannot be written: Not a directory"),
        (["--source", "text:docstrings", "--out", "file/shards"], "file cannot be written: Not a directory"),
        (["--out", "shards", "--image-size", 60], "image size 60 is no multiple of the tokenizer's 8"),
        (["--out", "shards", "--text-tokenizer", "nowhere"], "nowhere is no text tokenizer"),
    ],
)
def test_what_cannot_be_is_refused_before_a_source_is_listed(
    words, said, tmp_path, call, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for place in ("t2i.data.sources.open_source", "t2i.data.sources.documents.open_documents"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("it was listed"))
    assert call("launchers/prepare.py", *words) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_disks_without_locks_or_modes_serve(tmp_path, of_ids, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    for name in ("lockf", "flock"):
        monkeypatch.setattr(fcntl, name, refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    prepare(**of_ids, out=tmp_path / "shards")
    assert "shards.part cannot be locked (Function not implemented)" in caplog.text


def test_a_folder_is_renamed_when_no_file_in_it_is_open(tmp_path, of_ids, monkeypatch):
    rename = Path.rename

    def refuse_open(path, target):
        if any(is_open_below(one, path) for one in Path("/proc/self/fd").iterdir()):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_open)
    prepare(**of_ids, out=tmp_path / "shards")
    check_shards(tmp_path / "shards")


def is_open_below(descriptor, path):
    try:
        return path in descriptor.readlink().parents
    except FileNotFoundError:  # that of the listing
        return False


def test_an_empty_folder_and_a_link_are_places_for_shards_and_others_are_not(tmp_path, of_ids, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other_disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other_disk" / "shards")
    for name in ("empty", "link"):
        prepare(**of_ids, out=tmp_path / name)
        check_shards(tmp_path / name)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "other_disk" / "shards").is_dir()
    with pytest.raises(UserError, match="ids exists and is no shard folder; choose another name"):
        prepare(**of_ids, out=tmp_path / "ids")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(UserError, match="top of a disk; name a folder below it: --out .*disk/shards"):
        prepare(**of_ids, out=tmp_path / "disk")


def test_every_file_has_the_mode_of_the_umask(tmp_path, of_images):
    before = os.umask(0o027)
    try:
        prepare(**of_images())
    finally:
        os.umask(before)
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "shards").rglob("*") if path.is_file()
    }
    assert {name for name, mode in modes.items() if mode != 0o640} == set()


def test_streamings_own_tools_read_shards(tmp_path, of_images):
    prepare(**of_images())
    shards = tmp_path / "shards"
    counts = read_manifest(shards).counts
    before = (shards / "train" / "index.json").read_bytes()
    merge_index(str(shards / "train"))
    assert (shards / "train" / "index.json").read_bytes() == before
    for split in ("train", "heldout"):
        shutil.copytree(shards / split, tmp_path / "both" / split)
    merge_index(str(tmp_path / "both"))
    dataset = StreamingDataset(local=str(tmp_path / "both"), batch_size=1)
    assert len({sample["key"] for sample in dataset}) == sum(counts.values()) == made.NUM_IMAGES


@pytest.mark.parametrize("is_begun", [True, False])
def test_a_source_that_changed_is_refused_with_what_changed(is_begun, tmp_path, of_images, monkeypatch):
    arguments = of_images()
    write = images.write_unit

    def die(part, index, **settings):
        if index == 1:
            raise KeyboardInterrupt
        write(part, index, **settings)

    if is_begun:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(images, "write_unit", die)
            prepare(**arguments)
    else:
        prepare(**arguments)
    folder = tmp_path / "images"
    for name in ("000.png", "001.png", "002.png"):
        (folder / name).unlink()
    for index in range(50, 60):
        (folder / f"{index:03d}.png").write_bytes(made.encoded(1))
        (folder / f"{index:03d}.txt").write_text("new")
    (folder / "010.txt").write_text("another caption")
    what = r"3 removed, 10 added \(such as 050\.png\), 1 changed \(such as 010\.png\)\."
    advice = (
        "remove .*shards.part to begin anew" if is_begun else "choose another --out, or move .*shards away"
    )
    with pytest.raises(DataError, match=f"images has changed since .*: {what} .*{advice}"):
        prepare(**of_images())
    assert is_begun or check_shards(tmp_path / "shards")


def test_an_image_of_another_size_or_time_is_noticed(tmp_path, of_images, caplog):
    prepare(**of_images())
    image = tmp_path / "images" / "003.png"
    os.utime(image, (1, 1))
    prepare(**of_images())
    assert (
        "1 files of --source" in caplog.text
        and "(such as 003.png) have another time of change" in caplog.text
    )
    image.write_bytes(made.encoded(3) + b"more")
    with pytest.raises(DataError, match=r"1 changed \(such as 003\.png\)"):
        prepare(**of_images())


def test_a_file_of_many_pairs_that_changed_is_noticed(tmp_path, of_ids):
    prepare(**of_ids, out=tmp_path / "shards")
    write_ids(tmp_path / "ids" / "d.jsonl", "xyz")
    grown = of_ids | {"source": open_source(of_ids["source"].name, heldout_share=0.7)}
    with pytest.raises(DataError, match=r"1 added \(such as ids/d\.jsonl\)"):
        prepare(**grown, out=tmp_path / "shards")


def test_each_entry_is_accounted_for(tmp_path, of_images, monkeypatch):
    of_images()
    (tmp_path / "images" / "005.png").write_bytes(b"no image")
    (tmp_path / "images" / "007.txt").write_text(" ")
    manifest = prepare(**of_images(views=2))
    assert (manifest.seen, manifest.broken, manifest.left_out) == (made.NUM_IMAGES, 1, {"no caption": 1})
    assert num_pairs(manifest.counts, views=2) == made.NUM_IMAGES - 2
    lines = account_lines(tmp_path / "shards", manifest)
    assert lines[0].endswith("shards/manifest.json):") and lines[1] == "  1 time no caption"
    assert lines[2].endswith("shards/broken.jsonl):") and "1 time UnidentifiedImageError" in lines[3]
    with pytest.raises(DataError, match="22 kept, 1 left out and 1 broken are 24; expected the 25 entries"):
        check_accounts(replace(manifest, seen=25), where=tmp_path)
    (tmp_path / "shards" / "broken.jsonl").write_text("")
    with pytest.raises(DataError, match=r"broken\.jsonl lists 0 images; expected 1"):
        check_shards(tmp_path / "shards")


def test_an_entry_that_a_reader_loses_is_missed(tmp_path, of_images):
    arguments = of_images()
    first = arguments["source"].units(8)[0]
    lossy = replace(arguments["source"], units=lambda num: [lambda tally: list(first(tally))[1:]])
    with pytest.raises(DataError, match="7 kept, 0 left out and 0 broken are 7; expected the 24 entries"):
        prepare(**arguments | {"source": lossy})


def test_the_most_frequent_reasons_come_first_and_the_rest_is_counted():
    reasons = {f"reason {place}": place for place in range(1, 14)}
    lines = most_frequent(reasons)
    assert lines[0] == "13 times reason 13" and lines[-1] == "3 more reasons" and len(lines) == 11


@pytest.mark.parametrize(
    ("num_images", "num_heldout"), [(1, 0), (2, 0), (20, 8), (50, 20), (60, 24), (200, 24), (900, 24)]
)
def test_a_small_source_holds_out_what_can_be_measured(num_images, num_heldout, tmp_path):
    pairs = held_out(tmp_path, range(num_images))
    assert sum(pairs.values()) == num_heldout and len(pairs) == num_images


def held_out(folder, indexes):
    """Tell for each key of a source of ids whether it is held out by default."""
    folder.mkdir(exist_ok=True)
    (folder / "ids.json").write_text(json.dumps({"vocab_size": 9, "length": 2, "made_by": "a test"}))
    rows = ({"ids": [1, 2], "key": str(index)} for index in indexes)
    (folder / "only.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {pair.key: pair.split == "heldout" for pair in open_source(f"ids:{folder}").pairs}


def test_a_grown_source_moves_no_image_from_training_to_what_is_held_out(tmp_path):
    before = held_out(tmp_path, range(60))
    for size in (61, 73, 100, 400, 1_199, 1_500):
        after = held_out(tmp_path, range(size))
        assert all(before[key] for key, is_held in after.items() if is_held and key in before)
        before = after


def test_what_cannot_be_measured_is_said(tmp_path, of_images, caplog):
    manifest = prepare(**of_images(heldout_share=0.0))
    said = list(advice_lines(manifest, is_share_chosen=False))
    assert said[0].startswith("Captions have up to 5 text tokens; --data.seq-len 75 truncates none")
    assert said[1].startswith("0 of 24 pairs are held out (--heldout-share 0). Scores need at least 20")
    grown = replace(manifest, counts={"train": 90, "heldout": 10})
    assert "use --heldout-share 0.24 and another --out" in list(advice_lines(grown, is_share_chosen=False))[1]
    with pytest.raises(
        DataError, match=r"no pair of --source .*: of 24, .* 24 held out by --heldout-share 0\.999"
    ):
        prepare(**of_images(heldout_share=0.999999) | {"out": tmp_path / "none"})


@pytest.mark.parametrize("num_images", [1, 5])
def test_equal_images_are_said(num_images, tmp_path, of_images, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(num_images):
        (folder / f"{index}.png").write_bytes(made.encoded(1))
        (folder / f"{index}.txt").write_text("the same")
    manifest = prepare(**of_images(heldout_share=0.0))
    assert manifest.counts == {"train": num_images}
    sentence = "only one pair to train on" if num_images == 1 else "all 5 images of .* have the same codes"
    assert re.search(sentence, caplog.text)


def test_a_caption_of_which_the_tokenizer_leaves_nothing_is_left_out_and_counted(
    tmp_path, of_images, text_tokenizer, monkeypatch
):
    arguments, encode = of_images(), TextTokenizer.encode
    caption = (tmp_path / "images" / "003.txt").read_text().strip()
    # As SentencePiece's rules do with a zero-width space alone.
    monkeypatch.setattr(
        TextTokenizer, "encode", lambda self, text: encode(self, "" if text == caption else text)
    )
    prepare(**arguments)
    manifest = read_manifest(tmp_path / "shards")
    assert (manifest.seen, sum(manifest.counts.values())) == (24, 23)
    assert manifest.left_out == {"a caption without a token": 1}
    check_shards(tmp_path / "shards")


def test_a_run_says_how_many_captions_it_truncates(tmp_path, of_images, text_tokenizer):
    of_images()
    (tmp_path / "images" / "004.txt").write_text("word " * 300)
    manifest = prepare(**of_images())
    assert sum(manifest.caption_tokens.values()) == made.NUM_IMAGES
    longest = max(map(int, manifest.caption_tokens))
    config = DataConfig(shards=tmp_path / "shards", seq_len=90)
    said = truncation(config, manifest, text_tokenizer)
    assert f"1 of 24 captions are longer (up to {longest})" in said
    enough = replace(config, seq_len=longest + 70)
    assert f"--data.seq-len {enough.seq_len} keeps all" in said
    assert not truncation(enough, manifest, text_tokenizer)


def test_a_relative_source_is_found_from_any_folder(tmp_path, of_images, monkeypatch):
    arguments = of_images()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    prepare(**arguments | {"source": open_source("images", heldout_share=0.2)})
    manifest = read_manifest(tmp_path / "shards")
    monkeypatch.chdir("elsewhere")
    assert manifest.source == "images"
    assert [pair.key for pair in reopen_source(manifest).pairs] == [
        pair.key for pair in arguments["source"].pairs
    ]
    assert f"--source {tmp_path}/images" in remake_command(tmp_path / "shards", manifest)
    # Typed otherwise, it is the same source.
    prepare(**arguments | {"source": open_source("../images", heldout_share=0.2)})
    (tmp_path / "images").rename(tmp_path / "elsewhere" / "images")  # a project that was moved
    assert reopen_source(manifest).pairs[0].open().image.size == (90, 60)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="prepared from, images, which is neither where it was nor in"):
        reopen_source(manifest)


@pytest.mark.parametrize(
    ("columns", "keys"),
    [({}, ["000003", "000000/000003", "000000/000003"]), ({"key": "abcdef"}, ["000003/d", "000000/d", "d"])],
)
def test_older_shards_of_a_saved_dataset_find_their_images_by_the_keys_that_they_had(
    columns, keys, tmp_path, of_images
):
    """Those of now, those from before keys had the row's number in the whole, and those of 0.1."""
    cells = [{"bytes": made.encoded(index), "path": None} for index in range(6)]
    texts = {"text": [made.caption(index) for index in range(6)]} | {
        name: list(column) for name, column in columns.items()
    }
    datasets.Dataset.from_dict({"image": cells, **texts}).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), config=SourceConfig(image_key="image"))
    prepare(**of_images() | {"source": source})
    manifest = read_manifest(tmp_path / "shards")
    arguments = {key: value for key, value in manifest.arguments.items() if key != "keys"}
    older = replace(manifest, arguments=arguments)
    found = [reopen_source(one).pairs[3].key for one in (manifest, older, replace(older, seen=None))]
    assert found == keys
    older.write(tmp_path / "shards")
    prepare(**of_images() | {"source": source})  # finished shards stay as they are
    assert read_manifest(tmp_path / "shards").arguments == arguments


def test_a_source_that_changed_is_warned_of_when_its_images_are_read_again(tmp_path, of_images, caplog):
    prepare(**of_images())
    (tmp_path / "images" / "003.png").unlink()
    reopen_source(read_manifest(tmp_path / "shards"))
    assert "images has changed since its shards were made (24 entries" in caplog.text


def test_documents_that_changed_are_refused_and_doubles_are_counted(tmp_path, text_tokenizer):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(60):
        (folder / f"{index}.txt").write_text(f"Document number {index // 2} tells of many small things.")

    def pack():
        documents = open_documents(f"text:{folder}")
        return prepare_text(
            documents, out=tmp_path / "out", text_tokenizer=text_tokenizer, seq_len=8, heldout_share=0.3
        )

    manifest = pack()
    assert (manifest.seen, manifest.left_out) == (60, {"a document that was there before": 30})
    assert check_shards(tmp_path / "out") == manifest.counts
    assert pack() == manifest
    (folder / "7.txt").unlink()
    with pytest.raises(DataError, match=r"has changed since .*/out was made: 1 removed\."):
        pack()


def test_reasons_that_differ_in_numbers_are_one_kind():
    found = by_kind(["truncated (3 bytes)", "no image", "truncated (7 bytes)"])
    assert found == {"truncated (3 bytes)": 2, "no image": 1}


def test_a_finished_folder_that_was_never_swept_is_swept(tmp_path, of_ids):
    arguments = of_ids | {"out": tmp_path / "shards"}
    prepare(**arguments)
    before = contents(tmp_path / "shards")
    unit = next((tmp_path / "shards" / "train").glob("unit_*"))
    shutil.copytree(unit, unit.with_name("unit_000009"))
    (tmp_path / "shards" / "units").mkdir()
    with pytest.raises(DataError, match="unit_000009/shard.00000.mds is not in train/index.json"):
        check_shards(tmp_path / "shards")
    prepare(**arguments)
    assert contents(tmp_path / "shards") == before


def test_progress_counts_pairs_and_knows_their_number_before_the_first_unit_is_done(of_images, capsys):
    prepare(**of_images())
    said = capsys.readouterr().err
    assert "| 0/24 [" in said and "| 24/24 [" in said
    assert said.index("unit 1 of 3") < said.index("unit 2 of 3") < said.index("unit 3 of 3")


def test_a_preview_is_spread_over_a_source_of_one_unit(of_images):
    source = of_images()["source"]
    found = sample_images(source, config=PrepareConfig(), num=3, looked=LookedAt())
    assert [pair.key for pair, _ in found] == ["000.png", "008.png", "016.png"]


def test_a_source_that_changes_while_it_is_prepared_is_refused(tmp_path, of_ids, monkeypatch):
    write = images.write_unit

    def change(part, index, **settings):
        write(part, index, **settings)
        write_ids(tmp_path / "ids" / "b.jsonl", "cdefgh")

    monkeypatch.setattr(images, "write_unit", change)
    with pytest.raises(
        DataError, match=r"has changed since .*\.part was begun: 1 changed \(such as ids/b\.jsonl\)"
    ):
        prepare(**of_ids, out=tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_a_dataset_of_another_commit_is_another_source(monkeypatch):
    found = []
    for commit in ("one", "one", "two"):
        monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, sha=commit: SimpleNamespace(sha=sha))
        found.append(make_listing(opening._list_dataset("user/name", 2)).fingerprint)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("key", "value"),
    [("caption_tokens", {"long": 1}), ("left_out", {"no caption": "1"}), ("prepare", {"views": 0})],
)
def test_counts_of_a_forged_manifest_are_refused(key, value, tmp_path, of_ids):
    prepare(**of_ids, out=tmp_path / "shards")
    file = tmp_path / "shards" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(DataError, match=f"manifest.json: {key} says .*; expected a whole number"):
        read_manifest(tmp_path / "shards")


def test_processes_that_cannot_be_started_are_not_blamed_on_the_shards_disk(tmp_path, of_images, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(decode, "ProcessPoolExecutor", refuse)
    with pytest.raises(
        CheckpointError, match="2 decoding processes cannot be started: No space left .* /dev/shm"
    ):
        prepare(**of_images(workers=2))


def test_what_was_changed_is_counted_of_kept_pairs_alone(tmp_path, of_images):
    arguments = of_images()
    first, second = arguments["source"].units(8)[:2]

    def changed(unit, tally):
        return [replace(pair, changed=("a guess",)) for pair in unit(tally)]

    units = [partial(changed, first), partial(changed, second), partial(changed, first)]
    counted = Tally(seen=24)
    source = replace(arguments["source"], units=lambda _: units, tally=counted)
    manifest = prepare(**arguments | {"source": source})
    assert (manifest.changed, manifest.left_out) == ({"a guess": 16}, {"a key that was there before": 8})


@pytest.mark.parametrize(
    ("number", "is_lost"), [(errno.ESTALE, False), (errno.EMFILE, False), (errno.EACCES, True)]
)
def test_an_image_that_the_disk_hides_for_a_moment_is_not_counted_as_broken(number, is_lost, tmp_path):
    def hidden():
        raise OSError(number, os.strerror(number), "a.png")

    pair = SimpleNamespace(open=hidden)
    if is_lost:
        assert decode.decode(pair, config=PrepareConfig()).broken
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            decode.decode(pair, config=PrepareConfig())
