"""open_lm checkpoints in every released form, held against open_lm's modules written out here in plain torch."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import nn

from t2i.errors import CheckpointError, UserError
from t2i.model import weights
from t2i.model.configuration_open_lm import NORM_TYPES, POSITIONS, OpenLMConfig
from t2i.model.reference import open_lm_logits
from t2i.model.weights import (
    CONFIGS,
    config_of,
    load_open_lm,
    open_lm_config,
    open_lm_state,
    open_lm_tensors,
    read_config,
)
from t2i.released import read_weights

# fp32 sums in another order: at most 2e-5 was seen on logits of about 5.
LOGITS = 1e-4
SIZES = {"hidden_dim": 48, "n_layers": 2, "n_heads": 4, "seq_len": 32, "vocab_size": 56}
SOURCE = "a test"


class Norm(nn.Module):
    """open_lm's norms in fp32, where low precision makes no difference."""

    def __init__(self, kind, width):
        super().__init__()
        self.is_rms = kind == "rms_norm"
        if kind != "no_wb_layer_norm":
            self.weight = nn.Parameter(1 + 0.3 * torch.randn(width))
        if kind in ("default_layer_norm", "lp_layer_norm"):
            self.bias = nn.Parameter(0.3 * torch.randn(width))

    def forward(self, x):
        gain, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        if self.is_rms:
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain
        return F.layer_norm(x, x.shape[-1:], gain, bias, 1e-5)


