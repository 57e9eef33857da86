import errno
import fcntl
import json
import os
from dataclasses import replace

import processes
import pytest

from t2i.config import ModelConfig, RunConfig
from t2i.distributed.run_id import read_run_id
from t2i.errors import UserError
from t2i.runs import metrics_log
from t2i.runs import run_folder as folder


def test_other_science_settings_are_listed_and_refused(tmp_path):
    config = RunConfig(run_dir=tmp_path / "run")
    folder.open_run(config, ds_config={}).close()
    metrics_log.append_metrics(config.run_dir, {"step": 1})
    longer = replace(config, train=replace(config.train, max_steps=9))
    folder.open_run(longer, ds_config={}).close()
    other = replace(config, train=replace(config.train, lr=1.0), data=replace(config.data, seq_len=80))
    with pytest.raises(
        UserError, match=r"data\.seq_len is 96 there, 80 here; train\.lr is 0\.0015 there, 1\.0 here"
    ):
        folder.open_run(other, ds_config={})


def test_a_run_takes_new_settings_until_its_first_step(tmp_path):
    config = RunConfig(run_dir=tmp_path / "run")
    other = replace(config, data=replace(config.data, seq_len=80))
    folder.open_run(config, ds_config={}).close()
    metrics_log.append_metrics(config.run_dir, {"step": 0, "split": "text"})  # measured before the first step
    folder.open_run(other, ds_config={}).close()
    assert folder.read_settings(config.run_dir)["data"]["seq_len"] == 80
    metrics_log.append_metrics(config.run_dir, {"step": 1})
    with pytest.raises(UserError, match=r"data\.seq_len is 80 there, 96 here"):
        folder.open_run(config, ds_config={})


def test_a_folder_serves_one_process_at_a_time(tmp_path):
    config = RunConfig(run_dir=tmp_path)
    with (
        folder.open_run(config, ds_config={}),
        pytest.raises(UserError, match=r"is in use by process \d+ on .* since"),
    ):
        folder.open_run(config, ds_config={})


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_folder_on_a_disk_without_locks_serves_with_a_warning(number, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder.open_run(RunConfig(run_dir=tmp_path), ds_config={}).close()
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / '.lock'} cannot be locked ({os.strerror(number)})")


def test_a_run_gets_its_id_once(tmp_path):
    config = RunConfig(run_dir=tmp_path / "run")
    folder.open_run(config, ds_config={}).close()
    found = read_run_id(config.run_dir)
    metrics_log.append_metrics(config.run_dir, {"step": 1})
    folder.open_run(config, ds_config={}).close()
    assert found == read_run_id(config.run_dir) != ""
    # A run of the last release has none, and neither have its checkpoints.
    (config.run_dir / "run_id").unlink()
    folder.open_run(config, ds_config={}).close()
    assert read_run_id(config.run_dir) == ""


@pytest.mark.parametrize(
    "written", ["lm/plain", "./lm/plain", "{here}/lm/plain", "lm/link", "lm/../lm/plain/"]
)
def test_a_path_of_the_same_place_is_no_other_setting(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "other"):
        (tmp_path / "lm" / name).mkdir(parents=True)
    (tmp_path / "lm" / "link").symlink_to("plain")
    config = RunConfig(run_dir=tmp_path / "run", model=ModelConfig(init="lm/plain"))
    folder.open_run(config, ds_config={}).close()
    metrics_log.append_metrics(config.run_dir, {"step": 1})
    same = written.format(here=tmp_path)
    folder.open_run(replace(config, model=ModelConfig(init=same)), ds_config={}).close()
    with pytest.raises(UserError, match=r"model\.init is .* there, lm/other here"):
        folder.open_run(replace(config, model=ModelConfig(init="lm/other")), ds_config={})


def test_metrics_are_rewound_and_a_torn_line_is_passed_over(tmp_path):
    for step in range(1, 6):
        metrics_log.append_metrics(tmp_path, {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    metrics_log.rewind_metrics(tmp_path, step=3)
    assert [row["step"] for row in metrics_log.read_metrics(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.rewound").read_text().count("\n") == 2


def test_lines_that_are_no_rows_are_left_out_and_counted(tmp_path, caplog):
    for step in (1, 2):
        metrics_log.append_metrics(tmp_path, {"step": step})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"step": 3, "lo{"step": 3}\n[1]\n{"step": "4"}\n{"step": true}\n\xff\x00\n\n{"loss": 1}\n'
        )
    metrics_log.append_metrics(tmp_path, {"step": 5})
    assert [row["step"] for row in metrics_log.read_metrics(tmp_path)] == [1, 2, 5]
    assert "7 of 10 lines are no rows and are left out; the first is line 3" in caplog.text
    assert metrics_log.has_step(tmp_path)
    metrics_log.rewind_metrics(tmp_path, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "metrics.jsonl.rewound").read_bytes().count(b"\n") == 8


def test_a_resume_reads_the_end_of_long_metrics_alone(tmp_path, monkeypatch):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 100_001))
        file.write('{"step": 100000, "split": "heldout"}\n')
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    assert metrics_log.has_step(tmp_path)
    assert [row.get("split") for row in metrics_log.rows_of_step(tmp_path, 100_000)] == ["heldout", None]
    metrics_log.rewind_metrics(tmp_path, step=99_998)
    assert len(parsed) < 20
    with (tmp_path / "metrics.jsonl").open("rb") as file:
        file.seek(-40, os.SEEK_END)
        assert file.read().endswith(b'{"step": 99998, "loss": 1.0}\n')
    assert (tmp_path / "metrics.jsonl.rewound").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["manifest.json", "image_tokenizer/config.json", "roundtrip.safetensors"],
            "a manifest.json: it is a folder of",
        ),
        (
            ["config.json", "resolved.yaml", "image_tokenizer/config.json"],
            "a config.json: it is a folder of a model",
        ),
        (
            ["image_tokenizer/config.json", "notes.txt"],
            "image_tokenizer/ of its own, which a run would replace",
        ),
    ],
)
def test_a_folder_of_something_else_becomes_no_run(names, said, tmp_path):
    """Shards and exports have files of the same names as runs, which replace them."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of the user")
    with pytest.raises(UserError, match=f"has {said}.*expected a new folder, or that of a run"):
        folder.open_run(RunConfig(run_dir=tmp_path), ds_config={})
    with pytest.raises(UserError, match="expected a new folder, or that of a run"):
        folder.make_folder(tmp_path)
    assert sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    ) == sorted(names)


def test_the_commit_is_never_that_of_a_repository_around_an_installed_package(tmp_path, monkeypatch):
    """Its environment often lies in the user's own repository."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        processes.run([*git, *words], check=True)
    ours = tmp_path / ".venv" / "run_folder.py"
    ours.parent.mkdir()
    ours.touch()
    monkeypatch.setattr(folder, "__file__", str(ours))
    assert folder.git_commit() == ""
    processes.run([*git, "add", str(ours)], check=True)
    assert folder.git_commit()
