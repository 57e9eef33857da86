"""Muon's update against singular values, against torch's own, and over every cut of matrices between ranks."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from built_models import LAYOUT, adamw, learner, step_both
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from t2i.config import ModelConfig, RunConfig, TrainConfig
from t2i.errors import UserError
from t2i.model.trainable import layer_matrices, layers_of, set_trainable
from t2i.train import engine as engines
from t2i.train import muon
from t2i.train.deepspeed_internals import Shard, drop_second_moments, group_sizes, moments_of
from t2i.train.ds_config import read_ds_config

CONFIG = TrainConfig(lr=1e-2, grad_clip=0.1)
MUON = replace(CONFIG, optimizer="muon")
ZERO2 = Path("ds_configs/zero2_fp32.json")


@pytest.mark.parametrize("shape", [(12, 12), (7, 30), (30, 7)])
def test_singular_values_are_what_the_polynomial_makes_of_them(shape):
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    a, b, c = muon.COEFFICIENTS
    for matrix, found in zip(matrices, muon.orthogonal(matrices), strict=True):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(muon.ROUNDS):
            values = a * values + b * values**3 + c * values**5
        torch.testing.assert_close(found, left @ values.diag() @ right, rtol=1e-4, atol=1e-5)


def test_nothing_to_learn_from_moves_nothing():
    assert not muon.orthogonal(torch.zeros(2, 4, 6)).any()


@pytest.mark.parametrize(("name", "least"), [("zero2_fp32.json", 0.98), ("zero2_bf16_cpu.json", 0.95)])
def test_steps_are_those_of_torch(name, least, one_process):
    plain = learner()
    chosen = layer_matrices(plain.model)
    rest = [p for p in plain.parameters() if not any(p is other for other in chosen)]
    optimizers = [
        torch.optim.Muon(
            chosen,
            lr=CONFIG.lr,
            weight_decay=CONFIG.weight_decay,
            momentum=muon.MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        ),
        adamw(rest, CONFIG),
    ]
    ds_config = read_ds_config(ZERO2.with_name(name))
    engine = engines.make_engine(deepcopy(plain), config=MUON, ds_config=ds_config, per_rank=4)
    start = [value.detach().clone() for value in plain.parameters()]
    for _ in range(3):
        assert step_both(engine, plain, *optimizers, grad_clip=CONFIG.grad_clip) > CONFIG.grad_clip
    assert len(group_sizes(engine)) == 4  # embedding, LM head, Muon's, vectors
    for (label, ours), theirs, first in zip(
        engine.module.named_parameters(), plain.parameters(), start, strict=True
    ):
        # torch's rounds its products to bf16 in any case, so the ways that weights went are compared.
        way, wanted = (ours.float() - first).flatten(), (theirs - first).flatten()
        assert torch.cosine_similarity(way, wanted, dim=0) > least, label
        assert float(way.norm() / wanted.norm()) == pytest.approx(1, abs=1 - least), label


def test_the_second_moment_of_what_muon_updates_takes_no_memory(one_process):
    module = learner()
    engine = engines.make_engine(module, config=MUON, ds_config=read_ds_config(ZERO2), per_rank=4)
    ids = torch.randint(LAYOUT.vocab_size - 8, (4, 40))
    engine.backward(engine(ids, ids.roll(-1, 1))[0])
    engine.step()
    num_muon = sum(value.numel() for value in layer_matrices(module.model))
    num_all = sum(value.numel() for value in module.parameters())
    held = sum(value.numel() for value in moments_of(engine))
    assert held == pytest.approx(2 * num_all - num_muon, abs=64)  # what pads the groups, and counts of steps


def test_a_state_that_was_saved_before_the_first_update_is_begun_after_its_load(one_process):
    module = learner()
    engine = engines.make_engine(module, config=MUON, ds_config=read_ds_config(ZERO2), per_rank=4)
    drop_second_moments(engine)  # as at a load
    before = [value.clone() for value in layer_matrices(module.model)]
    step_both(engine, learner(), grad_clip=CONFIG.grad_clip)
    assert not any(map(torch.equal, before, layer_matrices(module.model)))


class Ranks:
    """Ranks of a job, one after another: the first pass records what each gives to a sum, the second has the sums."""

    def __init__(self, values, params, *, size):
        self.values, self.params, self.size = values, params, size
        self.given, self.sums = [], None

    def shard(self, rank):
        part = self.values[rank * self.size : (rank + 1) * self.size].clone()
        return Shard(part, begin=rank * self.size, params=self.params)

    def updated(self):
        for _ in range(2):
            num_ranks = len(self.values) // self.size
            found = [self.one(rank) for rank in range(num_ranks)]
            self.sums = [sum(buffers) for buffers in zip(*self.given, strict=True)]
        return torch.cat(found)

    def one(self, rank):
        calls = []

        def all_reduce(buffer):
            calls.append(buffer.clone())
            if self.sums is not None:
                buffer.copy_(self.sums[len(calls) - 1])

        shard = self.shard(rank)
        shard.value.grad = shard.value + 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(muon.dist, "all_reduce", all_reduce)
            muon.MuonStep(shard).take({}, group={"lr": 0.1, "weight_decay": 0.5})
        assert shard.value.grad is None
        if self.sums is None:
            self.given.append(calls)
        return shard.value


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6),
    num_ranks=st.integers(1, 5),
    batch=st.sampled_from([1, 20, muon.BATCH]),
)
def test_ranks_that_share_matrices_move_them_as_one_would(shapes, num_ranks, batch):
    torch.manual_seed(0)
    params, place = [], 0
    for shape in shapes:
        params.append((nn.Parameter(torch.empty(shape)), place))
        place += shape[0] * shape[1]
    size = -(-place // num_ranks)
    values = torch.randn(size * num_ranks)
    values[place:] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "BATCH", batch)
        found = Ranks(values, params, size=size).updated()
    for value, begin in params:
        weight = values[begin : begin + value.numel()].view(value.shape)
        momentum = 0.05 * (weight + 1)
        direction = 0.05 * (weight + 1) + 0.95 * momentum
        update = muon.orthogonal(direction[None])[0]
        wanted = weight * (1 - 0.1 * 0.5) - 0.1 * 0.2 * max(value.shape) ** 0.5 * update
        torch.testing.assert_close(
            found[begin : begin + value.numel()].view(value.shape), wanted, rtol=1e-4, atol=1e-5
        )
    assert not found[place:].any()


def test_matrices_are_the_layers_trainable_ones(one_process):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    names = {id(value): name for name, value in model.named_parameters()}
    found = [names[id(value)] for value in layer_matrices(model)]
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found == [f"transformer.h.{layer}.{part}.weight" for layer in (0, 1) for part in parts]
    set_trainable(model, recipe="first-half")
    assert [names[id(value)] for value in layer_matrices(model)] == found[:4]


def test_a_model_without_a_matrix_to_update_is_refused():
    module = learner()
    layers_of(module.model).requires_grad_(False)
    with pytest.raises(UserError, match=r"^train\.optimizer is muon.*expected adamw.*OpenLMForCausalLM"):
        engines.muon_matrices(module, config=MUON)


@pytest.mark.parametrize("changes", [{"lora_rank": 4}, {"trainable": "norms"}, {"trainable": "embeddings"}])
def test_settings_that_do_not_go_with_muon_are_refused_at_once(changes):
    (name,) = changes
    with pytest.raises(UserError, match=rf"train\.optimizer is muon with model\.{name}.*expected adamw"):
        RunConfig(model=ModelConfig(**changes), train=MUON)
