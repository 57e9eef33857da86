"""Image positions have weights of their own: a model learns to draw, and its text stays bit for bit what it was."""

import copy
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from t2i.config import ASSETS, ModelConfig
from t2i.data.shards.manifest import Maker, read_manifest
from t2i.errors import CheckpointError, UserError
from t2i.measure.forgetting import complete
from t2i.model.backbone import load_model, made_of
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.configuration_routed import RoutedConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.modeling_routed import RoutedForCausalLM
from t2i.model.open_lm.sampling_open_lm import prompt_ids, sample_codes
from t2i.model.routing import check_precision, is_of_images, text_hash
from t2i.runs.export import export
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.text import TextTokenizer
from t2i.train.build import build_model
from t2i.train.main import train

DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero2_fp32.json"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 48, "num_key_value_heads": 2}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "open_lm": (OpenLMForCausalLM, OpenLMConfig, {}),
}
KINDS = {"llama": ("feed-forward", 0), "qwen2": ("all", 0), "open_lm": ("lora", 2)}
TEXT = torch.arange(5, 65).view(3, 20)


def made(kind, folder):
    """Write a random language model's folder."""
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    model_class, config, settings = CLASSES[kind]
    torch.manual_seed(0)
    model_class(config(vocab_size=tokenizer.num_tokens + 5, **SIZES, **settings)).save_pretrained(folder)
    tokenizer.tokenizer.save_pretrained(folder)
    return folder


def text_logits(model, ids=TEXT):
    with torch.inference_mode():
        return model.eval()(ids).logits


@pytest.fixture(scope="module", params=CLASSES)
def trained(request, finished, tmp_path_factory):
    """A language model's folder, and a run of four steps that gave it image weights."""
    folder = tmp_path_factory.mktemp(request.param)
    start = made(request.param, folder / "language-model")
    weights, rank = KINDS[request.param]
    config = replace(
        finished,
        run_dir=folder / "run",
        model=replace(finished.model, init=str(start), image_weights=weights, lora_rank=rank),
        train=replace(finished.train, max_steps=4, save_every=2, eval_every=4, lr=5e-3),
    )
    train(config, ds_config_path=DS_CONFIG)
    return start, config


def test_text_logits_are_bit_for_bit_the_language_models_and_images_are_learned(trained):
    start, config = trained
    before = load_model(start)
    for step in (2, 4):
        after = load_model(config.run_dir / f"checkpoints/step_00000{step}")
        assert torch.equal(text_logits(after)[..., : before.config.vocab_size], text_logits(before))
    losses = [row["image_loss"] for row in read_metrics(config.run_dir) if row.get("split") == "heldout"]
    assert losses[-1] < math.log(after.config.vocab_size) - 0.1
    seen = json.loads((config.run_dir / "checkpoints/step_000004/manifest.json").read_text())
    parameters = seen["parameters"]
    assert 0 < parameters["learned"] < parameters["all"]
    # Adam's two moments in fp32 of what is trained, and of nothing else.
    assert seen["optimizer_state_bytes"] == pytest.approx(8 * parameters["learned"], rel=0.01)


