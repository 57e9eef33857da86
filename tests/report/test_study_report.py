"""A whole study on tiny runs, made in this process: its sections read nothing but files."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import config_of
from made_shards import make_text_shards

from t2i.config import ASSETS, AlignConfig, AlignRun, DataConfig, PlanConfig
from t2i.cost.plan import make_plan
from t2i.data.shards.manifest import read_manifest
from t2i.errors import NumericalError, UserError
from t2i.measure import perplexity
from t2i.measure.embeddings import compare_rows, write_nearest
from t2i.measure.forgetting import measure_forgetting
from t2i.measure.gradients import gradient_shares, heldout_sequences, write_gradients
from t2i.measure.perplexity import data_of
from t2i.report.sections import comparisons
from t2i.report.sections.images import PUBLISHED
from t2i.report.sections.registry import SECTIONS, arguments_of, check_sections, make_section
from t2i.report.study import write_study_report
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.study.cost import cost_lines, run_costs, seconds_on
from t2i.study.jobs import jobs_of, read_study, run_config, run_dir
from t2i.study.results import Curve, curve, paired, runs_of
from t2i.study.spec import SectionSpec
from t2i.tokens.text import TextTokenizer
from t2i.train.align import align
from t2i.train.ds_config import read_ds_config
from t2i.train.main import start_processes, train
from t2i.train.start import starting_model

ROOT = Path(__file__).parents[2]

STUDY = """
title: Fast and slow
question: Does a larger step help?
seeds: [0, 1, 2]
settings:
  data: {{shards: "{shards}", seq_len: 90}}
  model: {{hidden_size: 32, num_layers: 2, num_heads: 2}}
  train: {{max_steps: 6, global_batch_tokens: 720, warmup_steps: 1, save_every: 6, eval_every: 2, eval_images: 8,
          eval_text: "{text}"}}
arms:
  fast: {{train: {{lr: 5.0e-3}}}}
  slow: {{train: {{lr: 1.0e-4}}}}
  broken: {{train: {{lr: 1.0e+30}}}}
arm_seeds: {{broken: [1, 2]}}
report:
  - {{section: curves, title: Curves, arms: [fast, slow], values: [loss, image_loss],
     perplexity: true, paper: they meet}}
  - {{section: comparison, title: Compared, arms: [fast, slow], value: image_loss}}
  - {{section: pretraining, folder: "{{out}}/text-run"}}
  - {{section: alignment, folder: "{{out}}/aligned"}}
  - {{section: nearest, files: {{fast: "{{out}}/runs/fast-seed0/nearest.json"}}}}
  - {{section: completions, files: {{fast: "{{out}}/forgetting.json"}}}}
  - {{section: forgetting, arms: [fast, slow]}}
  - {{section: published}}
  - {{section: reconstructions, shards: "{shards}"}}
  - {{section: places, arms: [fast, slow]}}
  - {{section: conditioning, arms: [fast, slow]}}
  - {{section: agreement, arms: [fast, slow], measure: fd_test}}
  - {{section: captions, files: {{fast: "{{out}}/forgetting.json"}}}}
  - {{section: shares, files: {{fast: "{{out}}/runs/fast-seed0/gradients.json"}}}}
  - {{section: probe, folder: "{{out}}/aligned", files: {{fast: "{{out}}/runs/fast-seed0/nearest.json"}}}}
  - {{section: overview, pairs: {{speed: [fast, slow], again: [slow, fast]}}}}
  - {{section: sizes, pairs: [[fast, slow]], names: [fast, slow]}}
  - {{section: budgets, arms: [fast, slow], charged: {{fast: "{{out}}/text-run"}}}}
  - {{section: wordings, arms: [fast, slow]}}
  - {{section: tuning}}
  - {{section: ends, title: Runs, arms: [fast, slow, broken]}}
