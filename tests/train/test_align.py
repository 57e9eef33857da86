import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
import torch.nn.functional as F
from built_models import built
from safetensors.torch import load_file

from t2i.config import ASSETS, AlignConfig, AlignRun, DataConfig
from t2i.data.shards.manifest import read_manifest
from t2i.distributed.launch import start_processes
from t2i.errors import Stopped, UserError
from t2i.model.contrastive_loss import contrastive_loss
from t2i.model.resize import INPUT_ROWS, OUTPUT_ROWS, grow_vocabulary
from t2i.runs.metrics_log import read_metrics
from t2i.runs.run_folder import read_status
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.align import align, heldout_pairs
from t2i.train.contrastive import AlignedRows, retrieval_accuracy, retrieval_hits

ROOT = Path(__file__).parents[2]
LAYOUT = VocabLayout(num_text_rows=20, num_text_tokens=18, codebook_size=9)


def test_the_loss_equals_a_slow_twin():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(6, 4, generator=generator), dim=-1) for _ in range(2))
    scale = 5.0
    total = 0.0
    for i in range(6):
        for rows, other in ((image, text), (text, image)):
            scores = [math.exp(scale * float(rows[i] @ other[j])) for j in range(6)]
            total -= math.log(scores[i] / sum(scores))
    loss = contrastive_loss(image, text, log_scale=torch.tensor(math.log(scale)))
    assert loss.item() == pytest.approx(total / 12, abs=1e-5)  # fp32 sums against Python's doubles


def test_bags_are_means_of_the_right_rows():
    side = AlignedRows(torch.randn(20, 4), layout=LAYOUT, temperature=0.1, seed=0)
    first, doc, text_mark, pad = LAYOUT.first_image_id, 20, 22, LAYOUT.pad_id
    ids = torch.tensor(
        [[doc, text_mark, 3, 5, 5, first + 2, first + 8, pad], [doc, first, pad, pad, pad, pad, pad, pad]]
    )
    image, text = side.bags(ids)
    rows = side.get_buffer("text_rows")
    assert torch.allclose(text[0], F.normalize((rows[3] + 2 * rows[5]) / 3, dim=0), atol=1e-6)
    assert torch.allclose(
        image[0], F.normalize((side.image_rows[2] + side.image_rows[8]) / 2, dim=0), atol=1e-6
    )
    assert torch.equal(text[1], torch.zeros(4))
    assert side.scaled().norm(dim=-1).mean().item() == pytest.approx(
        rows.norm(dim=-1).mean().item(), rel=1e-5
    )


def test_retrieval_counts_ties_by_share():
    features, styles = torch.eye(4), torch.zeros(4)

    def measured(image, text):
        return retrieval_accuracy(retrieval_hits(image, text, styles=styles), styles=styles)

    assert measured(features, features) == {"image_to_text": 1, "text_to_image": 1, "chance": 0.25}
    assert measured(torch.ones(4, 4), features)["text_to_image"] == 0.25
    assert measured(features.roll(1, 0), features)["image_to_text"] == 0
    # Features that know the style and nothing else find no more than chance among the images of one style.
    styles = torch.tensor([0.0, 0.0, 1.0, 1.0])
    known = F.one_hot(styles.long()).float()
    assert measured(known, known) == {"image_to_text": 0.5, "text_to_image": 0.5, "chance": 0.5}
    assert measured(features, features)["image_to_text"] == 1


TWO_RANKS = """
import os, sys
import torch, torch.distributed as dist, torch.multiprocessing as processes
from t2i.tokens.vocab import VocabLayout
from t2i.train.contrastive import AlignedRows, loss_and_gradient

torch.set_num_threads(1)
layout = VocabLayout(num_text_rows=20, num_text_tokens=18, codebook_size=9)
generator = torch.Generator().manual_seed(1)
ids = torch.cat([torch.randint(18, (6, 3), generator=generator), 27 + torch.randint(9, (6, 5), generator=generator)], 1)
text_rows = torch.randn(20, 4, generator=generator)

def rank(index, world_size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=index, world_size=world_size)
    side = AlignedRows(text_rows, layout=layout, temperature=0.1, seed=0)
    loss = loss_and_gradient(side, ids.chunk(world_size)[index])
    torch.save([torch.tensor(loss), side.image_rows.grad, side.log_scale.grad], f"{folder}/{world_size}-{index}.pt")

if __name__ == "__main__":
    for world_size, port in ((1, sys.argv[2]), (2, sys.argv[3])):
        arguments = (world_size, port, sys.argv[1])
        processes.start_processes(rank, arguments, nprocs=world_size, start_method="fork")
"""


