"""The ledger of a real server: every request once, totals as vLLM counts them, and nothing lost when all is killed."""

import hashlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from borg_serve.usage.drain import drain
from borg_serve.usage.ledger import Ledger
from tests.engine.process import Server, running
from tests.process.ledgers import Postgres, postgres
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
NAMES = ("anna", "ben", "operator")
MONTH = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("usage")


@pytest.fixture(scope="module")
def counted(checkpoint: Path, database: Postgres, folder: Path) -> Iterator[Server]:
    """Two API processes, three keys, and a ledger in PostgreSQL."""
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in NAMES}
    entries: list[dict[str, Any]] = [{"name": name, "sha256": digest} for name, digest in digests.items()]
    entries[1]["limits"] = {"tokens_per_day": 400}
    entries[2]["metrics"] = True
    (folder / "keys.yaml").write_text(yaml.safe_dump(entries))
    settings = (
        f"model.path={checkpoint}",
        f"server.keys={folder / 'keys.yaml'}",
        "server.processes=2",
        "engine.kv_cache_memory_bytes=1073741824",
        f"usage.url={database.url}",
        f"usage.spool={folder / 'spool'}",
    )
    with running(folder, *(f"--set={item}" for item in settings)) as server:
        yield server


def body(**more: Any) -> dict[str, Any]:
    text = " ".join(random.choices(["red", "green", "blue", "grey", "gold", "pink"], k=random.randint(1, 20)))
    return {"messages": [{"role": "user", "content": text}], "ignore_eos": True, **more}


def post(server: Server, key: str, sent: dict[str, Any], path: str = CHAT) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(server.base_url + path, json=sent, headers=headers, timeout=180)


def leave(server: Server, key: str, sent: dict[str, Any]) -> None:
    """Ask, and close the connection: a stream's after some tokens, another's after some seconds."""
    headers, wait_s = {"authorization": f"Bearer {key}"}, 180.0 if sent.get("stream") else 3.0
    url = server.base_url + CHAT
    with suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=sent, headers=headers, timeout=wait_s) as got:
        text = ""
        for piece in got.iter_text():
            text += piece
            if text.count("\n\n") > 4:
                break


def metrics(server: Server) -> Counter[str]:
    """Sums over labels, the watchdog's requests taken off."""
    text = httpx.get(f"{server.base_url}/metrics", headers={"authorization": "Bearer operator"}, timeout=60).text
    found: Counter[str] = Counter()
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if not line.startswith("#"):
            found[name.partition("{")[0]] += int(float(value))
            if name.startswith("borg_heartbeat_tokens_total"):
                found["heartbeat " + ("prompt" if '"prompt"' in name else "output")] += int(float(value))
    found["prompt"] = found["vllm:prompt_tokens_total"] - found["heartbeat prompt"]
    found["output"] = found["vllm:generation_tokens_total"] - found["heartbeat output"]
    return found


def total(url: str, key: str | None = None) -> dict[str, Any]:
    ledger = Ledger(url)
    (row,) = ledger.sums(MONTH, None, (), key)
    ledger.close()
    return row


def idle(server: Server, folder: Path) -> bool:
    now = metrics(server)
    return not now["borg_inflight"] and not now["vllm:num_requests_running"] and not any((folder / "spool").iterdir())


def test_usage_equals_what_vllm_counts_aborted_requests_included(
    counted: Server, database: Postgres, folder: Path
) -> None:
    before, billed = metrics(counted), total(database.url)
    with ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(post, counted, "anna", body(max_tokens=5, stream=bool(n % 2))) for n in range(6)]
        left = [pool.submit(leave, counted, "anna", body(max_tokens=500, stream=bool(n % 2))) for n in range(4)]
        for other in ("/v1/messages", "/v1/responses"):
            asked = {"model": "borg-merge-v1", "max_tokens": 4, **({"input": "Hi"} if "resp" in other else body())}
            asked.pop("ignore_eos", None)
            if "resp" in other:
                asked["max_output_tokens"] = asked.pop("max_tokens")
            whole.append(pool.submit(post, counted, "anna", asked, other))
        assert [answer.result().status_code for answer in whole] == [200] * 8
        for gone in left:
            gone.result()
        assert post(counted, "anna", {"messages": "none"}).status_code == 400
    wait_until("nothing runs, and nothing waits", lambda: idle(counted, folder), 60)
    now, found = metrics(counted), total(database.url)
    grown = {name: found[name] - billed[name] for name in found}
    assert (grown["requests"], grown["aborted"], grown["refused"]) == (12, 4, 1)
    assert grown["prompt_tokens"] + grown["identity_tokens"] == now["prompt"] - before["prompt"]
    assert grown["output_tokens"] == now["output"] - before["output"]
    assert grown["output_tokens"] >= 6 * 5 + 2 * 4 + 2 * 3
    assert 0 < grown["engine_s"] < 600
    assert now["borg_key_requests_total"] - before["borg_key_requests_total"] == 13


