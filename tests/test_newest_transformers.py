"""t2i and its exports under transformers 5, in an environment of its own (needs pip's index)."""

import os
import sys
import sysconfig
from pathlib import Path

import processes
import pytest
import torch

from t2i.runs.export import export
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints" / "transformers5.txt"
TESTS = (
    "tests/train/test_backbones.py", "tests/train/test_forgetting_less.py", "tests/train/test_image_weights.py",
    "tests/convert/test_gguf.py", "tests/measure/test_forgetting.py", "tests/model", "tests/runs/test_loading.py",
    "tests/measure/test_coco.py", "tests/measure/test_folder_features.py", "tests/generate/test_others.py",
)  # fmt: skip
"""Of training in every way, resuming, exporting, loading, drawing, forgetting, converting and scoring."""
pytestmark = pytest.mark.newest_transformers

SCRIPT = """
import sys, torch, transformers
from diffusers import DiffusionPipeline, VQModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True).eval()
assert "t2i" not in sys.modules
ids = torch.arange(1, 25)[None]
tokenizer = AutoTokenizer.from_pretrained(".")
image_tokenizer = VQModel.from_pretrained(".", subfolder="image_tokenizer").eval()
with torch.inference_mode():
    logits = model(ids).logits
generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
static = model.generate(ids, **settings, cache_implementation="static")
assert torch.equal(static, generated)
mask = torch.tensor([[0] * 5 + [1] * 19])
kinds = ({}, {"cache_implementation": "static"})
padded = [model.generate(ids, attention_mask=mask, **settings, **how) for how in kinds]
assert torch.equal(*padded)
asked = model(ids, output_hidden_states=True, output_attentions=True)
assert len(asked.hidden_states) == len(asked.attentions) + 1 == model.config.num_hidden_layers + 1
model.set_attn_implementation("eager")
torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-4)
body = AutoModel.from_pretrained(".", trust_remote_code=True).eval()
torch.testing.assert_close(body(ids).last_hidden_state, asked.hidden_states[-1], atol=1e-5, rtol=1e-4)
assert len(model(ids, labels=ids, return_dict=False)) == 2
assert list(tokenizer("a red apple")) == ["input_ids", "attention_mask"]
picture = model.draw(["picture 3"], tokenizer=tokenizer, image_tokenizer=image_tokenizer)[0]
assert picture.size == (64, 64)
pipe = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)
again = pipe("picture 3", generator=torch.Generator().manual_seed(0)).images[0]
assert again.tobytes() == picture.tobytes()
version = str(transformers.__version__)
torch.save({"logits": logits, "generated": generated, "version": version}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """Make the environment that the constraint file describes; return its Python."""
    folder = tmp_path_factory.mktemp("newest") / "venv"
    processes.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--requirement",
        CONSTRAINTS,
        "diffusers>=0.40",
    ]
    processes.run(pip, check=True)
    # What is not replaced comes from this environment, after the new one's own packages.
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "rest.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def of_newest(tmp_path):
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    return processes.environment(**modules)


@pytest.mark.parametrize("tests", TESTS)
def test_t2i_passes_its_own_tests(tests, newest, tmp_path):
    command = [newest, "-m", "pytest", tests]
    done = processes.run(
        command, cwd=ROOT, env=of_newest(tmp_path), capture_output=True, text=True, check=False, timeout=1_200
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_launched_run_trains_and_resumes(newest, finished, tmp_path):
    launcher = [
        newest,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--num_gpus",
        "2",
        "--module",
        "t2i",
        "train",
    ]
    settings = {
        "run-dir": tmp_path / "run",
        "data.shards": finished.data.shards,
        "data.seq_len": finished.data.seq_len,
        "model.init": finished.run_dir,
        "train.global_batch_tokens": finished.train.global_batch_tokens,
        "train.save_every": 1,
        "train.eval_every": 0,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    for steps in (1, 2):
        command = [
            *launcher,
            "--ds_config",
            ROOT / "ds_configs/zero2_fp32.json",
            *words,
            "--train.max_steps",
            str(steps),
        ]
        done = processes.run(
            command, cwd=ROOT, env=of_newest(tmp_path), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_an_export_loads_generates_and_draws(newest, finished, tmp_path):
    export(open_model(str(finished.run_dir), needs_images=True), out=tmp_path / "exported", command="a test")
    done = processes.run(
        [newest, "-c", SCRIPT, str(tmp_path / "found.pt")],
        cwd=tmp_path / "exported",
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = open_model(str(tmp_path / "exported"), needs_images=True).model
    ids = torch.arange(1, 25)[None]
    found = torch.load(Path(tmp_path / "found.pt"), weights_only=True)
    assert int(found["version"].split(".")[0]) >= 5
    with torch.inference_mode():
        # The same weights and products; 1e-5 is fp32's rounding at logits of about 1.
        assert torch.allclose(found["logits"], model(ids).logits, atol=1e-5)
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert found["generated"].tolist() == wanted.tolist()
