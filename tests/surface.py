"""Find names in the source of a package, installed or unpacked, without importing it.

It reads syntax trees: re-exports, lazy attributes, classes with their bases, instance attributes, parameters.
It does not know which names matter, and follows no import out of the folders it was given.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
LAZY = re.compile(r"([\w.]+):(\w+)")
"""A value of a module's table of lazy attributes: `.engine.arg_utils:AsyncEngineArgs`."""


@dataclass(frozen=True)
class Name:
    """`module:path`, and the parameters that must exist if it is called."""

    module: str
    path: str
    parameters: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Name":
        """Read `module:Class.method(a, b)`. Raises ValueError."""
        found = re.fullmatch(r"([\w.]+):([\w.]+)(?:\(([\w, ]+)\))?", text)
        if found is None:
            raise ValueError(f"name: must be module:path or module:path(parameters), got {text!r}. Correct it.")
        return cls(found[1], found[2], tuple(found[3].split(", ")) if found[3] else ())

    def __str__(self) -> str:
        return f"{self.module}:{self.path}" + (f"({', '.join(self.parameters)})" if self.parameters else "")


@dataclass(frozen=True)
class Import:
    """What an import statement or a lazy attribute refers to; `name` is None for a module."""

    module: str
    name: str | None


@dataclass
class Module:
    """The names that a module's statements bind, each with every statement that binds it."""

    name: str
    names: dict[str, list[ast.AST | Import]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    """Modules of which it imports everything."""


@dataclass(frozen=True)
class Found:
    """A definition and the module it is in; no node for a module itself, no module for what lies outside."""

    module: Module | None
    node: ast.AST | None


OUTSIDE = Found(None, None)


class Sources:
    """Packages by name, each with the folder it is in: an environment's site-packages, or an unpacked wheel."""

    def __init__(self, **folders: Path) -> None:
        self._folders = folders
        self.module = cache(self._module)

    def problem(self, name: Name) -> str | None:
        """What is wrong with a name here; None if it and all its parameters exist."""
        if self.module(name.module) is None:
            return f"the module is gone{self._elsewhere(name)}"
        found = self.find(name.module, name.path)
        if not found:
            return f"{name.path} is gone{self._elsewhere(name)}"
        missing = min(([one for one in name.parameters if not self._takes(each, one)] for each in found), key=len)
        return f"{name.path} takes no {', '.join(missing)}" if missing else None

    def find(self, module: str, path: str) -> list[Found]:
        """Every definition of a dotted path in a module; empty if there is none."""
        first, *rest = path.split(".")
        found = self._lookup(module, first, frozenset())
        for name in rest:
            found = [inner for each in found for inner in self._attribute(each, name)]
        return found

    def parameters(self, name: Name) -> tuple[str, ...]:
        """What a function, or a class's `__init__`, takes; empty for anything else."""
        found = self.find(name.module, name.path)
        makers = [maker for each in found for maker in self._attribute(each, "__init__")]
        for node in (each.node for each in [*makers, *found]):
            if isinstance(node, Function):
                return tuple(argument.arg for argument in _arguments(node))
        return ()

    def is_module(self, module: str) -> bool:
        """Whether there is such a module."""
        return self.module(module) is not None

    def is_class(self, module: str, path: str) -> bool:
        """Whether the path is a class, directly or by another name."""
        return any(isinstance(found.node, ast.ClassDef) for found in self.find(module, path))

    def modules(self, package: str) -> Iterator[tuple[str, Path]]:
        """Every module of a package or subpackage, with its file."""
        folder = self._folders[package.partition(".")[0]]
        for path in sorted(folder.joinpath(*package.split(".")).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path

    def _module(self, name: str) -> Module | None:
        folder = self._folders.get(name.partition(".")[0])
        if folder is None:
            return None
        path = folder.joinpath(*name.split("."))
        for file, package in ((path / "__init__.py", name), (path.with_suffix(".py"), name.rpartition(".")[0])):
            if file.is_file():
                module = Module(name)
                _bind(ast.parse(file.read_text(encoding="utf-8")).body, module, package)
                return module
        return None

    def _lookup(self, module: str, name: str, seen: frozenset[tuple[str, str]]) -> list[Found]:
        source = self.module(module)
        if source is None:
            return [] if module.partition(".")[0] in self._folders else [OUTSIDE]
        if (module, name) in seen:
            return []
        seen |= {(module, name)}
        found = []
        for bound in source.names.get(name, []):
            if not isinstance(bound, Import):
                found += self._alias(source, bound, seen)
            elif bound.name is None:
                found += [Found(inner, None)] if (inner := self.module(bound.module)) else []
            else:
                found += self._lookup(bound.module, bound.name, seen)
        if not found and (inner := self.module(f"{module}.{name}")):
            found = [Found(inner, None)]
        for star in source.stars if not found else ():
            found += self._lookup(star, name, seen)
        return found

    def _alias(self, module: Module, node: ast.AST, seen: frozenset[tuple[str, str]]) -> list[Found]:
        """Follow `X = Y` to the definition of Y."""
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Name):
            return self._lookup(module.name, value.id, seen) or [Found(module, node)]
        return [Found(module, node)]

    def _attribute(self, owner: Found, name: str) -> list[Found]:
        if owner.module is None:
            return []
        if owner.node is None:
            return self._lookup(owner.module.name, name, frozenset())
        if not isinstance(owner.node, ast.ClassDef):
            return []
        own = [Found(owner.module, node) for node in _members(owner.node).get(name, [])]
        return own or next(filter(None, (self._attribute(base, name) for base in self._bases(owner))), [])

    def _bases(self, owner: Found) -> Iterator[Found]:
        if owner.module is None or not isinstance(owner.node, ast.ClassDef):
            return
        for base in owner.node.bases:
            text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            yield from (found for found in self.find(owner.module.name, text) if found.node is not owner.node)

    def _takes(self, found: Found, parameter: str) -> bool:
        if isinstance(found.node, Function):
            if parameter in {argument.arg for argument in _arguments(found.node)}:
                return True
            # One that the body takes out of **kwargs by its name.
            texts = {node.value for node in ast.walk(found.node) if isinstance(node, ast.Constant)}
            return found.node.args.kwarg is not None and parameter in texts
        if not isinstance(found.node, ast.ClassDef):
            return found is OUTSIDE
        makers = [each.node for each in self._attribute(found, "__init__") if isinstance(each.node, Function)]
        if any(self._takes(Found(found.module, maker), parameter) for maker in makers):
            return True
        if makers and not any(maker.args.kwarg for maker in makers):
            return False
        fields = self._attribute(found, parameter)
        return any(isinstance(each.node, ast.AnnAssign) for each in fields)

    def _elsewhere(self, name: Name) -> str:
        """Where a definition of the same name is now, in words."""
        first = name.path.partition(".")[0]
        define = re.compile(rf"^(?:class|def|async def) {first}\b", re.MULTILINE)
        top = name.module.partition(".")[0]
        places = [module for module, path in self.modules(top) if define.search(path.read_text(encoding="utf-8"))]
        here = [place for place in places if place != name.module]
        return f"; the same name is in {', '.join(here)}" if 0 < len(here) < 4 else ""


def _arguments(node: Function) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def _bind(body: list[ast.stmt], module: Module, package: str) -> None:
    """Enter what a module's statements bind, those inside `if`, `try` and `with` included."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            module.names.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        module.names.setdefault(name.id, []).append(node)
            _bind_lazy(node, module, package)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                bound = Import(alias.name if alias.asname else local, None)
                module.names.setdefault(local, []).append(bound)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node, package)
            for alias in node.names:
                if alias.name == "*":
                    module.stars.append(origin)
                else:
                    module.names.setdefault(alias.asname or alias.name, []).append(Import(origin, alias.name))
        else:
            for inner in ("body", "orelse", "finalbody"):
                _bind(getattr(node, inner, []), module, package)
            for handler in getattr(node, "handlers", []):
                _bind(handler.body, module, package)


def _bind_lazy(node: ast.Assign | ast.AnnAssign, module: Module, package: str) -> None:
    """Enter the entries of a table such as `MODULE_ATTRS = {"LLM": ".entrypoints.llm:LLM"}`."""
    if not isinstance(node.value, ast.Dict):
        return
    for key, value in zip(node.value.keys, node.value.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            found = LAZY.fullmatch(value.value)
            if found is not None:
                origin = package + found[1] if found[1].startswith(".") else found[1]
                module.names.setdefault(str(key.value), []).append(Import(origin, found[2]))


def absolute(node: ast.ImportFrom, package: str) -> str:
    """The full name of the module that a `from` import names."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def _members(owner: ast.ClassDef) -> dict[str, list[ast.AST]]:
    """What a class's body binds, and what its methods assign to `self`."""
    body = Module(owner.name)
    _bind(owner.body, body, "")
    members = {name: [node for node in nodes if not isinstance(node, Import)] for name, nodes in body.names.items()}
    for node in ast.walk(owner):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            for inner in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "self":
                    members.setdefault(inner.attr, []).append(node)
    return members
