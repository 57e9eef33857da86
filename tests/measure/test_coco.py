"""The COCO protocol on a folder of COCO's schema, with a stand-in for Inception behind the real loading."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from t2i.config import ASSETS
from t2i.data.sources.coco import Caption, CaptionFile
from t2i.errors import DataError, UserError
from t2i.measure import feature_cache as reference
from t2i.measure.clip import clip_score, embed_captions, embed_images, load_clip
from t2i.measure.coco import Choice, centre_crop_lanczos, coco_task, drawn_captions, read_val2014
from t2i.runs.export import export
from t2i.runs.loading import open_model
from t2i.tokens.image import ImageTokenizer, to_pixels

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "eval" / "coco_fid.py"


@pytest.fixture
def call(call, monkeypatch, tmp_path):
    """Run eval/coco_fid.py in this process; return its exit status."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return partial(call, "eval/coco_fid.py")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights in the layout that transformers' own have."""
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=2048, max_position_embeddings=20, eos_token_id=0, **sizes)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(ASSETS / "text_tokenizer" / "tokenizer.json"),
        model_max_length=20,
        pad_token="<|padding|>",
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    return folder


def square(path: Path, size: int) -> Image.Image:
    """LANCZOS_CROP, said slowly."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def slow_features(pictures: list[np.ndarray], inception: Path) -> np.ndarray:
    network = InceptionV3W(str(inception.parent), download=False)
    resized = np.stack([build_resizer("clean")(picture) for picture in pictures])
    with torch.inference_mode():
        return network(torch.from_numpy(resized).permute(0, 3, 1, 2)).numpy().astype(np.float64)


def slow_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Twin: tr (cov_a cov_b)^(1/2) is the sum of the singular values of A B^T, A and B centred and scaled."""
    centred = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    difference = a.mean(axis=0) - b.mean(axis=0)
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return float(difference @ difference + sum((x**2).sum() for x in centred) - 2 * overlap)


def test_the_list_takes_distinct_images_first_and_does_not_depend_on_the_files_order(coco_folder, tmp_path):
    coco = read_val2014(coco_folder)
    captions = coco.captions
    chosen = drawn_captions(coco, num_samples=60, seed=0).captions
    ids = [caption.image_id for caption in chosen]
    assert len(set(ids[:24])) == 24 and ids[:24] == ids[24:48] == ids[:12] + ids[12:24]
    for turn in range(2):  # captions by id, whatever their order in the file
        for caption in chosen[24 * turn : 24 * turn + 24]:
            same_image = sorted(each.caption_id for each in captions[caption.image_id])
            assert caption.caption_id == same_image[turn]
    assert (
        chosen[0].text.startswith("Sentence ") and "  " not in chosen[0].text and "\n" not in chosen[0].text
    )
    assert chosen[:10] == drawn_captions(coco, num_samples=10, seed=0).captions
    assert chosen[:10] != drawn_captions(coco, num_samples=10, seed=1).captions
    turned = replace(coco, captions=dict(reversed(captions.items())))
    assert chosen == drawn_captions(turned, num_samples=60, seed=0).captions
    with pytest.raises(UserError, match="--num-samples is 121; expected 2 to 120, the number of captions"):
        drawn_captions(coco, num_samples=121, seed=0)


def test_the_order_of_images_is_pinned():
    """The list of everybody's 30,000 captions hangs on it: sha256 of coco, seed and id, joined by \\x1f."""
    coco = CaptionFile(images={}, captions={id_: [Caption(0, id_, "")] for id_ in range(50)})
    wanted = sorted(coco.captions, key=lambda id_: hashlib.sha256(f"coco\x1f0\x1f{id_}".encode()).digest())
    assert [each.image_id for each in drawn_captions(coco, num_samples=50, seed=0).captions] == wanted


