"""Pages hold other people's words: captions, completions and names stay text in them."""

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from t2i.generate.image_files import png_text
from t2i.report import run as run_page
from t2i.report.run import write_report
from t2i.report.sections.section import Section
from t2i.report.study import HTML, MARKDOWN, Part, StudyPage, rendered
from t2i.runs.run_folder import read_sample_captions, write_sample_captions
from t2i.study.jobs import Record
from t2i.study.spec import Study

WORDS = "<script>alert('me')</script> & more"
ESCAPED = "&lt;script&gt;alert(&#39;me&#39;)&lt;/script&gt; &amp; more"


@pytest.fixture
def run_dir(tmp_path):
    """A run's files, as far as a page needs them, with markup wherever a stranger's words stand."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "captions.txt").write_text(f"{WORDS}\n")
    (tmp_path / "resolved.yaml").write_text("train: {max_steps: 4}\ndata: {shards: here}\n")
    environment = {"command": f"train {WORDS}", "packages": {"torch": "2"}, "platform": "x", "python": "3"}
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    (tmp_path / "status.json").write_text(json.dumps({"state": "done"}))
    rows = [{"step": 2, "tokens": 90, "seconds": 6.0, "image_loss": 5.0}]
    rows += [{"step": 4, "tokens": 180, "seconds": 12.0, "image_loss": 4.0, "memory_bytes": 2.5e9}]
    losses = {"image_loss": 4.5, "image_loss_wrong_caption": 4.75, "image_loss_empty_caption": 5.25}
    rows += [{"step": step, "split": "heldout", "num_pictures": 8, **losses} for step in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_runs_page_tells_its_last_step_and_escapes_words(run_dir):
    Image.new("RGB", (2, 2)).save(run_dir / "samples" / "step_000004.png")
    page = write_report(run_dir).read_text()
    assert "step 4 of 4,\n180 tokens in 0.2 minutes of training,\n15 tokens per second,\n2.5 GB" in page
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)  # of the last step alone
    assert cells == ["heldout", "4.500", "4.750", "5.250", "8"]
    assert "<script>" not in page
    assert page.count(ESCAPED) == 2  # the caption and the command


def test_a_file_that_is_half_written_ends_no_page_that_follows_a_run(run_dir, monkeypatch):
    grid, status = run_dir / "samples" / "step_000004.png", run_dir / "status.json"
    status.write_text(json.dumps({"state": "running"}))
    grid.write_bytes(b"\x89PNG\r\n")

    def wait(seconds):
        Image.new("RGB", (2, 2)).save(grid)
        status.write_text(json.dumps({"state": "done"}))

    monkeypatch.setattr(run_page.time, "sleep", wait)
    run_page.follow_run(run_dir, every_seconds=30)
    assert "drawn at step 4" in (run_dir / "report.html").read_text()


def test_captions_of_samples_are_one_per_line_in_utf_8(run_dir):
    write_sample_captions(run_dir, ["a cat\nof 2 colours", "猫\u2028 \u00e9"])
    assert (run_dir / "samples" / "captions.txt").read_bytes().decode().split("\n")[1] == "猫 é"
    assert read_sample_captions(run_dir) == ["a cat of 2 colours", "猫 é"]
    (run_dir / "samples" / "captions.txt").write_bytes(b"a \xff cat\n")
    assert read_sample_captions(run_dir) == ["a \ufffd cat"]


def test_a_page_refreshes_itself_while_the_run_lasts_and_not_after(run_dir, monkeypatch):
    (run_dir / "status.json").write_text(json.dumps({"state": "running"}))
    pages = []

    def wait(seconds):
        pages.append((seconds, (run_dir / "report.html").read_text()))
        (run_dir / "status.json").write_text(json.dumps({"state": "done"}))

    monkeypatch.setattr(run_page.time, "sleep", wait)
    run_page.follow_run(run_dir, every_seconds=30)
    assert [seconds for seconds, _ in pages] == [30]
    assert '<meta http-equiv="refresh" content="30">' in pages[0][1]
    assert "http-equiv" not in (run_dir / "report.html").read_text()


def test_a_page_follows_no_run_that_was_killed_for_ever(run_dir, monkeypatch, caplog):
    (run_dir / "status.json").write_text(json.dumps({"state": "running"}))
    settings = yaml.safe_load((run_dir / "resolved.yaml").read_text())
    settings["train"]["hang_timeout_seconds"] = 60
    (run_dir / "resolved.yaml").write_text(yaml.safe_dump(settings))
    now, waits = [time.time()], []

    def wait(seconds):
        waits.append(seconds)
        now[0] += seconds
        assert len(waits) < 9

    monkeypatch.setattr(run_page, "time", SimpleNamespace(time=lambda: now[0], sleep=wait))
    run_page.follow_run(run_dir, every_seconds=500)
    assert len(waits) == 3  # 20 times 60 seconds are the third one's
    assert "says that it is running, and has written nothing for so long" in caplog.text
    assert "http-equiv" not in (run_dir / "report.html").read_text()


def test_a_run_without_a_recorded_step_has_a_page(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    assert "step 0 of 4,\n0 tokens in 0.0 minutes" in write_report(run_dir).read_text()


def test_a_split_of_one_image_has_no_number_under_shuffled_captions(run_dir):
    losses = {"image_loss": 4.25, "image_loss_wrong_caption": None, "image_loss_empty_caption": 5.5}
    row = {"step": 4, "split": "combinations", "num_pictures": 1, **losses}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", write_report(run_dir).read_text())
    assert cells[5:] == ["combinations", "4.250", "", "5.500", "1"]


def test_a_run_on_text_alone_has_a_page(tmp_path, call):
    written = Path(__file__).parents[1] / "fixtures" / "written_by_0_1_0" / "language-model"
    run_dir = shutil.copytree(written, tmp_path / "language-model")
    manifest = json.loads((run_dir / "data_manifest.json").read_text())
    assert manifest.get("codebook_size", 0) == 0
    assert call("launchers/report.py", run_dir) == 0
    page = (run_dir / "report.html").read_text()
    assert "A language model: step" in page
    assert f"Data: text of <code>{manifest['source']}</code>" in page
    assert page.count("<svg") == 1 and "image loss" not in page  # the text loss alone
    assert "Caption sensitivity" not in page and "codes per image" not in page


def test_drawn_images_stand_beside_real_ones_of_their_own_captions_alone(tmp_path, monkeypatch, caplog):
    def pair(caption):
        image = SimpleNamespace(image=Image.new("RGB", (8, 8)))
        return SimpleNamespace(caption=caption, split="heldout", open=lambda: image)

    halves = SimpleNamespace(drawn=[pair("a cat"), pair("a dog")], reference=[pair("a hat"), pair("a log")])
    monkeypatch.setattr(run_page, "reopen_source", lambda manifest: None)
    monkeypatch.setattr(run_page, "heldout_halves", lambda *_, **__: halves)
    for number, pair_ in enumerate(halves.drawn):
        Image.new("RGB", (8, 8)).save(
            tmp_path / f"{number}.png", pnginfo=png_text({"caption": pair_.caption})
        )
    manifest = SimpleNamespace(image_size=8)
    assert all(one.real for one in run_page._images(tmp_path, manifest)) and not caplog.records
    halves.drawn, halves.reference = halves.reference, halves.drawn  # `t2i score --other-half` drew them
    assert all(one.real for one in run_page._images(tmp_path, manifest)) and not caplog.records
    halves.drawn, halves.reference = halves.reference, halves.drawn
    halves.drawn[1] = pair("a bus")  # an image more in the source, and every later one is another
    found = run_page._images(tmp_path, manifest)
    assert [(one.caption, one.real) for one in found] == [("a cat", ""), ("a dog", "")]
    assert "1.png has another caption than the data now" in caplog.text


def test_a_studys_page_escapes_words_and_names_what_failed(tmp_path):
    arms = {"a": {"train": {"lr": 1.0}}}
    study = Study(tmp_path / "x.yaml", title=WORDS, question="Q", arms=arms, arm_seeds={"a": [5, 6]})
    section = Section(WORDS, WORDS, table=[["arm"], [WORDS]], paper=WORDS)
    page = StudyPage(
        study=study,
        parts=[Part(section, svg="<svg></svg>")],
        failed={"a-seed0": Record("failed", code=4), "b": Record("skipped", reason="needs a-seed0")},
        minutes=1.0,
        environment={"cpus": 2, "python": "3", "packages": {}, "platform": "x"},
        commits=[],
        command="make it",
        date="today",
    )
    html = rendered(page, HTML, is_html=True)
    assert "<script>" not in html
    assert html.count(ESCAPED) == 6  # two titles, the heading, the sentence, the paper's, a cell
    assert "<figure><svg></svg></figure>" in html
    assert "a-seed0 (failed, status 4), b (skipped, needs a-seed0)" in html
    assert "--train.lr 1.0" in html and "2 runs over seeds 5, 6;" in html
    assert f"# {WORDS}\n" in rendered(page, MARKDOWN, is_html=False)
