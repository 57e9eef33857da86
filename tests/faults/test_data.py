"""Faults of data: shards that rotted, were made by others or come over a bad line; odd pictures and captions."""

import errno
import io
import itertools
import json
import logging
import os
import random
import shlex
import shutil
import signal
import socket
import struct
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import made_sources as made
import numpy as np
import processes
import pytest
import torch
import tyro
from PIL import Image
from streaming import MDSWriter
from streaming.base.storage.download import LocalDownloader
from tqdm import tqdm

from t2i import env
from t2i.commands.prepare import PrepareCommand
from t2i.config import ASSETS, DataConfig, PrepareConfig
from t2i.data.loader import StepLoader
from t2i.data.prepare import images as preparing
from t2i.data.prepare.encode import column_kinds
from t2i.data.prepare.images import prepare
from t2i.data.shards import remote
from t2i.data.shards.integrity import LookAhead, check_listing, read_index, remake_command
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import fetch_shards, read_split
from t2i.data.sources import open_source
from t2i.distributed import heartbeat as ranks
from t2i.distributed.shared_memory import sweep
from t2i.errors import DataError, LostRankError, UserError
from t2i.files import HASH, file_hash
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
DS_CONFIG = ROOT / "ds_configs" / "zero2_fp32.json"


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "image_tokenizer": ImageTokenizer.load(ASSETS / "image_tokenizer"),
        "text_tokenizer": TextTokenizer.load(ASSETS / "text_tokenizer"),
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizers):
    """A shard folder of six shards."""
    folder = tmp_path_factory.mktemp("small")
    source = open_source(made.text_folder(folder / "pictures"), heldout_share=0.2)
    prepare(source, out=folder / "shards", config=PrepareConfig(unit_pairs=6), **tokenizers)
    return folder / "shards"


@pytest.fixture
def copy(small, tmp_path):
    shutil.copytree(small, tmp_path / "shards")
    return tmp_path / "shards"


def step_loader(folder, *, global_batch=4, **settings):
    manifest = read_manifest(folder)
    return StepLoader(
        DataConfig(shards=folder, seq_len=90, **settings),
        layout=VocabLayout(2048, 2048, manifest.codebook_size),
        global_batch=global_batch,
        world_size=1,
        seed=0,
        tokenizer=TextTokenizer.load(folder / "text_tokenizer"),
    )


def keys_of_an_epoch(loader, num_batches=4):
    return {key for batch in itertools.islice(iter(loader), num_batches) for key in batch["key"]}


