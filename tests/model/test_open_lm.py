import os
import sys

import processes
import pytest
import torch

from t2i.errors import UserError
from t2i.model.open_lm import fixed_shape_open_lm, sampling_open_lm
from t2i.model.open_lm.attention_open_lm import rotary_angles, rotate
from t2i.model.open_lm.configuration_open_lm import NORM_TYPES, OpenLMConfig
from t2i.model.open_lm.decoding_open_lm import Decoder, FixedDecoder, StaticCache
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.sampling_open_lm import choose_codes, image_keys, sample_codes, waits
from t2i.model.resize import grow_vocabulary, merged_state_dict, split_rows

# fp32 matrix products of other shapes differ in the last bits; logits here are about 1.
LOGITS = 1e-5


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OpenLMConfig(**{**sizes, "intermediate_size": 48, "max_position_embeddings": 64, **changes})
    return OpenLMForCausalLM(config).eval()


@pytest.mark.parametrize("positions", ["rotary", "head_rotary"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_logits_with_a_cache_equal_logits_without(positions, norm_type):
    model = tiny(positional_embedding_type=positions, norm_type=norm_type, qk_norm=True, post_embed_norm=True)
    ids = torch.randint(64, (2, 12))
    whole = model(ids).logits
    outputs, parts = None, []
    for part in ids.split([5, 1, 3, 1, 2], dim=1):
        cache = outputs.past_key_values if outputs else None
        outputs = model(part, past_key_values=cache, use_cache=True)
        parts.append(outputs.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=LOGITS)


def test_left_padding_changes_nothing():
    model = tiny()
    ids = torch.randint(64, (1, 7))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    assert torch.allclose(model(padded, attention_mask=mask).logits[:, 3:], model(ids).logits, atol=LOGITS)


def test_rotation_equals_complex_multiplication():
    heads, positions = torch.randn(1, 2, 5, 8), torch.arange(3, 8)[None]
    turned = rotate(heads, *rotary_angles(positions, head_dim=8))
    as_complex = torch.complex(heads[..., :4], heads[..., 4:])
    frequencies = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    twin = as_complex * torch.exp(1j * positions[0, :, None] * frequencies)
    assert torch.allclose(turned, torch.cat([twin.real, twin.imag], -1), atol=1e-5)


def test_only_distances_matter_to_rotary_and_nothing_to_head_rotary():
    ids = torch.randint(64, (1, 6))
    positions = torch.arange(6)[None]
    rotary, without = tiny(), tiny(positional_embedding_type="head_rotary")
    assert torch.allclose(rotary(ids, position_ids=positions + 9).logits, rotary(ids).logits, atol=LOGITS)
    assert not torch.allclose(rotary(ids, position_ids=positions * 2).logits, rotary(ids).logits, atol=1e-3)
    assert torch.equal(without(ids, position_ids=positions * 2).logits, without(ids).logits)


def test_initialisation_is_open_lms():
    model = tiny(hidden_size=256, num_hidden_layers=3, vocab_size=512, intermediate_size=512)
    for layer, block in enumerate(model.model.layers):
        depth = (2 * (layer + 1)) ** 0.5
        wanted = {"in_proj": 1 / 16, "w12": 1 / 16, "out_proj": 1 / 16 / depth, "w3": 512**-0.5 / depth}
        weights = {
            name.split(".")[-2]: value
            for name, value in block.named_parameters()
            if "proj" in name or "w" in name.split(".")[-2]
        }
        for name, std in wanted.items():
            # A normal cut at three deviations has 0.9866 of its deviation; 3% covers the draw.
            assert weights[name].std().item() == pytest.approx(0.9866 * std, rel=0.03)
            assert weights[name].abs().max() <= 3 * std
    assert model.output.weight.std().item() == pytest.approx(0.9866 / 16, rel=0.03)


def test_gradient_checkpointing_gives_equal_gradients():
    ids, gradients = torch.randint(64, (2, 9)), []
    for enabled in (False, True):
        model = tiny().train()
        if enabled:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_generate_follows_the_most_likely_token():
    model, ids = tiny(), torch.randint(64, (2, 4))
    found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert found.tolist() == ids.tolist()


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1], [2, 2], [3, 1, 4, 1], [9]]
SETTINGS = {"image_ids": range(40, 56), "num_codes": 6, "empty_prompt": [7], "top_k": 5, "top_p": 0.8}


