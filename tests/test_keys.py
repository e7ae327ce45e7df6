"""API keys: the file, its reloading, and the quotas, with a clock that the tests turn."""

import asyncio
import hashlib
import logging
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.errors import ConfigError
from borg_serve.keys import Key, KeyRing, Quota, new_key


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Both clocks, turned together: the wall's, by which `limits` counts, and the monotonic one."""
    clock = Clock(1_800_000_000.0)
    monkeypatch.setattr(time, "time", clock)
    started, real = clock.now, time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + clock.now - started)
    return clock


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write(path: Path, *entries: object) -> Path:
    path.write_text(yaml.safe_dump(list(entries)))
    return path


def problem(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        KeyRing(path)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ file


def test_new_key_is_found_by_its_entry_and_not_written_in_it(tmp_path: Path) -> None:
    key, entry = new_key("alice")
    path = tmp_path / "keys.yaml"
    path.write_text(entry)
    assert key.startswith("borg-")
    assert key not in entry
    assert KeyRing(path).lookup(key) == Key("alice")


def test_new_keys_differ_and_their_entries_join_to_one_file(tmp_path: Path) -> None:
    (first, one), (second, two) = new_key("a"), new_key("b")
    path = tmp_path / "keys.yaml"
    path.write_text(one + two)
    ring = KeyRing(path)
    assert first != second
    assert (ring.lookup(first), ring.lookup(second)) == (Key("a"), Key("b"))


@pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 65, "ä", "a\n"])
def test_new_key_refuses_a_name_that_the_file_could_not_hold(name: str) -> None:
    with pytest.raises(ConfigError, match="key name: cannot be used"):
        new_key(name)


def test_keyring_reads_limits(tmp_path: Path) -> None:
    limits = {"requests_per_minute": 60, "tokens_per_minute": 1000, "concurrent": 2}
    ring = KeyRing(write(tmp_path / "keys.yaml", {"name": "a", "sha256": digest("k"), "limits": limits}))
    assert ring.lookup("k") == Key("a", 60, 1000, 2)


@pytest.mark.parametrize("bearer", ["", "k ", "K", digest("k"), "\ud800", "k" * 10_000])
def test_keyring_knows_no_other_bearer(tmp_path: Path, bearer: str) -> None:
    assert KeyRing(write(tmp_path / "keys.yaml", {"name": "a", "sha256": digest("k")})).lookup(bearer) is None


def test_keyring_compares_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(write(tmp_path / "k.yaml", *({"name": n, "sha256": digest(n)} for n in "abc")))
    compared: list[bytes] = []

    def compare(expected: bytes, got: bytes) -> bool:
        compared.append(expected)
        return expected == got

    monkeypatch.setattr("borg_serve.keys.hmac.compare_digest", compare)
    assert ring.lookup("a") == Key("a")
    assert len(compared) == 3


def test_keyring_empty_list_admits_nobody(tmp_path: Path) -> None:
    assert KeyRing(write(tmp_path / "keys.yaml")).lookup("") is None


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"name": "a"}, "entry 1.sha256 (a): field required"),
        ({"sha256": digest("k")}, "entry 1.name: field required"),
        ({"name": "a", "sha256": digest("k").upper()}, "entry 1.sha256 (a)"),
        ({"name": "a", "sha256": "borg-secret"}, "entry 1.sha256 (a)"),
        ({"name": "a b", "sha256": digest("k")}, "got 'a b'. Use letters"),
        ({"name": 7, "sha256": digest("k")}, "entry 1.name"),
        ({"name": "a", "sha256": digest("k"), "key": "borg-secret"}, "entry 1.key (a): unknown key"),
        ({"name": "a", "sha256": digest("k"), "limits": {"concurrent": 0}}, "entry 1.limits.concurrent (a)"),
        ({"name": "a", "sha256": digest("k"), "limits": {"concurrent": "2"}}, "got '2'. Use requests_per_minute"),
        ({"name": "a", "sha256": digest("k"), "limits": {"concurrent": True}}, "entry 1.limits.concurrent (a)"),
        ({"name": "a", "sha256": digest("k"), "limits": {"rpm": 1}}, "entry 1.limits.rpm (a): unknown key"),
        ("borg-secret", "entry 1: input should be"),
    ],
)
def test_keyring_problem_names_file_entry_field_and_cure(tmp_path: Path, entry: object, says: str) -> None:
    text = problem(write(tmp_path / "keys.yaml", entry))
    assert text.startswith(f"{tmp_path / 'keys.yaml'}: entry 1")
    assert says in text
    assert text.endswith(".")
    assert "borg-secret" not in text