def flip(path, *, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def shard_files(folder, split="train"):
    return sorted((folder / split).rglob("*.mds"))


@pytest.mark.fault(
    12,
    "stale shared memory of a killed run, and a living neighbour",
    injected="SIGKILL to the group of one of two processes that have a data set open",
    expected="the dead one's files are swept, the neighbour reads on",
)
def test_dead_runs_memory_is_swept_and_a_neighbours_is_not(small, observed, caplog):
    living, dead = OpenLoader(small), OpenLoader(small)
    assert living.read() and dead.read()
    os.killpg(dead.process.pid, signal.SIGKILL)  # with Python's own process that would clean up after it
    dead.process.join(10)
    assert all(path.exists() for path in dead.files), "nobody cleans up after SIGKILL"
    for path in (*dead.files, *living.files):
        os.utime(path, (1, 1))  # as if both had begun long ago
    with caplog.at_level(logging.INFO, "t2i"):
        removed = set(sweep())
    assert not any(path.exists() for path in dead.files)  # by this sweep, or that of a run beside these tests
    assert not living.files & removed and all(path.exists() for path in living.files)
    assert living.read()
    third = OpenLoader(small)
    assert third.read()
    for one in (living, third):
        one.end()
    observed(f"{len(dead.files)} files of the dead run removed, {len(living.files)} of the neighbour's kept")


def test_a_data_set_holds_nothing_of_another_open(small):
    first = step_loader(small)
    held = files_open(first)
    others = [step_loader(small) for _ in range(3)]
    assert held and files_open(first) == held
    assert len(others) == 3  # alive until here


def files_open(loader):
    """List this process's open files of shared memory that a loader's data set made."""
    number = loader.streams[0].loader.dataset._shm_prefix_int
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.append(descriptor.readlink().name)
    return sorted(name for name in found if name.startswith(f"{number:06d}_"))


class OpenLoader:
    """A process that has a loader open and reads a batch when it is asked to."""

    def __init__(self, folder):
        before = self._files()
        self.pipe, other = processes.FORK.Pipe()
        self.process = processes.fork(_read_when_asked, folder, other)
        assert self.pipe.recv() == "open"
        self.prefix = self.pipe.recv()
        self.files = {path for path in self._files() - before if path.name.startswith(f"{self.prefix:06d}_")}
        assert self.files

    def _files(self):
        return {*Path("/dev/shm").iterdir(), *Path(tempfile.gettempdir()).glob("*_filelock")}

    def read(self):
        self.pipe.send("read")
        return len(self.pipe.recv()) == 4

    def end(self):
        self.pipe.send("end")
        self.process.join(20)


def _read_when_asked(folder, pipe):
    os.setsid()
    # A process group that an earlier test left came along with the fork, but without the threads that serve it.
    torch.distributed.distributed_c10d._update_default_pg(None)
    loader = step_loader(folder)
    batches = iter(loader)
    keys = next(batches)["key"]
    pipe.send("open")
    pipe.send(loader.streams[0].loader.dataset._shm_prefix_int)
    while pipe.recv() == "read":
        keys = next(batches)["key"]
        pipe.send(keys)


@pytest.mark.fault(
    13,
    "/dev/shm too small",
    injected="a /dev/shm of 32 MB in a mount namespace of its own",
    expected="exit 2 before the launch: MB needed, MB there, Docker's flag",
)
@pytest.mark.slow
def test_too_little_shared_memory_is_said_before_the_launch(shards, tmp_path, observed):
    mount = "mount -t tmpfs -o size=32m tmpfs /dev/shm"
    if processes.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    command = f"{mount} && exec {sys.executable} launchers/train.py --ds_config {DS_CONFIG}"
    command += f" --run-dir {tmp_path / 'run'} --data.shards {shards}"
    done = processes.run(["unshare", "-m", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "/dev/shm has 34 MB free; 1 ranks on CPUs need 78 MB" in done.stderr
    assert "--shm-size" in done.stderr and "Traceback" not in done.stderr
    observed(f"exit 2: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.fault(
    27,
    "a flipped bit in a shard",
    injected="100 single bits of shards, at random, one at a time",
    expected="exit 3 before a sample is read: shard, both hashes, the command that makes it again",
)
def test_every_flipped_bit_is_found_before_a_sample_is_read(copy, observed):
    chance, found = random.Random(0), 0
    manifest = read_manifest(copy)
    for _ in range(100):
        split = chance.choice(["train", "heldout"])
        path = chance.choice(shard_files(copy, split))
        at, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, at=at, bit=bit)
        keys = []
        with pytest.raises(DataError) as caught:
            keys.extend(sample["key"] for sample in read_split(copy, split))
        damaged = path.relative_to(copy).as_posix()
        assert not {key for key in keys if key in keys_of(copy, damaged)}
        wanted = next(shard.xxh64 for shard in read_index(copy, split) if shard.name == damaged)
        for fact in (str(path), file_hash(path), wanted, remake_command(copy, manifest)):
            assert fact in str(caught.value)
        found += 1
        flip(path, at=at, bit=bit)
    assert len(list(read_split(copy, "train"))) == manifest.counts["train"]
    observed(f"{found} of 100 found, each names its shard")


def keys_of(folder, name):
    """Read the keys of one shard, whatever its hash."""
    shard = next(one for one in read_index(folder, name.split("/")[0]) if one.name == name)
    keys = []
    for place in range(len(shard.reader)):
        try:
            keys.append(shard.reader[place]["key"])
        except (ValueError, IndexError):
            continue
    return keys


@pytest.mark.fault(
    27,
    "a flipped bit in a shard that a run reads",
    injected="one bit of a training shard, then of a held-out one, before a run",
    expected="the run ends with code 3 and has not trained on it",
)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_run_ends_at_a_shard_that_rotted(split, shards, finished, tmp_path, observed):
    shutil.copytree(shards, tmp_path / "shards")
    path = shard_files(tmp_path / "shards", split)[0]
    flip(path, at=-9)
    config = replace(
        finished, run_dir=tmp_path / "run", data=replace(finished.data, shards=tmp_path / "shards")
    )
    with pytest.raises(DataError, match=rf"{path} has xxh64 \w+; expected \w+\. Move .*prepare\.py") as error:
        train(config, ds_config_path=DS_CONFIG)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("failed", 3, 0)
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
    observed(f"code 3 at step {status['step']}: {str(error.value)[-180:]}")


@pytest.mark.fault(
    27,
    "a flipped bit, met by a loader's process",
    injected="one bit of each training shard; two loader processes",
    expected="the same sentence, without the process's traceback",
)
def test_loader_processes_say_the_sentence_alone(copy, observed):
    for path in shard_files(copy):
        flip(path, at=-9)
    loader = step_loader(copy, num_workers=2)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    loader.close()  # no signal ends them, and this process would wait for them at its end
    assert str(caught.value).startswith(f"{copy}/train/unit_")
    assert "Traceback" not in str(caught.value)
    observed(str(caught.value)[:120])


@pytest.mark.fault(
    27,
    "a flipped bit in a shard that a run will not read for days",
    injected="one bit of a training shard while batches come from others",
    expected="the thread that looks ahead finds it; what it found right is not hashed again",
)
def test_looking_ahead_finds_what_is_not_read_yet(copy, observed, monkeypatch):
    manifest = read_manifest(copy)
    ahead = LookAhead(copy, manifest=manifest)
    ahead.run()
    ahead.check()
    verified = json.loads((copy / "verified.json").read_text())
    assert len(verified) == len(shard_files(copy)) + len(shard_files(copy, "heldout"))
    hashed = []
    monkeypatch.setattr(
        "t2i.data.shards.integrity.file_hash", lambda path: hashed.append(path) or file_hash(path)
    )
    path = shard_files(copy)[-1]
    flip(path, at=-9)
    loader = step_loader(copy)
    loader.streams[0].look_aheads.append(ahead)
    ahead.run()
    assert hashed == [path]
    with pytest.raises(DataError, match=str(path)):
        next(iter(loader))
    observed("found by hashing that one shard alone")


def truncate(folder):
    path = shard_files(folder)[0]
    path.write_bytes(path.read_bytes()[:-1])
    return path


def remove(folder):
    path = shard_files(folder)[0]
    path.unlink()
    return path


def add(folder):
    path = shard_files(folder)[0].with_name("shard.00001.mds")
    path.write_bytes(b"")
    return path


def break_index(folder):
    path = folder / "train" / "index.json"
    path.write_bytes(path.read_bytes()[:-3])
    return path


def remove_index(folder):
    path = folder / "train" / "index.json"
    path.unlink()
    return path


def shorten_index(folder):
    """Take a shard out of the index, as if it had never been; the manifest of an old version hashes no index."""
    path = folder / "train" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "shards": index["shards"][1:]}))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["train/index.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.fault(
    28,
    "a truncated, missing or additional shard; a broken index",
    injected="each of six, before a run",
    expected="exit 3 at the start, with the file's name and the command that makes it again",
)
@pytest.mark.parametrize("damage", [truncate, remove, add, break_index, remove_index, shorten_index])
def test_what_is_missing_or_too_much_is_said_at_the_start(damage, copy, observed):
    check_listing(copy, read_manifest(copy))
    path = damage(copy)
    with pytest.raises(DataError) as caught:
        check_listing(copy, read_manifest(copy))
    assert str(path) in str(caught.value)
    assert "Move" in str(caught.value) and "launchers/prepare.py --source" in str(caught.value)
    observed(str(caught.value).split(" Move ")[0].replace(str(copy), "SHARDS"))


