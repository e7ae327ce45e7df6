"""Every file in configs/ is what it says it is, and a profile that a user can start from."""

from pathlib import Path

import pytest
import yaml

from borg_serve.config import load
from borg_serve.identity.text import load_identity

CONFIGS = Path(__file__).parents[3] / "configs"
PROFILES = sorted(CONFIGS.glob("*.yaml"))
IDENTITIES = sorted(CONFIGS.glob("identity/*.md"))


def test_profiles_folder_holds_profiles_and_identities_only() -> None:
    assert {path for path in CONFIGS.rglob("*") if path.is_file()} == {*PROFILES, *IDENTITIES}
    assert PROFILES
    assert {path.stem for path in PROFILES} >= {"demo-cpu", "7b-h100", "7b-h100-fp8", "7b-tp2", "7b-tp4"}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profile_is_safe_to_start_as_it_is(path: Path) -> None:
    config = load(path)
    assert config.server.host == "127.0.0.1"
    assert config.model.load_format == "auto"
    assert config.limits.default_max_tokens < config.engine["max_model_len"]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profile_gives_a_reason_for_every_number(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# "), "what it is for, before anything else"
    numbers = 0
    for before, line in zip(["", *lines], lines, strict=False):
        key, colon, value = line.partition(":")
        if line.startswith("  ") and colon and value.split("#")[0].strip().replace(".", "", 1).isdigit():
            numbers += 1
            assert "#" in value or before.strip().startswith("#"), f"{path.name}: {key.strip()}"
    assert numbers >= 3


def test_demo_profile_proves_that_its_engine_computes_rightly() -> None:
    config = load(CONFIGS / "demo-cpu.yaml")
    assert config.model.probe is not None
    assert config.engine["enforce_eager"] is True


@pytest.mark.parametrize("path", IDENTITIES, ids=lambda path: path.stem)
def test_identity_file_is_a_text_that_ends_like_one(path: Path) -> None:
    assert load_identity(path).text
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profile_names_no_key_twice(path: Path) -> None:
    """YAML takes the last of two in silence."""
    waiting = [yaml.compose(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            assert len(names) == len(set(names))
            waiting += [value for _, value in node.value]
