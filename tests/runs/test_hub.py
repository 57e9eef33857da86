"""An exported folder on a hub: diffusers' lines download what they need, and draw."""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import processes
import pytest

from t2i.runs.export import export
from t2i.runs.loading import open_model

pytestmark = pytest.mark.slow
COMMIT = "c0ffee" + "0" * 34
LINES = """
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("user/a-model", trust_remote_code=True)
assert "t2i" not in sys.modules
print(pipe("a cat", num_images_per_prompt=2).images[1].size)
"""


@pytest.fixture
def hub(model_folder, tmp_path):
    """Serve an export as huggingface.co serves a repository, and yield the address."""
    folder = tmp_path / "exported"
    export(open_model(str(model_folder), needs_images=True), out=folder, command="a test")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            _, _, name = self.path.split("?")[0].partition("/resolve/")
            path = files.get(name.partition("/")[2])
            if self.path.startswith("/api/models/user/a-model"):
                siblings = [{"rfilename": name} for name in files]
                body = json.dumps({"id": "user/a-model", "sha": COMMIT, "siblings": siblings}).encode()
            else:
                body = path.read_bytes() if path else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_name_of_the_hub_is_downloaded_and_drawn_from(hub, tmp_path):
    environment = processes.environment(HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    done = processes.run(
        [sys.executable, "-c", LINES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("(32, 32)"), done.stderr[-3000:]