@pytest.mark.fault(
    28,
    "a truncated shard in a run",
    injected="one byte off a training shard, before a run",
    expected="exit 3 before the model is built",
)
def test_a_run_checks_sizes_before_it_builds_a_model(shards, finished, tmp_path, observed, monkeypatch):
    shutil.copytree(shards, tmp_path / "shards")
    path = truncate(tmp_path / "shards")
    monkeypatch.setattr("t2i.train.main.build_model", lambda *args, **settings: pytest.fail("too late"))
    config = replace(
        finished, run_dir=tmp_path / "run", data=replace(finished.data, shards=tmp_path / "shards")
    )
    with pytest.raises(DataError, match=rf"{path} has \d+ bytes; expected \d+") as caught:
        train(config, ds_config_path=DS_CONFIG)
    assert caught.value.exit_code == 3
    observed("code 3, no model was built")


@pytest.mark.fault(
    29,
    "a number outside its range in a shard whose hash is right",
    injected="a shard of a stranger with the caption id 70000, the code 70000, too few codes",
    expected="exit 3: sample, number, allowed range",
)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"caption_ids": [70_000]}, r"caption ids up to 70000; expected 0 to 2047"),
        ({"codes": [70_000] * 64}, r"codes up to 70000; expected 0 to 1023"),
        ({"codes": [0] * 63}, r"has 63 codes; expected 64"),
    ],
)
def test_numbers_outside_their_range_end_a_run(change, sentence, copy, tokenizers, observed):
    shutil.rmtree(copy / "train")
    kinds = {"key": "str", "caption": "str", "caption_ids": "ndarray:uint32", "codes": "ndarray:uint32"}
    with MDSWriter(out=str(copy / "train"), columns=kinds, hashes=[HASH]) as writer:
        for place in range(8):
            row = {"caption_ids": [5], "codes": [0] * 64} | (change if place == 3 else {})
            arrays = {name: np.array(values, dtype=np.uint32) for name, values in row.items()}
            writer.write({"key": f"sample {place}", "caption": "a caption", **arrays})
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["counts"]["train"] = 8
    manifest["files"]["train/index.json"] = file_hash(copy / "train" / "index.json")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    check_listing(copy, read_manifest(copy))
    with pytest.raises(DataError, match=f"train: sample sample 3 .*{sentence}") as caught:
        keys_of_an_epoch(step_loader(copy), num_batches=2)
    observed(str(caught.value).replace(str(copy), "SHARDS"))


