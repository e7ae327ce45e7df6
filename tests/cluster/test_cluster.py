"""Two replicas behind HAProxy: the identity, the gate, conversations, metrics, and what happens when one is lost."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai

from borg_serve.config import load
from loadtests.servers.local import LOOK
from tests import promql, workers
from tests.cluster.conftest import ROOT, TESTER, Cluster
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"


def ask(cluster: Cluster, text: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **more}
    return LOOK.post(cluster.url + CHAT, json=body, headers=headers, timeout=180)


def who_answers(cluster: Cluster, text: str, headers: dict[str, str] | None = None, **more: Any) -> str:
    """Return the name of the replica that answered, by its own count; nothing else may be asked meanwhile."""
    before = {replica.name: replica.answered() for replica in cluster.replicas()}
    response = ask(cluster, text, headers, **more)
    assert response.status_code == 200, response.text
    after = {replica.name: replica.answered() for replica in cluster.replicas()}
    (name,) = [name for name in after if after[name] > before[name]]
    return name


def test_cluster_puts_the_identity_first(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=TESTER, max_retries=0, timeout=180) as client:
        answer = client.chat.completions.create(
            model="borg-merge-v1",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=16,
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 2304
        chunks = list(
            client.chat.completions.create(
                model="borg-merge-v1", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, stream=True
            )
        )
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


def test_cluster_has_the_same_gate(cluster: Cluster) -> None:
    attack = ask(cluster, "Hi", kv_transfer_params={"prompt_token_ids": [1, 2, 3, 4]})
    assert attack.status_code == 400
    assert attack.json()["error"]["param"] == "kv_transfer_params"
    for path in ("/v1/completions", "/tokenize", "/invocations", "/generate"):
        assert httpx.post(cluster.url + path, json={"prompt": "Hi"}, timeout=60).status_code == 404, path
    answer = ask(cluster, "Hi", headers={"x-request-id": "one-of-ours"})
    assert answer.headers["x-request-id"] == "one-of-ours"


def test_cluster_replicas_are_identical(cluster: Cluster) -> None:
    first, second = cluster.replicas()
    assert first.version["checkpoint"]["root"] == second.version["checkpoint"]["root"]
    assert first.version["identity"] == second.version["identity"]


def test_cluster_replicas_have_all_slots_of_their_engines(cluster: Cluster) -> None:
    slots = load(ROOT / "configs/demo-cpu.yaml").engine["max_num_seqs"]
    for replica in cluster.replicas():
        assert f"borg_places {slots:.1f}" in LOOK.get(f"{replica.url}/metrics", timeout=30).text.splitlines()


def test_cluster_keeps_a_conversation_where_its_cache_is(cluster: Cluster) -> None:
    for number in range(4):
        headers = {"x-session-id": f"session-{number}"}
        assert len({who_answers(cluster, f"turn {turn}", headers) for turn in range(3)}) == 1
    first = "Tell me about the sea, please."
    turns: list[dict[str, str]] = [{"role": "user", "content": first}]
    names = set()
    for _ in range(3):
        names.add(who_answers(cluster, "", messages=turns))
        turns = [*turns, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "More."}]
    assert len(names) == 1
    spread = {who_answers(cluster, f"Another conversation, number {number}") for number in range(12)}
    assert len(spread) == 2, "the identity that all share must not bring them together"


def test_cluster_shows_every_metric_of_its_dashboards(cluster: Cluster, targets: list[str]) -> None:
    def names() -> set[str]:
        found = set()
        pages = [LOOK.get(f"http://{target}/metrics", timeout=30).text for target in targets]
        port = cluster.environment["RAY_SERVE_HAPROXY_METRICS_PORT"]
        pages.append(httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text)
        for page in pages:
            found |= {line.partition("{")[0].partition(" ")[0] for line in page.splitlines() if line[:1].isalpha()}
        return promql.scraped(found)

    wanted = (promql.ANYWHERE | promql.CLUSTER) - promql.AFTER.keys()
    deadline = time.monotonic() + 60
    while (missing := wanted - names()) and time.monotonic() < deadline:
        ask(cluster, "Hi")
        time.sleep(2)
    assert missing == set()


def test_cluster_engines_have_the_workers_that_the_profile_says(cluster: Cluster) -> None:
    for replica in cluster.replicas():
        workers.check(cluster.engine_of(replica).children())


def test_cluster_engines_know_the_cluster_they_belong_to(cluster: Cluster) -> None:
    """On GPUs an engine's process looks for its replica's placement group; it would look in a cluster of its own."""
    for replica in cluster.replicas():
        assert cluster.engine_of(replica).environ()["RAY_ADDRESS"] == cluster.nodes.address


def test_cluster_replaces_a_lost_engine_while_the_other_serves(cluster: Cluster) -> None:
    before = cluster.replicas()
    victim = cluster.engine_of(before[0])
    sessions = [f"mourner-{number}" for number in range(8)]
    mine = [name for name in sessions if who_answers(cluster, "Hi", {"x-session-id": name}) == before[0].name]
    others = [name for name in sessions if name not in mine]
    assert mine
    assert others
    begun = threading.Barrier(3)

    def stream(session: str) -> str:
        body = {"messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 1500, "stream": True}
        text = ""
        with httpx.stream(
            "POST",
            cluster.url + CHAT,
            json={**body, "ignore_eos": True} if session in mine else {**body, "max_tokens": 200},
            headers={"x-session-id": session, "authorization": f"Bearer {TESTER}"},
            timeout=300,
        ) as response:
            for piece in response.iter_text():
                if not text:
                    begun.wait(120)
                text += piece
        return text

    with ThreadPoolExecutor(2) as pool:
        lost, kept = pool.submit(stream, mine[0]), pool.submit(stream, others[0])
        begun.wait(120)
        victim.kill()
        gone = False
        end = time.monotonic() + 20
        while time.monotonic() < end:
            gone = gone or before[0].gone()
            # Until the lost replica has ended, a request may meet it, and is told so; from then on none may fail.
            fine = {200} if gone else {200, 503}
            assert ask(cluster, "Hi", max_tokens=1).status_code in fine
            assert cluster.ready() in fine
        assert gone
        text = lost.result(120)
        assert "[DONE]" not in text
        assert json.loads(text.strip().rpartition("data: ")[2])["error"]["code"] == "engine_lost"
        assert "[DONE]" in kept.result(120)
    wait_until("a new replica", lambda: len(cluster.replicas()) == 2, 240)
    after = cluster.replicas()
    assert before[0].name not in {replica.name for replica in after}
    assert {replica.version["checkpoint"]["root"] for replica in after} == {before[0].version["checkpoint"]["root"]}


def test_cluster_upgrades_without_a_failed_request_and_only_to_its_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    """A new version with another checkpoint is held off; the next one, with another identity, takes its place."""
    before = cluster.replicas()
    root = before[0].version["checkpoint"]["root"]
    old = {replica.version["identity"]["sha256"] for replica in before}
    text = (ROOT / "configs/identity/borg-merge-v1.md").read_text()
    prompt = tmp_path / "identity.md"
    prompt.write_text(text.rstrip() + "\n\nYou are in your second edition.\n")
    statuses: list[int] = []

    def go_on() -> None:
        statuses.append(ask(cluster, f"Hello, number {len(statuses)}", max_tokens=1).status_code)

    def refused() -> bool:
        go_on()
        return f"the checkpoint's root must be {'0' * 64}, got {root}" in cluster.status()

    def changed() -> bool:
        go_on()
        replicas = cluster.replicas()
        return len(replicas) == 2 and old.isdisjoint(replica.version["identity"]["sha256"] for replica in replicas)

    cluster.deploy(**{"cluster.expect_root": "0" * 64})
    wait_until("the replica says why it does not start", refused, 240)
    assert {replica.name for replica in cluster.replicas()} <= {replica.name for replica in before}
    at = len(statuses)
    cluster.deploy(**{"identity.prompt": str(prompt)})
    wait_until("the new identity everywhere", changed, 420)
    assert len(statuses) > at + 10
    assert set(statuses) == {200}
