"""Finding names in a package's source, tried on small packages made here."""

from pathlib import Path

import pytest

from tests.surface import Name, Sources

PACKAGE = {
    "__init__.py": """
        from typing import TYPE_CHECKING
        LAZY = {"Late": ".inner.deep:Late"}
        from .engine import Engine as Driver
        from pkg.star import *
        if TYPE_CHECKING:
            from torch import Tensor
    """,
    "engine.py": """
        import enum
        import json as text
        from .base import Base
        from . import star

        class Engine(Base):
            limit: int = 3

            def __init__(self, size, *, fast=False, **more):
                self.size, self._rows = size, more.pop("rows", 1)

            def run(self, prompt, /, depth=1):
                self.last: str = prompt

        class Kind(enum.Enum):
            CUSTOM = "custom"

        try:
            from fast import kernel
        except ImportError:
            def kernel(block): ...

        Alias = Engine
    """,
    "base.py": """
        from dataclasses import dataclass

        class Base:
            def stop(self, timeout): ...

        @dataclass
        class Settings:
            name: str
            level = 3

        @dataclass
        class More(Settings):
            port: int = 0

        class Model:
            host: str

            def __init__(self, **fields): ...
    """,
    "star.py": "def shared(a, b): ...\n",
    "inner/__init__.py": "",
    "inner/deep.py": "class Late:\n    def __init__(self, when): ...\n",
}


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    for name, text in PACKAGE.items():
        file = tmp_path / "pkg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        indent = " " * 8 if text.startswith("\n") else ""
        file.write_text("\n".join(line.removeprefix(indent) for line in text.splitlines()))
    return Sources(pkg=tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "pkg.engine:Engine",
        "pkg.engine:Engine.limit",
        "pkg.engine:Engine.size",
        "pkg.engine:Engine._rows",
        "pkg.engine:Engine.last",
        "pkg.engine:Engine.run(prompt, depth)",
        "pkg.engine:Engine.stop(timeout)",
        "pkg.engine:Engine(size, fast, rows)",
        "pkg.engine:Kind.CUSTOM",
        "pkg.engine:kernel(block)",
        "pkg.engine:Alias.stop",
        "pkg.engine:Alias(size)",
        "pkg.engine:star.shared(a, b)",
        "pkg:Driver.run",
        "pkg:shared(a, b)",
        "pkg:Late(when)",
        "pkg:engine.Engine",
        "pkg:Tensor",
        "pkg:Tensor(anything)",
        "pkg.base:More(name, port)",
        "pkg.base:Model(host)",
        "pkg.inner.deep:Late",
    ],
)
def test_surface_finds(name: str, sources: Sources) -> None:
    assert sources.problem(Name.parse(name)) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("pkg.motor:Engine", "the module is gone; the same name is in pkg.engine"),
        ("pkg.base:Engine", "Engine is gone; the same name is in pkg.engine"),
        ("pkg.engine:Motor", "Motor is gone"),
        ("pkg.engine:Engine.start", "Engine.start is gone"),
        ("pkg.engine:Engine.size.unit", "Engine.size.unit is gone"),
        ("pkg.engine:Engine.run(depth, width, height)", "Engine.run takes no width, height"),
        ("pkg.engine:Engine(colour)", "Engine takes no colour"),
        ("pkg.base:More(level)", "More takes no level"),
        ("pkg.base:Model(port)", "Model takes no port"),
        ("pkg.engine:Kind.OTHER", "Kind.OTHER is gone"),
        ("pkg:Late(where)", "Late takes no where"),
        ("pkg:Never", "Never is gone"),
    ],
)
def test_surface_says_what_is_gone(name: str, problem: str, sources: Sources) -> None:
    assert sources.problem(Name.parse(name)) == problem


def test_surface_survives_modules_that_import_each_other(tmp_path: Path) -> None:
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "__init__.py").write_text("from ring.other import *\nfrom ring.other import lost\n")
    (tmp_path / "ring" / "other.py").write_text("from ring import *\nfrom ring import lost\n")
    assert Sources(ring=tmp_path).problem(Name("ring", "lost")) == "lost is gone"


@pytest.mark.parametrize("text", ["pkg", "pkg:", "pkg:x(", "pkg x:y", "pkg:x()"])
def test_name_must_have_a_module_and_a_path(text: str) -> None:
    with pytest.raises(ValueError, match="must be module:path"):
        Name.parse(text)


def test_name_is_printed_as_it_is_written() -> None:
    for text in ("a.b:C.d", "a.b:C(d, e)"):
        assert str(Name.parse(text)) == text


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("pkg.engine:Engine.run", ("self", "prompt", "depth")),
        ("pkg.engine:Alias", ("self", "size", "fast")),
        ("pkg:shared", ("a", "b")),
        ("pkg.engine:Kind.CUSTOM", ()),
        ("pkg.engine:Never", ()),
    ],
)
def test_surface_tells_parameters(name: str, parameters: tuple[str, ...], sources: Sources) -> None:
    assert sources.parameters(Name.parse(name)) == parameters
