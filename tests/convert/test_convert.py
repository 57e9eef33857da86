"""Released layouts through the commands: converted, proved, trained from, and taken back."""

import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from twins.image_tokenizers import SMALL, Released, in_released_form
from twins.open_lm import SIZES, OpenLM
from twins.text_tokenizer import train_text_tokenizer

from t2i.config import ASSETS
from t2i.convert import convert
from t2i.convert.convert import convert_back, convert_open_lm, convert_vq
from t2i.convert.open_lm import load_open_lm
from t2i.convert.vq import LLAMAGEN, MOVQGAN, vq_tensors
from t2i.errors import CheckpointError, UserError
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
NUM_ROWS = 432
NEW = SIZES | {"vocab_size": NUM_ROWS}
OLD = NEW | {"positional_embedding_type": "head_rotary"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A training checkpoint as released, its json, and a tokenizer of NeoX's structure with fewer ids than rows."""
    folder = tmp_path_factory.mktemp("released")
    state = OpenLM(**OLD).state_dict()
    content = {
        "epoch": 3,
        "name": "x",
        "state_dict": {f"module.{name}": value for name, value in state.items()},
    }
    torch.save(content, folder / "epoch_3.pt")
    (folder / "old.json").write_text(json.dumps(OLD))
    (folder / "new.json").write_text(json.dumps(NEW))
    tokenizer = train_text_tokenizer(["a red apple and a green house"] * 3, vocab_size=400)
    tokenizer.tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def converted(home):
    convert_open_lm(
        home / "epoch_3.pt",
        config_names=[str(home / "old.json")],
        text_tokenizer=str(home / "tokenizer"),
        out=home / "model",
        tell=print,
    )
    return home / "model"


def launch(monkeypatch, *words, name="convert.py"):
    monkeypatch.setattr(sys, "argv", [f"launchers/{name}", *map(str, words)])
    runpy.run_path(str(ROOT / "launchers" / name), run_name="__main__")


def test_the_commands_convert_and_take_back_bit_for_bit(home, tmp_path, monkeypatch, capsys):
    launch(
        monkeypatch, "open-lm", "--checkpoint", home / "epoch_3.pt", "--config", home / "old.json",
        "--text-tokenizer", home / "tokenizer", "--out", tmp_path / "model",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "not a known release" in printed
    assert "checked: for 24 tokens" in printed
    assert f"{tmp_path / 'model'} is ready for --model.init." in printed
    launch(monkeypatch, "open-lm-back", tmp_path / "model", "--out", tmp_path / "back")
    source = torch.load(home / "epoch_3.pt", weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "back" / "open_lm.pt", weights_only=True)
    assert {f"module.{name}" for name in back} == set(source)
    assert all(torch.equal(value, source[f"module.{name}"]) for name, value in back.items())
    again = json.loads((tmp_path / "back" / "open_lm.json").read_text())
    assert {key: again[key] for key in OLD} == OLD


def test_a_tied_model_is_taken_back_with_both_names(home, tmp_path):
    state = OpenLM(**OLD, weight_tying=True).state_dict()
    torch.save(state, tmp_path / "tied.pt")
    (tmp_path / "tied.json").write_text(json.dumps(OLD | {"weight_tying": True}))
    convert_open_lm(
        tmp_path / "tied.pt",
        config_names=[str(tmp_path / "tied.json")],
        text_tokenizer=str(home / "tokenizer"),
        out=tmp_path / "model",
        tell=print,
    )
    convert_back(str(tmp_path / "model"), out=tmp_path / "back")
    back = torch.load(tmp_path / "back" / "open_lm.pt", weights_only=True)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_converted_model_trains_and_codes_come_after_its_rows(converted, finished, tmp_path):
    config = replace(
        finished,
        run_dir=tmp_path / "run",
        model=replace(finished.model, init=str(converted)),
        train=replace(finished.train, max_steps=2, warmup_steps=1, eval_every=0),
    )
    train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    assert [row["step"] for row in read_metrics(config.run_dir)] == [1, 2]
    checkpoint = open_model(str(config.run_dir), needs_images=True)
    num_tokens = TextTokenizer.load(converted).num_tokens
    assert num_tokens < NUM_ROWS
    assert (checkpoint.layout.num_text_tokens, checkpoint.layout.num_text_rows) == (num_tokens, NUM_ROWS)
    assert checkpoint.layout.special_id("<doc>") == NUM_ROWS
    start = load_file(converted / "model.safetensors")["model.tok_embeddings.weight"]
    end = checkpoint.model.get_input_embeddings().weight
    assert not torch.equal(end[:num_tokens], start[:num_tokens])
    assert len(end) == checkpoint.layout.vocab_size
    # Grown models go back too; their json says how many rows they have.
    convert_back(str(config.run_dir), out=tmp_path / "back")
    assert json.loads((tmp_path / "back" / "open_lm.json").read_text())["vocab_size"] == len(end)


@torch.inference_mode()
def test_rows_that_no_token_uses_are_never_generated(converted):
    model = OpenLMForCausalLM.from_pretrained(converted).eval()
    num_tokens = TextTokenizer.load(converted).num_tokens
    hidden = model.model(torch.tensor([[5]])).last_hidden_state[0, -1]
    model.output.weight[num_tokens + 3] = hidden * 100  # the most likely row by far
    ids = torch.tensor([[5]])
    assert model(ids).logits[0, -1].argmax() == num_tokens + 3
    for settings in ({"do_sample": False}, {"do_sample": True, "num_return_sequences": 8}):
        found = model.generate(ids, max_new_tokens=6, **settings)
        assert found.max() < num_tokens
    assert model.generation_config.eos_token_id == 0


def test_the_1b_release_is_not_converted_with_the_config_of_the_new_positions(home, tmp_path, monkeypatch):
    name = "mlfoundations/open_lm_1B open_lm_1b.pt"
    digest = convert.sha256_of(home / "epoch_3.pt")
    monkeypatch.setitem(convert.RELEASES, digest, name)
    monkeypatch.setitem(convert.RELEASED_CONFIGS, name, str(home / "old.json"))
    told = []
    arguments = {"text_tokenizer": str(home / "tokenizer"), "out": tmp_path / "model", "tell": told.append}
    with pytest.raises(UserError, match=r"new\.json is wrong for this release; expected .*old\.json"):
        convert_open_lm(home / "epoch_3.pt", config_names=[str(home / "new.json")], **arguments)
    convert_open_lm(home / "epoch_3.pt", config_names=(), **arguments)
    assert told[-2] == f"epoch_3.pt: SHA-256 {digest}, known release {name}"


def test_a_folder_brings_its_own_config_and_tokenizer(home, tmp_path):
    folder = tmp_path / "hf"
    TextTokenizer.load(home / "tokenizer").tokenizer.save_pretrained(folder)
    state = torch.load(home / "epoch_3.pt", weights_only=True)["state_dict"]
    renamed = {f"model.{name.removeprefix('module.')}": value for name, value in state.items()}
    torch.save(renamed, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "openlm", "params_args_dict": OLD}))
    convert_open_lm(folder, config_names=(), text_tokenizer=None, out=tmp_path / "model", tell=print)
    assert (
        OpenLMForCausalLM.from_pretrained(tmp_path / "model").config.positional_embedding_type
        == "head_rotary"
    )
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    # Never another one's in place of a tokenizer that the folder has in an older form.
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(UserError, match="older files, of which transformers makes one"):
        convert_open_lm(folder, config_names=(), text_tokenizer=None, out=tmp_path / "other", tell=print)


