"""An exported folder and its card: what others need to use it, and nothing that a stranger's text could add to it."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig

from t2i.commands.export import main as export_main
from t2i.data.shards.reader import read_split
from t2i.errors import UserError
from t2i.report.run import write_report
from t2i.runs import export as exporting
from t2i.runs import loading
from t2i.runs.card import as_code, as_text, licences, model_card, stated_licence
from t2i.runs.loading import open_model


@pytest.fixture(scope="module")
def opened(finished):
    return open_model(str(finished.run_dir), needs_images=True)


@pytest.fixture(scope="module")
def exported(opened, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny_model"
    before = os.umask(0o027)
    exporting.export(opened, out=out, command="a test")
    os.umask(before)
    return out


def test_every_file_has_the_mode_of_a_new_file(exported):
    assert {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()} == {0o640}


def test_an_export_does_not_say_where_its_data_lay(opened, exported):
    own, copied = (
        json.loads((folder / "data_manifest.json").read_text()) for folder in (opened.home, exported)
    )
    assert Path(own["arguments"].pop("source_path")).is_absolute() or own["source"] == "openmoji"
    for made_by in (own["text_tokenizer"], own["image_tokenizer"]):
        assert Path(made_by["name"]).is_absolute()
        made_by["name"] = Path(made_by["name"]).name
    assert copied == own


def test_generation_ends_at_the_tokenizers_end_and_takes_all_that_it_gives(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    config = json.loads((exported / "config.json").read_text())
    generation = GenerationConfig.from_pretrained(exported)
    assert config["eos_token_id"] == generation.eos_token_id == tokenizer.eos_token_id == 0
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert list(tokenizer("a red apple")) == ["input_ids", "attention_mask"]


def test_the_card_names_every_python_file_and_the_runs_own_captions(exported, finished):
    card = (exported / "README.md").read_text()
    for file in exported.rglob("*.py"):
        assert str(file.relative_to(exported)) in card
    captions = [sample["caption"] for sample in read_split(finished.data.shards, "heldout", num_samples=2)]
    assert f"captions = {captions!r}" in card
    assert "folder = 'tiny_model'" in card
    assert not re.search("emoji|grinning", card)


def test_the_licences_of_starting_weights_are_carried_through_every_start(opened, tmp_path, monkeypatch):
    homes = [tmp_path / name for name in ("first", "second", "third")]
    for home, init in zip(homes, ["random", *map(str, homes)], strict=False):
        home.mkdir()
        (home / "resolved.yaml").write_text(yaml.safe_dump({"model": {"init": init}}))
    (homes[0] / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n# A model\n")
    (homes[1] / "data_manifest.json").write_text(json.dumps({"licence": "CC0"}))
    found = licences(opened, {"model": {"init": str(homes[2])}})
    starts = {
        name.removeprefix("starting weights: "): value for name, value in found.items() if "weights" in name
    }
    assert starts == dict(zip(map(str, reversed(homes)), ["not stated", "CC0", "cc-by-sa-4.0"], strict=True))


def test_a_start_is_found_by_its_checkpoint_and_by_the_name_of_the_demo(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "run" / "checkpoints" / "step_000005"
    step.mkdir(parents=True)
    (tmp_path / "run" / "resolved.yaml").write_text(yaml.safe_dump({"model": {"init": "demo"}}))
    (tmp_path / "run" / "data_manifest.json").write_text(json.dumps({"licence": "CC0"}))
    found = licences(opened, {"model": {"init": str(step)}})
    assert (found[f"starting weights: {step}"], found["starting weights: demo"]) == ("CC0", "cc-by-sa-4.0")


@pytest.mark.parametrize(
    ("control", "said", "has_weights", "forgets"),
    [
        ("none", "started from the pre-trained model `models/x`.", True, True),
        ("fresh", "random initialisation, in the architecture of `models/x`.", False, False),
        (
            "moments",
            "destroyed by the control `moments`, which leaves the mean and the deviation of each tensor.",
            True,
            False,
        ),
    ],
)
def test_a_card_says_what_a_control_left_of_a_start(
    control, said, has_weights, forgets, opened, exported, tmp_path
):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "resolved.yaml").write_text(
        yaml.safe_dump({"model": {"init": "models/x", "control_init": control}})
    )
    card = model_card(opened, folder=folder, name="tiny", command="a test")
    assert said in card and ("starting weights: models/x" in card) == has_weights
    assert ("likely to be lost" in card) == forgets


def test_an_embedded_image_tokenizer_has_its_licence():
    from t2i.config import ASSETS

    assert stated_licence(ASSETS / "image_tokenizer") == "cc-by-sa-4.0"


EVIL = "a`b`\n# heading <script>alert(1)</script> ![x](http://x) | cell\n```\n"


def test_a_strangers_words_stay_words(opened, exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    for name in ("scores.json", "data_manifest.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        values |= {"source": EVIL, "licence": EVIL, "counts": {"train": EVIL}}
        if name == "data_manifest.json":
            (folder / name).write_text(json.dumps(values))
    card = model_card(opened, folder=folder, name=EVIL, command=EVIL)
    _, text = card.split("\n---\n", 1)  # what is before is YAML, where a name stands in quotes
    outside = "".join(text.split("```")[::2])
    # Escapes first: an escaped backtick begins no code.
    assert "<script" not in re.sub(r"\\.|`[^`]*`", "", outside)
    assert "\n# heading" not in card
    assert ModelCard(card).data.library_name == "diffusers"
    assert card.count("\n```") == 4
    assert as_code("a`b\nc") == "`a'b c`"
    assert as_text("[a](b)\n<i>") == r"\[a\](b) \<i\>"


def test_an_export_can_be_pushed_as_a_private_repository(monkeypatch, tmp_path):
    made = []
    api = SimpleNamespace(
        create_repo=lambda repo, **how: made.append((repo, how)), upload_folder=lambda **_: "address"
    )
    monkeypatch.setattr(exporting, "HfApi", lambda endpoint: api)
    assert exporting.push(tmp_path, repo="a/b", is_private=True) == "address"
    assert made == [("a/b", {"exist_ok": True, "private": True})]

    def refused(repo, **how):
        raise OSError("401 Client Error.\nInvalid credentials")

    api.create_repo = refused
    with pytest.raises(
        UserError,
        match=r"is whole, but could not be uploaded to a/b: 401 Client Error\..*`hf upload a/b .* --private`",
    ):
        exporting.push(tmp_path, repo="a/b", is_private=True)
    monkeypatch.setattr(sys, "argv", ["export", "runs/x", "--out", str(tmp_path / "out"), "--private"])
    with pytest.raises(UserError, match="--private is for --push-to-hub"):
        export_main()


def test_a_place_that_cannot_be_written_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loading, "open_model", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(sys, "argv", ["export", "runs/x", "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(UserError, match="file cannot be written: Not a directory"):
        export_main()


def test_a_report_of_an_export_is_refused_in_a_sentence(exported):
    with pytest.raises(
        UserError, match=r"is no run folder: it has no .*environment\.json\. An exported folder has"
    ):
        write_report(exported)


def test_a_checkpoint_has_its_own_name_from_within_and_through_a_link(finished, tmp_path, monkeypatch):
    folder, run_dir = loading.find(str(finished.run_dir))
    link = tmp_path / "link"
    link.symlink_to(folder.resolve())
    monkeypatch.chdir(folder)
    for name in (".", str(link)):
        found, around = loading.find(name)
        assert found.name == folder.name and around.resolve() == run_dir.resolve()