@pytest.mark.fault(
    30,
    "shards made by another tokenizer",
    injected="the image tokenizer's folder replaced; the manifest names another one",
    expected="exit 3, both names",
)
def test_shards_of_another_tokenizer_are_refused(shards, finished, tmp_path, observed):
    shutil.copytree(shards, tmp_path / "shards")
    path = tmp_path / "shards" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["image_tokenizer"]["fingerprint"] = "0123456789ab" * 5
    path.write_text(json.dumps(manifest))
    config = replace(
        finished, run_dir=tmp_path / "run", data=replace(finished.data, shards=tmp_path / "shards")
    )
    with pytest.raises(
        DataError, match=r"made by another image tokenizer \(0123456789ab\) than .*\(\w{12}\)"
    ) as one:
        train(config, ds_config_path=DS_CONFIG)
    shutil.copy(shards / "manifest.json", path)
    flip(tmp_path / "shards" / "text_tokenizer" / "tokenizer.json", at=-9)
    with pytest.raises(DataError, match=r"text_tokenizer/tokenizer\.json has xxh64"):
        train(replace(config, run_dir=tmp_path / "other"), ds_config_path=DS_CONFIG)
    observed(str(one.value).replace(str(tmp_path), ""))


def bad_images():
    """Bytes of pictures that cannot be read, and of odd ones that can, by what they are."""
    jpeg, png = made.encoded(0, "JPEG"), made.encoded(1)
    bad = {
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "no bytes": b"",
        "text": b"no picture",
        "PNG with a broken chunk": png[:40] + b"\xff\xff\xff\xff" + png[44:],
        "TGA": encoded(made.picture(2), "TGA"),
        "JPEG with broken EXIF": broken_exif(),
    }
    turned = Image.Exif()
    turned[0x0112] = 6
    odd = {
        "CMYK": encoded(made.picture(3).convert("CMYK"), "JPEG"),
        "16 bits": encoded(Image.fromarray(np.full((60, 90), 40_000, np.uint16)), "PNG"),
        "animated": encoded(made.picture(4), "WEBP", save_all=True, append_images=[made.picture(5)]),
        "turned": encoded(made.picture(6), "JPEG", exif=turned),
        "two pixels": encoded(Image.new("RGB", (2, 2), "red"), "PNG"),
        "palette with transparency": encoded(made.picture(7).convert("P"), "PNG", transparency=0),
        "grey": encoded(made.picture(8).convert("L"), "PNG"),
    }
    return bad, odd


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def broken_exif():
    body = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 9)[:7]
    jpeg = made.encoded(9, "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.fault(
    31,
    "bad and odd pictures",
    injected="six files that cannot be read and seven odd ones among 40",
    expected="the bad are listed with a reason, the odd become RGB; too many bad ones end with exit 3",
)
def test_bad_images_are_listed_and_odd_ones_become_rgb(tmp_path, tokenizers, observed):
    bad, odd = bad_images()
    folder = Path(made.text_folder(tmp_path / "pictures"))
    for name, content in {**bad, **odd}.items():
        (folder / f"{name}.jpg").write_bytes(content)
        (folder / f"{name}.txt").write_text(name)
    source = open_source(str(folder), heldout_share=0.2)
    with pytest.raises(
        DataError,
        match=r"of 37 images are broken .*expected at most 10%\. Run again with a larger --max-broken",
    ):
        prepare(source, out=tmp_path / "shards", config=PrepareConfig(), **tokenizers)
    manifest = prepare(source, out=tmp_path / "shards", config=PrepareConfig(max_broken=0.5), **tokenizers)
    lines = (tmp_path / "shards" / "broken.jsonl").read_text().splitlines()
    listed = {json.loads(line)["key"]: json.loads(line)["reason"] for line in lines}
    assert set(listed) >= {f"{name}.jpg" for name in set(bad) - {"JPEG with broken EXIF"}}
    assert manifest.broken == len(listed) and all(listed.values())
    kept = {
        sample["key"] for split in ("train", "heldout") for sample in read_split(tmp_path / "shards", split)
    }
    assert {f"{name}.jpg" for name in odd} <= kept
    pictures = {pair.caption: pair.open().image for pair in source.pairs if pair.caption in odd}
    assert {image.mode for image in pictures.values()} == {"RGB"}
    assert pictures["turned"].size == (60, 90)
    observed(f"{len(listed)} listed, {len(odd)} odd ones kept")


