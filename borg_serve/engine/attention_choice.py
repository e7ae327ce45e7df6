"""Choose an engine's attention from `identity.attention`, the device and the identity's length.

It starts nothing. `vllm_plugin.attention` is what it may choose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from borg_serve.config import Config
from borg_serve.errors import EngineError

__all__ = ["PREFIX_OPTION", "Choice", "arguments", "choose", "sharing"]

PREFIX_OPTION = "borg_serve_prefix_tokens"
"""Key of vLLM's `additional_config`: how many tokens every prompt begins with. Only a guarded server sets it."""
LEAST_TOKENS = 512
"""A shorter prefix saves less than the second pass costs."""
HOPPER = 9
"""The compute capability that FlashAttention 3 is made for."""


@dataclass(frozen=True)
class Choice:
    """An attention, and the reason in a few words."""

    name: Literal["shared", "stock"]
    reason: str


def choose(config: Config, prefix_tokens: int, device: Literal["cpu", "cuda"], capability: int | None) -> Choice:
    """Choose for a prefix of so many tokens. `capability`: the GPU's major compute capability, None without one.

    Raises EngineError if `identity.attention: shared` cannot be had.
    """
    asked = config.identity.attention
    if asked == "stock":
        return Choice("stock", "identity.attention says so")
    named = config.engine.get("attention_backend") or (config.engine.get("attention_config") or {}).get("backend")
    reasons = {
        "the engine runs on the CPU": device == "cpu",
        f"engine.attention_backend is {named}": named is not None,
        "no GPU was found": capability is None,
        f"the GPU has compute capability {capability}, and FlashAttention 3 needs {HOPPER}": capability != HOPPER,
        f"the identity has {prefix_tokens} tokens, and it pays from {LEAST_TOKENS} on": prefix_tokens < LEAST_TOKENS,
    }
    against = [reason for reason, holds in reasons.items() if holds]
    if asked == "shared" and against and prefix_tokens >= LEAST_TOKENS:
        cure = "Set identity.attention: auto, or stock."
        raise EngineError(f"{config.file}: identity.attention: cannot be shared: {against[0]}, got 'shared'. {cure}")
    if against and asked == "auto":
        return Choice("stock", against[0])
    return Choice("shared", f"the KV of the identity's {prefix_tokens} tokens is read once for all users of a step")


def arguments(config: Config, choice: Choice, prefix_tokens: int) -> dict[str, Any]:
    """vLLM's arguments that follow from a choice, and from the prefix."""
    found = sharing(prefix_tokens, config.engine.get("additional_config") or {})
    if choice.name == "stock":
        del found["attention_backend"]
    return found


def sharing(prefix_tokens: int, more: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """vLLM's arguments for an engine whose prompts all begin with the same tokens. `more`: its additional_config."""
    return {"attention_backend": "CUSTOM", "additional_config": {**more, PREFIX_OPTION: prefix_tokens}}
