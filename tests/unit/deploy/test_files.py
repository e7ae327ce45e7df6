"""Every file in deploy/ is of a known kind, says what it is for, and holds no secret."""

import re
from pathlib import Path

import pytest
import yaml

from tests.unit.deploy.files import DEPLOY, FILES, SERVE, YAMLS, name


def test_deploy_holds_files_of_known_kinds_only() -> None:
    assert {p for p in DEPLOY.rglob("*") if p.is_file()} == {p for files in FILES.values() for p in files}
    assert {p.stem for p in SERVE} == {"demo-cpu", "7b-autoscale", "7b-tp2", "7b-tp4"}
    assert all(FILES.values())


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_deploy_file_names_no_key_twice_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path not in FILES["provisioning"] and path.name != "namespace.yaml":
        assert text.startswith("# ")
    for document in yaml.compose_all(text):
        waiting = [document]
        while waiting:
            node = waiting.pop()
            if isinstance(node, yaml.MappingNode):
                names = [key.value for key, _ in node.value]
                assert len(names) == len(set(names)), names
                waiting += [value for _, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                waiting += node.value


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_deploy_file_holds_no_secret(path: Path) -> None:
    assert not re.search(r"[0-9a-f]{32}|borg-[A-Za-z0-9_-]{20}|BEGIN [A-Z ]*KEY", path.read_text(encoding="utf-8"))
