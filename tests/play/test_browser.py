"""The page as somebody uses it: typed into, clicked, waited for, looked at."""

import importlib.util
import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from play_page import CHROMIUM, Tab, opened, served

from t2i.runs.metrics_log import append_metrics
from t2i.runs.run_folder import write_status

MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason="pip install '.[play,browser]' for these"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH"),
]
SCRIPT = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\"> a cat"


@pytest.fixture(scope="module")
def url(model_folder):
    with served(model_folder, "--beside", model_folder, "--reference", model_folder) as address:
        yield address


@pytest.fixture(scope="module")
def run_url(finished):
    with served(finished.run_dir, "--batch-size", 4, "--max-images", 1000) as address:
        yield address


@pytest.fixture
def page(url):
    with opened(url) as found:
        yield found


def test_images_appear_while_they_are_drawn_and_one_seed_gives_one_file(page, tmp_path):
    tab = Tab(page, "Draw")
    tab.draw("a cat", seed=7, count=3)
    said = tab.wait_for("Status", "Drawn: 16 of 16 passes, ")
    assert said.endswith("seeds 7 to 9.")
    assert tab.panel.locator(".drawn img").count() == 3
    first = tab.files()
    assert list(first) == ["seed_7.png", "seed_8.png", "seed_9.png"] and len({*first.values()}) == 3
    tab.draw("a dog", seed=1)
    tab.draw("a cat", seed=8, count=1)  # whether the dog is finished or not
    page.wait_for_function("document.querySelector('.status textarea').value.endsWith('seed 8.')")
    assert tab.files() == {"seed_8.png": first["seed_8.png"]}
    facts = Image.open(io.BytesIO(first["seed_8.png"])).text
    assert (facts["caption"], facts["seed"], facts["top_k"]) == ("a cat", "8", "50")
    page.screenshot(path=tmp_path / "page.png")
    assert np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).std() > 10  # something is shown


def test_a_drawn_file_gives_its_settings_back(page, tmp_path):
    tab = Tab(page, "Draw")
    tab.slide("Top-k", 9)
    tab.draw("a <b>cat</b>", seed=2**60, count=1)
    tab.wait_for("Status", "Drawn")
    [(name, file)] = tab.files().items()
    (tmp_path / name).write_bytes(file)
    page.reload()
    tab = Tab(page, "Draw")
    assert tab.field("Prompt").input_value() == ""
    tab.panel.locator(".dropped input[type=file]").set_input_files(tmp_path / name)
    tab.wait_for("Status", "Its settings are in the fields.")
    assert tab.field("Prompt").input_value() == "a <b>cat</b>"
    assert tab.field("Seed").input_value() == str(2**60)
    assert tab.panel.get_by_label("number input for Top-k").input_value() == "9"
    tab.button("Draw").click()
    tab.wait_for("Status", "Drawn")
    assert tab.files() == {name: file}


def test_a_caption_is_text_wherever_it_is_shown(page):
    tab = Tab(page, "Draw")
    tab.draw(SCRIPT * 3, seed=1)
    said = tab.wait_for("Status", "Drawn")
    assert "this is read: <script>" in said  # it is longer than the model reads
    tab.draw("a cat", seed=SCRIPT)
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "The seed is '<script>document.title" in toast.inner_text()
    assert page.title().startswith("t2i: ")
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize(
    ("seed", "sentence"),
    [("-4", "The seed is '-4'; expected a whole number from 0 to"), ("1.5", "The seed is '1.5'; expected")],
)
def test_what_is_wrong_is_said_on_the_page(page, seed, sentence):
    tab = Tab(page, "Draw")
    tab.draw("a cat", seed=seed)
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert sentence in toast.inner_text()


