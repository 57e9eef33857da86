"""`t2i serve` as a process: it serves, draws what waits at SIGTERM, and ends."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def images(port, **fields):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = json.dumps({"prompt": "a cat", **fields})
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_a_served_model_draws_until_it_is_told_to_stop(model_folder):
    command = [sys.executable, str(ROOT / "launchers" / "serve.py"), str(model_folder), "--port", "0"]
    environment = processes.environment(PYTHONPATH=str(ROOT))
    with processes.start(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        port = int(re.search(r":(\d+)/v1", process.stdout.readline())[1])
        assert images(port, seed=1)[0] == 200
        with ThreadPoolExecutor(20) as clients:
            asked = [clients.submit(images, port, n=10, seed=seed) for seed in range(20)]
            while True:  # all have arrived
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/health")
                if json.loads(connection.getresponse().read())["waiting_images"] > 50:
                    break
            os.kill(process.pid, signal.SIGTERM)
            answers = [each.result() for each in asked]
        done = [answer for status, answer in answers if status == 200]
        assert all(len(answer["data"]) == 10 for answer in done)
        # What came after the signal is told so; nothing is left without an answer.
        assert {status for status, _ in answers} <= {200, 503}
        assert len(done) >= 6
        assert process.wait(60) == 0


@pytest.mark.parametrize("verb", ["serve", "play"])
def test_who_reads_the_address_may_stop_it_at_once(verb, model_folder, call, monkeypatch):
    if verb == "play":
        pytest.importorskip("gradio", reason="pip install '.[play]' for this")
    heard = []

    def stop(*words, **_):
        if "http://127.0.0.1" in str(words[0]):
            heard.append(words[0])
            os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("builtins.print", stop)
    try:
        assert call(f"launchers/{verb}.py", model_folder, "--port", 0) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(heard) == 1


def test_another_address_without_a_key_is_refused_at_once(model_folder):
    done = processes.run(
        [sys.executable, str(ROOT / "launchers" / "serve.py"), str(model_folder), "--host", "0.0.0.0"],
        env=processes.environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "T2I_API_KEY" in done.stderr
