"""The whole training path on tiny pictures, in one process and as two ranks."""

import json
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
import yaml
from built_models import built
from deepspeed.runtime.zero.config import ZeroStageEnum
from launched import run_ranks
from safetensors.torch import load_file

from t2i.config import ASSETS
from t2i.data.batching import accumulation
from t2i.errors import NumericalError, Stopped, UserError
from t2i.model.resize import merged_state_dict
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.runs.run_folder import report_command
from t2i.tokens.text import TextTokenizer
from t2i.train import build
from t2i.train.main import train
from t2i.train.metrics import measured

ROOT = Path(__file__).parents[2]
DS_CONFIG = ROOT / "ds_configs" / "zero2_fp32.json"


def weights(run_dir, step):
    return load_file(run_dir / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def test_a_run_explains_itself(finished):
    run_dir = finished.run_dir
    rows = read_metrics(run_dir)
    steps = [row for row in rows if "split" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert {row["split"] for row in rows if "split" in row} == {"heldout"}
    assert steps[0]["image_tokens"] == 8 * 64
    assert steps[0]["special_tokens"] == 8 * 5  # `<doc>` is never a target
    assert steps[-1]["loss"] < steps[0]["loss"]
    state = load_file(run_dir / "checkpoints" / "step_000006" / "model.safetensors")
    products = sum(
        value.numel() for name, value in state.items() if value.dim() == 2 and "tok_emb" not in name
    )
    flops = 6 * products + 12 * 2 * 32 * 90  # attention: layers, width, sequence
    assert steps[0]["flops_per_second"] == pytest.approx(steps[0]["tokens_per_second"] * flops)
    assert "mfu" not in steps[0]  # of GPUs alone
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    assert yaml.safe_load((run_dir / "resolved.yaml").read_text())["train"]["max_steps"] == 6
    assert (run_dir / "latest").read_text().strip() == "checkpoints/step_000006"


def test_resuming_equals_never_having_stopped_bit_for_bit(finished, tmp_path, monkeypatch, caplog):
    # As Python 3.11.2, Debian 12's, pickles enums.
    by_name = lambda stage, _: (getattr, (type(stage), stage.name))  # noqa: E731
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", by_name)
    config = replace(finished, run_dir=tmp_path / "run")
    with pytest.raises(Stopped, match="Stopped at step 3 of 6"):
        train(config, ds_config_path=DS_CONFIG, stop_at=3)
    assert json.loads((config.run_dir / "status.json").read_text())["code"] == 75
    with caplog.at_level("INFO", logger="t2i"):
        train(config, ds_config_path=DS_CONFIG)
    # Where to look, at the end: the run has evaluated its last step alone.
    said = re.search(r"done: step 6, loss \d\.\d{3}\. Checkpoints: (\S+), (.*)\. Next: (.*)", caplog.text)
    assert said[1] == str(config.run_dir / "checkpoints")
    assert said[2] == "the best by held-out loss: step_000006"
    assert said[3] == report_command(config.run_dir)
    whole, resumed = weights(finished.run_dir, 6), weights(config.run_dir, 6)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [
        [row["loss"] for row in read_metrics(run) if "split" not in row]
        for run in (finished.run_dir, config.run_dir)
    ]
    assert losses[0] == losses[1]


def test_accumulation_does_not_change_the_step(finished, tmp_path):
    ds_config = {**json.loads(DS_CONFIG.read_text()), "train_micro_batch_size_per_gpu": 2}
    (tmp_path / "small.json").write_text(json.dumps(ds_config))
    config = replace(finished, run_dir=tmp_path / "run", train=replace(finished.train, max_steps=1))
    train(config, ds_config_path=tmp_path / "small.json")
    same_after_one_step(weights(config.run_dir, 1), once(finished, tmp_path), lr=config.train.lr)


def once(finished, tmp_path):
    """The weights after one step of one process on the whole batch."""
    config = replace(finished, run_dir=tmp_path / "once", train=replace(finished.train, max_steps=1))
    train(config, ds_config_path=DS_CONFIG)
    return weights(config.run_dir, 1)


def same_after_one_step(found, wanted, *, lr):
    # Adam's first step is lr * sign-like, so an error of 1e-7 in a gradient near zero can move a weight by lr / 2.
    differences = torch.cat([(found[name] - wanted[name]).abs().flatten() for name in wanted])
    assert differences.max() <= lr
    assert (differences > 1e-6).float().mean() < 1e-3


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(finished, tmp_path):
    config = replace(finished, run_dir=tmp_path / "run")
    shutil.copytree(finished.run_dir, config.run_dir)
    whole = weights(finished.run_dir, 6)
    damaged = config.run_dir / "checkpoints" / "step_000006" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    train(config, ds_config_path=DS_CONFIG)
    whole, again = weights(finished.run_dir, 6), weights(config.run_dir, 6)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (config.run_dir / "checkpoints" / "step_000006.bad").is_dir()
    steps = [row["step"] for row in read_metrics(config.run_dir) if "split" not in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_killed_before_its_first_checkpoint_starts_anew_with_clean_metrics(finished, tmp_path):
    config = replace(finished, run_dir=tmp_path / "run", train=replace(finished.train, max_steps=1))
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 7.5}\n{"step": 2, "lo')
    train(config, ds_config_path=DS_CONFIG)
    rows = [row for row in read_metrics(config.run_dir) if "split" not in row]
    assert [row["step"] for row in rows] == [1]
    assert rows[0]["loss"] != 7.5
    assert '"loss": 7.5' in (config.run_dir / "metrics.jsonl.rewound").read_text()


def test_three_steps_without_a_finite_gradient_end_the_run_and_change_no_weight(finished, tmp_path):
    config = replace(
        finished, run_dir=tmp_path / "run", train=replace(finished.train, lr=1e30, save_every=1, keep_last=9)
    )
    with pytest.raises(NumericalError, match="not finite in steps 2 to 4"):
        train(config, ds_config_path=DS_CONFIG)
    rows = [row for row in read_metrics(config.run_dir) if "split" not in row]
    assert [row["skipped"] for row in rows] == [False, True, True, True]
    status = json.loads((config.run_dir / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 4)
    first = weights(config.run_dir, 1)
    for folder in (config.run_dir / "checkpoints").glob("step_*"):
        later = load_file(folder / "model.safetensors")
        assert all(torch.equal(first[name], later[name]) for name in first)


def test_shards_made_anew_since_the_run_began_are_refused(finished, tmp_path):
    config = replace(finished, run_dir=tmp_path / "run")
    shutil.copytree(finished.run_dir, config.run_dir)
    manifest = json.loads((config.run_dir / "data_manifest.json").read_text())
    manifest["files"]["train/index.json"] = "0" * 16
    (config.run_dir / "data_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="started with other shards"):
        train(config, ds_config_path=DS_CONFIG)


def test_heldout_losses_are_shown_with_their_step_and_number_of_images(finished):
    row = next(row for row in read_metrics(finished.run_dir) if row.get("split") == "heldout")
    line = measured(row)
    assert line.startswith(f"step 6, heldout on 4 images: image loss {row['image_loss']:.3f}")
    assert f"under shuffled captions {row['image_loss_wrong_caption']:.3f}" in line
    assert f"text loss {row['text_loss']:.3f}" in line


def test_micro_batches_are_few_and_no_larger_than_asked():
    for per_rank in range(1, 40):
        for micro_batch in range(1, 40):
            steps, size = accumulation(per_rank, micro_batch=micro_batch)
            assert steps == len(torch.arange(per_rank).split(size)) == -(-per_rank // micro_batch)
            assert size <= micro_batch


def test_a_second_run_in_the_folder_with_other_science_is_refused(finished):
    with pytest.raises(UserError, match="train.lr is"):
        train(replace(finished, train=replace(finished.train, lr=1.0)), ds_config_path=DS_CONFIG)


def test_a_ds_config_that_claims_a_number_of_the_run_is_refused(finished, tmp_path):
    (tmp_path / "bad.json").write_text('{"gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 1}')
    with pytest.raises(UserError, match=r"gradient_clipping is decided by --train\.grad_clip"):
        train(replace(finished, run_dir=tmp_path / "run"), ds_config_path=tmp_path / "bad.json")
    assert not (tmp_path / "run").exists()  # a mistake leaves no folder


def test_any_ckpt_opens(finished):
    run = open_model(str(finished.run_dir), needs_images=True)
    one = open_model(str(finished.run_dir / "checkpoints" / "step_000003"), needs_images=True)
    assert run.folder.name == "step_000006"
    assert one.run_dir == finished.run_dir.resolve()
    assert run.layout.vocab_size == run.model.get_input_embeddings().weight.shape[0]
    with pytest.raises(UserError, match="is no run folder"):
        open_model("./nowhere", needs_images=True)


def test_bf16_with_fused_adam_trains_and_a_stop_signal_loses_no_step(finished, tmp_path):
    run_dir = tmp_path / "run"
    command = [
        sys.executable, "launchers/train.py", "--ds_config", "ds_configs/zero2.json", "--run-dir", str(run_dir),
        "--data.shards", str(finished.data.shards), "--data.seq-len", "90", "--model.hidden-size", "32",
        "--model.num-layers", "1", "--model.num-heads", "2", "--train.max-steps", "100000",
        "--train.global-batch-tokens", "180", "--train.eval-every", "0",
    ]  # fmt: skip
    with (tmp_path / "stderr").open("w") as stderr:
        process = processes.start(command, cwd=ROOT, env=processes.environment(), stderr=stderr)
        try:
            deadline = time.monotonic() + 540  # operators may have to be built first
            while len(read_metrics(run_dir)) < 3 and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 75, (tmp_path / "stderr").read_text()[-2000:]
        finally:
            processes.end(process)
    said = (tmp_path / "stderr").read_text()
    status = json.loads((run_dir / "status.json").read_text())
    rows = read_metrics(run_dir)
    assert (status["state"], status["code"], status["step"]) == ("stopped", 75, rows[-1]["step"])
    assert f"Stopped at step {status['step']} of 100000; run the same command to resume." in said
    assert status["next"].startswith("python launchers/train.py --ds_config")
    assert (run_dir / "latest").read_text().strip() == f"checkpoints/step_{status['step']:06d}"
    assert "Traceback" not in said
    assert all(row["loss"] is not None and not row["skipped"] for row in rows)


def test_two_ranks_take_the_same_step_as_one(finished, tmp_path):
    """With two micro-batches a rank, and token counts that differ between ranks and micro-batches."""
    run_dir = tmp_path / "two"
    ds_config = {**json.loads(DS_CONFIG.read_text()), "train_micro_batch_size_per_gpu": 2}
    (tmp_path / "small.json").write_text(json.dumps(ds_config))
    model, settings = finished.model, finished.train
    command = [
        "launchers/train.py",
        "--ds_config", str(tmp_path / "small.json"), "--run-dir", str(run_dir),
        "--data.shards", str(finished.data.shards),
        "--data.seq-len", "90", "--model.hidden-size", str(model.hidden_size),
        "--model.num-layers", str(model.num_layers),
        "--model.num-heads", str(model.num_heads), "--train.max-steps", "6", "--train.save-every", "1",
        "--train.keep-last", "6",
        "--train.global-batch-tokens", str(settings.global_batch_tokens), "--train.warmup-steps", "2",
        "--train.eval-every", "6", "--train.eval-images", "4",
    ]  # fmt: skip
    for code, said in run_ranks(command):
        assert code == 0, said[-3000:]
    one = [row for row in read_metrics(finished.run_dir) if "split" not in row]
    two = [row for row in read_metrics(run_dir) if "split" not in row]
    assert [row["image_tokens"] for row in two] == [row["image_tokens"] for row in one]
    assert [row["text_tokens"] for row in two] == [row["text_tokens"] for row in one]
    same_after_one_step(weights(run_dir, 1), once(finished, tmp_path), lr=settings.lr)
    # Sums in another order; the first loss sees equal weights, later ones Adam's amplified rounding.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-6)
    assert two[0]["z_loss"] == pytest.approx(one[0]["z_loss"], rel=1e-6)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-4)
    heldout = [
        [row["image_loss"] for row in read_metrics(run) if "split" in row]
        for run in (run_dir, finished.run_dir)
    ]
    assert heldout[0] == pytest.approx(heldout[1], abs=1e-4)


def test_new_rows_learn_at_their_own_rate(finished, tmp_path):
    config = replace(
        finished, run_dir=tmp_path / "run", train=replace(finished.train, max_steps=2, new_embeddings_lr=0.0)
    )
    train(config, ds_config_path=DS_CONFIG)
    start = {name: value.clone() for name, value in _untrained(config).items()}
    end = weights(config.run_dir, 2)
    num_old = open_model(str(config.run_dir), needs_images=True).layout.num_text_rows
    for name in ("model.tok_embeddings.weight", "output.weight"):
        assert torch.equal(end[name][num_old:], start[name][num_old:])
        assert not torch.equal(end[name][:num_old], start[name][:num_old])


def test_text_logits_are_not_computed_for_a_class_whose_are_not_compared(finished, monkeypatch):
    def unexpected(*_, **__):
        raise AssertionError("text logits of open_lm's class")

    monkeypatch.setattr(build, "text_logits", unexpected)
    _untrained(finished)


def _untrained(config):
    model, _ = built(config, TextTokenizer.load(ASSETS / "text_tokenizer"))
    return merged_state_dict(model)