def test_nothing_is_written_over_or_left_behind(home, converted, tmp_path, monkeypatch):
    arguments = {
        "config_names": [str(home / "old.json")],
        "text_tokenizer": str(home / "tokenizer"),
        "tell": print,
    }
    with pytest.raises(UserError, match="already exists"):
        convert_open_lm(home / "epoch_3.pt", out=converted, **arguments)
    with pytest.raises(UserError, match="give --config"):
        convert_open_lm(
            home / "epoch_3.pt",
            config_names=(),
            text_tokenizer=str(home / "tokenizer"),
            out=tmp_path / "model",
            tell=print,
        )
    with pytest.raises(UserError, match=r"has 2048 ids; the model has 432 embeddings"):
        convert_open_lm(
            home / "epoch_3.pt",
            config_names=[str(home / "old.json")],
            text_tokenizer=str(ASSETS / "text_tokenizer"),
            out=tmp_path / "model",
            tell=print,
        )
    told = []
    with pytest.raises(UserError, match="the hub gives no text tokenizer hf:nobody/nothing"):
        convert_open_lm(
            home / "epoch_3.pt",
            config_names=[str(home / "old.json")],
            text_tokenizer="hf:nobody/nothing",
            out=tmp_path / "model",
            tell=told.append,
        )
    assert not any("SHA-256" in line for line in told)  # before gigabytes are hashed

    def swapped(tensors, **settings):
        """A mistake of the kind that shapes do not show: gate and value of the feed-forward swapped."""
        name = "layers.1.feed_forward.w12.weight"
        return load_open_lm(tensors | {name: tensors[name].roll(256, 0)}, **settings)

    monkeypatch.setattr(convert, "load_open_lm", swapped)
    with pytest.raises(CheckpointError, match="logits that differ by .*; nothing written"):
        convert_open_lm(home / "epoch_3.pt", out=tmp_path / "model", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "layout"), [("movqgan", MOVQGAN), ("llamagen", LLAMAGEN)])
