"""Profiles: everything wrong with one at once, `--set`, what depends on what, and the frozen result."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from borg_serve.config import PROFILES, Config, Limits, is_hub_id, load
from borg_serve.errors import ConfigError, Problem
from tests.profiles import GOOD, problems, write

# ---------------------------------------------------------------------------------------------------- problems


def test_config_reports_every_problem_at_once_with_file_key_value_and_cure(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {
            "model": {"dtype": "int3", "served_name": ""},
            "identity": {"prompt": "identity.md"},
            "server": {"prot": 80, "port": 70000, "processes": 0, "drain_s": "long"},
            "limits": {"top_p": 0, "concurrent": "many", "max_wait_s": -1},
            "cluster": {"expect_root": "abc"},
            "sever": {},
        },
    )
    found = problems(file)
    assert set(found) == {
        *("model.path", "model.dtype", "model.served_name", "server.prot", "server.port", "server.processes"),
        *("server.drain_s", "limits.top_p", "limits.concurrent", "limits.max_wait_s", "cluster.expect_root", "sever"),
    }
    for key, problem in found.items():
        assert re.fullmatch(rf"{re.escape(str(file))}: {key}: .+, got .+\. .+[.?]", str(problem), re.DOTALL), problem
    assert found["server.port"].got == 70000
    assert found["server.port"].cure == "For example: port: 8000."
    assert found["model.path"].what == "is missing"


def test_config_says_each_problem_of_a_choice_once(tmp_path: Path) -> None:
    # `concurrent` may be a number or `auto`: a wrong value fits neither, and is one problem all the same.
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path), ["limits.concurrent=many"])
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "item",
    ["server.port='8000'", "server.processes=true", "server.port=8000.0", "limits.temperature=true", "model.path=7"],
)
def test_config_does_not_turn_one_type_into_another(tmp_path: Path, item: str) -> None:
    assert list(problems(write(tmp_path), item)) == [item.partition("=")[0]]


def test_config_takes_auto_wherever_it_is_the_default(tmp_path: Path) -> None:
    autos = [name for name, field in Limits.model_fields.items() if field.default == "auto"]
    assert len(autos) >= 2
    config = load(write(tmp_path), [f"limits.{name}=auto" for name in autos])
    assert config.limits == load(write(tmp_path)).limits
    assert problems(write(tmp_path), *(f"limits.{name}=-1" for name in autos)).keys() == {f"limits.{n}" for n in autos}


def test_config_suggests_the_key_that_was_meant_or_lists_them(tmp_path: Path) -> None:
    found = problems(write(tmp_path), "server.prot=80", "server.zzz=1", "idendity.prompt=x", "model.probe.qestion=x")
    assert found["server.prot"].cure == "Did you mean `port`?"
    assert found["idendity"].cure == "Did you mean `identity`?"
    assert found["model.probe.qestion"].cure == "Did you mean `question`?"
    assert found["server.zzz"].cure.startswith("Remove it; known keys: host, port, processes")


def test_config_adds_the_engines_problems_to_its_own(tmp_path: Path) -> None:
    seen: list[tuple[Mapping[str, Any], str]] = []

    def check(engine: Mapping[str, Any], file: str) -> list[Problem]:
        seen.append((engine, file))
        return [Problem(f"{file}: engine.x", "is wrong", 1, "Remove it.")]

    file = write(tmp_path, GOOD | {"engine": {"x": 1}})
    with pytest.raises(ConfigError) as caught:
        load(file, ["server.prot=1"], check)
    assert {problem.where for problem in caught.value.problems} == {f"{file}: engine.x", f"{file}: server.prot"}
    assert seen == [({"x": 1}, str(file))]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "cannot be read: No such file"),
        ("a: [", "is not YAML"),
        ("\0", "is not YAML"),
        ("a: 2020-99-99", "is not YAML"),
        pytest.param("[" * 1500, "is not YAML", id="deep"),
        ("", "must hold sections"),
        ("- 1", "must hold sections"),
        ("just text", "must hold sections"),
    ],
)
def test_config_says_what_kind_of_file_it_needs(tmp_path: Path, text: str | None, what: str) -> None:
    file = tmp_path / "profile.yaml"
    if text is not None:
        file.write_text(text)
    found = problems(file)
    assert list(found) == [str(file)]
    assert found[str(file)].what.startswith(what)
    assert "\n" not in str(found[str(file)])


def test_config_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_bytes(b"model: \xff")
    (problem,) = problems(tmp_path / "profile.yaml").values()
    assert problem.what.startswith("is not YAML")


@pytest.mark.parametrize("section", ["model", "identity", "server", "limits", "cluster", "engine"])
@pytest.mark.parametrize("value", [5, "x", [1]])
def test_config_refuses_a_section_that_is_none(tmp_path: Path, section: str, value: object) -> None:
    assert section in problems(write(tmp_path, GOOD | {section: value}))


def test_config_does_not_let_a_profile_name_its_own_file(tmp_path: Path) -> None:
    assert list(problems(write(tmp_path, GOOD | {"file": "/elsewhere"}))) == ["file"]


@pytest.mark.parametrize("key", [1, None, True, 2.5])
def test_config_refuses_keys_that_are_no_names(tmp_path: Path, key: object) -> None:
    file = write(tmp_path, GOOD | {key: {}})
    assert len(problems(file)) == 1


@pytest.mark.parametrize("name", ["7b-h100", "configs/7b-h100.yaml"])
def test_config_takes_a_profile_of_the_package_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(Path(name)).file == PROFILES / "7b-h100.yaml"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("model: {}")
    assert set(problems(Path(name))) == {"model.path", "identity"}


@pytest.mark.parametrize("name", ["no", "other/7b-h100.yaml", "configs/7b-h100", "../configs/7b-h100.yaml"])
def test_config_names_the_profiles_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert "or one of the package's: 7b-h100, " in problems(Path(name))[name].cure


# ------------------------------------------------------------------------------------------------------- --set


def test_set_changes_keys_in_order_with_yaml_values(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD | {"engine": {"max_model_len": 1}})
    sets = [
        "server.port=1",
        "server.port=2",
        "engine.max_model_len=8192",
        "engine.enforce_eager=true",
        "engine.compilation_config={mode: 0}",
        "model.revision=",
        "limits.temperature=0.5",
        "server.host=127.0.0.2",
        " server.drain_s =7",
        "model.served_name=a=b",
    ]
    config = load(file, sets)
    assert config.server.port == 2
    assert config.engine == {"max_model_len": 8192, "enforce_eager": True, "compilation_config": {"mode": 0}}
    assert config.limits.temperature == 0.5
    assert config.server.host == "127.0.0.2"
    assert config.server.drain_s == 7
    assert config.model.revision is None
    assert config.model.served_name == "a=b"


@pytest.mark.parametrize("item", ["", "server.port", "=1", ".port=1", "server..port=1", "server.=1", "=", "."])
def test_set_refuses_what_is_no_setting(tmp_path: Path, item: str) -> None:
    (problem,) = problems(write(tmp_path), item).values()
    assert problem.where == "--set"
    assert problem.got == item


def test_set_says_when_the_way_to_a_key_is_no_section(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path), "model.path.deeper=1").values()
    assert problem.where == "--set model.path.deeper"
    assert problem.what == "`path` has no keys of its own"


def test_set_refuses_a_value_with_a_key_given_twice(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path), "engine={a: 1, a: 2}").values()
    assert problem.what == "a key is given twice, in line 1 and line 1"


def test_set_says_when_a_value_is_no_yaml(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path), "server.host=[").values()
    assert problem.what == "the value is not YAML"


# ------------------------------------------------------------------------------------------- what needs what


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_config_asks_for_keys_where_others_can_come(tmp_path: Path, host: str) -> None:
    file = write(tmp_path, GOOD | {"server": {"host": host}})
    assert problems(file)["server.host"].what == "is open to others, and no key is asked"
    (tmp_path / "keys.yaml").write_text("[]")
    assert load(file, ["server.keys=keys.yaml"]).server.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_config_asks_no_keys_on_loopback(tmp_path: Path, host: str) -> None:
    assert load(write(tmp_path, GOOD | {"server": {"host": host}})).server.keys is None


def test_config_checks_what_must_fit_together(tmp_path: Path) -> None:
    sets = ["limits.max_tokens=100", "model.revision=main", "identity.prompt=no.md", "server.keys=no.yaml"]
    found = problems(write(tmp_path), *sets)
    assert set(found) == {"limits.default_max_tokens", "model.revision", "identity.prompt", "server.keys"}
    assert found["limits.default_max_tokens"].what == "must not pass limits.max_tokens (100)"


def test_config_takes_a_revision_with_a_hub_id(tmp_path: Path) -> None:
    config = load(write(tmp_path), ["model.path=Qwen/Qwen2.5-7B-Instruct", "model.revision=main"])
    assert config.model.path == "Qwen/Qwen2.5-7B-Instruct"


@pytest.mark.parametrize(
    ("path", "is_id"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", True),
        ("a/b", True),
        ("/models/x", False),
        ("./models/x", False),
        ("~/models/x", False),
        ("models", False),
        ("a/b/c", False),
        ("../x", False),
        ("a/b\n", False),
    ],
)
def test_hub_id_is_told_from_a_directory(path: str, is_id: bool) -> None:
    assert is_hub_id(path) is is_id


def test_hub_id_that_exists_here_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("a/b")
    os.makedirs("a/b")
    assert not is_hub_id("a/b")


# ------------------------------------------------------------------------------------------------- the result


def test_config_paths_are_absolute_and_relative_to_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    (tmp_path / "keys.yaml").write_text("[]")
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/borg")
    relative = Path(os.path.relpath(tmp_path / "profile.yaml"))
    config = load(relative, ["server.keys=keys.yaml", "model.path=~/model"])
    assert config.file == tmp_path / "profile.yaml"
    assert config.identity.prompt == tmp_path / "identity.md"
    assert config.server.keys == tmp_path / "keys.yaml"
    assert config.model.path == "/home/borg/model"


def test_config_is_frozen(tmp_path: Path) -> None:
    config = load(write(tmp_path))
    for section in (config, config.model, config.identity, config.server, config.limits, config.cluster):
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, "x")


def test_config_defaults_are_the_contracts(tmp_path: Path) -> None:
    config = load(write(tmp_path))
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8000)
    assert config.model.served_name == "borg-merge-v1"
    limits = config.limits
    assert (limits.temperature, limits.top_p, limits.default_max_tokens) == (0.7, 0.9, 4096)
    assert (limits.max_tokens, limits.deadline_s) == (8192, 60)


def test_config_examples_are_valid_values() -> None:
    """Every key's example, which errors show, must itself be accepted; a placeholder in angle brackets excepted."""
    for section in Config.model_fields.values():
        fields = getattr(section.annotation, "model_fields", {})
        for name, field in fields.items():
            (example,) = field.examples or [None]
            if example is None or str(example).startswith("<"):
                continue
            values = {
                other: value.examples[0] for other, value in fields.items() if value.examples and value.is_required()
            }
            assert section.annotation is not None
            section.annotation(**values | {name: example})


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda leaf: st.lists(leaf, max_size=2) | st.dictionaries(st.text(max_size=5), leaf))


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(sorted(Config.model_fields)), VALUES, max_size=4))
def test_config_survives_any_document(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    """Whatever a file holds, the answer is a Config or a ConfigError."""
    folder = tmp_path_factory.getbasetemp()
    for file in (write(folder, document), write(folder, GOOD | document)):
        with suppress(ConfigError):
            load(file)
