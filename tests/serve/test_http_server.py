"""The server's routes, queue and end, with a drawing function that takes no model."""

import base64
import http.client
import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from t2i.serve.clients import has_key
from t2i.serve.http_server import BACKLOG, ImageServer, Service
from t2i.serve.images_request import Limits, RefusedError, read_request
from t2i.serve.meters import Meters
from t2i.serve.opening import api_key_of
from t2i.serve.stopping import accepting
from t2i.serve.waiting import Waiting

LIMITS = Limits("tiny", image_size=64, most_images=10, most_characters=100)


class Drawing:
    """Draws by writing down; `go` holds it up."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, images):
        self.go.wait()
        self.batches.append([image.caption for image in images])
        if "fail" in self.batches[-1]:
            raise RuntimeError("out of memory")
        return [f"{image.caption} {image.seed}".encode() for image in images]


@contextmanager
def served(draw, *, most_waiting=100, api_key=None):
    meters = Meters()
    waiting = Waiting(draw, batch_size=4, most_waiting=most_waiting, meters=meters)
    service = Service(waiting, meters, LIMITS, lambda caption: caption[:20], created=5, api_key=api_key)
    with accepting(ImageServer(("127.0.0.1", 0), service=service)) as server:
        try:
            yield server
        except BaseException:
            draw.go.set()  # or the end would wait for ever for what is held up
            raise


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    text = json.dumps(body) if isinstance(body, dict) else body
    connection.request(method, path, body=text, headers={"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    is_json = answer.getheader("Content-Type") == "application/json"
    return answer.status, json.loads(content) if is_json else content


def images(server, **fields):
    return ask(server, "POST", "/v1/images/generations", {"prompt": "a cat", **fields})


def drawn(answer):
    return [base64.b64decode(each["b64_json"]).decode() for each in answer["data"]]


def test_images_come_with_their_seeds_and_unknown_fields_are_ignored():
    with served(Drawing()) as server:
        status, answer = images(server, n=2, seed=7, user="me", style="vivid", size="64x64", quality=None)
        assert status == 200
        assert drawn(answer) == ["a cat 7", "a cat 8"]
        assert [each["seed"] for each in answer["data"]] == [7, 8]
        assert "revised_prompt" not in answer["data"][0]
        prompt = "a cat that is longer than the model reads"
        _, long = images(server, prompt=prompt, seed=1)
        assert long["data"][0]["revised_prompt"] == "a cat that is longer"
        assert drawn(long) == [f"{prompt} 1"]  # cut by the sampler, as everywhere
        _, other = images(server)
        assert other["data"][0]["seed"] != images(server)[1]["data"][0]["seed"]


WRONG = [
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ["a", "b"]}, 400, "prompt"),
    ({"prompt": "a" * 101}, 400, "prompt"),
    ({"n": 0}, 400, "n"),
    ({"n": 11}, 400, "n"),
    ({"n": True}, 400, "n"),
    ({"n": 1.5}, 400, "n"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 2**63}, 400, "seed"),
    ({"size": "1024x1024"}, 400, "size"),
    ({"response_format": "url"}, 400, "response_format"),
    ({"output_format": "webp"}, 400, "output_format"),
    ({"background": "transparent"}, 400, "background"),
    ({"stream": True}, 400, "stream"),
    ({"model": "dall-e-3"}, 404, "model"),
]


@pytest.mark.parametrize(("fields", "status", "param"), WRONG, ids=str)
def test_a_field_that_cannot_be_served_is_named(fields, status, param):
    with pytest.raises(RefusedError) as refused:
        read_request(json.dumps({"prompt": "a", **fields}).encode(), limits=LIMITS)
    assert (refused.value.status, refused.value.param) == (status, param)
    assert refused.value.to_json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 60_000, b'"a"'])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(RefusedError, match="the body is no JSON"):
        read_request(body, limits=LIMITS)


def test_half_a_surrogate_becomes_text():
    assert read_request(b'{"prompt": "a \\ud800"}', limits=LIMITS).prompt == "a ?"


def test_routes_limits_and_hosts_are_checked():
    with served(Drawing()) as server:
        assert ask(server, "GET", "/v1/models")[1]["data"][0]["id"] == "tiny"
        assert ask(server, "GET", "/v1/models/tiny")[1]["object"] == "model"
        assert ask(server, "GET", "/v1/models/other")[0] == 404
        assert ask(server, "GET", "/health")[1]["status"] == "ok"
        assert ask(server, "GET", "/nowhere")[0] == 404
        assert ask(server, "GET", "/v1/images/generations")[0] == 405
        assert ask(server, "BREW", "/v1/models")[1]["error"]["type"] == "server_error"  # http.server's own
        assert ask(server, "POST", "/v1/images/generations", "{}", **{"Content-Type": "text/plain"})[0] == 415
        assert ask(server, "POST", "/v1/images/generations", " " * 70_000)[0] == 413
        # A page of another site, whose name was made to lead here.
        for host in ("evil.example:80", "localhost.evil.example", "[::1].evil.example", ":80"):
            assert ask(server, "GET", "/v1/models", Host=host)[0] == 403
        for host in ("LOCALHOST:80", "127.0.0.1", "[::1]", "[::1]:8000"):
            assert ask(server, "GET", "/v1/models", Host=host)[0] == 200
        counted = ask(server, "GET", "/metrics")[1]
        assert 't2i_requests_total{route="/v1/models",status="200"} 6' in counted
        assert "t2i_waiting_images 0" in counted


def test_a_key_is_asked_for_everywhere_but_health():
    with served(Drawing(), api_key="secret") as server:
        assert images(server)[0] == 401
        assert ask(server, "GET", "/metrics")[0] == 401
        assert ask(server, "GET", "/health")[0] == 200
        status, answer = ask(server, "GET", "/v1/models", Authorization="Bearer wrong")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert ask(server, "GET", "/v1/models", Authorization="Bearer secret")[0] == 200


@pytest.mark.parametrize(
    "given", ["secret", "Basic secret", "Bearer", "Bearer secre", "Bearer secret2", "Bearer é"]
)
def test_a_key_in_another_form_is_none(given):
    assert not has_key(given, key="secret")


def test_a_key_is_compared_by_its_bytes():
    assert has_key("bearer  secret", key="secret")
    # As http.client reads what a client sent in UTF-8, and os.environ what is no UTF-8.
    assert has_key("Bearer é".encode().decode("latin-1"), key="é")
    assert has_key("Bearer \xe9", key="\udce9")


def test_a_key_from_a_file_is_without_its_line_feed():
    keys = {name: api_key_of({"T2I_API_KEY": name}) for name in ("secret\n", " ", "")}
    assert keys == {"secret\n": "secret", " ": None, "": None} and api_key_of({}) is None


def conversation(server, *requests):
    """Send requests at once on one connection; return all that is answered until the server closes it."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall("".join(requests).encode())
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(2**16), b"")).decode()


