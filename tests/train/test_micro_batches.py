"""How a step is cut into micro-batches, against the whole width in one."""

from functools import reduce
from operator import add

import torch

from t2i.data.batching import micro_batches
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.sequence import encode_sequence, next_token_labels
from t2i.tokens.vocab import VocabLayout
from t2i.train.engine import Learner

LAYOUT = VocabLayout(num_text_rows=40, num_text_tokens=40, codebook_size=32)


def step_of(lengths, *, seq_len=64, num_codes=16):
    ids = torch.stack(
        [
            encode_sequence(
                torch.randint(40, (length,)),
                torch.randint(32, (num_codes,)),
                layout=LAYOUT,
                mode="text-to-image",
                seq_len=seq_len,
            )
            for length in lengths
        ]
    )
    return ids, next_token_labels(ids, layout=LAYOUT)


def test_micro_batches_sum_to_the_whole_step_and_keep_every_label_once():
    torch.manual_seed(0)
    ids, labels = step_of([3, 30, 7, 0, 42, 11, 12, 5, 19, 28])
    learner = Learner(OpenLMForCausalLM(OpenLMConfig(LAYOUT.vocab_size, 32, 2, 2)), layout=LAYOUT)
    total, sums = learner(ids, labels)
    parts = micro_batches(ids, labels, size=4)
    found = [learner(*part) for part in parts]
    # fp32 sums of about 400 losses in another order.
    assert torch.allclose(sum(loss for loss, _ in found), total, rtol=1e-6)
    assert torch.allclose(reduce(add, [rows for _, rows in found]).pack(), sums.pack(), rtol=1e-5)
    kept = sorted(row[row != -100].tolist() for _, wanted in parts for row in wanted)
    assert kept == sorted(row[row != -100].tolist() for row in labels)


def test_positions_come_in_eights_and_no_more_columns_than_that_takes():
    ids, labels = step_of(range(1, 33))
    for size in (1, 2, 3, 7, 8, 16):
        for part, wanted in micro_batches(ids, labels, size=size):
            longest = int((wanted != -100).sum(-1).max())
            assert part.numel() % 8 == 0
            assert longest <= part.shape[1] < longest + 8
            if len(part) % 8 == 0:
                assert part.shape[1] == longest
