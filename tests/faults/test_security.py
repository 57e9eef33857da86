"""What strangers' files may try: run code, leave their folder, fill memory, pose as special tokens."""

import io
import json
import os
import re
import shutil
import struct
import tarfile
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import made_sources as made
import numpy as np
import pytest
import torch
import xxhash
from streaming import MDSWriter

from t2i.cli import flags_of
from t2i.config import SourceConfig
from t2i.convert.released import read_weights
from t2i.data.shards.reader import read_split
from t2i.data.sources import Tally, decode_image, open_source
from t2i.data.sources import webdataset as reading
from t2i.errors import CheckpointError, DataError, UserError
from t2i.runs.checkpoint_manifest import SealedFile, read_checkpoint_manifest
from t2i.runs.loading import find, open_model
from t2i.runs.trust import check_owner
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
DS_CONFIG = ROOT / "ds_configs" / "zero2_fp32.json"
SOURCES = [path for folder in ("t2i", "launchers", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]


class Evil:
    """Pickled, it makes a file when it is read the careless way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_evil_object_does_what_these_tests_are_afraid_of(tmp_path):
    torch.save({"weight": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.fault(
    41,
    "a checkpoint of weights that runs code",
    injected="a pickle with os.mkdir in it, as .pt and in a Hugging Face folder's pytorch_model.bin",
    expected="refused by name, not run",
)
@pytest.mark.parametrize("name", ["evil.pt", "pytorch_model.bin"])
def test_weights_that_run_code_are_refused(name, tmp_path, observed):
    torch.save({"weight": Evil(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds posix\.mkdir beside tensors") as caught:
        read_weights(tmp_path / name if name == "evil.pt" else tmp_path)
    assert not (tmp_path / "ran").exists()
    observed(str(caught.value).replace(str(tmp_path), ""))


@pytest.mark.fault(
    41,
    "a model folder whose weights run code",
    injected="os.mkdir in pytorch_model.bin instead of model.safetensors, then in the image tokenizer's .bin",
    expected="an error, not run",
)
@pytest.mark.parametrize(
    ("whole", "evil"),
    [
        ("model.safetensors", "pytorch_model.bin"),
        (
            "image_tokenizer/diffusion_pytorch_model.safetensors",
            "image_tokenizer/diffusion_pytorch_model.bin",
        ),
    ],
)
def test_model_folders_that_run_code_are_refused(whole, evil, model_folder, tmp_path, observed):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / whole).unlink()
    torch.save({"weight": Evil(tmp_path / "ran")}, folder / evil)
    with pytest.raises(UserError) as caught:
        open_model(str(folder), needs_images=True)
    assert not (tmp_path / "ran").exists()
    observed(f"{type(caught.value).__name__}, not run")


@pytest.mark.fault(
    41,
    "shards with a column of pickles",
    injected="an MDS column of type pkl, with a right hash",
    expected="exit 3: the column and its type, not read",
)
def test_columns_of_pickles_are_never_read(shards, tmp_path, observed):
    shutil.copytree(shards, tmp_path / "shards")
    folder = tmp_path / "shards"
    shutil.rmtree(folder / "train")
    kinds = {"key": "str", "caption": "pkl", "caption_ids": "ndarray:uint16", "codes": "ndarray:uint16"}
    with MDSWriter(out=str(folder / "train"), columns=kinds, hashes=["xxh64"]) as writer:
        ids, codes = np.array([5], np.uint16), np.zeros(64, np.uint16)
        writer.write({"key": "a", "caption": Evil(tmp_path / "ran"), "caption_ids": ids, "codes": codes})
    with pytest.raises(DataError, match="column caption is of type 'pkl', which is never read") as caught:
        list(read_split(folder, "train"))
    assert not (tmp_path / "ran").exists()
    observed(str(caught.value).replace(str(folder), "SHARDS"))


def forge(folder, name, content):
    """Put a file into a checkpoint and make its manifest agree."""
    (folder / name).write_bytes(content)
    manifest = read_checkpoint_manifest(folder)
    manifest.files[name] = SealedFile(len(content), xxhash.xxh64_hexdigest(content))
    (folder / "manifest.json").write_text(manifest.text())


@pytest.fixture
def half_run(finished, tmp_path):
    """A run with a checkpoint at step 3, to be gone on with."""
    config = replace(finished, run_dir=tmp_path / "run")
    shutil.copytree(finished.run_dir, config.run_dir)
    shutil.rmtree(config.run_dir / "checkpoints" / "step_000006")
    return config, config.run_dir / "checkpoints" / "step_000003"


@pytest.mark.fault(
    41,
    "a checkpoint whose optimizer state runs code, under a manifest that agrees",
    injected="os.mkdir in each file of engine/, hashes forged",
    expected="exit 5, not run; the run's own files load under the same restriction",
)
@pytest.mark.parametrize("is_listed", [True, False], ids=["listed first", "read by DeepSpeed"])
@pytest.mark.parametrize("pattern", ["*_optim_states.pt", "*_model_states.pt"])
def test_resuming_never_runs_a_pickle(pattern, is_listed, half_run, tmp_path, monkeypatch, observed):
    config, folder = half_run
    if not is_listed:
        monkeypatch.setattr("t2i.train.checkpoint.check_plain", lambda folder: None)
    path = next((folder / "engine").glob(pattern))
    buffer = io.BytesIO()
    torch.save({**torch.load(path, weights_only=False), "more": Evil(tmp_path / "ran")}, buffer)
    forge(folder, path.relative_to(folder).as_posix(), buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"more than tensors and plain values.*mkdir") as caught:
        train(config, ds_config_path=DS_CONFIG)
    assert not (tmp_path / "ran").exists()
    observed(str(caught.value).replace(str(tmp_path), ""))


@pytest.mark.fault(
    41,
    "a checkpoint folder from elsewhere",
    injected="no manifest; another owner; a file that anyone may write",
    expected="exit 5 with the reason, before anything is loaded",
)
def test_only_this_users_own_checkpoints_are_gone_on_with(half_run, observed):
    config, folder = half_run
    (folder / "config.json").chmod(0o666)
    with pytest.raises(CheckpointError, match=r"config\.json is writable by anyone"):
        train(config, ds_config_path=DS_CONFIG)
    (folder / "config.json").chmod(0o644)
    check_owner(folder)
    if os.getuid() == 0:
        os.chown(folder / "config.json", 12345, -1)
        with pytest.raises(CheckpointError, match="belongs to user 12345, not 0"):
            check_owner(folder)
        os.chown(folder / "config.json", 0, -1)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole: .*manifest\.json cannot be read"):
        train(config, ds_config_path=DS_CONFIG)
    observed("refused: no manifest, another owner, anyone may write")


def header(name, *, kind=tarfile.REGTYPE, size=0, link=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, size, link
    return entry


@pytest.mark.fault(
    42,
    "a tar that leaves its folder",
    injected="../../x, /etc/x, links to /etc/passwd, a device, a pipe, a folder, beside two plain pairs",
    expected="nothing is extracted; the plain pairs are read",
)
def test_tars_are_never_extracted(tmp_path, observed):
    path = tmp_path / "in" / "odd.tar"
    made.write_tar(path, made.tar_members(range(2)))
    with tarfile.open(path, "a") as tar:
        for name in ("../../up", "/etc/t2i-absolute"):
            for suffix, content in ((".png", made.encoded(3)), (".txt", b"a caption")):
                tar.addfile(header(name + suffix, size=len(content)), io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            tar.addfile(header(f"link{kind[0]}.png", kind=kind, link="/etc/passwd"))
            tar.addfile(header(f"link{kind[0]}.txt", kind=kind, link="/etc/passwd"))
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            tar.addfile(header(f"special{kind[0]}.png", kind=kind))
    before = sorted(tmp_path.rglob("*"))
    pairs = open_source(str(path)).pairs
    assert [pair.caption for pair in pairs] == [made.caption(0), made.caption(1), "a caption", "a caption"]
    assert all(pair.open().image.mode == "RGB" for pair in pairs)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/etc/t2i-absolute.png").exists()
    observed(f"{len(pairs)} pairs read in place, no file written")


@pytest.mark.fault(
    42,
    "a tar that fills memory",
    injected="10,000 tiny members; headers that claim 8 GB, or less than nothing; members over the limit",
    expected="a few MB of memory; larger members are left out; the rest is used",
)
def test_tars_fill_no_memory(tmp_path, observed, monkeypatch):
    many = tmp_path / "many.tar"
    made.write_tar(many, [(f"{index:06d}.txt", b"x") for index in range(10_000)])
    for _ in range(3):  # the least counts: threads that earlier tests left in this process allocate too
        tracemalloc.start()
        left_out = left_out_of(many)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert left_out == {"no image beside the caption in a tar": 10_000}
        if peak < 8 * 2**20:
            break
    assert peak < 8 * 2**20
    claim = header("x", kind=tarfile.XHDTYPE, size=8 * 2**30).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "claim.tar").write_bytes(claim + bytes(10_240))
    assert left_out_of(tmp_path / "claim.tar") == {"a broken tar, from where it breaks": 1}
    back = header("y.png", size=-1024).tobuf(tarfile.GNU_FORMAT)  # the next header would be this one's
    (tmp_path / "back.tar").write_bytes(header("x").tobuf() + back + bytes(10_240))
    assert left_out_of(tmp_path / "back.tar")["a broken tar, from where it breaks"] == 1
    monkeypatch.setattr(reading, "MAX_IMAGE_BYTES", 100)
    made.write_tar(tmp_path / "large.tar", made.tar_members(range(2)))
    assert left_out_of(tmp_path / "large.tar") == {"a file over 100 bytes": 2}
    observed(f"peak of {peak / 2**20:.1f} MB for 10,000 members")


def left_out_of(path):
    tally = Tally()
    for unit in open_source(str(path)).units(8):
        list(unit(tally))
    return tally.left_out + tally.unread


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width, height):
    """A PNG of a few hundred bytes that claims so many pixels."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", ihdr)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


