"""Who is let in, what the page needs, and how it ends; the page itself is in test_browser.py."""

import asyncio
import importlib.util
import signal
import urllib.error
import urllib.request

import pytest
from play_page import served

from t2i.errors import UserError
from t2i.play.opening import check_gradio
from t2i.play.serving import HEADERS, Door, listen

has_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="pip install '.[play]' for these"
)


async def page(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": b"the page"})


def asked(host, *, is_open):
    """Return the status and the headers that a request for a host gets."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", host.encode())]}
    asyncio.run(Door(page, is_open=is_open)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_this_machine_is_let_in(host):
    status, headers = asked(host, is_open=False)
    assert status == 200 and headers[b"content-type"] == b"text/html"
    assert headers.items() >= HEADERS.items()


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:7860", ""])
def test_a_page_of_another_site_is_not_let_in_unless_a_password_is_asked(host):
    assert asked(host, is_open=False)[0] == 403
    assert asked(host, is_open=True)[0] == 200


def test_a_browser_loads_nothing_of_elsewhere():
    policy = HEADERS[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy


def test_a_port_that_is_taken_is_a_sentence():
    with listen("127.0.0.1", 0) as first, pytest.raises(UserError, match="cannot be listened at"):
        listen("127.0.0.1", first.getsockname()[1])


def test_without_gradio_the_command_names_what_to_install(monkeypatch, call, model_folder, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 't2i\[play\]'"):
        check_gradio()
    assert call("launchers/play.py", model_folder) == 2
    assert "pip install 't2i[play]'" in capsys.readouterr().err


@has_gradio
def test_another_address_without_a_key_is_refused(monkeypatch, call, model_folder, capsys):
    monkeypatch.delenv("T2I_API_KEY", raising=False)
    assert call("launchers/play.py", model_folder, "--host", "0.0.0.0") == 2
    assert "T2I_API_KEY" in capsys.readouterr().err


@has_gradio
@pytest.mark.slow
def test_the_page_is_whole_without_a_network_and_ends_at_ctrl_c(model_folder):
    with served(model_folder) as url:
        with urllib.request.urlopen(url, timeout=60) as answer:
            text = answer.read().decode()
        assert "fonts.googleapis" not in text and "cdnjs" not in text
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "evil.example"}), timeout=60)


@has_gradio
@pytest.mark.slow
def test_with_a_key_a_password_is_asked_for(model_folder):
    with served(model_folder, stop=signal.SIGTERM, T2I_API_KEY="secret") as url:
        assert status_of(f"{url}/config") == 401
        for password, status in (("guess", 400), ("secret", 200)):
            form = f"username=me&password={password}".encode()
            assert status_of(f"{url}/login", data=form) == status


def status_of(url, data=None):
    try:
        return urllib.request.urlopen(url, data=data, timeout=60).status
    except urllib.error.HTTPError as refused:
        return refused.code
