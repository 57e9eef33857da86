"""Causal language models of transformers' own classes in open_lm's place: trained, drawn from, measured, exported."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from built_models import built
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from t2i.config import ASSETS, SampleConfig
from t2i.cost.estimates import count_parameters
from t2i.errors import UserError
from t2i.generate.sample import draw_codes, drawer_of
from t2i.measure.embeddings import compare_rows
from t2i.measure.forgetting import complete
from t2i.measure.heldout import heldout_rows
from t2i.model.backbone import hidden_states, load_model
from t2i.model.open_lm.sampling_open_lm import prompt_ids, sample_codes
from t2i.runs.export import export
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.text import TextTokenizer
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
DS_CONFIG = ROOT / "ds_configs" / "zero2_fp32.json"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


def made(family, folder, tokenizer, **changes):
    """Write a random language model's folder, with more rows than its tokenizer has ids."""
    kind, config, settings = FAMILIES[family]
    torch.manual_seed(0)
    rows = tokenizer.num_tokens + 5
    model = kind(config(vocab_size=rows, max_position_embeddings=128, **SIZES, **settings, **changes))
    model.save_pretrained(folder)
    tokenizer.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, finished, tokenizer, tmp_path_factory):
    """A family's name, its folder before, and its run of four steps."""
    folder = tmp_path_factory.mktemp(request.param)
    start = made(request.param, folder / "language-model", tokenizer)
    config = replace(
        finished,
        run_dir=folder / "run",
        model=replace(finished.model, init=str(start)),
        train=replace(finished.train, max_steps=4, save_every=2, eval_every=4, lr=5e-3),
    )
    train(config, ds_config_path=DS_CONFIG)
    return request.param, start, config


def test_a_run_learns_and_keeps_the_class(trained):
    family, start, config = trained
    rows = read_metrics(config.run_dir)
    steps = [row for row in rows if "split" not in row]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    description = json.loads((config.run_dir / "checkpoints/step_000004/config.json").read_text())
    assert description["model_type"] == family
    opened = open_model(str(config.run_dir), needs_images=True)
    assert type(opened.model) is FAMILIES[family][0]
    assert opened.layout.to_dict() == description["vocab_layout"]
    assert opened.layout.num_text_rows == load_model(start).config.vocab_size
    state = load_file(config.run_dir / "checkpoints/step_000004/model.safetensors")
    assert ("lm_head.weight" in state) == (family == "llama")  # tied in qwen2, embed_out in gpt_neox
    counted = count_parameters(opened.model.config)
    assert counted.total == sum(value.numel() for value in opened.model.parameters())


def test_a_grown_model_gives_the_logits_it_gave_for_text(trained, tokenizer):
    _, start, config = trained
    before = load_model(start)
    after, _ = built(config, tokenizer)
    ids = torch.arange(40).view(2, 20)
    rows = before.config.vocab_size
    with torch.inference_mode():
        # The same products in a wider matrix: fp32 rounding of sums of 32 numbers.
        torch.testing.assert_close(after(ids).logits[..., :rows], before(ids).logits, atol=1e-5, rtol=1e-4)


def test_drawing_equals_whole_passes_without_a_cache(trained):
    _, _, config = trained
    opened = open_model(str(config.run_dir), needs_images=True)
    model, layout = opened.model, opened.layout
    prompts = [prompt_ids(text, num_text_rows=layout.num_text_rows) for text in ([5, 6, 7, 8], [9])]
    empty = prompt_ids([], num_text_rows=layout.num_text_rows)
    first = layout.first_image_id
    image_ids = range(first, first + layout.codebook_size)
    found = sample_codes(
        model, prompts, empty_prompt=empty, image_ids=image_ids, num_codes=4, seeds=[0, 1],
        guidance_scale=2.0, temperature=0,
    )  # fmt: skip
    for prompt, codes in zip(prompts, found.tolist(), strict=True):
        ids = []
        for _ in range(4):
            with torch.inference_mode():
                own, none = (
                    model(torch.tensor([[*start, *ids]])).logits[0, -1, first : image_ids.stop]
                    for start in (prompt, empty)
                )
            ids.append(int((none + 2.0 * (own - none)).argmax()) + first)
        assert [number - first for number in ids] == codes
    assert draw_codes(drawer_of(opened, settings=SampleConfig()), ["picture 3"]).shape == (1, 64)
    assert drawer_of(opened, settings=SampleConfig(compile=True)).settings.compile


def test_measures_open_it(trained, tokenizer):
    _, _, config = trained
    opened = open_model(str(config.run_dir), needs_images=False)
    row = heldout_rows(
        opened.model, config=config.data, layout=opened.layout, tokenizer=tokenizer, num_pictures=4
    )[0]
    seen = [row for row in read_metrics(config.run_dir) if row.get("split") == "heldout"][-1]
    assert row["image_loss"] == pytest.approx(seen["image_loss"], abs=1e-5)
    assert set(compare_rows(opened, before=None)) == {"input", "output"}
    text = complete(opened.model, ["The"], tokenizer=tokenizer, layout=opened.layout, max_new_tokens=3)
    assert len(text) == 1