def test_what_is_left_of_a_request_is_not_taken_for_the_next_one():
    hidden = "GET /metrics HTTP/1.1\r\n\r\n"
    with served(Drawing()) as server:
        for start in (
            f"GET /health HTTP/1.1\r\nContent-Length: {len(hidden)}",
            "GET /health HTTP/1.1\r\nTransfer-Encoding: chunked",
            f"POST /nowhere HTTP/1.1\r\nContent-Length: {len(hidden)}",
            "POST /v1/images/generations HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 0"
            "\r\nTransfer-Encoding: chunked",
            f"GET /health HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: {len(hidden)}",
            f"GET /health HTTP/1.1\r\nContent-Length : {len(hidden)}",
            "POST /v1/images/generations HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2"
            f"\r\nContent-Length: {len(hidden) + 2}",
        ):
            said = conversation(server, start, "\r\n\r\n", hidden)
            assert said.count("HTTP/1.1 ") == 1 and "Connection: close" in said
        assert conversation(server, "GET /health HTTP/1.1\r\n\r\n" * 2).count("HTTP/1.1 200") == 2


def test_a_body_that_is_too_large_is_answered_though_it_is_not_read():
    with served(Drawing(), api_key="secret") as server:
        for path, status in (("/v1/images/generations", 413), ("/v1/images/edits", 404)):
            answer = ask(server, "POST", path, " " * 2**23, Authorization="Bearer secret")
            assert (answer[0], answer[1]["error"]["type"]) == (status, "invalid_request_error")
        assert ask(server, "POST", "/v1/images/generations", " " * 2**23)[0] == 401