def test_reference_images_are_cut_before_they_are_resized(coco_folder):
    files = sorted((coco_folder / "val2014").iterdir())
    modes = {Image.open(file).mode for file in files}
    assert modes == {"RGB", "L", "CMYK"}
    coco = read_val2014(coco_folder)
    task = coco_task(coco, drawn_captions(coco, num_samples=2, seed=0), image_size=32)
    for picture, file in zip(task.reference.images, files, strict=True):
        np.testing.assert_array_equal(picture, np.asarray(square(file, 32)))
    frame = Image.new("RGB", (90, 40), "red")
    frame.paste("blue", (25, 0, 65, 40))
    assert centre_crop_lanczos(frame, size=16).getcolors() == [(256, (0, 0, 255))]


def test_scores_are_those_of_the_slow_way_and_name_everything(
    model_folder, coco_folder, clip_folder, inception_file, call, tmp_path
):
    out = tmp_path / "out"
    words = [model_folder, "--coco", coco_folder, "--num-samples", 20, "--out", out, "--batch-size", 8]
    assert call(*words, "--inception", inception_file, "--clip", clip_folder) == 0
    scores = json.loads((out / "scores.json").read_text())
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert scores["captions_sha256"] == hashlib.sha256((out / "captions.jsonl").read_bytes()).hexdigest()
    assert {path.stem for path in (out / "model").glob("*.png")} == {line["name"] for line in lines}
    assert not (out / "redrawn").exists() and not (out / "untrained").exists()

    files = sorted((coco_folder / "val2014").iterdir())
    reals = [np.asarray(square(file, 32)) for file in files]
    own = [next(i for i, file in enumerate(files) if line["name"][:12] in file.name) for line in lines]
    drawn = [np.asarray(Image.open(out / "model" / f"{line['name']}.png")) for line in lines]
    real, model = slow_features(reals, inception_file), slow_features(drawn, inception_file)
    tokenizer = ImageTokenizer.load(model_folder / "image_tokenizer")
    codes = tokenizer.encode(to_pixels([Image.fromarray(reals[place]) for place in own]))
    pixels = ((tokenizer.decode(codes) + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    rows = scores["rows"]
    left = [place for place in range(24) if place not in own[:12]]
    for row, wanted in {
        "model": slow_frechet(model, real),
        "matched": slow_frechet(model, real[own]),
        "reconstructions": slow_frechet(slow_features(list(pixels), inception_file), real),
        "real": slow_frechet(real[own[:12]], real[left]),
    }.items():
        # float32 features in batches of another shape: about 1e-6 is seen; distances are about 1
        assert rows[row]["fid"] == pytest.approx(wanted, rel=1e-4, abs=1e-4), row
    assert (rows["model"]["n"], rows["model"]["n_reference"]) == (20, 24)
    assert (rows["matched"]["n_reference"], rows["real"]["n"], rows["real"]["n_reference"]) == (20, 12, 12)
    assert scores["fid"] == rows["model"]["fid"] and scores["kid"] == rows["model"]["kid"]
    assert "clip_score" in rows["real"] and "clip_score" not in rows["matched"]
    assert (
        scores["weights_sha256"]
        == hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    )
    assert scores["note"].startswith("fid with N=20 is biased upwards")
    assert scores["resize"] == "clean" and "Lanczos" in scores["crop"] and scores["image_size"] == 32
    assert {"features_sha256", "reference_sha256", "clip_sha256", "seeds", "sampler", "versions"} <= set(
        scores
    )
    assert min(scores["seconds_to_draw"], scores["seconds_to_measure"]) > 0


def test_a_second_run_draws_and_computes_nothing_again_and_other_settings_are_refused(
    model_folder, coco_folder, narrow_inception_file, call, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    words = [model_folder, "--coco", coco_folder, "--num-samples", 6, "--out", out]
    assert call(*words, "--inception", narrow_inception_file) == 0
    first = json.loads((out / "scores.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in (out / "model").iterdir()}
    (cached,) = (tmp_path / "cache" / "t2i" / "reference").iterdir()
    assert {path.name for path in cached.iterdir()} == {"made_of.json", "features.npy", "statistics.npz"}

    def refuse(*arguments, **named):
        raise AssertionError("the reference was computed again")

    with monkeypatch.context() as patch:
        patch.setattr(reference, "extract", refuse)
        assert call(*words, "--inception", narrow_inception_file) == 0
    again = json.loads((out / "scores.json").read_text())
    seconds = {"seconds_to_draw": 0, "seconds_to_measure": 0}
    assert {**again, **seconds} == {**first, **seconds}
    # Of a drawing that an earlier call has made this one knows no time.
    assert "seconds_to_draw" in first and "seconds_to_draw" not in again
    assert times == {path: path.stat().st_mtime_ns for path in (out / "model").iterdir()}
    for changed, sentence in (
        (["--guidance-scale", 3], "guidance_scale: 2.0 there, 3.0 asked"),
        (["--list-seed", 1], "captions.jsonl holds another list of captions"),
        (["--batch-size", 3], "batch_size: 32 there, 3 asked"),
    ):
        capsys.readouterr()
        assert call(*words, "--inception", narrow_inception_file, *changed) == 2
        assert sentence in capsys.readouterr().err
    assert json.loads((out / "scores.json").read_text()) == again


def test_a_reference_is_kept_by_what_made_it(
    model_folder, coco_folder, narrow_inception_file, call, tmp_path, monkeypatch, capsys
):
    coco = shutil.copytree(coco_folder, tmp_path / "coco")
    out = tmp_path / "out"
    words = [
        model_folder,
        "--coco",
        coco,
        "--num-samples",
        4,
        "--out",
        out,
        "--inception",
        narrow_inception_file,
    ]
    kept, hashes = tmp_path / "cache" / "t2i" / "reference", []

    def run(*more):
        assert call(*words, *more) == 0
        hashes.append(json.loads((out / "scores.json").read_text())["reference_sha256"])
        return len(list(kept.iterdir()))

    assert run() == 1
    assert run("--resize", "legacy_tensorflow") == 2
    picture = sorted((coco / "val2014").iterdir())[3]
    Image.open(picture).rotate(90, expand=True).save(picture, quality=20)
    assert run() == 3
    assert hashes[0] == hashes[1] != hashes[2]  # the network's resize is no part of the pictures
    assert not [path for path in kept.iterdir() if path.name.startswith(".")]
    for file in kept.glob("*/features.npy"):
        file.write_bytes(file.read_bytes()[:200])
    assert call(*words) == 3
    assert "cached features, is damaged: " in capsys.readouterr().err


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path):
    folder = tmp_path / "kept"
    left = tmp_path / f".kept.{os.uname().nodename}.{os.getpid()}"
    (left / "half").mkdir(parents=True)
    measured = reference.with_statistics(np.eye(3, dtype=np.float32))
    reference._publish(measured, {}, folder)
    np.testing.assert_array_equal(reference._load(folder).features, measured.features)
    assert not left.exists()


def test_flags_that_would_change_nothing_are_refused(model_folder, coco_folder, call, tmp_path, capsys):
    for words, sentence in (
        (["--list-seed", 3], "it wants --coco"),
        (["--coco", coco_folder, "--heldout-shards", tmp_path], "expected one of them"),
        (["--coco", coco_folder, "--other-half"], "--other-half is of a model's own held-out images"),
        (["--image-size", 256], "it is for an Emu3"),
        (["--bootstrap", 1], "--bootstrap"),
    ):
        assert call(model_folder, *words, "--out", tmp_path / "out") == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_scores_json_is_named_before_anything_is_drawn(
    model_folder, coco_folder, narrow_inception_file, call, tmp_path, capsys
):
    (tmp_path / "scores.json").write_text("{")
    words = [
        "--coco",
        coco_folder,
        "--inception",
        narrow_inception_file,
        "--num-samples",
        4,
        "--out",
        tmp_path,
    ]
    assert call(model_folder, *words) == 3
    assert "scores.json is not JSON" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_broken_image_of_the_reference_is_named_before_anything_is_drawn(
    model_folder, coco_folder, narrow_inception_file, call, tmp_path, capsys
):
    coco = shutil.copytree(coco_folder, tmp_path / "coco")
    broken = sorted((coco / "val2014").iterdir())[7]
    broken.write_bytes(broken.read_bytes()[:200])
    words = [
        "--coco",
        coco,
        "--inception",
        narrow_inception_file,
        "--num-samples",
        4,
        "--out",
        tmp_path / "out",
    ]
    assert call(model_folder, *words) == 3
    assert f"{broken} cannot be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_processes_draw_the_images_of_one(model_folder, coco_folder, call, tmp_path):
    words = [model_folder, "--coco", coco_folder, "--num-samples", 10, "--batch-size", 4]
    words += ["--features", "efficientnet_lite0", "--out"]
    assert call(*words, tmp_path / "one") == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = processes.run(
        list(map(str, [*launcher, COMMAND, *words, tmp_path / "two"])),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("drawn from the captions") == 1  # one process tells
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "one" / "model").glob("*.png")}
    assert len(pictures) == 10
    assert pictures == {path.name: path.read_bytes() for path in (tmp_path / "two" / "model").glob("*.png")}
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert "fid" not in one and one["fd_efficientnet_lite0"] == two["fd_efficientnet_lite0"]


def test_compare_refuses_other_protocols_and_says_which_line(
    model_folder, coco_folder, narrow_inception_file, call, tmp_path, capsys
):
    def run(name, *more):
        where = ["--coco", coco_folder, "--inception", narrow_inception_file, "--out", tmp_path / name]
        assert call(model_folder, *where, *more) == 0
        return tmp_path / name / "scores.json"

    a = run("a", "--num-samples", 4)
    b = run("b", "--num-samples", 4, "--guidance-scale", 1)
    c = run("c", "--num-samples", 5, "--resize", "legacy_tensorflow")
    capsys.readouterr()
    assert call("compare", a, b.parent) == 0
    printed = capsys.readouterr().out
    assert "sampler.guidance_scale: 2.0 | 1.0" in printed and "resize" not in printed
    for file in (a, b):
        assert f"{json.loads(file.read_text())['fid']:.4f}" in printed
    with_clip = json.loads(a.read_text())
    with_clip |= {"clip_sha256": "1" * 64, "measures": [*with_clip["measures"], "clip_score"]}
    (tmp_path / "with_clip.json").write_text(json.dumps(with_clip))
    (tmp_path / "other_clip.json").write_text(json.dumps({**with_clip, "clip_sha256": "2" * 64}))
    assert call("compare", tmp_path / "with_clip.json", a) == 0
    assert call("compare", tmp_path / "with_clip.json", tmp_path / "other_clip.json") == 2
    assert "clip_sha256" in capsys.readouterr().err
    assert call("compare", a, c) == 2
    refused = capsys.readouterr()
    lines = refused.err.splitlines()
    assert {"n: 4 | 5", "resize: clean | legacy_tensorflow"} <= set(lines)
    assert {line.split(":")[0] for line in lines[1:]} == {"n", "resize", "captions", "captions_sha256"}
    assert refused.out == ""
    assert call("compare", a, coco_folder / "annotations" / "captions_val2014.json") == 2
    assert "is no scores.json: rows is None; expected dict" in capsys.readouterr().err


def test_a_folder_that_is_not_coco_is_refused_by_name(coco_folder, tmp_path):
    with pytest.raises(DataError, match="captions_val2014.json is missing; --coco expects a folder with"):
        read_val2014(tmp_path)
    coco = shutil.copytree(coco_folder, tmp_path / "coco")
    gone = sorted((coco / "val2014").iterdir())[5]
    gone.unlink()
    read = read_val2014(coco)
    with pytest.raises(DataError, match=f"1 of the 24 images .* are missing, first .*{gone.name}"):
        coco_task(read, drawn_captions(read, num_samples=2, seed=0), image_size=32)
    one = Choice([each for each in read.captions[min(read.captions)]][:2], rule="two captions of one image")
    with pytest.raises(DataError, match="The captions are of 1 of 24 images; expected at least 2 of 4"):
        coco_task(read, one, image_size=32)
    file = coco / "annotations" / "captions_val2014.json"
    content = json.loads(file.read_text())
    for broken, found in (
        ([], "holds list"),
        (
            {**content, "images": content["images"][1:]},
            f"names image {content['images'][0]['id']}, which is not",
        ),
        ({"images": content["images"]}, "annotations is None; expected list"),
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=rf"captions_val2014\.json.* {found}"):
            read_val2014(coco)
    file.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_val2014(coco)


def test_a_clip_folder_runs_nothing_and_asks_nothing(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("stdin was asked"))
    folder, ran = tmp_path / "clip", tmp_path / "ran"
    shutil.copytree(clip_folder, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    own = {
        "AutoConfig": "evil.C",
        "AutoModel": "evil.M",
        "AutoTokenizer": ["evil.T", "evil.T"],
        "AutoProcessor": "evil.P",
    }
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "auto_map": own}))
    load_clip(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "strangers"}))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "tokenizer_class": "Strangers"}))
    with pytest.raises(UserError, match="cannot be loaded as a CLIP"):
        load_clip(folder)
    assert not ran.exists()


