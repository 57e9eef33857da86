"""Every command over a stranger's folder full of traps. A trap makes a file when it runs; none is ever there."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.runs.export import export
from t2i.runs.loading import open_model
from t2i.verbs import SCRIPTS

ROOT = Path(__file__).parents[2]
DS_CONFIG = ROOT / "ds_configs" / "zero2_fp32.json"
OWN = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    "AutoProcessor": "evil.Processor",
    "AutoImageProcessor": "evil.Processor",
}
EXPECTED = (0, 2, 3, 5)
"""Exit statuses: done, or one sentence. A traceback would end the test."""


class Evil:
    """Pickled, it makes a folder when it is read the careless way."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny"
    export(open_model(str(finished.run_dir), needs_images=True), out=out, command="a test")
    return out


@pytest.fixture
def traps(exported, tmp_path, monkeypatch):
    """An exported folder with a trap in each place where some library looks, and where a trap would leave its mark."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("stdin was asked"))
    monkeypatch.chdir(tmp_path)
    folder, ran = Path(shutil.copytree(exported, tmp_path / "traps")), tmp_path / "ran"
    code = f"import os\nos.makedirs({str(ran)!r}, exist_ok=True)\n"
    for name in (
        "evil.py", "conf.py", "modeling_evil.py", "modeling_llama.py", "tokenization_evil.py", "setup.py",
        "custom_generate/generate.py", "image_tokenizer/evil.py", "image_tokenizer/pipeline.py",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name in (
        "config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
        "image_tokenizer/config.json",
    ):  # fmt: skip
        edit(folder / name, auto_map=OWN)
    for name in (
        "pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.pkl",
        "image_tokenizer/diffusion_pytorch_model.bin", "global_step3/mp_rank_00_model_states.pt",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save({"weight": Evil(ran)}, folder / name)
    call = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(ran)!r}) }}}}"
    edit(folder / "tokenizer_config.json", chat_template=call)
    (folder / "chat_template.jinja").write_text(call)
    edit(folder / "data_manifest.json", source=call, licence=call)
    return folder, ran


def edit(file, **changes):
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **changes}))


def pickles_alone(folder):
    for file in (*folder.glob("*.safetensors"), *folder.glob("image_tokenizer/*.safetensors")):
        file.unlink()


def strangers_class(folder):
    edit(folder / "config.json", model_type="strangers")


def yaml_tags(folder):
    text = f"!!python/object/apply:os.mkdir [{folder.parent / 'ran'}]"
    (folder / "resolved.yaml").write_text(f"model: {{init: {text}}}\ndata: {text}\n")
    (folder / "environment.json").write_text('{"command": "t2i train"}')  # so that it looks like a run


def engine_of_pickles(folder):
    """Look like a checkpoint, whose manifest is missing."""
    (folder / "engine").mkdir()
    (folder / "pytorch_model.bin").rename(folder / "engine" / "mp_rank_00_model_states.pt")


def as_it_is(folder):
    """Leave weights that can be loaded among the traps."""


def words_of(verb, folder, data):
    """Return the rest of a command line, small enough to end in a moment."""
    run = ["--data.shards", data, "--data.seq-len", 90, "--model.init", folder, "--ds_config", DS_CONFIG]
    small = ["--train.max-steps", 1, "--train.global-batch-tokens", 720, "--train.eval-every", 0]
    return {
        "prepare": ["--source", "images", "--out", "new", "--text-tokenizer", folder,
                    "--image-tokenizer", folder / "image_tokenizer", "--heldout-share", 0],
        "convert": ["open-lm-back", folder, "--out", "new"],
        "tokenizer": ["evaluate", "--tokenizer", folder / "image_tokenizer", "--source", "images", "--out", "new.json"],
        "train": [*run, *small, "--run-dir", "run"],
        "verify-resume": [*run, *small, "--run-dir", "run", "--num-steps", 2, "--train.max-steps", 2],
        "align": ["--model", folder, "--out", "aligned", "--data.shards", data, "--align.num-pairs", 2,
                  "--align.max-steps", 1],
        "sample": [folder, "--prompts", "picture 3", "--out", "drawn"],
        "export": [folder, "--out", "new"],
        "plan": [*run[:-1], ROOT / "ds_configs" / "zero2.json"],
        "study": [folder / "resolved.yaml", "--out", "study"],
        "report": [folder],
        "score": [folder, "--num-samples", 2, "--controls", "shuffled"],
        "forgetting": [folder, "--text", "notes.txt", "--max-new-tokens", 2],
        "perplexity": [folder, "--data.shards", data],
        "nearest": [folder],
        "serve": [folder, "--port", 0],
        "play": [folder, "--port", 0],
        "gradients": [folder, "--data.shards", data, "--num-sequences", 2],
    }[verb]  # fmt: skip


WHOLE = {
    "prepare", "convert", "train", "verify-resume", "sample", "export", "plan", "forgetting", "perplexity", "nearest",
    "gradients", "serve",
}  # fmt: skip
"""Verbs that end well where the traps are all that is odd: they have read the folder, not refused it at the door."""


@pytest.mark.parametrize("change", [as_it_is, strangers_class, pickles_alone, yaml_tags, engine_of_pickles])
@pytest.mark.parametrize("verb", SCRIPTS)
def test_no_command_runs_anything_of_a_strangers_folder(verb, change, traps, shards, call, monkeypatch):
    folder, ran = traps
    change(folder)
    # Opened and listening is enough; otherwise it would serve until it is told to stop.
    monkeypatch.setattr("t2i.serve.stopping.stop_signal", threading.Event)
    monkeypatch.setattr(
        "t2i.serve.stopping.serve_until_stopped", lambda server, *, stopped: server.server_close()
    )
    monkeypatch.setattr(
        "t2i.play.serving.serve_until_stopped",
        lambda page, *, listening, stopped, give_up: listening.close(),
    )
    Path("images").mkdir()
    Path("notes.txt").write_text("a note of some length, with a few words in it " * 20)
    for index in range(3):
        Image.fromarray(np.full((64, 64, 3), 60 * index, np.uint8)).save(f"images/{index}.png")
        Path(f"images/{index}.txt").write_text(f"<script>alert({index})</script> ![x](http://x) $(touch ran)")
    status = call(SCRIPTS[verb], *words_of(verb, folder, shards))
    assert not ran.exists()
    assert status in EXPECTED
    assert status == 0 or change is not as_it_is or verb not in WHOLE
