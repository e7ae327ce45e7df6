"""What is kept of each generating request for the ledger: once, and before its client knows that it is whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

from borg_serve.api.progress import CURRENT, Progress
from borg_serve.gate.app import Gate
from borg_serve.gate.keys import KeyRing, new_key
from borg_serve.gate.request import Message, Receive, Scope, Send
from borg_serve.usage.spool import Spool
from tests import protocols
from tests.asgi import ANSWER, CHAT, QUESTION, STREAM, Application, Client, admission, document, make_gate

MESSAGES = "/v1/messages"
TURN = {"model": "borg-merge-v1", "max_tokens": 10, "messages": [{"role": "user", "content": "Hi"}]}


def spooled(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, str]:
    """A folder for entries; and a key, in `keys.yaml` beside it."""
    key, entry = new_key("anna")
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump(yaml.safe_load(entry)))
    return tmp_path / "spool", key


def gate(kept: tuple[Path, str], app: Any, **more: Any) -> Gate:
    made = make_gate(app, keys=KeyRing(kept[0].parent / "keys.yaml"), **more)
    made.spool = Spool(kept[0], 1 << 20)
    return made


async def ask(asked: Gate, kept: tuple[Path, str], body: Any = QUESTION, path: str = CHAT) -> Client:
    return await Client(asked, path, body, headers={"authorization": f"Bearer {kept[1]}"}).run()


async def test_account_keeps_a_whole_answer_with_the_identity_apart(kept: tuple[Path, str]) -> None:
    await ask(gate(kept, Application.whole(document())), kept)
    (entry,) = spooled(kept[0])
    assert entry.pop("ended_s") > 1.7e9
    assert entry.pop("engine_s") > 0
    expected = {"prompt_tokens": 10, "identity_tokens": 2320, "cached_tokens": 0, "output_tokens": 2}
    assert entry == {"key": "anna", "aborted": False, **expected}


class Watching:
    """Passes an answer on, and looks at each part whether the request has been kept before the client gets it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[bytes, int]] = []

    def __call__(self, send: Send) -> Send:
        async def watched(message: Message) -> None:
            if body := message.get("body"):
                self.seen.append((body, len(spooled(self.folder))))
            await send(message)

        return watched


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        (CHAT, QUESTION, b'"usage"'),
        (CHAT, STREAM, b"[DONE]"),
        (MESSAGES, {**TURN, "stream": True}, b"message_stop"),
        (MESSAGES, TURN, b'"stop_reason"'),
    ],
)
async def test_account_is_written_before_the_client_knows_the_end(
    kept: tuple[Path, str], path: str, body: dict[str, Any], last: bytes
) -> None:
    said = [("", "hi")]
    app = Application(*protocols.stream(said)) if body.get("stream") else Application.whole(protocols.document(said))
    asked, watching = gate(kept, app), Watching(kept[0])

    class Watched:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await asked(scope, receive, watching(send))

    client = await Client(Watched(), path, body, headers={"authorization": f"Bearer {kept[1]}"}).run()
    assert client.status == 200
    (kept_before,) = {count for part, count in watching.seen if last in part}
    assert kept_before == 1
    assert len(spooled(kept[0])) == 1


class Leaving(Application):
    """An engine that has written three tokens when its client leaves."""

    def __init__(self, tokens: int) -> None:
        super().__init__(60.0, *ANSWER)
        self.tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        progress = CURRENT.get()
        assert progress is not None
        progress.prompt_tokens, progress.cached_tokens = 2345, 2304

        def look(progress: Progress) -> None:
            progress.output_tokens = self.tokens

        progress.look = look
        await super().__call__(scope, receive, send)


@pytest.mark.parametrize("tokens", [0, 3])
async def test_account_of_an_aborted_request_has_what_the_engine_did(kept: tuple[Path, str], tokens: int) -> None:
    app = Leaving(tokens)
    asked = gate(kept, app)
    client = Client(asked, CHAT, QUESTION, headers={"authorization": f"Bearer {kept[1]}"}).begin()
    await client.until(lambda: app.running == 1)
    client.left.set()
    await client.ended()
    (entry,) = spooled(kept[0])
    assert (entry["aborted"], entry["output_tokens"]) == (True, tokens)
    assert entry["prompt_tokens"] + entry["identity_tokens"] == (2345 if tokens else 0)
    assert admission(asked).running == 0


async def test_account_counts_refusals_apart(kept: tuple[Path, str]) -> None:
    asked = gate(kept, Application(*ANSWER), concurrent=1, max_wait_s=0)
    for body in ({"messages": "none"}, b"{", {**QUESTION, "prompt": "raw"}):
        assert (await ask(asked, kept, body)).status == 400
    assert (await Client(asked, CHAT, QUESTION).run()).status == 401
    assert asked.spool is not None
    asked.spool.rotate()
    (line,) = spooled(kept[0])
    assert line["refused"] == {"anna": 3}, "a request without a key is nobody's"


async def test_account_tells_metrics_by_key(kept: tuple[Path, str]) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    def counts() -> list[float]:
        kinds = [value("borg_key_tokens_total", key="anna", kind=kind) for kind in ("prompt", "identity", "output")]
        return [*kinds, value("borg_key_requests_total", key="anna", outcome="ok")]

    before = counts()
    await ask(gate(kept, Application.whole(document())), kept)
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [10, 2320, 2, 1]