CAPTIONS = {
    "empty": b"  \n ",
    "long": b"word " * 10_000,
    "emoji": "👩🏿‍🚀 and 🏳️‍🌈".encode(),
    "nul": b"before\0after",
    "not utf-8": b"caf\xe9 \xff\xfe",
    "markers": b"<image> </image> <doc> <|endoftext|> <|padding|> <pad>",
}


@pytest.mark.fault(
    32,
    "odd captions",
    injected="empty, 10,000 words, emoji, NUL, bytes that are not UTF-8, text equal to markers",
    expected="left out and counted, or encoded without a special id; a picture is never cut for it",
)
def test_odd_captions_never_become_special_ids(tmp_path, tokenizers, observed):
    folder = Path(made.text_folder(tmp_path / "pictures"))
    for place, (name, content) in enumerate(CAPTIONS.items()):
        (folder / f"{name}.png").write_bytes(made.encoded(place))
        (folder / f"{name}.txt").write_bytes(content)
    source = open_source(str(folder), heldout_share=0.0)
    manifest = prepare(source, out=tmp_path / "shards", config=PrepareConfig(), **tokenizers)
    assert manifest.left_out == {"no caption": 1}
    samples = {
        sample["key"].removesuffix(".png"): sample for sample in read_split(tmp_path / "shards", "train")
    }
    special = {0, 1}  # <|endoftext|>, <|padding|>
    for name in CAPTIONS.keys() - {"empty"}:
        assert special.isdisjoint(samples[name]["caption_ids"].tolist()), name
        assert "\0" not in samples[name]["caption"]
    text = tokenizers["text_tokenizer"]
    assert text.decode(text.encode(samples["markers"]["caption"])) == CAPTIONS["markers"].decode()
    loader = step_loader(tmp_path / "shards", global_batch=len(samples), caption_dropout=0.0)
    layout = loader.streams[0].loader.dataset.layout
    for ids in next(iter(loader))["input_ids"]:
        assert layout.is_image()[ids].sum() == 64
        assert layout.is_special()[ids].sum() == 6
    observed(f"{len(CAPTIONS) - 1} encoded without a special id, 1 left out")


