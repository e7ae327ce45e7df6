"""A checkpoint from a hub: the real client against a small hub. What is fetched, at which commit, what goes wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from borg_serve.checkpoint.files import INDEX_FILE
from tests.hub import COMMIT, Hub, Repository, running
from tests.tiny import SIZES, save_byte_tokenizer, save_model
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
FETCH = """
import json, sys
from pathlib import Path
from borg_serve.checkpoint.locate import locate
from borg_serve.config import load
from borg_serve.engine.environment import prepare_environment
from borg_serve.errors import BorgServeError
prepare_environment()
import huggingface_hub
for path, revision in json.loads(sys.argv[1]):
    sets = [f"model.path={path}"] + ([f"model.revision={revision}"] if revision else [])
    try:
        print(locate(load(Path("configs/demo-cpu.yaml"), sets)), huggingface_hub.is_offline_mode(), flush=True)
    except BorgServeError as error:
        print(error, flush=True)
"""

CHECK = """
import json, sys
from pathlib import Path
from borg_serve.checkpoint import hub
from borg_serve.config import load
from borg_serve.engine import report
for path in sys.argv[1:]:
    print(json.dumps(report.effective(load(Path("configs/7b-h100.yaml"), [f"model.path={path}"]))))
    hub.go_offline()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, with what other programs leave beside one."""
    directory = tmp_path_factory.mktemp("hub") / "model"
    save_model(LlamaConfig(**SIZES | {"vocab_size": 256, "max_position_embeddings": 32768}), directory)
    save_byte_tokenizer(directory)
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory / "new", max_shard_size="4KB")
    (directory / "model.safetensors").unlink()
    for path in (directory / "new").glob("model*"):
        path.rename(directory / path.name)
    shutil.rmtree(directory / "new")
    assert (directory / INDEX_FILE).is_file()
    beside = ("README.md", "consolidated.safetensors", "adapter_model.safetensors", "adapter_config.json", "model.gguf")
    for name in (*beside, "pytorch_model.bin", "original/params.json", "onnx/config.json", "model-old.safetensors"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    return directory


def environment(hub: Hub | None, cache: Path, **more: str) -> dict[str, str]:
    """Of a machine with this cache; without a hub nothing answers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{sock.getsockname()[1]}"
    ours = {"HF_HOME": str(cache), "HF_ENDPOINT": hub.url if hub else closed, "HF_HUB_DISABLE_XET": "1"}
    return {**kept, "PYTHONPATH": str(ROOT), **ours, **more}


def fetch(environ: Mapping[str, str], *cases: tuple[str, str | None], within: Sequence[str] = ()) -> list[str]:
    """What each `(path, revision)` gave, in one process: a directory and whether it is offline now, or an error."""
    command = [*within, sys.executable, "-c", FETCH, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_hub_gives_what_is_served_and_nothing_else(model: Path, tmp_path: Path) -> None:
    shards = {path.name for path in model.glob("model-0*.safetensors")}
    with running({"org/model": Repository(model, cut={min(shards)})}) as hub:
        (line,) = fetch(environment(hub, tmp_path), ("org/model", None))
        small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX_FILE}
        assert hub.fetched() == shards | small | {"chat_template.jinja"}
        assert hub.repositories["org/model"].cut == set(), "a shard must have been cut, and asked for again"
    directory, offline = line.split()
    assert Path(directory).name == COMMIT
    assert offline == "True"
    # The cache is enough: without a network, and told to ask no hub.
    for environ in (environment(None, tmp_path), environment(None, tmp_path, HF_HUB_OFFLINE="1")):
        assert fetch(environ, ("org/model", None), ("org/model", COMMIT)) == [line, line]