@pytest.mark.parametrize(
    "trained", ["qwen2"], indirect=True
)  # one is enough: a process of its own takes long
def test_an_exported_folder_draws_with_its_own_script_and_without_t2i(trained, tmp_path):
    _, _, config = trained
    opened = open_model(str(config.run_dir), needs_images=True)
    out = tmp_path / "exported"
    export(opened, out=out, command="export")
    card = (out / "README.md").read_text()
    assert (
        card.count("trust_remote_code=True") == 2
    )  # the pipeline's alone: the model's class is transformers' own
    code = "".join(block.split("```")[0] for block in card.split("```python\n")[1:])
    code += "sys.path.insert(0, folder)\nfrom draw import draw\nrest = {'image_tokenizer': pipe.image_tokenizer}\n"
    code += "drawn = draw(model, captions, tokenizer=tokenizer, **rest)\nprint(len(images), len(drawn))"
    hidden = f"import sys\nsys.modules['t2i'] = None\n{code}"
    done = processes.run(
        [sys.executable, "-c", hidden], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip().endswith("2 2"), done.stderr[-2000:]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_new_rows_apart_and_adapters_work_with_tied_heads_too(family, finished, tokenizer, tmp_path):
    start = made(family, tmp_path / "language-model", tokenizer)
    config = replace(
        finished,
        run_dir=tmp_path / "run",
        model=replace(finished.model, init=str(start), lora_rank=2),
        train=replace(finished.train, max_steps=1, eval_every=0, new_embeddings_lr=1e-2),
    )
    train(config, ds_config_path=DS_CONFIG)
    before, after = load_model(start), open_model(str(config.run_dir), needs_images=True).model
    kept, new = before.config.vocab_size, after.config.vocab_size
    assert new > kept
    for side in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(after, side)().weight[:kept], getattr(before, side)().weight)
    tied = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert tied == (family == "qwen2")
    assert not torch.equal(
        after.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight
    )


def test_models_that_transformers_does_not_know_are_refused(tokenizer, tmp_path):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    assert hidden_states(load_model(tmp_path / "gpt2"), torch.tensor([[1, 2]])).shape == (1, 2, 32)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "none-such"}')
    with pytest.raises(UserError, match="is no language model that transformers knows: .* has model_type"):
        load_model(tmp_path / "strange")


def test_more_positions_than_a_model_has_are_refused(finished, tokenizer, tmp_path):
    start = made("llama", tmp_path / "language-model", tokenizer)
    config = replace(
        finished,
        model=replace(finished.model, init=str(start)),
        data=replace(finished.data, seq_len=129),
    )
    with pytest.raises(UserError, match="data.seq_len is 129; expected <= 128, the positions of"):
        built(config, tokenizer)


def test_the_class_is_what_transformers_loads(trained):
    family, _, config = trained
    model = AutoModelForCausalLM.from_pretrained(config.run_dir / "checkpoints/step_000004")
    assert type(model) is FAMILIES[family][0]


def start_of(config, tokenizer):
    model, layout = built(config, tokenizer)
    return {name: value.detach() for name, value in model.named_parameters()}, layout


def test_a_fresh_start_keeps_the_architecture_and_draws_it_anew_for_each_seed(finished, tokenizer, tmp_path):
    start = made("qwen2", tmp_path / "language-model", tokenizer, rope_theta=5e4)

    def fresh(seed, **model):
        config = replace(finished.model, init=str(start), control_init="fresh", new_embeddings="own", **model)
        return start_of(replace(finished, model=config, train=replace(finished.train, seed=seed)), tokenizer)

    (one, layout), (again, _), (other, _), (wide, _) = (
        fresh(1),
        fresh(1),
        fresh(2),
        fresh(1, init_std=0.1),
    )
    loaded, _ = start_of(replace(finished, model=replace(finished.model, init=str(start))), tokenizer)
    name, rows = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    assert {key: value.shape for key, value in one.items()} == {
        key: value.shape for key, value in loaded.items()
    }
    assert torch.equal(one[name], again[name]) and torch.equal(one[rows], again[rows])
    assert not torch.equal(one[name], other[name]) and not torch.equal(one[name], loaded[name])
    # Qwen2's own rule has a deviation of 0.02; `own` draws new rows as the class draws its text rows.
    new = slice(layout.num_text_rows, None)
    for found, std in ((one, 0.02), (wide, 0.1)):
        assert found[name].std().item() == pytest.approx(std, rel=0.1)
        assert found[rows][new].std().item() == pytest.approx(std, rel=0.1)


