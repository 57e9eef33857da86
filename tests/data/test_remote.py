"""Training from shards that lie elsewhere: in another folder, and in a bucket of a real S3 server started here."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import boto3
import made_sources as made
import processes
import pytest
from botocore.exceptions import BotoCoreError

from t2i.config import ASSETS, DataConfig, PrepareConfig
from t2i.data.loader import StepLoader
from t2i.data.prepare.images import prepare
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import fetch_shards, read_split
from t2i.data.sources import open_source
from t2i.errors import DataError, UserError
from t2i.measure.perplexity import data_of
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
PORT = processes.free_port()
ADDRESS = f"http://127.0.0.1:{PORT}"
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "S3_ENDPOINT_URL": ADDRESS,
}


@pytest.fixture(scope="module")
def bucket(shards):
    """Serve a copy of the shards as s3://bucket/shards; yields the client."""
    server = processes.start(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patched:
        for name, value in SETTINGS.items():
            patched.setenv(name, value)
        client = boto3.client("s3", endpoint_url=ADDRESS)
        try:
            _wait(client, server)
            client.create_bucket(Bucket="bucket")
            upload(client, shards, "shards")
            yield client
        finally:
            processes.end(server)


def upload(client, folder, name):
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), "bucket", f"{name}/{path.relative_to(folder)}")


def _wait(client, server):
    for _ in range(120):
        assert server.poll() is None, "the S3 server has ended"
        try:
            client.list_buckets()
            return
        except BotoCoreError:
            time.sleep(0.5)
    raise AssertionError("the S3 server does not answer")


@pytest.fixture
def remote(request, shards):
    """Where the shards lie: in another folder, or in the bucket."""
    if request.param == "folder":
        return str(shards)
    request.getfixturevalue("bucket")
    return "s3://bucket/shards"


@pytest.mark.parametrize("remote", ["folder", pytest.param("bucket", marks=pytest.mark.s3)], indirect=True)
def test_a_run_from_elsewhere_equals_a_run_from_here(remote, finished, shards, tmp_path):
    data = replace(finished.data, shards=tmp_path / "cache", remote=remote)
    config = replace(finished, run_dir=tmp_path / "run", data=data)
    train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    found, wanted = (read_metrics(one.run_dir) for one in (config, finished))
    for key in ("loss", "image_loss"):
        assert [row.get(key) for row in found] == [row.get(key) for row in wanted]
    assert read_manifest(data.shards) == read_manifest(shards)
    for name in ("roundtrip.safetensors", "image_tokenizer/config.json", "text_tokenizer/tokenizer.json"):
        assert (data.shards / name).read_bytes() == (shards / name).read_bytes()
    assert (config.run_dir / "image_tokenizer" / "config.json").is_file()
    measured_on = data_of(open_model(str(config.run_dir), needs_images=False), shards=None, mode=None)
    assert (measured_on.shards, measured_on.remote) == (data.shards, remote)


@pytest.mark.s3
def test_the_cache_stays_below_its_limit(bucket, tmp_path):
    prepare(
        open_source(made.text_folder(tmp_path / "pictures"), heldout_share=0.0),
        out=tmp_path / "small",
        image_tokenizer=ImageTokenizer.load(ASSETS / "image_tokenizer"),
        text_tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer"),
        config=PrepareConfig(unit_pairs=2),
    )
    upload(bucket, tmp_path / "small", "small")
    index_bytes = (tmp_path / "small" / "train" / "index.json").stat().st_size
    shard_bytes = max(path.stat().st_size for path in (tmp_path / "small").rglob("*.mds"))
    limit = index_bytes + 6 * shard_bytes  # of twelve
    config = DataConfig(shards=tmp_path / "cache", seq_len=90, remote="s3://bucket/small", cache_limit="10b")
    fetch_shards(config.shards, remote=config.remote)
    settings = {
        "layout": VocabLayout(2048, 2048, read_manifest(config.shards).codebook_size),
        "global_batch": 2,
        "world_size": 1,
        "seed": 0,
        "tokenizer": TextTokenizer.load(config.shards / "text_tokenizer"),
    }
    with pytest.raises(UserError, match="cannot be read: Minimum cache usage"):
        StepLoader(config, **settings)
    keys = set()
    for batch in islice(iter(StepLoader(replace(config, cache_limit=f"{limit}b"), **settings)), 12):
        keys.update(batch["key"])
        assert len(list(config.shards.rglob("*.mds"))) <= 6
    assert len(keys) == made.NUM_IMAGES


@pytest.mark.s3
def test_only_shards_that_hold_wanted_samples_are_brought(bucket, shards, tmp_path):
    fetch_shards(tmp_path, remote="s3://bucket/shards")
    assert not list(tmp_path.rglob("*.mds"))
    remote = [
        sample["key"]
        for sample in read_split(tmp_path, "heldout", num_samples=3, remote="s3://bucket/shards")
    ]
    assert remote == [sample["key"] for sample in read_split(shards, "heldout", num_samples=3)]
    assert list(read_split(tmp_path, "combinations", remote="s3://bucket/shards")) == []
    assert all(path.parent.parent.name == "heldout" for path in tmp_path.rglob("*.mds"))


@pytest.mark.s3
def test_what_is_not_there_or_broken_or_changed_is_named(bucket, shards, tmp_path):
    with pytest.raises(DataError, match=r"s3://bucket/nowhere/manifest\.json cannot be downloaded"):
        fetch_shards(tmp_path / "a", remote="s3://bucket/nowhere")
    with pytest.raises(DataError, match="cannot be downloaded: Unsupported remote path"):
        fetch_shards(tmp_path / "b", remote="ftp://bucket/shards")
    upload(bucket, shards, "broken")
    bucket.put_object(Bucket="bucket", Key="broken/roundtrip.safetensors", Body=b"other")
    with pytest.raises(
        DataError, match=r"broken/\S+ could not be downloaded in 5 attempts: it arrived with xxh64"
    ):
        fetch_shards(tmp_path / "c", remote="s3://bucket/broken")
    assert not (tmp_path / "c" / "manifest.json").exists()
    fetch_shards(tmp_path / "d", remote="s3://bucket/shards")
    fetch_shards(tmp_path / "d", remote="s3://bucket/shards")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    (tmp_path / "d" / "manifest.json").write_text(json.dumps({**manifest, "source": "another"}))
    with pytest.raises(DataError, match="caches other shards than those of s3://bucket/shards"):
        fetch_shards(tmp_path / "d", remote="s3://bucket/shards")