def test_hub_errors_are_one_line_with_the_cure(model: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", INDEX_FILE))
    lost = shutil.copytree(model, tmp_path / "lost", ignore=shutil.ignore_patterns("model-00001*"))
    repositories = {"org/gated": Repository(model, gated=401), "org/mine": Repository(model, gated=403)}
    repositories |= {"org/private": Repository(model, refused=(401, "RepoNotFound"))}
    repositories |= {"org/down": Repository(model, refused=(503, ""))}
    repositories |= {"org/model": Repository(model), "org/bare": Repository(bare), "org/lost": Repository(lost)}
    cases = {
        ("org/gated", None): "model.path: is gated, got 'org/gated'. Accept its terms on its page",
        ("org/mine", None): "model.path: is gated, got 'org/mine'. Accept its terms on its page",
        ("org/private", None): "model.path: is unknown to the hub, or private, got 'org/private'. Correct the name, or",
        ("org/absent", None): "model.path: is unknown to the hub, or private, got 'org/absent'. Correct the name",
        ("org/model", "v9"): "model.revision: is no branch, tag or commit of org/model, got 'v9'. Correct or remove",
        ("org/down", None): "model.path: the hub answers 503, got 'org/down'. Try again later",
        ("org/bare", None): f'org/bare at {COMMIT}: must hold model.safetensors, got ["model.gguf", ',
        ("org/lost", None): f"org/lost at {COMMIT}: must hold model-00001-of-",
    }
    with running(repositories) as hub:
        lines = fetch(environment(hub, tmp_path), *cases)
    assert len(lines) == len(cases)
    for line, expected in zip(lines, cases.values(), strict=True):
        assert expected in line


def test_hub_that_does_not_answer_is_told_from_one_that_may_not_be_asked(tmp_path: Path) -> None:
    (line,) = fetch(environment(None, tmp_path), ("org/model", None))
    assert "model.path: cannot be fetched (" in line
    assert "Check the network and HF_ENDPOINT (http://127.0.0.1:" in line
    (line,) = fetch(environment(None, tmp_path, HF_HUB_OFFLINE="1"), ("org/model", None))
    assert "HF_HUB_OFFLINE is set, got 'org/model'. Unset HF_HUB_OFFLINE" in line


def test_hub_download_that_is_interrupted_goes_on_with_what_is_missing(model: Path, tmp_path: Path) -> None:
    shards = {path.name for path in model.glob("model-0*.safetensors")}
    repository = Repository(model, held={max(shards)})
    with running({"org/model": repository}) as hub:
        environ = environment(hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
        command = [sys.executable, "-c", FETCH, json.dumps([("org/model", None)])]
        for number, asked in ((signal.SIGTERM, shards), (signal.SIGINT, {max(shards)})):
            hub.asked.clear()
            with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as process:
                wait_until("the shards are asked for", lambda asked=asked: hub.fetched() >= asked, 60)  # type: ignore[misc]
                process.send_signal(number)
                said, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            assert "the download was interrupted, got 'org/model'. Run it again" in said
            assert list(tmp_path.rglob("*.incomplete")) == []
        repository.held.clear()
        hub.asked.clear()
        assert COMMIT in fetch(environ, ("org/model", None))[0]
        assert hub.fetched() == {max(shards)}


def test_hub_download_on_a_full_disk_says_so(model: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespace of its own here to mount a small disk in")
    small = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=24k none {tmp_path} && exec "$@"', "sh"]
    with running({"org/model": Repository(model)}) as hub:
        (line,) = fetch(environment(hub, tmp_path), ("org/model", None), within=small)
    assert f"the disk is full, got 'org/model'. Free space in {tmp_path}/hub, or set HF_HOME" in line


def test_hub_id_is_checked_by_its_configuration_alone(model: Path, tmp_path: Path) -> None:
    name = "Optitransfer/Qwen2.5-7B-Instruct-borg-merge-v1"
    with running({name: Repository(model)}) as hub:
        command = [sys.executable, "-c", CHECK, name, "org/absent"]
        environ = environment(hub, tmp_path)
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert hub.fetched()
        assert not any(fetched.endswith(".safetensors") for fetched in hub.fetched())
    found, unknown = map(json.loads, done.stdout.splitlines())
    assert found["checkpoint"] == {"path": name, "revision": COMMIT}
    assert found["memory"]["weights_bytes"] == json.loads((model / INDEX_FILE).read_text())["metadata"]["total_size"]
    assert unknown["memory"] is None
    assert "No memory plan: " in unknown["note"]
    assert "HF_HUB_OFFLINE is set, got 'org/absent'" in unknown["note"]