class Rotary(nn.Module):
    """Tables of cos and sin, half rotation; head_rotary swaps positions and heads before and after."""

    def __init__(self, head_dim, over_heads):
        super().__init__()
        self.over_heads = over_heads
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)))

    def forward(self, x):  # (B, S, H, head_dim)
        x = x.transpose(1, 2) if self.over_heads else x
        table = torch.outer(torch.arange(x.shape[1]).float(), self.inv_freq).repeat(1, 2)[None, :, None]
        first, second = x.chunk(2, dim=-1)
        x = x * table.cos() + torch.cat((-second, first), dim=-1) * table.sin()
        return x.transpose(1, 2) if self.over_heads else x


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.n_heads = p.n_heads
        self.in_proj = nn.Linear(p.hidden_dim, 3 * p.hidden_dim, bias=False)
        self.out_proj = nn.Linear(p.hidden_dim, p.hidden_dim, bias=False)
        if p.positional_embedding_type != "none":
            self.pos_embed = Rotary(p.hidden_dim // p.n_heads, p.positional_embedding_type == "head_rotary")
        if p.qk_norm:
            self.q_norm, self.k_norm = Norm(p.model_norm, p.hidden_dim), Norm(p.model_norm, p.hidden_dim)

    def forward(self, x):
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(*x.shape[:2], self.n_heads, -1) for part in (q, k, v))
        if hasattr(self, "pos_embed"):
            q, k = self.pos_embed(q), self.pos_embed(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = 256 * ((int(2 * 4 * width / 3) + 255) // 256)
        self.w12 = nn.Linear(width, 2 * hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.attention = Attention(p)
        self.feed_forward = SwiGLU(p.hidden_dim)
        self.attention_norm, self.ffn_norm = (
            Norm(p.model_norm, p.hidden_dim),
            Norm(p.model_norm, p.hidden_dim),
        )

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class OpenLM(nn.Module):
    """open_lm's Transformer: same names, same arithmetic, no cache."""

    def __init__(self, **changes):
        super().__init__()
        torch.manual_seed(0)
        p = SimpleNamespace(**(weights.DEFAULTS | SIZES | changes))
        if p.post_embed_norm:
            self.post_embed_norm = Norm(p.model_norm, p.hidden_dim)
        self.tok_embeddings = nn.Embedding(p.vocab_size, p.hidden_dim)
        self.layers = nn.ModuleList(Block(p) for _ in range(p.n_layers))
        self.norm = Norm(p.model_norm, p.hidden_dim)
        self.output = nn.Linear(p.hidden_dim, p.vocab_size, bias=False)
        self.output.weight.data *= 5  # logits of about 5, as trained models have
        if p.weight_tying:
            self.tok_embeddings.weight = self.output.weight

    def forward(self, ids):
        x = self.tok_embeddings(ids)
        x = self.post_embed_norm(x) if hasattr(self, "post_embed_norm") else x
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x)).float()


def convert(state, **changes):
    return load_open_lm(dict(state), config=config_of(SIZES | changes, source=SOURCE), source=SOURCE)


VARIANTS = [
    *({"model_norm": norm, "qk_norm": True, "post_embed_norm": True} for norm in NORM_TYPES),
    *({"positional_embedding_type": kind} for kind in POSITIONS),
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
    (tmp_path / "params.txt").write_text(yaml.safe_dump(RUN))
    flat, nested, named, params = (
        read_config(str(tmp_path / name)) for name in ("flat.json", "nested.json", "named.json", "params.txt")
    )
    assert flat.to_dict() == nested.to_dict()
    assert named.to_dict() == params.to_dict()
    for config in (flat, named):
        assert (config.qk_norm, config.norm_type) == (True, "gain_only_lp_layer_norm")
        assert config.norm_eps == 1e-5
    assert (flat.hidden_size, named.hidden_size, named.vocab_size) == (48, 192, 50_432)


def test_every_published_config_can_be_built():
    assert {name: read_config(name).hidden_size for name in CONFIGS} == {
        name: values["hidden_dim"] for name, values in CONFIGS.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_type": "gelu"}, "has ffn_type 'gelu'; wanted is swiglu or swiglu_torch"),
        ({"moe_freq": 2}, "has moe_freq 2; wanted is 0"),
        ({"attn_name": "custom_attn"}, "wanted is softmax attention"),
        ({"positional_embedding_type": "llama_rotary"}, "positional_embedding_type is 'llama_rotary'"),
        ({"model_norm": "rms_norm", "norm_type": "lp_layer_norm"}, "for model_norm; wanted is one of them"),
    ],
)
def test_configs_that_mean_another_model_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config_of(SIZES | changes, source=SOURCE)


def test_a_config_without_sizes_or_with_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="config a test has no n_layers, n_heads, seq_len, vocab_size"):
        config_of({"hidden_dim": 8}, source=SOURCE)
    with pytest.raises(UserError, match="names the model mine, which is not known; give its json"):
        config_of({"model": "configs/mine.json"}, source=SOURCE)
    with pytest.raises(UserError, match="nowhere is no file, and none of open_lm_11m_v2"):
        read_config("nowhere")


def test_a_misfit_names_tensor_and_shapes():
    state = OpenLM().state_dict()
    wrong = state | {"layers.1.feed_forward.w3.weight": torch.zeros(48, 128)}
    message = r"layers\.1\.feed_forward\.w3\.weight has shape \(48, 128\), wanted is \(48, 256\)"
    with pytest.raises(CheckpointError, match=message):
        convert(wrong)
    with pytest.raises(CheckpointError, match=r"has, unknown here, layers\.0\.attention\.q_norm\.weight"):
        convert(OpenLM(qk_norm=True).state_dict())
    with pytest.raises(CheckpointError, match=r"has no layers\.0\.attention\.q_norm\.weight"):
        convert(state, qk_norm=True)
    with pytest.raises(CheckpointError, match="two different matrices where its config says weight_tying"):
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
    with pytest.raises(UserError, match="is no file, and no folder"):
        read_weights(tmp_path / "nowhere")


def test_the_default_config_is_open_lms_default():
    config = config_of(SIZES, source=SOURCE)
    assert isinstance(config, OpenLMConfig)
    assert (config.positional_embedding_type, config.norm_type, config.norm_eps, config.qk_norm) == (
        "rotary",
        "default_layer_norm",
        1e-5,
        False,
    )
