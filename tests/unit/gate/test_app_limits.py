"""Keys, their limits, and slots in the engine, at the gate before an application that does as its script says."""

import asyncio
import json
import logging
import time
from pathlib import Path

import pytest
import yaml

from borg_serve.gate import app as gate_module
from borg_serve.gate.admission import Demand
from borg_serve.gate.keys import KeyRing, new_key
from borg_serve.gate.telemetry import Spent
from tests.asgi import ANSWER, CHAT, QUESTION, Application, Client, admission, document, make_gate
from tests.waiting import await_room_in_the_minute

LONG = Application.whole(document(), wait_s=60.0)


# ----------------------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def keys(tmp_path: Path) -> tuple[KeyRing, dict[str, str]]:
    """A ring of two keys, `free` and `bound`; and the keys by name."""
    made, entries = {}, []
    for name, limits in (("free", {}), ("bound", {"concurrent": 1, "requests_per_minute": 3})):
        made[name], entry = new_key(name)
        entries += [entry | {"limits": limits} for entry in yaml.safe_load(entry)]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump(entries))
    return KeyRing(tmp_path / "keys.yaml"), made


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer ", "Bearer borg-wrong", "Basic eA==", "borg-wrong"])
async def test_gate_with_keys_refuses_an_unknown_one(keys: tuple[KeyRing, dict[str, str]], value: str | None) -> None:
    app = Application(*ANSWER)
    gate = make_gate(app, keys=keys[0])
    headers = {} if value is None else {"authorization": value}
    for path, body in ((CHAT, QUESTION), ("/version", None), ("/metrics", None), ("/v1/models", None)):
        client = await Client(gate, path, body, headers=headers).run()
        assert (client.status, client.error["code"]) == (401, "invalid_api_key")
        assert client.headers["www-authenticate"] == "Bearer"
        assert client.received_before_answer == 0
    assert app.scopes == []
    for path in ("/health", "/ready"):
        assert (await Client(gate, path, headers=headers).run()).status == 200


async def test_gate_with_keys_logs_the_name_of_a_known_one(
    keys: tuple[KeyRing, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "borg_serve.access")
    gate = make_gate(Application.whole(document()), keys=keys[0])
    client = await Client(gate, CHAT, QUESTION, headers={"authorization": f"bearer {keys[1]['free']}"}).run()
    assert client.status == 200
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "borg_serve.access"]
    assert line["key"] == "free"
    assert keys[1]["free"] not in caplog.text
    assert (line["status"], line["outcome"], line["prompt_tokens"]) == (200, "ok", 2330)


async def test_gate_tells_a_key_over_its_limits_when_to_return(keys: tuple[KeyRing, dict[str, str]]) -> None:
    await_room_in_the_minute()
    gate = make_gate(Application.whole(document(), wait_s=0.2), keys=keys[0])
    headers = {"authorization": f"Bearer {keys[1]['bound']}"}
    first = Client(gate, CHAT, QUESTION, headers=headers).begin()
    await first.until(lambda: admission(gate).running == 1)
    second = await Client(gate, CHAT, QUESTION, headers=headers).run()
    assert (second.status, second.error["type"]) == (429, "rate_limit_error")
    assert second.headers["retry-after"] == "1"
    assert second.received_before_answer == 0, "before any work is done for it"
    assert (await first.ended()).status == 200
    for _ in range(2):
        assert (await Client(gate, CHAT, QUESTION, headers=headers).run()).status == 200
    third = await Client(gate, CHAT, QUESTION, headers=headers).run()
    assert third.status == 429
    assert 1 <= int(third.headers["retry-after"]) <= 121
    other = {"authorization": f"Bearer {keys[1]['free']}"}
    assert (await Client(gate, CHAT, QUESTION, headers=other).run()).status == 200


