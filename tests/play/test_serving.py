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
from t2i.play.serving import HEADERS, Door
from t2i.serve.opening import listen

has_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="pip install '.[play]' for these"
)


async def page(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": b"the page"})


def asked(host, *, is_open, method="GET", **headers):
    """Return the status and the headers that a request for a host gets."""
    sent = []

    async def send(message):
        sent.append(message)

    others = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "headers": [(b"host", host.encode()), *others]}
    asyncio.run(Door(page, is_open=is_open)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860", "[::1]", "LocalHost"])
def test_this_machine_is_let_in(host):
    status, headers = asked(host, is_open=False)
    assert status == 200 and headers[b"content-type"] == b"text/html"
    assert headers.items() >= HEADERS.items()


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:7860", ""])
def test_a_page_of_another_site_is_not_let_in_unless_a_password_is_asked(host):
    assert asked(host, is_open=False)[0] == 403
    assert asked(host, is_open=True)[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example:7860"])
def test_a_form_of_another_site_is_not_let_in(origin):
    for method in ("GET", "POST"):
        assert asked("localhost:7860", is_open=False, method=method, origin=origin)[0] == 403
    for own in ("http://localhost:7860", "http://127.0.0.1", "https://[::1]:7860"):
        assert asked("localhost:7860", is_open=False, method="POST", origin=own)[0] == 200


def test_behind_a_password_a_link_of_another_site_is_let_in_and_nothing_else():
    def status(method, site, mode):
        # A proxy may give the page another name than the one that the browser knows.
        names = {"origin": "https://the.proxy", "sec_fetch_site": site, "sec_fetch_mode": mode}
        return asked("10.0.0.7:7860", is_open=True, method=method, **names)[0]

    assert status("GET", "cross-site", "navigate") == status("POST", "same-origin", "cors") == 200
    assert status("GET", "cross-site", "cors") == status("POST", "cross-site", "navigate") == 403


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
