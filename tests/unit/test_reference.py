"""The configuration reference is complete, and the committed file is current."""

from pathlib import Path

from pydantic import BaseModel

from borg_serve.config import Cluster, Limits, Model, Probe, Server, Usage
from borg_serve.reference import reference

FILE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_reference_is_the_committed_file() -> None:
    assert FILE.read_text(encoding="utf-8") == reference(), "run: borg-serve reference > docs/configuration.md"


def test_reference_describes_every_key() -> None:
    rows = {line.split("`")[1]: line for line in reference().splitlines() if line.startswith("| `")}
    sections: dict[str, type[BaseModel]] = {"model": Model, "model.probe": Probe}
    sections |= {"server": Server, "limits": Limits, "cluster": Cluster, "usage": Usage}
    keys = {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    assert rows.keys() == keys | {"identity.prompt", "identity.attention"}
    for key, row in rows.items():
        _, _, kind, default, example, description, _ = row.split("|")
        assert all(cell.strip() for cell in (kind, default, description)), key
        assert example.strip() or key == "model.probe", key


def test_reference_shows_types_bounds_and_defaults() -> None:
    text = reference()
    for cells in (
        "| `server.port` | integer, >= 0, <= 65535 | `8000` | `8000` |",
        "| `limits.top_p` | number, > 0, <= 1 | `0.9` | `0.9` |",
        "| `limits.concurrent` | integer, > 0 or `auto` | `auto` | `auto` |",
        "| `model.path` | text | required | `/models/borg-merge-v1` |",
        "| `server.keys` | path | none | `keys.yaml` |",
    ):
        assert cells in text
    assert "\n## engine\n" in text
