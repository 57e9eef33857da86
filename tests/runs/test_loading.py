"""Which names are paths and which are asked of the hub."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from t2i.config import ASSETS, SampleConfig
from t2i.errors import UserError
from t2i.files import hub_name, sha256_of
from t2i.generate.sample import draw_codes, drawer_of
from t2i.runs import loading


@pytest.mark.parametrize(
    "name", ["runs/trian", "./nowhere", "EleutherAI/pythia-70m", "pythia", "a/b/c", "x" * 5_000]
)
def test_a_mistyped_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "snapshot_download", None)
    with pytest.raises(
        UserError, match=r"does not exist here; a name on the Hugging Face hub is written hf:USER/NAME\.$"
    ):
        loading.find(name)


def test_a_folder_that_is_no_model_is_not_taken_for_a_hub_name(tmp_path):
    with pytest.raises(UserError, match=r"it has neither checkpoints/ nor config\.json\.$"):
        loading.find(str(tmp_path))


def test_hf_asks_the_hub_whatever_exists_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody" / "something").mkdir(parents=True)
    (tmp_path / "hf:").mkdir()
    asked = []
    monkeypatch.setattr(
        loading, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path / "cache")
    )
    assert loading.find("hf:somebody/something") == (tmp_path / "cache", None)
    assert asked == ["somebody/something"]
    assert [hub_name(name) for name in ("./hf:a/b", "somebody/something", "hf:")] == ["", "", ""]


def test_weights_in_forms_that_are_not_read_are_not_downloaded(monkeypatch):
    asked = {}
    monkeypatch.setattr(loading, "snapshot_download", lambda name, **how: asked.update(how) or "somewhere")
    loading.find("hf:somebody/something")
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "modeling.py"]
    ours = [*files, "model-00001-of-00002.safetensors", "pytorch_model.bin", "image_tokenizer/config.json"]
    others = [
        "original/consolidated.00.pth", "consolidated.safetensors", "onnx/model.onnx", "metal/model.bin",
        "tf_model.h5", "flax_model.msgpack",
    ]  # fmt: skip
    assert list(filter_repo_objects([*ours, *others], **asked)) == ours


def test_a_second_copy_of_the_weights_is_not_hashed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = loading.weights_sha256(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same in another form")
    assert loading.weights_sha256(tmp_path) == before


def test_what_the_hub_does_not_give_is_said_in_one_sentence():
    with pytest.raises(UserError, match="the hub gives no model hf:nobody/nothing: ") as caught:
        loading.find("hf:nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_model_of_the_hub_is_called_by_its_name_there(model_folder, tmp_path, monkeypatch):
    snapshot = shutil.copytree(model_folder, tmp_path / "snapshots" / "0c1d2e")
    monkeypatch.setattr(loading, "snapshot_download", lambda name, **_: str(snapshot))
    assert loading.open_model("hf:somebody/tiny", needs_images=False).name == "somebody/tiny"
    assert loading.open_model(str(model_folder), needs_images=False).name == model_folder.name


def test_demo_is_the_model_that_comes_with_t2i(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, run_dir = loading.find("demo")
    assert run_dir is None and folder.is_relative_to(ASSETS)
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 12e6
    opened = loading.open_model("demo", needs_images=True)
    drawer = drawer_of(opened, settings=SampleConfig())
    (codes,) = draw_codes(drawer, ["woman: dark skin tone"])
    assert codes.shape == (opened.model.config.codes_per_image,)
    # What it is known by are its weights, as those of the checkpoint that it was exported from.
    assert opened.weights == sha256_of(folder / "model.safetensors")
    # Its own folder is the package's: a measure there would end up in the next wheel.
    assert opened.measures_folder("eval") == Path("demo_measures/eval") and opened.home == folder
    # A folder of the user's own comes first.
    (tmp_path / "demo").mkdir()
    with pytest.raises(UserError, match=r"it has neither checkpoints/ nor config\.json\.$"):
        loading.find("demo")
