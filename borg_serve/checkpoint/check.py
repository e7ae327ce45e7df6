"""Checks that a directory is a whole, sound checkpoint: files, names, shapes, dtypes, values, and its manifest if any.

Knows nothing of engines or devices.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from borg_serve.checkpoint.files import COPY_AGAIN, TensorInfo, first_problems, lfs_pointers, read_headers, read_json
from borg_serve.checkpoint.manifest import MANIFEST_FILE, Manifest, digest_files, read_manifest
from borg_serve.checkpoint.structure import Quantised
from borg_serve.checkpoint.structure import problems as structure_problems
from borg_serve.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from borg_serve.checkpoint.reading import Progress, Reading

__all__ = ["Checkpoint", "inspect", "preflight", "write_manifest"]

SERVED_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory says of itself, every file of it readable and consistent with the others."""

    path: Path
    config: Mapping[str, Any]
    architecture: str
    dtype: str
    """What config.json says, in torch's words: `bfloat16`."""
    tensors: Mapping[str, TensorInfo]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    max_positions: int
    vocab_size: int

    @property
    def quantisation(self) -> Mapping[str, Any] | None:
        """What config.json says of it, by transformers' names; None for a checkpoint that is not quantised."""
        return self.config.get("quantization_config") or self.config.get("compression_config") or None

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors; packed ones count as what they are packed into."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def inspect(directory: Path | str, weights: bool = True) -> Checkpoint:
    """Read a checkpoint's JSON files and safetensors headers, without its weights and without importing torch.

    Without `weights` their files may be absent, and `tensors` is empty. Raises CheckpointError with every problem
    found, one a line.
    """
    path = Path(directory)
    problems: list[Problem] = []
    if not path.is_dir():
        cure = "Give the directory that holds config.json and model.safetensors."
        got = "a file" if path.exists() else "nothing there"
        _raise_if([Problem(str(path), "must be a checkpoint directory", got, cure)])
    _raise_if(lfs_pointers(path))
    config = read_json(path / "config.json", problems)
    _check_tokenizer(path, problems)
    tensors = read_headers(path, problems) if weights else {}
    if not config:
        _raise_if(problems)

    where = str(path / "config.json")
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(architecture, str):
        problems.append(Problem(f"{where}: architectures", "must list one class name", architectures, COPY_AGAIN))
    dtype = config.get("dtype") or config.get("torch_dtype")  # transformers 5 renamed the key
    if dtype not in SERVED_DTYPES:
        cure = "Set it to the dtype of the weights."
        problems.append(Problem(f"{where}: dtype", f"must be one of {', '.join(SERVED_DTYPES)}", dtype, cure))

    def count(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            problems.append(Problem(f"{where}: {key}", "must be a positive integer", value, COPY_AGAIN))
            return 1
        return value

    hidden_size, num_heads = count("hidden_size"), count("num_attention_heads")
    num_layers, vocab_size = count("num_hidden_layers"), count("vocab_size")
    num_kv_heads = count("num_key_value_heads", num_heads)
    head_dim = count("head_dim", hidden_size // num_heads)
    max_positions = count("max_position_embeddings")
    if tensors and num_layers > len(tensors):  # with a damaged number the structure check would take hours
        what = f"must not exceed the number of tensors, {len(tensors)}"
        problems.append(Problem(f"{where}: num_hidden_layers", what, num_layers, COPY_AGAIN))
    _raise_if(problems)
    return Checkpoint(
        path,
        config,
        str(architecture),
        str(dtype),
        tensors,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        max_positions=max_positions,
        vocab_size=vocab_size,
    )


def preflight(
    checkpoint: Checkpoint,
    progress: "Progress | None" = None,
    threads: int | None = None,
    quantised: Quantised | None = None,
) -> str:
    """Prove the checkpoint whole and sound by reading all of it once, and return its Merkle root in hexadecimal.

    In this order: small files against the manifest, tensors against the architecture and the manifest, then the bytes.
    The problems of one step are raised together as CheckpointError. Needs torch and transformers, but no device; for a
    quantised checkpoint also `quantised`, which knows its layers.
    """
    path, tensors = checkpoint.path, checkpoint.tensors
    manifest = read_manifest(path)
    if manifest is not None:
        known, found = manifest.files, digest_files(path)
        changed = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
        what = f"must be the file {MANIFEST_FILE} was made with"
        _raise_if(Problem(str(path / name), what, found.get(name, "no such file"), COPY_AGAIN) for name in changed)
    problems = structure_problems(checkpoint, quantised)
    if manifest is not None:
        names = sorted(manifest.tensors.keys() ^ tensors.keys())
        what = f"must be both in the files and in {MANIFEST_FILE}"
        problems += first_problems(
            names, path, what, lambda name: "only in the " + ("files" if name in tensors else "manifest")
        )
    _raise_if(problems)

    readings, problems = _read(checkpoint, progress, threads)
    made = Manifest.of(readings, {})
    if manifest is not None:
        changed = [name for name, leaf in made.tensors.items() if leaf != manifest.tensors[name]]
        what = f"must have the SHA-256 that {MANIFEST_FILE} has for it"
        problems += first_problems(changed, path, what, made.tensors.__getitem__)
    _raise_if(problems)
    return made.root


def write_manifest(directory: Path | str, progress: "Progress | None" = None, threads: int | None = None) -> Manifest:
    """Hash a checkpoint whose values are all finite, and write the result beside it as `borg-manifest.json`."""
    checkpoint = inspect(directory)
    readings, problems = _read(checkpoint, progress, threads)
    _raise_if(problems)
    manifest = Manifest.of(readings, digest_files(checkpoint.path))
    manifest.write(checkpoint.path)
    return manifest


def _read(
    checkpoint: Checkpoint, progress: "Progress | None", threads: int | None
) -> tuple[dict[str, "Reading"], list[Problem]]:
    """Read all tensors; return what was found, and a problem for each that holds NaN or infinity."""
    from borg_serve.checkpoint.reading import read_tensors  # here, because it imports torch

    readings = read_tensors(checkpoint.tensors.values(), progress, threads)
    faults = {name: fault for name, reading in readings.items() if (fault := reading.non_finite) is not None}
    what = "must hold finite values only"
    return readings, first_problems(sorted(faults), checkpoint.path, what, faults.__getitem__)


def _raise_if(problems: Iterable[Problem]) -> None:
    """Raise CheckpointError if there is any problem."""
    if lines := [str(problem) for problem in problems]:
        raise CheckpointError("\n".join(lines))


def _check_tokenizer(path: Path, problems: list[Problem]) -> None:
    config = read_json(path / "tokenizer_config.json", problems)
    vocabularies = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    if not any(all((path / name).is_file() for name in names) for names in vocabularies):
        what = "must hold tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
        problems.append(Problem(str(path), what, "no tokenizer", COPY_AGAIN))
    templates = ("chat_template.jinja", "chat_template.json")
    if not config.get("chat_template") and not any((path / name).is_file() for name in templates):
        cure = "Serve an instruction-tuned model, or add its chat_template.jinja."
        problems.append(Problem(str(path), "must have a chat template", "none in the tokenizer's files", cure))
