"""What DeepSpeed's JSON may say: t2i honours it, or refuses it by name before any work."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from t2i.errors import UserError
from t2i.train.ds_config import read_ds_config
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
PLAIN = json.loads((ROOT / "ds_configs" / "zero2_fp32.json").read_text())
ZERO = PLAIN["zero_optimization"]


@pytest.fixture
def written(tmp_path):
    """Write the shipped JSON with changes."""

    def write(changes):
        (tmp_path / "some.json").write_text(json.dumps({**PLAIN, **changes}))
        return tmp_path / "some.json"

    return write


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"zero_optimization": {"stage": 0}}, r"stage is 0; expected 1 or 2"),
        ({"zero_optimization": {"stage": 3}}, r"stage is 3; expected 1 or 2"),
        ({"zero_optimization": {}}, r"stage is None; expected 1 or 2"),
        (
            {
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            r"stage is 1 with bf16 and grad_accum_dtype fp32; expected stage 2",
        ),
        ({"fp16": {"enabled": True}}, r"fp16 is not supported, because its loss scaling skips steps"),
        ({"fp16": {"enabled": "auto"}}, r"fp16 is not supported"),
        ({"bf16": {"enabled": "auto"}}, r"bf16.enabled is 'auto'; expected true or false"),
        ({"bf16": {"enabled": "true"}}, r"bf16.enabled is 'true'; expected true or false"),
        ({"bf16": True}, r"bf16 is True; expected an object"),
        ({"bf16": {"enable": True}}, r"bf16.enable is no key that t2i knows; perhaps you meant enabled"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, r"moments are kept in fp32"),
        ({"train_micro_batch_size_per_gpu": "auto"}, r"is 'auto'; expected a whole number"),
        ({"train_batch_size": "auto"}, r"train_batch_size is decided by --train.global_batch_tokens; remove"),
        ({"gradient_accumulation_steps": "auto"}, r"is decided by --train.global_batch_tokens"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping is decided by --train.grad_clip"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler is decided by --train.warmup_steps"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, r"by --model.gradient_checkpointing"),
        ({"optimizer": None}, r"optimizer is None; expected an object"),
        ({"optimizer": {"params": 1}}, r"optimizer.params is 1, but --train.lr"),
        ({"optimizer": {"params": {"torch_adam": "auto"}}}, r"expected torch_adam, true or false"),
        (
            {"optimizer": {"type": "Lamb", "params": {}}},
            r"optimizer.type is decided by --train.optimizer, --train.lr",
        ),
        ({"zero_optimization": 2}, r"zero_optimization is 2; expected an object"),
        (
            {"zero_optimization": {**ZERO, "offload_optimizer": {"device": "cpu"}}},
            r"offload_optimizer is not",
        ),
        ({"zero_optimization": {**ZERO, "offload_param": {"device": "cpu"}}}, r"because it needs stage 3"),
        ({"zero_optimization": {**ZERO, "stage3_max_live_parameters": 9}}, r"is for ZeRO stage 3"),
        ({"zero_optimization": {**ZERO, "overlap_com": True}}, r"perhaps you meant overlap_comm"),
        ({"zero_optimization": {**ZERO, "reduce_bucket_size": "auto"}}, r"is 'auto', which nothing fills in"),
        ({"communication_data_type": "auto"}, r"communication_data_type is 'auto', which nothing fills in"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "not finite would reach the weights"),
        (
            {"zero_optimization": {**ZERO, "load_from_fp32_weights": False}},
            "a resumed run would continue from rounded weights",
        ),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, r'is \'fp16\'; expected "fp32" or "bf16"'),
        ({"gradient_predivide_factor": 2.0}, r"gradient_predivide_factor is not supported"),
        ({"prescale_gradients": True}, r"prescale_gradients is not supported"),
        ({"gradient_allreduce_op": "sum"}, r"gradient_allreduce_op is not supported"),
        ({"elasticity": {"enabled": True}}, r"elasticity is not supported, because it chooses the batch"),
        ({"curriculum_learning": {"enabled": True}}, r"curriculum_learning is not supported"),
        ({"wandb": {"enabled": True}}, r"wandb is not supported, because t2i writes metrics.jsonl"),
        ({"checkpoint": {"load_universal": True}}, r"checkpoint is not supported"),
        ({"zero_optimisation": {"stage": 2}}, r"perhaps you meant zero_optimization"),
        ({"comment": "mine"}, r"comment is no key that t2i knows; "),
        ({"steps_per_print": "inf"}, r"steps_per_print is 'inf'; expected a whole number"),
    ],
)
def test_what_t2i_cannot_honour_is_refused_by_name(written, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        read_ds_config(written(changes))


def test_all_that_is_wrong_is_said_at_once(written):
    path = written({"fp16": {"enabled": True}, "gradient_clipping": "auto", "bf16": {"enabled": 1}})
    with pytest.raises(UserError, match=r"fp16 is .*gradient_clipping is .*bf16.enabled is 1"):
        read_ds_config(path)


def test_what_is_switched_off_is_no_mistake_and_does_not_reach_deepspeed(written):
    off = {"fp16": {"enabled": False}, "elasticity": {"enabled": False}, "amp": {}, "gradient_clipping": None}
    zero = {**ZERO, "offload_optimizer": {"device": "none"}, "offload_param": None}
    assert read_ds_config(written({**off, "zero_optimization": zero})) == PLAIN


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"communication_data_type": "fp99"}, r"Invalid communication_data_type.*fp99"),
        ({"zero_optimization": {**ZERO, "reduce_bucket_size": "many"}}, r"reduce_bucket_size.*'many'"),
    ],
)
def test_what_deepspeed_refuses_is_a_sentence_with_its_words_before_a_model_is_built(
    written, changes, words, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr("t2i.train.main.read_inputs", None)
    with pytest.raises(UserError, match=rf"DeepSpeed refuses the JSON of --ds_config: .*{words}"):
        train(replace(finished, run_dir=tmp_path / "run"), ds_config_path=written(changes))
