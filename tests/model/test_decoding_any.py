"""The fast decoder of transformers' own classes: equal to the class's own cache, and the model is left as it was."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from t2i.errors import UserError
from t2i.generate.sample import drawer_of
from t2i.model.backbone import check_decoding
from t2i.model.open_lm import decoding_any_open_lm, fixed_shape_open_lm, reading_open_lm
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.configuration_routed import RoutedConfig
from t2i.model.open_lm.decoding_any_open_lm import RowDecoder
from t2i.model.open_lm.forms_open_lm import PADDED, ClassForm
from t2i.model.open_lm.modeling_routed import Routed, RoutedAddition, RoutedForCausalLM
from t2i.model.open_lm.products_open_lm import PackedConv1D, PackedLinear, mirrored
from t2i.model.open_lm.reading_open_lm import begin_any, begin_plain, compiles, is_served
from t2i.model.open_lm.sampling_open_lm import sample_codes

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
NARROW = {"head_dim": 8, "query_pre_attn_scalar": 8}
SERVED = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **EXPERTS},
    "gemma": {"head_dim": 8},
    "gemma2": {**NARROW, "sliding_window": 64, "final_logit_softcapping": None},
    "gemma3_text": {**NARROW, "sliding_window": 64},
    "mistral": {"sliding_window": 64},
    "olmo2": {},
    "smollm3": {},
    "phi3": {},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "granite": {"logits_scaling": 1.0},
    "deepseek_v3": {
        **EXPERTS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
OTHERS = {
    "gemma3_text": {**NARROW, "sliding_window": 4},  # shorter than the rows: its cache forgets
    "mistral": {"sliding_window": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bloom": {"n_layer": 2, "n_head": 4},  # counts its positions from a mask of two dimensions
}
PROMPTS, EMPTY, FIRST = [[1, 2, 3, 4, 5, 6, 7], [9, 8]], [7, 7, 7], 40
DRAW = {
    "empty_prompt": EMPTY,
    "image_ids": range(FIRST, 64),
    "num_codes": 6,
    "seeds": [0, 1],
    "guidance_scale": 3.0,
}
ROUNDING = 2e-5
"""Hidden states are about 3, summed over 32 numbers in another order in each of two layers."""


def made(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})).eval()


def routed(kind="feed-forward", text=None):
    torch.manual_seed(0)
    text = text or LlamaConfig(**SIZES)
    model = RoutedForCausalLM(RoutedConfig(text, image_weights=kind, image_rank=2, num_text_rows=32)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".image." in name or ".up." in name:
                value.add_(torch.randn_like(value) * 0.1)
    return model


def slow(model, monkeypatch, **changes):
    with monkeypatch.context() as patch:
        patch.setattr(reading_open_lm, "is_served", lambda *_, **__: False)
        return sample_codes(model, PROMPTS, **{**DRAW, **changes})


@pytest.mark.parametrize("kind", SERVED)
def test_codes_and_windows_equal_those_of_the_class_itself(kind, monkeypatch):
    model = made(kind, **SERVED[kind])
    assert is_served(model)
    assert torch.equal(sample_codes(model, PROMPTS, **DRAW), slow(model, monkeypatch))
    settings, ids = {"empty_prompt": EMPTY, "num_codes": 8}, torch.arange(24).view(4, 6) + FIRST
    with torch.inference_mode():
        hidden, decoder = begin_any(model, PROMPTS, **settings)
        first, plain = begin_plain(model, PROMPTS, empty_prompt=EMPTY, num_codes=6)
        assert isinstance(decoder, RowDecoder)
        torch.testing.assert_close(hidden, first, atol=ROUNDING, rtol=0)
        one_by_one = torch.stack([plain(column) for column in ids.T], dim=1)  # (4, 6, D)
        # Three at a time, of which each row keeps another number: what it did not keep is written over.
        starts, found = torch.full((4,), 7), torch.zeros_like(one_by_one)
        rows = torch.arange(4)[:, None]
        for kept in ([1, 2, 3, 2], [2, 1, 1, 3], [3, 3, 2, 1]):
            at = (starts[:, None] + torch.arange(3)).clamp(max=12)
            given = ids[rows, at - 7].clone()
            for row, count in enumerate(kept):
                given[row, count:] = 63 - row  # wrong guesses, which must leave no trace
            hidden = decoder.read(given, starts)
            for row, count in enumerate(kept):
                begin = int(starts[row]) - 7
                found[row, begin : begin + count] = hidden[row, :count]
            starts = starts + torch.tensor(kept)
        assert starts.tolist() == [13, 13, 13, 13]
        torch.testing.assert_close(found, one_by_one, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_class_that_needs_another_cache_continues_as_it_does_by_itself(kind, monkeypatch):
    model = made(kind, **OTHERS[kind])
    settings = {"empty_prompt": None, "num_codes": 6}
    with torch.inference_mode():
        assert not isinstance(begin_any(model, PROMPTS, **settings)[1], RowDecoder)
    assert torch.equal(sample_codes(model, PROMPTS, **DRAW), slow(model, monkeypatch))
    with pytest.raises(ValueError, match=f"the step of {type(model).__name__} cannot be compiled as a whole"):
        sample_codes(model, PROMPTS, **DRAW, is_compiled=True)


def test_a_class_that_says_it_does_not_compile_is_refused_by_a_sentence():
    model = made("llama")
    model._can_compile_fullgraph = False  # as classes say whose experts are chosen by values
    assert is_served(model) and is_served(model, is_fixed=True) and not compiles(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be compiled .* is_compiled=False"):
        sample_codes(model, PROMPTS, **DRAW, is_compiled=True)


def test_a_class_that_decodes_otherwise_than_ours_is_noticed(monkeypatch):
    real = decoding_any_open_lm.attend

    def wrong(*inputs, **settings):
        mixed, none = real(*inputs, **settings)
        return mixed * 1.01, none

    monkeypatch.setitem(
        decoding_any_open_lm.ALL_ATTENTION_FUNCTIONS._local_mapping, decoding_any_open_lm.ATTENTION, wrong
    )
    assert not is_served(made("llama"))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])  # with a bias; transposed
def test_the_model_is_left_as_it_was_and_new_weights_are_seen(kind, monkeypatch):
    model = made(kind, **SERVED[kind])
    before = {name: type(module) for name, module in model.named_modules()}
    state = [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()]
    codes = sample_codes(model, PROMPTS, **DRAW)
    with pytest.raises(RuntimeError, match="in the middle"):  # an error during decoding
        monkeypatch.setattr(RowDecoder, "_forward", raising)
        sample_codes(model, PROMPTS, **DRAW)
    monkeypatch.undo()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()] == state
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    after = sample_codes(model, PROMPTS, **DRAW)
    assert torch.equal(after, slow(model, monkeypatch))
    assert not torch.equal(after, codes)


def raising(*_, **__):
    raise RuntimeError("in the middle")


def test_linear_layers_are_packed_and_those_with_hooks_are_not():
    model = made("gpt2", **SERVED["gpt2"])
    body = decoding_any_open_lm.decoding_body(model.transformer, num_rows=4)
    assert isinstance(body.h[0].mlp.c_fc, PackedConv1D)
    llama = made("llama")
    llama.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    body = decoding_any_open_lm.decoding_body(llama.model, num_rows=4)
    assert isinstance(body.layers[0].mlp.gate_proj, PackedLinear)
    assert not isinstance(body.layers[0].mlp.up_proj, PackedLinear)
    assert body.layers[0].mlp.up_proj.weight is llama.model.layers[0].mlp.up_proj.weight


def test_a_module_in_two_places_stays_one_in_a_mirror():
    shared = torch.nn.Linear(2, 2)
    copied = mirrored(torch.nn.Sequential(shared, torch.nn.Sequential(shared)), lambda _: None)
    assert copied[0] is copied[1][0] and copied[0] is not shared and copied[0].weight is shared.weight


@pytest.mark.parametrize("kind", ["feed-forward", "all", "lora"])
def test_a_routed_models_codes_pass_its_image_weights_alone(kind, monkeypatch):
    model = routed(kind)
    assert is_served(model)
    check_decoding(model, name="some/folder")  # continues with image codes, as the sampler does
    assert ClassForm.of(model).reading == PADDED  # the others are slow
    assert not any(type(module) in (Routed, RoutedAddition) for module in model.image_body().modules())
    assert torch.equal(sample_codes(model, PROMPTS, **DRAW), slow(model, monkeypatch))
    model(torch.tensor([[1, 2, FIRST]]))
    model.image_body()(torch.tensor([[FIRST, FIRST]]))
    assert model.route.text.tolist() == [0, 1]  # a mirror looks at no ids


def test_new_embeddings_of_a_routed_model_are_looked_at_and_the_old_ones_no_longer():
    model = routed()
    old = model.get_input_embeddings()
    for _ in range(2):
        model.set_input_embeddings(old)
    assert len(old._forward_pre_hooks) == 1
    new = torch.nn.Embedding(*old.weight.shape)
    model.set_input_embeddings(new)
    old(torch.tensor([[1, FIRST]]))
    assert len(model.route.image) == 0
    new(torch.tensor([[1, FIRST]]))
    assert model.route.image.tolist() == [1]


def test_a_routed_open_lm_is_served_too(monkeypatch):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = routed("feed-forward", text=OpenLMConfig(**sizes, max_position_embeddings=64))
    assert is_served(model)
    assert torch.equal(sample_codes(model, PROMPTS, **DRAW), slow(model, monkeypatch))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "routed", "routed lora"])
def test_a_compiled_step_draws_the_same_codes_and_is_kept(kind, monkeypatch):
    is_routed = kind.startswith("routed")
    model = routed("lora" if "lora" in kind else "feed-forward") if is_routed else made(kind, **SERVED[kind])
    real, steps = torch.compile, []

    def without_inductor(step, *, fullgraph, **_):  # whose kernels take a minute to build
        steps.append(step)
        return real(step, fullgraph=fullgraph, backend="eager")

    monkeypatch.setattr(torch, "compile", without_inductor)
    monkeypatch.setattr(fixed_shape_open_lm, "LEAST_WINDOW", 16)
    assert compiles(model)
    expected = slow(model, monkeypatch)
    for _ in range(2):
        assert torch.equal(sample_codes(model, PROMPTS, **DRAW, is_compiled=True), expected)
    assert len(steps) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_inductors_step_draws_the_same_codes_for_another_batch_too(kind, monkeypatch):
    model = made(kind, **SERVED[kind])
    for changes in ({}, {"seeds": [5, 6], "top_k": 8}):
        found = sample_codes(model, PROMPTS, **{**DRAW, **changes}, is_compiled=True)
        assert torch.equal(found, slow(model, monkeypatch, **changes))


def test_a_class_whose_step_cannot_be_compiled_is_refused_before_the_first_image():
    class Opened:
        model, folder = made("mistral", sliding_window=4), "some/folder"

    from t2i.config import SampleConfig

    Opened.model.config.sequence_mode = "text-to-image"
    with pytest.raises(UserError, match=r"--compile: some/folder is a MistralForCausalLM, whose step cannot"):
        drawer_of(Opened, settings=SampleConfig(compile=True))