def test_image_tokenizers_are_proved_on_stored_images(kind, layout, tmp_path, monkeypatch, capsys):
    released = in_released_form(Released(kind, **SMALL[kind]))
    torch.save(released, tmp_path / "released.ckpt")
    tensors, _ = vq_tensors(released, layout=layout)
    launch(monkeypatch, kind, "--checkpoint", tmp_path / "released.ckpt", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "not a known release" in printed
    assert re.search(r" (\d+) of \1 codes are equal", printed)
    assert "is ready for --image-tokenizer" in printed

    swapped = dict(tensors)
    query, key = ("encoder.mid.attn_1.q.weight", "encoder.mid.attn_1.k.weight")
    if kind == "llamagen":
        query, key = ("encoder.mid.1.q.weight", "encoder.mid.1.v.weight")
    swapped[query], swapped[key] = tensors[key], tensors[query]
    real = convert.load_vq
    monkeypatch.setattr(convert, "load_vq", lambda _, **settings: real(swapped, **settings))
    with pytest.raises(
        CheckpointError, match="differs from the release: latents differ by .*; nothing written"
    ):
        convert_vq(tmp_path / "released.ckpt", layout=layout, out=tmp_path / "other", tell=print)
    assert not (tmp_path / "other").exists()


def test_a_converted_tokenizer_is_measured_at_another_size_on_any_folder(tmp_path, monkeypatch, capsys):
    torch.save(Released("movqgan", **SMALL["movqgan"]).state_dict(), tmp_path / "released.ckpt")
    launch(
        monkeypatch, "movqgan", "--checkpoint", tmp_path / "released.ckpt", "--out", tmp_path / "tokenizer"
    )
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(9):
        picture = Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8)).resize((150, 100))
        picture.save(tmp_path / "pictures" / f"{index}.jpg")
        (tmp_path / "pictures" / f"{index}.txt").write_text("noise")
    words = [
        "evaluate", "--tokenizer", tmp_path / "tokenizer", "--source", tmp_path / "pictures", "--split", "all",
        "--num-images", "8",
    ]  # fmt: skip
    launch(monkeypatch, *words, "--image-size", 96, "--out", tmp_path / "measured", name="tokenizer.py")
    found = json.loads((tmp_path / "measured" / "measures.json").read_text())
    assert (found["num_pictures"], found["image_size"], found["split"]) == (8, 96, "all")
    assert 0 < found["codes_in_use"] <= 1
    assert Image.open(tmp_path / "measured" / "reconstructions.png").size == (8 * 96, 2 * 96)
    for size, out, message in (
        (96, "measured", "measured already exists; choose another"),
        (100, "other", "is no multiple of"),
        (0, "other", "--image-size is 0; expected a whole number from 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            launch(monkeypatch, *words, "--image-size", size, "--out", tmp_path / out, name="tokenizer.py")
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    words[-1] = "3"
    launch(monkeypatch, *words, "--image-size", 96, "--out", tmp_path / "three", name="tokenizer.py")
    assert Image.open(tmp_path / "three" / "reconstructions.png").size == (3 * 96, 2 * 96)


def test_folders_of_another_class_are_named_so(tmp_path):
    with pytest.raises(
        UserError, match="image_tokenizer holds no open_lm model: its config.json is of another"
    ):
        convert_back(str(ASSETS / "image_tokenizer"), out=tmp_path / "back")
    shutil.copytree(ASSETS / "image_tokenizer", tmp_path / "kl")
    config = tmp_path / "kl" / "config.json"
    config.write_text(config.read_text().replace('"VQModel"', '"AutoencoderKL"'))
    with pytest.raises(UserError, match="its config.json is of AutoencoderKL; expected VQModel"):
        ImageTokenizer.load(tmp_path / "kl")
    assert not (tmp_path / "back").exists()