def test_each_method_gets_an_answer():
    with served(Drawing()) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        for path, status in (("/health", 200), ("/v1/models/other", 404), ("/health", 200)):
            connection.request("HEAD", path)
            answer = connection.getresponse()
            # Of the length that GET's content would have; a part of it would be taken for the next answer.
            assert answer.status == status and int(answer.getheader("Content-Length")) > 0
            assert answer.read() == b""
        for method in ("OPTIONS", "PUT", "DELETE", "PATCH", "GET"):
            connection.request(method, "/v1/images/generations")
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("Allow")) == (405, "POST")
            assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"
        connection.close()


def test_fifty_clients_lose_nothing_and_are_drawn_in_batches():
    draw = Drawing()
    with served(draw) as server, ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(lambda seed: images(server, n=2, seed=10 * seed), range(50)))
    assert all(status == 200 for status, _ in answers)
    assert [drawn(answer) for _, answer in answers] == [
        [f"a cat {10 * seed}", f"a cat {10 * seed + 1}"] for seed in range(50)
    ]
    assert sum(map(len, draw.batches)) == 100
    assert max(map(len, draw.batches)) == 4
    assert BACKLOG >= 50


def test_more_than_may_wait_are_told_to_come_again():
    draw = Drawing()
    draw.go.clear()
    with served(draw, most_waiting=4) as server, ThreadPoolExecutor(2) as clients:
        first = clients.submit(images, server, n=4, seed=0)  # taken at once by the drawing thread
        until(lambda: server.service.waiting.num_drawing == 4)
        second = clients.submit(images, server, n=4, seed=4)
        until(lambda: len(server.service.waiting) == 4)
        status, answer = images(server)
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        draw.go.set()
        assert first.result()[0] == second.result()[0] == 200


def until(is_so):
    end = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_failed_batch_is_said_and_the_next_is_drawn():
    with served(Drawing()) as server:
        status, answer = images(server, prompt="fail")
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert images(server)[0] == 200


@pytest.mark.parametrize("is_killed", [False, True])
def test_nothing_is_drawn_for_a_client_that_has_left(is_killed):
    draw = Drawing()
    draw.go.clear()
    with served(draw) as server, ThreadPoolExecutor(1) as clients:
        held = clients.submit(images, server, n=4, prompt="held")
        until(lambda: server.service.waiting.num_drawing == 4)
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        body = json.dumps({"prompt": "left", "n": 2})
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        until(lambda: len(server.service.waiting) == 2)
        # With a linger time of 0 the kernel resets the connection, as it does for a process that was killed.
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", is_killed, 0))
        connection.close()
        until(lambda: 'status="499"' in server.service.meters.text(waiting=0))
        assert not len(server.service.waiting)  # others may take the places, though the batch goes on
        assert "t2i_cancelled_images_total 2" in server.service.meters.text(waiting=0)
        draw.go.set()
        assert held.result()[0] == 200
        assert images(server)[0] == 200
    assert not any("left" in batch for batch in draw.batches)


def test_a_stop_draws_what_waits_and_refuses_the_rest():
    draw = Drawing()
    draw.go.clear()
    with ThreadPoolExecutor(3) as clients:
        with served(draw) as server:
            asked = [clients.submit(images, server, n=4, seed=seed) for seed in (0, 4)]
            until(lambda: (server.service.waiting.num_drawing, len(server.service.waiting)) == (4, 4))
            release = threading.Thread(target=refused_then_released, args=(server, draw))
            release.start()
        release.join()
        assert [drawn(each.result()[1]) for each in asked] == [
            [f"a cat {seed + index}" for index in range(4)] for seed in (0, 4)
        ]


def refused_then_released(server, draw):
    until(lambda: server.is_stopping)
    time.sleep(0.1)  # the queue is closed right after
    try:
        assert images(server)[0] == 503
        assert ask(server, "GET", "/health")[0] == 503
    finally:
        draw.go.set()


def test_a_thread_that_cannot_be_started_takes_no_place_for_good(monkeypatch):
    with served(Drawing()) as server:
        with monkeypatch.context() as patch:

            def refused(self):
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", refused)
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
                    assert connection.recv(2**16).startswith(b"HTTP/1.1 503")
        assert server._slots._value == server._slots._initial_value
        assert ask(server, "GET", "/health")[0] == 200
