"""API keys: the file and its reloading, with a clock that the tests turn."""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.errors import ConfigError
from borg_serve.gate import keys
from borg_serve.gate.keys import BATCH, Key, KeyRing, new_key


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


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
    assert ring.lookup("k") == Key("a", 60, 1000, concurrent=2)


@pytest.mark.parametrize("bearer", ["", "k ", "K", digest("k"), "\ud800", "k" * 10_000])
def test_keyring_knows_no_other_bearer(tmp_path: Path, bearer: str) -> None:
    assert KeyRing(write(tmp_path / "keys.yaml", {"name": "a", "sha256": digest("k")})).lookup(bearer) is None


def test_keyring_compares_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(write(tmp_path / "k.yaml", *({"name": n, "sha256": digest(n)} for n in "abc")))
    compared: list[bytes] = []

    def compare(expected: bytes, got: bytes) -> bool:
        compared.append(expected)
        return expected == got

    monkeypatch.setattr("borg_serve.gate.keys.hmac.compare_digest", compare)
    assert ring.lookup("a") == Key("a")
    assert len(compared) == 3


def test_keyring_empty_list_admits_nobody(tmp_path: Path) -> None:
    assert KeyRing(write(tmp_path / "keys.yaml")).lookup("") is None


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"name": "a"}, "entry 1.sha256 (a): is required"),
        ({"sha256": digest("k")}, "entry 1.name: is required"),
        ({"name": "a", "sha256": digest("k").upper()}, "entry 1.sha256 (a)"),
        ({"name": "a", "sha256": "borg-secret"}, "entry 1.sha256 (a)"),
        ({"name": "a b", "sha256": digest("k")}, "got 'a b'. Use letters"),
        ({"name": 7, "sha256": digest("k")}, "entry 1.name"),
        ({"name": "a", "sha256": digest("k"), "key": "borg-secret"}, "entry 1.key (a): unknown key"),
        ({"name": "a", "sha256": digest("k"), "limits": {"concurrent": 0}}, "entry 1.limits.concurrent (a)"),
        ({"name": "a", "sha256": digest("k"), "limits": {"concurrent": "2"}}, "got '2'. Use requests_per_minute"),
        ({"name": "a", "sha256": digest("k"), "limits": {"concurrent": True}}, "entry 1.limits.concurrent (a)"),
        ({"name": "a", "sha256": digest("k"), "limits": {"rpm": 1}}, "entry 1.limits.rpm (a): unknown key"),
        ("borg-secret", "entry 1: must be an object"),
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
        ("", "must be a list of keys, got nothing"),
        ("name: a", "must be a list of keys, got 'a mapping of length 1'"),
        ("- {borg-secret: 1, borg-secret: 2}", "must have each key of an entry once, got 'line 1 and line 1'"),
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


class Reloading(logging.Handler):
    """A key ring with a clock of its own and the problems it logged, until it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.clock = Clock(100.0)
        self.problems: list[str] = []
        self.ring = KeyRing(write(path, {"name": "a", "sha256": digest("a")}), self.clock)
        keys.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.problems.append(record.getMessage())

    def close(self) -> None:
        keys.logger.removeHandler(self)
        super().close()

    def later(self, bearer: str) -> Key | None:
        self.clock.now += 1.0
        return self.ring.lookup(bearer)


@pytest.fixture
def reloading(tmp_path: Path) -> Iterator[Reloading]:
    with closing(Reloading(tmp_path / "keys.yaml")) as reloading:
        yield reloading


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
    (problem,) = reloading.problems
    assert problem.startswith("the old API keys stay in use: ")


def test_keyring_keeps_the_old_keys_when_the_file_goes_and_takes_the_next(reloading: Reloading) -> None:
    reloading.path.unlink()
    assert reloading.later("a") == Key("a")
    assert reloading.later("a") == Key("a")
    assert len(reloading.problems) == 1
    write(reloading.path, {"name": "b", "sha256": digest("b")})
    assert reloading.later("a") is None
    assert reloading.later("b") == Key("b")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_keyring_never_raises_from_lookup_whatever_the_file_becomes(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    with closing(Reloading(tmp_path_factory.mktemp("keys") / "keys.yaml")) as case:
        case.path.write_bytes(content)
        case.later("x")
    assert case.problems or content.strip() == b"[]" or yaml.safe_load(content) == []


def test_keyring_reads_shares_and_budgets(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    key, entry = new_key("alice")
    path.write_text(entry + "  weight: 2\n  priority: batch\n  limits: {tokens_per_day: 5, tokens_per_month: 9}\n")
    found = KeyRing(path).lookup(key)
    assert found == Key("alice", tokens_per_day=5, tokens_per_month=9, weight=2, priority="batch")
    assert found.share == 2 / BATCH
    assert Key("bob", weight=3).share == 3


def test_keyring_refuses_budgets_that_nobody_could_count(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    _, entry = new_key("alice")
    path.write_text(entry + "  limits: {tokens_per_day: 5}\n")
    with pytest.raises(ConfigError, match=r"keys\.yaml: entry 1 \(alice\)\.limits: .*Set usage\.url"):
        KeyRing(path, budgets=False)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("weight: 0", "weight"),
        ("weight: .nan", "weight"),
        ("weight: heavy", "weight"),
        ("priority: urgent", "Use interactive or batch"),
    ],
)
def test_keyring_refuses_a_share_that_is_none(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(new_key("alice")[1] + f"  {line}\n")
    with pytest.raises(ConfigError, match=says):
        KeyRing(path)
