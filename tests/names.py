"""The table of docs/upstream.md, and the names of vLLM and Ray that the package's source uses.

It finds imports, attributes of what was imported, overridden and inherited members, keywords of calls, and attributes
with a leading underscore. It does not find the other attributes of objects that vLLM or Ray hand over at run time.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from tests.surface import Function, Name, Sources, absolute

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "upstream.md"
LIBRARIES = ("vllm", "ray")
PUBLIC = frozenset(
    {
        *("vllm", "vllm.config", "vllm.inputs", "vllm.outputs", "vllm.sampling_params"),
        *("ray", "ray.serve", "ray.serve.config", "ray.serve.deployment", "ray.serve.llm", "ray.serve.llm.deployment"),
        *("ray.serve.request_router", "ray.serve.schema", "ray.util.metrics"),
    }
)
"""Modules whose names without a leading underscore are documented as public. docs/upstream.md lists them."""
SPECIAL = frozenset({"__init__", "__call__", "__del__", "__enter__", "__exit__"})
"""Methods with underscores that are Python's own."""
DOTTED = re.compile(r"(?:vllm|ray)(?:\.\w+){2,}")
"""A text that names a module or class by its path."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: Name
    files: tuple[str, ...]
    why: str
    issue: str
    tests: tuple[str, ...]


def rows(page: str) -> list[Row]:
    """Read the table of names. Raises ValueError for a row of another shape."""
    (table,) = re.findall(r"^\| name \| used in \|.*\n\|[-| ]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5:
            raise ValueError(f"docs/upstream.md: a row must have 5 cells, got {line!r}. Write one cell a column.")
        name, where, why, issue, tests = cells
        files, named = re.findall(r"`([\w/.]+)`", where), re.findall(r"`([\w/.:]+)`", tests)
        found.append(Row(Name.parse(name.strip("`")), tuple(files), why, issue, tuple(named)))
    return found


@dataclass(frozen=True)
class Use:
    """A name of vLLM's or Ray's in a source file."""

    name: Name
    """Its module is empty where only the attribute is known."""
    line: int

    typing: bool = False
    """Whether it is only for type checkers."""

    def is_public(self) -> bool:
        """Whether the library documents it."""
        hidden = [part for part in self.name.path.split(".") if part.startswith("_") and part not in SPECIAL]
        return self.name.module in PUBLIC and not hidden


def covers(row: Name, use: Name) -> bool:
    """Whether a row of the table stands for a use: the same name with at least its parameters."""
    if not use.module:
        return row.path.rpartition(".")[2] == use.path
    same = (row.module, row.path) == (use.module, use.path)
    return same and set(use.parameters) <= set(row.parameters)


def uses(path: Path, sources: Sources, own: frozenset[str]) -> list[Use]:
    """Every name of vLLM's and Ray's that a file uses. `own`: attributes that our own classes and modules define."""
    walk = Walk(sources, own)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    walk.visit(tree)
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    lines = {inner.lineno for node in blocks for inner in node.body}
    found = {replace(use, typing=use.line in lines) for use in walk.found}
    return sorted(found, key=lambda use: (use.line, str(use.name)))


def own_attributes(paths: Iterable[Path]) -> frozenset[str]:
    """Names with a leading underscore that these files define."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                on_self = isinstance(node, ast.Name) or ast.unparse(node.value) in {"self", "cls"}
                found |= {node.id if isinstance(node, ast.Name) else node.attr} if on_self else set()
    return frozenset(name for name in found if name.startswith("_"))


