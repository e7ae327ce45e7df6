"""How far the engine is with the prompt of the request at hand, which vLLM's own answer tells only at its end.

The engine's client fills it in for whoever has set it. It does not know protocols.
"""

from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["CURRENT", "Progress"]


@dataclass
class Progress:
    """Both are 0 until the prompt has been tokenised."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Until the first token is there: the identity's, which every prompt finds in the KV cache."""


CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)
