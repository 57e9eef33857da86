"""From files of the released layouts to pictures drawn without t2i, every step by its command."""

import json
import os
import re
import sys
from pathlib import Path

import made_sources as made
import numpy as np
import processes
import pytest
import torch
from huggingface_hub import ModelCard
from launched import run_ranks
from measure.conftest import write_inception
from PIL import Image
from twins.image_tokenizers import SMALL, Released
from twins.open_lm import SIZES, OpenLM
from twins.text_tokenizer import train_text_tokenizer

from t2i.runs.metrics_log import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

ROOT = Path(__file__).parents[1]
NUM_ROWS, NUM_CODES, IMAGE_SIZE = 432, 256, 32
SEQ_LEN = 48
"""16 codes, 6 markers and room for 26 caption ids."""

WITHOUT_T2I = """
import sys

class NoT2I:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "t2i", name

sys.meta_path.insert(0, NoT2I())
"""


def subprocess_of(*words, cwd, **names):
    done = processes.run(
        list(map(str, words)),
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **names},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def write_released(folder):
    """Write what people download: an open_lm training checkpoint, a MoVQGAN file, and a tokenizer of NeoX's structure.

    Returns the number of the tokenizer's ids.
    """
    sizes = SIZES | {"vocab_size": NUM_ROWS, "positional_embedding_type": "head_rotary"}
    state = {f"module.{name}": value for name, value in OpenLM(**sizes).state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state}, folder / "epoch_3.pt")
    (folder / "open_lm.json").write_text(json.dumps(sizes))
    neox = train_text_tokenizer(map(made.caption, range(made.NUM_IMAGES)), vocab_size=NUM_ROWS)
    neox.tokenizer.save_pretrained(folder / "neox")
    torch.save(Released("movqgan", **SMALL["movqgan"]).state_dict(), folder / "movqgan.ckpt")
    return neox.num_tokens


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def done(call, capsys):
    """Run a command that must succeed; return what it printed."""

    def run(*words):
        capsys.readouterr()
        assert call(*words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_released_weights_and_coco_go_all_the_way_to_a_folder_that_draws_alone(done, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    num_text_ids = write_released(tmp_path)
    assert num_text_ids < NUM_ROWS  # as GPT-NeoX's 50,277 of 50,432
    coco = made.coco(tmp_path / "coco").removeprefix("coco:")
    inception = write_inception(tmp_path / "inception.pt", monkeypatch, dims=32)
    model, tokenizer, shards, run = (tmp_path / name for name in ("model", "tokenizer", "shards", "run"))

    told = done(
        "launchers/convert.py", "open-lm", "--checkpoint", tmp_path / "epoch_3.pt",
        "--config", tmp_path / "open_lm.json", "--text-tokenizer", tmp_path / "neox", "--out", model,
    )  # fmt: skip
    assert "checked: for 24 tokens" in told
    told = done(
        "launchers/convert.py", "movqgan", "--checkpoint", tmp_path / "movqgan.ckpt", "--out", tokenizer
    )
    assert re.search(r" (\d+) of \1 codes are equal", told)
    told = done(
        "launchers/prepare.py", "--source", f"coco:{coco}", "--out", shards, "--image-size", IMAGE_SIZE,
        "--image-tokenizer", tokenizer, "--text-tokenizer", model,
    )  # fmt: skip
    assert "20 train, 4 heldout; 0 broken" in told

    words = [
        "launchers/train.py", "--ds_config", "ds_configs/zero2_fp32.json", "--run-dir", run, "--data.shards", shards,
        "--data.seq-len", SEQ_LEN, "--model.init", model, "--train.global-batch-tokens", 4 * SEQ_LEN,
        "--train.max-steps", "2", "--train.warmup-steps", "1", "--train.eval-every", "2",
    ]  # fmt: skip
    for code, said in run_ranks(words):
        assert code == 0, said[-3000:]
    rows = read_metrics(run)
    assert [row["image_tokens"] for row in rows if "split" not in row] == [4 * 16, 4 * 16]
    assert [row["num_pictures"] for row in rows if row.get("split") == "heldout"] == [4]

    captions = ["thing number 21", "a red apple"]
    done("launchers/sample.py", run, "--prompts", *captions, "--out", tmp_path / "drawn")
    done("eval/coco_fid.py", run, "--coco", coco, "--num-samples", 4, "--inception", inception)
    scores = json.loads((run / "coco" / "step_000002" / "scores.json").read_text())
    assert (scores["n"], scores["image_size"], set(scores["rows"])) == (
        4,
        IMAGE_SIZE,
        {"real", "reconstructions", "model", "matched"},
    )
    exported = tmp_path / "exported"
    done("launchers/export.py", run, "--out", exported)
    card = ModelCard.load(exported / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == [
        round(scores[name], 4) for name in ("fid", "kid", "mind")
    ]

    assert f"Training started from the pre-trained model `{model}`." in card.text
    settings = json.loads((exported / "config.json").read_text())
    assert settings["vocab_layout"] == {
        "num_text_rows": NUM_ROWS,
        "num_text_tokens": num_text_ids,
        "codebook_size": NUM_CODES,
        "multiple": 8,
    }
    lines = card.text.split("```python\n")[1].split("```")[0]
    (own,) = re.findall(r"captions = .*", lines)
    program = WITHOUT_T2I + lines.replace(own, f"captions = {captions}")
    subprocess_of(sys.executable, "-c", program, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    for index in range(len(captions)):
        drawn = pixels(tmp_path / f"{index}.png")
        assert drawn.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        # The same codes, decoded by the same tokenizer in batches of the same shape.
        np.testing.assert_array_equal(drawn, pixels(tmp_path / "drawn" / f"{index:05d}.png"))