def test_usage_is_shown_to_its_own_key_alone(counted: Server, folder: Path) -> None:
    post(counted, "ben", body(max_tokens=3))
    wait_until("it is in the ledger", lambda: idle(counted, folder), 60)

    def get(key: str, path: str) -> httpx.Response:
        return httpx.get(f"{counted.base_url}{path}", headers={"authorization": f"Bearer {key}"}, timeout=60)

    used = get("ben", "/v1/usage").json()
    assert (used["key"], [row["requests"] for row in used["data"]]) == ("ben", [1])
    assert get("operator", "/v1/usage?since=2026-11-01&by=month").json()["data"] == []
    assert get("ben", "/v1/usage?since=yesterday").json()["error"]["param"] == "since"
    refused = get("ben", "/metrics")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_metrics")


def test_usage_is_bounded_by_a_budget_over_all_processes(counted: Server, folder: Path) -> None:
    for _ in range(30):
        answer = post(counted, "ben", body(max_tokens=40))
        if answer.status_code != 200:
            break
        assert int(answer.headers["x-ratelimit-limit-tokens"]) == 400
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "insufficient_quota"
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
    assert answer.headers["x-should-retry"] == "false"
    assert post(counted, "anna", body(max_tokens=1)).status_code == 200


def test_usage_waits_for_a_database_that_is_away_and_refuses_nobody(
    counted: Server, database: Postgres, folder: Path
) -> None:
    wait_until("nothing waits", lambda: idle(counted, folder), 60)
    before = total(database.url, "anna")
    database.kill()
    answers = [post(counted, "anna", body(max_tokens=2)) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 6
    assert any((folder / "spool").iterdir())
    away = httpx.get(f"{counted.base_url}/v1/usage", headers={"authorization": "Bearer anna"}, timeout=60)
    assert (away.status_code, away.json()["error"]["code"]) == (503, "ledger_away")
    database.start()
    expected = before["requests"] + 6
    wait_until("the ledger has all of it", lambda: total(database.url, "anna")["requests"] == expected, 60)
    assert total(database.url, "anna")["output_tokens"] == before["output_tokens"] + 12


def test_usage_survives_the_kill_of_server_and_database_under_load(
    counted: Server, database: Postgres, folder: Path
) -> None:
    """Last of those that share the server: it ends it."""
    wait_until("nothing waits", lambda: idle(counted, folder), 60)
    before = total(database.url, "anna")
    answered: Counter[str] = Counter()
    lock, killed = threading.Lock(), threading.Event()
    users = 6

    def user(number: int) -> None:
        while not killed.is_set():
            try:
                answer = post(counted, "anna", body(max_tokens=3, stream=bool(number % 2)))
            except httpx.TransportError:
                return
            if answer.status_code == 200 and (number % 2 == 0 or answer.text.endswith("data: [DONE]\n\n")):
                with lock:
                    answered["requests"] += 1

    with ThreadPoolExecutor(users) as pool:
        working = [pool.submit(user, number) for number in range(users)]
        time.sleep(6)
        database.kill()
        time.sleep(6)
        family = counted.family()
        os.kill(counted.pid, signal.SIGKILL)
        for process in family:
            with suppress(Exception):
                process.kill()
        killed.set()
        for one in working:
            one.result()
    assert answered["requests"] >= 4
    database.start()
    ledger = Ledger(database.url)
    wait_until("the next server's drain", lambda: drain(folder / "spool", ledger), 60)
    ledger.close()
    found = total(database.url, "anna")
    requests = found["requests"] - before["requests"]
    assert answered["requests"] <= requests <= answered["requests"] + users
    finished = requests - (found["aborted"] - before["aborted"])
    assert found["output_tokens"] - before["output_tokens"] >= 3 * finished
    assert not any((folder / "spool").iterdir())
