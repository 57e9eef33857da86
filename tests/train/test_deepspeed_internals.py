"""What deepspeed_internals.py relies on: DeepSpeed's version, its names, and what its save asks of a writer."""

import inspect
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from t2i.config import TrainConfig
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.runs import checkpoint_store as checkpoints
from t2i.tokens.vocab import VocabLayout
from t2i.train import deepspeed_internals as internals
from t2i.train.ds_config import read_ds_config
from t2i.train.engine import Learner, make_engine

ROOT = Path(__file__).parents[2]
LAYOUT = VocabLayout(num_text_rows=40, num_text_tokens=40, codebook_size=32)


@pytest.fixture
def engine(one_process):
    torch.manual_seed(0)
    learner = Learner(OpenLMForCausalLM(OpenLMConfig(LAYOUT.vocab_size, 32, 2, 2)), layout=LAYOUT)
    ds_config = read_ds_config(ROOT / "ds_configs" / "zero2_fp32.json")
    return make_engine(learner, config=TrainConfig(), ds_config=ds_config, per_rank=2)


def take_step(engine, *, step):
    ids = torch.randint(40, (2, 16))
    loss, _ = engine(ids, ids.roll(-1, 1))
    engine.backward(loss)
    step(engine)


def test_deepspeed_is_the_version_that_its_internals_were_read_in():
    assert deepspeed.__version__.partition("+")[0] == internals.MADE_FOR


def test_the_names_are_there_and_take_what_is_given():
    def parameters_of(function):
        return list(inspect.signature(function).parameters)

    assert CheckpointEngine.__abstractmethods__ == {"create", "save", "load", "commit"}
    assert parameters_of(CheckpointEngine.save) == ["self", "state_dict", "path"]
    assert parameters_of(CheckpointEngine.load) == ["self", "path", "map_location"]
    assert parameters_of(DeepSpeedEngine._copy_recovery_script) == ["self", "save_path"]
    assert parameters_of(DeepSpeedZeroOptimizer.get_grad_norm_direct)[:3] == ["self", "gradients", "params"]
    assert parameters_of(DeepSpeedZeroOptimizer.check_overflow) == ["self", "partition_gradients"]


def test_the_engine_has_what_is_reached_for(engine):
    assert isinstance(engine.checkpoint_engine, CheckpointEngine)
    assert isinstance(internals.adam_of(engine), torch.optim.Optimizer)
    assert sum(internals.group_sizes(engine)) == sum(value.numel() for value in engine.module.parameters())
    assert engine._config.load_universal_checkpoint is False
    with internals.reading_universal(engine):
        assert engine.load_universal_checkpoint()
    assert not engine.load_universal_checkpoint()


def test_a_step_without_update_changes_no_weight_and_drops_its_gradient(engine):
    before = [value.clone() for value in engine.module.parameters()]
    take_step(engine, step=internals.step_without_update)
    assert engine.skipped_steps == 1
    assert all(map(torch.equal, before, engine.module.parameters()))
    take_step(engine, step=lambda engine: engine.step())
    assert engine.skipped_steps == 1
    assert not all(map(torch.equal, before, engine.module.parameters()))
    # Two moments of each parameter; what pads the groups and the step counts are few.
    assert sum(value.numel() for value in internals.moments_of(engine)) >= 2 * sum(map(torch.numel, before))


def test_every_file_of_a_save_is_sealed_and_no_other_is_written(engine, tmp_path):
    take_step(engine, step=lambda engine: engine.step())
    plain, before = engine.checkpoint_engine, torch.serialization.get_crc32_options()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    sealed = internals.save_engine(engine, tmp_path, step=1, written=[weights], state={"random": []})
    found = sorted(str(path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(found) == 3
    assert sorted(sealed.files) == found
    assert sealed.files == {path: checkpoints.seal(Path(path)) for path in found}
    assert sealed.reasons == []
    assert engine.checkpoint_engine is plain
    assert torch.serialization.get_crc32_options() == before
    assert engine._copy_recovery_script.__func__ is DeepSpeedEngine._copy_recovery_script


def test_a_file_that_cannot_be_written_is_told_after_the_save_and_the_rest_is_written(
    engine, tmp_path, monkeypatch
):
    take_step(engine, step=lambda engine: engine.step())
    real = torch.save

    def full(state, path, **rest):
        if "model_states" in str(path) and "optim" not in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        real(state, path, **rest)

    monkeypatch.setattr(torch, "save", full)
    sealed = internals.save_engine(engine, tmp_path, step=1, written=[], state={})
    assert [Path(path).name[-15:] for path in sealed.files] == ["optim_states.pt"]
    assert sealed.reasons == [
        "PytorchStreamWriter failed writing file data/0: file write failed (a full disk?)."
    ]


def test_an_error_that_the_disk_has_no_part_in_is_raised_and_leaves_the_engine_as_it_was(
    engine, tmp_path, monkeypatch
):
    plain = engine.checkpoint_engine
    monkeypatch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        internals.save_engine(engine, tmp_path, step=1, written=[], state={})
    assert engine.checkpoint_engine is plain
