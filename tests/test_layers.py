"""Who may import whom, print, or end the process: read from the source, so that no import has to be tried."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "borg_serve"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

LAYERS = (
    {"errors"},
    {"config"},
    {"checkpoint", "identity"},
    {"template"},
    {"engine_arguments"},
    {"engine"},
    {"guard", "gate"},
    {"server", "cluster"},
    {"cli"},
)
"""From the ground up: a module imports none of a layer above its own, itself or through others."""

OWNERS = {
    "vllm": {"engine_arguments", "engine", "guard", "server", "frontends", "attention", "attention_kernels", "plugin"},
    "ray": {"cluster", "routing", "mirror"},
    "gradio": {"ui"},
    "typer": {"cli"},
    "uvicorn": {"server", "protocol", "ui"},
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Dotted names that a module imports when it runs, at its top or inside a function; not for its types only."""
    found = set()
    waiting: list[ast.AST] = [tree(module)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide who is meant"
            found |= {f"{node.module}.{name.name}" for name in node.names}
        waiting += ast.iter_child_nodes(node)
    return frozenset(found)


@cache
def reach(module: str) -> frozenset[str]:
    """Modules of the package that a module imports, itself or through others."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports(waiting.pop()):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top == "borg_serve" and other in MODULES and other not in found:
                found.add(other)
                waiting.append(other)
    return frozenset(found)


def outside(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(module)}


def test_layers_name_modules_that_exist() -> None:
    later = {"cluster", "ui"}  # of other parts of the package, which may not be there
    assert set().union(*LAYERS, *OWNERS.values()) - later <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_layers_let_no_import_go_up(module: str) -> None:
    level = next((index for index, layer in enumerate(LAYERS) if module in layer), None)
    if level is None:
        return
    above = set().union(*LAYERS[level + 1 :])
    assert not reach(module) & above


@pytest.mark.parametrize("module", MODULES)
def test_layers_let_no_import_come_back(module: str) -> None:
    # Code that starts processes runs in them what its own importer holds: the one pair that must know each other.
    if module in {"server", "frontends"}:
        assert reach(module) - {"server", "frontends"} == reach("server") - {"server", "frontends"}
        return
    assert module not in reach(module)


@pytest.mark.parametrize("library", OWNERS)
def test_layers_give_each_large_library_its_owners(library: str) -> None:
    assert {module for module in MODULES if library in outside(module)} <= OWNERS[library]


def test_layers_keep_large_libraries_out_of_the_top_of_modules() -> None:
    """`borg-serve --help` must not wait for a GPU library: they are imported where they are used."""
    slow = {"vllm", "torch", "transformers", "ray", "gradio"}
    for module in set(MODULES) - {"cluster", "routing", "mirror", "attention", "attention_kernels", "rows", "ui"}:
        for node in tree(module).body:
            if isinstance(node, ast.Import):
                assert not {name.name.partition(".")[0] for name in node.names} & slow, module
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in slow, module


@pytest.mark.parametrize("module", [name for name in MODULES if name != "cli"])
def test_layers_let_only_the_command_line_print(module: str) -> None:
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id in {"print", "input"}]
    assert "sys.stdout" not in {ast.unparse(node) for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}


ENDS = {
    # Processes without a command line above them.
    "frontends": ["sys.exit(uvloop.run(serve_process(prepared, sock, shared, client_config)))"],
    "plugin": ["os._exit(1)"],
    "cluster": ["os._exit(1)"],
}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "cli"])
def test_layers_let_only_the_command_line_exit(module: str) -> None:
    ends = {"sys.exit", "os._exit", "exit", "quit", "SystemExit"}
    found = [
        ast.unparse(node)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ends
    ]
    assert found == ENDS.get(module, [])


@pytest.mark.parametrize("module", MODULES)
def test_layers_say_what_a_module_does_and_offers(module: str) -> None:
    source = tree(module)
    docstring = ast.get_docstring(source)
    assert docstring, f"{module} must say what it does"
    if module.startswith("__"):
        return
    assigned = {ast.unparse(t) for node in source.body if isinstance(node, ast.Assign) for t in node.targets}
    assert "__all__" in assigned
    offered = ast.literal_eval(
        next(
            node.value
            for node in source.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
    )
    names = {
        node.name for node in source.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    names |= assigned | {ast.unparse(node.target) for node in source.body if isinstance(node, ast.AnnAssign)}
    names |= {
        name.asname or name.name for node in source.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert set(offered) <= names
    assert len(offered) == len(set(offered))


@pytest.mark.parametrize("module", MODULES)
def test_layers_never_swallow_every_error_or_assert_an_input(module: str) -> None:
    for node in ast.walk(tree(module)):
        assert not isinstance(node, ast.Assert), f"{module}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno}"
            assert ast.unparse(node.type) != "BaseException" or any(isinstance(n, ast.Raise) for n in ast.walk(node))


@pytest.mark.parametrize("module", MODULES)
def test_layers_never_look_for_pip_in_this_process(module: str) -> None:
    # setuptools then leaves distutils to the standard library, and vLLM, which imports setuptools, cannot be imported.
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("find_spec", "import_module", "__import__")):
            assert "pip" not in [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