@dataclass
class Walk(ast.NodeVisitor):
    """Collects the uses of one file."""

    sources: Sources
    own: frozenset[str]
    found: list[Use] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    """Local name: `module` or `module:path`."""
    bases: list[list[str]] = field(default_factory=list)
    """Of each class around a statement, the bases that are vLLM's or Ray's."""

    def visit_Module(self, node: ast.Module) -> None:
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and (inner.module or "").partition(".")[0] in LIBRARIES:
                self._import(absolute(inner, ""), inner)
            elif isinstance(inner, ast.Import):
                for alias in inner.names:
                    if alias.name.partition(".")[0] in LIBRARIES:
                        self.aliases[alias.asname or alias.name.partition(".")[0]] = (
                            alias.name if alias.asname else alias.name.partition(".")[0]
                        )
        self.generic_visit(node)

    def _import(self, module: str, node: ast.ImportFrom) -> None:
        for alias in node.names:
            inner = f"{module}.{alias.name}"
            is_module = self.sources.is_module(inner)
            self.aliases[alias.asname or alias.name] = inner if is_module else f"{module}:{alias.name}"
            if not is_module:
                self._add(f"{module}:{alias.name}", node.lineno)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [base for base in map(self._target, node.bases) if base and ":" in base]
        bound = {inner.name for inner in node.body if isinstance(inner, Function)}
        bound |= {target.id for inner in node.body if isinstance(inner, ast.Assign) for target in _names(inner)}
        for name in sorted(bound - SPECIAL):
            self._member(bases, name, node.lineno)
        self.bases.append(bases)
        self.generic_visit(node)
        self.bases.pop()

    def visit_Call(self, node: ast.Call) -> None:
        target, keywords = self._target(node.func), [word.arg for word in node.keywords if word.arg]
        if target and ":" in target and keywords:
            self._add(target, node.lineno, *keywords)
        elif isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "super()" and self.bases:
            if node.func.attr not in SPECIAL:
                self._member(self.bases[-1], node.func.attr, node.lineno, *keywords)
            elif keywords:
                for base in self.bases[-1]:
                    self._add(base, node.lineno, *keywords)
        elif isinstance(node.func, ast.Name) and node.func.id in {"require", "getattr", "hasattr"}:
            self._named(node)
        self.generic_visit(node)

    def _named(self, node: ast.Call) -> None:
        """A call that names attributes as texts: `require(where, Owner, "name")`, `getattr(Owner, "name")`."""
        owner = next((target for target in map(self._target, node.args[:2]) if target), None)
        for argument in node.args[1:]:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                if owner is not None and argument.value not in SPECIAL:
                    self._add(f"{owner}{'.' if ':' in owner else ':'}{argument.value}", node.lineno)
                else:
                    self._unowned(argument.value, node.lineno)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        target = self._target(node)
        if target and ":" in target:
            self._add(target, node.lineno)
            return
        owner = ast.unparse(node.value)
        inherited = owner == "self" and self.bases and self._member(self.bases[-1], node.attr, node.lineno)
        if not inherited and owner not in {"os", "sys", "super()"}:
            self._unowned(node.attr, node.lineno)
        self.generic_visit(node)

    def _unowned(self, name: str, line: int) -> None:
        """Enter an attribute of an object that no import tells of, where its name says that it is private."""
        ours = name in self.own or re.fullmatch(r"__\w+__", name)
        if self.aliases and name.startswith("_") and not ours:
            self.found.append(Use(Name("", name), line))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            if self.sources.is_module(node.value):
                self.found.append(Use(Name(node.value, ""), node.lineno))
            else:
                self._add(":".join(node.value.rsplit(".", 1)), node.lineno)

    def _target(self, node: ast.AST) -> str | None:
        """What an expression refers to, as far as imports tell: `module`, `module:path`, or None."""
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "cast" and len(node.args) == 2:
            return self._target(node.args[1])
        if isinstance(node, ast.Subscript):
            return self._target(node.value)
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self._target(node.value)
        if owner is None:
            return None
        if ":" not in owner:
            inner = f"{owner}.{node.attr}"
            return inner if self.sources.is_module(inner) else f"{owner}:{node.attr}"
        module, _, path = owner.partition(":")
        return f"{owner}.{node.attr}" if self.sources.is_class(module, path) else None

    def _member(self, bases: list[str], name: str, line: int, *keywords: str) -> bool:
        """Enter a member that a class has from one of its bases."""
        for base in bases:
            module, _, path = base.partition(":")
            if self.sources.find(module, f"{path}.{name}"):
                self._add(f"{base}.{name}", line, *keywords)
                return True
        return False

    def _add(self, target: str, line: int, *keywords: str) -> None:
        module, _, path = target.partition(":")
        self.found.append(Use(Name(module, path, tuple(sorted(keywords))), line))


def _names(node: ast.Assign) -> Iterator[ast.Name]:
    yield from (target for target in node.targets if isinstance(target, ast.Name))


@dataclass(frozen=True)
class Package:
    """Our own source, with the libraries that it is read against."""

    folder: Path
    sources: Sources

    @cached_property
    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("*.py"))

    @cached_property
    def uses(self) -> dict[str, list[Use]]:
        """File, relative to the folder above the package: what it uses."""
        own = own_attributes(self.files)
        return {str(path.relative_to(self.folder)): uses(path, self.sources, own) for path in self.files}