async def test_gate_charges_a_key_for_its_own_tokens_not_for_the_identity(tmp_path: Path) -> None:
    key, entry = new_key("bound")
    (entry_data,) = yaml.safe_load(entry)
    limits = {"tokens_per_minute": 25}  # an answer here costs 2,332 tokens, 2,320 of them the identity's
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([entry_data | {"limits": limits}]))
    await_room_in_the_minute()
    gate = make_gate(Application.whole(document()), keys=KeyRing(tmp_path / "keys.yaml"))
    headers = {"authorization": f"Bearer {key}"}
    statuses = [(await Client(gate, CHAT, QUESTION, headers=headers).run()).status for _ in range(4)]
    assert statuses == [200, 200, 200, 429]


# ---------------------------------------------------------------------------------------------------------------- slots


async def test_gate_that_is_full_refuses_before_it_reads_the_body() -> None:
    gate = make_gate(LONG, concurrent=1, max_wait_s=0)
    first = Client(gate, CHAT, QUESTION).begin()
    await first.until(lambda: LONG.running == 1)
    second = await Client(gate, CHAT, QUESTION).run()
    assert (second.status, second.error["code"]) == (503, "busy")
    assert 1 <= int(second.headers["retry-after"]) <= 60
    assert second.received_before_answer == 0
    first.left.set()
    await first.ended()
    assert LONG.running == 0
    assert first.sent == []


async def test_gate_lets_a_request_wait_for_its_slot() -> None:
    app = Application.whole(document(), wait_s=0.1)
    gate = make_gate(app, concurrent=1)
    clients = [Client(gate, CHAT, QUESTION).begin() for _ in range(3)]
    for client in clients:
        assert (await client.ended()).status == 200
        assert app.running <= 1
    assert (admission(gate).running, admission(gate).waiting) == (0, 0)


async def test_gate_counts_every_choice_as_a_slot() -> None:
    app = Application.whole(document(), wait_s=60.0)
    gate = make_gate(app, concurrent=4)
    client = Client(gate, CHAT, QUESTION | {"n": 3}).begin()
    await client.until(lambda: app.running == 1)
    assert admission(gate).running == 3
    client.left.set()
    await client.ended()
    assert admission(gate).running == 0


@pytest.mark.parametrize("how", ["leaves", "deadline"])
async def test_gate_forgets_a_request_that_waits_no_longer(how: str) -> None:
    app = Application(*ANSWER)
    gate = make_gate(app, concurrent=1, deadline_s=0.1 if how == "deadline" else 30)
    held = await admission(gate).acquire(None, Demand(1, 0, 1))
    waiting = Client(gate, CHAT, QUESTION).begin()
    await waiting.until(lambda: admission(gate).waiting == 1)
    if how == "leaves":
        waiting.left.set()
        await waiting.ended()
        assert waiting.sent == []
    else:
        assert (await waiting.ended()).status == 504
    assert (admission(gate).running, admission(gate).waiting) == (1, 0)
    admission(gate).release(held, Spent())
    assert app.scopes == []


async def test_gate_refuses_later_whose_clients_come_back_at_once(
    keys: tuple[KeyRing, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "QUICK_REFUSALS", 3)
    monkeypatch.setattr(gate_module, "LATE_REFUSAL_S", 0.3)
    gate = make_gate(LONG, keys=keys[0], concurrent=1, max_wait_s=0)
    headers = {"authorization": f"Bearer {keys[1]['free']}"}
    first = Client(gate, CHAT, QUESTION, headers=headers).begin()
    await first.until(lambda: LONG.running == 1)
    while time.monotonic() % 1 > 0.5:  # all in one second
        await asyncio.sleep(0.01)
    begun = time.monotonic()
    for _ in range(3):
        assert (await Client(gate, CHAT, QUESTION, headers=headers).run()).status == 503
    assert time.monotonic() - begun < 0.25
    assert (await Client(gate, CHAT, QUESTION, headers=headers).run()).status == 503
    assert time.monotonic() - begun >= 0.3
    first.left.set()
    await first.ended()
