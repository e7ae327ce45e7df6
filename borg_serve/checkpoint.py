"""Is this directory a whole, sound checkpoint? Files, names, shapes, dtypes, values, and its manifest if it has one.

Knows the safetensors layout and asks transformers what an architecture needs; knows nothing of engines or devices.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from borg_serve.errors import CheckpointError, Problem
from borg_serve.manifest import (
    MANIFEST_FILE,
    Manifest,
    Progress,
    Reading,
    digest_files,
    read_manifest,
    read_tensors,
)
from borg_serve.weights import COPY_AGAIN, DTYPES, TensorInfo, first_problems, read_headers, read_json

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "TensorInfo", "inspect", "preflight", "read_manifest", "write_manifest"]

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
    weight_bytes: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    max_positions: int
    vocab_size: int


def inspect(directory: Path | str) -> Checkpoint:
    """Read a checkpoint's JSON files and safetensors headers, without its weights and without importing torch.

    Raises CheckpointError with every problem found, one a line.
    """
    path = Path(directory)
    problems: list[Problem] = []
    if not path.is_dir():
        cure = "Give the directory that holds config.json and model.safetensors."
        got = "a file" if path.exists() else "nothing there"
        _refuse([Problem(str(path), "must be a checkpoint directory", got, cure)])
    config = read_json(path / "config.json", problems)
    _check_tokenizer(path, problems)
    tensors = read_headers(path, problems)
    if not config:
        _refuse(problems)

    where = str(path / "config.json")
    _check_no_remote_code(path / "config.json", config, problems)
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
    if tensors and num_layers > len(tensors):  # a damaged number here would keep the structure check busy for hours
        what = f"must not exceed the number of tensors, {len(tensors)}"
        problems.append(Problem(f"{where}: num_hidden_layers", what, num_layers, COPY_AGAIN))
    _refuse(problems)
    return Checkpoint(
        path=path,
        config=config,
        architecture=str(architecture),
        dtype=str(dtype),
        tensors=tensors,
        weight_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        max_positions=max_positions,
        vocab_size=vocab_size,
    )


def preflight(checkpoint: Checkpoint, progress: Progress | None = None, threads: int | None = None) -> str:
    """Prove the checkpoint whole and sound by reading all of it once, and return its Merkle root in hexadecimal.

    In this order: small files against the manifest, tensors against the architecture and the manifest, then the bytes;
    a step's problems are raised together as CheckpointError. Needs torch and transformers, no device.
    """
    path, tensors = checkpoint.path, checkpoint.tensors
    manifest = read_manifest(path)
    if manifest is not None:
        digests = digest_files(path)
        _refuse(
            Problem(
                str(path / name),
                f"must be the file {MANIFEST_FILE} was made with",
                digests.get(name, "no such file"),
                COPY_AGAIN,
            )
            for name in sorted(manifest.files.keys() | digests.keys())
            if manifest.files.get(name) != digests.get(name)
        )
    problems = _structure_problems(checkpoint)
    if manifest is not None:
        names = sorted(manifest.tensors.keys() ^ tensors.keys())
        what = f"must be both in the files and in {MANIFEST_FILE}"
        problems += first_problems(
            names, path, what, lambda name: "only in the " + ("files" if name in tensors else "manifest")
        )
    _refuse(problems)

    readings = read_tensors(tensors.values(), progress, threads)
    problems = _non_finite(checkpoint, readings)
    found = Manifest.of(readings, {})
    if manifest is not None:
        changed = [name for name, leaf in found.tensors.items() if leaf != manifest.tensors[name]]
        what = f"must have the SHA-256 that {MANIFEST_FILE} has for it"
        problems += first_problems(changed, path, what, found.tensors.__getitem__)
    _refuse(problems)
    return found.root


def write_manifest(directory: Path | str, progress: Progress | None = None, threads: int | None = None) -> Manifest:
    """Hash a checkpoint whose values are all finite, and write the result beside it as `borg-manifest.json`."""
    checkpoint = inspect(directory)
    readings = read_tensors(checkpoint.tensors.values(), progress, threads)
    _refuse(_non_finite(checkpoint, readings))
    manifest = Manifest.of(readings, digest_files(checkpoint.path))
    manifest.write(checkpoint.path)
    return manifest


def _refuse(problems: Iterable[Problem]) -> None:
    """Raise CheckpointError if there is any problem."""
    if lines := [str(problem) for problem in problems]:
        raise CheckpointError("\n".join(lines))


def _non_finite(checkpoint: Checkpoint, readings: Mapping[str, Reading]) -> list[Problem]:
    faults = {name: fault for name, reading in readings.items() if (fault := reading.non_finite) is not None}
    return first_problems(sorted(faults), checkpoint.path, "must hold finite values only", faults.__getitem__)


def _check_tokenizer(path: Path, problems: list[Problem]) -> None:
    config = read_json(path / "tokenizer_config.json", problems)
    _check_no_remote_code(path / "tokenizer_config.json", config, problems)
    vocabularies = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    if not any(all((path / name).is_file() for name in names) for names in vocabularies):
        what = "must hold tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
        problems.append(Problem(str(path), what, "no tokenizer", COPY_AGAIN))
    templates = ("chat_template.jinja", "chat_template.json")
    if not config.get("chat_template") and not any((path / name).is_file() for name in templates):
        cure = "Serve an instruction-tuned model, or add its chat_template.jinja."
        problems.append(Problem(str(path), "must have a chat template", "none in the tokenizer's files", cure))


def _check_no_remote_code(path: Path, config: Mapping[str, Any], problems: list[Problem]) -> None:
    if config.get("auto_map"):
        cure = "Use a checkpoint whose architecture transformers has itself."
        problems.append(
            Problem(f"{path}: auto_map", "asks for code from the checkpoint, never run", config["auto_map"], cure)
        )


def _structure_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Compare names, shapes and dtypes with what transformers' own class for this configuration would save."""
    path, tensors = checkpoint.path, checkpoint.tensors
    expected, optional, ignored = _expected_tensors(checkpoint)
    what = f"is needed by {checkpoint.architecture}"
    missing = sorted(expected.keys() - tensors.keys() - optional)
    problems = first_problems(missing, path, what, lambda name: f"no such tensor, shape {tuple(expected[name].shape)}")
    unknown = (name for name in tensors if name not in expected)
    extra = [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]
    what = f"is unknown to {checkpoint.architecture}"
    problems += first_problems(extra, path, what, lambda name: f"shape {tensors[name].shape}")

    common = sorted(expected.keys() & tensors.keys())
    misshapen = [name for name in common if tensors[name].shape != tuple(expected[name].shape)]
    what = f"must have the shape {checkpoint.architecture} gives it"
    problems += first_problems(
        misshapen, path, what, lambda name: f"{tensors[name].shape} instead of {tuple(expected[name].shape)}"
    )
    mistyped = [name for name in common if not _fits(tensors[name], expected[name], checkpoint.dtype)]
    what = f"must have the dtype of config.json, {checkpoint.dtype}, or float32, where it is not quantised"
    return problems + first_problems(mistyped, path, what, lambda name: tensors[name].dtype)


