"""The package as pip installs it, away from a clone: its profiles and its identity come with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed from its wheel."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "installed"))
    for name in ("borg_serve", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-index", "--no-deps"]
    subprocess.run([*PIP, "wheel", *offline, "--no-build-isolation", "-w", source / "dist", source], check=True)
    subprocess.run([*PIP, "install", *offline, "--target", folder, *(source / "dist").glob("*.whl")], check=True)
    return folder


def test_wheel_holds_what_the_package_holds(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(folder)) for path in found}

    configs = {f"configs/{name}" for name in files(ROOT / "configs")}
    assert files(installed / "borg_serve") == files(ROOT / "borg_serve") | configs


def test_wheel_checks_the_demo_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "borg_serve", "check"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{installed}/borg_serve/configs/demo-cpu.yaml: valid")