def slow_codes(model, prompt, *, seed, guidance_scale, image_ids, num_codes, empty_prompt, top_k, top_p):
    """Run both whole sequences each step with all logits, and combine log-probabilities."""
    keys = image_keys(torch.tensor([seed]), num_codes=num_codes)
    found = []
    for step in range(num_codes):
        logits = [
            model(torch.tensor([start + [code + image_ids.start for code in found]])).logits[:, -1]
            for start in (prompt, empty_prompt)
        ]
        guided = logits[1] + guidance_scale * (logits[0] - logits[1])
        image_logits = guided[:, image_ids.start : image_ids.stop]
        found.append(
            choose_codes(image_logits, keys[:, step], temperature=1.0, top_k=top_k, top_p=top_p).item()
        )
    return found


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_sampler_equals_a_slow_twin(guidance_scale):
    model = tiny()
    with torch.inference_mode():
        twin = [
            slow_codes(model, p, seed=i, guidance_scale=guidance_scale, **SETTINGS)
            for i, p in enumerate(PROMPTS)
        ]
    seeds = list(range(len(PROMPTS)))
    fast = sample_codes(model, PROMPTS, seeds=seeds, guidance_scale=guidance_scale, **SETTINGS)
    assert fast.tolist() == twin


def test_a_seed_gives_the_same_image_in_batches_of_1_and_7():
    model = tiny()
    together = sample_codes(model, PROMPTS, seeds=range(7), **SETTINGS)
    alone = [sample_codes(model, [p], seeds=[i], **SETTINGS)[0] for i, p in enumerate(PROMPTS)]
    assert together.tolist() == [codes.tolist() for codes in alone]


@pytest.mark.parametrize("positions", ["rotary", "none"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_decoding_token_by_token_equals_the_forward(positions, norm_type, monkeypatch):
    monkeypatch.setattr(fixed_shape_open_lm, "LEAST_WINDOW", 4)
    model = tiny(positional_embedding_type=positions, norm_type=norm_type, qk_norm=True, post_embed_norm=True)
    ids, padding = torch.randint(64, (3, 9)), torch.tensor([0, 2, 4])
    mask = (torch.arange(9) >= padding[:, None]).long()
    with torch.inference_mode():
        whole = model.model(ids, attention_mask=mask).last_hidden_state
        like = model.output.weight
        cache = StaticCache.empty(model.config, num_rows=3, num_positions=9, like=like)
        model.model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
        fixed = FixedDecoder(model, num_rows=3, num_positions=12)  # three more than there will be
        for kept, layer in zip(fixed.memory, cache.memory, strict=True):
            kept[..., :9, :] = layer
        fixed.begin(length=5, padding=padding)
        plain = Decoder(model, cache.memory, length=5, padding=padding)
        windows = [*fixed.windows()]
        assert windows == [8, 8, 8, 12, 12, 12, 12]
        for decode in (lambda ids, _: plain(ids), fixed):
            columns = ids[:, 5:].unbind(1)
            parts = [decode(column, window) for column, window in zip(columns, windows, strict=False)]
            assert torch.allclose(torch.stack(parts, 1), whole[:, 5:], atol=LOGITS)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_compiled_step_draws_the_same_codes_and_is_kept(guidance_scale, monkeypatch):
    model, real, made = tiny(), torch.compile, []

    def without_inductor(step, *, fullgraph, **_):  # whose kernels take a minute to build
        made.append(step)
        return real(step, fullgraph=fullgraph, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_inductor)
    monkeypatch.setattr(fixed_shape_open_lm, "LEAST_WINDOW", 4)
    settings = {"seeds": range(7), "guidance_scale": guidance_scale, **SETTINGS}
    wanted = sample_codes(model, PROMPTS, **settings)
    assert torch.equal(sample_codes(model, PROMPTS, **settings, is_compiled=True), wanted)
    wanted = sample_codes(model, PROMPTS[::-1], **settings)
    assert torch.equal(sample_codes(model, PROMPTS[::-1], **settings, is_compiled=True), wanted)
    assert len(made) == 1
    longer = [[*range(30)], *PROMPTS[1:]]  # with 6 codes over the 32 positions there were
    wanted = sample_codes(model, longer, **settings)
    assert torch.equal(sample_codes(model, longer, **settings, is_compiled=True), wanted)
    assert torch.equal(sample_codes(model, PROMPTS, **settings, is_compiled=True)[1:], wanted[1:])
    assert len(made) == 2


@pytest.mark.parametrize(("batch", "wanted"), [(1, []), (7, ["tf32"])])
def test_many_rows_are_compiled_for_onednn_and_run_as_precisely_as_before(batch, wanted, monkeypatch):
    precision, compiled_at = torch.backends.mkldnn.matmul, []
    before = precision.fp32_precision

    def eager(graph, inputs):
        compiled_at.append(precision.fp32_precision)
        return graph.forward

    monkeypatch.setattr(sampling_open_lm, "has_blocks", lambda weight: True)
    monkeypatch.setattr(sampling_open_lm, "product", lambda weight, **_: lambda rows: rows @ weight.T)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: eager)
    real = torch.compile

    def without_inductor(step, *, backend, **rest):
        return real(step, fullgraph=True, backend="eager" if backend == "inductor" else backend)

    monkeypatch.setattr(torch, "compile", without_inductor)
    settings = {"seeds": range(batch), "guidance_scale": 3.0, **SETTINGS}
    sample_codes(tiny(), PROMPTS[:batch], **settings, is_compiled=True)
    assert sorted(set(compiled_at)) == wanted
    assert precision.fp32_precision == before


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 7])
def test_the_compiler_itself_draws_the_same_codes(batch, monkeypatch):
    monkeypatch.setattr(fixed_shape_open_lm, "LEAST_WINDOW", 4)
    model = tiny()
    settings = {"seeds": range(batch), "guidance_scale": 3.0, **SETTINGS}
    wanted = sample_codes(model, PROMPTS[:batch], **settings)
    assert torch.equal(sample_codes(model, PROMPTS[:batch], **settings, is_compiled=True), wanted)