def _fits(tensor: TensorInfo, expected: "torch.Tensor", dtype: str) -> bool:
    """Tell whether a tensor's dtype is the expected one, or for an ordinary float the checkpoint's own or float32.

    Some sound checkpoints keep norms, router biases or scales wider than the rest.
    """
    names = {str(expected.dtype).removeprefix("torch.")}
    if expected.is_floating_point() and expected.itemsize > 1:
        names |= {dtype, "float32"}
    return DTYPES[tensor.dtype].torch_name in names


def _expected_tensors(checkpoint: Checkpoint) -> tuple[dict[str, "torch.Tensor"], set[str], set[str]]:
    """Build the model from its configuration without memory; return its tensors as a checkpoint of it would hold them,
    the names tied to others and so free to be absent, and patterns of names that the architecture allows and ignores.
    """
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    where = f"{checkpoint.path / 'config.json'}: architectures"
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        with torch.device("meta"):
            build = transformers.AutoModelForCausalLM.from_config
            model = build(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
        if checkpoint.config.get("quantization_config"):
            from transformers.quantizers.auto import AutoHfQuantizer

            quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
            quantizer.validate_environment()
            quantizer.quantization_config.dequantize = False  # without a GPU it would plan for full-width tensors
            quantizer.preprocess_model(model, dtype=model.dtype, device_map=None, checkpoint_files=[])
    except Exception as error:  # a wrong value surfaces as whatever it happens to trip over, deep in transformers
        what = f"must be one that transformers {transformers.__version__} can build from this config.json"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "Serve a checkpoint of a model that it knows, or correct the file."
        raise CheckpointError(str(Problem(where, what, f"{checkpoint.architecture} ({reason})", cure))) from error
    built = type(model).__name__
    if built != checkpoint.architecture:
        what = f"must be what model_type {config.model_type!r} builds, {built}"
        raise CheckpointError(str(Problem(where, what, checkpoint.architecture, COPY_AGAIN)))
    expected = revert_weight_conversion(model, model.state_dict())
    # Old checkpoints keep this computed buffer in every layer; transformers and vLLM both skip it.
    ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"}
    return expected, set(model.all_tied_weights_keys), ignored
