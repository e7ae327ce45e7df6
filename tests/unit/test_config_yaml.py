"""Profiles as YAML: empty sections, repeated keys, anchors, variables in paths, and how errors show a value."""

from pathlib import Path

import pytest

from borg_serve.config import load
from tests.profiles import GOOD, problems, write


@pytest.mark.parametrize("section", ["server", "limits", "cluster", "engine"])
def test_config_takes_an_empty_section_for_its_defaults(tmp_path: Path, section: str) -> None:
    assert load(write(tmp_path, GOOD | {section: None})) == load(write(tmp_path))
    assert load(write(tmp_path), [f"{section}="]) == load(write(tmp_path))


@pytest.mark.parametrize(("section", "key"), [("model", "model.path"), ("identity", "identity.prompt")])
def test_config_names_what_an_empty_section_lacks(tmp_path: Path, section: str, key: str) -> None:
    (problem,) = problems(write(tmp_path, GOOD | {section: None})).values()
    assert f"{key}: is missing, got nothing. Add it." in str(problem)


def test_config_refuses_keys_that_are_given_twice_with_both_lines(tmp_path: Path) -> None:
    text = "model: {path: /m}\nidentity:\n  prompt: identity.md\nserver:\n  port: 1\nengine: {a: [{b: 1, b: 2}]}\n"
    found = problems(write(tmp_path, text + "server:\n  host: x\nmodel: {}\n"))
    assert {key: problem.got for key, problem in found.items()} == {
        "engine.a[0].b": "line 6 and line 6",
        "server": "line 4 and line 7",
        "model": "line 1 and line 9",
    }
    assert str(found["server"]).endswith("server: must be given once, got 'line 4 and line 7'. Remove one of them.")


def test_config_takes_anchors_and_merged_keys(tmp_path: Path) -> None:
    text = "model: &m {path: /m, served_name: a}\nidentity: {prompt: identity.md}\n"
    config = load(write(tmp_path, text + "engine:\n  <<: *m\n  served_name: b\n  deep: {<<: *m}\n"))
    assert config.engine == {"path": "/m", "served_name": "b", "deep": {"path": "/m", "served_name": "a"}}
    found = problems(write(tmp_path, text + "engine: &e\n  self: *e\nserver: 5\n"))
    assert list(found) == ["server"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("null", "nothing"),
        ("true", "true"),
        ("{a: [1, no], b: null}", '{"a": [1, false], "b": null}'),
        ("it's", "'it''s'"),
        ('"a\\nb"', '"a\\nb"'),
        ("2020-01-01", '"2020-01-01"'),
    ],
)
def test_config_shows_a_value_as_yaml_has_it(tmp_path: Path, value: str, said: str) -> None:
    (problem,) = problems(write(tmp_path), f"server.port={value}").values()
    assert f", got {said}. " in str(problem)


@pytest.mark.parametrize("key", ["model.path", "identity.prompt", "server.keys"])
@pytest.mark.parametrize("name", ["$PLACE", "${PLACE}"])
def test_config_replaces_environment_variables_in_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    file, (section, leaf) = write(tmp_path), key.split(".")
    monkeypatch.delenv("PLACE", raising=False)
    found = problems(file, f"{key}={name}/identity.md")
    assert found[key].what == "needs the environment variable PLACE, which is not set"
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert str(getattr(getattr(load(file, [f"{key}={name}/identity.md"]), section), leaf)) == f"{tmp_path}/identity.md"


def test_config_takes_two_dollar_signs_for_one(tmp_path: Path) -> None:
    assert load(write(tmp_path), ["model.path=/a$$b"]).model.path == "/a$b"
    assert "model.path" in problems(write(tmp_path), "model.path=/a$5")
