"""The page of `t2i play` in a browser: started on a free port, clicked through, and stopped."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import processes

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def served(*words, cwd=ROOT, stop=signal.SIGINT, **variables):
    """Serve a page; yield its address, and see that it ends well when it is told to stop."""
    command = [sys.executable, str(ROOT / "launchers" / "play.py"), *map(str, words), "--port", "0"]
    environment = processes.environment(PYTHONPATH=str(ROOT), **variables)
    with processes.start(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=cwd) as process:
        try:
            yield re.search(r"http://\S+", process.stdout.readline())[0]
        finally:
            os.kill(process.pid, stop)
            status = process.wait(60)
        assert status == 0


@contextmanager
def opened(url, **view):
    """Open an address in a browser without a network but this machine's; yield its page."""
    from playwright.sync_api import sync_playwright  # here: most tests are collected without it

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 900}, **view)
        page.set_default_timeout(30_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(url)
        Tab(page, "Draw").button("Draw").wait_for()
        try:
            yield page
        finally:
            browser.close()


class Tab:
    """One tab, by what it says."""

    def __init__(self, page, name):
        self.page = page
        page.get_by_role("tab", name=name, exact=True).click()
        self.panel = page.get_by_role("tabpanel").filter(visible=True)

    def button(self, name):
        return self.panel.get_by_role("button", name=name, exact=True)

    def field(self, label):
        return self.panel.get_by_label(label, exact=True)

    def slide(self, label, value):
        number = self.panel.get_by_label(f"number input for {label}")
        number.fill(str(value))
        number.blur()

    def wait_for(self, label, beginning):
        """Wait until the field of a label begins so; return its text."""
        field = self.field(label)
        field.wait_for()
        self.page.wait_for_function(
            "([field, beginning]) => field.value.startsWith(beginning)",
            arg=[field.element_handle(), beginning],
        )
        return field.input_value()

    def draw(self, prompt, *, seed="", count=1, button="Draw"):
        """Fill in a drawing and begin it."""
        self.field("Prompt").fill(prompt)
        self.field("Seed").fill(str(seed))
        self.slide("Images", count)
        self.button(button).click()

    def files(self):
        """Download all drawn files: name -> bytes."""
        links = self.panel.locator(".files a")
        links.first.wait_for()
        found = {}
        for link in links.all():
            with self.page.expect_download() as download:
                link.click()
            found[download.value.suggested_filename] = Path(download.value.path()).read_bytes()
        return found