def test_two_ranks_have_the_gradient_of_one(tmp_path):
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    done = processes.run(
        [
            sys.executable,
            str(tmp_path / "ranks.py"),
            str(tmp_path),
            *(str(processes.free_port()) for _ in "12"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    for whole, *halves in zip(one, first, second, strict=True):
        assert whole.abs().max() > 0
        for half in halves:
            assert torch.allclose(half, whole, atol=1e-6)  # sums of another order in fp32


@pytest.fixture(scope="module")
def language_model(finished, tmp_path_factory):
    from t2i.train.start import starting_model

    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    start = starting_model(
        finished.model,
        seq_len=finished.data.seq_len,
        seed=finished.train.seed,
        manifest=read_manifest(finished.data.shards),
        text_tokenizer=tokenizer,
    )
    folder = tmp_path_factory.mktemp("language_model")
    start.model.save_pretrained(folder)
    tokenizer.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(language_model, finished, tmp_path_factory):
    start_processes()
    settings = AlignConfig(num_pairs=32, max_steps=40, save_every=20, lr=0.03)
    data = DataConfig(shards=finished.data.shards, seq_len=90)
    run = AlignRun(
        tmp_path_factory.mktemp("align") / "run", data=data, model=str(language_model), align=settings
    )
    align(run)
    return run


def test_alignment_learns_and_says_how_it_went(run):
    rows = read_metrics(run.run_dir)
    for name in (INPUT_ROWS, OUTPUT_ROWS):
        steps = [row for row in rows if row["rows"] == name and "split" not in row]
        assert [row["step"] for row in steps] == list(range(1, 41))
        # Pictures here are noise, so what is learned is learned by heart; an untrained start is at log 32 or worse.
        assert steps[-1]["loss"] < 0.7 * math.log(32) < steps[0]["loss"]
        assert steps[-1]["temperature"] != steps[0]["temperature"]
    summary = json.loads((run.run_dir / "align.json").read_text())
    assert summary[INPUT_ROWS]["chance"] == 1 / summary[INPUT_ROWS]["num_pairs"]
    hits = json.loads((run.run_dir / "hits.json").read_text())
    assert len(set(hits["keys"])) == summary[INPUT_ROWS]["num_pairs"]
    for name, ways in hits["spaces"].items():
        for way, found in ways.items():
            assert summary[name][way] == pytest.approx(sum(found) / len(hits["keys"]))


def test_held_out_pairs_are_spread_over_the_split(run):
    every = [pair["key"] for pair in heldout_pairs(run.data, num_pairs=1_000)]
    assert len(every) >= 4
    chosen = [every.index(pair["key"]) for pair in heldout_pairs(run.data, num_pairs=len(every) - 1)]
    assert chosen == sorted(set(chosen))
    half = [pair["key"] for pair in heldout_pairs(run.data, num_pairs=len(every) // 2)]
    assert half == every[:: len(every) // (len(every) // 2)][: len(half)]
    assert max(map(every.index, half)) >= len(every) // 2


def test_its_rows_file_grows_the_model(run, language_model, finished):
    config = replace(
        finished,
        model=replace(
            finished.model, init=str(language_model), new_embeddings=str(run.run_dir / "rows.safetensors")
        ),
    )
    tokenizer = TextTokenizer.load(language_model)
    model, layout = built(config, tokenizer)
    given = load_file(run.run_dir / "rows.safetensors")
    assert torch.equal(model.get_input_embeddings().weight[layout.num_text_rows :], given[INPUT_ROWS])
    assert torch.equal(model.get_output_embeddings().weight[layout.num_text_rows :], given[OUTPUT_ROWS])
    with pytest.raises(UserError, match="model.new_embeddings: input_rows in"):
        grow_vocabulary(model, vocab_size=layout.vocab_size + 8, rows=config.model.new_embeddings, seed=0)


def test_a_killed_alignment_goes_on_and_ends_the_same(run, tmp_path):
    from t2i.train import align as module

    again = replace(run, run_dir=tmp_path / "run")
    save = module._save

    def save_and_die(*arguments, step, **keywords):
        save(*arguments, step=step, **keywords)
        if step == 20:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            align(again)
    align(again)
    files = [load_file(one.run_dir / "rows.safetensors") for one in (run, again)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_signal_saves_after_the_step_and_the_same_command_resumes(run, tmp_path):
    from t2i.train import align as module

    again, step, steps = replace(run, run_dir=tmp_path / "run"), module._step, []

    def told_at_seven(*arguments, **keywords):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_step", told_at_seven)
        with pytest.raises(Stopped, match="Stopped at step 7 of 40"):
            align(again)
    status = read_status(again.run_dir)
    assert (len(steps), status.state, status.step, status.code) == (7, "stopped", 7, 75)
    align(again)
    assert read_status(again.run_dir).state == "done"
    files = [load_file(one.run_dir / "rows.safetensors") for one in (run, again)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert read_metrics(again.run_dir) == read_metrics(run.run_dir)


def test_more_pairs_than_the_data_has_are_refused(run):
    with pytest.raises(UserError, match="align.num_pairs is 1024; expected <= .* training pairs"):
        align(replace(run, align=AlignConfig()))


def test_a_model_that_knows_the_codes_is_refused(run, finished, tmp_path):
    with pytest.raises(UserError, match="was trained on the codes of"):
        align(replace(run, run_dir=tmp_path / "run", model=str(finished.run_dir)))
    assert read_status(tmp_path / "run").state == "failed"