@pytest.mark.fault(
    33,
    "one of two preparing processes killed",
    injected="SIGKILL to the second while it encodes its second unit",
    expected="the first says so; the same command does only what is missing; every byte as undisturbed",
)
def test_a_killed_preparation_ends_as_if_undisturbed(tmp_path, small, tokenizers, observed, monkeypatch):
    source = open_source(str(small.with_name("pictures")), heldout_share=0.2)
    settings = {"config": PrepareConfig(unit_pairs=6), "out": tmp_path / "shards", **tokenizers}
    write = preparing.write_unit

    def die_at_three(part, index, **rest):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(part, index, **rest)

    monkeypatch.setattr(preparing, "write_unit", die_at_three)
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 1.0)
    second = processes.fork(prepare, source, **settings, rank=1, world_size=2)
    with pytest.raises(LostRankError, match="rank 1 has pending work .* run the same command"):
        prepare(source, rank=0, world_size=2, **settings)
    second.join(20)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("units/*.json")}
    written = []
    monkeypatch.setattr(
        preparing,
        "write_unit",
        lambda part, index, **rest: written.append(index) or write(part, index, **rest),
    )
    prepare(source, **settings)
    assert len(done) + len(written) == 4
    for path in small.rglob("*"):
        if path.is_file():
            assert (tmp_path / "shards" / path.relative_to(small)).read_bytes() == path.read_bytes()
    observed(f"units {written} done again, {len(done)} kept, all bytes equal")


@pytest.fixture
def bad_line(monkeypatch):
    """Make the downloads of shards fail; returns a list of what to do at each, the last for ever."""
    plan = []
    download = LocalDownloader._download_file_impl

    def flaky(self, source, local, timeout):
        what = (plan.pop(0) if len(plan) > 1 else plan[0]) if plan and source.endswith(".mds") else "work"
        if what == "fail":
            raise TimeoutError("the line is dead")
        download(self, source, local, timeout)
        if what == "garble":
            flip(Path(local), at=-9)

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", flaky)
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.01)
    return plan


@pytest.mark.fault(
    34,
    "shards over a bad line",
    injected="downloads that fail twice or arrive broken once; then for ever",
    expected="tried again, each attempt logged; else exit 3 with the address; nothing broken stays in the cache",
)
def test_downloads_are_tried_again_and_nothing_broken_stays(small, tmp_path, bad_line, observed, caplog):
    bad_line += ["fail", "garble", "fail", "work"]
    cache = tmp_path / "cache"
    fetch_shards(cache, remote=str(small))
    keys = keys_of_an_epoch(step_loader(cache, remote=str(small)))
    assert keys <= {sample["key"] for sample in read_split(small, "train")}
    assert caplog.text.count("attempt 1 of 5 failed") >= 1 and "the line is dead" in caplog.text
    for path in shard_files(cache):
        assert path.read_bytes() == (small / path.relative_to(cache)).read_bytes()
    flip(shard_files(cache)[0], at=-9)  # what is in the cache is no more trusted than what arrives
    keys_of_an_epoch(step_loader(cache, remote=str(small)))
    assert shard_files(cache)[0].read_bytes() == shard_files(small)[0].read_bytes()
    for what, reason in (("fail", "the line is dead"), ("garble", "it arrived with xxh64")):
        bad_line[:] = [what]
        other = tmp_path / what
        fetch_shards(other, remote=str(small))
        with pytest.raises(
            DataError, match=rf"{small}/train/\S+\.mds could not be .* 5 attempts: .*{reason}"
        ):
            next(iter(step_loader(other, remote=str(small))))
        assert not list(other.rglob("*.mds"))
    observed("two failures and a broken arrival survived; then code 3 with the address, cache empty")


