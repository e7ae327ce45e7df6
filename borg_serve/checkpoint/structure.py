"""Compares names, shapes and dtypes with what the checkpoint's architecture needs.

Asks transformers for the architecture, and its caller for the layers of a quantised checkpoint; knows no engine.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from borg_serve.checkpoint.files import COPY_AGAIN, DTYPES, TensorInfo, first_problems
from borg_serve.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

    from borg_serve.checkpoint.check import Checkpoint

__all__ = ["Quantised", "expected", "problems"]

Quantised = Callable[["Checkpoint", Mapping[str, tuple[int, int]]], "Mapping[str, Mapping[str, torch.Tensor] | None]"]
"""(a checkpoint, each linear layer's input and output size) -> the tensors of each layer by their names below its own,
or None where they cannot be known."""

FLOATS = {"float16", "bfloat16", "float32"}
"""Engines convert among these when they load: norms, router biases and scales are often kept wider than the rest."""
IGNORED = (r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",)
"""Computed buffers that old checkpoints keep in every layer; transformers and vLLM both skip them."""
IGNORED_QUANTISED = (r"\.g_idx$", r"\.[qkv]_(scale|zero_point)$", r"\.[qkv]_proj\.output_scale$")
"""What vLLM drops: GPTQ's order of inputs, and scales of the KV cache, which has its own dtype here."""


@dataclass
class Expected:
    """What a checkpoint should hold."""

    tensors: "dict[str, torch.Tensor]"
    optional: set[str]
    """Names that may be absent because they are tied to others."""
    ignored: list[str]
    """Patterns of names that the architecture ignores."""
    unknown: list[str]
    """Quantised layers whose tensors cannot be known."""


def problems(checkpoint: "Checkpoint", quantised: Quantised | None) -> list[Problem]:
    """Return what is wrong with the names, shapes and dtypes of a checkpoint's tensors.

    Raises CheckpointError when its architecture is not known.
    """
    path, tensors, architecture = checkpoint.path, checkpoint.tensors, checkpoint.architecture
    needed = expected(checkpoint, quantised)
    shapes = {name: tuple(tensor.shape) for name, tensor in needed.tensors.items()}
    what = f"is needed by {architecture}"
    missing = sorted(shapes.keys() - tensors.keys() - needed.optional)
    found = first_problems(missing, path, what, lambda name: f"no such tensor, shape {shapes[name]}")
    layers = {name.rpartition(".")[0] for name in tensors if not name.endswith(".bias")}
    bare = [f"{layer}.*" for layer in needed.unknown if layer not in layers]
    found += first_problems(bare, path, what, lambda _: "no tensor of this layer")
    ignored = [*needed.ignored, *(rf"^{re.escape(layer)}\.[^.]+$" for layer in needed.unknown)]
    pattern = re.compile("|".join(ignored))
    extra = [name for name in tensors if name not in shapes and not pattern.search(name)]
    found += first_problems(extra, path, f"is unknown to {architecture}", lambda name: f"shape {tensors[name].shape}")

    common = sorted(shapes.keys() & tensors.keys())
    misshapen = [name for name in common if not _same(tensors[name].shape, shapes[name])]
    what = f"must have the shape {architecture} gives it"
    found += first_problems(misshapen, path, what, lambda name: f"{tensors[name].shape} instead of {shapes[name]}")
    mistyped = [name for name in common if not _fits(tensors[name], needed.tensors[name])]
    what = f"must have a dtype that {architecture} can load"
    return found + first_problems(
        mistyped, path, what, lambda name: f"{tensors[name].dtype} instead of {_name(needed.tensors[name])}"
    )


def expected(checkpoint: "Checkpoint", quantised: Quantised | None) -> Expected:
    """Return the tensors that a checkpoint should hold, from a model that is built without memory."""
    from torch import nn
    from transformers.core_model_loading import revert_weight_conversion

    model = _model(checkpoint)
    tensors = dict(revert_weight_conversion(model, model.state_dict()))
    optional = set(model.all_tied_weights_keys)
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *IGNORED]
    needed = Expected(tensors, optional, ignored, [])
    if checkpoint.quantisation is None:
        return needed
    if quantised is None:
        raise TypeError("a quantised checkpoint needs a function that knows its layers")
    head = model.get_output_embeddings()
    modules = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    if checkpoint.quantisation.get("lm_head") is True:
        modules.add("lm_head")
    names = {f"{name}.weight" for name in modules} | {name for name in tensors if re.search(r"\.experts\.\d+\.", name)}
    weights = {name: tensors[name].shape for name in names if name in tensors and tensors[name].dim() == 2}
    linears = {name.removesuffix(".weight"): (shape[1], shape[0]) for name, shape in sorted(weights.items())}
    for layer, parameters in quantised(checkpoint, linears).items():
        del tensors[f"{layer}.weight"]
        if parameters is None:
            needed.unknown.append(layer)
        else:
            tensors |= {f"{layer}.{name}": tensor for name, tensor in parameters.items()}
        if parameters is None or "weight" not in parameters:
            # GPTQ's programs write a bias of zeros to each layer they pack; vLLM drops it.
            ignored.append(rf"^{re.escape(layer)}\.bias$")
    ignored += IGNORED_QUANTISED
    return needed


def _model(checkpoint: "Checkpoint") -> Any:
    import torch
    import transformers

    file = checkpoint.path / "config.json"
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            build: Any = transformers.AutoModelForCausalLM.from_config
            model = build(config, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:  # a wrong value can raise anything, deep in transformers
        if code := checkpoint.config.get("auto_map"):
            what = "asks for code from the checkpoint, never run, for an architecture that transformers does not have"
            cure = "Use a checkpoint whose architecture transformers has itself."
            raise CheckpointError(str(Problem(f"{file}: auto_map", what, code, cure))) from error
        what = f"must be one that transformers {transformers.__version__} can build from this config.json"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "Serve a checkpoint of a model that it knows, or correct the file."
        got = f"{checkpoint.architecture} ({reason})"
        raise CheckpointError(str(Problem(f"{file}: architectures", what, got, cure))) from error
    built = type(model).__name__
    if built != checkpoint.architecture:
        what = f"must be what model_type {config.model_type!r} builds, {built}"
        raise CheckpointError(str(Problem(f"{file}: architectures", what, checkpoint.architecture, COPY_AGAIN)))
    return model


def _same(shape: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Whether two shapes are the same; a scale for a whole tensor is saved as a number or as a list of one."""
    return shape == needed or (len(shape) < 2 and len(needed) < 2 and math.prod(shape) == math.prod(needed) == 1)


def _name(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fits(tensor: TensorInfo, needed: "torch.Tensor") -> bool:
    """Tell whether a tensor's dtype is the expected one, or another ordinary float where one is expected."""
    name = DTYPES[tensor.dtype]
    return name == _name(needed) or (name in FLOATS and _name(needed) in FLOATS)