def test_a_file_that_is_no_drawing_is_said_on_the_page(page, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    tab = Tab(page, "Draw")
    tab.panel.locator(".dropped input[type=file]").set_input_files(tmp_path / "plain.png")
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "plain.png carries no settings of a drawing" in toast.inner_text()


def test_two_models_draw_beside_each_other_and_a_captions_worth_is_shown(page):
    tab = Tab(page, "Compare")
    tab.draw("a cat", seed=7, count=2, button="Draw by both")
    page.wait_for_function(
        "[...document.querySelectorAll('.status textarea')].some(e => e.value.split('Drawn:').length === 3)"
    )
    assert tab.panel.locator(".drawn img").count() == 4
    tab.panel.locator(".drawn img").first.click()
    page.wait_for_function("document.querySelector('.caption textarea, .caption input').value === 'a cat'")
    tab.button("Measure").click()
    page.wait_for_function(
        "document.querySelector('.worth textarea, .worth input').value.includes('per code')"
    )
    assert tab.panel.locator(".maps img").count() >= 2


def test_a_text_is_completed_by_both_models(page):
    tab = Tab(page, "Text")
    tab.field("Prompt").fill("To be or <i>not</i>")
    tab.button("Complete").click()
    tab.wait_for("Status", "Done.")
    own, origin = (tab.panel.locator(f".{name} textarea").input_value() for name in ("own", "origin"))
    assert own and own == origin


def test_cancel_ends_a_drawing_and_the_next_one_begins(run_url):
    with opened(run_url) as page:
        tab = Tab(page, "Draw")
        tab.draw("a cat", seed=1, count=1000)
        tab.wait_for("Status", "Drawing: ")
        tab.button("Cancel").click()
        tab.wait_for("Status", "Cancelled.")
        tab.draw("a dog", seed=2, count=1)
        tab.wait_for("Status", "Drawn")
        assert list(tab.files()) == ["seed_2.png"]


def test_a_run_is_shown_with_its_curves(run_url):
    with opened(run_url) as page:
        tab = Tab(page, "Run")
        assert tab.field("The run").input_value().startswith("done: step 6 of 6")
        assert tab.panel.locator(".figures svg").count() == 2


def test_a_run_is_watched_while_it_trains(finished, tmp_path):
    run = shutil.copytree(finished.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    write_status(run, state="running", step=6, next_command="")
    with served(run) as url, opened(url) as page:
        tab = Tab(page, "Run")
        tab.wait_for("The run", "running: step 6 of 6")
        before = tab.panel.locator(".figures").inner_html()
        assert not tab.panel.locator(".steps").is_visible()
        (run / "samples").mkdir()
        for step in (7, 8, 9):
            append_metrics(run, {"step": step, "tokens": step, "image_loss": 5.0, "seconds": 60.0 * step})
            Image.new("RGB", (64, 32), (10 * step, 0, 0)).save(run / "samples" / f"step_{step:06d}.png")
        tab.wait_for("The run", "running: step 9 of 6, 9 min in steps so far.")
        tab.panel.get_by_text("Drawn at step 9").wait_for()
        assert tab.panel.locator(".grid img").is_visible() and tab.panel.locator(".steps").is_visible()
        assert tab.panel.locator(".figures").inner_html() != before
        tab.slide("Samples: first to last", 0)
        tab.panel.get_by_text("Drawn at step 7").wait_for()
        write_status(run, state="done", step=9, next_command="")
        tab.wait_for("The run", "done: step 9 of 6")
        assert tab.panel.get_by_text(
            "Drawn at step 7"
        ).is_visible()  # who looks at an older one is left at it


def test_a_drawing_is_seen_before_it_is_done(run_url):
    with opened(run_url) as page:
        tab = Tab(page, "Draw")
        tab.draw("a cat", seed=1, count=100)
        said = tab.wait_for("Status", "Drawing: ")
        assert 0 < int(re.match(r"Drawing: (\d+) of 1600 passes", said)[1]) < 1600
        tab.panel.locator(".drawn img").first.wait_for()
        tab.wait_for("Status", "Drawn: 1600 of 1600 passes")


def test_a_third_visitor_is_told_that_the_page_is_busy(finished):
    with (
        served(finished.run_dir, "--max-waiting", 1, "--max-images", 1000) as url,
        opened(url) as page,
    ):
        tabs = [Tab(page, "Draw")]
        for _ in range(2):
            visitor = page.context.browser.new_page()
            visitor.goto(url)
            tabs.append(Tab(visitor, "Draw"))
        tabs[0].draw("a cat", seed=1, count=1000)
        tabs[0].wait_for("Status", "Drawing: ")
        with tabs[1].page.expect_response(lambda answer: "queue/join" in answer.url):
            tabs[1].draw("a dog", seed=2)
        tabs[2].draw("a bird", seed=3)
        toast = tabs[2].page.get_by_test_id("toast-body")
        toast.wait_for(timeout=30_000)
        assert "busy" in toast.inner_text() or "full" in toast.inner_text()
        tabs[0].button("Cancel").click()
        tabs[1].wait_for("Status", "Drawn: ")  # who waited is drawn for


def test_nothing_of_elsewhere_is_asked(page, url):
    for name in ("Compare", "Text", "Run", "Draw"):
        Tab(page, name)
    assert len(page.asked) > 10
    assert [address for address in page.asked if not address.startswith((url, "data:", "blob:"))] == []
