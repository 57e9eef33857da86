"""Ways against forgetting: text mixed in, adapters, a pull towards the start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from built_models import built
from launched import run_ranks
from made_shards import make_text_shards
from safetensors.torch import load_file

from t2i.config import ASSETS
from t2i.data.loader import StepLoader
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import read_split
from t2i.distributed.signals import StopFlag
from t2i.errors import Stopped, UserError
from t2i.model.resize import merged_state_dict
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train import engine
from t2i.train.main import train
from t2i.train.start import kept_start

ROOT = Path(__file__).parents[2]
DS_CONFIG = ROOT / "ds_configs" / "zero2_fp32.json"


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


@pytest.fixture(scope="module")
def text(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return make_text_shards(
        (f"Paragraph {n} of a text says that {n} follows {n - 1}." for n in range(300)),
        file=folder / "all.txt",
        out=folder / "shards",
        text_tokenizer=tokenizer,
        seq_len=90,
        heldout_share=0.2,
    )


def checkpoint(run_dir, step):
    return load_file(run_dir / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def untrained(config, tokenizer):
    model, layout = built(config, tokenizer)
    return merged_state_dict(model), layout


def mixed(config, text, run_dir, **train_settings):
    data = replace(config.data, replay_ratio=0.25, replay_shards=text)
    return replace(
        config, run_dir=run_dir, data=data, train=replace(config.train, eval_every=0, **train_settings)
    )


def test_a_step_holds_the_share_of_text_and_the_order_does_not_depend_on_where_it_stopped(
    finished, text, tokenizer
):
    rows = tokenizer.num_tokens
    layout = VocabLayout(rows, rows, read_manifest(finished.data.shards).codebook_size)
    data = replace(finished.data, replay_ratio=0.25, replay_shards=text)
    settings = {"layout": layout, "global_batch": 8, "world_size": 1, "seed": 0, "tokenizer": tokenizer}
    packed = {tuple(sample["caption_ids"].tolist()) for sample in read_split(text, "train")}
    loader = StepLoader(data, **settings)
    steps, positions = [], []
    for _, batch in zip(range(24), loader, strict=False):  # past the end of both sets
        ids = batch["input_ids"]
        assert ids.shape == (8, 90)
        assert len(batch["key"]) == 8
        assert all(tuple(row.tolist()) in packed for row in ids[6:])
        assert not any(tuple(row.tolist()) in packed for row in ids[:6])
        steps.append(ids)
        positions.append(loader.state_dict())
    again = StepLoader(data, **settings)
    again.load_state_dict(positions[9])
    for wanted, batch in zip(steps[10:14], again, strict=False):
        assert torch.equal(batch["input_ids"], wanted)


def test_mixed_text_is_counted_as_text_and_a_stopped_run_goes_on_bit_for_bit(finished, text, tmp_path):
    config = mixed(finished, text, tmp_path / "whole", max_steps=3)
    train(config, ds_config_path=DS_CONFIG)
    steps = [row for row in read_metrics(config.run_dir) if "split" not in row]
    assert all(row["image_tokens"] == 6 * 64 for row in steps)
    assert all(row["special_tokens"] == 6 * 5 for row in steps)
    assert all(row["text_tokens"] > 2 * 89 for row in steps)  # a sequence's first token is no target
    halves = replace(config, run_dir=tmp_path / "halves")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StopFlag, "is_set", lambda self: True)
        with pytest.raises(Stopped, match="Stopped at step 1 of 3"):
            train(halves, ds_config_path=DS_CONFIG)
    train(halves, ds_config_path=DS_CONFIG)
    whole, resumed = (checkpoint(run, 3) for run in (config.run_dir, halves.run_dir))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"replay_ratio": 0.25, "replay_shards": None}, "data.replay_shards None; one needs the other"),
        ({"replay_ratio": 1.0}, "data.replay_ratio is 1.0; expected a number >= 0 and < 1"),
        ({"replay_ratio": 0.01}, "0 of a step's 8 sequences"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(finished, text, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        data = replace(finished.data, **{"replay_shards": text, **changes})
        train(replace(finished, run_dir=tmp_path / "run", data=data), ds_config_path=DS_CONFIG)


def test_text_of_another_length_is_refused_before_a_model_is_made(finished, text, tmp_path):
    config = mixed(finished, text, tmp_path / "run")
    with pytest.raises(UserError, match="data.seq_len is 96; the sequences of .* have 90 tokens"):
        train(replace(config, data=replace(config.data, seq_len=96)), ds_config_path=DS_CONFIG)


@pytest.fixture(scope="module")
def start(finished, tmp_path_factory, tokenizer):
    """A language model's folder, as a run of text alone leaves it."""
    from t2i.train.start import starting_model

    folder = tmp_path_factory.mktemp("language-model")
    found = starting_model(
        finished.model,
        seq_len=finished.data.seq_len,
        seed=finished.train.seed,
        manifest=read_manifest(finished.data.shards),
        text_tokenizer=tokenizer,
    )
    found.model.save_pretrained(folder)
    tokenizer.tokenizer.save_pretrained(folder)
    return folder