def test_a_run_goes_on_bit_for_bit_from_a_checkpoint(trained, tmp_path):
    _, config = trained
    again = replace(config, run_dir=tmp_path / "run")
    shutil.copytree(config.run_dir, again.run_dir)
    shutil.rmtree(again.run_dir / "checkpoints/step_000004")
    train(again, ds_config_path=DS_CONFIG)
    one, other = (
        load_file(folder / "checkpoints/step_000004/model.safetensors")
        for folder in (config.run_dir, again.run_dir)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_each_position_passes_the_weights_of_its_kind(trained):
    start, config = trained
    routed = load_model(config.run_dir / "checkpoints/step_000004").eval()
    first = routed.config.num_text_rows
    ids = torch.cat([TEXT, torch.arange(first, first + 30).view(3, 10)], dim=1)
    whole = routed(ids).logits
    # With everything of images taken away, the text before the image is the same.
    plain = load_model(start)
    rows = plain.config.vocab_size
    torch.testing.assert_close(whole[:, :20, :rows], text_logits(plain), atol=1e-5, rtol=0)
    # Image positions one by one, behind a cache, as they are drawn: the same logits as in one pass.
    step, cache = [], None
    for place in range(ids.shape[1]):
        out = routed(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step.append(out.logits)
    torch.testing.assert_close(torch.cat(step, dim=1), whole, atol=2e-5, rtol=0)
    # The image weights act: the language model alone, on the same ids, would say something else.
    state = {name: value for name, value in routed.named_parameters() if is_of_images(name)}
    assert state
    before = whole[:, -1].clone()
    with torch.no_grad():
        next(iter(state.values())).mul_(0)
    assert not torch.allclose(routed(ids).logits[:, -1], before)
    assert torch.equal(text_logits(routed)[..., :rows], text_logits(plain))


def test_an_export_draws_the_same_codes_and_keeps_the_text_where_t2i_is_not_installed(trained, tmp_path):
    start, config = trained
    opened = open_model(str(config.run_dir), needs_images=True)
    export(opened, out=tmp_path / "exported", command="export")
    layout = opened.layout
    how = {
        "prompts": [prompt_ids([7, 8, 9], num_text_rows=layout.num_text_rows)],
        "empty_prompt": prompt_ids([], num_text_rows=layout.num_text_rows),
        "num_codes": 6,
        "seeds": [3],
        "guidance_scale": 2.0,
    }
    codes = sample_codes(opened.model, image_ids=layout.image_rows, **how)
    code = f"""
import sys
sys.modules["t2i"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True).eval()
sample_codes = sys.modules[type(model).draw.__module__].sample_codes
rows = range({layout.image_rows.start}, {layout.image_rows.stop})
codes = sample_codes(model, image_ids=rows, **{how!r})
reading = sys.modules[sample_codes.__module__.replace("sampling", "reading")]
is_fast = reading.is_served(model)
reading.is_served = lambda *_, **__: False
slow = sample_codes(model, image_ids=rows, **{how!r})
ids = torch.arange(5, 65).view(3, 20)
mask = torch.ones_like(ids)
text = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
with torch.inference_mode():
    logits = model(ids).logits
torch.save({{"codes": codes, "slow": slow, "is_fast": is_fast, "logits": logits, "text": text}}, "said.pt")
"""
    done = processes.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = torch.load(tmp_path / "said.pt", weights_only=True)
    plain = load_model(start)
    assert torch.equal(said["codes"], codes)
    assert torch.equal(said["slow"], codes)
    # open_lm's layers are not transformers' own, but they too continue from a cache that is not theirs.
    assert said["is_fast"]
    assert torch.equal(said["logits"][..., : plain.config.vocab_size], text_logits(plain))
    # What generate() chooses is text of the tokenizer, whatever codes have learned to weigh.
    assert said["text"].max() < layout.num_text_tokens
    assert "trust_remote_code" in (tmp_path / "exported" / "README.md").read_text()


def test_its_completions_are_those_of_the_language_model(trained):
    start, config = trained
    before, after = (open_model(str(name), needs_images=False) for name in (start, config.run_dir))
    prompts = ["The", "a small green frog sits on"]
    said = [
        complete(one.model, prompts, tokenizer=one.text_tokenizer, layout=one.layout, max_new_tokens=8)
        for one in (before, after)
    ]
    assert said[0] == said[1]


def test_a_run_begins_from_a_routed_one_with_its_own_kind_and_codes_alone(trained, tmp_path):
    _, config = trained
    begun = replace(
        config,
        run_dir=tmp_path / "run",
        model=replace(config.model, init=str(config.run_dir)),
        train=replace(config.train, max_steps=1, eval_every=0),
    )
    plain = replace(begun.model, image_weights="none", lora_rank=0)
    with pytest.raises(UserError, match="has image weights; expected model.image_weights"):
        train(replace(begun, model=plain), ds_config_path=DS_CONFIG)
    manifest = read_manifest(config.data.shards)
    other = replace(manifest, image_tokenizer=Maker("another", "another"))
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    with pytest.raises(UserError, match="for other image codes"):
        build_model(begun.model, data=begun.data, train=begun.train, manifest=other, text_tokenizer=tokenizer)
    train(begun, ds_config_path=DS_CONFIG)
    one, other = (
        load_model(run.run_dir / "checkpoints" / step)
        for run, step in ((config, "step_000004"), (begun, "step_000001"))
    )
    rows = one.config.num_text_rows
    assert torch.equal(text_logits(one)[..., :rows], text_logits(other)[..., :rows])


def test_the_untrained_twin_that_scores_stand_beside_can_be_made(trained):
    _, config = trained
    model = load_model(config.run_dir / "checkpoints/step_000004")
    twin = made_of(model.config)
    shapes = [{name: value.shape for name, value in one.named_parameters()} for one in (model, twin)]
    assert shapes[0] == shapes[1]


def test_it_loads_in_the_precision_that_is_asked_for_or_stored(trained, tmp_path):
    _, config = trained
    checkpoint = config.run_dir / "checkpoints" / "step_000004"
    stored = shutil.copytree(checkpoint, tmp_path / "bf16", ignore=shutil.ignore_patterns("engine"))
    load_model(stored, dtype=torch.bfloat16).save_pretrained(stored)
    for folder, asked, expected in (
        (checkpoint, torch.bfloat16, torch.bfloat16),
        (stored, "stored", torch.bfloat16),
        (stored, torch.float32, torch.float32),
    ):
        model = load_model(folder, dtype=asked)
        assert {value.dtype for value in model.parameters()} == {expected}, (folder, asked)


def test_text_weights_that_changed_are_not_exported(trained, tmp_path):
    _, config = trained
    shutil.copytree(config.run_dir, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/step_000004"
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "norm" in name and not is_of_images(name))
    tensors[name] += 1e-3
    opened = open_model(str(config.run_dir), needs_images=True)
    broken = copy.deepcopy(opened.model)
    broken.load_state_dict(tensors, strict=False)
    with pytest.raises(CheckpointError, match="no longer those of the language model"):
        export(replace(opened, model=broken), out=tmp_path / "exported", command="export")
    assert not (tmp_path / "exported").exists()


def test_a_precision_that_would_round_the_language_model_is_refused():
    config = LlamaConfig(vocab_size=64, intermediate_size=48, **SIZES)
    model = RoutedForCausalLM(RoutedConfig(text_config=config, num_text_rows=60))
    with pytest.raises(UserError, match="bfloat16 would round"):
        check_precision(model, dtype=torch.bfloat16)
    check_precision(model, dtype=torch.float32)
    before = text_hash(model.bfloat16())
    check_precision(model, dtype=torch.bfloat16)
    assert text_hash(model.float()) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init": "random"}, "expected model.init to name one"),
        ({"control_init": "moments"}, "model.control_init none"),
        ({"trainable": "norms"}, "model.trainable is norms; expected all"),
        ({"lora_rank": 4}, "model.lora_rank 4; expected a rank with lora"),
        ({"image_weights": "lora"}, "model.lora_rank 0; expected a rank with lora"),
    ],
)
def test_settings_that_contradict_image_weights_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        ModelConfig(**{"init": "runs/language-model", "image_weights": "feed-forward", **settings})
