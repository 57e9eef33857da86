"""Settings together that are each fine alone, and folders that strangers bring."""

import json
import logging
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from built_models import built
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from t2i.commands import export, prepare
from t2i.config import ASSETS, AlignConfig, AlignRun, TrainConfig
from t2i.data.prepare.text import prepare_text
from t2i.data.shards.manifest import read_manifest
from t2i.data.sources.documents import open_documents
from t2i.distributed.launch import start_processes
from t2i.errors import DataError, Stopped, UserError, run_command
from t2i.model.backbone import head_of, hidden_states, load_model
from t2i.model.loss import summed_loss
from t2i.model.resize import merged_state_dict
from t2i.model.trainable import add_lora, layers_of, recompute_activations
from t2i.runs.checkpoint_manifest import read_checkpoint_manifest, step_folder
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.text import TextTokenizer
from t2i.train import inputs, main, resume_check
from t2i.train.align import align
from t2i.train.main import train
from t2i.train.periodic import periodic_work
from t2i.train.progress import Progress
from t2i.train.start import loaded_start

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero2_fp32.json"


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


def made(folder, tokenizer, **changes):
    """Write a random Llama's folder, with more embeddings than its tokenizer has ids."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.num_tokens + 5, **SIZES, **changes)).save_pretrained(
        folder
    )
    tokenizer.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    return made(tmp_path_factory.mktemp("llama"), tokenizer, attention_dropout=0.5)


def loaded(folder):
    return load_model(folder).train()


def calls_per_layer(model):
    """Count how often each layer computes in a forward and a backward pass."""
    counts = [0] * len(layers_of(model))

    def count(layer, *_):
        counts[layer.place] += 1

    for place, layer in enumerate(layers_of(model)):
        layer.input_layernorm.place = place
        layer.input_layernorm.register_forward_hook(count)
    ids = torch.arange(5, 13)[None]
    loss, *_ = summed_loss(hidden_states(model, ids), ids, head=head_of(model))
    loss.backward()
    return counts


@pytest.mark.parametrize("is_on", [False, True])
def test_a_loaded_model_trains_in_training_mode_and_recomputes_activations_if_asked(
    is_on, llama, finished, tokenizer
):
    model_config = replace(finished.model, init=str(llama), gradient_checkpointing=is_on)
    model, _ = built(replace(finished, model=model_config), tokenizer)
    assert all(module.training for module in model.modules())
    assert calls_per_layer(model) == [2 if is_on else 1] * 2


def test_adapters_learn_under_gradient_checkpointing_without_new_embeddings(llama):
    model = loaded(llama)
    recompute_activations(model)
    add_lora(model, rank=2)
    assert calls_per_layer(model) == [2, 2]
    gradients = [value.grad for name, value in model.named_parameters() if ".lora_B" in name]
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_class_without_gradient_checkpointing_is_refused(llama):
    model = loaded(llama)
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"^model\.gradient_checkpointing is on; expected off: Llama"):
        recompute_activations(model)


def test_adapters_are_merged_off_the_device_that_trains_them(llama, monkeypatch):
    model = loaded(llama)
    add_lora(model, rank=2)
    moved, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(self.shape), real(self))[1])
    merged = merged_state_dict(model)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(moved) == 2 * len(adapted) > 0  # each matrix and what is added to it
    assert merged.keys() == load_model(llama).state_dict().keys()


def test_a_rate_of_its_own_needs_one_that_it_is_a_multiple_of():
    with pytest.raises(
        UserError, match=r"train.new_embeddings_lr is 0.1 and train.lr 0; expected train.lr > 0"
    ):
        TrainConfig(lr=0, new_embeddings_lr=0.1)
    assert TrainConfig(lr=0).lr == 0


def test_less_is_measured_after_a_resume_than_was_pending(finished, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    restored = Progress(step=6, owed=[0, 1, 2])
    monkeypatch.setattr(main.Saver, "restore", lambda self: restored)
    train(replace(finished, run_dir=run_dir), ds_config_path=DS_CONFIG)
    assert restored.owed == []  # the held-out losses were measured; samples and text are no longer asked for


def test_a_proof_of_resuming_leaves_out_the_prompts_of_samples(finished, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red block\n")
    settings = replace(finished.train, sample_every=2, sample_prompts=prompts)
    asked = []
    reached = {}

    def train_to(config, *, stop_at, **_):
        asked.append(config)
        reached[config.run_dir] = stop_at

    monkeypatch.setattr(resume_check, "train", train_to)
    monkeypatch.setattr(resume_check.checkpoints, "last_step", lambda run_dir: reached.get(run_dir, 0))
    config = replace(finished, run_dir=tmp_path / "verify", train=settings)
    resume_check.train_both(config, ds_config_path=DS_CONFIG, num_steps=4)
    assert len(asked) == 3
    for one in asked:
        inputs.check_before_start(one, world_size=1)


def test_a_proof_of_resuming_that_is_stopped_ends_and_compares_nothing_less(finished, tmp_path, monkeypatch):
    reached, trained = {}, []

    def train_to(config, *, stop_at, **_):
        trained.append(config.run_dir.name)
        reached[config.run_dir] = stop_at - (3 if len(trained) in stopped else 0)
        raise Stopped("as asked")

    monkeypatch.setattr(resume_check, "train", train_to)
    monkeypatch.setattr(resume_check.checkpoints, "last_step", lambda run_dir: reached.get(run_dir, 0))
    config = replace(finished, run_dir=tmp_path / "verify")
    proof = partial(resume_check.train_both, config, ds_config_path=DS_CONFIG)
    stopped = {1}
    with pytest.raises(
        Stopped, match=r"Stopped at step 5 of 8 in .*whole; remove .*verify, for it is trained at"
    ):
        proof(num_steps=8)
    assert trained == ["whole"]
    # A training that was resumed is nothing to compare a resumed one with; nor is one of other length.
    for steps in (8, 16):
        with pytest.raises(UserError, match=rf"whole is at step 5; expected none or all of {steps} steps"):
            proof(num_steps=steps)
    reached.clear()
    stopped = {3}
    with pytest.raises(Stopped, match=r"Stopped at step 1 of 4 in .*halves; run the same command"):
        proof(num_steps=8)
    assert proof(num_steps=8) == (tmp_path / "verify" / "whole", tmp_path / "verify" / "halves")


def test_weights_in_several_files_are_compared(finished, tmp_path, monkeypatch):
    found, wanted = (tmp_path / name for name in ("found", "wanted"))
    for run in (found, wanted):
        shutil.copytree(finished.run_dir, run)
        folder = step_folder(run, 6)
        whole = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(whole)
        for place, part in enumerate((names[::2], names[1::2])):
            changed = {name: whole[name] + (run is found and name == names[1]) for name in part}
            save_file(changed, folder / f"model-{place}.safetensors")
    monkeypatch.setattr(resume_check.checkpoints, "verify", read_checkpoint_manifest)
    said = resume_check.first_difference(found, wanted, step=6)
    assert f"weights of {names[1]} differ by up to 1.00e+00" in said
    assert resume_check.first_difference(wanted, wanted, step=6) == ""


@pytest.fixture(scope="module")
def text_shards(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text(
        "\n\n".join(f"Paragraph {n} says that {n} is no {n - 1}." for n in range(99))
    )
    documents = open_documents(f"text:{folder / 'all.txt'}")
    out = folder / "shards"
    prepare_text(documents, out=out, text_tokenizer=tokenizer, seq_len=90, heldout_share=0.3)
    return out


@pytest.mark.parametrize("kind", ["feed-forward", "lora"])
@pytest.mark.parametrize("is_half", [False, True])
def test_image_weights_keep_their_gradient_where_the_last_micro_batch_has_no_image(
    kind, is_half, text_shards, finished, tokenizer, tmp_path
):
    start = made(tmp_path / "llama", tokenizer)
    model = load_model(start)
    model.to(torch.bfloat16).save_pretrained(start)
    rank = 2 if kind == "lora" else 0
    config = replace(
        finished,
        data=replace(finished.data, replay_ratio=0.5, replay_shards=text_shards),
        model=replace(finished.model, init=str(start), image_weights=kind, lora_rank=rank),
        train=replace(finished.train, max_steps=2, eval_every=0, save_every=0),
    )
    norms = {}
    # Replayed text is longest, so that of two micro-batches the second is text alone.
    for size in (8, 4):
        given = json.loads(DS_CONFIG.read_text()) | {"train_micro_batch_size_per_gpu": size}
        if is_half:
            given |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        json_file = tmp_path / f"{size}.json"
        json_file.write_text(json.dumps(given))
        train(replace(config, run_dir=tmp_path / str(size)), ds_config_path=json_file)
        norms[size] = [row["grad_norm"] for row in read_metrics(tmp_path / str(size))]
    assert norms[4] == pytest.approx(norms[8], rel=0.02 if is_half else 1e-4)


def test_text_has_nothing_to_align(text_shards, llama, finished, tmp_path):
    start_processes()
    data = replace(finished.data, shards=text_shards)
    run = AlignRun(run_dir=tmp_path / "aligned", data=data, model=str(llama), align=AlignConfig(num_pairs=2))
    with pytest.raises(DataError, match="holds text only; expected shards of captioned images to align"):
        align(run)


def test_replayed_text_is_no_pair_to_align(text_shards, llama, finished, tmp_path, monkeypatch):
    start_processes()
    seen = []
    monkeypatch.setattr(
        "t2i.train.align._step",
        lambda _, ids, **rest: seen.append(ids) or {"input_rows": 0.0, "output_rows": 0.0},
    )
    data = replace(finished.data, replay_ratio=0.5, replay_shards=text_shards)
    settings = AlignConfig(num_pairs=8, max_steps=1)
    align(AlignRun(run_dir=tmp_path / "aligned", data=data, model=str(llama), align=settings))
    first_special = 5 + TextTokenizer.load(llama).num_tokens  # all sequences begin with <doc>
    assert (seen[0][:, 0] == first_special).all() and len(seen[0]) == 8


def test_it_is_said_where_embeddings_of_codes_begin_anew_or_are_kept(finished, tokenizer, tmp_path, caplog):
    manifest = read_manifest(finished.data.shards)
    outside = tmp_path / "copied"
    shutil.copytree(step_folder(finished.run_dir, 6), outside)
    for init, is_known in ((str(finished.run_dir), True), (str(outside), False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            start = loaded_start(init, manifest=manifest, text_tokenizer=tokenizer, trust_remote_code=False)
            assert (start.num_kept == start.layout.vocab_size) == is_known
            assert ("begin anew" in caplog.text) == (not is_known)
    with caplog.at_level(logging.WARNING):
        model = replace(finished.model, init=str(finished.run_dir), new_embeddings="mean")
        built(replace(finished, model=model), tokenizer)
    assert "model.new_embeddings mean is not used" in caplog.text


@pytest.mark.parametrize("text", ["no/text", "mien.txt"])
def test_text_to_measure_is_looked_for_before_anything_starts(text, finished):
    with pytest.raises(DataError, match=rf"train.eval_text is {text}, .* does not exist here"):
        inputs.check_before_start(
            replace(finished, train=replace(finished.train, eval_text=text)), world_size=1
        )


def test_samples_that_cannot_be_drawn_are_said(finished, caplog):
    manifest = read_manifest(finished.data.shards)
    given = SimpleNamespace(manifest=manifest, text_tokenizer=None, image_tokenizer=None)
    learner = SimpleNamespace(model=None, layout=None)
    settings = replace(finished.train, sample_every=2)
    with caplog.at_level(logging.WARNING):
        found = periodic_work(settings, data=finished.data, learner=learner, inputs=given, writer=object())
    assert len(found) == 1 and "train.sample_every is 2, but nothing is drawn" in caplog.text


def status_of(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["t2i", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_command(module.main)
    return end.value.code


def test_an_export_that_would_overwrite_is_refused_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("link", "."):
        assert status_of(export, monkeypatch, "no/model", "--out", tmp_path / name) == 2
        assert "already exists; choose another" in capsys.readouterr().err


def test_documents_take_no_settings_of_images_and_one_process(tmp_path, monkeypatch, capsys):
    words = ["--source", "text:docstrings", "--out", tmp_path / "out"]
    assert status_of(prepare, monkeypatch, *words, "--views", 2, "--min-side", 64) == 2
    assert "has documents, not images; leave out --min-side, --views." in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert status_of(prepare, monkeypatch, *words) == 2
    assert "is packed by one process; found 2" in capsys.readouterr().err