def test_adapters_learn_alone_and_are_merged_into_plain_weights(finished, start, tokenizer, tmp_path):
    model = replace(finished.model, init=str(start), lora_rank=2)
    settings = replace(finished.train, max_steps=2, save_every=1, lr=1e-2, eval_every=2)
    config = replace(finished, run_dir=tmp_path / "run", model=model, train=settings)
    before, layout = untrained(config, tokenizer)
    train(config, ds_config_path=DS_CONFIG)
    after = checkpoint(config.run_dir, 2)
    assert set(after) == set(before)
    for name, value in after.items():
        if value.shape[0] == layout.vocab_size:
            assert torch.equal(value[: layout.num_text_rows], before[name][: layout.num_text_rows])
            assert not torch.equal(value, before[name])
        elif value.dim() == 1:
            assert torch.equal(value, before[name])
        else:
            change = torch.linalg.svdvals(value - before[name])
            assert change[0] > 1e-4
            assert change[2] < 1e-5 * change[0] + 1e-6  # rank 2, to rounding of weights of the order of 0.1
    manifest = json.loads((config.run_dir / "checkpoints/step_000002/manifest.json").read_text())
    width, inner = 32, after["model.layers.0.feed_forward.w3.weight"].shape[1]
    in_layer = 2 * (width + 3 * width + 2 * width + width + 2 * inner + inner + width)
    new_rows = 2 * (layout.vocab_size - layout.num_text_rows) * width
    assert manifest["parameters"]["learned"] == 2 * in_layer + new_rows
    # The merged model measures what the run measured with adapters beside the weights.
    from t2i.measure.heldout import heldout_rows

    opened = open_model(str(config.run_dir), needs_images=True)
    row = heldout_rows(opened.model, config=config.data, layout=layout, tokenizer=tokenizer, num_pictures=4)[
        0
    ]
    seen = [row for row in read_metrics(config.run_dir) if row.get("split") == "heldout"][-1]
    assert row["image_loss"] == pytest.approx(seen["image_loss"], abs=1e-5)


def test_a_run_of_adapters_goes_on_bit_for_bit(finished, start, tmp_path):
    model = replace(finished.model, init=str(start), lora_rank=2)
    settings = replace(finished.train, max_steps=3, eval_every=0, lr=1e-2)
    whole = replace(finished, run_dir=tmp_path / "whole", model=model, train=settings)
    train(whole, ds_config_path=DS_CONFIG)
    halves = replace(whole, run_dir=tmp_path / "halves")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StopFlag, "is_set", lambda self: True)
        with pytest.raises(Stopped):
            train(halves, ds_config_path=DS_CONFIG)
    train(halves, ds_config_path=DS_CONFIG)
    ends = [checkpoint(run.run_dir, 3) for run in (whole, halves)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_adapters_and_another_choice_of_trainable_parameters_contradict(finished):
    with pytest.raises(UserError, match=r"model\.trainable is norms; expected all with model\.lora_rank 2"):
        replace(finished.model, lora_rank=2, trainable="norms")


def test_the_pull_equals_its_formula_beside_adam():
    torch.manual_seed(0)
    old, new = torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(4))
    twins = [value.detach().clone().requires_grad_() for value in (old, new)]
    settings = {"lr": 0.1, "weight_decay": 0.0}
    groups = [{"params": [old], "is_new": False}, {"params": [new], "is_new": True}]
    pulled, plain = torch.optim.AdamW(groups, **settings), torch.optim.AdamW(twins, **settings)
    engine.pull_to_start(pulled, share=0.5)
    first = old.detach().clone()
    for _ in range(4):
        for value, twin in zip((old, new), twins, strict=True):
            value.grad = torch.randn_like(value)
            twin.grad = value.grad.clone()
        with torch.no_grad():
            twins[0] += 0.1 * 0.5 * (first - twins[0])
        pulled.step()
        plain.step()
    torch.testing.assert_close(old, twins[0])
    assert torch.equal(new, twins[1])
    assert not torch.equal(old, first)