DISGUISED = {
    "FITS": b"SIMPLE  =                    T" + b" " * 2850,
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    "SPIDER": struct.pack("<27f", *[1.0] * 27) * 10,
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "XBM": b"#define im_width 8\n#define im_height 8\nstatic char im_bits[] = {0};",
}


@pytest.mark.fault(
    42,
    "pictures that are none, and decompression bombs",
    injected="FITS, PDF, EPS, SPIDER, SVG, XBM named .jpg; PNGs of 60,000 x 60,000 pixels and of a text bomb",
    expected="refused by content, before a pixel is decoded",
)
def test_other_formats_and_bombs_are_refused(observed):
    for name, content in DISGUISED.items():
        with pytest.raises(OSError, match="cannot identify one of JPEG, PNG, WEBP"):
            decode_image(content)
        assert name
    with pytest.raises(ValueError, match=r"60000 x 60000 pixels are over the limit|DecompressionBomb"):
        decode_image(bomb(60_000, 60_000))
    with pytest.raises(ValueError, match="8001 x 8000 pixels exceed the limit of 64000000"):
        decode_image(bomb(8_001, 8_000))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**26), 9))
    png = made.encoded(1)
    tracemalloc.start()
    with pytest.raises((OSError, ValueError)):
        decode_image(png[:33] + text + png[33:])
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    observed(f"{len(DISGUISED)} formats and 3 bombs refused")


