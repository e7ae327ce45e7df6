"""Entries on their way to a segment: what survives, what is refused, and what nobody else may touch."""

import fcntl
import json
import logging
import os
import time
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from borg_serve.config import Usage, load
from borg_serve.errors import ConfigError
from borg_serve.usage.spool import Entry, Spool, lock, spool_folder, waiting_bytes
from tests.profiles import problems, write

ENTRY = Entry("alice", 1_793_500_000.0, False, 10, 20, 5, 7, 0.25)


def lost() -> float:
    return REGISTRY.get_sample_value("borg_usage_lost_total") or 0.0


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def test_spool_entry_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a" / "b", 1 << 20)
    spool.write(ENTRY)
    assert lines(tmp_path / "a" / "b") == [vars(ENTRY)]
    spool.write(ENTRY)
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1
    spool.close()


def test_spool_holds_its_segment_until_it_rotates(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.write(ENTRY)
    (segment,) = tmp_path.iterdir()
    assert lock(segment, os.O_RDWR) is None
    spool.rotate()
    held = lock(segment, os.O_RDWR)
    assert held is not None
    assert lock(segment, os.O_RDWR) is None
    os.close(held)
    spool.write(ENTRY)
    assert len(list(tmp_path.iterdir())) == 2
    spool.close()


def test_spool_without_entries_makes_no_files(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.rotate()
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_spool_lock_of_a_file_that_was_replaced_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = tmp_path / "x.jsonl"
    segment.touch()
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        segment.unlink()  # by another drainer, which has applied it
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert lock(segment, os.O_RDWR) is None
    assert lock(segment, os.O_RDWR) is None


def test_spool_takes_another_name_where_a_drainer_was_quicker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    flock = fcntl.flock

    def taken(descriptor: int, how: int) -> None:
        if not held:
            held.append(os.open(next(tmp_path.iterdir()), os.O_RDWR))
            flock(held[0], how)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", taken)
    spool = Spool(tmp_path, 1 << 20)
    spool.write(ENTRY)
    spool.close()
    os.close(held[0])
    assert lines(tmp_path) == [vars(ENTRY)]


def test_spool_counts_refusals_in_memory_and_writes_them_as_one_line(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    for key in ("alice", "bob", "alice"):
        spool.refuse(key)
    assert list(tmp_path.iterdir()) == []
    began = time.time()
    spool.rotate()
    (line,) = lines(tmp_path)
    assert line["refused"] == {"alice": 2, "bob": 1}
    assert began <= float(str(line["ended_s"])) <= time.time()
    spool.rotate()
    assert len(lines(tmp_path)) == 1


def test_spool_drops_and_counts_what_passes_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "of-another-server.jsonl").write_bytes(b"x" * 1000)
    limit_bytes = 1000 + 3 * len(json.dumps(vars(ENTRY))) + 10
    spool, before = Spool(tmp_path, limit_bytes), lost()
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            spool.write(ENTRY)
        spool.refuse("alice")
        spool.refuse("alice")
        spool.rotate()
    kept = [path for path in tmp_path.iterdir() if "another" not in path.name]
    written = sum(len(path.read_bytes().splitlines()) for path in kept)
    assert written == 3
    assert lost() - before == 10 - 3 + 2
    assert waiting_bytes(tmp_path) <= limit_bytes
    assert len(caplog.records) == 1, "once a minute"
    (tmp_path / "of-another-server.jsonl").unlink()
    spool.rotate()
    spool.write(ENTRY)
    assert lost() - before == 10 - 3 + 2, "there is room again"
    spool.close()


def test_spool_never_raises_into_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, before = Spool(tmp_path / "spool", 1 << 20), lost()
    (tmp_path / "spool").rmdir()
    (tmp_path / "spool").touch()  # no folder can be made there
    spool.write(ENTRY)
    spool.refuse("alice")
    spool.rotate()
    assert lost() - before == 2
    (tmp_path / "spool").unlink()
    spool.write(ENTRY)
    assert lines(tmp_path / "spool") == [vars(ENTRY)], "it makes its folder anew"
    spool.close()


def test_spool_takes_half_a_line_back_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, before, write_all = Spool(tmp_path, 1 << 20), lost(), os.write
    spool.write(ENTRY)
    monkeypatch.setattr(os, "write", lambda segment, data: write_all(segment, data[:9]))
    spool.write(ENTRY)
    monkeypatch.undo()
    spool.write(ENTRY)
    spool.close()
    assert lines(tmp_path) == [vars(ENTRY)] * 2
    assert lost() - before == 1


def test_spool_refuses_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^usage\.spool: cannot be used: .*, got '.*file/spool'\. Name a folder"):
        Spool(tmp_path / "file" / "spool", 1)


# ------------------------------------------------------------------------------------------------ configuration


def test_usage_paths_start_where_the_profile_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/borg")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    monkeypatch.setenv("WORD", "geheim$")
    file = write(tmp_path)
    for url, meant in {
        "sqlite:///usage.db": f"sqlite:///{tmp_path}/usage.db",
        "sqlite:////var/usage.db": "sqlite:////var/usage.db",
        "sqlite:///~/usage.db": "sqlite:////home/borg/usage.db",
        "sqlite:///$XDG_STATE_HOME/usage.db?timeout=9": "sqlite:////state/usage.db?timeout=9",
        "postgresql://borg:$WORD@host/borg": "postgresql://borg:geheim$@host/borg",
        "sqlite:///:memory:": "sqlite:///:memory:",
    }.items():
        assert load(file, [f"usage.url={json.dumps(url)}"]).usage.url == meant
    assert load(file).usage == Usage(url=None, spool=None, spool_bytes=64 << 20)
    assert spool_folder(load(file).usage) == Path("/state/borg-serve/usage")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert spool_folder(load(file).usage) == Path("/home/borg/.local/state/borg-serve/usage")
    assert spool_folder(load(file, ["usage.spool=spool"]).usage) == tmp_path / "spool"
    assert spool_folder(load(file, ["usage.spool=~/spool"]).usage) == Path("/home/borg/spool")


def test_usage_problems_show_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLACE", raising=False)
    (problem,) = problems(write(tmp_path), "usage.url='postgresql://borg:geheim@$PLACE/borg'").values()
    assert problem.what == "needs the environment variable PLACE, which is not set"
    assert problem.got == "postgresql://borg:***@$PLACE/borg"