def test_bf16_is_sampled_by_the_plain_product():
    model = tiny().to(torch.bfloat16)
    codes = sample_codes(model, PROMPTS, seeds=range(7), **SETTINGS)
    assert codes.shape == (7, 6)
    assert codes.min() >= 0 and codes.max() < 16


@pytest.mark.parametrize("axis", ["seed", "place", "code"])
def test_waits_are_exponential_and_independent_along(axis):
    keys = image_keys(torch.arange(200 if axis == "seed" else 1), num_codes=200 if axis == "place" else 1)
    codes = torch.arange(40_000 // keys.numel())
    found = waits(keys.flatten(), codes.expand(keys.numel(), -1)).double()
    found = found if axis == "code" else found.T.contiguous()
    sample = found.flatten()
    levels = torch.arange(1, 10, dtype=torch.float64) / 10
    shares = (sample[:, None] < -torch.log1p(-levels)).double().mean(0)
    # Four standard errors of a share (at most 0.0025 each) and of a correlation of neighbours (0.005).
    assert torch.allclose(shares, levels, atol=0.01)
    assert sample.mean().item() == pytest.approx(1, abs=0.02)
    neighbours = torch.corrcoef(torch.stack([sample[1:], sample[:-1]]))[0, 1].item()
    assert neighbours == pytest.approx(0, abs=0.02)


def test_draws_follow_the_kept_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    keys = image_keys(torch.arange(4000), num_codes=1)[:, 0]
    counts = torch.bincount(choose_codes(logits, keys, temperature=1.0, top_k=3, top_p=0.7), minlength=4)
    # top-k keeps three, top-p the first two of them: 5 to 3. Four standard errors of 4,000 draws are 0.03.
    assert counts[2:].sum() == 0
    assert counts[0].item() / 4000 == pytest.approx(5 / 8, abs=0.03)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("rows", ["random", "mean"])
def test_growing_keeps_old_rows_bit_for_bit(rows, is_tied):
    model = tiny(tie_word_embeddings=is_tied)
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    grow_vocabulary(model, vocab_size=100, rows=rows, seed=1)
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert all(torch.equal(new[:64], old) for new, old in zip(after, before, strict=True))
    assert all(new.shape == (100, 32) and new[64:].std() > 0 for new in after)
    assert (after[0] is after[1]) == is_tied
    assert model.config.vocab_size == 100


def test_a_smaller_layout_is_refused():
    with pytest.raises(UserError, match="has 64 embeddings; expected <= 60"):
        grow_vocabulary(tiny(), vocab_size=60, rows="mean", seed=0)


def test_a_saved_model_draws_codes_where_t2i_is_not_installed(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "saved")
    wanted = sample_codes(model, PROMPTS, seeds=range(7), **SETTINGS).tolist()
    script = f"""
import sys
class NoT2I:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 't2i':
            raise ImportError('t2i is not installed here')
sys.meta_path.insert(0, NoT2I())
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained('saved', trust_remote_code=True).eval()
sampling = sys.modules[type(model).draw.__module__]
print(sampling.sample_codes(model, {PROMPTS}, seeds=range(7), **{SETTINGS}).tolist())
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = processes.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(wanted)


def test_split_rows_change_nothing_and_merge_bit_for_bit():
    model, ids = tiny(), torch.randint(64, (2, 5))
    grow_vocabulary(model, vocab_size=100, rows="mean", seed=0)
    logits, state = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    split_rows(model, num_old=64)
    assert torch.equal(model(ids).logits, logits)
    assert model.get_input_embeddings().new.shape == (36, 32)
    merged = merged_state_dict(model)
    assert set(merged) == set(state)
    assert all(torch.equal(merged[name], state[name]) for name in state)


def test_a_tied_models_split_rows_are_shared_and_merge_into_one():
    model, ids = tiny(tie_word_embeddings=True), torch.randint(64, (2, 5))
    grow_vocabulary(model, vocab_size=100, rows="random", seed=0)
    logits = model(ids).logits
    split_rows(model, num_old=64)
    assert model.get_input_embeddings().new is model.get_output_embeddings().new
    assert torch.equal(model(ids).logits, logits)
    merged = merged_state_dict(model)
    assert merged["output.weight"] is merged["model.tok_embeddings.weight"]
