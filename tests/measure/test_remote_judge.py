"""Judges behind HTTP, as a stub on loopback that speaks the wire of UniRL's reward service."""

import socket
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from t2i.errors import UserError
from t2i.measure.remote_judge import ask, check_revision, check_service, headline

IMAGES = [np.full((8, 8, 3), value, dtype=np.uint8) for value in range(0, 200, 10)]
CAPTIONS = [f"caption {place}" for place, _ in enumerate(IMAGES)]


def test_each_image_is_scored_under_its_caption(service, judge, tmp_path, capsys):
    Image.fromarray(IMAGES[3]).save(tmp_path / "a.png")
    images = [*IMAGES[:3], tmp_path / "a.png", *IMAGES[4:]]
    answers = ask(judge, images, CAPTIONS, description="judge of model")
    assert "judge of model: 100%" in capsys.readouterr().err
    wanted = [10.0 * place + 100 * len(caption) for place, caption in enumerate(CAPTIONS)]
    assert [each["hpsv3"] for each in answers.scores] == wanted
    assert answers.means() == {"hpsv3": np.mean(wanted), "hpsv3_style": 1}
    # In requests of eight, on the wire that the service knows.
    assert [len(body["requests"]) for body in service.bodies] == [8, 8, 4]
    assert set(service.bodies[0]["requests"][0]) == {"history", "required_rewards", "metadata"}
    assert headline(answers.scores[1], key="hpsv3") == wanted[1]
    assert headline({"style": 2.0, "content": 3.0}, key="hpsv3") == 2


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


