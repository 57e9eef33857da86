"""Judges behind HTTP, as a stub on loopback that speaks the wire of UniRL's reward service."""

import base64
import io
import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from t2i.errors import UserError
from t2i.measure.remote_judge import RemoteJudge, ask, check_service, headline

IMAGES = [np.full((8, 8, 3), value, dtype=np.uint8) for value in range(0, 200, 10)]
CAPTIONS = [f"caption {place}" for place, _ in enumerate(IMAGES)]


class Service:
    """A reward service whose score is the image's brightness plus a hundred per letter of its caption."""

    def __init__(self):
        self.bodies, self.answers, self.paths = [], [], []
        self.pause = 0.0

    def score(self, body):
        results = []
        for request in body["requests"]:
            (turn,) = request["history"]
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(turn["image_b64"]))))
            (reward,) = request["required_rewards"]
            results.append({reward: {reward: float(image.mean()) + 100 * len(turn["text"]), "style": 1}})
        return {"results": results, "errors": [{} for _ in results]}

    def reply(self, path, body):
        """Take the next prepared answer, a status and what is said with it; else the right one."""
        if self.answers:
            return self.answers.pop(0)
        if path == "/rewards":
            return 200, {"rewards": ["hpsv3", "pickscore"]}
        return 200, self.score(body)


@pytest.fixture
def service():
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(None)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            service.bodies.append(body)
            self.answer(body)

        def answer(self, body):
            service.paths.append(self.path)
            time.sleep(service.pause)
            status, said = service.reply(self.path, body)
            text = said if isinstance(said, bytes) else json.dumps(said).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            except OSError:
                pass  # the client did not wait

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}"
    yield service
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def judge(service):
    return RemoteJudge(service.url, "hpsv3", revision="v3.0", wait_seconds=0.01)


def test_each_image_is_scored_under_its_caption(service, judge, tmp_path):
    Image.fromarray(IMAGES[3]).save(tmp_path / "a.png")
    answers = ask(judge, [*IMAGES[:3], tmp_path / "a.png", *IMAGES[4:]], CAPTIONS)
    wanted = [10.0 * place + 100 * len(caption) for place, caption in enumerate(CAPTIONS)]
    assert [each["hpsv3"] for each in answers.scores] == wanted
    assert answers.means() == {"hpsv3": np.mean(wanted), "hpsv3_style": 1}
    # In requests of eight, on the wire that the service knows.
    assert [len(body["requests"]) for body in service.bodies] == [8, 8, 4]
    assert set(service.bodies[0]["requests"][0]) == {"history", "required_rewards", "metadata"}
    assert headline(answers.scores[1], reward="hpsv3") == wanted[1]
    assert headline({"style": 2.0, "content": 3.0}, reward="hpsv3") == 2


def test_a_service_without_the_judge_is_told_before_anything_is_drawn(service, judge):
    check_service(judge)
    assert service.paths == ["/rewards"]
    with pytest.raises(UserError, match=r"no judge hps; it has: .*pickscore"):
        check_service(replace(judge, reward="hps"))


def test_a_busy_service_is_asked_again(service, judge):
    service.answers = [(503, b"starting"), (500, b"")]
    assert len(ask(judge, IMAGES[:2], CAPTIONS[:2]).scores) == 2
    assert service.paths == ["/score"] * 3
    service.answers = [(503, b"starting")] * 3
    with pytest.raises(UserError, match="did not answer 3 times, last with: status 503, starting"):
        ask(judge, IMAGES[:2], CAPTIONS[:2])


def test_a_request_that_is_wrong_is_not_sent_again(service, judge):
    service.answers = [(422, b"no such reward")]
    with pytest.raises(UserError, match="refused a request: status 422, no such reward"):
        ask(judge, IMAGES[:2], CAPTIONS[:2])
    assert len(service.paths) == 1


def test_a_service_that_hangs_times_out_and_is_asked_again(service, judge):
    service.pause = 0.5
    with pytest.raises(UserError, match="did not answer 3 times, last with: timed out"):
        ask(replace(judge, timeout_seconds=0.05), IMAGES[:1], CAPTIONS[:1])


