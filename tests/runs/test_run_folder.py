from dataclasses import replace

import pytest

from t2i.config import RunConfig
from t2i.errors import UserError
from t2i.runs import metrics_log
from t2i.runs import run_folder as folder


def test_other_science_settings_are_listed_and_refused(tmp_path):
    config = RunConfig(run_dir=tmp_path / "run")
    folder.open_run(config, ds_config={}).close()
    longer = replace(config, train=replace(config.train, max_steps=9))
    folder.open_run(longer, ds_config={}).close()
    other = replace(config, train=replace(config.train, lr=1.0), data=replace(config.data, seq_len=80))
    with pytest.raises(
        UserError, match=r"data\.seq_len is 96 there, 80 here; train\.lr is 0\.0015 there, 1\.0 here"
    ):
        folder.open_run(other, ds_config={})


def test_a_folder_serves_one_process_at_a_time(tmp_path):
    config = RunConfig(run_dir=tmp_path)
    with (
        folder.open_run(config, ds_config={}),
        pytest.raises(UserError, match=r"is in use by process \d+ on .* since"),
    ):
        folder.open_run(config, ds_config={})


def test_metrics_are_rewound_and_a_torn_line_is_passed_over(tmp_path):
    for step in range(1, 6):
        metrics_log.append_metrics(tmp_path, {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    metrics_log.rewind_metrics(tmp_path, step=3)
    assert [row["step"] for row in metrics_log.read_metrics(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.rewound").read_text().count("\n") == 2
