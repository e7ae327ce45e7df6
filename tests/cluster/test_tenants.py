"""Tenants of a cluster: private KV blocks on each replica, limits in one Redis, one ledger in PostgreSQL."""

from typing import Any

import httpx

from tests.cluster.conftest import Cluster
from tests.process.ledgers import Postgres
from tests.waiting import await_room_in_the_minute, wait_until

CHAT = "/v1/chat/completions"
BLOCK = 32


def ask(url: str, key: str, text: str, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **more}
    return httpx.post(url + CHAT, json=body, headers={"authorization": f"Bearer {key}"}, timeout=180)


def usage(url: str, key: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/v1/usage?by=month", headers={"authorization": f"Bearer {key}"}, timeout=60)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


def test_tenants_share_the_identity_alone_on_every_replica(cluster: Cluster) -> None:
    secret = " ".join(f"My number is {number}." for number in range(6000, 6040))
    for replica in cluster.replicas():
        identity = replica.version["identity"]["tokens"] // BLOCK * BLOCK

        def cached(key: str, url: str = replica.url) -> int:
            answer = ask(url, key, secret)
            assert answer.status_code == 200, answer.text
            found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return found

        assert cached("one") == identity
        assert cached("one") > identity + BLOCK
        assert cached("other") == identity


def test_tenants_limits_are_counted_over_all_replicas(cluster: Cluster) -> None:
    await_room_in_the_minute(25)
    urls = [replica.url for replica in cluster.replicas()] * 3
    answers = [ask(url, "few", "Hi") for url in urls]
    assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert left == ["3", "2", "1", "0", "0", "0"]
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"


def test_tenants_usage_of_all_replicas_is_in_one_ledger(cluster: Cluster, database: Postgres) -> None:
    def counts() -> tuple[int, int]:
        rows = usage(cluster.url, "other")
        return sum(row["requests"] for row in rows), sum(row["output_tokens"] for row in rows)

    before = counts()
    urls = [replica.url for replica in cluster.replicas()] * 2
    for url in urls:
        assert ask(url, "other", "Hello", ignore_eos=True).status_code == 200
    expected = before[0] + 4, before[1] + 8
    wait_until("all of it is in the ledger", lambda: counts() == expected, 30)
    assert all(usage(replica.url, "other") == usage(cluster.url, "other") for replica in cluster.replicas())
    database.kill()
    assert ask(cluster.url, "other", "Hello", ignore_eos=True).status_code == 200
    database.start()

    def back() -> bool:
        answer = httpx.get(f"{cluster.url}/v1/usage", headers={"authorization": "Bearer other"}, timeout=60)
        return answer.status_code == 200 and counts() == (expected[0] + 1, expected[1] + 2)

    wait_until("what waited, too", back, 60)


def test_tenants_budget_is_one_for_all_replicas(cluster: Cluster) -> None:
    first, second = (replica.url for replica in cluster.replicas())
    for _ in range(20):
        answer = ask(first, "budgeted", "Hi", max_tokens=8, ignore_eos=True)
        if answer.status_code != 200:
            break
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")

    def told() -> bool:
        other = ask(second, "budgeted", "Hi", max_tokens=1)
        return other.status_code == 429 and other.json()["error"]["code"] == "insufficient_quota"

    wait_until("the other replica knows", told, 30)