def test_only_images_without_a_score_are_asked_for_again(service, judge, tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(IMAGES[1]).save(file)
    images = [IMAGES[0], file, *IMAGES[2:]]
    score = {"hpsv3": {"hpsv3": 7.0, "style": 1}}
    timed_out = {"results": [score, {}, *[score] * 6], "errors": [{}, {"hpsv3": "timeout"}, *[{}] * 6]}
    service.answers = [(200, timed_out), (200, b'{"results": [{"hpsv3": {"hpsv3": NaN}}]}')]
    answers = ask(judge, images, CAPTIONS)
    assert [each["hpsv3"] for each in answers.scores[:8]] == [7, 10 + 100 * len(CAPTIONS[1]), *[7] * 6]
    assert [len(body["requests"]) for body in service.bodies] == [8, 1, 1, 8, 4]
    service.answers = [
        (200, timed_out),
        *[(200, b'{"results": [{}], "errors": [{"hpsv3": "too dark"}]}')] * 2,
    ]
    with pytest.raises(
        UserError, match=r"did not score 1 of 8 images by hpsv3 in 3 tries:\n.*a\.png, 'caption 1': too"
    ):
        ask(judge, images, CAPTIONS)


def test_a_second_try_asks_for_nothing_that_was_answered(service, judge, tmp_path):
    kept = replace(judge, answers=tmp_path / "out" / "answers.jsonl")
    broken = (200, {"results": [{}] * 8, "errors": [{"hpsv3": "too dark"}] * 8})
    service.answers = [(200, service.score_of(IMAGES[:8], CAPTIONS[:8])), *[broken] * 3]
    with pytest.raises(UserError, match=r"image 8, 'caption 8': too dark(.|\n)*image 10"):
        ask(kept, IMAGES, CAPTIONS)
    with kept.answers.open("a") as file:
        file.write('{"key": "cut o')  # the process was killed while it wrote
    service.bodies.clear()
    answers = ask(kept, IMAGES, CAPTIONS)
    assert [len(body["requests"]) for body in service.bodies] == [8, 4]
    assert answers == ask(judge, IMAGES, CAPTIONS)
    service.bodies.clear()
    assert ask(kept, IMAGES, CAPTIONS) == answers and not service.bodies
    # Another revision, caption or image is another question.
    ask(replace(kept, revision="v2.1"), IMAGES[:1], CAPTIONS[:1])
    ask(replace(kept, service_revision=""), IMAGES[:2], CAPTIONS[1::-1])
    assert [len(body["requests"]) for body in service.bodies] == [1, 2]


BAD = {
    "is not JSON": b"<html>",
    "holds list": b"[]",
    "expected 2 results": {"results": [{"hpsv3": {"hpsv3": 1}}]},
    "CUDA out of memory": {"results": [{}, {}], "errors": [{"hpsv3": "CUDA out of memory"}, {}]},
    r"did not score 2 of 2 images by hpsv3": {"results": [{"hpsv3": {}}, {"hpsv3": {}}]},
    r"NaN.*expected finite": b'{"results": [{"hpsv3": {"hpsv3": NaN}}, {"hpsv3": {"hpsv3": NaN}}]}',
    r"true.*expected finite": {"results": [{"hpsv3": {"hpsv3": True}}] * 2},
    r"null.*expected finite": {"results": [{"hpsv3": {"hpsv3": None}}] * 2},
    r"1000.*expected finite": {"results": [{"hpsv3": {"hpsv3": 10**400}}] * 2},
    "from image to image": {"results": [{"hpsv3": {"a": 1}}, {"hpsv3": {"b": 1}}]},
}


@pytest.mark.parametrize("said", BAD)
def test_bad_answers_are_refused_by_what_they_say(said, service, judge):
    service.answers = [(200, BAD[said])] * 3
    with pytest.raises(UserError, match=said):
        ask(judge, IMAGES[:2], CAPTIONS[:2])


def test_a_judge_is_named_by_both_revisions_and_its_prompts(service, judge):
    named = judge.protocol({""}, captions=CAPTIONS)
    assert (named["reward"], named["revision"]) == ("hpsv3", "v3.0") and "service_revision" not in named
    assert judge.protocol(set(), captions=CAPTIONS[1:])["prompts_sha256"] != named["prompts_sha256"]
    with pytest.raises(UserError, match=r"is not stated; expected one\. Name it: --judges hpsv3=REVISION"):
        check_revision(replace(judge, revision=""))
    # A wrapper's version, as the service states it, contradicts no revision of weights, as the user does.
    service.revision = "1"
    checked = check_revision(judge)
    both = checked.protocol(set(), captions=CAPTIONS)
    assert (both["revision"], both["service_revision"], checked.name) == (
        "v3.0",
        "1",
        "hpsv3 v3.0 (service: 1)",
    )
    unnamed = check_revision(replace(judge, revision=""))
    assert unnamed.name == "hpsv3 (service: 1)"
    assert "revision" not in unnamed.protocol({"1"}, captions=CAPTIONS)
    with pytest.raises(UserError, match="states the revisions 1 and 2; expected one"):
        judge.protocol({"1", "2"}, captions=CAPTIONS)


def test_a_service_that_changes_while_it_is_used_is_noticed(service, judge):
    checked = check_revision(judge)
    service.revision = "2"
    with pytest.raises(UserError, match="now states revision 2 of hpsv3; at first it stated none"):
        ask(checked, IMAGES[:1], CAPTIONS[:1])


def test_a_service_that_states_its_revision_no_more_is_another_one(service, judge):
    service.revision = "1"
    checked = check_revision(judge)
    # An answer without any score says nothing of who gave it.
    service.answers = [(200, {"results": [{}], "errors": [{"hpsv3": "busy"}]})]
    assert ask(checked, IMAGES[:1], CAPTIONS[:1]).revision == "1"
    service.revision = ""
    with pytest.raises(UserError, match="now states revision none of hpsv3; at first it stated 1"):
        ask(checked, IMAGES[:1], CAPTIONS[:1])


def test_identities_of_another_form_state_no_revision(service, judge):
    service.answers = [(200, service.score_of(IMAGES[:1], CAPTIONS[:1]) | {"identities": 5})]
    assert ask(judge, IMAGES[:1], CAPTIONS[:1]).revision == ""


@pytest.mark.parametrize("reward", ["clip", "judge", "clip_score", "features", "fd_inception", "mind"])
def test_a_reward_that_is_called_as_an_own_measure_is_another_one(service, judge, reward):
    named = replace(judge, reward=reward)
    answers = ask(named, IMAGES[:1], CAPTIONS[:1])
    assert set(answers.scores[0]) == {f"reward_{reward}", f"reward_{reward}_style"}
    assert service.bodies[0]["requests"][0]["required_rewards"] == [reward]
    assert headline(answers.scores[0], key=named.key) == answers.scores[0][f"reward_{reward}"]


@pytest.mark.parametrize(
    "url",
    [
        "http://[bad",
        "http://",
        "http://a:b",
        "http://ü",
        "file:///x",
        "localhost:8080",
        "http://judge..local",
        f"http://{'a' * 64}",
    ],
)
def test_what_is_no_address_is_refused(judge, url):
    with pytest.raises(UserError, match="expected an address such as"):
        replace(judge, url=url)


BREAKS = {
    "an error without its text": (
        b"HTTP/1.1 503 Busy\r\nContent-Length: 50\r\n\r\nsta",
        "reset",
        "status 503",
    ),
    "an error whose text stalls": (b"HTTP/1.1 503 Busy\r\nContent-Length: 50\r\n\r\n", "stall", "status 503"),
    "an answer that is cut": (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "close", "IncompleteRead"),
    "an answer that trickles": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n",
        "trickle",
        "not whole after",
    ),
}


@pytest.mark.parametrize("how", BREAKS)
def test_an_answer_that_breaks_is_asked_for_again_and_then_said(judge, how):
    begun, end, said = BREAKS[how]
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = []

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                asked.append(how)
                with connection:
                    connection.recv(65536)
                    connection.sendall(begun)
                    if end == "reset":
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.settimeout(0.05)
                    while end in ("stall", "trickle"):
                        try:
                            if not connection.recv(1):  # the client has gone
                                break
                        except TimeoutError:
                            connection.sendall(b" " if end == "trickle" else b"")
                        except OSError:
                            break

        threading.Thread(target=serve, daemon=True).start()
        broken = replace(judge, url=f"http://127.0.0.1:{server.getsockname()[1]}", timeout_seconds=0.3)
        with pytest.raises(UserError, match=f"did not answer 3 times, last with: .*{said}"):
            check_service(broken)
        assert len(asked) == 3


def test_images_are_not_sent_through_a_proxy(service, judge, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert len(ask(judge, IMAGES[:1], CAPTIONS[:1]).scores) == 1
