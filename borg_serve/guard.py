"""The engine boundary: no generation starts unless its prompt begins with the identity's token ids (I1).

It knows vLLM's engine client and the identity's ids. It does not know how a prompt was made, by which route, or for
whom: whatever door is left open before it, nothing without the identity passes here.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from borg_serve import metrics
from borg_serve.errors import EngineError

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["IdentityMissing", "install", "violation"]

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


def install(client: "AsyncLLM", identity: Sequence[int]) -> None:
    """Make this engine client refuse every prompt without the identity. Call it before the first request.

    Both of the client's ways to its engine are closed: `AsyncLLM._add_request`, where a refusal leaves nothing
    behind, and `engine_core.add_request_async`, which everything else passes. Raises EngineError if vLLM moved them.
    """
    ids = list(identity)
    if not ids:
        raise EngineError("guard: the identity has no tokens, got an empty list. Check identity.prompt.")
    core: Any = client.engine_core
    for owner, name in ((client, "_add_request"), (core, "add_request_async")):
        if not callable(getattr(owner, name, None)):
            cure = "Use the pinned vLLM."
            raise EngineError(
                f"guard: vLLM moved {type(owner).__name__}.{name}, got {vars(type(owner)).keys()}. {cure}"
            )
    add_request, core_add_request = client._add_request, core.add_request_async

    def check(request: "EngineCoreRequest") -> None:
        reason = violation(request, ids)
        if reason is not None:
            metrics.GUARD_REFUSALS.inc()
            logger.error("guard refused request %s: %s", request.external_req_id or request.request_id, reason)
            raise IdentityMissing(reason)

    async def guarded_add_request(request: "EngineCoreRequest", *args: Any) -> None:
        check(request)
        await add_request(request, *args)

    async def guarded_core_add_request(request: "EngineCoreRequest") -> None:
        check(request)
        await core_add_request(request)

    client._add_request = guarded_add_request  # type: ignore[method-assign, assignment]
    core.add_request_async = guarded_core_add_request
