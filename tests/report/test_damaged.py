"""A run folder with a damaged file has a report, or a sentence that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from t2i.errors import UserError
from t2i.report.run import write_report

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0_1_0"
NAMES = (
    "status.json",
    "environment.json",
    "resolved.yaml",
    "data_manifest.json",
    "metrics.jsonl",
    "scores.json",
)
BOMB = b"a: &a [x,x,x,x]\n" + b"".join(
    b"%c: &%c [*%c,*%c,*%c]\n" % (n + 1, n + 1, n, n, n) for n in range(97, 120)
)
WHOLES = (b"", b"{}", b"[]", b"null", b"1", b'"x"', b"\0" * 99, b"\xff\xfe\x00", b"[" * 100_000, BOMB)
VALUES = (None, "x", [1], {"a": 1}, -1, 10**400)


def spoiled(name, content):
    """Yield a file's content, spoiled as a whole and key by key."""
    yield from (*WHOLES, content[: len(content) // 2])
    rows = name == "metrics.jsonl"
    parse, write = (yaml.safe_load, yaml.safe_dump) if name.endswith("yaml") else (json.loads, json.dumps)
    values = [json.loads(line) for line in content.splitlines()] if rows else [parse(content)]
    for key in values[-1]:
        for new in VALUES:
            changed = {**values[-1], key: new}
            yield "\n".join(map(write, [*values[:-1], changed])).encode() + b"\n"
        yield write({other: value for other, value in values[-1].items() if other != key}).encode() + b"\n"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(WRITTEN, folder / "old")
    shutil.rmtree(
        folder / "old" / "run" / "eval" / "step_000004" / "model"
    )  # drawing the images takes the time
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_in_a_file_is_shown_or_refused_by_its_name(name, here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setattr("t2i.report.run.loss_curves", lambda rows, **_: str([row.values for row in rows]))
    run_dir = Path("old/run")
    path = next(run_dir.rglob(name))
    content = path.read_bytes()
    shown, refused = 0, []
    for new in spoiled(name, content):
        path.write_bytes(new)
        try:
            write_report(run_dir)
            shown += 1
        except UserError as error:
            refused.append(str(error))
    path.write_bytes(content)
    assert shown
    assert [said for said in refused if str(path) not in said] == []
    assert bool(refused) == (name != "metrics.jsonl")  # whose lines are left out


def test_files_of_other_names_are_not_taken_for_steps(here, monkeypatch):
    monkeypatch.chdir(here)
    run_dir = Path("old/run")
    for name in (
        "samples/step_x.png",
        "samples/step_.png",
        "eval/step_x/scores.json",
        "eval/notes/scores.json",
    ):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("{}")
    assert write_report(run_dir).is_file()
    (run_dir / "samples" / "step_1000000.png").write_text("no image")
    with pytest.raises(UserError, match=r"step_1000000\.png cannot be read as an image"):
        write_report(run_dir)