def test_nobody_at_the_address_is_said(judge):
    with pytest.raises(UserError, match=r"did not answer 3 times.*Is the service running"):
        check_service(replace(judge, url="http://127.0.0.1:9"))


BAD = {
    "is not JSON": b"<html>",
    "holds list": b"[]",
    "expected 2 results": {"results": [{"hpsv3": {"hpsv3": 1}}]},
    "CUDA out of memory": {"results": [{}, {}], "errors": [{"hpsv3": "CUDA out of memory"}, {}]},
    "did not score an image by hpsv3": {"results": [{"hpsv3": {}}, {"hpsv3": {}}]},
    r"NaN.*expected finite": b'{"results": [{"hpsv3": {"hpsv3": NaN}}, {"hpsv3": {"hpsv3": 1}}]}',
    r"true.*expected finite": {"results": [{"hpsv3": {"hpsv3": True}}] * 2},
    r"null.*expected finite": {"results": [{"hpsv3": {"hpsv3": None}}] * 2},
    "from image to image": {"results": [{"hpsv3": {"a": 1}}, {"hpsv3": {"b": 1}}]},
}


@pytest.mark.parametrize("said", BAD)
def test_bad_answers_are_refused_by_what_they_say(said, service, judge):
    service.answers = [(200, BAD[said])]
    with pytest.raises(UserError, match=said):
        ask(judge, IMAGES[:2], CAPTIONS[:2])


def test_a_judge_is_named_by_its_revision_and_prompts(service, judge):
    named = judge.protocol({""}, captions=CAPTIONS)
    assert (named["reward"], named["revision"]) == ("hpsv3", "v3.0")
    assert judge.protocol(set(), captions=CAPTIONS[1:])["prompts_sha256"] != named["prompts_sha256"]
    with pytest.raises(UserError, match="is not stated; expected one"):
        replace(judge, revision="").protocol({""}, captions=CAPTIONS)
    # The service says which weights it has: that is what counts, and it must not be another than was said.
    result = {"hpsv3": {"hpsv3": 1}}
    service.answers = [(200, {"results": [result] * 2, "identities": [{"scorer_version": "abc"}] * 2})]
    answers = ask(judge, IMAGES[:2], CAPTIONS[:2])
    assert answers.revision == "abc"
    assert replace(judge, revision="").protocol({"abc"}, captions=CAPTIONS)["revision"] == "abc"
    with pytest.raises(UserError, match=r"is abc and v3\.0; expected one"):
        judge.protocol({answers.revision}, captions=CAPTIONS)


def test_images_are_not_sent_through_a_proxy(service, judge, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert len(ask(judge, IMAGES[:1], CAPTIONS[:1]).scores) == 1


def test_scores_carry_what_a_judge_said_of_every_row(
    service, model_folder, coco_folder, narrow_inception_file, call, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    words = ["eval/coco_fid.py", model_folder, "--coco", coco_folder, "--num-samples", 6, "--out", out]
    words += ["--inception", narrow_inception_file, "--bootstrap", 0, "--best-of", 2, "--best-by", "judge"]
    words += ["--judge-url", service.url, "--judges", "hpsv3"]
    assert call(*words) == 2
    assert "Name it with --judge-revision" in capsys.readouterr().err
    assert not out.exists()  # found out before anything was drawn
    assert call(*words, "--judge-revision", "v3.0") == 0
    scores = json.loads((out / "scores.json").read_text())
    captions = [json.loads(line)["caption"] for line in (out / "captions.jsonl").read_text().splitlines()]
    files = sorted((out / "model").glob("*.png"))
    assert scores["judges"]["hpsv3"]["revision"] == "v3.0" and scores["sampler"]["best_of"] == 2
    brightness = np.mean([np.asarray(Image.open(file)).mean() for file in files])
    letters = np.mean([len(caption) for caption in captions])
    assert scores["hpsv3"] == pytest.approx(brightness + 100 * letters)
    rows = scores["rows"]
    assert {row for row, found in rows.items() if "hpsv3" in found} == {
        "real",
        "reconstructions",
        "model",
        "other_captions",
        "mismatched",
    }
    assert "matched" in rows and rows["mismatched"]["n"] == rows["real"]["n"]
    assert call("eval/coco_fid.py", "compare", out, out) == 0
