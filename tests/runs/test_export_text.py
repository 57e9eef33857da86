"""An exported folder as the language model that it also is: transformers' pipeline and the text benchmarks."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import pipeline

from t2i.errors import CheckpointError
from t2i.runs import export as exports
from t2i.runs.export import export
from t2i.runs.loading import open_model

QUESTIONS = [
    {"question": f"picture {index} is a", "choices": ["picture", "house", "dog"], "answer": index % 3}
    for index in range(6)
]
TASK = {
    "task": "pictures",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny"
    export(open_model(str(finished.run_dir), needs_images=True), out=out, command="a test")
    return out


def test_weights_are_exported_in_the_precision_that_they_are_stored_in(exported, tmp_path):
    stored = tmp_path / "half"
    opened = open_model(str(exported), needs_images=True)
    shutil.copytree(exported, stored)
    opened.model.to(torch.bfloat16).save_pretrained(stored)
    # Opened in fp32, as on every CPU: the exported file has not twice the size.
    export(open_model(str(stored), needs_images=True), out=tmp_path / "again", command="a test")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        stored / "model.safetensors"
    ).read_bytes()
    found = json.loads((tmp_path / "again" / "config.json").read_text())
    assert found.get("dtype", found.get("torch_dtype")) == "bfloat16"
    again = open_model(str(tmp_path / "again"), needs_images=True, dtype="bfloat16").model
    for name, value in load_file(stored / "model.safetensors").items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.1.feed_forward.w3.weight", "gives hidden states that differ by"),
        ("output.weight", "has another LM head"),
    ],
)
def test_an_export_that_is_another_model_is_refused(finished, tmp_path, monkeypatch, name, told):
    def damaged(source, target):
        if Path(target).name == "model.safetensors":
            tensors = load_file(source)
            save_file({**tensors, name: -tensors[name]}, target, metadata={"format": "pt"})
        else:
            shutil.copyfile(source, target)

    monkeypatch.setattr(exports, "shutil", SimpleNamespace(copyfile=damaged))
    with pytest.raises(CheckpointError, match=told):
        export(open_model(str(finished.run_dir), needs_images=True), out=tmp_path / "out", command="a test")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_generates_text(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    generate = pipeline("text-generation", model=str(exported), trust_remote_code=True, device="cpu")
    prompts = ["picture 3", "a picture of"]
    found = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    assert [each[0]["generated_text"].startswith(prompt) for each, prompt in zip(found, prompts, strict=True)]
    # Padding beside a longer prompt changes nothing.
    alone = generate(prompts[0], max_new_tokens=5, do_sample=False)
    assert alone == found[0]


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra: pip install '.[eval]'"
)
def test_the_language_model_evaluation_harness_runs(exported, tmp_path):
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}}
    (tmp_path / "pictures.yaml").write_text(yaml.safe_dump(task))
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={exported},trust_remote_code=True,dtype=float32",
        "--tasks", "pictures", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2",
        "--output_path", str(tmp_path / "found"),
    ]  # fmt: skip
    # Not the variables of a training that ran in this process.
    names = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    done = processes.run(
        command, cwd=tmp_path, env=processes.environment(**names), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next((tmp_path / "found").rglob("results_*.json")).read_text())
    assert found["results"]["pictures"]["acc,none"] * 6 == pytest.approx(
        round(found["results"]["pictures"]["acc,none"] * 6)
    )
    assert found["n-samples"]["pictures"]["effective"] == 6
