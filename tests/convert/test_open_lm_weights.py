"""open_lm checkpoints in every released form, held against open_lm's own modules in plain torch."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from twins.open_lm import SIZES, OpenLM

from t2i.convert.open_lm import has_frequencies, load_open_lm, open_lm_state, open_lm_tensors
from t2i.convert.open_lm_config import (
    CONFIGS,
    config_of,
    decide_positions,
    open_lm_config,
    read_config,
    read_values,
)
from t2i.convert.open_lm_reference import open_lm_logits
from t2i.convert.released import read_weights
from t2i.errors import CheckpointError, UserError
from t2i.model.open_lm.configuration_open_lm import NORM_TYPES, POSITION_TYPES, OpenLMConfig

# fp32 sums in another order: at most 2e-5 was seen on logits of about 5.
LOGITS = 1e-4
SOURCE = "a test"


def convert(state, **changes):
    return load_open_lm(dict(state), config=config_of(SIZES | changes, source=SOURCE), source=SOURCE)


VARIANTS = [
    *({"model_norm": norm, "qk_norm": True, "post_embed_norm": True} for norm in NORM_TYPES),
    *({"positional_embedding_type": kind} for kind in POSITION_TYPES),
    {"weight_tying": True, "ffn_type": "swiglu_torch"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())))
@torch.inference_mode()
def test_logits_equal_open_lms_own_and_the_way_back_is_exact(changes):
    twin, ids = OpenLM(**changes), torch.randint(56, (2, 20))
    state = twin.state_dict()
    model, logits = convert(state, **changes), twin(ids)
    assert 3 < logits.abs().max() < 30
    assert torch.allclose(model(ids).logits, logits, atol=LOGITS)
    assert torch.allclose(open_lm_logits(state, ids, config=model.config), logits, atol=LOGITS)
    back = open_lm_state(model.state_dict(), config=model.config)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    model.config.norm_eps = 1e-6
    assert config_of(open_lm_config(model.config), source=SOURCE).to_dict() == model.config.to_dict()


def test_positions_are_the_difference_between_the_1b_configs():
    state = OpenLM().state_dict()
    ids = torch.randint(56, (1, 20))
    old, new, none = (
        convert(state, positional_embedding_type=kind)(ids).logits
        for kind in ("head_rotary", "rotary", "none")
    )
    assert torch.allclose(old, none, atol=LOGITS)
    assert not torch.allclose(old, new, atol=0.1)
    assert read_config("open_lm_1b_old").positional_embedding_type == "head_rotary"
    assert read_config("open_lm_1b").positional_embedding_type == "rotary"
    assert read_config("open_lm_1b").intermediate_size == 5_632


def with_prefix(state, prefix):
    return {prefix + name: value for name, value in state.items()}


FORMS = {
    "bare": lambda state: state,
    "training": lambda state: {"epoch": 3, "name": "x", "state_dict": with_prefix(state, "module.")},
    "averaged": lambda state: {"k": 3, "av_model_sd": with_prefix(state, "module.")},
    "with a run's settings": lambda state: {
        "state_dict": state,
        "args": Namespace(lr=1e-3, logs=Path("runs")),
        "loss": np.float64(3.5),
    },
    "compiled": lambda state: {"epoch": 3, "state_dict": with_prefix(state, "module._orig_mod."), "step": 9},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_gives_the_same_tensors(form, tmp_path):
    state = OpenLM().state_dict()
    # FSDP leaves attributes on tensors, which pickle by another way.
    state["norm.weight"].leftover = 1
    torch.save(FORMS[form](state), tmp_path / "epoch_3.pt")
    found = open_lm_tensors(read_weights(tmp_path / "epoch_3.pt"))
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_an_old_pickle_safetensors_and_a_folder_are_read_alike(tmp_path):
    state = OpenLM().state_dict()
    (tmp_path / "hf").mkdir()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "new.safetensors")
    halves = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
    for index, half in enumerate(halves):
        save_file(with_prefix(half, "model."), tmp_path / "hf" / f"model-0000{index}-of-00002.safetensors")
    for path in (tmp_path / "old.pt", tmp_path / "new.safetensors", tmp_path / "hf"):
        found = open_lm_tensors(read_weights(path))
        assert {name: value.tolist() for name, value in found.items()} == {
            name: value.tolist() for name, value in state.items()
        }


FLAT = {
    "model_type": "openlm", "dim": 48, "n_layers": 2, "n_heads": 4, "seq_len": 32, "vocab_size": 56,
    "norm_type": "gain_only_lp_layer_norm", "apply_qk_norm": True, "norm_eps": 1e-05, "weight_tying": False,
    "post_embed_norm": False, "positional_embedding_type": "rotary", "ffn_type": "swiglu_torch",
}  # fmt: skip
RUN = {
    "model": "open_lm_25m", "model_norm": "gain_only_lp_layer_norm", "qk_norm": True, "lr": 1e-3,
    "positional_embedding_type": "rotary", "ffn_type": "swiglu_torch", "train_data": ["a", "b"],
}  # fmt: skip


def test_both_forms_of_a_folders_config_and_a_runs_params_are_read(tmp_path):
    (tmp_path / "flat.json").write_text(json.dumps(FLAT))
    (tmp_path / "nested.json").write_text(
        json.dumps({"model_type": "openlm", "params": None, "params_args_dict": FLAT})
    )
    (tmp_path / "named.json").write_text(json.dumps({"params_args_dict": RUN}))
    flags = RUN | {"logs": "s3://a: b", "scheduler": None, "wd": 1e-05, "beta": "*b {"}
    (tmp_path / "params.txt").write_text(
        "".join(f"{name}: {value}\n" for name, value in sorted(flags.items()))
    )
    flat, nested, named, params = (
        read_config(str(tmp_path / name)) for name in ("flat.json", "nested.json", "named.json", "params.txt")
    )
    assert flat.to_dict() == nested.to_dict()
    assert named.to_dict() == params.to_dict()
    for config in (flat, named):
        assert (config.qk_norm, config.norm_type) == (True, "gain_only_lp_layer_norm")
        assert config.norm_eps == 1e-5
    assert (flat.hidden_size, named.hidden_size, named.vocab_size) == (48, 192, 50_432)


LACKING = {
    "aphid_neox": "each head needs an even width",
    "llama2_7b": "positional_embedding_type is 'llama_rotary'",
    **dict.fromkeys(
        ("open_lm_1b_geglu", "open_lm_1b_geglu_mqa", "open_lm_7b_geglu"), "has ffn_type 'gemma_geglu'"
    ),
    **dict.fromkeys(("ant_neox_moe", "aphid_neox_moe"), "has moe_freq 2"),
}


def test_every_published_config_is_built_or_refused_for_what_it_is():
    assert len(CONFIGS) == 33  # all that open_lm has, except three of Mamba's class
    for name, values in CONFIGS.items():
        if name in LACKING:
            with pytest.raises(UserError, match=LACKING[name]):
                read_config(name)
        else:
            assert read_config(name).hidden_size == values["hidden_dim"]
    assert {read_config(name).positional_embedding_type for name in CONFIGS if name.endswith("_old")} == {
        "head_rotary"
    }


def test_a_runs_flags_fill_in_what_its_models_json_leaves_out(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(SIZES | {"model_norm": "rms_norm"}))
    flags = {
        "model": "mine",
        "model_norm": "lp_layer_norm",
        "qk_norm": True,
        "positional_embedding_type": "none",
    }
    (tmp_path / "params.txt").write_text("".join(f"{name}: {value}\n" for name, value in flags.items()))
    files = [str(tmp_path / name) for name in ("mine.json", "params.txt")]
    for names in (files, files[::-1]):
        config = config_of(read_values(names), source=SOURCE)
        assert (config.hidden_size, config.qk_norm, config.positional_embedding_type) == (48, True, "none")
        assert config.norm_type == "rms_norm"  # as in open_lm, the model's config wins over a flag
    with pytest.raises(
        UserError, match=r"names the unknown model mine; give its JSON too: --config mine\.json"
    ):
        read_values(files[1:])


@pytest.mark.parametrize("kind", POSITION_TYPES)
def test_the_file_shows_whether_positions_are_rotated(kind):
    assert has_frequencies(OpenLM(positional_embedding_type=kind).state_dict()) == (kind != "none")


@pytest.mark.parametrize(
    ("stated", "given", "shown", "answer"),
    [
        ("rotary", None, True, "rotary"),
        (None, "head_rotary", True, "head_rotary"),
        ("none", None, False, "none"),
        ("rotary", "rotary", False, "rotary"),  # the user knows that the frequencies were taken out
        (None, None, True, "holds rotary frequencies, so they are rotary or head_rotary. Give --positions"),
        (None, None, False, r"holds no rotary frequencies, so they are none \(or llama_rotary"),
        ("rotary", None, False, "says positions are rotary, but the file holds no rotary"),
        ("none", None, True, "says positions are none, but the file holds rotary"),
        (None, "none", True, "says positions are none, but the file holds rotary"),
        ("rotary", "head_rotary", True, "--positions is head_rotary, but config a test says rotary"),
    ],
)
def test_positions_are_never_guessed(stated, given, shown, answer):
    ask = {"stated": stated, "given": given, "has_frequencies": shown, "source": SOURCE}
    if " " not in answer:
        assert decide_positions(**ask) == answer
    else:
        with pytest.raises(UserError, match=answer):
            decide_positions(**ask)


@torch.inference_mode()
def test_the_check_of_a_conversion_does_not_believe_the_config():
    state, ids = OpenLM(positional_embedding_type="none").state_dict(), torch.randint(56, (1, 20))
    wrong = convert(state)  # rotary by default
    assert not torch.allclose(wrong(ids).logits, open_lm_logits(state, ids, config=wrong.config), atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_type": "gelu"}, "has ffn_type 'gelu'; expected swiglu or swiglu_torch"),
        ({"moe_freq": 2}, "has moe_freq 2; expected 0"),
        ({"attn_name": "custom_attn"}, "expected softmax attention"),
        ({"positional_embedding_type": "llama_rotary"}, "positional_embedding_type is 'llama_rotary'"),
        ({"model_norm": "rms_norm", "norm_type": "lp_layer_norm"}, "for model_norm; expected one of them"),
    ],
)
def test_configs_that_mean_another_model_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config_of(SIZES | changes, source=SOURCE)


def test_a_config_without_sizes_or_with_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="config a test has no n_layers, n_heads, seq_len, vocab_size"):
        config_of({"hidden_dim": 8}, source=SOURCE)
    with pytest.raises(UserError, match="nowhere; expected a file or one of open_lm_test_tiny"):
        read_config("nowhere")


def test_a_misfit_names_tensor_and_shapes():
    state = OpenLM().state_dict()
    wrong = state | {"layers.1.feed_forward.w3.weight": torch.zeros(48, 128)}
    message = r"layers\.1\.feed_forward\.w3\.weight has shape \(48, 128\), expected \(48, 256\)"
    with pytest.raises(CheckpointError, match=message):
        convert(wrong)
    with pytest.raises(CheckpointError, match=r"has, unknown here, layers\.0\.attention\.q_norm\.weight"):
        convert(OpenLM(qk_norm=True).state_dict())
    with pytest.raises(CheckpointError, match=r"has no layers\.0\.attention\.q_norm\.weight"):
        convert(state, qk_norm=True)
    with pytest.raises(CheckpointError, match="two different matrices, but its config has weight_tying"):
        convert(state, weight_tying=True)
    name = "layers.0.attention.pos_embed.inv_freq"
    with pytest.raises(CheckpointError, match="rotary frequencies of another base than 10000"):
        convert(state | {name: state[name] / 2})


def test_a_bf16_checkpoint_stays_bf16_both_ways():
    state = {name: value.bfloat16() for name, value in OpenLM().state_dict().items()}
    model = convert(state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    back = open_lm_state(model.state_dict(), config=model.config)
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == torch.bfloat16 for name in state)


class Marker:
    """Not a tensor, and not plain."""


def test_a_pickle_that_could_run_code_is_refused(tmp_path):
    torch.save({"state_dict": OpenLM().state_dict(), "hook": Marker()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"holds \S*Marker beside tensors.*so it was not"):
        read_weights(tmp_path / "bad.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "bad.pt").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="torn.pt cannot be read|beside tensors"):
        read_weights(tmp_path / "torn.pt")
    with pytest.raises(UserError, match="is no weight file, and no folder"):
        read_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["page.pt", "empty.pt", "page.safetensors"])
def test_a_file_that_is_no_checkpoint_is_a_sentence(name, tmp_path):
    (tmp_path / name).write_text("" if name == "empty.pt" else "<html>Not found</html>")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read (by torch|as safetensors)"):
        read_weights(tmp_path / name)


def test_the_default_config_is_open_lms_default():
    config = config_of(SIZES, source=SOURCE)
    assert isinstance(config, OpenLMConfig)
    assert (config.positional_embedding_type, config.norm_type, config.norm_eps, config.qk_norm) == (
        "rotary",
        "default_layer_norm",
        1e-5,
        False,
    )
