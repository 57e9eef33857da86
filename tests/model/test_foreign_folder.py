"""Model folders from elsewhere: nothing of theirs runs or fetches more; what they say is mended or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from t2i.errors import UserError
from t2i.model.backbone import load_model, read_model_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain") / "llama"
    LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("stdin was asked"))
    return Path(shutil.copytree(plain, tmp_path / "model"))


def edit(file, **changes):
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **changes}))


def trap(folder, *names):
    """Write Python files that leave a mark beside the folder when they run, and return where."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import os\nos.mkdir({str(folder.parent / 'ran')!r})\n")
    return folder.parent / "ran"


OWN = {"AutoConfig": "conf.Config", "AutoModelForCausalLM": "conf.Model"}


@pytest.mark.parametrize(
    "kind", ["strangers", "vit"], ids=["an unknown type", "a type that is no language model"]
)
def test_a_folders_own_code_is_refused_with_its_file_and_the_flag(kind, folder):
    ran = trap(folder, "conf.py")
    edit(folder / "config.json", model_type=kind, auto_map=OWN)
    with pytest.raises(
        UserError, match=r"config\.json: conf\.Config, conf\.Model\), which is not run.*--trust-remote-code"
    ):
        load_model(folder)
    assert not ran.exists()


def test_code_runs_only_where_it_is_trusted_and_goes_along_when_saved(folder, tmp_path):
    (folder / "conf.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'strangers'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    edit(folder / "config.json", model_type="strangers", auto_map=OWN)
    model = load_model(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="--trust-remote-code"):
        load_model(tmp_path / "saved")
    again = load_model(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(again(torch.tensor([[1, 2]])).logits, model(torch.tensor([[1, 2]])).logits)


def test_files_that_nothing_names_are_never_imported(folder):
    # transformers runs the last of these for any local folder, whatever trust_remote_code says.
    ran = trap(folder, "conf.py", "modeling_llama.py", "custom_generate/generate.py")
    edit(folder / "config.json", auto_map=OWN)
    edit(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "conf.Processor"})
    load_model(folder)
    edit(folder / "config.json", text_config={"auto_map": OWN, "model_type": "strangers"})
    with pytest.raises(UserError, match="is no causal language model"):
        load_model(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"_attn_implementation": "owner/kernel"},
        {"attn_implementation": "owner/kernel@main:forward"},
        {"_attn_implementation": {"": "eager", "text_config": "owner/kernel"}},
        {"text_config": {"layers": [{"_attn_implementation_internal": "owner/kernel"}]}},
        {"_attn_implementation": "flash|owner/kernel"},
        {"_attn_implementation": "flash_attention_2"},  # not installed here: transformers would fetch one
    ],
)
def test_attention_kernels_of_the_hub_are_refused_by_name(change, folder):
    edit(folder / "config.json", **change)
    with pytest.raises(
        UserError, match=r"names the attention kernels '.*(kernel|flash).*'; expected one of eager, sdpa"
    ):
        read_model_config(folder)


def test_adapters_that_name_another_model_are_refused(folder):
    edit(folder / "adapter_config.json", base_model_name_or_path="somebody/other", peft_type="LORA")
    with pytest.raises(UserError, match=r"holds adapters of 'somebody/other' .*; expected a whole model"):
        load_model(folder)


CONTRADICTORY = {"temperature": 0.9, "top_p": 0.6}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_contradictory_defaults_of_generate_are_mended_when_they_are_read(file, folder, tmp_path, caplog):
    (folder / "generation_config.json").unlink()
    edit(folder / file, **CONTRADICTORY, eos_token_id=7)
    with caplog.at_level("WARNING"):
        model = load_model(folder)
    assert "were mended" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    kept = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (kept.do_sample, kept.temperature, kept.top_p, kept.eos_token_id) == (True, 0.9, 0.6, 7)


def test_of_defaults_that_cannot_be_mended_the_token_ids_are_kept(folder, tmp_path):
    edit(folder / "generation_config.json", num_beams="many", eos_token_id=7)
    load_model(folder).save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 7


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"cache_implementation": "none-such"}', '{"num_return_sequences": 3}']
)
def test_defaults_of_generate_that_are_none_are_refused_by_file(text, folder):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": "x"}'),
        ("model.safetensors", b"\x08"),
        ("model.safetensors", b""),
    ],
)
def test_a_broken_file_is_one_sentence_about_the_folder(name, content, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=str(folder)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
