"""Which tensors vLLM's own loaders read for the linear layers of a quantised checkpoint, and if the device has kernels.

Knows vLLM's quantisation methods; reads no checkpoint's tensors and starts nothing.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from borg_serve.checkpoint.check import Checkpoint
from borg_serve.engine.arguments import in_a_line
from borg_serve.engine.environment import device
from borg_serve.errors import CheckpointError, EngineError, Problem
from borg_serve.upstream import pinned

if TYPE_CHECKING:
    import torch

__all__ = ["layers", "served_layers"]

FAILURES = (ValueError, NotImplementedError, RuntimeError, ImportError, AssertionError)
"""What vLLM raises where a device, or what is installed, has no kernel for a layer."""

Layers = dict[str, "dict[str, torch.Tensor] | None"]


def layers(checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]]) -> Layers:
    """Return the tensors of each linear layer, on the meta device by their names below the layer's.

    `linears` has each layer's input and output size. A layer has None if this device has no kernel for it, and vLLM
    then does not say what it needs. Raises CheckpointError if vLLM knows no such quantisation.
    """
    return _layers(checkpoint, _quantisation(checkpoint), linears, checkpoint.dtype)[0]


def served_layers(checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]], dtype: str = "auto") -> Layers:
    """The same, for a checkpoint that is to be served here in `dtype`, `auto` for its own. Raises EngineError too."""
    quantisation, dtype = _quantisation(checkpoint), checkpoint.dtype if dtype == "auto" else dtype
    known = [str(each).removeprefix("torch.") for each in quantisation.get_supported_act_dtypes()]
    if dtype not in known:
        cure = "Set model.dtype to one of them, or leave it out."
        what = f"must be {' or '.join(known)} with the quantisation of {checkpoint.path}"
        raise EngineError(str(Problem("model.dtype", what, dtype, cure)))
    found, reason = _layers(checkpoint, quantisation, linears, dtype)
    if reason is None and device() == "cpu":
        reason = _trial(checkpoint, quantisation, linears, dtype)
    if reason is not None:
        where = f"{checkpoint.path / 'config.json'}: quantization_config"
        cure = "Serve it on a device that can, or a checkpoint of another kind."
        raise EngineError(f"{where}: vLLM cannot serve it on this device ({device()}), got {reason}. {cure}")
    return found


def _layers(
    checkpoint: Checkpoint, quantisation: Any, linears: Mapping[str, tuple[int, int]], dtype: str
) -> tuple[Layers, str | None]:
    """The layers, and why this device cannot serve them."""
    import torch

    with pinned("engine"):
        from vllm.model_executor.layers.linear import LinearBase

    computed, reason = getattr(torch, dtype), None
    found: Layers = {}
    with _alone(checkpoint, computed):
        for prefix, (inputs, outputs) in linears.items():
            try:
                layer = LinearBase(inputs, outputs, quant_config=quantisation, prefix=prefix, params_dtype=computed)
            except FAILURES as error:
                reason, found[prefix] = reason or in_a_line(error).removesuffix(" Reasons:"), None
                continue
            try:
                layer.quant_method.create_weights(
                    layer, inputs, [outputs], inputs, outputs, computed, weight_loader=lambda *_: None
                )
            except FAILURES as error:
                reason = reason or in_a_line(error).removesuffix(" Reasons:")
            found[prefix] = {name: tensor.data for name, tensor in layer.named_parameters()} or None
    return found, reason


def _trial(checkpoint: Checkpoint, quantisation: Any, linears: Mapping[str, tuple[int, int]], dtype: str) -> str | None:
    """Compute with the smallest layer; why it cannot be. On a CPU vLLM chooses kernels that it was not built with."""
    import torch

    with pinned("engine"):
        from vllm.model_executor.layers.linear import ReplicatedLinear

    prefix, (inputs, outputs) = min(linears.items(), key=lambda item: math.prod(item[1]))
    computed = getattr(torch, dtype)
    with _alone(checkpoint, computed), torch.device("cpu"), torch.inference_mode():
        try:
            layer = ReplicatedLinear(
                inputs, outputs, bias=False, quant_config=quantisation, prefix=prefix, params_dtype=computed
            )
            for name, tensor in layer.named_parameters():
                tensor.data.fill_(1 if "scale" in name else 0)
            layer.quant_method.process_weights_after_loading(layer)
            layer(torch.zeros(1, inputs, dtype=computed))
        except (*FAILURES, AttributeError) as error:  # torch raises the latter for a kernel that is not in the build
            return in_a_line(error)
    return None


def _quantisation(checkpoint: Checkpoint) -> Any:
    """The checkpoint's `quantization_config` in vLLM's form, which finds layers that are not quantised by itself."""
    with pinned("engine"):
        from vllm.model_executor.layers.quantization import get_quantization_config

    config = dict(checkpoint.quantisation or {})
    name = str(config.get("quant_method", "")).lower().replace("_tensors", "-tensors")
    try:
        found = get_quantization_config(name).from_config(config)
        found.maybe_update_config(str(checkpoint.path))
    except Exception as error:  # a wrong value can raise anything, deep in vLLM
        what = f"must be one that vLLM can load ({in_a_line(error)})"
        cure = "Serve a checkpoint that is quantised in another way, or not at all."
        where = f"{checkpoint.path / 'config.json'}: quantization_config"
        raise CheckpointError(str(Problem(where, what, name, cure))) from error
    return found


@contextmanager
def _alone(checkpoint: Checkpoint, dtype: "torch.dtype") -> Iterator[None]:
    """Let vLLM's layers be made on the meta device, outside an engine: they ask for its settings and its workers."""
    import torch

    with pinned("engine"):
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import parallel_state

    config = VllmConfig()
    model = SimpleNamespace(**checkpoint.config)
    config.model_config = SimpleNamespace(dtype=dtype, hf_config=model, hf_text_config=model)  # type: ignore[assignment]
    before, parallel_state._TP = parallel_state._TP, SimpleNamespace(rank_in_group=0, world_size=1)  # type: ignore[assignment]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as vLLM's loader does: kernels are chosen by it
    try:
        with set_current_vllm_config(config), torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(default)
        parallel_state._TP = before