def test_another_kind_of_clip_is_refused(clip_folder, tmp_path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "chinese_clip"}))
    with pytest.raises(UserError, match="its config.json is of chinese_clip; expected clip"):
        load_clip(folder)


def test_clip_score_is_the_mean_cosine_that_is_never_negative(clip_folder, capsys):
    clip = load_clip(clip_folder)
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (5, 40, 24, 3), dtype=np.uint8))
    captions = [f"caption {index} " * (1 + 20 * (index == 3)) for index in range(5)]
    # Half of them turned round: in which direction random weights point depends on transformers' release.
    signs = torch.tensor([1.0, -1, 1, -1, 1])
    found = clip_score(embed_images(pictures, clip), embed_captions(captions, clip) * signs[:, None])
    said = capsys.readouterr().err
    assert "CLIP of images: 100%" in said and "CLIP of captions: 100%" in said
    cosines = []
    for picture, caption, sign in zip(pictures, captions, signs.tolist(), strict=True):
        tokens = clip.tokenizer(caption, truncation=True, return_tensors="pt")
        pixels = clip.processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            outputs = clip.model(input_ids=tokens["input_ids"], pixel_values=pixels)
        cosines.append(sign * (outputs.logits_per_image / clip.model.logit_scale.exp()).item())
    assert min(cosines) < 0 < max(cosines)  # so that the floor at zero shows
    # float32 in batches of another shape
    assert found == pytest.approx(100 * np.mean(np.maximum(cosines, 0)), rel=1e-4)
    with pytest.raises(UserError, match="is no CLIP folder of transformers: config.json"):
        load_clip(clip_folder.parent)


def test_an_export_carries_its_scores_where_the_hub_reads_them(
    model_folder, coco_folder, narrow_inception_file, call, tmp_path
):
    home = shutil.copytree(model_folder, tmp_path / "home")
    assert call(home, "--coco", coco_folder, "--inception", narrow_inception_file, "--num-samples", 4) == 0
    scores = json.loads((home / "coco" / "scores.json").read_text())
    export(open_model(str(home), needs_images=True), out=tmp_path / "exported", command="a test")
    card = ModelCard.load(tmp_path / "exported" / "README.md")
    assert json.loads((tmp_path / "exported" / "coco_scores.json").read_text()) == scores
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"fid", "kid", "mind"}
    assert results["fid"].metric_value == round(scores["fid"], 4)
    assert (results["fid"].dataset_type, results["fid"].dataset_name) == (
        "ms-coco-val2014",
        "MS COCO val2014",
    )
    assert card.data.pipeline_tag == "text-to-image"
    assert "| drawn from the captions | 4 |" in card.text
