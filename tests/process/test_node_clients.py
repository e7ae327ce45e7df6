"""Whatever is answered, the official clients for Node.js send back as history (I9); Python's are in tests/unit/api."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import npm
from tests.closure import Server, said
from tests.protocols import Part

PACKAGES = ("openai@7.59.0", "@anthropic-ai/sdk@1.14.0", "zod@4.6.7")
SCRIPT = Path(__file__).with_name("closure.mjs")
WAYS = 9
ANSWERS: dict[str, list[Part]] = {
    "text": [("", "Hello")],
    "a call": [("f", '{"a": "1"}')],
    "text and calls": [("", "let me see"), ("get_time", "{}"), ("f", '{"a": "b"}')],
}

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="no npm: `make system` as root installs it")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script beside the packages that it imports."""
    try:
        packages = npm.install(PACKAGES, "sdks-for-node")
    except RuntimeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("node")
    (folder / "node_modules").symlink_to(packages / "node_modules")
    return Path(shutil.copy(SCRIPT, folder))


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    answers = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            status, kind, body = answers.answer(self.path.partition("?")[0], raw)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield answers, f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_node_clients_send_an_answer_back(server: tuple[Server, str], script: Path, answer: list[Part]) -> None:
    answers, url = server
    answers.said, answers.finish = answer, "tool_calls" if answer[-1][0] else "stop"
    done = subprocess.run(["node", str(script), url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * WAYS
    text = "".join(piece for name, piece in answer if not name)
    expected = [("", text), *((name, json.loads(arguments)) for name, arguments in answer if name)]
    returned = [said(body) for body in answers.bodies if len(body["messages"]) > 1]
    assert returned == [expected] * (2 * WAYS)