@pytest.mark.fault(
    42,
    "lists that name files outside their folder",
    injected="../x, absolute paths, NUL, names of 5,000 characters in metadata and COCO annotations",
    expected="left out and counted",
)
def test_lists_name_only_files_of_their_folder(tmp_path, observed):
    (tmp_path / "outside.png").write_bytes(made.encoded(0))
    names = [
        "../outside.png",
        str(tmp_path / "outside.png"),
        "a\0b",
        "x" * 5_000,
        "",
        "..",
        "\ud800.png",
        "003.png",
    ]
    folder = Path(made.text_folder(tmp_path / "list"))
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": "a caption"}) for name in names)
    )
    source = open_source(str(folder))
    assert [pair.key for pair in source.pairs] == ["003.png"]
    assert source.tally.left_out == {
        "metadata names a file that is not in the folder": len(names) - 2,
        "a row that names no file": 1,
        "an image that the metadata does not name": made.NUM_IMAGES - 1,
    }
    made.coco(tmp_path / "coco")
    file = next((tmp_path / "coco" / "annotations").glob("captions_train*.json"))
    content = json.loads(file.read_text())
    for image, name in zip(content["images"], names[:-1], strict=False):
        image["file_name"] = name
    file.write_text(json.dumps(content))
    source = open_source(f"coco:{tmp_path / 'coco'}")
    assert source.tally.left_out == {"annotations name an image that is not in its folder": len(names) - 1}
    observed(f"{len(names) - 1} names left out of each")


@pytest.mark.fault(
    43,
    "a hub folder with code of its own",
    injected="config.json with auto_map, and a module that makes a file",
    expected="the module is never imported",
)
def test_remote_code_is_never_run(model_folder, tmp_path, observed):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    open_model(str(folder), needs_images=True)
    assert not (tmp_path / "ran").exists()
    observed("opened without it")


