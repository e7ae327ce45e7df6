"""How far the engine is with the request at hand, which vLLM's own answer tells only at its end.

The engine's client fills it in for whoever has set it. It does not know protocols.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["CURRENT", "Progress"]


@dataclass
class Progress:
    """All are 0 until the prompt has been tokenised."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Until the first token is there: the identity's, which every prompt finds in the KV cache."""
    output_tokens: int = 0
    """Of all choices together."""
    first_token_at: float = 0.0
    """Monotonic time in seconds."""
    look: "Callable[[Progress], None]" = lambda progress: None
    """Brings the counts up to date."""

    def now(self) -> "Progress":
        """Return itself, up to date."""
        self.look(self)
        return self


CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)
