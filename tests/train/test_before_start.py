"""What is not there or does not fit is refused before any process meets another, and leaves no run folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from t2i.errors import DataError, UserError
from t2i.train.main import train

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("part", "changes", "kind", "sentence"),
    [
        ("data", {"shards": Path("no/shards")}, DataError, "no/shards is no shard folder"),
        ("data", {"replay_ratio": 0.5, "replay_shards": Path("no/text")}, DataError, "no/text is no shard"),
        ("data", {"subsample_every": 50}, UserError, "has 2 training sequences; one step takes 8"),
        ("train", {"global_batch_tokens": 90 * 1000}, UserError, "training sequences; one step takes 1000"),
        ("model", {"init": "runs/mien"}, UserError, "model.init: runs/mien does not exist here"),
        ("model", {"new_embeddings": "rows.safetensors"}, UserError, "expected a file that exists"),
    ],
)
def test_inputs_are_looked_at_before_deepspeed_starts(
    part, changes, kind, sentence, finished, tmp_path, monkeypatch
):
    config = replace(finished, run_dir=tmp_path / "run")
    config = replace(config, **{part: replace(getattr(config, part), **changes)})
    monkeypatch.setattr("t2i.train.main._start", None)
    with pytest.raises(kind, match=sentence) as caught:
        train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    assert type(caught.value) is kind and not config.run_dir.exists()


@pytest.mark.parametrize(
    ("command", "words", "status"),
    [
        ("launchers/prepare.py", ["--source", "no/images", "--out", "out"], 3),
        ("launchers/prepare.py", ["--check", "no/shards"], 3),
        ("launchers/train.py", ["--data.shards", "no/shards", "--run-dir", "run"], 3),
        ("launchers/train.py", ["--ds_config", "no.json"], 2),
        ("launchers/train.py", ["--config", "no.yaml"], 2),
        ("launchers/sample.py", ["no/run", "--prompts", "a", "--out", "out"], 2),
        ("launchers/report.py", ["no/run"], 2),
    ],
)
def test_missing_data_is_status_3_and_whatever_else_is_missing_is_2(
    command, words, status, call, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert call(command, *words) == status
    assert list(tmp_path.iterdir()) == []
