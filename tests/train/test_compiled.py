"""Compiled layers: the same losses as plain ones, one compilation per shape, none between steps."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, config_of

from t2i.data.batching import COMPILED_POSITIONS, micro_batches
from t2i.errors import UserError
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.modeling_routed import RoutedForCausalLM
from t2i.tokens.sequence import encode_sequence, next_token_labels
from t2i.tokens.vocab import VocabLayout
from t2i.train import inputs
from t2i.train.compiled import compile_layers, eagerly
from t2i.train.engine import Learner
from t2i.train.main import train

LAYOUT = VocabLayout(num_text_rows=40, num_text_tokens=40, codebook_size=32)
SEQ_LEN, CODES = 144, 64


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def learner_of(**settings):
    torch.manual_seed(0)
    config = OpenLMConfig(LAYOUT.vocab_size, 32, 2, 2, **settings)
    return Learner(OpenLMForCausalLM(config).train(), layout=LAYOUT)


def step_of(lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    ids = [
        encode_sequence(
            torch.randint(40, (length,), generator=generator),
            torch.randint(32, (CODES,), generator=generator),
            layout=LAYOUT,
            mode="text-to-image",
            seq_len=SEQ_LEN,
        )
        for length in lengths
    ]
    ids = torch.stack(ids)
    return micro_batches(ids, next_token_labels(ids, layout=LAYOUT), size=2, multiple=COMPILED_POSITIONS)


def gradients(learner, parts):
    learner.zero_grad()
    losses = [learner(*part)[0] for part in parts]
    torch.stack(losses).sum().backward()
    return torch.stack(losses).detach(), [value.grad.clone() for value in learner.parameters()]


class Backend:
    """Compiles nothing, and counts the functions that it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def test_lengths_come_in_few_sizes_and_no_label_is_lost():
    parts = step_of([0, 3, 20, 21, 40, 41, 60, 74])
    assert [ids.shape[1] for ids, _ in parts] == [96, 96, 128, 144]  # a multiple, or the whole sequence
    assert sum(int((labels >= 0).sum()) for _, labels in parts) == sum(
        length + CODES + 5 for length in (0, 3, 20, 21, 40, 41, 60, 74)
    )


def test_losses_and_gradients_are_those_of_plain_layers():
    plain, compiled = learner_of(qk_norm=True), learner_of(qk_norm=True)
    compile_layers(compiled.model, seq_len=SEQ_LEN, backend="aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for lengths in ([5, 30], [8, 9, 10]):
        parts = step_of(lengths)
        losses, wanted = gradients(compiled, parts), gradients(plain, parts)
        # The same operators in the same order: nothing is fused by this backend.
        torch.testing.assert_close(losses[0], wanted[0], rtol=1e-6, atol=0)
        for one, other in zip(losses[1], wanted[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_each_shape_is_compiled_once_for_all_layers_and_nothing_after_that():
    learner, backend = learner_of(), Backend()
    compile_layers(learner.model, seq_len=SEQ_LEN, backend=backend)
    parts = step_of([0, 20, 30, 50, 60, 74, 1])
    for part in parts:
        learner(*part)
    shapes = {tuple(ids.shape) for ids, _ in parts}
    assert len(shapes) >= 3
    assert backend.count == len(shapes)
    with torch.compiler.set_stance("fail_on_recompile"):
        for part in step_of([9, 14, 37, 45, 61, 70, 2]):
            assert tuple(part[0].shape) in shapes
            learner(*part)


def test_more_shapes_than_torch_allows_by_itself_are_still_compiled():
    learner, backend = learner_of(), Backend()
    compile_layers(learner.model, seq_len=24 * COMPILED_POSITIONS, backend=backend)
    for count in range(1, 11):
        ids = torch.randint(40, (1, count * COMPILED_POSITIONS))
        learner(ids, ids)
    assert backend.count == 10


def test_what_is_measured_between_steps_is_not_compiled():
    learner, backend = learner_of(), Backend()
    compile_layers(learner.model, seq_len=SEQ_LEN, backend=backend)
    ids = torch.randint(40, (3, 17))
    with eagerly(), torch.no_grad():
        learner.eval()(ids, ids)
    assert backend.count == 0
    learner.train()(ids, ids)
    assert backend.count == 1


def test_layers_that_sort_positions_by_kind_are_refused():
    routed = RoutedForCausalLM.__new__(RoutedForCausalLM)
    with pytest.raises(UserError, match=r"train\.compile is on with model\.image_weights"):
        compile_layers(routed, seq_len=SEQ_LEN)


def test_a_missing_compiler_is_said_before_anything_is_made(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"train\.compile needs a C\+\+ compiler"):
        inputs.check_before_start(config_of(shards, tmp_path / "run", compile=True), world_size=1)


@pytest.mark.slow
def test_a_run_with_compiled_layers_has_the_metrics_of_a_plain_one(finished, tmp_path):
    config = replace(finished, run_dir=tmp_path / "run", train=replace(finished.train, compile=True))
    train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    rows, wanted = (
        [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
        for run in (config, finished)
    )
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        for key in ("loss", "image_loss", "grad_norm", "image_loss_wrong_caption"):
            # Fused kernels round in another order.
            assert row.get(key) == pytest.approx(other.get(key), rel=1e-4), (row["step"], key)
