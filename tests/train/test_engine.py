"""A step through DeepSpeed against torch's own, and how what learns is grouped."""

import errno
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from built_models import adamw, learner, step_both

from t2i.config import ASSETS, TrainConfig
from t2i.errors import CheckpointError
from t2i.runs import checkpoint_store as checkpoints
from t2i.tokens.text import TextTokenizer
from t2i.train import deepspeed_internals as internals
from t2i.train import engine as engines
from t2i.train.checkpoint import Saver
from t2i.train.deepspeed_internals import group_sizes
from t2i.train.ds_config import read_ds_config
from t2i.train.progress import Progress

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig(lr=1e-2, grad_clip=0.1)


def engine_of(module):
    ds_config = read_ds_config(ROOT / "ds_configs" / "zero2_fp32.json")
    return engines.make_engine(module, config=CONFIG, ds_config=ds_config, per_rank=4)


def test_steps_and_their_norms_are_those_of_torch(one_process, monkeypatch):
    monkeypatch.setattr(internals, "NORM_PART", 1_000)  # which divides no matrix
    plain = learner()
    optimizer = adamw(plain.parameters(), CONFIG)
    engine = engine_of(deepcopy(plain))
    for _ in range(3):
        norm = step_both(engine, plain, optimizer, grad_clip=CONFIG.grad_clip)
        assert norm > CONFIG.grad_clip
        assert float(engine.get_global_grad_norm()) == pytest.approx(norm, rel=1e-5)
    for (name, ours), theirs in zip(engine.module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("lengths", [[5_000, 1, 3_000], [999], []])
def test_the_norm_is_taken_of_parts_without_padding(lengths):
    seen = []

    def plain(gradients, params):
        assert len(gradients) == len(params)
        assert all(part.numel() <= internals.NORM_PART for part in gradients)
        seen.extend(zip(gradients, params, strict=True))
        return torch.tensor(0.0)

    optimizer = SimpleNamespace(get_grad_norm_direct=plain)
    gradients, params = [torch.randn(length) for length in lengths], [object() for _ in lengths]
    marked, unmarked = torch.ones(7), torch.ones(9)
    marked._zero_padding = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internals, "NORM_PART", 1_000)
        internals.measure_in_parts(optimizer)
        # DeepSpeed marks what it puts between gradients, and leaves what it puts after the last without a parameter.
        optimizer.get_grad_norm_direct([*gradients[:1], marked, *gradients[1:], unmarked], params)
    for gradient, param in zip(gradients, params, strict=True):
        assert torch.equal(torch.cat([part for part, owner in seen if owner is param]), gradient)
    assert sum(part.numel() for part, _ in seen) == sum(lengths)


def test_large_matrices_are_groups_of_their_own():
    module = learner()
    groups = engines.parameter_groups(module, config=CONFIG)
    embedding, head = (
        part.weight for part in (module.model.get_input_embeddings(), module.model.get_output_embeddings())
    )
    assert [group["params"] for group in groups[:2]] == [[embedding], [head]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0]
    grouped = [id(value) for group in groups for value in group["params"]]
    assert sorted(grouped) == sorted(map(id, module.parameters()))


def saver_of(engine, run_dir):
    return Saver(
        CONFIG,
        run_dir=run_dir,
        engine=engine,
        loader=SimpleNamespace(state_dict=str, global_batch=4),
        inputs=SimpleNamespace(text_tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer")),
    )


def test_a_file_that_cannot_be_sealed_fails_its_save_alone(one_process, tmp_path, monkeypatch, caplog):
    saver, real = saver_of(engine_of(learner()), tmp_path), checkpoints.seal

    def full(path):
        if path.name.endswith("optim_states.pt"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal", full)
        saver.save(Progress(step=1), must_succeed=False)
    assert "step 1 could not be written: rank 0" in caplog.text
    assert "optim_states.pt: No space left on device" in caplog.text
    assert not list((tmp_path / "checkpoints").iterdir())
    saver.save(Progress(step=2), must_succeed=True)
    files = checkpoints.verify(tmp_path / "checkpoints" / "step_000002").files
    assert {"model.safetensors", "config.json", "engine/mp_rank_00_model_states.pt"} < set(files)


@pytest.mark.parametrize("groups", [[217_600, 512], None])
def test_state_in_other_groups_is_not_loaded(groups, one_process, tmp_path):
    engine = engine_of(learner())
    saver = saver_of(engine, tmp_path)
    checkpoints.begin(tmp_path)
    facts = checkpoints.Facts(world_size=1, parameter_groups=groups)
    folder = checkpoints.commit(tmp_path, step=1, facts=facts, keep_last=1)
    with pytest.raises(CheckpointError, match=f"groups of .*{group_sizes(engine)[0]}.*--model.init"):
        saver.load(folder)