def test_a_pulled_run_stays_nearer_to_its_start_and_goes_on_bit_for_bit(finished, start, tokenizer, tmp_path):
    def run(name, share):
        settings = replace(finished.train, max_steps=4, lr=1e-2, weight_decay=0.0, eval_every=0, l2_sp=share)
        model = replace(finished.model, init=str(start))
        return replace(finished, run_dir=tmp_path / name, model=model, train=settings)

    free, held = run("free", 0.0), run("held", 50.0)
    for config in (free, held):
        train(config, ds_config_path=DS_CONFIG)
    before, layout = untrained(held, tokenizer)
    ends = [checkpoint(config.run_dir, 4) for config in (free, held)]
    name = "model.layers.0.attention.in_proj.weight"
    moved = [(end[name] - before[name]).norm() for end in ends]
    assert moved[1] < 0.7 * moved[0]
    rows = [
        end["output.weight"][layout.num_text_rows :] - before["output.weight"][layout.num_text_rows :]
        for end in ends
    ]
    assert rows[1].norm() > 0.9 * rows[0].norm()  # new rows are free
    halves = replace(held, run_dir=tmp_path / "halves")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StopFlag, "is_set", lambda self: True)
        with pytest.raises(Stopped):
            train(halves, ds_config_path=DS_CONFIG)
    train(halves, ds_config_path=DS_CONFIG)
    resumed = checkpoint(halves.run_dir, 4)
    assert all(torch.equal(ends[1][key], resumed[key]) for key in resumed)


READER = """
import json, sys
from pathlib import Path
from t2i.distributed.launch import start_processes
start_processes()
import torch.distributed as dist
from t2i.config import DataConfig
from t2i.data.loader import StepLoader
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
shards, text, tokenizer, codes, out = sys.argv[1:]
tokenizer = TextTokenizer.load(tokenizer)
layout = VocabLayout(tokenizer.num_tokens, tokenizer.num_tokens, int(codes))
data = DataConfig(shards=Path(shards), seq_len=90, replay_ratio=0.25, replay_shards=Path(text))
loader = StepLoader(
    data, layout=layout, global_batch=8, world_size=dist.get_world_size(), seed=0, tokenizer=tokenizer
)
keys = [batch["key"] for _, batch in zip(range(30), loader)]
Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(keys))
"""


def test_two_ranks_read_the_steps_of_one(finished, text, tokenizer, tmp_path):
    codes = read_manifest(finished.data.shards).codebook_size
    out = tmp_path / "keys"
    words = ["-c", READER, finished.data.shards, text, ASSETS / "text_tokenizer", codes]
    found = []
    for world_size in (1, 2):
        for code, said in run_ranks([*words, f"{out}.{world_size}"], count=world_size):
            assert code == 0, said[-3000:]
        ranks = [json.loads(Path(f"{out}.{world_size}.{rank}").read_text()) for rank in range(world_size)]
        found.append([sorted(key for part in parts for key in part) for parts in zip(*ranks, strict=True)])
    assert found[0] == found[1]
    assert all(len(step) == 8 for step in found[0])


def test_a_resumed_run_is_pulled_to_the_weights_that_it_began_from(tmp_path):
    """model.init named a run that trained on: its newest checkpoint is another one by now."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_text(folder.name)
    first, second = map(str, folders)
    run = {"run_dir": tmp_path}
    assert kept_start(first, **run, is_resumed=False) == first
    assert kept_start(second, **run, is_resumed=True) == first
    folders[0].rename(tmp_path / "moved")
    assert kept_start(str(tmp_path / "moved"), **run, is_resumed=True) == str(tmp_path / "moved")
    with pytest.raises(UserError, match="began from, .*first, and these are gone"):
        kept_start(second, **run, is_resumed=True)
    assert kept_start("random", **run, is_resumed=True) == "random"
