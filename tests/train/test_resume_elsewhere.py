"""A run resumes with another DeepSpeed JSON: another precision, another Adam. Weights and moments are converted."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import config_of
from launched import SETTINGS, flags, forget_after, run_ranks

from t2i.errors import CheckpointError
from t2i.model.trainable import layer_matrices
from t2i.runs.checkpoint_manifest import read_checkpoint_manifest, step_folder
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.train import checkpoint
from t2i.train.deepspeed_internals import moments_of
from t2i.train.deepspeed_state import load_state
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
FP32 = json.loads((ROOT / "ds_configs" / "zero2_fp32.json").read_text())
BF16 = json.loads((ROOT / "ds_configs" / "zero2_bf16_cpu.json").read_text())
DEEPSPEEDS_ADAM = {**FP32, "optimizer": {"params": {"torch_adam": False}}}
ROUND_ROBIN = {**FP32, "zero_optimization": {**FP32["zero_optimization"], "round_robin_gradients": True}}


def run(config, ds_config, *, folder, steps):
    """Train up to a step and return the losses of all steps."""
    folder.mkdir(exist_ok=True)
    (folder / "ds.json").write_text(json.dumps(ds_config))
    settings = replace(config.train, max_steps=steps, warmup_steps=1, save_every=2, eval_every=0)
    config = replace(config, run_dir=folder / "run", train=settings)
    train(config, ds_config_path=folder / "ds.json")
    return [row["loss"] for row in read_metrics(config.run_dir)]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    return run(config_of(shards, None), FP32, folder=tmp_path_factory.mktemp("undisturbed"), steps=4)


@pytest.mark.parametrize(
    ("made", "resumed", "tolerance"),
    [
        # bf16 has 8 bits, and two of four steps are taken in it.
        (FP32, BF16, 1e-3),
        (BF16, FP32, 1e-3),
        (FP32, DEEPSPEEDS_ADAM, 1e-6),
        (DEEPSPEEDS_ADAM, FP32, 1e-6),
        (FP32, ROUND_ROBIN, 1e-6),
    ],
    ids=["fp32-bf16", "bf16-fp32", "torch-deepspeed", "deepspeed-torch", "round-robin"],
)
def test_a_run_resumes_with_another_json(made, resumed, tolerance, undisturbed, shards, tmp_path, caplog):
    config = config_of(shards, None)
    run(config, made, folder=tmp_path, steps=2)
    with caplog.at_level("INFO", logger="t2i"):
        found = run(config, resumed, folder=tmp_path, steps=4)
    assert "made by 1 rank in " in caplog.text and "resuming at step 2 of 4" in caplog.text
    assert found == pytest.approx(undisturbed, rel=tolerance)


def test_frozen_weights_beside_adapters_come_along(shards, tmp_path):
    config = config_of(shards, None)
    config = replace(config, model=replace(config.model, lora_rank=2))
    whole = run(config, FP32, folder=tmp_path / "whole", steps=4)
    run(config, FP32, folder=tmp_path / "run", steps=2)
    found = run(config, DEEPSPEEDS_ADAM, folder=tmp_path / "run", steps=4)
    assert found == pytest.approx(whole, rel=1e-6)
    # The converted copy is gone.
    assert {path.name for path in (tmp_path / "run" / "run" / "checkpoints").iterdir()} >= {"step_000004"}
    assert not (tmp_path / "run" / "run" / "checkpoints" / ".universal").exists()


def with_muon(shards):
    """Three layers, so that the half of a group of matrices is within one."""
    config = config_of(shards, None)
    return replace(
        config,
        model=replace(config.model, num_layers=3),
        train=replace(config.train, optimizer="muon"),
    )


@pytest.mark.parametrize(
    "resumed", [FP32, DEEPSPEEDS_ADAM, ROUND_ROBIN], ids=["same", "deepspeed", "round-robin"]
)
def test_a_run_with_muon_resumes(resumed, shards, tmp_path, monkeypatch):
    config = with_muon(shards)
    whole = run(config, FP32, folder=tmp_path / "whole", steps=4)
    run(config, FP32, folder=tmp_path / "half", steps=2)
    sizes = []

    def load(engine, folder, **given):
        load_state(engine, folder, **given)
        sizes.append(sum(value.nbytes for value in moments_of(engine)))

    monkeypatch.setattr(checkpoint, "load_state", load)
    assert run(config, resumed, folder=tmp_path / "half", steps=4) == pytest.approx(whole, rel=1e-6)
    made, found = (
        read_checkpoint_manifest(step_folder(tmp_path / name / "run", 4)).facts for name in ("whole", "half")
    )
    # A state that was loaded, or converted, takes no more room than one that was not; counts of steps are few bytes.
    assert sizes == [pytest.approx(made.optimizer_state_bytes, abs=64)]
    assert found.optimizer_state_bytes == pytest.approx(made.optimizer_state_bytes, abs=64)
    if resumed is FP32:
        assert found.optimizer_bits == made.optimizer_bits


@pytest.mark.parametrize(
    ("ds_config", "tolerance"),
    [(FP32, 1e-4), (BF16, 1e-2), (ROUND_ROBIN, 1e-4)],
    ids=["fp32", "bf16", "round-robin"],
)
def test_two_ranks_take_the_steps_of_one_with_muon_and_one_resumes_theirs(
    ds_config, tolerance, shards, tmp_path
):
    config = with_muon(shards)
    whole = run(config, ds_config, folder=tmp_path / "one", steps=6)
    run_dir = tmp_path / "two" / "run"
    settings = {
        **SETTINGS,
        "ds_config": tmp_path / "one" / "ds.json",
        "run_dir": run_dir,
        "data.shards": shards,
        "model.num_layers": 3,
        "train.optimizer": "muon",
        "train.max_steps": 6,
        "train.warmup_steps": 1,
        "train.keep_last": 6,
    }
    for code, said in run_ranks(["launchers/train.py", *flags(settings)]):
        assert code == 0, said[-3000:]
    losses = [row["loss"] for row in read_metrics(run_dir)]
    assert losses == pytest.approx(whole, abs=tolerance)
    sizes = [value.numel() for value in layer_matrices(open_model(str(run_dir), needs_images=True).model)]
    assert sum(sizes) // 2 not in itertools.accumulate(sizes)  # so that each rank has a part of one matrix
    forget_after(run_dir, step=4)
    if ds_config is ROUND_ROBIN:
        with pytest.raises(CheckpointError, match="2 ranks .* round_robin_gradients .* 1 rank in fp32"):
            run(config, ds_config, folder=tmp_path / "two", steps=6)
    else:
        assert run(config, ds_config, folder=tmp_path / "two", steps=6) == pytest.approx(
            losses, abs=tolerance
        )