"""


@pytest.fixture(scope="module")
def made(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    make_text_shards(
        (f"Text {n} says that {n} is a number." for n in range(400)),
        file=out / "text.txt",
        out=out / "text",
        text_tokenizer=tokenizer,
        seq_len=90,
        heldout_share=0.3,
    )
    text_run = config_of(out / "text", out / "text-run", eval_every=3)
    text_run = replace(text_run, data=replace(text_run.data, mode="text-only"))
    train(text_run, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    (out / "study.yaml").write_text(STUDY.format(shards=finished.data.shards, text=out / "text"))
    study = read_study(out / "study.yaml")
    for arm in ("fast", "slow"):
        for seed in study.seeds:
            config = run_config(study, arm=arm, seed=seed, out=out)
            train(config, ds_config_path=ROOT / study.ds_config)
    with pytest.raises(NumericalError):
        train(run_config(study, arm="broken", seed=1, out=out), ds_config_path=ROOT / study.ds_config)
    (out / "jobs").mkdir()
    record = {"state": "failed", "code": 4, "seconds": 60.0, "time": 0}
    (out / "jobs" / "broken-seed1.json").write_text(json.dumps(record))
    model = open_model(str(run_dir(out, "fast", 0)), needs_images=False)
    write_nearest(compare_rows(model, before=None), model=model, path=model.home / "nearest.json")
    for seed in study.seeds:
        for place, arm in enumerate(("fast", "slow")):
            one = open_model(str(run_dir(out, arm, seed)), needs_images=False)
            config = data_of(one, shards=None, mode=None)
            perplexity.write_perplexity(
                perplexity.measure_perplexity(one, config=config),
                model=one,
                config=config,
                path=one.home / "perplexity.json",
            )
            scores = {"fd_test": 10.0 + place, "n": 4, "features": "none"}
            (one.run_dir / "eval" / "step_000006").mkdir(parents=True)
            (one.run_dir / "eval" / "step_000006" / "scores.json").write_text(json.dumps(scores))
    ids = heldout_sequences(model, config=data_of(model, shards=None, mode=None), num_sequences=8)
    write_gradients(gradient_shares(model, ids), model=model, path=model.home / "gradients.json")
    results = measure_forgetting(
        {"model": str(run_dir(out, "fast", 0))},
        texts={"text": str(out / "text"), "captions": str(finished.data.shards)},
        prompts=["One | two\nthree"],
        seq_len=90,
        num_sequences=4,
        max_new_tokens=4,
    )
    (out / "forgetting.json").write_text(json.dumps(results.to_json()))
    start = starting_model(
        finished.model,
        seq_len=finished.data.seq_len,
        seed=finished.train.seed,
        manifest=read_manifest(finished.data.shards),
        text_tokenizer=tokenizer,
    )
    start.model.save_pretrained(out / "language-model")
    tokenizer.tokenizer.save_pretrained(out / "language-model")
    start_processes()
    settings = AlignConfig(num_pairs=32, max_steps=4, save_every=4)
    data = DataConfig(finished.data.shards, seq_len=90)
    align(AlignRun(out / "aligned", data=data, model=str(out / "language-model"), align=settings))
    return study, out


def test_the_report_has_every_section_with_its_figure(made):
    study, out = made
    page = write_study_report(study, jobs_of(study, out=out), out=out, command="make it").read_text()
    assert page.count("<svg") == 15
    assert page.count("<h2>") == len(study.report) + 1
    outside = re.findall(r'(?:src|href)="(http[^"]*)"', page)
    assert outside == []
    text = (out / "report.md").read_text()
    assert "they meet" in text
    assert "| arm | seeds | held-out image_loss |" in text  # there is no held-out total to show
    assert "6 of 8 runs ended well" in text
    trained = json.loads((run_dir(out, "fast", 0) / "environment.json").read_text())["commit"]
    assert not trained or f"trained at commit {trained}" in text
    assert "broken-seed1 (failed, status 4)" in text
    pictures = re.findall(r"\]\((figures/[^)]*\.png)\)", text)
    assert len(pictures) == 15
    assert all((out / picture).stat().st_size > 5_000 for picture in pictures)
    assert "One \\| two ⏎ three" in text


def test_figures_of_sections_that_are_gone_go_and_others_stay(made):
    study, out = made
    moved, own = out / "figures" / "77-curves.svg", out / "figures" / "01-mine.png"
    for file in (moved, own):
        file.write_text("of before")
    write_study_report(study, jobs_of(study, out=out), out=out, command="make it")
    assert (moved.exists(), own.exists()) == (False, True)
    own.unlink()


def test_the_comparison_says_what_the_rows_say(made):
    study, out = made
    section = make_section(study.report[1], study=study, out=out)
    ends = {
        arm: [
            [
                row["image_loss"]
                for row in read_metrics(run_dir(out, arm, seed))
                if row.get("split") == "heldout"
            ][-1]
            for seed in study.seeds
        ]
        for arm in ("fast", "slow")
    }
    difference = np.mean(ends["fast"]) - np.mean(ends["slow"])
    assert f"fast - slow is {difference:+.4f} nats" in section.found
    assert "fast is better" in section.found  # its learning rate is fifty times larger, over six steps
    assert "images are not learned yet" in section.found
    assert len(section.table) == 1 + 3


def section_of(made, kind):
    study, out = made
    arguments = next(one for one in study.report if one.section == kind)
    return make_section(arguments, study=study, out=out)


def test_the_language_model_is_what_its_run_measured(made):
    _, out = made
    rows = [row for row in read_metrics(out / "text-run") if row.get("split") == "heldout"]
    assert [row["step"] for row in rows] == [3, 6]
    section = section_of(made, "pretraining")
    assert f"a perplexity of {math.exp(rows[-1]['text_loss']):.1f}" in section.found
    assert "documents of text:" in section.found


def test_what_a_caption_is_worth_is_the_difference_of_held_out_losses(made):
    _, out = made
    section = section_of(made, "conditioning")
    worth = []
    for seed in (0, 1, 2):
        row = [one for one in read_metrics(run_dir(out, "fast", seed)) if one.get("split") == "heldout"][-1]
        worth.append((row["image_loss_empty_caption"] - row["image_loss"]) * 64)
    assert f"fast: {np.mean(worth):.1f} nats per image" in section.found
    assert section.table[1][4].startswith(f"{np.mean(worth):.4f}")


def test_orders_by_loss_and_by_distance_are_compared(made):
    section = section_of(made, "agreement")
    assert len(section.table) == 1 + 6
    assert "over 6 runs, +1.00 over the means of 2 arms" in section.found  # fast is lower in both


def test_loss_by_place_is_that_of_the_measure(made):
    _, out = made
    section = section_of(made, "places")
    rows = [
        json.loads((run_dir(out, "fast", seed) / "perplexity.json").read_text())["splits"]["heldout"]
        for seed in (0, 1, 2)
    ]
    assert section.table[1][3] == f"{np.mean([row['image']['nats'] for row in rows]):.4f}"
    first_row = np.mean([row["image_loss_by_row"][0] for row in rows])
    assert f"fast: first row {first_row:.3f}" in section.found


def test_captions_and_text_are_set_side_by_side(made):
    section = section_of(made, "captions")
    assert section.table[1][0] == "fast"
    assert len(section.table) == 2


def test_text_is_the_share_that_was_counted(made):
    _, out = made
    one = json.loads((run_dir(out, "fast", 0) / "gradients.json").read_text())
    ratio = one["image"]["tokens"] / one["text"]["tokens"]
    assert f"fast: {ratio:.1f} image tokens per text token" in section_of(made, "shares").found


def test_every_published_number_has_a_source():
    with PUBLISHED.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["family"] for row in rows} == {"auto-regressive", "diffusion"}
    assert all(row["source"].startswith("https://arxiv.org/abs/") and float(row["fid"]) > 0 for row in rows)


def test_curves_pair_seeds_and_steps(made):
    study, out = made
    fast = curve(runs_of(study, arm="fast", out=out), value="image_loss", split="heldout")
    assert fast.steps == [2, 4, 6]
    assert fast.values.shape == (3, 3)
    rows = read_metrics(run_dir(out, "fast", 0))
    assert fast.tokens == [row["tokens"] for row in rows if "split" not in row and row["step"] in (2, 4, 6)]
    text = curve(runs_of(study, arm="fast", out=out), value="leaked", split="text")
    assert (text.steps[0], text.tokens[0]) == (0, 0)
    both = paired(fast, text)
    assert both[0].steps == both[1].steps == [2, 4, 6]
    assert runs_of(study, arm="broken", out=out) == []


def test_unknown_sections_and_arguments_are_refused(made):
    study, out = made
    with pytest.raises(UserError, match="has a section 'curve'; perhaps curves was meant"):
        make_section(SectionSpec("curve"), study=study, out=out)
    with pytest.raises(UserError, match="section Runs: no argument 'arm'; perhaps arms was meant"):
        make_section(SectionSpec("ends", title="Runs", arguments={"arm": "fast"}), study=study, out=out)


def test_a_section_that_cannot_be_made_leaves_the_others(made, caplog):
    study, out = made
    sections = [
        SectionSpec("overview", title="Broken", arguments={"pairs": {"a": ["fast", "slow"]}, "against": "b"}),
        SectionSpec("ends", title="Runs", arguments={"arms": ["fast"]}),
    ]
    page = write_study_report(replace(study, report=sections), [], out=out / "half", command="again")
    text = page.with_name("report.md").read_text()
    said = "This section could not be made: overview: against is b; expected one of a."
    assert said in text and text.index(said) < text.index("## Runs")
    assert "the section Broken could not be made" in caplog.text


def test_prices_are_operations_over_speed_and_what_was_measured(made):
    study, out = made
    model = open_model(str(run_dir(out, "fast", 0)), needs_images=False).model
    counted = sum(value.numel() for value in model.parameters() if value.dim() == 2)
    counted -= model.get_input_embeddings().weight.numel()
    costs = run_costs(study, out=out)
    assert [one.name for one in costs][:3] == ["fast-seed0", "slow-seed0", "fast-seed1"]
    assert costs[0].tokens == 6 * 720
    attention = 12 * 2 * 32 * 90  # layers, width, sequence
    assert costs[0].flops == 6 * 720 * (6 * counted + attention)
    assert costs[0].took_seconds is None
    large = replace(costs[0], executed_flops=1e18)
    seconds = seconds_on([large], gpu="a100-80gb", num_gpus=2, mfu=0.5)
    assert seconds == pytest.approx(60 + 1e18 / 312e12)
    # Whose products take a hundredth of the time that starting their kernels does: 2 layers, 4 sequences a rank.
    seconds = seconds_on(costs[:1], gpu="a100-80gb", num_gpus=2, mfu=0.5)
    assert seconds == pytest.approx(60 + 6 * ((2 * 80 + 100) * 1e-5 + 4 * 5e-4))
    record = {"state": "done", "code": 0, "seconds": 33.0, "command": []}
    (out / "jobs" / "fast-seed0.json").write_text(json.dumps(record))
    again = run_costs(study, out=out)
    (out / "jobs" / "fast-seed0.json").unlink()
    assert again[0].took_seconds == 33.0
    lines = cost_lines(again, machines=[("h100-80gb", 8)], mfu=0.5)
    assert "took 0.6 minutes" in lines[0]
    assert "8 x h100-80gb, bf16" in lines[-1]
    hours = seconds_on(again[1:], gpu="h100-80gb", num_gpus=8, mfu=0.5) / 3600
    priced = cost_lines(again, machines=[("h100-80gb", 8), ("cpu", 1)], mfu=0.5, price=3000.0)
    assert priced[-2] == f"{lines[-1]}; {24_000 * hours:,.2f} dollars"
    assert "dollars" not in priced[-1] + lines[-1]
    assert "this machine's CPU, fp32" in cost_lines(costs, machines=[("cpu", 1)], mfu=0.5)[-1]
    halves = [replace(one, shape=replace(one.shape, is_half=True)) for one in costs]
    assert "this machine's CPU, bf16" in cost_lines(halves, machines=[("cpu", 1)], mfu=0.5)[-1]


def test_a_studys_cost_is_that_of_its_runs_plans_with_gradient_checkpointing_too(made):
    study, out = made
    took, executed = {}, {}
    for is_checkpointed in (False, True):
        model = {**study.settings["model"], "gradient_checkpointing": is_checkpointed}
        changed = replace(study, settings={**study.settings, "model": model})
        costs = run_costs(changed, out=out)[:1]
        config = run_config(changed, arm="fast", seed=0, out=out)
        plan = make_plan(
            config.data,
            model=config.model,
            train=config.train,
            ds_config=read_ds_config(ROOT / "ds_configs" / "zero2.json"),
            plan=PlanConfig(gpu="a100-80gb", num_gpus=1, mfu=0.5),
        )
        took[is_checkpointed] = seconds_on(costs, gpu="a100-80gb", num_gpus=1, mfu=0.5)
        assert took[is_checkpointed] == pytest.approx(plan.hours * 3600)
        executed[is_checkpointed] = costs[0].executed_flops
        assert costs[0].flops == costs[0].tokens * plan.flops_a_token
    # A step is three passes of equal products, and the forward one is done twice.
    assert executed[True] == pytest.approx(4 / 3 * executed[False])
    # So small a run is bound by starting kernels, and takes a minute to start.
    assert took[True] == took[False] > 60


def test_a_run_that_ends_in_nan_is_shown_and_stops_no_section(made):
    study, out = made
    section = section_of(made, "ends")
    row = next(row for row in section.table if row[0] == "broken-seed1")
    assert row[1].startswith("failed: The loss or gradient was not finite in steps 2 to 4")
    arms = {"arms": ["fast", "broken"], "value": "image_loss"}
    found = make_section(SectionSpec("comparison", arguments=arms), study=study, out=out).found
    assert found == "fast and broken have no finished runs of one seed with heldout image_loss."


@pytest.mark.parametrize(
    "file", sorted((ROOT / "launchers" / "studies").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_study_file_is_whole(file):
    study = read_study(file)
    assert jobs_of(study, out=Path("out"))
    assert study.report
    check_sections(study)


def test_every_kind_of_section_is_documented():
    """A row per kind: its name, its arguments, the files that it is made from."""
    rows = [
        f"| `{kind.name}` | {', '.join(f'`{name}`' for name in arguments_of(kind))} | {kind.reads} |"
        for kind in SECTIONS.values()
    ]
    page = (ROOT / "docs" / "running_studies.md").read_text()
    assert [row for row in rows if row not in page] == []


def test_a_loss_that_rises_again_is_said_and_its_lowest_compared(monkeypatch, made):
    study, out = made
    falls_and_rises = {"fast": [[5.0, 3.0, 4.0], [5.1, 3.1, 4.3]], "slow": [[6.0, 3.5, 4.1], [6.0, 3.7, 4.2]]}
    runs_of = lambda study, arm, out: [arm]  # noqa: E731
    monkeypatch.setattr(comparisons, "runs_of", runs_of)
    monkeypatch.setattr(comparisons, "is_rate_falling", lambda runs: False)
    monkeypatch.setattr(comparisons, "image_baselines", lambda runs: {"unigram": 2.0})
    monkeypatch.setattr(
        comparisons,
        "curve",
        lambda runs, **_: Curve([1, 2, 3], [10, 20, 30], np.array(falls_and_rises[runs[0]]), [0, 1]),
    )
    section = comparisons.comparison(study, out, arms=["fast", "slow"], value="image_loss")
    assert "fast was lowest at 20 tokens, 3.050, and rose to 4.150." in section.found
    assert "At each run's lowest, -0.5500" in section.found
    assert "does not hold for held-out images" in section.found
    assert [row[0] for row in section.table[1:]] == ["10", "20"]  # no worth of a loss on its way up
