import pytest
import torch
from backbones.tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from t2i.config import ModelConfig
from t2i.errors import UserError
from t2i.model.control_init import control_init
from t2i.model.open_lm.class_reading_open_lm import parts_of
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.resize import split_rows
from t2i.model.trainable import add_lora, layers_of, num_parameters, set_trainable


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return OpenLMForCausalLM(OpenLMConfig(**{**sizes, "intermediate_size": 24, **changes}))


def learned(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


ROWS = {"model.tok_embeddings.weight", "output.weight"}
NORMS = {
    f"model.layers.{layer}.{norm}.{part}"
    for layer in range(3)
    for norm in ("attention_norm", "ffn_norm")
    for part in ("weight", "bias")
} | {"model.norm.weight", "model.norm.bias"}
FIRST_LAYER = {
    f"model.layers.0.{part}.weight"
    for part in ("attention.in_proj", "attention.out_proj", "feed_forward.w12", "feed_forward.w3")
}
FEED_FORWARD = {
    f"model.layers.{layer}.feed_forward.{part}.weight" for layer in range(3) for part in ("w12", "w3")
}
LADDER = {
    "embeddings": ROWS,
    "norms": ROWS | NORMS,
    "first-half": ROWS | NORMS | FIRST_LAYER,
    "feed-forward": ROWS | NORMS | FEED_FORWARD,
}


@pytest.mark.parametrize("recipe", LADDER)
def test_a_recipe_learns_exactly_these_parameters(recipe):
    model = tiny()
    set_trainable(model, recipe=recipe)
    assert learned(model) == LADDER[recipe]


def test_all_thaws_what_another_recipe_froze():
    model = tiny()
    set_trainable(model, recipe="embeddings")
    set_trainable(model, recipe="all")
    assert learned(model) == {name for name, _ in model.named_parameters()}


def test_norms_of_queries_keys_and_embeddings_are_norms():
    model = tiny(qk_norm=True, post_embed_norm=True, norm_type="rms_norm", num_hidden_layers=1)
    set_trainable(model, recipe="norms")
    layer = "model.layers.0."
    inner = {f"{layer}attention.q_norm.weight", f"{layer}attention.k_norm.weight"}
    outer = {f"{layer}attention_norm.weight", f"{layer}ffn_norm.weight"}
    assert learned(model) == ROWS | inner | outer | {"model.post_embed_norm.weight", "model.norm.weight"}


def test_joined_rows_learn_with_the_rows():
    model = tiny()
    split_rows(model, num_old=60)
    set_trainable(model, recipe="embeddings")
    assert learned(model) == {
        f"{side}.{part}" for side in ("model.tok_embeddings", "output") for part in ("old", "new")
    }
    assert num_parameters(model)[0] == 2 * 64 * 16


def test_other_model_classes_have_the_same_ladder():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=True))
    set_trainable(model, recipe="norms")
    norms = {
        f"model.layers.{n}.{kind}_layernorm.weight" for n in (0, 1) for kind in ("input", "post_attention")
    }
    assert learned(model) == {"model.embed_tokens.weight", "model.norm.weight"} | norms
    set_trainable(model, recipe="feed-forward")
    mlp = {f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("gate", "up", "down")}
    assert learned(model) == {"model.embed_tokens.weight", "model.norm.weight"} | norms | mlp


def test_norms_have_learned_positions_where_a_class_has_them():
    sizes = {"vocab_size": 32, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    set_trainable(model, recipe="embeddings")
    assert learned(model) == {"transformer.wte.weight"}
    set_trainable(model, recipe="norms")
    norms = {
        f"transformer.{norm}.{part}"
        for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f")
        for part in ("weight", "bias")
    }
    assert learned(model) == {"transformer.wte.weight", "transformer.wpe.weight"} | norms


def drawn(model_type):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, vocab_size=64))


@pytest.mark.parametrize("model_type", ["gemma3", "git"])
def test_layers_and_norms_are_those_that_text_passes_and_not_a_vision_towers(model_type):
    model = drawn(model_type)
    hidden = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda _, inputs, output: hidden.append(inputs[0].shape))
    model(torch.tensor([[1, 2, 3]]))
    assert hidden == [(1, 3, 32)] * 2
    set_trainable(model, recipe="norms")
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    unused = {name for name, value in model.named_parameters() if value.requires_grad and value.grad is None}
    # The projectors' norms, which are beside the towers.
    assert all("projector" in name or "projection" in name for name in unused)