def test_a_fresh_start_is_in_fp32_as_the_loaded_one_that_it_is_compared_with(finished, tokenizer, tmp_path):
    start = made("llama", tmp_path / "language-model", tokenizer)
    AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16).save_pretrained(start)
    assert json.loads((start / "config.json").read_text())["dtype"] == "bfloat16"
    for control in ("none", "fresh"):
        config = replace(finished.model, init=str(start), control_init=control)
        weights, _ = start_of(replace(finished, model=config), tokenizer)
        assert {value.dtype for value in weights.values()} == {torch.float32}, control


def test_a_deviation_without_a_fresh_start_or_for_a_class_that_takes_none_is_refused(
    finished, tokenizer, tmp_path
):
    with pytest.raises(UserError, match="model.init_std is 0.1; expected None unless control_init is fresh"):
        replace(finished.model, init_std=0.1)
    with pytest.raises(
        UserError, match=r"model.num_heads is 7; expected a number that divides model.hidden_size"
    ):
        replace(finished, model=replace(finished.model, num_heads=7))
    open_lm = replace(finished.model, init=str(finished.run_dir), control_init="fresh", init_std=0.1)
    with pytest.raises(UserError, match="OpenLMConfig draws by a rule without such a deviation"):
        start_of(replace(finished, model=open_lm), tokenizer)


def test_an_image_code_of_a_loaded_model_begins_at_the_uniform_cost_and_a_debt_is_said(
    finished, tokenizer, tmp_path, caplog
):
    start = made("llama", tmp_path / "language-model", tokenizer)
    weights = load_model(start)
    with torch.no_grad():
        weights.lm_head.weight *= 60  # a model with opinions: its logits differ by several nats
    weights.save_pretrained(start)
    loaded = replace(finished.model, init=str(start))
    start_of(replace(finished, model=loaded), tokenizer)
    assert "an image code costs" not in caplog.text
    start_of(replace(finished, model=replace(loaded, new_embeddings="mean")), tokenizer)
    assert "with model.new_embeddings mean an image code costs" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_may_be_of_each_family(family, finished, tokenizer):
    config = replace(finished, model=replace(finished.model, family=family))
    model, layout = built(config, tokenizer)
    assert type(model) is FAMILIES[family][0]
    assert len(model.get_input_embeddings().weight) == layout.vocab_size
    assert model.config.num_hidden_layers == finished.model.num_layers
    # Not the class's own default, which is another token of this tokenizer.
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.end_id


def test_a_class_of_its_folders_own_code_trains_draws_and_exports_where_it_is_trusted(
    finished, tokenizer, tmp_path
):
    start = made("llama", tmp_path / "language-model", tokenizer)
    (start / "strangers.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'strangers'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    description = json.loads((start / "config.json").read_text())
    own = {"AutoConfig": "strangers.Config", "AutoModelForCausalLM": "strangers.Model"}
    (start / "config.json").write_text(
        json.dumps({**description, "model_type": "strangers", "auto_map": own})
    )
    config = replace(
        finished,
        run_dir=tmp_path / "run",
        model=replace(finished.model, init=str(start)),
        train=replace(finished.train, max_steps=1, eval_every=0),
    )
    with pytest.raises(UserError, match=r"strangers\.Model\), which is not run"):
        train(config, ds_config_path=DS_CONFIG)
    trusted = replace(config, model=replace(config.model, trust_remote_code=True))
    train(trusted, ds_config_path=DS_CONFIG)
    train(replace(trusted, train=replace(trusted.train, max_steps=2)), ds_config_path=DS_CONFIG)  # resumed
    # What the run wrote down gives no permission to whoever opens it.
    with pytest.raises(UserError, match="--trust-remote-code"):
        open_model(str(config.run_dir), needs_images=True)
    opened = open_model(str(config.run_dir), needs_images=True, trust_remote_code=True)
    assert draw_codes(drawer_of(opened, settings=SampleConfig()), ["picture 3"]).shape == (1, 64)
    export(opened, out=tmp_path / "exported", command="export", trust_remote_code=True)
    assert (tmp_path / "exported" / "strangers.py").is_file()
    assert "trust_remote_code=True" in (tmp_path / "exported" / "README.md").read_text()


def test_a_class_that_cannot_be_drawn_from_is_refused_before_training(finished, tokenizer, tmp_path):
    start = tmp_path / "language-model"
    sizes = {"vocab_size": tokenizer.num_tokens, "num_attention_heads": 4, **SIZES, "num_hidden_layers": 1}
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(**sizes, is_decoder=False, initializer_range=0.2)).save_pretrained(start)
    tokenizer.tokenizer.save_pretrained(start)
    config = replace(finished, model=replace(finished.model, init=str(start)))
    with pytest.raises(UserError, match=r"language-model \(BertLMHeadModel\) cannot be drawn from: "):
        built(config, tokenizer)