def test_keyring_reports_all_problems_at_once(tmp_path: Path) -> None:
    assert problem(write(tmp_path / "k.yaml", {"name": "a"}, {"name": "b"})).count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a list of keys, got 'NoneType'"),
        ("name: a", "must be a list of keys, got 'dict'"),
        ("- [borg-secret", "is not YAML"),
        ("- borg-secret: a: b", "is not YAML"),
        ("- \x07borg-secret", "is not YAML"),
        ("- 2020-99-99", "is not YAML"),
    ],
)
def test_keyring_refuses_what_is_no_list_and_quotes_no_line_of_it(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    message = problem(path)
    assert says in message
    assert "borg-secret" not in message


def test_keyring_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_bytes(b"- \xff\xfe\x00")
    assert "is not YAML" in problem(path)


def test_keyring_refuses_a_missing_file(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in problem(tmp_path / "keys.yaml")


@pytest.mark.parametrize("field", ["name", "sha256"])
def test_keyring_refuses_a_repeated_name_or_digest(tmp_path: Path, field: str) -> None:
    one, two = {"name": "a", "sha256": digest("a")}, {"name": "b", "sha256": digest("b")}
    assert f"must have each {field} once" in problem(write(tmp_path / "k.yaml", one, {**two, field: one[field]}))


# -------------------------------------------------------------------------------------------------- reloading


class Reloading:
    """A key ring with a clock of its own and the problems it reported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = Clock(100.0)
        self.problems: list[ConfigError] = []
        self.ring = KeyRing(write(path, {"name": "a", "sha256": digest("a")}), self.problems.append, self.clock)

    def later(self, bearer: str) -> Key | None:
        self.clock.now += 1.0
        return self.ring.lookup(bearer)


@pytest.fixture
def reloading(tmp_path: Path) -> Reloading:
    return Reloading(tmp_path / "keys.yaml")


def test_keyring_takes_a_changed_file_within_a_second(reloading: Reloading) -> None:
    write(reloading.path, {"name": "bee", "sha256": digest("b")})
    assert reloading.ring.lookup("a") == Key("a")
    assert reloading.later("a") is None
    assert reloading.ring.lookup("b") == Key("bee")
    assert not reloading.problems


def test_keyring_takes_a_file_moved_into_place_with_the_same_size_and_time(reloading: Reloading) -> None:
    other = write(reloading.path.with_name("new"), {"name": "b", "sha256": digest("b")})
    before = reloading.path.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, reloading.path)
    assert reloading.path.stat().st_size == before.st_size
    assert reloading.later("b") == Key("b")


@pytest.mark.parametrize("text", ["", "- [", "- {name: a}", "{}", "- {name: a, sha256: 12}"])
def test_keyring_keeps_the_old_keys_when_the_file_breaks_and_says_so_once(reloading: Reloading, text: str) -> None:
    reloading.path.write_text(text)
    assert reloading.later("a") == Key("a")
    assert reloading.later("b") is None
    assert len(reloading.problems) == 1


def test_keyring_keeps_the_old_keys_when_the_file_goes_and_takes_the_next(reloading: Reloading) -> None:
    reloading.path.unlink()
    assert reloading.later("a") == Key("a")
    assert reloading.later("a") == Key("a")
    assert len(reloading.problems) == 1
    write(reloading.path, {"name": "b", "sha256": digest("b")})
    assert reloading.later("a") is None
    assert reloading.later("b") == Key("b")


def test_keyring_logs_a_broken_file_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(0)
    path = write(tmp_path / "keys.yaml", {"name": "a", "sha256": digest("a")})
    ring = KeyRing(path, clock=clock)
    path.write_text("nothing")
    clock.now = 2
    with caplog.at_level(logging.ERROR, "borg_serve.keys"):
        ring.lookup("a")
    assert "the old API keys stay in use" in caplog.text


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_keyring_never_raises_from_lookup_whatever_the_file_becomes(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    case = Reloading(tmp_path_factory.mktemp("keys") / "keys.yaml")
    case.path.write_bytes(content)
    case.later("x")
    assert case.problems or content.strip() == b"[]" or yaml.safe_load(content) == []


# ----------------------------------------------------------------------------------------------------- quotas


async def admitted(quota: Quota, key: Key, times: int) -> list[bool]:
    return [await quota.admit(key) is None for _ in range(times)]


async def test_quota_without_limits_admits_everything() -> None:
    quota, key = Quota(), Key("a")
    assert all(await admitted(quota, key, 100))
    await quota.charge_tokens(key, 10**9)
    assert await quota.admit(key) is None


async def test_quota_refuses_past_the_requests_of_a_minute_and_says_when(wall: Clock) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=3)
    assert await admitted(quota, key, 5) == [True, True, True, False, False]
    refusal = await quota.admit(key)
    assert refusal is not None
    assert refusal.status == 429
    assert "a has used its 3 requests a minute" in refusal.message
    wall.now += refusal.retry_after_s
    assert await quota.admit(key) is None


@pytest.mark.parametrize("pause_s", [0, 7, 29.5, 45, 59.9])
async def test_quota_retry_after_is_enough_and_hardly_more(wall: Clock, pause_s: float) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=5)
    for _ in range(40):
        wall.now += pause_s / 5
        while (refusal := await quota.admit(key)) is None:
            pass
        wall.now += max(0, refusal.retry_after_s - 1.01)
        assert await quota.admit(key) is not None
        wall.now += 1.02
        assert await quota.admit(key) is None


async def test_quota_never_admits_twice_the_limit_where_windows_meet(wall: Clock) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=10)
    wall.now += 60 - wall.now % 60 - 1
    assert sum(await admitted(quota, key, 20)) == 10
    wall.now += 2
    # The last window's ten still weigh 58/60.
    assert sum(await admitted(quota, key, 20)) == 1


async def test_quota_counts_each_key_alone() -> None:
    quota = Quota()
    assert await admitted(quota, Key("a", requests_per_minute=1), 2) == [True, False]
    assert await admitted(quota, Key("b", requests_per_minute=1), 2) == [True, False]


async def test_quota_counts_a_burst_of_tasks_exactly() -> None:
    quota, key = Quota(), Key("a", requests_per_minute=10)
    refusals = await asyncio.gather(*(quota.admit(key) for _ in range(50)))
    assert refusals.count(None) == 10


async def test_quota_tokens_past_the_limit_refuse_the_next_request_for_a_minute(wall: Clock) -> None:
    quota, key = Quota(), Key("a", tokens_per_minute=100)
    await quota.charge_tokens(key, 99)
    assert await quota.admit(key) is None
    await quota.charge_tokens(key, 8000)
    refusal = await quota.admit(key)
    assert refusal is not None
    assert "its 100 tokens a minute" in refusal.message
    wall.now += refusal.retry_after_s - 1.01
    assert await quota.admit(key) is not None
    wall.now += 1.02
    assert await quota.admit(key) is None


async def test_quota_request_refused_for_its_tokens_is_not_counted(wall: Clock) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=2, tokens_per_minute=10)
    await quota.charge_tokens(key, 10)
    assert await admitted(quota, key, 5) == [False] * 5
    wall.now += 61
    assert await admitted(quota, key, 3) == [True, True, False]


async def test_quota_charging_nothing_changes_nothing() -> None:
    quota, key = Quota(), Key("a", tokens_per_minute=1)
    await quota.charge_tokens(key, 0)
    await quota.charge_tokens(key, -5)
    assert await quota.admit(key) is None


@pytest.mark.parametrize("step_s", [-86_400, -3_600, 86_400])
async def test_quota_survives_a_step_of_the_wall_clock(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=2, tokens_per_minute=10)
    await quota.charge_tokens(key, 10)
    assert await quota.admit(key) is not None
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + step_s)
    assert await admitted(quota, key, 3) == [True, True, False]


async def test_quota_unreachable_storage_refuses_with_503(monkeypatch: pytest.MonkeyPatch) -> None:
    from limits.errors import StorageError

    quota, key = Quota(), Key("a", requests_per_minute=2, tokens_per_minute=10)

    async def fails(*_: object, **__: object) -> None:
        raise StorageError(OSError("down"))

    monkeypatch.setattr(quota._requests, "hit", fails)
    monkeypatch.setattr(quota._tokens, "hit", fails)
    await quota.charge_tokens(key, 5)
    refusal = await quota.admit(key)
    assert refusal is not None
    assert (refusal.status, refusal.retry_after_s) == (503, 5)


@pytest.mark.parametrize("uri", ["nowhere://x", "async+nowhere://x"])
def test_quota_refuses_a_storage_it_does_not_know(uri: str) -> None:
    with pytest.raises(ConfigError, match="quota storage: cannot be used"):
        Quota(uri)


def test_quota_takes_a_storage_with_and_without_the_async_prefix() -> None:
    Quota("memory://")
    Quota("async+memory://")


def test_quota_bounds_requests_running_at_once() -> None:
    quota, key = Quota(), Key("a", concurrent=2)
    assert quota.acquire(key) is None
    assert quota.acquire(key) is None
    refusal = quota.acquire(key)
    assert refusal is not None
    assert (refusal.status, refusal.retry_after_s) == (429, 1)
    quota.release(key)
    assert quota.acquire(key) is None


def test_quota_places_of_other_keys_are_their_own() -> None:
    quota = Quota()
    assert quota.acquire(Key("a", concurrent=1)) is None
    assert quota.acquire(Key("b", concurrent=1)) is None
    assert all(quota.acquire(Key("c")) is None for _ in range(100))


@settings(deadline=None)
@given(st.lists(st.booleans()))
def test_quota_places_come_back_to_zero(takes: list[bool]) -> None:
    quota, key, held = Quota(), Key("a", concurrent=3), 0
    for take in takes:
        if take:
            refused = quota.acquire(key) is not None
            assert refused == (held == 3)
            held += not refused
        elif held:
            quota.release(key)
            held -= 1
    for _ in range(held):
        quota.release(key)
    assert not quota._running


def test_key_ring_divides_limits_among_processes(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    key, entry = new_key("alice")
    path.write_text(entry + "  limits: {requests_per_minute: 10, concurrent: 2}\n")
    found = KeyRing(path, share=4).lookup(key)
    assert found == Key("alice", requests_per_minute=2, tokens_per_minute=None, concurrent=1)