def test_lora_and_image_weights_go_into_the_language_model_of_gemma_3():
    model = drawn("gemma3")
    names = {id(module): name for name, module in model.named_modules()}
    routed = {names[id(part)] for _, _, part in parts_of(model, "all")}
    assert "model.language_model.norm" in routed
    add_lora(model, rank=2)
    assert all(name.startswith("model.language_model.") for name in routed | learned(model))


@pytest.mark.parametrize("model_type", ["mamba2", "gpt_oss", "bert"])
def test_norms_hold_no_matrix(model_type):
    model = drawn(model_type)
    set_trainable(model, recipe="embeddings")
    rows = learned(model)
    set_trainable(model, recipe="norms")
    matrices = {name for name, value in model.named_parameters() if value.requires_grad and value.dim() > 1}
    assert {name for name in matrices - rows if "embeddings" not in name} == set()
    assert len(learned(model)) > len(matrices)


def test_recipes_that_name_nothing_are_refused():
    with pytest.raises(UserError, match="model.trainable is 'half'; expected one of all, embeddings"):
        ModelConfig(trainable="half")
    with pytest.raises(UserError, match="is first-half; expected a model of at least 2 layers, not 1"):
        set_trainable(tiny(num_hidden_layers=1), recipe="first-half")


def test_a_recipe_that_freezes_everything_is_refused():
    model = tiny()
    model.set_input_embeddings(torch.nn.Identity())
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(
        UserError, match="model.trainable is embeddings, which freezes every parameter of OpenLM"
    ):
        set_trainable(model, recipe="embeddings")


def test_adapters_need_a_matrix_to_stand_beside():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(UserError, match="the layers of GPT2LMHeadModel have no nn.Linear"):
        add_lora(model, rank=2)


def test_a_class_whose_matrices_cannot_be_adapted_is_refused():
    with pytest.raises(
        UserError, match=r"model\.lora_rank is 2; expected 0 for MambaForCausalLM: .*out_proj"
    ):
        add_lora(drawn("mamba"), rank=2)


def tensors(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_shuffling_keeps_each_tensors_numbers_and_redrawing_its_moments():
    before = tensors(tiny(hidden_size=64))
    for kind in ("within-tensors", "moments"):
        model = tiny(hidden_size=64)
        control_init(model, kind=kind, seed=1)
        for name, value in tensors(model).items():
            if before[name].dim() == 1:
                continue  # norms are all ones and zeros here
            assert not torch.equal(value, before[name])
            if kind == "within-tensors":
                assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
            # 5 standard errors of a deviation from at least 1,536 numbers are 9%.
            assert value.std().item() == pytest.approx(before[name].std().item(), rel=0.09)


def test_moving_layers_puts_each_layer_into_another_place():
    model = tiny()
    before = [layer.attention.in_proj.weight.clone() for layer in model.model.layers]
    rows = model.output.weight.clone()
    control_init(model, kind="layer-order", seed=2)
    after = [layer.attention.in_proj.weight for layer in model.model.layers]
    places = [[torch.equal(new, old) for old in before].index(True) for new in after]
    assert sorted(places) == [0, 1, 2]
    assert all(place != source for place, source in enumerate(places))
    assert torch.equal(model.output.weight, rows)


def test_a_seed_scrambles_the_same_way_twice():
    models = [tiny(), tiny(), tiny()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        control_init(model, kind="moments", seed=seed)
    one, again, other = (model.output.weight for model in models)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_scrambling_that_is_none_is_refused():
    with pytest.raises(
        UserError, match="model.control_init is 'layers'; expected one of none, fresh, within-tensors"
    ):
        ModelConfig(init="runs/language-model", control_init="layers")
    with pytest.raises(UserError, match="is layer-order; expected a model of at least 2 layers, not 1"):
        control_init(tiny(num_hidden_layers=1), kind="layer-order", seed=0)
    odd = tiny(num_hidden_layers=3)
    odd.model.layers[2].mlp = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in odd.state_dict().items()}
    with pytest.raises(UserError, match="layers are all alike, but layer 2 has other weights than layer 0"):
        control_init(odd, kind="layer-order", seed=0)
    assert all(torch.equal(value, before[name]) for name, value in odd.state_dict().items())
