"""The engine boundary: no generation starts unless its prompt begins with the identity's token ids (I1).

It knows the requests that vLLM sends its engine, and the identity's ids. It does not know how a prompt was made, by
which route, or for whom.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from borg_serve import metrics
from borg_serve.errors import EngineError
from borg_serve.upstream import require

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

__all__ = ["Guard", "GuardedCore", "IdentityMissing", "violation"]

logger = logging.getLogger(__name__)


class IdentityMissing(Exception):
    """A prompt reached the engine without the identity; vLLM answers it with a 500."""


def violation(request: "EngineCoreRequest", identity: Sequence[int]) -> str | None:
    """Why the engine must not start this request, or None. `identity`: a list of token ids."""
    if request.prompt_embeds is not None:
        return "the prompt is given as embeddings"
    if request.resumable:
        return "the prompt may be extended later"
    ids = request.prompt_token_ids
    if ids is None or ids[: len(identity)] != identity:
        return "the prompt does not begin with the identity"
    return None


class Guard:
    """Counts, logs and refuses requests without the identity. Raises EngineError if the identity has no tokens."""

    def __init__(self, identity: Sequence[int]) -> None:
        self._identity = list(identity)
        if not self._identity:
            raise EngineError("guard: the identity has no tokens, got an empty list. Check identity.prompt.")

    def check(self, request: "EngineCoreRequest") -> None:
        """Raise IdentityMissing if the engine must not start this request."""
        reason = violation(request, self._identity)
        if reason is not None:
            metrics.GUARD_REFUSALS.inc()
            logger.error("guard refused request %s: %s", request.external_req_id or request.request_id, reason)
            raise IdentityMissing(reason)


class GuardedCore:
    """The client of vLLM's engine core, with the guard before its one way of adding a request.

    Raises EngineError if vLLM moved that.
    """

    def __init__(self, core: Any, guard: Guard) -> None:
        require("guard", type(core), "add_request_async")
        self._core, self._guard = core, guard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    async def add_request_async(self, request: "EngineCoreRequest") -> None:
        """Send a request to the engine, whatever code asks for it."""
        self._guard.check(request)
        await self._core.add_request_async(request)
