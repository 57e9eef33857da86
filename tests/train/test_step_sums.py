"""What a step's losses add up to over micro-batches and ranks, against one sum over all tokens by hand."""

import math
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from launched import run_ranks

from t2i.model.loss import NUM_SUMS, LossSums
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.vocab import VocabLayout
from t2i.train.engine import Learner
from t2i.train.step_sums import loss_row, read_step, tokens_of_all

LAYOUT = VocabLayout(num_text_rows=40, num_text_tokens=40, codebook_size=32)


def learner_and_step():
    """A model and two micro-batches, of 5 and of 40 tokens, so that a mean of means is another number."""
    torch.manual_seed(0)
    model = OpenLMForCausalLM(OpenLMConfig(LAYOUT.vocab_size, 32, 2, 2))
    ids = torch.randint(LAYOUT.vocab_size, (2, 48))
    labels = torch.randint(LAYOUT.first_image_id + 32, (2, 48))
    labels[0, 5:] = labels[1, 40:] = -100
    with torch.no_grad():
        model.get_output_embeddings().weight[:, 0] *= 20  # partitions that differ from token to token
    return Learner(model, layout=LAYOUT, z_loss=0.01), ids, labels


def by_hand(learner, ids, labels):
    """Compute mean loss and mean squared log-partition with one softmax per token."""
    losses, squares = [], []
    with torch.no_grad():
        logits = learner.model(ids).logits.double()
    for row, place in (labels != -100).nonzero().tolist():
        partition = math.log(sum(math.exp(value) for value in logits[row, place].tolist()))
        squares.append(partition**2)
        losses.append(partition - logits[row, place, labels[row, place]].item())
    assert len(losses) == 45
    return sum(losses) / 45, sum(squares) / 45


def sums_of(learner, ids, labels):
    return [learner(ids[row : row + 1], labels[row : row + 1])[1] for row in range(2)]


def check(row, *, loss, z_loss):
    # Sums of 45 fp32 losses, in another order.
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["z_loss"] == pytest.approx(z_loss, rel=1e-5)


def test_z_loss_is_the_mean_squared_log_partition_over_unequal_micro_batches(one_process):
    learner, ids, labels = learner_and_step()
    sums = sums_of(learner, ids, labels)
    read = read_step(reduce(add, sums), positions=96, should_stop=False, should_save=True)
    loss, z_loss = by_hand(learner, ids, labels)
    row = loss_row(read.sums)
    check(row, loss=loss, z_loss=z_loss)
    assert (read.tokens, read.positions) == (45, 96)
    assert (read.is_finite, read.should_stop, read.should_save) == (True, False, True)
    of_means = sum(loss_row(part)["z_loss"] for part in sums) / 2
    assert of_means != pytest.approx(z_loss, rel=1e-2)  # what the test would not tell apart otherwise


PROGRAM = f"""
import runpy, sys
sys.path.append({str(Path(__file__).parents[1])!r})
runpy.run_path(sys.argv[1])["one_of_two"](sys.argv[2])
"""


def one_of_two(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    learner, ids, labels = learner_and_step()
    mine = labels[rank : rank + 1]
    tokens = tokens_of_all(mine, device=torch.device("cpu"))
    read = read_step(
        sums_of(learner, ids, labels)[rank], positions=48, should_stop=rank == 1, should_save=False
    )
    torch.save((float(tokens), read), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_two_ranks_read_the_same_sums_and_whatever_one_was_asked(tmp_path):
    for code, said in run_ranks(["-c", PROGRAM, __file__, tmp_path]):
        assert code == 0, said[-3000:]
    loss, z_loss = by_hand(*learner_and_step())
    for rank in range(2):
        tokens, read = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        check(loss_row(read.sums), loss=loss, z_loss=z_loss)
        assert tokens == read.tokens == 45
        assert read.positions == 96
        assert (read.is_finite, read.should_stop, read.should_save) == (True, True, False)


@pytest.mark.parametrize("place", range(NUM_SUMS))
def test_one_number_that_is_not_finite_forbids_the_update(one_process, place):
    values = torch.ones(NUM_SUMS)
    values[place] = torch.inf
    read = read_step(LossSums.unpack(values), positions=1, should_stop=False, should_save=False)
    assert not read.is_finite


def test_what_is_packed_is_what_is_unpacked():
    sums = LossSums(*map(torch.tensor, (0.5, 1.5, 2.5, 3, 4, 5, 6.5)))
    again = LossSums.unpack(sums.pack())
    assert vars(again) == vars(sums)
    assert again.pack().dtype == torch.float64
    doubled = vars(sums.scaled(2)).values()
    assert [float(value) for value in doubled] == [1, 3, 5, 3, 4, 5, 6.5]


def test_a_class_without_tokens_has_no_loss():
    row = loss_row(LossSums(*map(torch.tensor, (6.0, 0.0, 2.0, 3, 0, 1, 8.0))))
    assert row == {
        "loss": 2.0,
        "text_loss": 2.0,
        "text_tokens": 3,
        "image_loss": None,
        "image_tokens": 0,
        "special_loss": 2.0,
        "special_tokens": 1,
        "z_loss": 2.0,
    }
