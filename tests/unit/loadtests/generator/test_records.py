"""Records: as they lie in files."""

import csv
from pathlib import Path

from loadtests.generator.records import Outcome, read, write, write_csv
from tests.loads import record


def test_records_come_back_from_their_file(tmp_path: Path) -> None:
    records = [record(0), record(1, outcome=Outcome.BROKEN, t_first_us=None, detail='a "quote"')]
    write(tmp_path / "r.jsonl", records)
    assert read((tmp_path / "r.jsonl").read_text().splitlines()) == records
    write_csv(tmp_path / "r.csv", records)
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert rows[1]["outcome"] == "broken stream"
    assert rows[0]["itl_us"] == "100000 100000"