@pytest.mark.fault(
    43,
    "run files that make objects or grow",
    injected="!!python/object/apply, an unknown tag, nested aliases, a binary file",
    expected="exit 2 with the file's name",
)
@pytest.mark.parametrize(
    "text",
    [
        b"data: !!python/object/apply:os.mkdir [ran]",
        b"data: !!python/name:os.system",
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        b"a: &a {b: *a}",
        b"a: 2020-99-99",
        b"? {a: b}\n: c",
        b"[" * 2_000,
        b"\xff\xfe\x00",
        b"- a\n- b",
    ],
)
def test_run_files_are_plain_values(text, tmp_path, monkeypatch, observed):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_bytes(text)
    with pytest.raises(UserError, match=r"--config x\.yaml (is not YAML|holds)"):
        flags_of(Path("x.yaml"))
    assert not Path("ran").exists()
    observed("exit 2, the file is named")


ODD_NAMES = ["a\nb", "a;touch ran", "$(touch ran)", "`touch ran`", "-rf", "a'b\"c", "caf\udce9", "a b", "x&y"]


@pytest.mark.fault(
    43,
    "file names with a newline, ;, quotes, $( ), and bytes that are not UTF-8",
    injected="nine such pictures, in a folder and in a tar",
    expected="read like others; nothing is run",
)
def test_odd_file_names_are_only_names(tmp_path, monkeypatch, observed):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "odd"
    folder.mkdir()
    members = []
    for place, name in enumerate(ODD_NAMES):
        (folder / f"{name}.png").write_bytes(made.encoded(place))
        (folder / f"{name}.txt").write_text("a caption")
        members += [(f"{name}.png", made.encoded(place)), (f"{name}.txt", b"a caption")]
    made.write_tar(tmp_path / "odd.tar", members)
    for source in (open_source(str(folder)), open_source(str(tmp_path / "odd.tar"), config=SourceConfig())):
        pairs = source.pairs
        assert len({pair.key for pair in pairs}) == len(ODD_NAMES)
        assert all(pair.open().image.mode == "RGB" and pair.key.encode() for pair in pairs)
    assert not Path("ran").exists()
    observed(f"{len(ODD_NAMES)} read from a folder and from a tar")


@pytest.mark.fault(
    43,
    "a secret in the environment, a name that the hub does not give",
    injected="HF_TOKEN set; a model that cannot be had; all logs at their most talkative",
    expected="the token is in no output",
)
def test_tokens_are_never_said(monkeypatch, capfd, caplog, observed):
    from t2i.env import machine_facts
    from t2i.runs.run_folder import environment

    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setattr("sys.argv", ["launchers/train.py"])
    with caplog.at_level("DEBUG"), pytest.raises(UserError) as caught:
        find("hf:nobody/nothing")
    said = [
        str(caught.value),
        caplog.text,
        *capfd.readouterr(),
        json.dumps(environment()),
        json.dumps(machine_facts()),
    ]
    assert not any("secretsecret" in text for text in said)
    observed("in no output, log, environment.json or t2i.env")


RULES = {
    r"torch\.load\((?![^\n]*weights_only=True)": "torch.load without weights_only=True",
    r"\bpickle\.loads?\(|\bcloudpickle|\bjoblib|\bdill\b|np\.load\([^\n]*allow_pickle=True": "unpickling",
    r"yaml\.(unsafe_|full_)?load\((?![^\n]*Loader=_NoAliases)|yaml\.UnsafeLoader": "YAML that makes objects",
    r"shell=True|os\.system\(|os\.popen\(": "a shell",
    r"trust_remote_code=True": "remote code",
    r"\.extract(all)?\(|shutil\.unpack_archive": "an archive extracted",
    r"(?<![.\w])(eval|exec)\(": "code from text",
    r"Image\.open\((?![^\n]*formats=)": "a picture of any format",
}
ALLOWED = {
    ("t2i/runs/card.md", "remote code"),
    # Runs only where diffusers was told to trust the code of its own folder.
    ("t2i/model/open_lm/language_model_t2i.py", "remote code"),
    ("t2i/generate/benchmarks.py", "a picture of any format"),  # pictures that were drawn just before
    ("t2i/report/run.py", "a picture of any format"),
}


@pytest.mark.parametrize("rule", RULES)
def test_no_line_of_the_project_does_what_is_never_done(rule):
    what = RULES[rule]
    found = {
        (path.relative_to(ROOT).as_posix(), what) for path in SOURCES if re.search(rule, path.read_text())
    }
    assert found - ALLOWED == set()


def test_the_rules_find_what_they_are_for():
    bad = [
        "torch.load(path)", "pickle.load(file)", "yaml.load(text)", "run(x, shell=True)", "f(trust_remote_code=True)",
        "tar.extractall(path)", "eval(text)", "Image.open(path)",
    ]  # fmt: skip
    assert all(any(re.search(rule, line) for rule in RULES) for line in bad)