@pytest.mark.fault(
    35,
    "fewer samples than one step takes",
    injected="a batch of 64 sequences from 19 training pairs",
    expected="exit 2 with both numbers",
)
def test_too_few_samples_are_refused(small, observed):
    count = read_manifest(small).counts["train"]
    with pytest.raises(UserError, match=rf"has {count} training sequences; one step takes 64") as caught:
        step_loader(small, global_batch=64)
    assert caught.value.exit_code == 2
    observed(str(caught.value).replace(str(small), "SHARDS"))


def test_a_limit_of_a_cache_without_a_remote_would_delete_the_only_copy(small):
    with pytest.raises(UserError, match=r"data.cache_limit is 1gb; expected None while data.remote is empty"):
        step_loader(small, cache_limit="1gb")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_to_is_hashed_each_time(number, copy, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "t2i.data.shards.integrity.file_hash", lambda path: hashed.append(path) or file_hash(path)
    )

    def look_ahead():
        ahead = LookAhead(copy, manifest=read_manifest(copy))
        ahead.run()
        ahead.check()
        done, hashed[:] = sorted(hashed), []
        return done

    def refuse(path, value):  # permissions would stop nobody who runs as root
        raise OSError(number, os.strerror(number))

    every = sorted([*shard_files(copy), *shard_files(copy, "heldout")])
    with monkeypatch.context() as patched:
        patched.setattr("t2i.data.shards.integrity.write_json", refuse)
        assert [look_ahead() for _ in range(3)] == [every] * 3
        assert not (copy / "verified.json").exists()
    assert [look_ahead(), look_ahead()] == [every, []]  # written to, it is hashed once


def test_every_column_that_is_written_may_be_read(tokenizers):
    from t2i.data.prepare.encode import Encoder
    from t2i.data.shards.integrity import COLUMNS

    kinds = column_kinds(
        Encoder(
            **tokenizers, config=PrepareConfig(), codebook_size=1024, pool=None, progress=tqdm(disable=True)
        )
    )
    assert all(kind in COLUMNS[name] for name, kind in kinds.items())


def test_the_command_that_makes_shards_again_makes_the_same(small):
    words = shlex.split(remake_command(small, read_manifest(small)))
    command = tyro.cli(PrepareCommand, args=words[2:])
    assert command.out == small and command.shards == PrepareConfig(unit_pairs=6)
    assert (command.heldout_share, command.source) == (0.2, str(small.with_name("pictures")))


@pytest.mark.fault(
    11,
    "the port is taken",
    injected="a socket that listens on it",
    expected="exit 2: the port, and a free one",
)
def test_a_taken_port_is_said_with_a_free_one(observed, monkeypatch, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(
            UserError, match=rf"port {port}, .* Start with deepspeed --master_port \d+"
        ) as caught:
            env.check_machine({}, run_dir=tmp_path)
    assert env.port_problem(port) == ""
    observed(str(caught.value))


@pytest.mark.fault(
    14,
    "no compiler",
    injected="a PATH without g++ and ninja, and no operators built",
    expected="exit 2: what is missing and what brings it",
)
def test_a_missing_compiler_is_said(observed, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(env.shutil, "which", lambda tool: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(
        UserError, match=r"g\+\+ and ninja not found.*deepspeed_shm_comm, fused_adam.*apt-get"
    ) as one:
        env.check_machine({}, run_dir=tmp_path)
    observed(str(one.value))
