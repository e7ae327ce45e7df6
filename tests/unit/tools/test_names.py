"""The reader of docs/upstream.md's table, and the walk over source files, tried on small files made here."""

from pathlib import Path
from textwrap import dedent

import pytest

from tests.names import Package, covers, rows
from tests.surface import Name, Sources

TABLE = """
# Page

| name | used in | why | issue | test |
|---|---|---|---|---|
| `vllm.core:Core.step(size)` | `engine/a.py`, `b.py` | steps | none found | `tests/x.py::test_y` |
| `ray.x:y` | `c.py` | why | #12 | `tests/z.py` |

| other | table |
|---|---|
| `a` | `b` |
"""
CORE = """
    class Core:
        hidden = 1
        def __init__(self): self.rows = []
        def step(self, size=1): ...
        def _look(self): ...
"""


def used(tmp_path: Path, source: str) -> set[str]:
    """The names that a file uses which are not public, as the walk finds them beside a small vllm."""
    (tmp_path / "vllm" / "v1").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("def LLM(model): ...\n")
    (tmp_path / "vllm" / "v1" / "__init__.py").touch()
    (tmp_path / "vllm" / "v1" / "core.py").write_text(dedent(CORE) + "def make(): ...\ncore = make()\n")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "module.py").write_text(dedent(source))
    package = Package(tmp_path / "ours", Sources(vllm=tmp_path, ray=tmp_path))
    return {str(use.name) for use in package.uses["module.py"] if not use.is_public()}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from vllm import LLM\nLLM(model='x')", set()),
        ("import vllm\nvllm.LLM()", set()),
        ("from vllm import _private", {"vllm:_private"}),
        ("from vllm.v1.core import Core", {"vllm.v1.core:Core"}),
        (
            "def f():\n    from vllm.v1.core import Core as C\n    C.step",
            {"vllm.v1.core:Core", "vllm.v1.core:Core.step"},
        ),
        ("from vllm.v1 import core\ncore.make(); core.core", {"vllm.v1.core:make", "vllm.v1.core:core"}),
        ("import vllm.v1.core as c\nc.Core.step(size=2)", {"vllm.v1.core:Core.step", "vllm.v1.core:Core.step(size)"}),
        ("import vllm\nvllm.v1.core.make()", {"vllm.v1.core:make"}),
        ("from vllm.v1 import core\ncast(Any, core).make", {"vllm.v1.core:make"}),
        ("from vllm.v1.core import core\ncore.anything(a=1)", {"vllm.v1.core:core"}),
        ("import vllm\nx = y._secret", {":_secret"}),
        ("import vllm\nclass A:\n    def __init__(self): self._own = 1\nA()._own", set()),
        ("import vllm\nimport os\nos._exit(1)", set()),
        ("x = y._secret", set()),
        ("import vllm\ngetattr(x, '_secret', None)", {":_secret"}),
        ("from vllm.v1.core import Core\nrequire('a', Core, 'step')", {"vllm.v1.core:Core", "vllm.v1.core:Core.step"}),
        ("NAME = 'vllm.v1.core.Core'", {"vllm.v1.core:Core"}),
    ],
)
def test_walk_finds(source: str, names: set[str], tmp_path: Path) -> None:
    assert used(tmp_path, source) == names


def test_walk_finds_what_a_subclass_overrides_inherits_and_calls(tmp_path: Path) -> None:
    source = """
        from vllm.v1.core import Core

        class Ours(Core):
            hidden = 2

            def __init__(self) -> None:
                super().__init__(speed=1)

            def step(self, size=1):
                super().step(size=2)
                self.own()
                return self.rows

            def own(self): ...
    """
    core = "vllm.v1.core:Core"
    inherited = {f"{core}.{name}" for name in ("hidden", "step", "step(size)", "rows")}
    assert used(tmp_path, source) == {core, f"{core}(speed)"} | inherited


def test_rows_reads_the_table_of_names_only() -> None:
    first, second = rows(TABLE)
    assert first.name == Name("vllm.core", "Core.step", ("size",))
    assert first.files == ("engine/a.py", "b.py")
    assert (first.issue, first.tests) == ("none found", ("tests/x.py::test_y",))
    assert second.name == Name("ray.x", "y")


def test_rows_refuses_a_row_with_a_cell_too_few() -> None:
    with pytest.raises(ValueError, match="must have 5 cells"):
        rows(TABLE.replace("| steps ", ""))


@pytest.mark.parametrize(
    ("row", "use", "covered"),
    [
        ("a.b:c", Name("a.b", "c"), True),
        ("a.b:c(d, e)", Name("a.b", "c", ("e",)), True),
        ("a.b:c(d)", Name("a.b", "c", ("e",)), False),
        ("a.b:c", Name("a.x", "c"), False),
        ("a.b:C._d", Name("", "_d"), True),
        ("a.b:C._d", Name("", "_e"), False),
    ],
)
def test_covers(row: str, use: Name, covered: bool) -> None:
    assert covers(Name.parse(row), use) is covered
